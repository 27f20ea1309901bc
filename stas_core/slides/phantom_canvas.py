"""Paint a phantom slide block by block: any block at any time, the same pixels.

Everything is a function of the place on the slide. Lung is cut into lobules, each a picture of the bank, turned and
mirrored at its sides; walls of stroma hide where they meet. Tumour is laid over lung, nests with their air spaces over
both, and where there is no tissue there is glass.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import cv2
import numpy as np
import numpy.typing as npt

from stas_core.arrays import AnyRgbImage
from stas_core.data.phantom_tissue import Look
from stas_core.data.shapes import Polygon
from stas_core.slides.phantom_bank import Bank, Stamp
from stas_core.slides.phantom_plan import LOBULE_UM, Anatomy, Frame, Lobules, Placed

BLOCK_PX = 512
_COARSE_PX = 8
"""Step of the raster on which lobules are told apart."""
_PERIOD_PX = 4096
"""Noise repeats after so many px."""
_MARGIN_PX = 24
"""Round a block, for the softness of edges."""
_INKS = np.array([[0.25, 0.75, 0.42], [0.2, 0.35, 0.8], [0.12, 0.12, 0.13]])
"""What green, blue and black ink let through in R, G, B."""
_PEN_UM = 220.0
_DRIFT = 0.4
"""By what share staining is stronger or weaker where it drifts most."""
Plane = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]


class Flaw(str, Enum):
    """What is wrong with a slide."""

    NONE = "none"
    BLANK = "blank"
    DRIFT = "drift"
    PEN = "pen"
    FILL = "fill"
    BLUR = "blur"
    MISSING_MPP = "missing_mpp"
    ABSURD_MPP = "absurd_mpp"
    TRUNCATED = "truncated"
    MISSING_FILE = "missing_file"


@dataclass(frozen=True)
class Scene:
    """All that is on a slide."""

    frame: Frame
    look: Look
    anatomy: Anatomy
    lobules: Lobules
    nests: tuple[Placed, ...]
    strokes: tuple[Polygon, ...]
    bank: Bank
    flaw: Flaw


class SlideCanvas:
    """Gives the pixels of a scene, and of its truth, as strips of blocks."""

    def __init__(self, scene: Scene, rng: np.random.Generator) -> None:
        self._scene = scene
        self._stamps: dict[tuple[int, int], Stamp] = {}
        self._near = _near_blocks(scene.nests, scene.bank.stamps)
        coarse = _PERIOD_PX // _COARSE_PX
        self._warp = [_periodic(coarse, scale, rng) for scale in (30, 30, 9, 9)]
        self._uneven = _periodic(coarse, 12, rng)
        self._rough = _periodic(BLOCK_PX, 4, rng)
        grain = np.round(rng.standard_normal((BLOCK_PX, BLOCK_PX)) * scene.look.grain).astype(np.int16)
        self._grain = cv2.merge([grain] * 3)
        self._ink = _INKS[rng.integers(len(_INKS))].astype(np.float32)
        self._drift = rng.uniform([0.5, 0.5, 0], [1.5, 1.5, 2 * np.pi])

    def strips(self) -> Iterator[AnyRgbImage]:
        """Yield rows of blocks, top to bottom."""
        for y0, strip in self._empty_strips((3,)):
            for x0 in range(0, strip.shape[1], BLOCK_PX):
                part = strip[:, x0 : x0 + BLOCK_PX]
                part[:] = self.block(y0, x0)[: part.shape[0], : part.shape[1]]
            yield strip

    def truth(self) -> Iterator[Pixels]:
        """Yield rows of the mask of targets, 0 or 255."""
        for y0, strip in self._empty_strips(()):
            strip[:] = 0
            touching = {one for at, near in self._near.items() if at[0] == y0 // BLOCK_PX for one in near}
            for number in touching:  # they do not meet: in any order
                placed = self._scene.nests[number]
                target = self._stamp(placed).target
                here, there = _overlap(placed, target.shape, (y0, 0), strip.shape[:2])
                np.maximum(strip[here], target[there], out=strip[here])
            yield strip

    def outlines(self) -> list[Polygon]:
        """Return the targets' outlines in level-0 px, whole coordinates at pixel centres."""
        return [self._stamp(placed).outline + [placed.x0, placed.y0] for placed in self._scene.nests]

    def block(self, y0: int, x0: int) -> AnyRgbImage:
        """Return the block whose corner is at (y0, x0), multiples of `BLOCK_PX`."""
        scene = self._scene
        light = np.empty((BLOCK_PX, BLOCK_PX, 3), np.uint8)
        light[:] = np.clip(scene.look.white, 0, 255).astype(np.uint8)
        depth = self._depth(scene.anatomy.islands, y0, x0)
        if depth is not None:
            light = _blend(light, self._tissue(depth, y0, x0), self._edge(depth))
        for number in self._near.get((y0 // BLOCK_PX, x0 // BLOCK_PX), ()):
            placed = scene.nests[number]
            stamp = self._stamp(placed)
            here, there = _overlap(placed, stamp.cover.shape, (y0, x0), light.shape[:2])
            light[here] = _blend(light[here], stamp.light[there], stamp.cover[there] * np.float32(1 / 255))
        return self._scanned(light, y0, x0)

    def _empty_strips(self, channels: tuple[int, ...]) -> Iterator[tuple[int, Pixels]]:
        frame = self._scene.frame
        for y0 in range(0, frame.height, BLOCK_PX):
            yield y0, np.empty((min(BLOCK_PX, frame.height - y0), frame.width, *channels), np.uint8)

    def _stamp(self, placed: Placed) -> Stamp:
        key = placed.stamp, placed.turn
        if key not in self._stamps:
            self._stamps[key] = self._scene.bank.stamps[placed.stamp].turned(placed.turn)
        return self._stamps[key]

    def _depth(self, outlines: Sequence[Polygon], y0: int, x0: int) -> Plane | None:
        """Return how deep pixels lie inside outlines: 0 outside, 0.5 on them, 1 inside; None: all are outside."""
        side = BLOCK_PX + 2 * _MARGIN_PX
        mask = np.zeros((side, side), np.uint8)
        for outline in outlines:
            points = np.round((outline + [_MARGIN_PX - x0, _MARGIN_PX - y0]) * 16).astype(np.int32)
            cv2.fillPoly(mask, [points], 1, cv2.LINE_8, 4)
        if not mask.any():
            return None
        if mask.all():
            return np.ones((BLOCK_PX, BLOCK_PX), np.float32)
        soft = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), _MARGIN_PX / 3)
        return np.asarray(soft[_MARGIN_PX:-_MARGIN_PX, _MARGIN_PX:-_MARGIN_PX])

    def _edge(self, depth: Plane) -> Plane:
        """Return the opacity of what has such a depth; its edge is ragged."""
        if depth.min() == 1:
            return depth
        return np.clip((depth - 0.5 + 0.06 * self._rough) * 12 + 0.5, 0, 1).astype(np.float32)

    def _tissue(self, depth: Plane, y0: int, x0: int) -> AnyRgbImage:
        anatomy, bank = self._scene.anatomy, self._scene.bank
        cells, distances = self._lobules(y0, x0)
        nearest, between = _nearest(distances)
        light = self._mosaic(bank.lung, cells, nearest, (y0, x0))
        mass = self._depth([anatomy.tumour], y0, x0) if anatomy.tumour is not None else None
        if mass is not None:
            light = _blend(light, self._mosaic(bank.tumour, cells, nearest, (y0, x0)), self._edge(mass))
        uneven = self._enlarged(self._uneven, y0, x0)
        walls = np.clip((0.56 + 0.16 * uneven - depth) * 8, 0, 1).astype(np.float32)  # pleura, here and there
        if between is not None:
            thickness = self._scene.frame.px(2.2) * np.exp(0.6 * uneven) + 1.2 * self._rough
            walls = np.maximum(walls, np.clip(thickness - between + 0.5, 0, 1))
        if not walls.any():
            return light
        stroma = _piece(bank.stroma, 0, (-y0, -x0), (slice(0, BLOCK_PX), slice(0, BLOCK_PX)))
        return _blend(light, stroma, cv2.GaussianBlur(walls, (0, 0), 0.8))

    def _lobules(self, y0: int, x0: int) -> tuple[list[tuple[int, int]], Plane]:
        """Return the lobules that a block touches, or nearly so, and its pixels' warped distances to their middles."""
        middles, step = self._scene.lobules.middles, self._scene.frame.px(LOBULE_UM)
        at_y, at_x = (at + _COARSE_PX * (np.arange(BLOCK_PX // _COARSE_PX + 2) - 0.5) - 0.5 for at in (y0, x0))
        wide_x, wide_y, fine_x, fine_y = (self._coarse(plane, y0, x0) for plane in self._warp)
        x = at_x + step * (0.13 * wide_x + 0.025 * fine_x)
        y = at_y[:, None] + step * (0.13 * wide_y + 0.025 * fine_y)
        rows, cols = (
            range(max(0, int(at / step)), min(num, int((at + BLOCK_PX) / step) + 5))
            for at, num in zip((y0, x0), middles.shape[:2], strict=True)
        )
        cells = [(row, col) for row in rows for col in cols]
        distances = np.array([np.hypot(x - middles[at][0], y - middles[at][1]) for at in cells], np.float32)
        close = (distances < distances.min(axis=0) + self._scene.frame.px(24)).any(axis=(1, 2))
        planes = [_enlarge(plane) for plane in distances[close]]
        return [at for at, is_close in zip(cells, close, strict=True) if is_close], np.stack(planes)

    def _mosaic(
        self,
        pictures: Sequence[AnyRgbImage],
        cells: Sequence[tuple[int, int]],
        nearest: Pixels,
        corner: tuple[int, int],
    ) -> AnyRgbImage:
        """Return the block at a corner (y0, x0), each pixel from the picture of its lobule."""
        lobules, light = self._scene.lobules, np.empty((BLOCK_PX, BLOCK_PX, 3), np.uint8)
        for number, at in enumerate(cells):
            mask = (nearest == number).view(np.uint8)
            left, top, width, height = cv2.boundingRect(mask)
            if not width:
                continue
            box = slice(top, top + height), slice(left, left + width)
            picture = pictures[lobules.picture[at] % len(pictures)]
            x, y = (int(at) - len(picture) // 2 for at in lobules.middles[at])
            piece = _piece(picture, int(lobules.turn[at]), (y - corner[0], x - corner[1]), box)
            cv2.copyTo(piece, mask[box], light[box])
        return light

    def _coarse(self, plane: Plane, y0: int, x0: int) -> Plane:
        """Return a block of noise on the coarse raster, and a cell more on each side."""
        steps = np.arange(-1, BLOCK_PX // _COARSE_PX + 1)
        rows, cols = ((at // _COARSE_PX + steps) % len(plane) for at in (y0, x0))
        return np.asarray(plane[np.ix_(rows, cols)])

    def _enlarged(self, plane: Plane, y0: int, x0: int) -> Plane:
        return _enlarge(self._coarse(plane, y0, x0))

    def _scanned(self, light: AnyRgbImage, y0: int, x0: int) -> AnyRgbImage:
        """Return what the scanner makes of a block."""
        scene, frame, flaw = self._scene, self._scene.frame, self._scene.flaw
        if flaw is Flaw.DRIFT:
            down, across, phase = self._drift
            y, x = (at + np.arange(BLOCK_PX, dtype=np.float32) for at in (y0, x0))
            wave = np.cos(np.pi * (down * y[:, None] / frame.height + across * x / frame.width) + phase)
            density = np.log(np.maximum(np.arange(256)[:, None], 1) / scene.look.white).astype(np.float32)
            stained = cv2.LUT(light, np.ascontiguousarray(density[:, None]))
            stained *= (1 + _DRIFT * wave)[..., None].astype(np.float32)
            light = np.clip(cv2.exp(stained) * scene.look.white, 0, 255).astype(np.uint8)
        if flaw is Flaw.PEN:
            strokes = np.zeros((BLOCK_PX, BLOCK_PX), np.uint8)
            for stroke in scene.strokes:
                points = np.round(stroke - [x0, y0]).astype(np.int32)
                cv2.polylines(strokes, [points], False, 1, round(frame.px(_PEN_UM)))
            if strokes.any():
                inked = np.where(strokes[..., None] > 0, self._ink, np.float32(1))
                light = (light * inked).astype(np.uint8)
        light = cv2.add(light, self._grain, dtype=cv2.CV_8U)
        if flaw is Flaw.FILL:
            light[max(0, round(0.7 * frame.height) - y0) :, max(0, round(0.8 * frame.width) - x0) :] = 0
        return np.asarray(light)


def _near_blocks(nests: Sequence[Placed], stamps: Sequence[Stamp]) -> dict[tuple[int, int], list[int]]:
    near: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, placed in enumerate(nests):
        height, width = stamps[placed.stamp].cover.shape[:: 1 if placed.turn % 2 == 0 else -1]
        for row in range(placed.y0 // BLOCK_PX, (placed.y0 + height - 1) // BLOCK_PX + 1):
            for col in range(placed.x0 // BLOCK_PX, (placed.x0 + width - 1) // BLOCK_PX + 1):
                near[row, col].append(number)
    return dict(near)


def _overlap(
    placed: Placed, patch: tuple[int, ...], corner: tuple[int, int], size: tuple[int, ...]
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return where a patch lies in an area of the slide, and which part of the patch that is."""
    here, there = [], []
    for at, length, origin, extent in zip((placed.y0, placed.x0), patch, corner, size, strict=False):
        first, last = max(at, origin), max(min(at + length, origin + extent), max(at, origin))
        here.append(slice(first - origin, last - origin))
        there.append(slice(first - at, last - at))
    return (here[0], here[1]), (there[0], there[1])


def _blend(below: AnyRgbImage, above: AnyRgbImage, opacity: Plane) -> AnyRgbImage:
    if opacity.min() == 1:
        return above
    share = cv2.merge([opacity] * 3)
    return np.asarray(below + share * (above.astype(np.float32) - below) + np.float32(0.5), np.uint8)


def _piece(picture: AnyRgbImage, turn: int, at: tuple[int, int], box: tuple[slice, slice]) -> AnyRgbImage:
    """Return a box of the plane that a square picture fills, mirrored at its sides again and again.

    Args:
        picture: the picture.
        turn: as of `phantom_bank.turned`.
        at: where its corner (y, x) lies, after turning.
        box: rows and columns.
    """
    last = len(picture) - 1
    down, across = ((side.start - start) % (2 * len(picture)) for side, start in zip(box, at, strict=True))
    # The pixel (y, x) of the box is that of the turned picture at (v, u) = (y + down, x + across).
    u, v = np.array([1.0, 0.0, across]), np.array([0.0, 1.0, down])
    end = np.array([0.0, 0.0, last])
    x, y = [(u, v), (end - v, u), (end - u, end - v), (v, end - u)][turn % 4]
    affine = np.stack([end - x if turn >= 4 else x, y])
    size = box[1].stop - box[1].start, box[0].stop - box[0].start
    flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(picture, affine, size, flags=flags, borderMode=cv2.BORDER_REFLECT), np.uint8)


def _nearest(distances: Plane) -> tuple[Pixels, Plane | None]:
    """Return which plane is least at each pixel, and half of what the next is more; None: there is but one plane."""
    first, nearest = distances[0], np.zeros(distances.shape[1:], np.uint8)
    second: Plane | None = None
    for number, plane in enumerate(distances[1:], start=1):
        nearest[plane < first] = number
        further = np.maximum(first, plane)
        second = further if second is None else np.minimum(second, further)
        first = np.minimum(first, plane)
    return nearest, None if second is None else (second - first) / 2


def _enlarge(coarse: Plane) -> Plane:
    """Return the block of a coarse raster that has a cell more on each side."""
    fine = cv2.resize(coarse, None, fx=_COARSE_PX, fy=_COARSE_PX, interpolation=cv2.INTER_LINEAR)
    return np.asarray(fine[_COARSE_PX:-_COARSE_PX, _COARSE_PX:-_COARSE_PX])


def _periodic(side: int, scale_px: float, rng: np.random.Generator) -> Plane:
    """Return noise with features of some size, about standard normal, that may be laid side by side."""
    pad = int(4 * scale_px)
    white = np.pad(rng.standard_normal((side, side), np.float32), pad, mode="wrap")
    smooth = cv2.GaussianBlur(white, (0, 0), scale_px / 2)[pad:-pad, pad:-pad]
    return np.asarray(smooth / smooth.std(), np.float32)
