"""What CSVs say of single images: how large their pixels are, and that they hold no target."""

from collections.abc import Sequence
from dataclasses import dataclass

from stas_core import storage
from stas_core.data.id_table import KEY, IdTable, read_id_table
from stas_core.data.images import COARSEST_MPP, FINEST_MPP, IMAGE_SUFFIXES


@dataclass(frozen=True)
class ImageTables:
    """The tables that are given; None: there is none."""

    mpp: IdTable[float] | None
    negatives: IdTable[str] | None
    fingerprints: tuple[str, ...]
    """Of the files' bytes."""

    def notes(self, ids: Sequence[str]) -> list[str]:
        """Say, in words, which rows name none of the images."""
        found = []
        for table in (self.mpp, self.negatives):
            if table is not None and (unused := table.unused(ids)):
                found.append(f"{table.source}: {len(unused)} row(s) name no image to prepare, first {unused[0]}")
        return found

    def mpp_of(self, ids: Sequence[str]) -> dict[str, float]:
        """Return the um per pixel of the images that have a row.

        Raises:
            ConfigError: two rows of an image contradict each other (`a` and `a.jpg`).
        """
        if self.mpp is None:
            return {}
        named = self.mpp.named(ids)
        return dict(zip(named, self.mpp.values_of(named), strict=True))

    def negatives_of(self, ids: Sequence[str]) -> set[str]:
        """Return the images that are said to hold no target."""
        return set() if self.negatives is None else set(self.negatives.named(ids))


def read_image_tables(mpp_csv: str | None, negatives: str | None) -> ImageTables:
    """Read the CSVs.

    Args:
        mpp_csv: columns `image_id` and `mpp`; a path or URI, or None.
        negatives: column `image_id`; likewise.

    Raises:
        ConfigError: one is no such table, or contradicts itself.
        StorageError: one cannot be read.
    """
    sizes = None if mpp_csv is None else storage.read_bytes(mpp_csv)
    names = None if negatives is None else storage.read_bytes(negatives)
    suffixes = IMAGE_SUFFIXES
    return ImageTables(
        None
        if sizes is None
        else read_id_table(sizes, "mpp", f"data.mpp_csv = {mpp_csv}", parse=um_per_px, suffixes=suffixes),
        None
        if names is None
        else read_id_table(names, KEY, f"data.negatives = {negatives}", parse=str, suffixes=suffixes),
        tuple(storage.fingerprint(data) for data in (sizes, names) if data is not None),
    )


def um_per_px(cell: str) -> float:
    """Return the um per pixel of a cell, with a decimal point or comma.

    Raises:
        ValueError: it is no such number, or none that microscopes have.
    """
    try:
        value = float(cell.replace(",", "."))
    except ValueError:
        value = 0.0
    if not FINEST_MPP <= value <= COARSEST_MPP:
        raise ValueError(f"{cell!r}, expected um per pixel, {FINEST_MPP:g} to {COARSEST_MPP:g}")
    return value
