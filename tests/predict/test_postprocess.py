import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError
from scipy import ndimage

from stas_core import config
from stas_core.data import images
from stas_core.predict.postprocess import PostprocessConfig, StepConfig, cut_at, find_targets, postprocess, run_cascade
from tests.predict import postprocess_plain as plain

CONFIGS = Path(__file__).parents[2] / "configs" / "postprocess"
REFERENCE = config.load_config(PostprocessConfig, CONFIGS / "reference.yaml")


def disc(size: tuple[int, int], centre: tuple[int, int], radius: int, level: int) -> np.ndarray:
    y, x = np.ogrid[: size[0], : size[1]]
    return np.where((y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2, level, 0).astype(np.uint8)


@st.composite
def maps(draw: st.DrawFn) -> np.ndarray:
    """Maps with structure at every scale: noise, smooth blobs, flats, lines; one-pixel-wide ones included."""
    size = (draw(st.integers(1, 60)), draw(st.integers(1, 60)))
    kind = draw(st.sampled_from(["noise", "smooth", "flat", "levels"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if kind == "flat":
        return np.full(size, draw(st.sampled_from([0, 3, 26, 90, 255])), np.uint8)
    if kind == "levels":
        return draw(hnp.arrays(np.uint8, size, elements=st.sampled_from([0, 0, 0, 13, 26, 64, 81, 90, 255])))
    noise = rng.random(size)
    if kind == "smooth":
        noise = ndimage.gaussian_filter(noise, draw(st.floats(0.5, 5)), mode="wrap")
        noise = (noise - noise.min()) / max(np.ptp(noise), 1e-9)
    return (255 * noise ** draw(st.sampled_from([1, 2, 4, 8]))).astype(np.uint8)


@st.composite
def configs(draw: st.DrawFn) -> PostprocessConfig:
    levels = st.integers(0, 255)
    steps = st.lists(
        st.builds(StepConfig, drop=levels, high=levels, core=levels, ratio=st.floats(0, 1), low=levels),
        min_size=1,
        max_size=3,
    )
    return PostprocessConfig(
        steps=tuple(draw(st.one_of(st.just(list(REFERENCE.steps)), steps))),
        closing_px=draw(st.sampled_from([1, 3, 5, 9])),
        closing_count=draw(st.integers(0, 2)),
        border_fill=draw(st.sampled_from(["each", "first", "none"])),
        max_hole_px=draw(st.sampled_from([None, None, 0, 4, 40])),
        min_target_px=draw(st.sampled_from([0, 1, 5, 40])),
        min_foreground_px=draw(st.sampled_from([1, 60, 1000])),
        max_foreground_share=draw(st.sampled_from([None, 0.3, 0.5, 1.0])),
        max_foreground_px=draw(st.sampled_from([None, 0, 500])),
    )


@settings(max_examples=500, deadline=None)
@given(maps(), configs())
def test_the_fast_cascade_equals_the_readable_one(prob_u8: np.ndarray, settings_: PostprocessConfig) -> None:
    before = prob_u8.copy()
    fast = run_cascade(prob_u8, settings_)
    mask, step = plain.postprocess(prob_u8, settings_)
    assert (fast.mask == mask).all()
    assert fast.step == step
    assert (prob_u8 == before).all()


@settings(deadline=None)
@given(maps(), st.sampled_from(["each", "none"]))
def test_flipping_the_map_flips_the_mask(prob_u8: np.ndarray, border_fill: str) -> None:
    settings_ = config.build(PostprocessConfig, {"border_fill": border_fill, "min_target_px": 5})
    assert (postprocess(prob_u8[::-1, ::-1].copy(), settings_) == postprocess(prob_u8, settings_)[::-1, ::-1]).all()


def test_each_touched_side_is_helped_but_opposite_sides_never_close_the_image() -> None:
    prob = np.zeros((300, 400), np.uint8)
    ring = disc((300, 400), (150, 0), 80, 255) - disc((300, 400), (150, 0), 60, 255)
    for half_ring in (ring, ring[:, ::-1]):
        prob |= half_ring
    prob[:, 200:212] = 255  # a wall from top to bottom: two halves, open at three sides each
    each, first, none = (postprocess(prob, PostprocessConfig(border_fill=fill)) for fill in ("each", "first", "none"))
    left, right = (150, 5), (150, 394)
    assert each[left] and each[right] and not each[20, 100] and not each[20, 300]
    assert first[left] and not first[right]
    assert not none[left] and not none[right]


def test_a_selection_over_half_the_image_is_emptied_in_the_published_code_only_at_its_size() -> None:
    prob = np.full((100, 100), 255, np.uint8)
    assert run_cascade(prob, PostprocessConfig()).step == 0
    assert not postprocess(prob, PostprocessConfig()).any()
    assert postprocess(prob, REFERENCE).all()


def test_small_targets_go_and_what_is_left_decides_the_stage() -> None:
    prob = disc((200, 200), (50, 50), 6, 255) | disc((200, 200), (120, 120), 30, 60)  # 113 px sure, 2,800 px unsure
    cascade = run_cascade(prob, PostprocessConfig())
    assert cascade.step == 3
    assert not cascade.mask[50, 50] and cascade.mask[120, 120]


def test_shipped_configs_are_the_published_code_and_the_default() -> None:
    assert config.load_config(PostprocessConfig, CONFIGS / "default.yaml") == PostprocessConfig()
    assert config.load_config(PostprocessConfig, CONFIGS / "plain.yaml") == cut_at(128)
    assert REFERENCE.max_foreground_px == 942 * 1716 // 2
    assert REFERENCE.steps == PostprocessConfig().steps


@pytest.mark.parametrize(
    ("values", "message"),
    [({"closing_px": 4}, "use 3 or 5"), ({"steps": []}, "at least 1"), ({"min_target": 3}, "min_target")],
)
def test_bad_settings_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PostprocessConfig(**values)


@pytest.mark.real_data
def test_reference_equals_the_published_code_on_every_pixel(shared: Path) -> None:
    folder = shared / "oracle" / "postprocess"
    rows = list(csv.DictReader((folder / "manifest.csv").open()))
    assert len(rows) >= 32
    for row in rows:
        prob = images.decode_map((folder / "in" / row["file"]).read_bytes(), row["file"])
        expected = images.decode_mask((folder / "out" / row["file"]).read_bytes(), row["file"])
        cascade = run_cascade(prob, REFERENCE)
        assert (cascade.mask == expected).all(), row
        assert cascade.step == int(row["stage"]), row


def test_targets_carry_their_numbers() -> None:
    mask = disc((100, 120), (50, 60), 20, 1).astype(bool) & ~disc((100, 120), (50, 60), 5, 1).astype(bool)
    mask[0, 0] = mask[1, 1] = True  # two pixels that touch at a corner: one target, at the border
    prob = np.where(mask, 200, 10).astype(np.uint8)
    prob[30, 60] = 255
    labels, targets = find_targets(mask, prob)
    assert (labels > 0).tolist() == mask.tolist()
    assert labels[0, 0] == labels[1, 1] == 1 and labels[30, 60] == 2
    assert targets.area_px.tolist() == [2, mask.sum() - 2]
    assert targets.bbox.tolist() == [[0, 0, 2, 2], [40, 30, 81, 71]]
    assert targets.touches_border.tolist() == [True, False]
    assert (targets.centroid_x[0], targets.centroid_y[0]) == (0.5, 0.5)
    assert targets.peak_prob[1] == 1.0
    num_px = int(targets.area_px[1])
    assert targets.mean_prob[1] == pytest.approx((200 * (num_px - 1) + 255) / 255 / num_px)


@settings(deadline=None)
@given(
    hnp.arrays(bool, st.tuples(st.integers(1, 30), st.integers(1, 30))),
    st.integers(0, 2**32 - 1),
)
def test_targets_are_measured_as_their_pixels(mask: np.ndarray, seed: int) -> None:
    prob = np.random.default_rng(seed).integers(0, 256, mask.shape).astype(np.uint8)
    labels, targets = find_targets(mask, prob)
    expected, num_targets = ndimage.label(mask, np.ones((3, 3)))  # numbered by their first pixels
    assert (labels == expected).all() and len(targets) == num_targets
    for row in range(num_targets):
        values, (ys, xs) = prob[labels == row + 1], np.nonzero(labels == row + 1)
        assert targets.area_px[row] == len(values)
        assert (targets.centroid_x[row], targets.centroid_y[row]) == (xs.mean(), ys.mean())
        assert targets.bbox[row].tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert targets.mean_prob[row] == values.mean() / 255
        assert targets.peak_prob[row] == values.max() / 255
        touched = [not xs.min(), xs.max() + 1 == mask.shape[1], not ys.min(), ys.max() + 1 == mask.shape[0]]
        assert targets.sides[row].tolist() == touched
