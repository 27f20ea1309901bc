"""The page of prepare_data: the images of a cohort with their annotations."""

from collections.abc import Sequence

import numpy as np

from stas_core.data.cohort import HOLD_OUT, CohortRow, read_cohort
from stas_core.pages.contents import Column, Contents, Item, PictureSource, Table
from stas_core.pages.finished import FinishedRun, failed_items, mpp_of

_FIGURES = (
    (
        "strata",
        "How much of the images is target",
        "A bar is a part of the split, stacked by how much of each image is target; alike bars make alike folds.",
    ),
    (
        "targets_per_image",
        "Targets per image",
        "Bars count images; a bar at 0 is images without a target.",
    ),
    (
        "target_areas",
        "Areas of targets",
        "Boxes: the middle half of the areas, by how much of their image is target; specks far below may be slips.",
    ),
)
_COLUMNS = (
    Column("split", "split", "train or hold-out", kind="text"),
    Column("fold", "fold", "of cross-validation; a dash: hold-out", kind="whole"),
    Column("targets", "targets", "separate areas of the mask", kind="whole"),
    Column("share", "target", "share of the image that is target", kind="share", digits=2),
    Column("largest", "largest px", "area of the largest target", kind="whole"),
    Column("group", "group", "patient or slide; without groups the image itself", kind="text"),
    Column("size", "size px", "width x height", kind="text"),
    Column("findings", "noted", "oddities of the annotation that were kept", kind="text"),
)
_FILES = (
    ("cohort.parquet", "the table that every later stage reads, a row per image"),
    ("masks/", "the targets of each image, black and white"),
    ("failures.parquet", "what could not be used, and why"),
    ("split.json", "how hold-out and folds were drawn"),
    ("figures/", "the figures of this page and a contact sheet, in full size"),
)


def build(run: FinishedRun) -> Contents:
    """Return the contents of the page."""
    rows = read_cohort(run.path("cohort.parquet"))
    failures = run.failures()
    noted = [row for row in rows if row.findings]
    rest = [row for row in rows if not row.findings]
    targets = sum(row.num_targets for row in rows)
    without = sum(row.num_targets == 0 for row in rows)
    held_out = sum(row.split == HOLD_OUT for row in rows)
    unused = set() if any(row.group != row.id for row in rows) else {"group"}
    unused |= set() if noted else {"findings"}
    facts = [
        ("images", f"{len(rows):,}"),
        ("not usable", f"{len(failures):,}"),
        ("targets", f"{targets:,}"),
        ("without a target", f"{without:,}"),
        ("hold-out", f"{held_out:,}"),
        ("median target", f"{100 * float(np.median([row.foreground_share for row in rows])):.1f} %" if rows else "-"),
    ]
    return Contents(
        title=f"Cohort of {len(rows):,} images",
        lead="Images with their annotations as training and evaluation see them. Look for outlines that belong to "
        "another image, targets that were forgotten, and images that do not belong here.",
        facts=facts,
        figures=run.figures(_FIGURES),
        tables=_tables(run, rows),
        items=[*failed_items(failures), *map(_item, [*noted, *rest])],
        item_order="what failed, what something was noted of, and the rest by name",
        columns=[column for column in _COLUMNS if column.key not in unused],
        files=run.files(_FILES),
        layer_names={"truth": "annotation"},
    )


def _item(row: CohortRow) -> Item:
    mpp, mpp_note = mpp_of(row, None)
    tags = [row.split] if row.fold is None else [row.split, f"fold {row.fold}"]
    tags.append("with target" if row.num_targets else "without target")
    tags += ["noted"] if row.findings else []
    values = {
        "split": row.split,
        "fold": row.fold,
        "targets": row.num_targets,
        "share": row.foreground_share,
        "largest": max(row.target_areas_px, default=0),
        "group": row.group,
        "size": f"{row.width} x {row.height}",
        "findings": "; ".join(row.findings) or None,
    }
    source = PictureSource(row.image_uri, truth_uri=row.mask_uri, mpp=mpp, mpp_note=mpp_note)
    return Item(row.id, values, source, tags=tuple(tags))


def _tables(run: FinishedRun, rows: Sequence[CohortRow]) -> list[Table]:
    parts = {(row.split, -1 if row.fold is None else row.fold) for row in rows}
    columns = (
        Column("part", "part", kind="text"),
        Column("images", "images", kind="whole"),
        Column("targets", "targets", kind="whole"),
        Column("without", "without a target", kind="whole"),
        Column("groups", "groups", "patients or slides", kind="whole"),
        Column("share", "mean target", "share of an image that is target", kind="share", digits=2),
    )
    lines = []
    for split, fold in sorted(parts, key=lambda part: (part[0] == HOLD_OUT, part[1])):
        own = [row for row in rows if row.split == split and (-1 if row.fold is None else row.fold) == fold]
        lines.append(
            {
                "part": split if fold < 0 else f"fold {fold}",
                "images": len(own),
                "targets": sum(row.num_targets for row in own),
                "without": sum(row.num_targets == 0 for row in own),
                "groups": len({row.group for row in own}),
                "share": float(np.mean([row.foreground_share for row in own])),
            }
        )
    found = [Table("The split", "No group is in two parts; shares of target should be alike.", columns, lines)]
    labels = run.record.get("labels")
    if isinstance(labels, dict) and labels:
        named = [
            {"label": name, "shapes": one.get("shapes"), "images": one.get("images"), "means": one.get("means")}
            for name, one in labels.items()
            if isinstance(one, dict)
        ]
        reading = "What the annotations call their shapes, and what that was taken for."
        of_labels = (
            Column("label", "label", kind="text"),
            Column("means", "taken as", kind="text"),
            Column("shapes", "shapes", kind="whole"),
            Column("images", "images", kind="whole"),
        )
        found.append(Table("Labels", reading, of_labels, named))
    return found
