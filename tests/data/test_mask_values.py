"""Masks of other tools are read by their values; what does not say what is target is refused by name."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from PIL import Image

from stas_core.data import images
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
