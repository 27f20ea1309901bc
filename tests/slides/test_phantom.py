"""Phantom slides: the same bytes twice, exact truth, nests near the tumour, and every flaw as its reason code."""

import json
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import tifffile
from pydantic import ValidationError
from scipy import ndimage

from stas_core import config as settings
from stas_core.errors import AbsurdMpp, IncompleteSlide, InputError, MissingMpp, NoTissue
from stas_core.slides import phantom, phantom_plan
from stas_core.slides.outlines import mask_of_outlines
from stas_core.slides.phantom import PhantomSlide, PhantomSlideConfig, make_slide
from stas_core.slides.phantom_bank import NUM_TURNS, Stamp, turned
from stas_core.slides.phantom_canvas import BLOCK_PX, Flaw, SlideCanvas
from stas_core.slides.phantom_plan import Frame
from stas_core.slides.resolution import resolve_mpp
from stas_core.slides.source import open_slide
from stas_core.slides.tissue import Tissue, TissueConfig, find_tissue

SMALL = PhantomSlideConfig(width_px=2300, height_px=2000, seed=3, jpeg_quality=None, nests_per_mm2=20)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> PhantomSlide:
    return make_slide(SMALL, 0, tmp_path_factory.mktemp("phantom"))


def level0(path: Path) -> np.ndarray:
    with tifffile.TiffFile(path) as file:
        return np.asarray(file.pages[0].asarray())


def flawed(folder: Path, flaw: Flaw) -> PhantomSlide:
    small = {"width_px": 1536, "height_px": 1024, "flaws": (flaw,), "jpeg_quality": 85}
    return make_slide(PhantomSlideConfig.model_validate(small), 0, folder)


def tissue_of(path: Path) -> Tissue:
    with open_slide(path) as slide:
        return find_tissue(slide, resolve_mpp(slide.info), TissueConfig())


def test_the_truth_is_the_drawn_outlines(made: PhantomSlide) -> None:
    mask = level0(made.mask)
    with open_slide(made.slide) as slide:
        drawn = mask_of_outlines(made.targets.read_bytes(), "targets", slide.info, mask.shape)
        assert np.array_equal(drawn, mask == 255)
        assert mask.shape == (slide.info.height, slide.info.width) == (2000, 2300)
    assert np.unique(mask).tolist() == [0, 255]
    features = json.loads(made.targets.read_bytes())["features"]
    assert ndimage.label(mask, np.ones((3, 3)))[1] == len(features) >= 2


def test_readers_agree_on_size_and_resolution(made: PhantomSlide) -> None:
    for path in (made.slide, made.mask):
        with openslide.OpenSlide(str(path)) as slide:
            assert slide.level_dimensions == ((2300, 2000), (1150, 1000), (575, 500), (288, 250))
            assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5)


def test_targets_are_dark_cells_in_air_off_the_tumour(made: PhantomSlide) -> None:
    mask, grey = level0(made.mask) > 0, cv2.cvtColor(level0(made.slide), cv2.COLOR_RGB2GRAY)
    near, far = (cv2.dilate(mask.view(np.uint8), np.ones((n, n), np.uint8)) > 0 for n in (5, 15))
    assert grey[mask].mean() < 150 and np.median(grey[far & ~near]) > 190
    with open_slide(made.slide) as slide:
        tumour = mask_of_outlines(made.tumour.read_bytes(), "tumour", slide.info, mask.shape)
    assert not (tumour & mask).any()
    assert grey[cv2.erode(tumour.view(np.uint8), np.ones((41, 41), np.uint8)) > 0].mean() < 170


def test_a_slide_depends_on_config_and_index_alone(made: PhantomSlide, tmp_path: Path) -> None:
    again = make_slide(SMALL.model_copy(update={"num_slides": 99}), 0, tmp_path)
    other = make_slide(SMALL.model_copy(update={"width_px": 600, "height_px": 600}), 1, tmp_path)
    for name in ("slide", "mask", "targets", "tumour"):
        assert getattr(made, name).read_bytes() == getattr(again, name).read_bytes()
        assert getattr(made, name).read_bytes() != getattr(other, name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "slides").iterdir()) == [made.slide.name, other.slide.name]


def test_what_is_there_is_not_made_again(made: PhantomSlide) -> None:
    before = made.slide.stat().st_mtime_ns
    folder = made.slide.parents[1]
    assert make_slide(SMALL, 0, folder) == made == phantom.slide_files(SMALL, 0, folder)
    assert made.slide.stat().st_mtime_ns == before


def test_blocks_do_not_depend_on_each_other(made: PhantomSlide) -> None:
    """Any block painted alone is that of the file: nests and lobules are whole across blocks."""
    canvas = SlideCanvas(phantom._scene(SMALL, 0), phantom._rng(SMALL, 0, 1))
    pixels = level0(made.slide)
    for y0, x0 in ((1536, 2048), (512, 1024), (0, 0)):
        expected = pixels[y0 : y0 + BLOCK_PX, x0 : x0 + BLOCK_PX]
        assert np.array_equal(canvas.block(y0, x0)[: expected.shape[0], : expected.shape[1]], expected)


def test_no_seam_shows_where_blocks_meet(made: PhantomSlide) -> None:
    """Neighbouring rows differ across the border of blocks as they do elsewhere."""
    grey = cv2.GaussianBlur(cv2.cvtColor(level0(made.slide), cv2.COLOR_RGB2GRAY), (0, 0), 1.5).astype(float)
    for steps in (np.abs(np.diff(grey, axis=0)).mean(axis=1), np.abs(np.diff(grey, axis=1)).mean(axis=0)):
        for at in range(BLOCK_PX - 1, len(steps), BLOCK_PX):
            around = steps[max(0, at - 40) : at + 40]
            assert steps[at] < around.mean() + 4 * around.std() + 0.1


def test_nests_are_ever_fewer_away_from_the_tumour() -> None:
    frame = Frame(height=40_000, width=60_000, mpp=0.5)
    rng = np.random.default_rng(0)
    anatomy = phantom_plan.plan_anatomy(frame, rng)
    spread = phantom_plan.plan_spread(frame, anatomy, rng, nests_per_mm2=10, spread_um=800)
    stamp = Stamp(
        np.zeros((90, 90, 3), np.uint8), np.full((90, 90), 255, np.uint8), np.array([[20.0, 45], [70, 30], [70, 60]])
    )
    nests = phantom_plan.plan_nests(spread, [stamp], rng)
    middles = np.array([(one.x0 + 45, one.y0 + 45) for one in nests])
    apart = np.hypot(*(middles[:, None] - middles[None]).transpose(2, 0, 1)) + 1e9 * np.eye(len(nests))
    assert apart.min() > 44 + 25  # a patch reaches 63 px, its target 30
    assert anatomy.tumour is not None
    tumour = np.asarray(anatomy.tumour, np.float32)
    far_um = np.array([-cv2.pointPolygonTest(tumour, tuple(map(float, at)), True) for at in middles]) * frame.mpp
    assert far_um.min() > 0
    # Of an exponential, two thirds lie within its mean in a half plane; round a tumour there is more room further off.
    counts = np.histogram(far_um, [0, 800, 1600, 2400, 3200])[0]
    assert (np.diff(counts) < 0).all() and len(nests) > 100


@pytest.mark.parametrize("turn", range(NUM_TURNS))
def test_a_turned_stamp_has_its_target_where_its_picture_is(turn: int) -> None:
    outline = np.array([[10.0, 5.0], [40.3, 8.0], [35.0, 30.2], [12.0, 22.0]])
    cover = np.full((50, 60), 255, np.uint8)
    stamp = Stamp(np.zeros((50, 60, 3), np.uint8), cover, outline)
    expected = turned(stamp.target, turn)
    assert np.count_nonzero(stamp.turned(turn).target != expected) < 30  # OpenCV's borders, of 600 px
    assert stamp.turned(turn).cover.shape == expected.shape


def test_cells_keep_their_size_in_um(tmp_path: Path) -> None:
    fine = PhantomSlideConfig(width_px=1000, height_px=1000, mpp=0.25, seed=3)
    coarse = fine.model_copy(update={"width_px": 500, "height_px": 500, "mpp": 0.5})
    with open_slide(make_slide(fine, 0, tmp_path).slide) as slide:
        assert resolve_mpp(slide.info).value == pytest.approx(0.25)
    pictures = [phantom._scene(config, 0).bank.lung[0] for config in (fine, coarse)]
    assert np.array_equal(pictures[0], cv2.resize(pictures[1], (600, 600), interpolation=cv2.INTER_LINEAR))


def test_tissue_is_found_and_stands_on_glass(made: PhantomSlide) -> None:
    share = tissue_of(made.slide).share
    assert 0.2 < share < 0.8


@pytest.mark.parametrize(
    ("flaw", "error"), [(Flaw.BLANK, NoTissue), (Flaw.MISSING_MPP, MissingMpp), (Flaw.ABSURD_MPP, AbsurdMpp)]
)
def test_flaws_that_are_refused(tmp_path: Path, flaw: Flaw, error: type[InputError]) -> None:
    with pytest.raises(error):
        tissue_of(flawed(tmp_path, flaw).slide)


def test_a_truncated_slide_does_not_open(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"truncated|cut short"):
        open_slide(flawed(tmp_path, Flaw.TRUNCATED).slide)
    with pytest.raises(IncompleteSlide):
        open_slide(flawed(tmp_path, Flaw.MISSING_FILE).slide)


def test_flaws_of_scanning_show(tmp_path: Path) -> None:
    sound, drift, pen, fill, blur = (
        level0(flawed(tmp_path / flaw, flaw).slide).astype(int)
        for flaw in (Flaw.NONE, Flaw.DRIFT, Flaw.PEN, Flaw.FILL, Flaw.BLUR)
    )
    assert (fill[-10:, -10:].max(), fill[:500].min()) < (6, 1000) and sound[-10:, -10:].min() > 150
    assert np.abs(drift - sound).mean() > 2
    assert 0.005 < (np.abs(pen - sound).max(axis=2) > 60).mean() < 0.6
    sharpness = [cv2.Laplacian(image[..., 1].astype(np.float32), cv2.CV_32F).std() for image in (sound, blur)]
    assert sharpness[1] < 0.7 * sharpness[0]


def test_slides_have_flaws_in_turn() -> None:
    config = settings.build(PhantomSlideConfig, {"flaws": ["none", "blank"], "width_px": 600, "height_px": 600})
    assert [config.flaw(index) for index in range(3)] == [Flaw.NONE, Flaw.BLANK, Flaw.NONE]


@pytest.mark.parametrize("wrong", [{"width_px": 100}, {"mpp": 0.1}, {"flaws": ["torn"]}, {"jpeg_quality": 0}])
def test_values_out_of_range_are_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        PhantomSlideConfig.model_validate(wrong)


def test_memory_does_not_grow_with_the_height(tmp_path: Path) -> None:
    peaks = []
    for height in (1024, 16_384):
        config = PhantomSlideConfig(width_px=512, height_px=height, flaws=(Flaw.BLANK,))
        tracemalloc.start()
        make_slide(config, 0, tmp_path / str(height))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2**22  # level 0 has 24 MiB
