"""What lung looks like under H&E: walls and air, vessels, loose cells, tumour, nests, painted as densities of dyes.

At 20x (about 0.5 um/px). Stains are mixed by the Beer-Lambert law, so stain estimation means on a phantom what it means
on tissue. All randomness comes from the generator that a painter is given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float32

from stas_core.arrays import Mask, RgbImage
from stas_core.data.shapes import Polygon

Plane = Float32[np.ndarray, "h w"]
Canvas = Float32[np.ndarray, "4 h w"]
"""Optical density of each dye, before the slide's own staining strength."""
HEMATOXYLIN, EOSIN, BLOOD, CARBON = range(4)

DYES = np.array([[0.55, 0.74, 0.37], [0.09, 0.95, 0.29], [0.05, 0.93, 0.36], [0.52, 0.60, 0.61]])
"""Mean absorption of the dyes in R, G, B; a slide's own are near them."""
FULL_FIELD_PX = 942 * 1716
LOG_AREA_MEAN, LOG_AREA_BETWEEN_SD, LOG_AREA_WITHIN_SD = 8.58, 0.85, 0.65
_SHIFT, _LEVELS = 4, 110.0  # cv2 draws with 1/16 px; steps of an 8-bit layer per unit of density


class Kind(NamedTuple):
    """A kind of nucleus: mean length, width over length, hematoxylin; vesicular ones are pale with a nucleolus."""

    length_px: float
    ratio: float
    tone: float
    vesicular_share: float


Batch = tuple[Kind, np.ndarray, np.ndarray | None]
"""Nuclei of a kind, their centres (x, y), and the directions they lie along, in degrees (None: at random)."""

FIBROBLAST = Kind(13, 0.42, 1.25, 0.15)
LINING = Kind(12, 0.7, 1.1, 0.2)
LYMPHOCYTE = Kind(8, 0.92, 1.55, 0)
MUSCLE = Kind(14, 0.36, 1.1, 0)
MACROPHAGE = Kind(10, 0.8, 1.15, 0.6)


@dataclass(frozen=True)
class Look:
    """What the images of one slide share; `dyes` is (3, 4): absorption in R, G, B of each."""

    dyes: np.ndarray
    white: np.ndarray
    blur_px: float
    sharpening: float
    grain: float
    tumour_nucleus: Kind
    tumour_spacing_px: float
    tumour_cytoplasm: np.ndarray


@dataclass(frozen=True)
class Nest:
    """A tumour nest: its body's outline, centre (x, y), and the radius of the circle of its area, in px."""

    body: Polygon
    centre: np.ndarray
    radius: float

    @property
    def reach(self) -> float:
        """Return how far the body reaches from its centre, in px."""
        return float(np.hypot(*(self.body - self.centre).T).max())


def draw_look(rng: np.random.Generator) -> Look:
    """Draw dyes, scanner and tumour cells of a look."""
    dyes = DYES + rng.normal(0, 1, DYES.shape) * [[0.03, 0.03, 0.035], [0.04, 0.02, 0.05], [0.02, 0.02, 0.05], [0] * 3]
    dyes = np.clip(dyes, 0.02, None)
    dyes /= np.linalg.norm(dyes, axis=1, keepdims=True)
    strength = rng.uniform([0.7, 0.7, 0.8, 1.0], [1.15, 1.4, 1.1, 1.0])
    nucleus_px = rng.uniform(13, 17)
    return Look(
        dyes=(dyes * strength[:, None]).T.astype(np.float32),
        white=([241, 238.5, 240] + rng.uniform(-5, 3, 3)).astype(np.float32),
        blur_px=rng.uniform(0.35, 0.7),
        sharpening=rng.uniform(0.4, 1.0),
        grain=rng.uniform(0.8, 2.5),
        tumour_nucleus=Kind(nucleus_px, 0.76, 1.5, 0.75),
        tumour_spacing_px=nucleus_px * rng.uniform(0.88, 1.12),
        tumour_cytoplasm=rng.uniform([0.25, 0.5], [0.5, 0.9]),
    )


def draw_nest(centre: np.ndarray, radius: float, rng: np.random.Generator) -> Nest:
    """Draw a lobed, bent oval of the given area, with the bumps of its outer cells."""
    angles = np.linspace(0, 2 * np.pi, max(24, round(radius * 2.5)), endpoint=False)
    order = np.arange(2, 7)[:, None]
    lobes = rng.normal(0, 0.3, (5, 1)) / (order - 1) * np.cos(order * angles + rng.uniform(0, 2 * np.pi, (5, 1)))
    points = (1 + np.clip(lobes.sum(axis=0), -0.5, 0.6))[:, None] * np.column_stack([np.cos(angles), np.sin(angles)])
    points[:, 1] *= rng.uniform(0.4, 1)
    points[:, 1] += rng.normal(0, 0.2) * points[:, 0] ** 2
    points *= radius * np.sqrt(np.pi / cv2.contourArea(points.astype(np.float32)))
    turn = rng.uniform(0, 2 * np.pi)
    points = points @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    num_bumps = max(4, round(2 * np.pi * radius / rng.uniform(14, 24)))
    bumps = np.abs(np.sin(num_bumps * angles / 2 + rng.normal(0, 0.4) * np.sin(3 * angles)))
    return Nest(centre + _offset(points, rng.uniform(0.5, 4.5) * (bumps - 0.6)), centre, radius)


def _offset(points: Polygon, by_px: np.ndarray | float) -> Polygon:
    """Move a polygon's vertices outwards."""
    tangent = np.roll(points, -1, axis=0) - np.roll(points, 1, axis=0)
    normal = np.column_stack([tangent[:, 1], -tangent[:, 0]]) / np.maximum(np.hypot(*tangent.T), 1e-9)[:, None]
    return np.asarray(points + normal * np.broadcast_to(by_px, len(points))[:, None])


def annotate(nest: Nest, size: tuple[int, int], rng: np.random.Generator) -> Polygon:
    """Outline a nest as a person would: smoothly, a little outside it, inside the image, coordinates of 0.1 px."""
    from skimage.measure import find_contours  # only making images needs scikit-image

    low = np.floor(np.maximum(nest.body.min(axis=0) - 9, 0)).astype(int)
    high = np.ceil(np.minimum(nest.body.max(axis=0) + 9, size[::-1])).astype(int)
    width, height = (high - low).tolist()
    blurred = np.pad(soft(filled(nest.body - low, (height, width)), 2.5), 1)
    # A level line never crosses itself, so even-odd filling leaves no specks.
    line = max(find_contours(blurred, rng.uniform(0.06, 0.3)), key=len)[::4, ::-1] - 1 + low
    return np.asarray(np.round(np.clip(line + rng.normal(0, 0.3, line.shape), 0, np.array(size)[::-1] - 1.0), 1))


def air_around(nests: Sequence[Nest], size: tuple[int, int], rng: np.random.Generator) -> Mask:
    """Return the air kept free around the nests."""
    clearing = np.zeros(size, np.uint8)
    for nest in nests:
        wobble = np.interp(np.linspace(0, 7, len(nest.body)), np.arange(8), rng.uniform(6, rng.uniform(14, 50), 8))
        clearing |= filled(_offset(nest.body, wobble), size)
    return clearing > 0


def noise(size: tuple[int, int], scale_px: float, rng: np.random.Generator) -> Plane:
    """Return smooth noise with features of `scale_px`, about standard normal."""
    coarse = rng.standard_normal((int(size[0] / scale_px) + 5, int(size[1] / scale_px) + 5), np.float32)
    if scale_px > 30:  # a second octave hides the grid
        coarse = np.asarray(cv2.resize(coarse, None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC), np.float32)
        coarse += 0.3 * rng.standard_normal(coarse.shape, np.float32)
        scale_px /= 3
    top, left = map(int, rng.integers(0, 3, 2))
    coarse = coarse[top : top + int(size[0] / scale_px) + 3, left : left + int(size[1] / scale_px) + 3]
    fine = cv2.resize(coarse, None, fx=scale_px, fy=scale_px, interpolation=cv2.INTER_CUBIC)
    top, left = map(int, rng.integers(0, int(scale_px) + 1, 2))
    return np.asarray(fine[top : top + size[0], left : left + size[1]] * np.float32(1.25))


def fibres(course: Plane, rng: np.random.Generator, *, width_px: float = 2.2) -> Plane:
    """Return stripes, about standard normal, that follow the level lines of `course` (a distance in px)."""
    table = cv2.GaussianBlur(rng.standard_normal((1, 4096)).astype(np.float32), (0, 0), 4)[0]
    table /= table.std()
    return np.asarray(table[(course * np.float32(8 / width_px)).astype(np.int32) % 4096])


def _air_spaces(
    size: tuple[int, int], spacing_px: float, nests: Sequence[Nest], rng: np.random.Generator
) -> tuple[Plane, np.ndarray]:
    """Return a warped Voronoi pattern, each nest in a cell of its own: distance to the walls, number of the cell."""
    pad = int(spacing_px)
    padded = (size[0] + 2 * pad, size[1] + 2 * pad)
    taken, seeds = np.zeros(padded, np.uint8), np.ones(padded, np.uint8)
    for nest in nests:
        taken |= filled(_offset(nest.body, 0.4 * spacing_px) + pad, padded)
        seeds -= seeds * filled(nest.body + pad, padded)
    grid = np.mgrid[0 : padded[0] : spacing_px, 0 : padded[1] : spacing_px].reshape(2, -1).T
    points = np.clip(grid + rng.uniform(-0.5, 0.5, grid.shape) * spacing_px, 0, np.array(padded) - 1).astype(int)
    points = points[taken[points[:, 0], points[:, 1]] == 0]
    seeds[points[:, 0], points[:, 1]] = 0
    _, cells = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_CCOMP)
    y, x = np.mgrid[0 : size[0], 0 : size[1]].astype(np.float32) + pad
    for plane in (x, y):
        plane += 0.2 * spacing_px * noise(size, spacing_px / 2.2, rng) + 3 * noise(size, 15, rng)
    warped = cv2.remap(cells.astype(np.float32), x, y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
    inside = np.ones(size, np.uint8)
    inside[:, 1:] &= warped[:, 1:] == warped[:, :-1]
    inside[1:] &= warped[1:] == warped[:-1]
    # Without a wall in sight the distance would be endless.
    return np.minimum(cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_5), sum(size)), warped.astype(np.int32)


def scatter(where: Mask, spacing_px: float, rng: np.random.Generator, *, share: float = 1.0) -> np.ndarray:
    """Return points (x, y) inside a mask as packed cells lie, or a random share of them."""
    height, width = where.shape
    y, x = np.mgrid[0:height:spacing_px, 0:width:spacing_px]
    x = x + spacing_px / 2 * (np.arange(len(x)) % 2)[:, None]
    points = np.column_stack([x.ravel(), y.ravel()]) + rng.normal(0, 0.24 * spacing_px, (x.size, 2))
    points = points[rng.random(len(points)) < share]
    ix, iy = np.floor(points).astype(int).T
    kept = (ix >= 0) & (iy >= 0) & (ix < width) & (iy < height)
    kept[kept] &= where[iy[kept], ix[kept]]
    return np.asarray(points[kept])


def cover(canvas: Canvas, alpha: Plane, hematoxylin: Plane | float, eosin: Plane | float) -> None:
    """Lay a material over the canvas, where and as far as `alpha` says."""
    canvas *= 1 - alpha
    canvas[HEMATOXYLIN] += alpha * hematoxylin
    canvas[EOSIN] += alpha * eosin


def filled(polygon: Polygon, size: tuple[int, int]) -> np.ndarray:
    """Return 1 inside a polygon, uint8."""
    points = [np.round(polygon * (1 << _SHIFT)).astype(np.int32)]
    return np.asarray(cv2.fillPoly(np.zeros(size, np.uint8), points, 1, lineType=cv2.LINE_8, shift=_SHIFT))


def _ellipse(layer: np.ndarray, at: np.ndarray, axes: tuple[float, float], angle: float, value: float) -> None:
    centre, half = ((round(pair[0] * (1 << _SHIFT)), round(pair[1] * (1 << _SHIFT))) for pair in (at, axes))
    cv2.ellipse(layer, centre, half, angle, 0, 360, min(value, 255), -1, cv2.LINE_8, _SHIFT)


def soft(layer: np.ndarray, blur_px: float) -> Float32[np.ndarray, "..."]:
    """Return a layer, its values as they are, with soft edges."""
    return np.asarray(cv2.GaussianBlur(layer.astype(np.float32), (0, 0), blur_px))


def paint_nuclei(canvas: Canvas, rng: np.random.Generator, *batches: Batch) -> None:
    """Paint nuclei with chromatin, turned along the directions a batch gives, or at random."""
    layer = np.zeros(canvas.shape[1:], np.uint8)
    for kind, centres, along in batches:
        n = len(centres)
        long = kind.length_px / 2 * np.exp(rng.normal(0, 0.17, n))
        short = long * np.clip(rng.normal(kind.ratio, 0.12, n), 0.28, 1)
        angles = rng.uniform(0, 180, n) if along is None else along + rng.normal(0, 12, n)
        tones = np.clip(kind.tone * rng.normal(1, 0.22, n), 0.25, 2.2) * _LEVELS
        vesicular = rng.random(n) < kind.vesicular_share
        nucleoli = centres + rng.normal(0, 0.24, (n, 2)) * long[:, None]
        for i in range(n):
            _ellipse(layer, centres[i], (long[i], short[i]), angles[i], tones[i])
            if vesicular[i]:
                inside = (max(long[i] - 1.3, 0.5), max(short[i] - 1.3, 0.5))
                _ellipse(layer, centres[i], inside, angles[i], 0.67 * tones[i])
                _ellipse(layer, nucleoli[i], (1.5, 1.3), 0, 1.1 * tones[i])
    alpha = soft(layer > 0, 0.7)
    chromatin = np.clip(1 + 0.25 * noise(canvas.shape[1:], 2.6, rng), 0.35, 1.7)
    canvas[EOSIN] *= 1 - 0.2 * alpha
    canvas[[BLOOD, HEMATOXYLIN]] *= 1 - alpha
    canvas[HEMATOXYLIN] += soft(layer, 0.6) * chromatin * np.float32(1 / _LEVELS)


def _paint_red_cells(canvas: Canvas, centres: np.ndarray, rng: np.random.Generator) -> None:
    layer = np.zeros(canvas.shape[1:], np.uint8)
    for at, (ratio, turn, tone) in zip(centres, rng.random((len(centres), 3)), strict=True):
        _ellipse(layer, at, (4.4, 2.2 + 2.2 * ratio), 180 * turn, (1.4 + 0.9 * tone) * _LEVELS)
    canvas *= 1 - 0.9 * soft(layer > 0, 0.7)
    canvas[BLOOD] += soft(layer, 0.8) * np.float32(1 / _LEVELS)


def _paint_fluid(canvas: Canvas, air_spaces: np.ndarray, rng: np.random.Generator) -> None:
    """Paint oedema, pale, grainy and full of bubbles, in some air spaces."""
    size = canvas.shape[1:]
    wet = np.float32(rng.random(air_spaces.max() + 1) < rng.choice([0, 0.05, 0.2, 0.5]))[air_spaces]
    bubbles = np.zeros(size, np.uint8)
    for at in scatter(noise(size, 90, rng) > 0.3, 30, rng, share=0.5):
        radius = rng.uniform(3, 16)
        _ellipse(bubbles, at, (radius, radius * rng.uniform(0.75, 1)), rng.uniform(0, 180), 1)
    clot = np.clip(1 + 0.3 * noise(size, 2.5, rng) + 0.3 * noise(size, 40, rng), 0.3, 2.2)
    canvas[EOSIN] += wet * (1 - 0.9 * soft(bubbles, 1)) * clot * np.float32(rng.uniform(0.05, 0.16))


def paint_septa(canvas: Canvas, nests: Sequence[Nest], taken: Mask, rng: np.random.Generator) -> Mask:
    """Paint the walls between air spaces with their cells; return where tissue is."""
    size = canvas.shape[1:]
    distance, air_spaces = _air_spaces(size, rng.uniform(90, 240), nests, rng)
    _paint_fluid(canvas, air_spaces, rng)
    thickness = rng.uniform(3.5, 9) * np.exp(0.55 * noise(size, 80, rng))
    thickness += rng.uniform(25, 70) * np.clip(noise(size, 190, rng) + rng.uniform(-1.2, 1.3), 0, None)
    torn = np.clip(6 * (noise(size, 130, rng) - rng.uniform(0.9, 2.2)), 0, 1)
    depth = thickness * (1 - torn) - distance + 0.8 * noise(size, 6, rng)
    outside = cv2.distanceTransform((~taken).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_3)
    depth = np.minimum(depth, outside - 1)
    course = distance + 16 * noise(size, 55, rng) + 4 * noise(size, 17, rng)
    stripes = fibres(course, rng, width_px=3) * np.clip(0.6 + 0.6 * noise(size, 11, rng), 0, 1.4)
    density = noise(size, 75, rng)
    # Loose stroma: gaps between the fibres, away from the surface.
    gaps = np.clip(0.9 * (stripes - 0.6 - 0.6 * density), 0, 1) * np.clip(depth / 5 - 1, 0, 1)
    alpha = np.clip(0.7 * depth + 0.5, 0, 1) * (1 - 0.75 * gaps)
    eosin = np.clip(0.62 + 0.13 * stripes + 0.14 * density + 0.06 * noise(size, 3, rng), 0.15, 1.5)
    cover(canvas, alpha, np.clip(0.13 + 0.05 * stripes, 0, 0.4), eosin)
    _paint_tissue_cells(canvas, depth, course, density, rng)
    carbon = (depth > 1) & (noise(size, 3, rng) > 0.7) & (noise(size, 42, rng) > 2.9)
    canvas[CARBON] += 1.6 * soft(carbon, 0.7)
    return np.asarray(depth > -3)


def _paint_tissue_cells(canvas: Canvas, depth: Plane, course: Plane, density: Plane, rng: np.random.Generator) -> None:
    """Paint what lives in the walls: capillary blood, fibroblasts, lining cells, lymphocytes."""
    size = canvas.shape[1:]
    congestion = noise(size, 50, rng)
    blood = (depth > 2) & (congestion > rng.uniform(0.5, 1.8))
    _paint_red_cells(canvas, scatter(blood, 9.5, rng, share=rng.uniform(0.4, 0.9)), rng)
    spindle = scatter(depth > 1.5, 13, rng, share=rng.uniform(0.3, 0.6))
    smooth = soft(course, 2)
    ix, iy = spindle.astype(int).T
    slope_x, slope_y = (cv2.Sobel(smooth, cv2.CV_32F, *order)[iy, ix] for order in ((1, 0), (0, 1)))
    along = np.degrees(np.arctan2(slope_y, slope_x)) + 90
    rim = (depth > 0) & (depth < 6) & (density + congestion > rng.uniform(0.8, 2.4))
    inflamed = (depth > 3) & (congestion + 0.7 * density < rng.uniform(-2.6, -1.5))
    lining, lymphocytes = scatter(rim, 10, rng, share=0.6), scatter(inflamed, 8.5, rng, share=0.8)
    paint_nuclei(canvas, rng, (FIBROBLAST, spindle, along), (LINING, lining, None), (LYMPHOCYTE, lymphocytes, None))


def paint_vessels(canvas: Canvas, tissue: Mask, taken: Mask, rng: np.random.Generator) -> None:
    """Paint vessels where there is room, and add them to the tissue."""
    height, width = taken.shape
    for _ in range(rng.poisson(2.0 * height * width / FULL_FIELD_PX)):
        radius, x, y = map(float, rng.uniform([25, 0, 0], [75, width, height]))
        reach = round(1.7 * radius)
        x0, y0 = max(0, int(x) - reach), max(0, int(y) - reach)
        window = (slice(y0, int(y) + reach), slice(x0, int(x) + reach))
        down, right = np.mgrid[window][:, : height - y0, : width - x0].astype(np.float32) - np.array([[[y]], [[x]]])
        down *= rng.uniform(0.65, 1)
        course = (np.hypot(down, right) + 5 * noise(down.shape, 30, rng)).astype(np.float32)
        around = np.degrees(np.arctan2(down, right)).astype(np.float32) + 90
        if not (taken[window] & (course < radius + 4)).any():
            _paint_vessel(canvas[:, window[0], window[1]], course, radius, around, rng)
            tissue[window] |= course < radius + 3


def _paint_vessel(canvas: Canvas, course: Plane, radius: float, around: Plane, rng: np.random.Generator) -> None:
    """Paint a ring of muscle, its cells lying `around` (degrees) the lumen, with blood in it or not."""
    lumen = radius * rng.uniform(0.58, 0.8)
    stripes = fibres(course, rng)
    cover(canvas, np.clip(radius - course, 0, 1), 0.15 + 0.03 * stripes, 0.72 + 0.11 * stripes)
    cover(canvas, np.clip(lumen - course, 0, 1), 0.0, 0.04)
    muscle = scatter((course < radius - 2) & (course > lumen + 1), 13, rng, share=0.6)
    paint_nuclei(canvas, rng, (MUSCLE, muscle, around[tuple(muscle.astype(int).T[::-1])]))
    if rng.random() < 0.7:
        _paint_red_cells(canvas, scatter(course < lumen, 8, rng, share=rng.uniform(0.4, 1)), rng)


def paint_loose_cells(canvas: Canvas, occupied: Mask, rng: np.random.Generator) -> None:
    """Paint red cells and macrophages, single or in loose groups, in the air."""
    size = canvas.shape[1:]
    room = cv2.distanceTransform((~occupied).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_3)
    blood = (room > 3) & (noise(size, 100, rng) > rng.uniform(0.4, 2.6))
    _paint_red_cells(canvas, scatter(blood, 12, rng, share=rng.uniform(0.3, 0.9)), rng)
    gathered = (room > 9) & (noise(size, 110, rng) > rng.uniform(0.1, 1.9))
    cells = scatter(gathered, rng.uniform(21, 27), rng, share=rng.uniform(0.3, 0.85))
    cells = np.concatenate([cells, scatter(room > 9, 60, rng, share=rng.uniform(0.02, 0.25))])
    body = np.zeros(size, np.uint8)
    for at, long in zip(cells, 10.5 * np.exp(rng.normal(0, 0.2, len(cells))), strict=True):
        _ellipse(body, at, (long, long * rng.uniform(0.72, 1)), rng.uniform(0, 180), rng.uniform(70, 255))
    foam = np.clip(1 + 0.2 * noise(size, 3.2, rng), 0.3, 1.8) * soft(body, 0.9) / 255
    hue = np.clip(1 + 0.5 * noise(size, 18, rng), 0.2, 2)
    rusty = 0.14 * np.clip(noise(size, 60, rng) - 0.7, 0, 1)
    canvas *= 1 - soft(body > 0, 0.9)
    canvas += np.stack([0.22 * foam, 0.62 * foam * hue, 0 * foam, rusty * foam])
    paint_nuclei(canvas, rng, (MACROPHAGE, cells + rng.normal(0, 2.4, cells.shape), None))


def paint_tumour(canvas: Canvas, border: Mask, look: Look, rng: np.random.Generator) -> None:
    """Paint the tumour's own mass: islands of the same cells as a nest's, in stroma."""
    size = canvas.shape[1:]
    distance, _ = _air_spaces(size, rng.uniform(70, 130), (), rng)
    stripes = fibres(distance + 12 * noise(size, 50, rng), rng)
    cover(canvas, soft(border, 1.5), 0.14 + 0.04 * stripes, np.clip(0.62 + 0.14 * stripes, 0.2, 1.2))
    bands = rng.uniform(3, 7) * np.exp(0.6 * noise(size, 60, rng))
    paint_nuclei(canvas, rng, (FIBROBLAST, scatter(border & (distance < bands), 12, rng, share=0.6), None))
    lumens = (distance > 24) & (noise(size, 45, rng) > rng.uniform(0.9, 2))
    _paint_tumour_cells(canvas, border & (distance > bands + 1) & ~lumens, look, rng)


def paint_nest(canvas: Canvas, nest: Nest, look: Look, rng: np.random.Generator) -> None:
    """Paint a nest: solid, or around lumens as micropapillae and rings are; large ones are cleft."""
    low = np.maximum(np.floor(nest.body.min(axis=0)).astype(int) - 6, 0)
    high = np.ceil(nest.body.max(axis=0)).astype(int) + 6
    canvas = canvas[:, low[1] : high[1], low[0] : high[0]]
    size = canvas.shape[1:]
    body = filled(nest.body - low, size)
    inner = cv2.distanceTransform(np.pad(body, 1), cv2.DIST_L2, cv2.DIST_MASK_5)[1:-1, 1:-1]
    solid = body > 0
    if nest.radius > 24 and rng.random() < 0.3:  # a ring one or two cells thick
        solid &= ~(inner > rng.uniform(15, 24) + 3 * noise(size, 12, rng))
    if nest.radius > 45:
        solid &= ~((np.abs(noise(size, 50, rng)) < 0.12) & (noise(size, 60, rng) > 0.9) & (inner > 6))
        solid &= ~((noise(size, 28, rng) > rng.uniform(1.5, 2.6)) & (inner > 14))
    _paint_tumour_cells(canvas, solid, look, rng)


def _paint_tumour_cells(canvas: Canvas, where: Mask, look: Look, rng: np.random.Generator) -> None:
    """Paint cohesive tumour cells: granular cytoplasm, crowded large nuclei."""
    size, spacing = canvas.shape[1:], look.tumour_spacing_px * rng.uniform(0.92, 1.12)
    core = cv2.erode(where.view(np.uint8), cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5)))
    centres = scatter(core > 0, spacing, rng, share=0.95)
    grain = np.clip(1 + 0.18 * noise(size, 2.8, rng) + 0.15 * noise(size, 15, rng), 0.3, 1.8)
    hematoxylin, eosin = (look.tumour_cytoplasm * rng.normal(1, 0.12, 2)).tolist()
    cover(canvas, soft(where, 0.9), hematoxylin * grain, eosin * grain)
    paint_nuclei(canvas, rng, (look.tumour_nucleus._replace(tone=rng.uniform(1.3, 1.75)), centres, None))


def scan(canvas: Canvas, look: Look, rng: np.random.Generator, *, in_focus: bool = False) -> RgbImage:
    """Mix the slide's stains by Beer-Lambert, and look at the result through its scanner, which may be in focus."""
    size = canvas.shape[1:]
    uneven = np.clip(1 + 0.06 * noise(size, 400, rng), 0.7, 1.3)  # section thickness
    density = cv2.transform(cv2.merge(list(canvas * uneven)), look.dyes)
    light = soft(cv2.exp(-density) * look.white, look.blur_px)
    defocus = np.clip(noise(size, 330, rng) - rng.uniform(0.6, 2.2), 0, 1)
    defocus *= not in_focus
    sharpened = look.sharpening * (1 - defocus)  # what is in focus
    light += (defocus - sharpened)[..., None] * (soft(light, 2.0) - light)
    grain = rng.standard_normal(size, np.float32) * np.float32(look.grain)
    return np.asarray(np.clip(light + grain[..., None], 0, 255), np.uint8)
