"""Whatever is wrong with a file that should be an image, it is an error of that file, which names it."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageOps, TiffImagePlugin

from stas_core.data import images
from stas_core.errors import InputError, OutOfMemory, UnreadableImage, WrongBitDepth

RGB = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged tags
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "JPEG2000")


def encoded(format_name: str, pages: tuple[np.ndarray, ...] = (RGB,), **options: object) -> bytes:
    sink = io.BytesIO()
    first, *others = [Image.fromarray(page) for page in pages]
    more = {"save_all": True, "append_images": others} if others else {}
    first.save(sink, format_name, **more, **options)
    return sink.getvalue()


def with_exif(format_name: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker"
    exif[0x011A] = 72.0
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    return encoded(format_name, exif=exif.tobytes())


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Flip, overwrite, cut out or double bytes: mostly in the header, where a decoder believes what it reads."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(len(data), draw(st.sampled_from([64, 300, len(data)]))) - 1))
        kind = draw(st.sampled_from(["flip", "value", "cut", "double", "end"]))
        if kind == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "value":
            value = draw(
                st.sampled_from([b"\0\0", b"\xff\xff", b"\xff\xff\xff\xff", b"\0\2", b"\2\0", b"\5\0", b"\7\0"])
            )
            data[at : at + len(value)] = value
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 16))]
        elif kind == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 16))]
        else:
            del data[max(1, at) :]
        if not data:
            break
    return bytes(data)


@pytest.mark.parametrize("format_name", FORMATS)
def test_damage_of_any_kind_is_an_error_that_names_the_file(format_name: str) -> None:
    originals = [encoded(format_name)] + ([with_exif(format_name)] if format_name not in ("BMP", "JPEG2000") else [])

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(st.sampled_from(originals).flatmap(damaged))
    def check(data: bytes) -> None:
        for decode in (images.decode_image, images.decode_mask, images.decode_map):
            try:
                decode(data, "slide 7/field.jpg", **({"max_pixels": 10**6} if decode is images.decode_image else {}))
            except InputError as error:
                assert "slide 7/field.jpg" in str(error) and " at 0x" not in str(error)

    check()


@pytest.mark.parametrize("name", ["exif_text_in_number.jpg", "other_format.jpg", "rational_size.tif"])
def test_the_decoder_cases(shared: Path, name: str) -> None:
    with pytest.raises(UnreadableImage, match=name):
        images.decode_image((shared / "cases" / "20_decoder" / name).read_bytes(), name)


@pytest.mark.parametrize("decode", [images.decode_image, images.decode_mask, images.decode_map])
def test_no_other_decoder_is_started(decode: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostScript under the name of an image would be run by Ghostscript."""
    assert callable(decode)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("Ghostscript was started"))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    with pytest.raises(UnreadableImage, match=r"field\.jpg is not an image that is read here: it is PostScript"):
        decode(postscript, "field.jpg")
    for format_name in ("GIF", "PPM", "TGA", "ICO"):
        with pytest.raises(UnreadableImage, match=r"field\.jpg is not an image that is read here"):
            decode(encoded(format_name), "field.jpg")


@pytest.mark.parametrize("format_name", FORMATS)
def test_the_content_decides_among_the_formats_not_the_name(format_name: str) -> None:
    found = images.decode_image(encoded(format_name, lossless=True), "field.jpg")  # WebP's own option
    exact = format_name != "JPEG"
    assert np.array_equal(found, RGB) if exact else found.shape == RGB.shape


def test_a_git_lfs_pointer_is_told() -> None:
    with pytest.raises(UnreadableImage, match="git lfs pull"):
        images.decode_image(b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "x.png")


def test_memory_that_runs_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise MemoryError

    data = encoded("BMP")
    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    with pytest.raises(OutOfMemory, match="x does not fit into memory"):
        images.decode_image(data, "x")


def test_sixteen_bits_in_jpeg_2000_are_refused() -> None:
    data = bytearray(encoded("JPEG2000", no_jp2=True))
    siz = data.index(b"\xff\x4f\xff\x51")
    assert data[siz + 42] == 7
    data[siz + 42] = 15
    with pytest.raises(WrongBitDepth, match="16 bits"):
        images.decode_image(bytes(data), "x.j2k")


SMALL = np.ascontiguousarray(RGB[::4, ::4])


@pytest.mark.parametrize(
    ("format_name", "pages"),
    [("TIFF", (SMALL, RGB)), ("TIFF", (RGB, RGB)), ("WEBP", (RGB, 255 - RGB)), ("PNG", (RGB, 255 - RGB))],
)
def test_several_pages_or_frames_are_refused(format_name: str, pages: tuple[np.ndarray, ...]) -> None:
    sizes = ", ".join(f"{page.shape[1]}x{page.shape[0]}" for page in pages)
    with pytest.raises(InputError, match=rf"field\.tif holds 2 pages or frames \({sizes} px\), expected one") as caught:
        images.decode_image(encoded(format_name, pages), "field.tif")
    assert caught.value.reason == "multiple_pages"


@pytest.mark.parametrize("thumbnail_first", [True, False])
def test_of_a_tiff_with_thumbnails_the_full_page_is_taken(thumbnail_first: bool) -> None:
    sink = io.BytesIO()
    pages = [(SMALL, 1), (RGB, 0)] if thumbnail_first else [(RGB, 0), (SMALL, 1)]
    with TiffImagePlugin.AppendingTiffWriter(sink, new=True) as writer:
        for page, kind in pages:
            tags = TiffImagePlugin.ImageFileDirectory_v2()
            tags[254] = kind
            Image.fromarray(page).save(writer, "TIFF", tiffinfo=tags)
            writer.newFrame()
    assert np.array_equal(images.decode_image(sink.getvalue(), "x"), RGB)


def test_a_photograph_with_embedded_previews_is_read() -> None:
    data = encoded("MPO", (RGB, SMALL))
    assert images.decode_image(data, "x.jpg").shape == RGB.shape


def test_a_loop_of_pages_ends() -> None:
    data = bytearray(encoded("TIFF"))
    (start,) = struct.unpack_from("<I", data, 4)
    (num_tags,) = struct.unpack_from("<H", data, start)
    struct.pack_into("<I", data, start + 2 + 12 * num_tags, start)
    assert np.array_equal(images.decode_image(bytes(data), "x"), RGB)
