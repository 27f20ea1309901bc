"""Phantom whole slides with exact truth, of any size in bounded memory, for the demo, tests and benchmarks.

    made = make_slide(PhantomSlideConfig(width_px=30_000, height_px=20_000), 0, Path("phantom"))

A slide has islands of lung on glass, a tumour in one of them, and nests afloat in air spaces: many beside the tumour,
ever fewer further off. It is put together from pictures that the painters of phantom fields make, so a model that was
trained on those works on it. Vessels, blood and macrophages are there to be mistaken for nests, as in fields.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field

from stas_core import local_files
from stas_core.config import Config
from stas_core.data.phantom_tissue import draw_look
from stas_core.data.shapes import Polygon
from stas_core.slides import phantom_plan as plan
from stas_core.slides.phantom_bank import FIELD_MPP, PICTURE_PX, Bank, Painter
from stas_core.slides.phantom_canvas import Flaw, Scene, SlideCanvas
from stas_core.slides.phantom_plan import Anatomy, Frame
from stas_core.slides.pyramid import MASK, Layout, write_pyramid

_ABSURD_MPP = 25_400 / 96
"""What programs write by default: 96 dots per inch."""
_MOST_PICTURES, _MOST_STAMPS = 8, 40
_KEPT_WHEN_TRUNCATED = 0.6


class PhantomSlideConfig(Config):
    """A cohort of phantom slides."""

    num_slides: int = Field(3, ge=1)
    """Number of slides."""
    width_px: int = Field(12_000, ge=512, le=400_000)
    """Width of level 0."""
    height_px: int = Field(8_000, ge=512, le=400_000)
    """Height of level 0."""
    mpp: float = Field(0.5, ge=0.2, le=1.0)
    """um per level-0 pixel; cells keep their size in um."""
    seed: int = Field(0, ge=0)
    """Seed of the cohort."""
    nests_per_mm2: float = Field(10.0, ge=0, le=30)
    """Nests per mm2 of lung beside the tumour."""
    spread_um: float = Field(800.0, gt=0)
    """Distance from the tumour over which nests become fewer by a factor of e."""
    flaws: tuple[Flaw, ...] = (Flaw.NONE,)
    """What is wrong with the slides, in turn; none, blank (no tissue), drift (of stain), pen, fill (black), blur,
    missing_mpp, absurd_mpp, truncated, missing_file (the index of a MIRAX slide without its folder)."""
    jpeg_quality: int | None = Field(90, ge=1, le=100)
    """Of the slide's tiles; null: they lose nothing."""

    def flaw(self, index: int) -> Flaw:
        """Return what is wrong with a slide."""
        return self.flaws[index % len(self.flaws)]


@dataclass(frozen=True)
class PhantomSlide:
    """The files of one slide."""

    slide: Path
    """Pyramidal TIFF, or the index of a MIRAX slide."""
    mask: Path
    """Pyramidal TIFF of the same size: targets are 255."""
    targets: Path
    """GeoJSON: outlines of the targets in level-0 px; drawn, they are the mask."""
    tumour: Path
    """GeoJSON: outline of the tumour."""

    def exist(self) -> bool:
        """Tell whether all files are there."""
        return all(path.exists() for path in (self.slide, self.mask, self.targets, self.tumour))


PHANTOM_PATTERNS = ("slides/*.tif", "slides/*.mrxs", "masks/*.tif", "targets/*.geojson", "tumours/*.geojson")
"""The files of a cohort, in its folder."""


def slide_id(index: int) -> str:
    """Return the id of a phantom slide."""
    return f"phantom_slide_{index:04d}"


def slide_files(config: PhantomSlideConfig, index: int, folder: Path) -> PhantomSlide:
    """Return where the files of a slide are, made or not."""
    name = slide_id(index)
    suffix = ".mrxs" if config.flaw(index) is Flaw.MISSING_FILE else ".tif"
    return PhantomSlide(
        slide=folder / "slides" / f"{name}{suffix}",
        mask=folder / "masks" / f"{name}.tif",
        targets=folder / "targets" / f"{name}.geojson",
        tumour=folder / "tumours" / f"{name}.geojson",
    )


def make_slide(config: PhantomSlideConfig, index: int, folder: Path) -> PhantomSlide:
    """Write slide `index` of a cohort, unless its files are there; they depend on the config and the index alone.

    A file appears whole. `folder` holds one cohort: files of another config are taken for this one's.
    """
    files = slide_files(config, index, folder)
    if files.exist():
        return files
    scene = _scene(config, index)
    canvas = SlideCanvas(scene, _rng(config, index, 1))
    size = config.height_px, config.width_px
    tumour = [] if scene.anatomy.tumour is None else [scene.anatomy.tumour]
    with local_files.replacing(files.tumour) as path:
        path.write_bytes(to_geojson("Tumour", tumour))
    with local_files.replacing(files.targets) as path:
        path.write_bytes(to_geojson("STAS", canvas.outlines()))
    with local_files.replacing(files.mask) as path:
        write_pyramid(path, size, canvas.truth(), mpp=config.mpp, layout=MASK)
    stated = {Flaw.MISSING_MPP: None, Flaw.ABSURD_MPP: _ABSURD_MPP}.get(scene.flaw, config.mpp)
    with local_files.replacing(files.slide) as path:
        if scene.flaw is Flaw.MISSING_FILE:
            path.write_bytes(b"a phantom of a MIRAX slide's index")
            return files
        write_pyramid(path, size, canvas.strips(), mpp=stated, layout=Layout(jpeg_quality=config.jpeg_quality))
        if scene.flaw is Flaw.TRUNCATED:
            with path.open("rb+") as file:
                file.truncate(int(_KEPT_WHEN_TRUNCATED * path.stat().st_size))
    return files


def to_geojson(name: str, outlines: Sequence[Polygon]) -> bytes:
    """Write outlines, whole coordinates at pixel centres, as GeoJSON that QuPath imports: centres at a half."""
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [np.round([*ring, ring[0]], 1).tolist()]},
            "properties": {"objectType": "annotation", "name": f"{name} {number}", "classification": {"name": name}},
        }
        for number, ring in enumerate((np.asarray(outline) + 0.5 for outline in outlines), start=1)
    ]
    return json.dumps({"type": "FeatureCollection", "features": features}).encode()


def _scene(config: PhantomSlideConfig, index: int) -> Scene:
    rng, frame = _rng(config, index, 0), Frame(config.height_px, config.width_px, config.mpp)
    flaw = config.flaw(index)
    look = draw_look(rng)
    anatomy = plan.plan_anatomy(frame, rng) if flaw is not Flaw.BLANK else Anatomy((), None)
    spread = plan.plan_spread(frame, anatomy, rng, nests_per_mm2=config.nests_per_mm2, spread_um=config.spread_um)
    blur_px = frame.px(1.0) if flaw is Flaw.BLUR else 0.0
    scale = FIELD_MPP / config.mpp
    picture_px = int(np.clip(0.6 * min(frame.height, frame.width) / scale, 256, PICTURE_PX))
    painter = Painter(look, (config.seed, index), scale, blur_px, picture_px)
    bank = Bank((), (), np.zeros((1, 1, 3), np.uint8), ())
    if anatomy.islands:
        num = int(np.clip(frame.area_mm2 / 4, 1, _MOST_PICTURES))
        num_stamps = int(np.clip(2 * spread.num_expected, 4, _MOST_STAMPS)) if config.nests_per_mm2 else 0
        bank = painter.bank(num, -(-num // 3), num_stamps)
    return Scene(
        frame=frame,
        look=look,
        anatomy=anatomy,
        lobules=plan.plan_lobules(frame, max(1, len(bank.lung)), rng),
        nests=plan.plan_nests(spread, bank.stamps, rng),
        strokes=plan.plan_strokes(frame, rng),
        bank=bank,
        flaw=flaw,
    )


def _rng(config: PhantomSlideConfig, index: int, part: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence((config.seed, index), spawn_key=(9, part)))
