"""Settings in um and um2 mean the same tissue at any resolution."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stas_core import config
from stas_core.errors import ConfigError
from stas_core.predict.postprocess import PUBLISHED_STEPS, PostprocessConfig
from stas_core.slides.thresholds import SlidePostprocessConfig


def test_at_half_a_micrometre_the_default_has_the_pixels_of_fields() -> None:
    cascade, fields = SlidePostprocessConfig().in_pixels(0.5), PostprocessConfig()
    assert (cascade.closing_px, cascade.min_target_px) == (fields.closing_px, fields.min_target_px)
    assert cascade.steps == PUBLISHED_STEPS[:1]
    assert (cascade.border_fill, cascade.max_foreground_share, cascade.max_hole_px) == ("none", None, 20000)


@given(st.integers(1, 2000), st.floats(0.05, 5))
def test_areas_of_whole_pixels_keep_their_meaning(area_px: int, mpp: float) -> None:
    area_um2 = area_px * mpp**2
    cascade = SlidePostprocessConfig(max_hole_um2=area_um2, min_target_um2=area_um2, closing_um=0).in_pixels(mpp)
    assert cascade.max_hole_px == area_px  # a hole of exactly this size is filled,
    assert cascade.min_target_px == area_px  # and a target of it kept


@given(st.integers(1, 40), st.floats(0.05, 1))
def test_the_closing_is_the_nearest_odd_number_of_pixels(half: int, mpp: float) -> None:
    for off in (-0.9, 0, 0.9):
        closing_um = (2 * half + 1 + off) * mpp
        assert SlidePostprocessConfig(closing_um=closing_um, max_hole_um2=0).in_pixels(mpp).closing_px == 2 * half + 1


def test_no_closing_is_no_closing_and_less_than_a_pixel_is_refused() -> None:
    assert SlidePostprocessConfig(closing_um=0).in_pixels(0.5).closing_px == 1
    with pytest.raises(ConfigError, match=r"closing_um = 0.3: less than 2 px of 0.5 um.*use 0.*at least 1"):
        SlidePostprocessConfig(closing_um=0.3).in_pixels(0.5)


@pytest.mark.parametrize("mpp", [0.0, -0.5, float("nan"), float("inf")])
def test_no_resolution_is_refused(mpp: float) -> None:
    with pytest.raises(ConfigError, match=f"mpp = {mpp}.*um per pixel"):
        SlidePostprocessConfig().in_pixels(mpp)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_hole_um2": None}, "max_hole_um2 = None"),
        ({"closing_um": -1}, "closing_um = -1"),
        ({"max_hole_px": 3}, "did you mean max_hole_um2"),
        ({"steps": []}, "unknown key steps"),
    ],
)
def test_wrong_settings_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.build(SlidePostprocessConfig, values)
