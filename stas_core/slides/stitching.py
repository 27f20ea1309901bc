"""Post-processing of a map of any size, tile by tile: equal to `run_cascade` and `find_targets` on the whole array.

A step of the cascade takes three scans of the map. What depends on more than one tile is settled between them, on a
graph of the pieces that reach a tile's edge:

1. *Select*: label k >= drop in each tile. A piece within a tile is kept or not at once; the others are joined first.
2. *Clean*: close the selected pixels of a tile and a halo about it, fill the holes within the tile, label foreground
   and what is left of the background. Background is joined first: holes or not; then foreground and holes: targets.
3. *Paint*, on demand: the same pieces again, with the number of the target that each belongs to.

Memory: two or three rows of tiles and up to `CLEANED_BYTES` of packed masks, and the tables of pieces and targets.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import imagecodecs
import numpy as np
import numpy.typing as npt

from stas_core.arrays import Labels, Mask, ProbMapU8
from stas_core.predict.postprocess import (
    SIDES,
    PostprocessConfig,
    StepConfig,
    Targets,
    close_gaps,
    closing_reach,
    foreground_limit,
    helped_sides,
)
from stas_core.slides.pieces import Flags, Pieces, Runs, Table, join
from stas_core.slides.seams import Pairs, Seams, components, inner_lines, sides_of_slide
from stas_core.slides.tiling import Box, Grid, Tile

Pixels = npt.NDArray[np.uint8]
TileKey = tuple[int, int]
"""Row and column of a tile."""
CLEANED_BYTES = 64 << 20
"""Room for packed masks between the second scan and the third: gigapixels of targets. Others are made again."""


@runtime_checkable
class MapSource(Protocol):
    """An 8-bit probability map that is read box by box: several times, in scan order."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""

    def read(self, y0: int, x0: int, height: int, width: int) -> ProbMapU8:
        """Read a box that lies within the map."""

    def is_blank(self, y0: int, x0: int, height: int, width: int) -> bool:
        """Tell, without reading it, that a box is 0 everywhere; False if that is not known."""


@dataclass(frozen=True)
class ArraySource:
    """A map in memory, or on disk as `numpy.memmap`."""

    levels: np.ndarray
    """uint8, (h, w)."""

    def __post_init__(self) -> None:
        if self.levels.dtype != np.uint8 or self.levels.ndim != 2:
            found = f"{self.levels.dtype} of shape {self.levels.shape}"
            raise ValueError(f"the map is {found}; expected uint8 of shape (h, w): probabilities as k / 255, rounded")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        height, width = self.levels.shape
        return height, width

    def read(self, y0: int, x0: int, height: int, width: int) -> ProbMapU8:
        """Read a box."""
        return np.asarray(self.levels[y0 : y0 + height, x0 : x0 + width])

    def is_blank(self, y0: int, x0: int, height: int, width: int) -> bool:
        """Not known."""
        return False


def postprocess_slide(source: MapSource, config: PostprocessConfig, *, tile_px: int = 2048) -> "StitchedMask":
    """Run the cascade on a map that need not fit into memory; no result depends on `tile_px`.

    Example:
        >>> prob_u8 = np.zeros((100, 100), np.uint8)
        >>> prob_u8[20:60, 20:60] = 200
        >>> found = postprocess_slide(ArraySource(prob_u8), PostprocessConfig(), tile_px=32)
        >>> found.step, found.targets.area_px.tolist(), sum(int(mask.sum()) for _, mask in found.masks())
        (1, [1600], 1600)
    """
    height, width = source.size
    halo_px = 2 * closing_reach(config.closing_px, config.closing_count)
    grid = Grid(height, width, tile_px, halo_px)
    limit = foreground_limit(height * width, config)
    for number, step in enumerate(config.steps, start=1):
        selection = _select(source, grid, step)
        if number == 1 and selection.num_px > limit:
            return StitchedMask(0, _targets(_NO_PIECES, grid), selection, config, {}, np.zeros(1, np.int32))
        stitched = _clean(selection, config, number)
        if stitched.targets.area_px.sum() >= config.min_foreground_px:
            break
    return stitched


@dataclass
class _Selection:
    """The pixels that a step selects, tile by tile: found when they are asked for, kept while neighbours need them."""

    source: MapSource
    grid: Grid
    step: StepConfig
    kept: dict[TileKey, Flags] = field(default_factory=dict)
    """Which pieces of k >= drop are kept, for the tiles that have any."""
    num_px: int = 0
    """How many pixels are selected in all."""
    _bits: dict[TileKey, Pixels] = field(default_factory=dict)
    _row: int = -1
    _cleaned: dict[TileKey, bytes] = field(default_factory=dict)
    _cleaned_bytes: int = 0

    def levels(self, tile: Tile) -> Pixels:
        """Return the map within a tile's core."""
        core = tile.core
        place = (core.y0, core.x0, core.height, core.width)
        if self.source.is_blank(*place):
            return np.broadcast_to(np.uint8(0), (core.height, core.width))
        return self.source.read(*place)

    def closed(self, tile: Tile, config: PostprocessConfig) -> Pixels | None:
        """Return the core of a tile after the closing; None: it is empty. Tiles are asked for in scan order."""
        if tile.row != self._row:
            self._row = tile.row
            needed = {near.row for near in self.grid.tiles_of(tile.read)}
            self._bits = {at: bits for at, bits in self._bits.items() if at[0] in needed}
        window = self._window(tile.read)
        if window is None:
            return None
        close_gaps(window, config.closing_px, config.closing_count)
        core = np.ascontiguousarray(window[tile.inside.slices])
        return core if core.any() else None

    def rows_done(self) -> None:
        """Let go of the rows of tiles that were kept for the closing."""
        self._bits, self._row = {}, -1

    def keep_cleaned(self, tile: Tile, mask: Pixels) -> None:
        """Keep the mask that a tile comes to, for the painting, if there is room."""
        if self._cleaned_bytes < CLEANED_BYTES:
            packed = bytes(imagecodecs.zstd_encode(np.packbits(mask, axis=1).tobytes(), level=1))
            self._cleaned[tile.row, tile.col] = packed
            self._cleaned_bytes += len(packed)

    def cleaned(self, tile: Tile) -> Pixels | None:
        """Return the mask that was kept; None: there was no room."""
        packed = self._cleaned.get((tile.row, tile.col))
        if packed is None:
            return None
        bits = np.frombuffer(imagecodecs.zstd_decode(packed), np.uint8).reshape(tile.core.height, -1)
        return np.unpackbits(bits, axis=1, count=tile.core.width)

    def _window(self, box: Box) -> Pixels | None:
        window = None
        for tile in self.grid.tiles_of(box):
            if (tile.row, tile.col) not in self.kept:
                continue
            if window is None:
                window = np.zeros((box.height, box.width), np.uint8)
            shared = tile.core.common(box)
            (ys, xs), there = shared.within(tile.core).slices, shared.within(box)
            skipped = xs.start // 8
            bits = self._selected(tile)[ys, skipped : -(-xs.stop // 8)]
            columns = slice(xs.start - 8 * skipped, xs.stop - 8 * skipped)
            window[there.slices] = np.unpackbits(bits, axis=1)[:, columns]
        return window

    def _selected(self, tile: Tile) -> Pixels:
        at = (tile.row, tile.col)
        if at not in self._bits:
            levels, kept = self.levels(tile), self.kept[at]
            selected = (levels >= max(self.step.drop, self.step.low)).view(np.uint8)
            if not kept[1:].all():
                pieces = Pieces.of((levels >= self.step.drop).view(np.uint8))
                selected.ravel()[pieces.runs.only(~kept[pieces.of_run]).pixels()] = 0
            self._bits[at] = np.packbits(selected, axis=1)
        return self._bits[at]


def _select(source: MapSource, grid: Grid, step: StepConfig) -> _Selection:
    selection, seams = _Selection(source, grid, step), Seams(grid)
    nodes, at_edge, num_nodes = [_NO_REGIONS], {}, 1
    for tile in grid.tiles():
        levels = selection.levels(tile)
        mask = (levels >= step.drop).view(np.uint8)
        pieces = Pieces.of(mask) if mask.any() else Pieces.none(*mask.shape)
        numbers = np.zeros(pieces.num_labels, np.int64)
        if pieces.num_labels > 1:
            regions = join(_measure_regions(levels[mask.view(bool)], pieces.runs, step), pieces.of_run, len(numbers))
            kept = _keeps(regions, step)
            edge = np.flatnonzero(pieces.on(inner_lines(grid, tile)))
            numbers[edge] = num_nodes + np.arange(len(edge))
            num_nodes += len(edge)
            nodes.append({name: column[edge] for name, column in regions.items()})
            kept[edge] = False
            selection.num_px += int(regions["selected"][kept].sum())
            selection.kept[tile.row, tile.col], at_edge[tile.row, tile.col] = kept, (edge, numbers[edge])
        seams.add(tile, [numbers[pieces.labels[line]] for line in SIDES])
    alive = np.arange(num_nodes) > 0
    num_regions, region = components(seams.pairs(), alive)
    regions = join(_stack(nodes), region[1:], num_regions)
    kept_regions = _keeps(regions, step, nothing=int(region[0]))
    selection.num_px += int(regions["selected"][kept_regions].sum())
    kept_nodes = kept_regions[region]
    for at, (edge, edge_nodes) in at_edge.items():
        selection.kept[at][edge] = kept_nodes[edge_nodes]
    selection.kept = {at: kept for at, kept in selection.kept.items() if kept.any()}
    return selection


_NO_REGIONS: Table = {name: np.zeros(0, np.int64) for name in ("area", "core", "selected", "peak")}


def _measure_regions(levels: Pixels, runs: Runs, step: StepConfig) -> Table:
    offsets = runs.offsets()
    return {
        "area": runs.length,
        "core": np.add.reduceat(levels >= step.core, offsets, dtype=np.int64),
        "selected": np.add.reduceat(levels >= step.low, offsets, dtype=np.int64),
        "peak": np.maximum.reduceat(levels, offsets).astype(np.int64),
    }


def _keeps(regions: Table, step: StepConfig, nothing: int = 0) -> Flags:
    kept = (regions["peak"] >= step.high) & (regions["core"] >= step.ratio * regions["area"])
    kept[nothing] = False
    return np.asarray(kept)


@dataclass(frozen=True)
class _Parts:
    """A tile after closing, cut into pieces; holes that it shows whole are filled."""

    mask: Pixels
    foreground: Pieces
    background: Pieces
    pending: Flags
    """Labels of the background that may be part of a hole: other tiles, or the helped sides, decide."""


def _cut(closed: Pixels | None, grid: Grid, tile: Tile, config: PostprocessConfig) -> _Parts:
    size = tile.core.height, tile.core.width
    if closed is None:
        mask = np.broadcast_to(np.uint8(0), size)
        background = Pieces.whole(*size)
    else:
        mask = closed
        background = Pieces.of(1 - mask)
    if config.max_hole_px == 0:
        background = Pieces.none(*size)
    reaches = [background.on([SIDES[side]]) for side in sides_of_slide(grid, tile)]
    num_sides = np.sum(reaches, axis=0) if reaches else np.zeros(background.num_labels, np.intp)
    inner = background.on(inner_lines(grid, tile))
    may_fill = num_sides <= (0 if config.border_fill == "none" else 1)
    if config.max_hole_px is not None:
        may_fill &= background.area <= config.max_hole_px
    may_fill[0] = False
    pending = may_fill & (inner | (num_sides > 0))
    holes = may_fill & ~pending
    if closed is None:
        return _Parts(mask, Pieces.none(*size), background, pending)
    if holes.any():
        mask.ravel()[background.runs.only(holes[background.of_run]).pixels()] = 1
    return _Parts(mask, Pieces.of(mask), background, pending)


def _contacts(parts: _Parts) -> Pairs:
    """Return which (foreground, pending background) labels touch: 4-connected, for where they meet only at a corner,
    a third pixel touches both and belongs to one of them."""
    mask = parts.mask
    if parts.foreground.num_labels == 1 or not parts.pending.any():
        return np.zeros((0, 2), np.int64)
    foreground, background = parts.foreground.labels.ravel(), parts.background.labels.ravel()
    width = mask.shape[1]
    below = np.flatnonzero(mask[1:] != mask[:-1])
    beside = np.flatnonzero(mask[:, 1:] != mask[:, :-1])
    beside += beside // max(width - 1, 1)  # from rows of one pixel less
    met = []
    for at, step in ((below, width), (beside, 1)):
        # One of the two pixels has a label of the foreground, the other one of the background.
        back = background[at] + background[at + step]
        touching = parts.pending[back]
        fore = (foreground[at] + foreground[at + step])[touching]
        met.append(fore.astype(np.int64) * parts.background.num_labels + back[touching])
    return np.stack(np.divmod(np.unique(np.concatenate(met)), parts.background.num_labels), axis=1)


def _clean(selection: _Selection, config: PostprocessConfig, step: int) -> "StitchedMask":
    grid, seams = selection.grid, Seams(selection.grid)
    measured, is_background = [_NO_PIECES], [np.ones(1, bool)]
    nodes: dict[TileKey, tuple[npt.NDArray[np.int32], ...]] = {}
    num_nodes, touched = 1, set[int]()
    for tile in grid.tiles() if selection.num_px else ():
        closed = selection.closed(tile, config)
        if closed is not None:
            touched |= {side for side in sides_of_slide(grid, tile) if closed[SIDES[side]].any()}
        parts = _cut(closed, grid, tile, config)
        contacts = _contacts(parts)
        remembered = parts.foreground.area >= config.min_target_px
        remembered |= parts.foreground.on(inner_lines(grid, tile))
        remembered[contacts[:, 0]] = True
        remembered[0] = False
        numbers = []
        for pieces, chosen in ((parts.foreground, remembered), (parts.background, parts.pending)):
            numbers.append(np.where(chosen, num_nodes - 1 + np.cumsum(chosen), 0))
            num_chosen = int(np.count_nonzero(chosen))
            if num_chosen:
                measured.append(_measure_pieces(pieces, chosen, selection, tile))
                is_background.append(np.full(num_chosen, pieces is parts.background))
                num_nodes += num_chosen
        fore, back = numbers
        seams.touch(np.stack([fore[contacts[:, 0]], back[contacts[:, 1]]], axis=1))
        seams.add(tile, [fore[parts.foreground.labels[line]] + back[parts.background.labels[line]] for line in SIDES])
        if fore.any() or back.any():
            nodes[tile.row, tile.col] = fore.astype(np.int32), back.astype(np.int32)
            selection.keep_cleaned(tile, parts.mask)
    selection.rows_done()
    merged, number = _merge(
        _stack(measured), np.concatenate(is_background), seams.pairs(), sorted(touched), grid, config
    )
    return StitchedMask(step, _targets(merged, grid), selection, config, nodes, number)


def _measure_pieces(pieces: Pieces, chosen: Flags, selection: _Selection, tile: Tile) -> Table:
    runs = chosen[pieces.of_run]
    measured = pieces.runs.only(runs).measure(tile, selection.grid.width, selection.levels(tile))
    return join(measured, (np.cumsum(chosen) - 1)[pieces.of_run[runs]], int(np.count_nonzero(chosen)))


def _merge(
    measured: Table,
    is_background: Flags,
    pairs: Pairs,
    touched: list[int],
    grid: Grid,
    config: PostprocessConfig,
) -> tuple[Table, npt.NDArray[np.int32]]:
    """Join the pieces of the slide.

    Returns:
        a row per target, in the order of their first pixels, and for each node the number of its target, from 1."""
    # Background first: node 0 is all of it that is no hole for certain, and what touches that is none either.
    num_regions, region = components(pairs, is_background)
    regions = join(measured, region[1:], num_regions)
    sides = _sides(regions, grid)
    num_sides = sides.sum(axis=1)
    helped = np.asarray(helped_sides(touched, config.border_fill), np.intp)
    is_hole = (num_sides == 0) | ((num_sides == 1) & sides[:, helped].any(axis=1))
    if config.max_hole_px is not None:
        is_hole &= regions["area"] <= config.max_hole_px
    is_hole[region[0]] = False
    # Then foreground and holes.
    alive = is_hole[region] | ~is_background
    num_targets, target = components(pairs, alive)
    living = {name: column[alive[1:]] for name, column in measured.items()}
    targets = join(living, target[alive], num_targets)
    lasting = np.flatnonzero((targets["area"] > 0) & (targets["area"] >= config.min_target_px))
    lasting = lasting[np.argsort(targets["first"][lasting])]
    number = np.zeros(num_targets, np.int32)
    number[lasting] = np.arange(1, len(lasting) + 1)
    return {name: column[lasting] for name, column in targets.items()}, number[target]


_NO_PIECES: Table = {
    name: np.zeros(0, np.int64)
    for name in ("area", "sum_x", "sum_y", "sum_level", "peak", "x0", "y0", "x1", "y1", "first")
}


def _stack(tables: list[Table]) -> Table:
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def _sides(regions: Table, grid: Grid) -> Flags:
    """Tell, for left, right, top and bottom, which regions touch that side of the slide."""
    left, top = regions["x0"] == 0, regions["y0"] == 0
    return np.stack([left, regions["x1"] == grid.width, top, regions["y1"] == grid.height], axis=1)


def _targets(merged: Table, grid: Grid) -> Targets:
    area = merged["area"]
    # Sums of integers are exact in float64, so these are the floats that the mean of the pixels gives.
    return Targets(
        area_px=area,
        centroid_x=merged["sum_x"] / area,
        centroid_y=merged["sum_y"] / area,
        bbox=np.stack([merged[name] for name in ("x0", "y0", "x1", "y1")], axis=1),
        mean_prob=merged["sum_level"] / area / 255,
        peak_prob=merged["peak"] / 255,
        sides=_sides(merged, grid),
    )


@dataclass(frozen=True)
class StitchedMask:
    """The mask of a slide: its targets at once, its pixels tile by tile, as often as they are asked for."""

    step: int
    """The step that gave the mask, from 1; 0: emptied, because step 1 selected too much."""
    targets: Targets
    _selection: _Selection
    _config: PostprocessConfig
    _nodes: Mapping[TileKey, tuple[npt.NDArray[np.int32], ...]]
    """Node of each label, of the foreground and of the background, in tiles that have any."""
    _number: npt.NDArray[np.int32]
    """Target of each node, from 1; 0: none."""

    @property
    def grid(self) -> Grid:
        """Return the tiles that the mask comes in."""
        return self._selection.grid

    def masks(self) -> Iterator[tuple[Tile, Mask]]:
        """Yield each tile and the mask of its core."""
        is_target = (self._number > 0).astype(np.uint8)
        for tile in self.grid.tiles():
            yield tile, self._paint(tile, is_target).view(bool)

    def labels(self) -> Iterator[tuple[Tile, Labels]]:
        """Yield each tile and, for each pixel of its core, the target it belongs to: its row in `targets`, from 1."""
        for tile in self.grid.tiles():
            yield tile, self._paint(tile, self._number)

    def _paint(self, tile: Tile, colours: npt.NDArray[Any]) -> npt.NDArray[Any]:
        painted = np.zeros((tile.core.height, tile.core.width), colours.dtype)
        by_label = [colours[nodes] for nodes in self._nodes.get((tile.row, tile.col), ())]
        if not any(of_label.any() for of_label in by_label):
            return painted
        for pieces, of_label in zip(self._pieces(tile, bool(by_label[1].any())), by_label, strict=False):
            of_run = of_label[pieces.of_run]
            runs = pieces.runs.only(of_run > 0)
            painted.ravel()[runs.pixels()] = np.repeat(of_run[of_run > 0], runs.length)
        return painted

    def _pieces(self, tile: Tile, with_background: bool) -> tuple[Pieces, ...]:
        """Return a tile's foreground, and its background where part of it is filled."""
        cleaned = None if with_background else self._selection.cleaned(tile)
        if cleaned is not None:
            return (Pieces.of(cleaned),)
        parts = _cut(self._selection.closed(tile, self._config), self.grid, tile, self._config)
        return parts.foreground, parts.background
