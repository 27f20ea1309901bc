"""H&E-like lung fields with exact truth, for the demo, tests and benchmarks where real images may not be shipped.

A field is built from what a pathologist sees at 20x (about 0.5 um/px): alveolar septa with nuclei around air spaces,
vessels, red cells, macrophages (loose, pale: the distractors), tumour nests afloat in air (compact, crowded: the
targets), and sometimes the border of the tumour itself, which looks like a nest but is none. Stains are mixed by the
Beer-Lambert law, so stain estimation means on a phantom what it means on tissue.

Counts and areas follow the 285 published fields: targets per image 1 to 24, median 2; areas log-normal, median 4700 px.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float32
from pydantic import Field

from stas_core.annotations import Polygon, parse_labelme, rasterise, to_labelme
from stas_core.arrays import Mask, RgbImage
from stas_core.config import Config

Plane = Float32[np.ndarray, "h w"]

WHITE = 240.0
NUCLEUS_PX = 11.0
"""Length of a normal nucleus, about 6 um."""
LOG_AREA_MEAN, LOG_AREA_SD = 8.58, 1.1
FULL_FIELD_PX = 942 * 1716
_SHIFT = 4  # cv2 draws with 1/16 px


class PhantomConfig(Config):
    """A phantom cohort."""

    num_images: int = Field(40, ge=1)
    """Number of images."""
    height: int = Field(942, ge=32)
    """Image height in px; cells keep their size, so a smaller field shows fewer."""
    width: int = Field(1716, ge=32)
    """Image width in px."""
    seed: int = 0
    """Seed of the cohort."""
    num_groups: int = Field(4, ge=1)
    """Number of slides the images come from; each has its own stain and scanner."""
    tumour_border_share: float = Field(0.15, ge=0, le=1)
    """Share of the images with the tumour's border at one side."""


@dataclass(frozen=True)
class Phantom:
    """One field: image, truth as mask and as labelme JSON, and the slide it comes from."""

    image: RgbImage
    mask: Mask
    labelme: bytes
    group: str


@dataclass
class _Canvas:
    """Stain concentrations and tissue being painted, float32 (h, w)."""

    hematoxylin: np.ndarray
    eosin: np.ndarray
    red: np.ndarray
    """Eosin of red cells, which is purer and brighter than that of tissue."""

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.hematoxylin.shape
        return height, width


def phantom_id(index: int) -> str:
    """Return the id of a phantom image."""
    return f"phantom_{index:04d}"


def make_phantom(config: PhantomConfig, index: int) -> Phantom:
    """Make image `index` of a cohort; it depends on nothing but the config and the index."""
    rng = np.random.default_rng([config.seed, index])
    group = int(np.random.default_rng([config.seed, 1, index]).integers(config.num_groups))
    size = (config.height, config.width)
    border = _tumour_border(size, rng) if rng.random() < config.tumour_border_share else np.zeros(size, bool)
    nests = _plan_nests(border, rng)
    polygons = [_outline(nest, margin_px=rng.uniform(2, 5), rng=rng) for nest in nests]
    labelme = to_labelme(polygons, size, f"{phantom_id(index)}.jpg")
    mask, _ = rasterise(parse_labelme(labelme, phantom_id(index)), size)

    blank = [np.zeros(size, np.float32) for _ in range(3)]
    canvas = _Canvas(*blank)
    tissue = _paint_septa(canvas, nests, border, rng)
    _paint_vessels(canvas, tissue, mask | border, rng)
    _paint_loose_cells(canvas, tissue | mask | border, rng)
    if border.any():
        _paint_tumour(canvas, border, rng)
    for nest in nests:
        _paint_nest(canvas, nest, rng)
    image = _render(canvas, np.random.default_rng([config.seed, 2, group]), rng)
    return Phantom(image, mask, labelme, f"slide_{group}")


@dataclass(frozen=True)
class _Nest:
    """A blob: centre (x, y), mean radius in px, and the radius's harmonics."""

    x: float
    y: float
    radius: float
    amplitudes: np.ndarray
    phases: np.ndarray

    def radii(self, angles: np.ndarray) -> np.ndarray:
        """Return the radius in each direction, in px."""
        order = np.arange(2, 2 + len(self.amplitudes))[:, None]
        waves = self.amplitudes[:, None] * np.cos(order * angles + self.phases[:, None])
        return np.asarray(self.radius * (1 + waves.sum(axis=0)))


def _blob(x: float, y: float, radius: float, rng: np.random.Generator, *, rough: float = 0.16) -> _Nest:
    amplitudes = rng.normal(0, rough, 5) / np.arange(1, 6)
    return _Nest(x, y, radius, np.clip(amplitudes, -0.28, 0.28), rng.uniform(0, 2 * np.pi, 5))


def _plan_nests(border: Mask, rng: np.random.Generator) -> list[_Nest]:
    """Place one or more nests off the tumour that do not touch each other, in clusters, as aerogenous spread does."""
    height, width = border.shape
    from_border = cv2.distanceTransform((~border).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_3)
    share = min(1.0, height * width / FULL_FIELD_PX)
    wanted = 1 + min(23, int(rng.geometric(0.39) - 1) if rng.random() < 0.96 else int(rng.integers(6, 24)))
    wanted = max(1, round(1 + (wanted - 1) * np.sqrt(share)))
    log_area = LOG_AREA_MEAN + rng.normal(0, 0.8)
    away = np.argwhere(from_border >= 0.6 * from_border.max())
    centre = away[rng.integers(len(away))][::-1].astype(float)
    nests: list[_Nest] = []
    for _ in range(wanted * 30):
        if len(nests) == wanted:
            break
        radius = np.sqrt(np.exp(rng.normal(log_area, 0.7)) / np.pi)
        radius = float(np.clip(radius, 9, 0.28 * min(border.shape)))
        edge = min(radius * 0.6, width / 4, height / 4)
        spread = rng.normal(centre, 0.25 * width) if nests else centre
        x, y = np.clip(spread, edge, [width - edge, height - edge])
        if nests and from_border[int(y), int(x)] < 1.5 * radius:
            continue
        if all(np.hypot(x - n.x, y - n.y) > 1.5 * (radius + n.radius) + 8 for n in nests):
            nests.append(_blob(float(x), float(y), radius, rng))
    return nests


def _outline(nest: _Nest, *, margin_px: float, rng: np.random.Generator) -> Polygon:
    """Trace a nest as a person would: a smooth line a little outside it."""
    num_points = int(np.clip(nest.radius * 0.9, 16, 120))
    angles = np.linspace(0, 2 * np.pi, num_points, endpoint=False)
    radii = nest.radii(angles) + margin_px + rng.normal(0, 0.5, num_points)
    return np.column_stack([nest.x + radii * np.cos(angles), nest.y + radii * np.sin(angles)])


def _tumour_border(size: tuple[int, int], rng: np.random.Generator) -> Mask:
    """Return the tumour's own mass: one side of the field behind an uneven front."""
    front = np.arange(size[1]) + 70 * _noise(size, 160, rng) + 8 * _noise(size, 20, rng)
    border = front < rng.uniform(0.08, 0.3) * size[1]
    return np.ascontiguousarray(border[:, ::-1] if rng.random() < 0.5 else border)


def _noise(size: tuple[int, int], scale_px: float, rng: np.random.Generator) -> Plane:
    """Return smooth noise with features of `scale_px`, about standard normal."""
    coarse = rng.standard_normal((int(size[0] / scale_px) + 4, int(size[1] / scale_px) + 4)).astype(np.float32)
    height, width = size
    fine = cv2.resize(coarse, None, fx=scale_px, fy=scale_px, interpolation=cv2.INTER_CUBIC)
    y0, x0 = rng.integers(0, int(scale_px) + 1, 2)
    return np.ascontiguousarray(fine[y0 : y0 + height, x0 : x0 + width])


def _paint_septa(canvas: _Canvas, nests: list[_Nest], border: Mask, rng: np.random.Generator) -> Mask:
    """Paint the walls between air spaces with their nuclei; return where tissue is."""
    size = canvas.size
    distance = _distance_to_walls(size, rng.uniform(110, 230), rng)
    thickness = rng.uniform(2.5, 6) * np.exp(0.5 * _noise(size, 90, rng))
    broken = _noise(size, 130, rng) > rng.uniform(0.7, 1.6)  # emphysema: walls that end in the air
    tissue = (distance < thickness) & ~broken
    # Thickened, inflamed patches, where walls merge.
    tissue |= (_noise(size, 170, rng) > rng.uniform(1.1, 2.4)) & (distance < 9 * thickness)
    air = np.zeros(size, np.uint8)
    for nest in nests:  # nests float: clear the air around them, leaving other walls as they are
        _fill(air, _outline(nest, margin_px=0.25 * nest.radius + rng.uniform(6, 16), rng=rng), 1)
    tissue &= ~(air > 0) & ~border
    soft = cv2.GaussianBlur(tissue.astype(np.float32), (0, 0), 1.2)
    fibres = 0.85 + 0.22 * _noise(size, 5, rng) + 0.15 * _noise(size, 30, rng)
    canvas.eosin += soft * np.clip(fibres, 0.3, 1.5) * 0.75
    canvas.hematoxylin += soft * np.clip(0.16 + 0.07 * _noise(size, 9, rng), 0.02, 0.4)
    canvas.eosin += np.clip(0.015 + 0.01 * _noise(size, 200, rng), 0, 0.1)  # protein in the air
    centres = _scatter(tissue, rng.uniform(9.5, 12), rng)
    centres = centres[rng.random(len(centres)) < rng.uniform(0.35, 0.7)]
    _paint_nuclei(canvas, centres, NUCLEUS_PX, rng, slender=0.55, darkness=0.85)
    red = _scatter(tissue & (_noise(size, 60, rng) > 0.6), 9, rng)
    _paint_red_cells(canvas, red, rng)
    return np.asarray(cv2.dilate(tissue.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0)


def _distance_to_walls(size: tuple[int, int], spacing_px: float, rng: np.random.Generator) -> Plane:
    """Return each pixel's distance to the nearest border of a warped Voronoi pattern."""
    height, width = size
    pad = int(spacing_px)
    seeds = np.ones((height + 2 * pad, width + 2 * pad), np.uint8)
    grid = np.mgrid[0 : seeds.shape[0] : spacing_px, 0 : seeds.shape[1] : spacing_px].reshape(2, -1).T
    points = np.clip(grid + rng.uniform(-0.5, 0.5, grid.shape) * spacing_px, 0, np.array(seeds.shape) - 1).astype(int)
    seeds[points[:, 0], points[:, 1]] = 0
    _, cells = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    shift = 0.16 * spacing_px
    warped = cv2.remap(
        cells.astype(np.float32),
        x + pad + shift * _noise(size, spacing_px / 2.5, rng) + 0.25 * shift * _noise(size, 17, rng),
        y + pad + shift * _noise(size, spacing_px / 2.5, rng) + 0.25 * shift * _noise(size, 17, rng),
        cv2.INTER_NEAREST,
        borderMode=cv2.BORDER_REPLICATE,
    )
    inside = np.ones(size, np.uint8)
    inside[:, 1:] &= warped[:, 1:] == warped[:, :-1]
    inside[1:] &= warped[1:] == warped[:-1]
    return np.asarray(cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_5))


def _scatter(where: Mask, spacing_px: float, rng: np.random.Generator) -> np.ndarray:
    """Return jittered grid points (x, y) that lie inside a mask."""
    height, width = where.shape
    y, x = np.mgrid[0:height:spacing_px, 0:width:spacing_px]
    x = x + spacing_px / 2 * (np.arange(len(x)) % 2)[:, None]  # hexagonal, as packed cells lie
    points = np.column_stack([x.ravel(), y.ravel()]) + rng.normal(0, 0.22 * spacing_px, (x.size, 2))
    ix, iy = np.floor(points).astype(int).T
    kept = (ix >= 0) & (iy >= 0) & (ix < width) & (iy < height)
    kept[kept] &= where[iy[kept], ix[kept]]
    return np.asarray(points[kept])


def _paint_nuclei(
    canvas: _Canvas, centres: np.ndarray, length_px: float, rng: np.random.Generator, *, slender: float, darkness: float
) -> None:
    """Paint oval nuclei with chromatin texture; `slender` is the mean ratio of their axes."""
    layer = np.zeros(canvas.size, np.uint8)
    for x, y in centres:
        long = length_px * rng.uniform(0.75, 1.3) / 2
        short = long * np.clip(rng.normal(slender, 0.14), 0.3, 1)
        _ellipse(layer, x, y, (long, short), rng.uniform(0, 180), int(rng.uniform(150, 255)))
    soft = cv2.GaussianBlur(layer, (0, 0), 0.8).astype(np.float32) / 255
    chromatin = np.clip(1 + 0.22 * _noise(canvas.size, 2.5, rng), 0.4, 1.6)
    canvas.hematoxylin += soft * chromatin * darkness
    canvas.eosin *= 1 - 0.5 * soft


def _paint_red_cells(canvas: _Canvas, centres: np.ndarray, rng: np.random.Generator) -> None:
    layer = np.zeros(canvas.size, np.uint8)
    for x, y in centres:
        radius = rng.uniform(3.6, 5.2)
        _ellipse(layer, x, y, (radius, radius * rng.uniform(0.8, 1)), rng.uniform(0, 180), int(rng.uniform(150, 240)))
    canvas.red += cv2.GaussianBlur(layer, (0, 0), 0.9).astype(np.float32) / 255 * 0.9


def _paint_vessels(canvas: _Canvas, tissue: Mask, taken: Mask, rng: np.random.Generator) -> None:
    """Paint vessels, a muscular ring with blood in its lumen, and add them to the tissue."""
    height, width = canvas.size
    for _ in range(rng.poisson(2.2 * height * width / FULL_FIELD_PX)):
        radius = rng.uniform(22, 70)
        x, y = rng.uniform([0, 0], [width, height])
        wall = _blob(x, y, radius, rng, rough=0.08)
        outer, lumen = np.zeros(canvas.size, np.uint8), np.zeros(canvas.size, np.uint8)
        _fill(outer, _outline(wall, margin_px=rng.uniform(6, 16), rng=rng), 1)
        _fill(lumen, _outline(wall, margin_px=-0.2 * radius, rng=rng), 1)
        if (outer.astype(bool) & taken).any():
            continue
        ring = cv2.GaussianBlur((outer - np.minimum(lumen, outer)).astype(np.float32), (0, 0), 1)
        inside = lumen > 0
        canvas.eosin[inside] *= 0.15
        canvas.hematoxylin[inside] *= 0.1
        canvas.eosin += ring * np.clip(0.7 + 0.15 * _noise(canvas.size, 6, rng), 0.2, 1.2)
        canvas.hematoxylin += ring * 0.12
        _paint_nuclei(canvas, _scatter(ring > 0.5, 13, rng), NUCLEUS_PX, rng, slender=0.4, darkness=0.8)
        if rng.random() < 0.7:
            _paint_red_cells(canvas, _scatter(inside, 8, rng), rng)
        tissue |= outer > 0


def _paint_loose_cells(canvas: _Canvas, occupied: Mask, rng: np.random.Generator) -> None:
    """Paint macrophages, single or in loose groups, and stray red cells, in the air."""
    height, width = canvas.size
    room = cv2.distanceTransform((~occupied).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_3)
    dense = _noise(canvas.size, 110, rng) > rng.uniform(0.2, 1.8)
    cells = _scatter((room > 11) & dense, rng.uniform(21, 30), rng)
    cells = cells[rng.random(len(cells)) < rng.uniform(0.25, 0.8)]
    cytoplasm = np.zeros((height, width), np.uint8)
    for x, y in cells:
        long = rng.uniform(7.5, 11.5)
        _ellipse(cytoplasm, x, y, (long, long * rng.uniform(0.8, 1)), rng.uniform(0, 180), int(rng.uniform(90, 200)))
    foam = np.clip(1 + 0.3 * _noise(canvas.size, 3, rng), 0.3, 1.7)
    soft = cv2.GaussianBlur(cytoplasm, (0, 0), 1.0).astype(np.float32) / 255 * foam
    canvas.eosin += 0.42 * soft
    canvas.hematoxylin += 0.16 * soft
    off_centre = cells + rng.normal(0, 2.2, cells.shape)
    _paint_nuclei(canvas, off_centre, 0.85 * NUCLEUS_PX, rng, slender=0.85, darkness=0.6)
    blood = (room > 3) & (_noise(canvas.size, 90, rng) > rng.uniform(0.8, 2.6))
    _paint_red_cells(canvas, _scatter(blood, 11, rng), rng)


def _paint_tumour(canvas: _Canvas, border: Mask, rng: np.random.Generator) -> None:
    """Paint the tumour's solid mass: the same cells as a nest's, in stroma."""
    stroma = _noise(canvas.size, 45, rng) > 0.9
    soft = cv2.GaussianBlur(border.astype(np.float32), (0, 0), 1.5)
    canvas.eosin += soft * np.clip(0.5 + 0.12 * _noise(canvas.size, 7, rng) + 0.2 * stroma, 0.1, 1.2)
    canvas.hematoxylin += soft * 0.2
    _paint_nuclei(canvas, _scatter(border & ~stroma, 12.5, rng), 1.3 * NUCLEUS_PX, rng, slender=0.78, darkness=0.8)


def _paint_nest(canvas: _Canvas, nest: _Nest, rng: np.random.Generator) -> None:
    """Paint a nest: crowded large nuclei in scant cytoplasm; some have a hollow core, as micropapillae do."""
    body = np.zeros(canvas.size, np.uint8)
    _fill(body, _outline(nest, margin_px=0.0, rng=rng), 1)
    if nest.radius > 26 and rng.random() < 0.35:
        hollow = _blob(nest.x, nest.y, nest.radius * rng.uniform(0.25, 0.5), rng)
        _fill(body, _outline(hollow, margin_px=0.0, rng=rng), 0)
    soft = cv2.GaussianBlur(body.astype(np.float32), (0, 0), 1.3)
    canvas.eosin += soft * np.clip(0.5 + 0.12 * _noise(canvas.size, 6, rng), 0.15, 0.9)
    canvas.hematoxylin += soft * rng.uniform(0.14, 0.3)
    inner = cv2.erode(body, np.ones((5, 5), np.uint8)) > 0
    centres = _scatter(inner, rng.uniform(10.5, 13.5), rng)
    _paint_nuclei(canvas, centres, 1.3 * NUCLEUS_PX, rng, slender=0.8, darkness=rng.uniform(0.75, 1.0))


def _fill(layer: np.ndarray, polygon: Polygon, value: int) -> None:
    cv2.fillPoly(layer, [np.round(polygon * (1 << _SHIFT)).astype(np.int32)], value, lineType=cv2.LINE_8, shift=_SHIFT)


def _ellipse(layer: np.ndarray, x: float, y: float, axes: tuple[float, float], angle: float, value: int) -> None:
    unit = 1 << _SHIFT
    centre, half = (round(x * unit), round(y * unit)), (round(axes[0] * unit), round(axes[1] * unit))
    cv2.ellipse(layer, centre, half, angle, 0, 360, value, -1, cv2.LINE_8, _SHIFT)


def _render(canvas: _Canvas, slide: np.random.Generator, rng: np.random.Generator) -> RgbImage:
    """Mix the stains of a slide by Beer-Lambert, and look at the result through its scanner."""
    hematoxylin = _unit([0.60, 0.70, 0.38] + slide.normal(0, 0.045, 3))
    eosin = _unit([0.13, 0.93, 0.30] + slide.normal(0, 0.045, 3))
    blood = _unit([0.10, 0.86, 0.48] + slide.normal(0, 0.03, 3))
    strength = slide.uniform(0.75, 1.35, 3) * [1.75, 1.05, 1.25]
    layers = (canvas.hematoxylin, canvas.eosin, canvas.red)
    density = sum(
        layer[..., None] * (vector * amount).astype(np.float32)
        for layer, vector, amount in zip(layers, (hematoxylin, eosin, blood), strength, strict=True)
    )
    white = np.array([243, 241, 243]) + slide.uniform(-5, 4, 3)  # lamp and white balance
    light = white.astype(np.float32) * np.exp(-np.asarray(density, np.float32))
    light = cv2.GaussianBlur(light, (0, 0), slide.uniform(0.5, 0.95))
    grain = rng.standard_normal(canvas.size, dtype=np.float32) * np.float32(slide.uniform(1.0, 3.0))
    return np.asarray(np.clip(light + grain[..., None], 0, 255), np.uint8)


def _unit(vector: np.ndarray) -> np.ndarray:
    return np.asarray(vector / np.linalg.norm(vector))
