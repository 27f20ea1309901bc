"""What a page shows, as plain values: builders fill it in, `page` makes HTML of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from stas_core.arrays import Mask, ProbMapU8

MOST_WITH_PICTURES = 3_000
"""With more images than this, only those of the first page have pictures."""
MOST_LISTED = 30_000
"""Images of a page's tables; of more, those are listed that deserve a look first."""
Kind = Literal["text", "number", "whole", "share", "flag"]


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    key: str
    """Of the value in a row."""
    title: str
    help: str = ""
    """What it says, for who rests on its title."""
    kind: Kind = "number"
    digits: int = 3
    """After the point, of a number."""


@dataclass(frozen=True)
class Table:
    """Rows of values by column; a missing value is shown as a dash."""

    title: str
    reading: str
    """One sentence on how to read it."""
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Figure:
    """A picture of figures, or a chart."""

    title: str
    reading: str
    """One sentence on how to read it."""
    image: str = ""
    """Data URI of a picture; empty: it is a chart."""
    chart: "Chart | None" = None
    is_wide: bool = False
    strips: Sequence["Strip"] = ()
    """Rows of pictures, in place of one."""


@dataclass(frozen=True)
class Strip:
    """Pictures side by side."""

    title: str
    tiles: Sequence[tuple[str, str]]
    """Of each the caption and the data URI."""


@dataclass(frozen=True)
class Series:
    """A line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    """x, y; from left to right."""
    is_dashed: bool = False
    colour: int | None = None
    """Number of its colour; null: its place among the lines."""


@dataclass(frozen=True)
class Chart:
    """Lines over one x axis, read with the pointer or the arrow keys."""

    x_label: str
    y_label: str
    series: Sequence[Series]
    y_range: tuple[float, float] | None = None
    """Null: that of the points."""
    marks: Sequence[tuple[float, str]] = ()
    """Values of x that are marked, and what they are."""
    whole_x: bool = False
    """Whether x is counted, as epochs are."""
    start: float | None = None
    """The x that is read first; null: the last."""


@dataclass(frozen=True)
class PictureSource:
    """Where the layers of an image are; what is empty is not shown."""

    image_uri: str
    """Of an image, or of a figure that a run drew."""
    mask_uri: str = ""
    map_uri: str = ""
    disagreement_uri: str = ""
    truth_uri: str = ""
    missed_uri: str = ""
    """Mask of the true targets that were missed; like `false_uri`, where it is known."""
    false_uri: str = ""
    """Mask of the found targets that are false."""
    found_by: Callable[[ProbMapU8], Mask] | None = None
    """Makes the mask of the map, where there is no file of it."""
    truth_by: Callable[[Mask], Mask] | None = None
    """Makes the truth, given the mask, where it is no mask file."""
    mpp: float | None = None
    """um per pixel of the image, where it is known."""
    width_um: float | None = None
    """um over the width of the image, where that is known in place of `mpp`."""
    full_width_px: int | None = None
    """In which the boxes of targets count, where `image_uri` is a smaller picture of what they were found in."""
    mpp_note: str = ""
    """Whose word that is."""
    is_figure: bool = False
    """Whether `image_uri` is a figure."""
    beside: Sequence[tuple[str, str]] = ()
    """Further figures that are shown below: title, path."""
    notes: Sequence[str] = ()
    """What is known to be missing, and why; `truth: why` of a layer."""


@dataclass(frozen=True)
class Item:
    """An image or slide: its row, its layers, its targets."""

    id: str
    values: Mapping[str, Any]
    source: PictureSource | None = None
    targets: Sequence[Mapping[str, Any]] = ()
    """Of each target its `number`, `box` (x0, y0, x1, y1 in px; null: it has no place) and the values of
    `Contents.target_columns`."""
    tags: Sequence[str] = ()
    """What it may be filtered by."""
    problem: str = ""
    """Why it could not be used."""
    targets_note: str = ""
    """Which targets are not listed."""


@dataclass(frozen=True)
class Part:
    """The page of another run, for an index."""

    title: str
    link: str
    """Relative."""
    level: str
    note: str


@dataclass(frozen=True)
class Contents:
    """What a page shows beside what every page shows of its run."""

    title: str
    lead: str
    """A sentence: what this is."""
    facts: Sequence[tuple[str, str]] = ()
    """The figures that come first: what, and how much."""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    items: Sequence[Item] = ()
    """Those that deserve a look first."""
    num_items: int | None = None
    """Of all, where not all are given; null: these are all."""
    item_word: str = "image"
    item_order: str = ""
    """In what order the items stand, as a phrase."""
    item_notes: Sequence[str] = ()
    """What is missing of all items, and why."""
    columns: Sequence[Column] = ()
    """Of the items."""
    is_stacked: bool = False
    """Whether pictures are shown below the table of items, in full width, not beside it."""
    target_columns: Sequence[Column] = ()
    files: Sequence[tuple[str, str]] = ()
    """What else is in the folder: path, and what it holds."""
    parts: Sequence[Part] = ()
    layer_names: Mapping[str, str] = field(default_factory=dict)
    """What layers are called, where not as usual."""
