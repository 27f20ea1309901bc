"""A slide's resolution is known or refused; regions at a model's resolution do not depend on how they are cut."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stas_core.arrays import RgbImage
from stas_core.errors import InputError
from stas_core.slides.regions import RegionReader
from stas_core.slides.resolution import Mpp, MppSource, resolve_mpp
from stas_core.slides.slide import Level, SlideInfo
from stas_core.slides.source import open_slide
from stas_core.slides.tiling import Box
from tests.slides.made import noise, write_pyramid

PIXELS = noise(1100, 1500, seed=1)
LEVELS = (Level(1500, 1100, 1.0),)


def info(
    mpp_x: float | None = None, mpp_y: float | None = None, objective: float | None = None, name: str = "/data/7.svs"
) -> SlideInfo:
    return SlideInfo(name=name, vendor="v", levels=LEVELS, mpp_x=mpp_x, mpp_y=mpp_y, objective=objective)


def test_the_best_source_of_a_resolution_is_taken_and_said() -> None:
    assert resolve_mpp(info(0.25, 0.25, 20), 0.5) == Mpp(0.5, MppSource.OVERRIDE)
    assert resolve_mpp(info(0.25, 0.25, 20)) == Mpp(0.25, MppSource.METADATA)
    assert resolve_mpp(info(0.25, None, 20)) == Mpp(0.25, MppSource.METADATA)
    assert resolve_mpp(info(None, None, 40)) == Mpp(0.25, MppSource.OBJECTIVE)
    assert resolve_mpp(info(0.0, 0.0, 20)) == Mpp(0.5, MppSource.OBJECTIVE)


@pytest.mark.parametrize(
    ("slide", "override", "reason", "value"),
    [
        (info(), None, "missing_mpp", "override"),
        (info(352.78, 352.78, 20), None, "absurd_mpp", "352.78"),
        (info(0.5, 352.78), None, "absurd_mpp", "352.78"),
        (info(0.0001, 0.0001), None, "absurd_mpp", "0.0001"),
        (info(float("nan"), 0.5, 20), None, "", ""),
        (info(0.5, 0.6), None, "anisotropic_mpp", "0.6"),
        (info(None, None, 0.1), None, "absurd_mpp", "objective"),
        (info(0.5, 0.5), 50.0, "absurd_mpp", "50"),
        (info(0.5, 0.5), 0.0, "absurd_mpp", "0 um/px"),
        (info(0.5, 0.5), float("nan"), "absurd_mpp", "nan"),
    ],
)
def test_what_is_not_believed_is_refused(slide: SlideInfo, override: float | None, reason: str, value: str) -> None:
    if not reason:  # one side is no number: the other is taken
        assert resolve_mpp(slide, override).value == 0.5
        return
    with pytest.raises(InputError) as caught:
        resolve_mpp(slide, override)
    assert caught.value.reason == reason
    assert "/data/7.svs" in str(caught.value) and value in str(caught.value) and ";" in str(caught.value)


@given(st.floats(), st.floats(), st.none() | st.floats(), st.none() | st.floats())
def test_a_resolution_is_within_bounds_or_refused(
    mpp_x: float, mpp_y: float, objective: float | None, override: float | None
) -> None:
    try:
        assert 0.05 <= resolve_mpp(info(mpp_x, mpp_y, objective), override).value <= 5
    except InputError as error:
        assert error.reason in ("missing_mpp", "absurd_mpp", "anisotropic_mpp")


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pyramid(tmp_path_factory.mktemp("slides") / "a.tif", PIXELS, mpp=0.25)


@settings(max_examples=60)
@given(
    target=st.sampled_from([0.25, 0.2, 0.26, 0.3, 0.4999, 0.5, 0.55, 0.75, 1.0, 1.7, 2.0, 4.0]),
    data=st.data(),
)
def test_a_region_is_the_same_however_it_is_cut(pyramid: Path, target: float, data: st.DataObject) -> None:
    with open_slide(pyramid) as slide:
        reader = RegionReader(slide, resolve_mpp(slide.info), target)
        whole = reader.read(reader.box)
        x0, y0 = data.draw(st.integers(-40, reader.width + 10)), data.draw(st.integers(-40, reader.height + 10))
        box = Box(y0, x0, y0 + data.draw(st.integers(1, 300)), x0 + data.draw(st.integers(1, 300)))
        padded = np.full((reader.height + 400, reader.width + 400, 3), 255, np.uint8)
        padded[40 : 40 + reader.height, 40 : 40 + reader.width] = whole
        expected = padded[40 + box.y0 : 40 + box.y1, 40 + box.x0 : 40 + box.x1]
        assert np.array_equal(reader.read(box), expected)


@pytest.mark.parametrize(("target", "level", "step"), [(0.25, 0, 1), (0.5, 1, 1), (1.0, 2, 1), (2.0, 2, 2)])
def test_whole_ratios_are_averages_of_the_best_level(pyramid: Path, target: float, level: int, step: int) -> None:
    with open_slide(pyramid) as slide:
        reader = RegionReader(slide, resolve_mpp(slide.info), target)
        assert (reader.level, reader.ratio) == (level, step)
        size = slide.info.levels[level]
        pixels = slide.read(level, 0, 0, size.width, size.height)
        height, width = size.height // step, size.width // step
        mean = pixels[: height * step, : width * step].reshape(height, step, width, step, 3).mean((1, 3))
        found = reader.read(reader.box)
        assert np.abs(found[:height, :width] - mean[: reader.height, : reader.width]).max() <= 0.5


def test_a_level_is_never_coarser_than_the_model(pyramid: Path) -> None:
    with open_slide(pyramid) as slide:
        chosen = [RegionReader(slide, resolve_mpp(slide.info), target) for target in (0.2, 0.45, 0.75, 0.99, 5.0)]
    assert [(one.level, round(one.ratio, 3)) for one in chosen] == [(0, 0.8), (0, 1.8), (1, 1.5), (1, 1.98), (2, 5)]


@pytest.mark.parametrize("target", [0.2, 0.26, 0.3, 0.4999, 0.55, 0.75, 1.7])
def test_fractional_ratios_stay_in_place(tmp_path: Path, target: float) -> None:
    """A ramp read at any resolution has the value of its place: nothing shifts, drifts or jumps at squares."""
    ramp = np.zeros((300, 6000, 3), np.uint8)
    ramp[..., 0] = np.arange(6000) * 250 / 6000
    with open_slide(write_pyramid(tmp_path / "a.tif", ramp, mpp=0.25, num_levels=2)) as slide:
        reader = RegionReader(slide, resolve_mpp(slide.info), target)
        found = reader.read(reader.box)[reader.height // 2, :, 0].astype(float)
    centres = (np.arange(reader.width) + 0.5) * reader.level0_px * 250 / 6000
    assert np.abs(found + 0.5 - centres).max() <= 1.1


def test_a_slide_coarser_than_the_model_is_refused(pyramid: Path) -> None:
    with open_slide(pyramid) as slide, pytest.raises(InputError, match=r"0\.25 um/px.*at most 0\.1875") as caught:
        RegionReader(slide, resolve_mpp(slide.info), 0.15)
    assert caught.value.reason == "coarse_slide"


class Plain:
    """A slide of 100,000 x 80,000 px without smaller levels, all grey; it notes how much is read at once."""

    info = SlideInfo("a.tif", "v", (Level(100_000, 80_000, 1.0),))
    most_px = 0

    def read(self, level: int, x: int, y: int, width: int, height: int) -> RgbImage:
        self.most_px = max(self.most_px, width * height)
        return np.full((height, width, 3), 100, np.uint8)

    def close(self) -> None:
        pass


def test_a_slide_without_small_levels_is_shrunk_in_bounded_memory() -> None:
    slide = Plain()
    reader = RegionReader(slide, Mpp(0.25, MppSource.OVERRIDE), 8.0)
    assert (reader.width, reader.height, reader.ratio) == (3125, 2500, 32)
    assert (reader.read(Box(0, 0, 64, 1000)) == 100).all()
    assert slide.most_px <= 2048**2


def test_a_slide_smaller_than_a_pixel_of_the_frame_has_one(tmp_path: Path) -> None:
    with open_slide(write_pyramid(tmp_path / "a.tif", PIXELS[:5, :3], mpp=0.1, num_levels=1)) as slide:
        reader = RegionReader(slide, resolve_mpp(slide.info), 2.0)
        assert (reader.width, reader.height) == (1, 1)
        assert reader.read(reader.box).shape == (1, 1, 3)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("CMU-1-Small-Region.svs", ""),
        ("tcga-cr-7395-01a-01-ts1.svs", "missing_mpp"),
        ("more/os_py/boxes.tiff", "absurd_mpp"),
    ],
)
def test_real_slides_have_a_resolution_or_a_reason(shared: Path, name: str, reason: str) -> None:
    path = shared / "data/slides" / name
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    with open_slide(path) as slide:
        if reason:
            with pytest.raises(InputError) as caught:
                resolve_mpp(slide.info)
            assert caught.value.reason == reason
        mpp = resolve_mpp(slide.info, 0.5 if reason else None)
        reader = RegionReader(slide, mpp, 1.0)
        assert reader.read(Box(0, 0, 64, 64)).shape == (64, 64, 3)
