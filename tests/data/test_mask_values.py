"""Masks of other tools are read by their values; what does not say what is target is refused by name."""

import io
import re
import shlex
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from PIL import Image

from stas_core import config
from stas_core.data import images, truth
from stas_core.data.annotations import AnnotationConfig
from stas_core.errors import UnclearMask

MASK = np.zeros((40, 60), bool)
MASK[5:15, 8:30] = True


def encoded(image: Image.Image, format_name: str = "PNG", **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format_name, **options)
    return sink.getvalue()


def palette(mask: np.ndarray, *colours: int) -> Image.Image:
    image = Image.fromarray(mask.astype(np.uint8), "P")
    image.putpalette([0, 0, 0, *colours])
    return image


@settings(max_examples=25, deadline=None)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=20)))
def test_masks_are_read_by_value(mask: np.ndarray) -> None:
    byte, red = mask.astype(np.uint8), np.stack([mask, 0 * mask, 0 * mask], axis=-1).astype(np.uint8) * 255
    opaque = np.dstack([red, np.full(mask.shape, 255, np.uint8)])
    for image in (
        *(Image.fromarray(array) for array in (mask, byte, byte * 255, red, red // 2, opaque)),
        *(Image.fromarray(byte.astype(np.uint16) * value) for value in (1, 255, 65535)),
        palette(mask, 128, 0, 0),
    ):
        for format_name in ("PNG", "TIFF"):
            assert np.array_equal(images.decode_mask(encoded(image, format_name), "m"), mask), (image.mode, format_name)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_palettes_of_few_bits_count_by_index(bits: int) -> None:
    assert np.array_equal(images.decode_mask(encoded(palette(MASK, 9, 9, 9), bits=bits), "m"), MASK)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.fromarray(MASK.astype(np.uint8) * 2), "m.png holds 2 values (0, 2), expected 0 and 1, or 0 and 255"),
        (Image.fromarray(MASK.astype(np.uint8) + 1), "m.png holds 2 values (1, 2)"),
        (Image.fromarray(np.arange(200, dtype=np.uint8)[None]), "m.png holds 200 values (0, 1, 2, 3, 4, 5...)"),
        (Image.fromarray(np.eye(3, dtype=np.uint8) * 255).convert("RGB").rotate(0, fillcolor=0), ""),
        (Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3)), "m.png holds 4 colours"),
        (Image.fromarray(MASK.astype(np.uint8) * 255).convert("LA"), "m.png has mode LA"),
    ],
)
def test_masks_that_do_not_say_what_is_target_are_refused(image: Image.Image, message: str) -> None:
    if not message:
        assert images.decode_mask(encoded(image), "m.png").sum() == 3
        return
    with pytest.raises(UnclearMask) as caught:
        images.decode_mask(encoded(image), "m.png")
    assert message in str(caught.value)


def test_a_jpeg_is_no_mask() -> None:
    with pytest.raises(UnclearMask, match=r"m\.jpg is a JPEG, which blurs the values of a mask; save it as PNG"):
        images.decode_mask(encoded(Image.fromarray(MASK.astype(np.uint8) * 255), "JPEG"), "m.jpg")


def read(data: bytes, *overrides: str, **values: Any) -> np.ndarray:
    loaded = config.load_config(AnnotationConfig, None, [word.removeprefix("annotation.") for word in overrides])
    made = config.build(AnnotationConfig, loaded.model_dump() | values)
    return truth.read_annotation(data, "m.x", MASK.shape, made, "m")[0]


BYTE = MASK.astype(np.uint8)
EXACT = {
    "0 and 1": encoded(Image.fromarray(BYTE)),
    "0 and 1 as RGB": encoded(Image.fromarray(np.repeat(BYTE[..., None], 3, axis=2))),
    "1 bit": encoded(Image.fromarray(MASK)),
    "1 bit, TIFF": encoded(Image.fromarray(MASK), "TIFF"),
    "palette": encoded(palette(MASK, 128, 0, 0)),
    "palette of 1 bit": encoded(palette(MASK, 9, 9, 9), bits=1),
    "0 and 1 of 16 bits": encoded(Image.fromarray(BYTE.astype(np.uint16))),
    "0 and 255 of 16 bits": encoded(Image.fromarray(BYTE.astype(np.uint16) * 255)),
    "0 and 255": encoded(Image.fromarray(BYTE * 255)),
    "one colour": encoded(Image.fromarray(np.stack([BYTE * 9, BYTE, BYTE], axis=-1))),
    "an export of the project": images.encode_mask(MASK),
}


@pytest.mark.parametrize("tolerance", [0, 1, 30, 127])
@pytest.mark.parametrize("data", EXACT.values(), ids=EXACT)
def test_a_tolerance_changes_no_mask_that_is_exact(data: bytes, tolerance: int) -> None:
    assert np.array_equal(read(data, mask_tolerance=tolerance), MASK)


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(BYTE), "JPEG", quality=100),
        encoded(Image.fromarray(BYTE * 9)),
        encoded(Image.fromarray(BYTE.astype(np.uint16) * 30)),
        encoded(Image.fromarray(BYTE + np.eye(*MASK.shape, dtype=np.uint8))),
    ],
    ids=["JPEG of 0 and 1", "0 and 9", "0 and 30 of 16 bits", "0, 1 and 2"],
)
def test_a_tolerance_empties_no_mask_in_silence(data: bytes) -> None:
    for labels in ({}, {"65535": "target", "0": "ignore"}):
        with pytest.raises(UnclearMask, match=r"all of which annotation.mask_tolerance = 30 takes for black") as caught:
            read(data, mask_tolerance=30, labels=labels)
    suggested = re.findall(r"annotation\.labels\.\w+=target", str(caught.value))
    assert read(data, "mask_tolerance=0" if b"JFIF" not in data else "mask_tolerance=1", *suggested)[MASK].all()


def test_an_empty_mask_stays_one_with_a_tolerance() -> None:
    for form in ("PNG", "JPEG"):
        assert not read(encoded(Image.fromarray(BYTE * 0), form), mask_tolerance=30).any()


def test_indices_of_a_palette_are_not_near_one_another() -> None:
    image = Image.fromarray(BYTE * 2 + np.eye(*MASK.shape, dtype=np.uint8) * (1 - BYTE), "P")
    image.putpalette([0, 0, 0, 9, 9, 9, 8, 8, 8])
    assert np.array_equal(read(encoded(image), "labels.2=target", "labels.1=ignore", "mask_tolerance=30"), MASK)
    with pytest.raises(UnclearMask, match=r"off black and white: 0, 1, 2; say what a value means"):
        read(encoded(image), mask_tolerance=30)


def test_the_remedy_for_a_blurred_mask_reads_it() -> None:
    blurred = encoded(Image.fromarray(BYTE * 255), "JPEG", quality=90)
    coarse = encoded(Image.fromarray(BYTE * 255), "JPEG", quality=5)
    for labels in ({}, {"255": "target"}):
        with pytest.raises(UnclearMask, match=r"save it as PNG; or set annotation.mask_tolerance=30") as caught:
            read(blurred, labels=labels)
        assert np.array_equal(read(blurred, *re.findall(r"annotation\.\w+=\d+", str(caught.value))), MASK)
    with pytest.raises(UnclearMask, match="off black and white") as caught:
        read(coarse, mask_tolerance=2)
    found = read(coarse, *re.findall(r"set (annotation\.\w+=\d+)", str(caught.value)))
    assert np.count_nonzero(found != MASK) < 0.2 * MASK.sum()
    red = encoded(Image.fromarray(np.stack([BYTE * 200, 0 * BYTE, 0 * BYTE], axis=-1)), "JPEG", quality=100)
    with pytest.raises(UnclearMask, match=r"off black and white: #") as caught:
        read(red, mask_tolerance=30)
    suggested = shlex.split(re.findall(r"such as (annotation\.\S+)", str(caught.value))[0])
    assert np.array_equal(read(red, "mask_tolerance=100", *suggested), MASK)
