"""A small cohort of phantom fields, prepared in plain Python."""

from pathlib import Path

from stas_core.data import cohort, images
from stas_core.data.annotations import AnnotationConfig
from stas_core.data.cohort import SplitConfig
from stas_core.data.phantom import PhantomConfig, make_phantom, phantom_id


def write_fields(folder: Path, phantom: PhantomConfig) -> Path:
    """Write images/ and annotations/ of phantom fields below a folder; return it."""
    (folder / "images").mkdir()
    (folder / "annotations").mkdir()
    for index in range(phantom.num_images):
        made, name = make_phantom(phantom, index), phantom_id(index)
        (folder / "images" / f"{name}.jpg").write_bytes(images.encode_jpeg(made.image))
        (folder / "annotations" / f"{name}.json").write_bytes(made.labelme)
    return folder


def prepare(fields: Path, out: Path) -> str:
    """Write masks and cohort.parquet of those fields (two folds, no hold-out); return the table's path."""
    (out / "masks").mkdir()
    rows = []
    for image in sorted((fields / "images").iterdir()):
        annotation = fields / "annotations" / f"{image.stem}.json"
        measured = cohort.measure(image.read_bytes(), annotation.read_bytes(), image.stem, config=AnnotationConfig())
        (out / "masks" / f"{image.stem}.png").write_bytes(images.encode_mask(measured.mask))
        uris = {"image_uri": str(image), "annotation_uri": str(annotation), "mask_uri": f"masks/{image.stem}.png"}
        rows.append({"id": image.stem, "group": image.stem, "split": cohort.TRAIN, **uris, **measured.values})
    split = SplitConfig(num_folds=2, hold_out_fraction=0)
    folds = cohort.draw_split([row["stratum"] for row in rows], None, split).folds
    cohort.write_cohort(str(out / "cohort.parquet"), [row | {"fold": f} for row, f in zip(rows, folds, strict=True)])
    return str(out / "cohort.parquet")
