import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from stas_core.data import images
from stas_core.errors import EmptyFile, InputError, OversizedImage, UnreadableImage, WrongBitDepth, WrongChannels

RGB = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def encoded(array: np.ndarray, format_name: str, **options: object) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(array).save(sink, format_name, **options)
    return sink.getvalue()


def png_of_16_bits() -> bytes:
    import cv2

    ok, data = cv2.imencode(".png", RGB.astype(np.uint16) * 257)
    assert ok
    return bytes(data.tobytes())


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"", EmptyFile, "0 bytes"),
        (b"not an image", UnreadableImage, "not an image"),
        (encoded(RGB, "JPEG")[:-200], UnreadableImage, "damaged"),
        (encoded(RGB, "PNG")[:-200], UnreadableImage, "damaged"),
        (encoded(RGB[..., 0], "PNG"), WrongChannels, r"mode L with 1 channel"),
        (encoded(np.dstack([RGB, RGB[..., :1]]), "PNG"), WrongChannels, r"mode RGBA with 4 channel"),
        (encoded(np.asarray(Image.fromarray(RGB).convert("CMYK")), "PNG"), WrongChannels, "4 channel"),
        (encoded(RGB[..., 0].astype(np.uint16) * 257, "PNG"), WrongBitDepth, "16 bits"),
        (png_of_16_bits(), WrongBitDepth, "16 bits"),
    ],
)
def test_bad_images_are_named_with_their_reason(data: bytes, error: type[InputError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        images.decode_image(data, "field_7.jpg")
    assert "field_7.jpg" in str(caught.value)


def test_jpeg_with_four_channels_is_refused() -> None:
    sink = io.BytesIO()
    Image.fromarray(RGB).convert("CMYK").save(sink, "JPEG")
    with pytest.raises(WrongChannels, match="mode CMYK with 4 channel"):
        images.decode_image(sink.getvalue(), "x")


def test_pixel_limit() -> None:
    with pytest.raises(OversizedImage, match=r"60x40 = 2400 px, more than the limit of 2399"):
        images.decode_image(encoded(RGB, "PNG"), "x", max_pixels=2399)
    assert images.decode_image(encoded(RGB, "PNG"), "x", max_pixels=2400).shape == (40, 60, 3)


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    sink = io.BytesIO()
    Image.fromarray(RGB).save(sink, "PNG", exif=exif)
    assert np.array_equal(images.decode_image(sink.getvalue(), "x"), np.rot90(RGB, -1))


def test_the_limit_is_ours_not_pillows() -> None:
    size = (20_000).to_bytes(4, "big") * 2
    header = b"IHDR" + size + bytes([8, 2, 0, 0, 0])
    data = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    data += bytes(4) + b"IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big")
    with pytest.raises(OversizedImage, match=r"big is 20000x20000 = 400000000 px, more than the limit of 200000000"):
        images.decode_image(data, "big")
    with pytest.raises(UnreadableImage, match="big is damaged"):
        images.decode_image(data, "big", max_pixels=400_000_000)


@settings(max_examples=25)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=20)))
def test_masks_round_trip_as_one_bit(mask: np.ndarray) -> None:
    data = images.encode_mask(mask)
    assert Image.open(io.BytesIO(data)).mode == "1"
    assert np.array_equal(images.decode_mask(data, "m"), mask)


@settings(max_examples=25)
@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=20)))
def test_maps_round_trip(prob: np.ndarray) -> None:
    assert np.array_equal(images.decode_map(images.encode_map(prob), "m"), prob)


def test_masks_of_other_tools_are_read() -> None:
    mask = RGB[..., 0] > 100
    assert np.array_equal(images.decode_mask(encoded(mask.astype(np.uint8) * 255, "PNG"), "m"), mask)


@settings(max_examples=25)
@given(st.integers(1, 50), st.integers(1, 50), st.floats(0.1, 1))
def test_image_and_mask_shrink_to_the_same_size(height: int, width: int, scale: float) -> None:
    image, mask = np.zeros((height, width, 3), np.uint8), np.ones((height, width), bool)
    small, small_mask = images.resize(image, scale), images.resize_mask(mask, scale)
    assert small.shape[:2] == small_mask.shape == images.scaled_size((height, width), scale)
    assert small_mask.all()
