"""How good the mask of a slide is: pixels, targets, and what they cost at every threshold, in bounded memory.

Both masks are read tile by tile in one frame, so slides of any size can be compared. Targets match as those of fields
do (`scores.metrics.count_targets`): one to one, with an IoU of at least 0.5.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stas_core.arrays import Labels, ProbMapU8, ResizedMask
from stas_core.errors import SizeMismatch
from stas_core.predict.postprocess import Targets, cut_at
from stas_core.scores.metrics import Counts
from stas_core.slides.layers import COMPARED, FALSE, MISSED, TRUE, SmallMask
from stas_core.slides.stitching import MapSource, StitchedMask, postprocess_slide
from stas_core.slides.tiling import Tile

Numbers = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Froc:
    """What every threshold of the targets' probability gives, highest first: each row asks less than the one before."""

    threshold: Values
    """Targets of at least this probability count as found."""
    sensitivity: Values
    """Share of the true targets that are matched; NaN: there are none."""
    false_per_mm2: Values
    """Targets that match no true one, per mm2."""

    @classmethod
    def of(cls, matched: npt.ArrayLike, missed: npt.ArrayLike, *, num_true: int, area_mm2: float) -> "Froc":
        """Return the curve of the targets of one slide, or of several together.

        Args:
            matched: probability of each found target that matches a true one.
            missed: of each that matches none.
            num_true: how many true targets there are.
            area_mm2: of the tissue they were looked for in.
        """
        hits, misses = (np.sort(np.asarray(probs, np.float64)) for probs in (matched, missed))
        thresholds = np.unique(np.concatenate([hits, misses]))[::-1]
        num_hits = len(hits) - np.searchsorted(hits, thresholds)
        return cls(
            threshold=thresholds,
            sensitivity=num_hits / num_true if num_true else np.full(len(thresholds), np.nan),
            false_per_mm2=(len(misses) - np.searchsorted(misses, thresholds)) / area_mm2,
        )

    def sensitivity_at(self, false_per_mm2: float) -> float:
        """Return the best sensitivity at no more false targets per mm2; 0: every threshold has more."""
        affordable = self.sensitivity[self.false_per_mm2 <= false_per_mm2]
        return float(affordable[-1]) if len(affordable) else 0.0


@dataclass(frozen=True)
class SlideEvaluation:
    """A slide's mask against its truth."""

    pixels: Counts
    targets: Counts
    area_mm2: float
    """What targets are counted per."""
    found: Targets
    truth: Targets
    partner: Numbers
    """For each found target the row of the true one that it matches; -1: none."""
    mean_prob: Values
    """Of each found target."""
    peak_prob: Values
    num_outside: int = 0
    """True targets that lie wholly outside of the region of interest: they are none of `truth`."""
    num_cut: int = 0
    """True targets that its edge cuts: what lies inside is compared."""
    masks: tuple[StitchedMask, StitchedMask] | None = field(default=None, repr=False, compare=False)
    """Found and true, as they were compared."""

    @property
    def iou(self) -> float:
        """Return the intersection of both masks over their union; 1: both are empty."""
        union = self.pixels.tp + self.pixels.fp + self.pixels.fn
        return self.pixels.tp / union if union else 1.0

    @property
    def found_per_mm2(self) -> float:
        """Return the found targets per mm2."""
        return len(self.found) / self.area_mm2

    @property
    def true_per_mm2(self) -> float:
        """Return the true targets per mm2."""
        return len(self.truth) / self.area_mm2

    def froc(self, prob: Values | None = None) -> Froc:
        """Return sensitivity against false targets per mm2.

        Args:
            prob: of each found target; None: its mean.
        """
        ranked = self.mean_prob if prob is None else prob
        matches = self.partner >= 0
        return Froc.of(ranked[matches], ranked[~matches], num_true=len(self.truth), area_mm2=self.area_mm2)


@dataclass(frozen=True)
class Within:
    """A map that is 0 outside of a region of interest."""

    source: MapSource
    region: MapSource
    """Not 0 where it is."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.source.size

    def read(self, y0: int, x0: int, height: int, width: int) -> ProbMapU8:
        """Read a box."""
        if self.region.is_blank(y0, x0, height, width):
            return np.zeros((height, width), np.uint8)
        inside = self.region.read(y0, x0, height, width) > 0
        return np.where(inside, self.source.read(y0, x0, height, width), np.uint8(0))

    def is_blank(self, y0: int, x0: int, height: int, width: int) -> bool:
        """Tell whether the region of interest is far."""
        return self.region.is_blank(y0, x0, height, width) or self.source.is_blank(y0, x0, height, width)


@dataclass(frozen=True)
class Band:
    """Some rows of a map, as a map of their own."""

    source: MapSource
    y0: int
    """The first of them."""
    height: int

    @classmethod
    def amid(cls, source: MapSource, most_px: float) -> "Band":
        """Return the rows in the middle of a map that have at most so many pixels, and one at least."""
        rows, columns = source.size
        height = max(1, min(rows, int(most_px // columns)))
        return cls(source, (rows - height) // 2, height)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.source.size[1]

    def read(self, y0: int, x0: int, height: int, width: int) -> ProbMapU8:
        """Read a box."""
        return self.source.read(self.y0 + y0, x0, height, width)

    def is_blank(self, y0: int, x0: int, height: int, width: int) -> bool:
        """Tell whether the box is known to be 0."""
        return self.source.is_blank(self.y0 + y0, x0, height, width)


def evaluate_slide(
    mask: MapSource,
    truth: MapSource,
    *,
    area_mm2: float,
    prob: MapSource | None = None,
    region: MapSource | None = None,
    tile_px: int = 2048,
) -> SlideEvaluation:
    """Compare the mask of a slide with its truth.

    With a region of interest both are cut at its edge first, pixel by pixel: of a target that it cuts, what lies inside
    is a target, or several.

    Args:
        mask: 0 or 255, read in scan order, twice or more.
        truth: the same, of the same size.
        area_mm2: what targets are counted per: the slide's tissue.
        prob: map of probabilities, for FROC; None: every found target has probability 1.
        region: not 0 where the slide was scored; None: everywhere.
        tile_px: side of what is read at once; no result depends on it.

    Raises:
        SizeMismatch: mask, truth and map are not of one size.
    """
    for name, other in (("the truth", truth), ("the map", prob), ("the region of interest", region)):
        if other is not None and other.size != mask.size:
            raise SizeMismatch(
                f"the mask is {mask.size} (height, width), {name} is {other.size}; read both in one frame"
            )
    num_outside, num_cut = (0, 0) if region is None else _beyond(truth, region, tile_px)
    if region is not None:
        mask, truth = Within(mask, region), Within(truth, region)
    found, true = (postprocess_slide(source, cut_at(128), tile_px=tile_px) for source in (mask, truth))
    num_found, num_true = len(found.targets), len(true.targets)
    overlaps = _Overlaps(num_true + 1)
    levels = None if prob is None else _Levels(prob, num_found)
    for tile, ours, theirs in _together(found.labels(), true.labels()):
        if not ours.any():
            continue
        overlaps.add(ours, theirs)
        if levels is not None:
            levels.add(tile, ours)
    partner, tp_px = overlaps.matched(found.targets, true.targets)
    num_matched = int(np.count_nonzero(partner >= 0))
    return SlideEvaluation(
        pixels=Counts(tp_px, int(found.targets.area_px.sum()) - tp_px, int(true.targets.area_px.sum()) - tp_px),
        targets=Counts(num_matched, num_found - num_matched, num_true - num_matched),
        area_mm2=area_mm2,
        found=found.targets,
        truth=true.targets,
        partner=partner,
        mean_prob=np.ones(num_found) if levels is None else levels.means(found.targets),
        peak_prob=np.ones(num_found) if levels is None else levels.peaks(),
        num_outside=num_outside,
        num_cut=num_cut,
        masks=(found, true),
    )


def small_layers(found: SlideEvaluation, to: tuple[int, int]) -> dict[str, ResizedMask]:
    """Return the `COMPARED` layers at a size of (height, width); both masks are read once more."""
    if found.masks is None:
        raise ValueError("the masks that were compared are not at hand")
    matched = found.partner[found.partner >= 0]
    nums = len(found.truth), len(found.truth), len(found.found)
    is_true, is_missed, is_false = (np.full(num + 1, 255, np.uint8) for num in nums)
    is_true[0] = is_missed[0] = is_false[0] = 0
    is_missed[matched + 1] = 0
    is_false[1:][found.partner >= 0] = 0
    size = found.masks[0].grid.height, found.masks[0].grid.width
    small = {kind: SmallMask(size, to) for kind in COMPARED}
    for tile, ours, theirs in _together(*(mask.labels() for mask in found.masks)):
        for kind, shade, labels in (
            (TRUE, is_true, theirs),
            (MISSED, is_missed, theirs),
            (FALSE, is_false, ours),
        ):
            if labels.any():
                small[kind].add(tile.core.y0, tile.core.x0, shade[labels])
    return {kind: layer.mask for kind, layer in small.items()}


def _beyond(truth: MapSource, region: MapSource, tile_px: int) -> tuple[int, int]:
    """Return how many true targets lie wholly outside of a region, and how many its edge cuts."""
    true = postprocess_slide(truth, cut_at(128), tile_px=tile_px)
    area_px = true.targets.area_px
    inside_px = np.zeros(len(area_px) + 1, np.int64)
    for tile, labels in true.labels():
        core = tile.core
        if labels.any() and not region.is_blank(core.y0, core.x0, core.height, core.width):
            inside = (region.read(core.y0, core.x0, core.height, core.width) > 0) & (labels > 0)
            inside_px += np.bincount(labels[inside], minlength=len(inside_px))
    within = inside_px[1:]
    return int(np.count_nonzero(within == 0)), int(np.count_nonzero((within > 0) & (within < area_px)))


class _Overlaps:
    """How many pixels pairs of a found and a true target share."""

    def __init__(self, num_true: int) -> None:
        self._num_true = num_true
        self._pixels: dict[int, int] = {}

    def add(self, ours: Labels, theirs: Labels) -> None:
        both = (ours > 0) & (theirs > 0)
        pairs, counts = np.unique(ours[both].astype(np.int64) * self._num_true + theirs[both], return_counts=True)
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            self._pixels[pair] = self._pixels.get(pair, 0) + count

    def matched(self, found: Targets, true: Targets) -> tuple[Numbers, int]:
        """Return the partner of each found target, and the pixels that both masks have."""
        partner, taken = np.full(len(found), -1, np.int64), np.zeros(len(true), bool)
        ranked = []
        for pair, shared in self._pixels.items():
            one, other = pair // self._num_true - 1, pair % self._num_true - 1
            union = int(found.area_px[one]) + int(true.area_px[other]) - shared
            if 2 * shared >= union:
                ranked.append((-shared / union, one, other))
        for _, one, other in sorted(ranked):
            if partner[one] < 0 and not taken[other]:
                partner[one], taken[other] = other, True
        return partner, sum(self._pixels.values())


class _Levels:
    """What a map of probabilities says of each found target."""

    def __init__(self, prob: MapSource, num_found: int) -> None:
        self._prob = prob
        self._sums, self._peaks = np.zeros(num_found + 1), np.zeros(num_found + 1)

    def add(self, tile: Tile, ours: Labels) -> None:
        core, inside = tile.core, ours > 0
        numbers = ours[inside]
        levels = self._prob.read(core.y0, core.x0, core.height, core.width)[inside]
        self._sums += np.bincount(numbers, levels, minlength=len(self._sums))
        np.maximum.at(self._peaks, numbers, levels)

    def means(self, found: Targets) -> Values:
        return self._sums[1:] / 255 / np.maximum(found.area_px, 1)

    def peaks(self) -> Values:
        return self._peaks[1:] / 255


def _together(
    ours: Iterator[tuple[Tile, Labels]], theirs: Iterator[tuple[Tile, Labels]]
) -> Iterator[tuple[Tile, Labels, Labels]]:
    for (tile, one), (_, other) in zip(ours, theirs, strict=True):
        yield tile, one, other
