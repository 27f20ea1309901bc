from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any, get_args

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import AutoAugment, AutoAugmentPolicy
from torchvision.transforms import functional as vision

from stas_core.arrays import Mask, RgbImage
from stas_core.config import build
from stas_core.data import images
from stas_core.errors import ConfigError, SizeMismatch
from stas_core.train import augment as aug
from stas_core.train.augment import Op
from stas_core.train.recipe import AugmentConfig

STILL = AugmentConfig(flip_lr_p=0, flip_ud_p=0, brightness_p=0, noise_p=0)
"""Nothing but the policy is drawn."""

GEOMETRIC: tuple[aug.OpName, ...] = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


def random_image(height: int = 61, width: int = 83, seed: int = 0) -> RgbImage:
    rng = np.random.default_rng(seed)
    smooth = cv2.resize(rng.integers(30, 220, (7, 9, 3), dtype=np.uint8), (width, height))
    return np.asarray(cv2.add(smooth, rng.integers(0, 40, (height, width, 3), dtype=np.uint8)))


def random_mask(height: int = 61, width: int = 83, seed: int = 0) -> Mask:
    noise = np.random.default_rng(seed).random((height, width))
    return np.asarray(cv2.GaussianBlur(noise, (0, 0), 2) > 0.52)


def coordinates(height: int, width: int) -> RgbImage:
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x, y // 256 * 16 + x // 256], -1).astype(np.uint8)


def photometric(name: aug.OpName, image: RgbImage, magnitude: float) -> RgbImage:
    return aug.apply_op(image, np.zeros(image.shape[:2], bool), name=name, magnitude=magnitude)[0]


# --- the tables ---------------------------------------------------------------------------------------------------


def snake(name: str) -> str:
    return {"ShearY": "shear_y", "TranslateX": "translate_x", "TranslateY": "translate_y"}.get(name, name.lower())


def test_code_policy_is_torchvisions_cifar10_policy() -> None:
    theirs = AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    ours = aug.POLICIES["autoaugment_code"]
    assert len(ours) == 25
    for sub_policy, expected in zip(ours, theirs, strict=True):
        for op, (name, probability, level) in zip(sub_policy, expected, strict=True):
            assert (op.name, op.probability) == (snake(name), probability)
            assert level is None or op.level == level


def test_paper_policy_has_shear_x_and_no_sharpness() -> None:
    names = {op.name for sub_policy in aug.POLICIES["autoaugment_paper"] for op in sub_policy}
    everything = set(get_args(aug.OpName))
    assert names == everything - {"sharpness", "shear_y"}
    assert {op.name for sub in aug.POLICIES["autoaugment_code"] for op in sub} == everything - {"shear_x"}
    assert aug.POLICIES["autoaugment_paper"][3] == (Op("shear_x", 0.5, 8), Op("translate_y", 0.7, 9))
    assert aug.POLICIES["autoaugment_paper"][2] == ()


def test_magnitudes_are_torchvisions() -> None:
    height, width = 942, 1716
    space = AutoAugment()._augmentation_space(10, (height, width))
    for theirs, (levels, _) in space.items():
        if levels.ndim == 0:
            continue
        name: aug.OpName = "shear_x" if theirs == "ShearX" else snake(theirs)  # type: ignore[assignment]
        for level in range(10):
            expected = float(levels[level])
            # torchvision makes translations whole when it applies them, and solarises from 255, not 256.
            tolerance = 1.0 if name in ("translate_x", "translate_y", "solarize") else 1e-5
            assert aug.op_magnitude(Op(name, 1, level), height=height, width=width) == pytest.approx(
                expected, abs=tolerance
            ), (name, level)


def test_vertical_shift_is_a_share_of_the_height_unless_asked() -> None:
    op = Op("translate_y", 1.0, 9)
    assert aug.op_magnitude(op, height=942, width=1716) == 426
    assert aug.op_magnitude(op, height=942, width=1716, translate_y_by="width") == 777


# --- operations ---------------------------------------------------------------------------------------------------

Enhance = Callable[[Image.Image], "ImageEnhance._Enhance"]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("change", [-0.9, -0.3, 0.3, 0.9])
@pytest.mark.parametrize(
    ("name", "enhance", "tolerance"),
    [
        ("brightness", ImageEnhance.Brightness, 0),
        ("contrast", ImageEnhance.Contrast, 1),
        ("color", ImageEnhance.Color, 2),
        ("sharpness", ImageEnhance.Sharpness, 2),
    ],
)
def test_enhancements_equal_pillows(
    name: aug.OpName, enhance: Enhance, tolerance: int, change: float, seed: int
) -> None:
    image = random_image(seed=seed)
    expected = np.asarray(enhance(Image.fromarray(image)).enhance(1 + change)).astype(int)
    difference = np.abs(photometric(name, image, change) - expected)
    # Pillow leaves the outermost pixels unsharpened.
    assert difference[1:-1, 1:-1].max() <= tolerance
    assert np.abs(image - expected).mean() > 2 * max(tolerance, 1) or name == "sharpness"


@pytest.mark.parametrize("seed", [0, 1])
def test_pointwise_operations_equal_pillows(seed: int) -> None:
    image = random_image(seed=seed)
    picture = Image.fromarray(image)
    np.testing.assert_array_equal(photometric("invert", image, 0.0), ImageOps.invert(picture))
    for threshold in (0.0, 113.7, 199.1, 256.0):
        expected = ImageOps.solarize(picture, threshold)  # type: ignore[arg-type]
        np.testing.assert_array_equal(photometric("solarize", image, threshold), expected)
    for bits in (4.0, 5.0, 8.0):
        np.testing.assert_array_equal(photometric("posterize", image, bits), ImageOps.posterize(picture, int(bits)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_histogram_operations_equal_torchvisions_on_tensors(seed: int) -> None:
    image = random_image(seed=seed)
    image[:3], image[3:5] = 255, 12
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    equalized = vision.equalize(tensor).permute(1, 2, 0).numpy().astype(int)
    stretched = vision.autocontrast(tensor).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(photometric("equalize", image, 0.0) - equalized).max() == 0
    assert np.abs(photometric("autocontrast", image, 0.0) - stretched).max() <= 1


@pytest.mark.parametrize("name", sorted({*get_args(aug.OpName)} - {"invert", "autocontrast", "equalize"}))
def test_zero_magnitude_changes_nothing(name: aug.OpName) -> None:
    image, mask = random_image(), random_mask()
    magnitude = aug.op_magnitude(Op(name, 1, 0), height=61, width=83)
    new_image, new_mask = aug.apply_op(image, mask, name=name, magnitude=magnitude)
    np.testing.assert_array_equal(new_image, image)
    np.testing.assert_array_equal(new_mask, mask)


@pytest.mark.parametrize("name", GEOMETRIC)
@pytest.mark.parametrize("sign", [-1, 1])
def test_image_and_mask_move_together(name: aug.OpName, sign: int) -> None:
    height, width = 120, 200
    mask = np.zeros((height, width), bool)
    mask[50:71, 90:111] = True
    image = np.where(mask[..., None], np.uint8(255), np.uint8(0)).repeat(3, 2)
    magnitude = sign * aug.op_magnitude(Op(name, 1, 4), height=height, width=width)
    new_image, new_mask = aug.apply_op(image, mask, name=name, magnitude=magnitude)
    bright = new_image[..., 0] > 191  # above the 128 of the ground that came in
    assert (new_mask != mask).any()
    union, both = (bright | new_mask).sum(), (bright & new_mask).sum()
    assert both / union > 0.9
    assert (new_image == aug.FILL).all(-1).any()


def test_translation_is_exact() -> None:
    image, mask = random_image(), random_mask()
    new_image, new_mask = aug.apply_op(image, mask, name="translate_x", magnitude=7.0)
    np.testing.assert_array_equal(new_image[:, 7:], image[:, :-7])
    np.testing.assert_array_equal(new_mask[:, 7:], mask[:, :-7])
    assert (new_image[:, :7] == aug.FILL).all()
    assert not new_mask[:, :7].any()
    new_image, _ = aug.apply_op(image, mask, name="translate_y", magnitude=-5.0)
    np.testing.assert_array_equal(new_image[:-5], image[5:])


@pytest.mark.parametrize(
    ("name", "magnitude", "coefficients"),
    [("shear_x", 0.2137, (1, -0.2137, 0, 0, 1, 0)), ("shear_y", -0.2619, (1, 0, 0, 0.2619, 1, 0))],
)
def test_shear_equals_pillows(name: aug.OpName, magnitude: float, coefficients: tuple[float, ...]) -> None:
    mask = random_mask(120, 200)
    _, moved = aug.apply_op(random_image(120, 200), mask, name=name, magnitude=magnitude)
    picture = Image.fromarray(mask.astype(np.uint8))
    expected = np.asarray(picture.transform((200, 120), Image.Transform.AFFINE, coefficients)) > 0
    assert (moved != expected).mean() < 0.002  # OpenCV and Pillow round near-ties apart


@pytest.mark.parametrize("degrees", [-30.0, 6.7, 30.0])
def test_rotation_equals_pillows(degrees: float) -> None:
    mask = random_mask(120, 200)
    _, moved = aug.apply_op(random_image(120, 200), mask, name="rotate", magnitude=degrees)
    expected = np.asarray(Image.fromarray(mask.astype(np.uint8)).rotate(-degrees)) > 0
    assert (moved != expected).mean() < 0.002


# --- drawing ------------------------------------------------------------------------------------------------------


def test_a_sub_policy_draws_its_steps_with_their_chance() -> None:
    rng = np.random.default_rng(0)
    image, mask = random_image(8, 8), random_mask(8, 8)
    inverted = 255 - image
    drawn = [aug.apply_sub_policy(image, mask, (Op("invert", 0.3, 0),), rng=rng)[0] for _ in range(1000)]
    share = np.mean([np.array_equal(new, inverted) for new in drawn])
    assert share == pytest.approx(0.3, abs=0.06)  # four standard errors
    assert all(np.array_equal(new, inverted) or np.array_equal(new, image) for new in drawn)


def test_signs_are_drawn() -> None:
    rng = np.random.default_rng(0)
    image, mask = random_image(40, 40), random_mask(40, 40)
    step = Op("translate_x", 1.0, 3)
    left = right = 0
    for _ in range(200):
        moved, _ = aug.apply_sub_policy(image, mask, (step,), rng=rng)
        right += np.array_equal(moved[:, 6:], image[:, :-6])
        left += np.array_equal(moved[:, :-6], image[:, 6:])
    assert left + right == 200
    assert 70 < left < 130


def test_policy_is_drawn_with_policy_p() -> None:
    rng = np.random.default_rng(0)
    image, mask = random_image(24, 24), random_mask(24, 24)

    def changed(policy_p: float, config: AugmentConfig) -> float:
        runs = [aug.augment(image, mask, rng=rng, config=config, policy_p=policy_p)[0] for _ in range(600)]
        return float(np.mean([not np.array_equal(run, image) for run in runs]))

    always = changed(1.0, STILL)
    assert always > 0.7
    assert changed(0.4, STILL) == pytest.approx(0.4 * always, abs=0.08)
    assert changed(0.0, STILL) == 0
    assert changed(1.0, STILL.model_copy(update={"policy": "none"})) == 0


def test_flips_are_drawn_with_their_chance() -> None:
    rng = np.random.default_rng(0)
    image, mask = random_image(6, 8), random_mask(6, 8, seed=3)
    assert mask.any() and not mask.all()
    config = STILL.model_copy(update={"flip_lr_p": 0.5, "flip_ud_p": 0.25})
    flips: dict[tuple[bool, bool], Any] = {
        (False, False): np.s_[:, :],
        (True, False): np.s_[:, ::-1],
        (False, True): np.s_[::-1],
        (True, True): np.s_[::-1, ::-1],
    }
    seen: Counter[tuple[bool, bool]] = Counter()
    for _ in range(1000):
        new_image, new_mask = aug.augment(image, mask, rng=rng, config=config, policy_p=0.0)
        (key,) = (key for key, view in flips.items() if np.array_equal(new_image, image[view]))
        np.testing.assert_array_equal(new_mask, mask[flips[key]])
        seen[key] += 1
    assert seen[True, False] + seen[True, True] == pytest.approx(500, abs=64)
    assert seen[False, True] + seen[True, True] == pytest.approx(250, abs=56)


@pytest.mark.parametrize("shape", [(10, 10), (10, 14)])
def test_quarter_turns_keep_the_shape(shape: tuple[int, int]) -> None:
    image, mask = random_image(*shape), random_mask(*shape)
    config = STILL.model_copy(update={"rot90_p": 1.0})
    seen = set()
    for seed in range(40):
        new_image, new_mask = aug.augment(image, mask, rng=np.random.default_rng(seed), config=config, policy_p=0.0)
        assert new_image.shape == image.shape
        turns = [k for k in (1, 2, 3) if np.array_equal(new_image, np.rot90(image, k))]
        assert len(turns) == 1
        np.testing.assert_array_equal(new_mask, np.rot90(mask, turns[0]))
        seen.add(turns[0])
    assert seen == ({1, 2, 3} if shape[0] == shape[1] else {2})


def test_noise_has_its_sigma() -> None:
    image, mask = np.full((200, 200, 3), 100, np.uint8), np.zeros((200, 200), bool)
    config = STILL.model_copy(update={"noise_p": 1.0, "noise_sigma": 0.01})
    noisy, _ = aug.augment(image, mask, rng=np.random.default_rng(0), config=config, policy_p=0.0)
    assert noisy.mean() == pytest.approx(100, abs=0.05)
    assert noisy.std() == pytest.approx(np.hypot(2.55, np.sqrt(1 / 12)), rel=0.02)  # rounding adds its own variance
    assert np.corrcoef(noisy[..., 0].ravel(), noisy[..., 1].ravel())[0, 1] == pytest.approx(0, abs=0.03)


def test_brightness_stays_within_its_limit() -> None:
    image, mask = np.full((4, 4, 3), 200, np.uint8), np.zeros((4, 4), bool)
    config = STILL.model_copy(update={"brightness_p": 1.0})
    rng = np.random.default_rng(0)
    levels = [aug.augment(image, mask, rng=rng, config=config, policy_p=0.0)[0][0, 0, 0] for _ in range(300)]
    assert 179 <= min(levels) < 183
    assert 217 < max(levels) <= 220


@pytest.mark.parametrize("policy", ["autoaugment_code", "autoaugment_paper"])
def test_equal_generators_give_equal_samples_and_inputs_stay(policy: str) -> None:
    config = AugmentConfig.model_validate({"policy": policy, "rot90_p": 0.5, "noise_p": 0.5, "brightness_p": 0.5})
    image, mask = random_image(), random_mask()
    before = image.copy(), mask.copy()
    image.setflags(write=False)
    mask.setflags(write=False)
    distinct = set()
    for index in range(150):
        first, second = (
            aug.augment(image, mask, rng=np.random.default_rng([7, 3, index]), config=config, policy_p=0.9)
            for _ in range(2)
        )
        np.testing.assert_array_equal(first[0], second[0])
        np.testing.assert_array_equal(first[1], second[1])
        assert first[0].shape == image.shape and first[1].shape == mask.shape
        distinct.add(first[0].tobytes())
    assert len(distinct) > 100
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(mask, before[1])


def test_stain_variants_come_with_their_frequencies() -> None:
    rng = np.random.default_rng(0)
    config = AugmentConfig(norm_p=0.15, hematoxylin_p=0.1)
    seen = Counter(aug.draw_stain_variant(config, rng) for _ in range(20_000))
    shares = {variant: count / 20_000 for variant, count in seen.items()}
    assert shares == pytest.approx({"image": 0.75, "H": 0.1, "norm": 0.15}, abs=0.012)  # four standard errors
    default = Counter(aug.draw_stain_variant(AugmentConfig(), rng) for _ in range(20_000))
    assert default["image"] / 20_000 == pytest.approx(0.9, abs=0.01)
    only = AugmentConfig(norm_p=0, hematoxylin_p=1)
    assert {aug.draw_stain_variant(only, rng) for _ in range(50)} == {"H"}


def test_stain_variants_cannot_exceed_one() -> None:
    with pytest.raises(ConfigError, match=r"norm_p \+ hematoxylin_p = 1\.2, expected at most 1"):
        build(AugmentConfig, {"norm_p": 0.7, "hematoxylin_p": 0.5})


# --- schedule -----------------------------------------------------------------------------------------------------


def test_decay_schedule_values() -> None:
    config = AugmentConfig()
    values = [aug.policy_probability(config, epoch=epoch, num_epochs=150) for epoch in range(150)]
    assert values[0] == 0.4
    assert values[29] == pytest.approx(0.4 * 0.86)
    assert values[144] == pytest.approx(0.4 * (1 - 0.7 * 144 / 145))
    assert values[145:] == [0.0] * 5


@pytest.mark.parametrize("num_epochs", [1, 2, 5, 6, 7])
def test_decay_schedule_of_short_runs(num_epochs: int) -> None:
    config = AugmentConfig(policy_p0=0.5)
    values = [aug.policy_probability(config, epoch=epoch, num_epochs=num_epochs) for epoch in range(num_epochs)]
    expected = {6: [0.5], 7: [0.5, 0.5 * 0.65]}.get(num_epochs, [])
    assert values == pytest.approx(expected + [0.0] * min(num_epochs, 5))


@settings(max_examples=50)
@given(st.integers(1, 400), st.floats(0, 1))
def test_decay_falls_from_p0(num_epochs: int, p0: float) -> None:
    config = AugmentConfig(policy_p0=p0)
    values = [aug.policy_probability(config, epoch=epoch, num_epochs=num_epochs) for epoch in range(num_epochs)]
    assert all(0 <= later <= sooner <= p0 for sooner, later in pairwise(values))
    assert values[-5:] == [0.0] * min(5, num_epochs)
    assert num_epochs <= 5 or values[0] == p0


def test_other_schedules() -> None:
    constant = AugmentConfig(policy_schedule="constant", policy_p0=0.3)
    assert {aug.policy_probability(constant, epoch=epoch, num_epochs=9) for epoch in range(9)} == {0.3}
    for config in (AugmentConfig(policy_schedule="off"), AugmentConfig(policy="none", policy_schedule="constant")):
        assert aug.policy_probability(config, epoch=0, num_epochs=9) == 0


# --- crops --------------------------------------------------------------------------------------------------------


def test_target_points_lie_on_every_target() -> None:
    mask = np.zeros((90, 130), bool)
    mask[3, 4] = mask[4, 5] = True  # one target: connected through the corner
    mask[10:74, 20:84] = True
    mask[80:, 120:] = True
    points = aug.target_points(mask, num_points=64)
    assert points.shape == (3, 64, 2)
    _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    for target in points:
        assert len(set(labels[target[:, 0], target[:, 1]])) == 1
    assert set(labels[points[:, 0, 0], points[:, 0, 1]]) == {1, 2, 3}
    assert {tuple(point) for point in points[0]} == {(3, 4), (4, 5)}
    # A square of 64 px and 64 points: even steps would all fall into one column.
    assert len(set(points[1][:, 1])) > 30
    np.testing.assert_array_equal(points, aug.target_points(mask, num_points=64))


def test_no_target_gives_no_points() -> None:
    assert aug.target_points(np.zeros((5, 6), bool)).shape == (0, 64, 2)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 64), st.integers(0, 2**32))
def test_crops_are_windows_of_the_image(height: int, width: int, size_px: int, seed: int) -> None:
    image, mask = coordinates(height, width), random_mask(height, width, seed % 1000)
    points = aug.target_points(mask)
    rng = np.random.default_rng(seed)
    for positive_fraction in (0.0, 1.0):
        new_image, new_mask = aug.crop(
            image, mask, size_px=size_px, positive_fraction=positive_fraction, target_points=points, rng=rng
        )
        assert new_mask.shape == (min(size_px, height), min(size_px, width))
        y, x = int(new_image[0, 0, 0]), int(new_image[0, 0, 1])
        window = np.s_[y : y + size_px, x : x + size_px]
        np.testing.assert_array_equal(new_image, image[window])
        np.testing.assert_array_equal(new_mask, mask[window])
        if positive_fraction and mask.any():
            assert new_mask.any()


def test_positive_crops_draw_targets_evenly_and_hold_them_anywhere_in_the_middle() -> None:
    mask = np.zeros((250, 250), bool)
    mask[120, 60] = True
    mask[100:140, 160:200] = True  # 1600 times as large
    image, points = coordinates(250, 250), aug.target_points(mask)
    rng = np.random.default_rng(0)
    places = []
    for _ in range(1000):
        new_image, new_mask = aug.crop(image, mask, size_px=32, positive_fraction=1.0, target_points=points, rng=rng)
        assert new_mask.any()
        if new_mask.sum() == 1 and new_image[new_mask][0].tolist()[:2] == [120, 60]:
            places.append(np.argwhere(new_mask)[0])
    assert len(places) == pytest.approx(500, abs=64)
    assert np.min(places, 0).tolist() == [8, 8]
    assert np.max(places, 0).tolist() == [23, 23]


def test_share_of_positive_crops() -> None:
    mask = np.zeros((600, 600), bool)
    mask[300, 300] = True
    image, points = random_image(600, 600), aug.target_points(mask)
    rng = np.random.default_rng(0)
    held = [
        aug.crop(image, mask, size_px=20, positive_fraction=0.7, target_points=points, rng=rng)[1].any()
        for _ in range(1000)
    ]
    assert np.mean(held) == pytest.approx(0.7, abs=0.06)


def test_crop_does_not_hand_out_the_image_it_was_cut_from() -> None:
    image, mask = random_image(), random_mask()
    cut, cut_mask = aug.crop(
        image,
        mask,
        size_px=16,
        positive_fraction=0.0,
        target_points=aug.target_points(mask),
        rng=np.random.default_rng(0),
    )
    assert not np.shares_memory(cut, image) and not np.shares_memory(cut_mask, mask)
    assert cut.flags.c_contiguous


# --- padding ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 50), st.integers(0, 50))
def test_padding_reflects_and_marks_real_pixels(height: int, width: int, below: int, right: int) -> None:
    image, mask = random_image(height, width), np.ones((height, width), bool)
    padded, padded_mask, valid = images.pad(image, mask, height=height + below, width=width + right)
    np.testing.assert_array_equal(padded, np.pad(image, ((0, below), (0, right), (0, 0)), mode="reflect"))
    assert valid.shape == padded_mask.shape == (height + below, width + right)
    assert valid[:height, :width].all() and valid.sum() == height * width
    np.testing.assert_array_equal(padded_mask, valid)  # a full mask stays within the real pixels


def test_padding_cannot_shrink() -> None:
    with pytest.raises(
        SizeMismatch, match=r"cannot pad an image of 61x83 px .* to 64x64 px: give at least its own size"
    ):
        images.pad(random_image(), random_mask(), height=64, width=64)


def test_padded_size() -> None:
    assert images.padded_size((942, 1716), multiple=32) == (960, 1728)
    assert images.padded_size((960, 1728), multiple=32) == (960, 1728)
    assert images.padded_size((1, 33), multiple=32) == (32, 64)
