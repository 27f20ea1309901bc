"""What phantom slides are put together from: pictures of lung, tumour and stroma, and nests in their air spaces.

All are painted by the painters of phantom fields, so that a model of fields works on slides: in the light of one
slide's stains and scanner, without the grain, which is added at the end.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np
import numpy.typing as npt
from jaxtyping import UInt8

from stas_core.arrays import AnyRgbImage, label_components
from stas_core.data import phantom_tissue as tissue
from stas_core.data.phantom_tissue import Look
from stas_core.data.shapes import Polygon
from stas_core.slides.outlines import draw_polygon

FIELD_MPP = 0.5
"""um per pixel that the painters work at."""
PICTURE_PX = 1408
"""Side of a picture, at that resolution: of lobules most fit into one."""
NUM_TURNS = 8
"""Ways to turn and flip a square."""
Cover = UInt8[np.ndarray, "_ _"]
"""Opacity of a patch, 255: it hides what is below."""


@dataclass(frozen=True)
class Stamp:
    """A nest in its air space, to be laid over lung."""

    light: AnyRgbImage
    cover: Cover
    outline: Polygon
    """Of the target, in px of the patch, whole coordinates at pixel centres."""

    @property
    def reach_px(self) -> float:
        """Return the radius of a circle about the patch's middle that holds what it covers."""
        height, width = self.cover.shape
        y, x = np.nonzero(self.cover)
        return float(np.hypot(y - (height - 1) / 2, x - (width - 1) / 2).max())

    @property
    def target_reach_px(self) -> float:
        """Return the radius of a circle about the patch's middle that holds the target."""
        height, width = self.cover.shape
        return float(np.hypot(*(self.outline - [(width - 1) / 2, (height - 1) / 2]).T).max())

    @property
    def target(self) -> Cover:
        """Return 255 inside the outline."""
        mask = np.zeros(self.cover.shape, np.uint8)
        draw_polygon(mask, [self.outline])
        return np.asarray(np.where(mask > 0, 255, 0), np.uint8)

    def turned(self, turn: int) -> "Stamp":
        """Return it flipped and turned in one of `NUM_TURNS` ways."""
        outline = self.outline
        width, height = self.cover.shape[::-1]
        if turn >= 4:
            outline = np.column_stack([width - 1 - outline[:, 0], outline[:, 1]])
        for _ in range(turn % 4):
            outline = np.column_stack([outline[:, 1], width - 1 - outline[:, 0]])
            width, height = height, width
        light, cover = (np.ascontiguousarray(turned(plane, turn)) for plane in (self.light, self.cover))
        return Stamp(light, cover, np.round(outline, 1))


@dataclass(frozen=True)
class Bank:
    """Pictures of one slide; those of lung and tumour may be mirrored at their sides and turned."""

    lung: tuple[AnyRgbImage, ...]
    tumour: tuple[AnyRgbImage, ...]
    stroma: AnyRgbImage
    stamps: tuple[Stamp, ...]


def turned(plane: npt.NDArray[np.uint8], turn: int) -> npt.NDArray[np.uint8]:
    """Return a view of a plane, flipped and turned in one of `NUM_TURNS` ways."""
    return np.rot90(plane[:, ::-1] if turn >= 4 else plane, turn % 4)


@dataclass(frozen=True)
class Painter:
    """Paints the pictures of a slide, each from random numbers of its own."""

    look: Look
    seed: tuple[int, int]
    """Of the cohort, and the slide's index."""
    scale: float = 1.0
    """Pixels of the slide per pixel of the painters, along a side."""
    blur_px: float = 0.0
    """How far the scan is out of focus, in px of the slide."""
    picture_px: int = PICTURE_PX
    """Side of a picture before it is scaled."""

    def bank(self, num_lung: int, num_tumour: int, num_nests: int) -> Bank:
        """Paint so many of each."""
        return Bank(
            lung=tuple(self._lung(self._rng(0, number)) for number in range(num_lung)),
            tumour=tuple(self._tumour(self._rng(1, number)) for number in range(num_tumour)),
            stroma=self._stroma(self._rng(2, 0)),
            stamps=tuple(self._stamp(self._rng(3, number)) for number in range(num_nests)),
        )

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))

    def _lung(self, rng: np.random.Generator) -> AnyRgbImage:
        canvas = _canvas(self.picture_px)
        free = np.zeros(canvas.shape[1:], bool)
        walls = tissue.paint_septa(canvas, (), free, rng)
        tissue.paint_vessels(canvas, walls, free, rng)
        tissue.paint_loose_cells(canvas, walls, rng)
        return self._seen(canvas, rng)

    def _tumour(self, rng: np.random.Generator) -> AnyRgbImage:
        canvas = _canvas(self.picture_px)
        tissue.paint_tumour(canvas, np.ones(canvas.shape[1:], bool), self.look, rng)
        return self._seen(canvas, rng)

    def _stroma(self, rng: np.random.Generator) -> AnyRgbImage:
        side = self.picture_px // 2
        canvas = _canvas(side)
        course = 60 * tissue.noise((side, side), 60, rng) + 9 * tissue.noise((side, side), 14, rng)
        stripes = tissue.fibres(course, rng)
        tissue.cover(
            canvas, np.ones((side, side), np.float32), 0.14 + 0.04 * stripes, np.clip(0.62 + 0.14 * stripes, 0.2, 1.2)
        )
        cells = tissue.scatter(np.ones((side, side), bool), 13, rng, share=0.5)
        tissue.paint_nuclei(canvas, rng, (tissue.FIBROBLAST, cells, None))
        return self._seen(canvas, rng)

    def _stamp(self, rng: np.random.Generator) -> Stamp:
        log_area = rng.normal(tissue.LOG_AREA_MEAN, tissue.LOG_AREA_WITHIN_SD)
        radius = float(np.clip(np.sqrt(np.exp(log_area) / np.pi), 13, 160))
        nest = tissue.draw_nest(np.zeros(2), radius, rng)
        side = 2 * round(nest.reach + 100)
        nest = replace(nest, body=nest.body + side / 2, centre=nest.centre + side / 2)
        outline = tissue.annotate(nest, (side, side), rng)
        clearing = tissue.air_around([nest], (side, side), rng)
        canvas = _canvas(side)
        walls = tissue.paint_septa(canvas, [nest], clearing, rng)
        near = cv2.dilate(tissue.filled(outline, (side, side)), np.ones((9, 9))) > 0
        tissue.paint_loose_cells(canvas, walls | near, rng)
        tissue.paint_nest(canvas, nest, self.look, rng)
        opacity = self._resized(_air_space(walls & ~near, nest.centre))
        outline = np.round((outline + 0.5) * self.scale - 0.5, 1)
        return Stamp(self._seen(canvas, rng), np.asarray(np.round(255 * opacity), np.uint8), outline)

    def _seen(self, canvas: tissue.Canvas, rng: np.random.Generator) -> AnyRgbImage:
        image = self._resized(tissue.scan(canvas, replace(self.look, grain=0.0), rng, in_focus=True))
        return np.asarray(image, np.uint8)

    def _resized(self, plane: np.ndarray) -> np.ndarray:
        if self.scale != 1:
            shrinks = self.scale < 1
            size = (max(1, round(plane.shape[1] * self.scale)), max(1, round(plane.shape[0] * self.scale)))
            plane = cv2.resize(plane, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        return cv2.GaussianBlur(plane, (0, 0), self.blur_px) if self.blur_px else plane


def _canvas(side: int) -> tissue.Canvas:
    return np.zeros((4, side, side), np.float32)


def _air_space(walls: npt.NDArray[np.bool_], centre: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Return the opacity of the air space about a point, with half of the walls round it; it ends within the patch."""
    side = len(walls)
    _, labels = label_components(~walls)
    x, y = centre.astype(int)
    space = (labels == labels[y, x]).astype(np.uint8)
    space = np.asarray(cv2.dilate(space, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (19, 19))))
    disc = np.zeros_like(space)
    cv2.circle(disc, (side // 2, side // 2), side // 2 - 10, 1, -1)
    return np.asarray(cv2.GaussianBlur((space & disc).astype(np.float32), (0, 0), 1.5))
