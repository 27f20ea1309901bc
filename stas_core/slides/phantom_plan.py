"""Where things lie on a phantom slide: tissue, tumour, lobules of lung, nests, a pen's strokes. No pixels."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from stas_core.data.shapes import Polygon
from stas_core.slides.phantom_bank import NUM_TURNS, Stamp

LOBULE_UM = 400.0
"""Mean distance of lobules."""
_MOST_COARSE_PX = 2048
"""Longer side of the raster that nests are placed by."""
_NEST_ROOM_UM = 60.0
"""Least distance of a nest's middle to the tumour and to the edge of tissue."""
_VERTEX_PX = 10.0
"""Distance of an outline's vertices."""
_NUM_TRIES = 20


@dataclass(frozen=True)
class Frame:
    """Size and resolution of a slide."""

    height: int
    width: int
    mpp: float

    def px(self, um: float) -> float:
        """Return a length in px."""
        return um / self.mpp

    @property
    def area_mm2(self) -> float:
        """Return the area of the whole slide."""
        return self.height * self.width * (self.mpp / 1000) ** 2


@dataclass(frozen=True)
class Anatomy:
    """Outlines in level-0 px: islands of tissue, and the tumour in the first of them."""

    islands: tuple[Polygon, ...]
    tumour: Polygon | None


@dataclass(frozen=True)
class Spread:
    """How many nests there are to expect where."""

    num_per_cell: npt.NDArray[np.float64]
    coarse_px: int
    """Side of a cell."""
    room_px: npt.NDArray[np.float32]
    """Distance of a cell to the tumour and to the edge of tissue, whichever is nearer."""

    @property
    def num_expected(self) -> float:
        """Return the number of nests of the whole slide."""
        return float(self.num_per_cell.sum())


@dataclass(frozen=True)
class Placed:
    """A stamp, turned and laid down: x0, y0 is the corner of its patch."""

    stamp: int
    turn: int
    x0: int
    y0: int


@dataclass(frozen=True)
class Lobules:
    """Middles of lobules on a jittered grid, (rows, columns, 2): x, y; and what each is painted from."""

    middles: npt.NDArray[np.float64]
    picture: npt.NDArray[np.int64]
    turn: npt.NDArray[np.int64]


def plan_anatomy(frame: Frame, rng: np.random.Generator) -> Anatomy:
    """Draw one to three islands of tissue side by side, and a tumour within the first."""
    width, height = frame.width, frame.height
    across = width >= height
    aspect = max(width, height) / min(width, height)
    num = int(np.clip(round(rng.uniform(0.6, 1.2) * aspect), 1, 3))
    islands = []
    for number in range(num):
        middle = np.array([(number + 0.5) / num, 0.5] if across else [0.5, (number + 0.5) / num]) * [width, height]
        half = np.array([width / num, height] if across else [width, height / num]) / 2
        islands.append(_blob(middle, half * rng.uniform(0.72, 0.86, 2), frame, rng))
    (low, high) = islands[0].min(axis=0), islands[0].max(axis=0)
    half = (high - low) / 2
    turn = rng.uniform(0, 2 * np.pi)
    middle = (low + high) / 2 + 0.45 * half * [np.cos(turn), np.sin(turn)]
    return Anatomy(tuple(islands), _blob(middle, half.min() * rng.uniform(0.3, 0.45) * np.ones(2), frame, rng))


def _blob(
    middle: npt.NDArray[np.float64], half: npt.NDArray[np.float64], frame: Frame, rng: np.random.Generator
) -> Polygon:
    """Return an uneven oval, coordinates of 0.1 px, inside the slide."""
    num = int(np.clip(2 * np.pi * half.max() / _VERTEX_PX, 24, 60_000))
    angles = np.linspace(0, 2 * np.pi, num, endpoint=False)
    orders = np.arange(2, max(3, min(400, num // 6)))
    sizes = 0.13 * rng.standard_normal(len(orders)) / (orders - 1) ** 1.15
    waves = np.zeros(num)
    for order, size, phase in zip(orders, sizes, rng.uniform(0, 2 * np.pi, len(orders)), strict=True):
        waves += size * np.cos(order * angles + phase)
    points = middle + half * (1 + np.clip(waves, -0.4, 0.16))[:, None] * np.column_stack(
        [np.cos(angles), np.sin(angles)]
    )
    return np.asarray(np.round(np.clip(points, 0, [frame.width - 1.0, frame.height - 1.0]), 1))


def plan_spread(
    frame: Frame, anatomy: Anatomy, rng: np.random.Generator, *, nests_per_mm2: float, spread_um: float
) -> Spread:
    """Return how many nests to expect: many beside the tumour, in clusters, ever fewer further off."""
    coarse_px = max(16, -(-max(frame.width, frame.height) // _MOST_COARSE_PX))
    size = -(-frame.height // coarse_px), -(-frame.width // coarse_px)
    tissue = _raster(anatomy.islands, size, coarse_px)
    if anatomy.tumour is None:
        return Spread(np.zeros(size), coarse_px, np.zeros(size, np.float32))
    free = 1 - _raster([anatomy.tumour], size, coarse_px)
    inside = cv2.distanceTransform(np.pad(tissue, 1), cv2.DIST_L2, cv2.DIST_MASK_5)[1:-1, 1:-1] * coarse_px
    beyond = cv2.distanceTransform(free, cv2.DIST_L2, cv2.DIST_MASK_5) * coarse_px
    room = np.minimum(inside, beyond)
    cell_px = max(1.0, frame.px(300) / coarse_px)
    small = rng.standard_normal((int(size[0] / cell_px) + 2, int(size[1] / cell_px) + 2))
    clusters = np.exp(0.9 * cv2.resize(small, size[::-1], interpolation=cv2.INTER_CUBIC) - 0.3)
    cell_mm2 = (coarse_px * frame.mpp / 1000) ** 2
    density = nests_per_mm2 * np.exp(-beyond.astype(np.float64) * frame.mpp / spread_um)
    return Spread(density * clusters * cell_mm2 * (room > frame.px(_NEST_ROOM_UM)), coarse_px, room)


def plan_nests(spread: Spread, stamps: Sequence[Stamp], rng: np.random.Generator) -> tuple[Placed, ...]:
    """Lay stamps down where nests are to expect and none hides another's target, in scan order."""
    if not stamps:
        return ()
    cumulated = spread.num_per_cell.ravel().cumsum()
    total = float(cumulated[-1])
    reaches = [(stamp.reach_px, stamp.target_reach_px + 12) for stamp in stamps]
    placed, taken = list[Placed](), _Patches(2 * max(reaches)[0])
    for _ in range(max(1, rng.poisson(total)) if total else 0):
        for _ in range(_NUM_TRIES):
            cell = int(np.searchsorted(cumulated, rng.uniform(0, total)))
            row, col = divmod(cell, spread.num_per_cell.shape[1])
            stamp, turn = int(rng.integers(len(stamps))), int(rng.integers(NUM_TURNS))
            x, y = (np.array([col, row]) + rng.uniform(0, 1, 2)) * spread.coarse_px
            if spread.room_px[row, col] > reaches[stamp][0] + spread.coarse_px and taken.add(x, y, *reaches[stamp]):
                height, width = stamps[stamp].cover.shape[:: 1 if turn % 2 == 0 else -1]
                placed.append(Placed(stamp, turn, round(x - width / 2), round(y - height / 2)))
                break
    return tuple(sorted(placed, key=lambda one: (one.y0, one.x0)))


class _Patches:
    """Patches that may overlap, but hide no other's target."""

    def __init__(self, cell_px: float) -> None:
        self._cell_px = cell_px
        self._in_cell: dict[tuple[int, int], list[tuple[float, float, float, float]]] = {}

    def add(self, x: float, y: float, reach: float, target_reach: float) -> bool:
        """Add a patch, unless it hides the target of another, or is hidden."""
        col, row = int(x // self._cell_px), int(y // self._cell_px)
        for near in ((col + i, row + j) for i in (-1, 0, 1) for j in (-1, 0, 1)):
            for u, v, other, other_target in self._in_cell.get(near, ()):
                if np.hypot(x - u, y - v) < max(reach + other_target, target_reach + other):
                    return False
        self._in_cell.setdefault((col, row), []).append((x, y, reach, target_reach))
        return True


def plan_lobules(frame: Frame, num_pictures: int, rng: np.random.Generator) -> Lobules:
    """Spread the middles of lobules over the slide and a margin of two about it."""
    step = frame.px(LOBULE_UM)
    rows, cols = int(frame.height / step) + 5, int(frame.width / step) + 5
    y, x = np.mgrid[-2 : rows - 2, -2 : cols - 2] * step
    middles = np.stack([x, y], axis=-1) + rng.uniform(-0.36, 0.36, (rows, cols, 2)) * step
    return Lobules(middles, rng.integers(num_pictures, size=(rows, cols)), rng.integers(NUM_TURNS, size=(rows, cols)))


def plan_strokes(frame: Frame, rng: np.random.Generator) -> tuple[Polygon, ...]:
    """Draw what a pen leaves: two to four bent lines across a part of the slide."""
    strokes = []
    for _ in range(int(rng.integers(2, 5))):
        start, stop = rng.uniform(0.05, 0.95, (2, 2)) * [frame.width, frame.height]
        share = np.linspace(0, 1, 60)[:, None]
        bend = 0.12 * np.sin(np.pi * share * rng.uniform(1, 3)) * (stop - start)[::-1] * [1, -1]
        strokes.append(start + share * (stop - start) + bend)
    return tuple(strokes)


def _raster(outlines: Sequence[Polygon], size: tuple[int, int], coarse_px: int) -> npt.NDArray[np.uint8]:
    mask = np.zeros(size, np.uint8)
    for outline in outlines:
        cv2.fillPoly(mask, [np.round(outline / coarse_px).astype(np.int32)], 1)
    return mask
