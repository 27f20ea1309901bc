"""Slides of every format open, give the pixels they hold, or say why not."""

import builtins
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from stas_core.data import images
from stas_core.errors import InputError
from stas_core.slides.slide import best_level, levels_of, thumbnail
from stas_core.slides.source import open_slide
from tests.slides.made import noise, write_ome, write_pyramid

PIXELS = noise(700, 1000)


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pyramid(tmp_path_factory.mktemp("slides") / "slide.tif", PIXELS)


def reason(path: Path) -> tuple[str, str]:
    with pytest.raises(InputError) as caught:
        open_slide(path).close()
    return caught.value.reason, str(caught.value)


def test_a_pyramid_says_what_it_is(pyramid: Path) -> None:
    with open_slide(pyramid) as slide:
        assert [(level.width, level.height, level.downsample) for level in slide.info.levels] == [
            (1000, 700, 1),
            (500, 350, 2),
            (250, 175, 4),
        ]
        assert slide.info.mpp_x == pytest.approx(0.5) and slide.info.mpp_y == pytest.approx(0.5)
        assert slide.info.vendor == "generic-tiff"


@settings(max_examples=50)
@given(st.integers(-300, 1100), st.integers(-300, 800), st.integers(1, 600), st.integers(1, 600))
def test_any_region_is_that_of_the_image_and_white_outside(
    pyramid: Path, x: int, y: int, width: int, height: int
) -> None:
    padded = np.full((2000, 3000, 3), 255, np.uint8)
    padded[500:1200, 500:1500] = PIXELS
    with open_slide(pyramid) as slide:
        expected = padded[500 + y : 500 + y + height, 500 + x : 500 + x + width]
        assert np.array_equal(slide.read(0, x, y, width, height), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "zstd"},
        {"compression": "lzw", "predictor": True},
        {"compression": None, "planarconfig": "separate"},
        {"tile": None, "rowsperstrip": 100, "compression": "zlib"},
        {"tile": (64, 128)},
    ],
    ids=str,
)
def test_lossless_layouts_give_the_same_pixels(tmp_path: Path, options: dict[str, Any]) -> None:
    separate = options.get("planarconfig") == "separate"
    stored = np.ascontiguousarray(PIXELS.transpose(2, 0, 1)) if separate else PIXELS
    path = write_pyramid(tmp_path / "a.tif", stored, num_levels=1, **options)
    with open_slide(path) as slide:
        assert np.array_equal(slide.read(0, 0, 0, 1000, 700), PIXELS)


def test_jpeg_tiles_and_alpha_are_read(tmp_path: Path) -> None:
    with open_slide(
        write_pyramid(tmp_path / "a.tif", PIXELS, compression="jpeg", compressionargs={"level": 95})
    ) as slide:
        assert np.abs(slide.read(0, 0, 0, 1000, 700).astype(int) - PIXELS).mean() < 4
    alpha = np.dstack([PIXELS, np.full(PIXELS.shape[:2], 255, np.uint8)])
    alpha[:300, :400, 3] = 0
    tifffile.imwrite(tmp_path / "b.tif", alpha, tile=(256, 256), photometric="rgb", extrasamples=["unassalpha"])
    with open_slide(tmp_path / "b.tif") as slide:
        expected = PIXELS.copy()
        expected[:300, :400] = 255
        assert np.array_equal(slide.read(0, 0, 0, 1000, 700), expected)


def test_copies_that_are_not_marked_as_such_are_levels(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for step in (1, 2, 4):
            file.write(PIXELS[::step, ::step], tile=(128, 128), photometric="rgb", metadata=None)
        file.write(noise(100, 90), tile=(128, 128), photometric="rgb", metadata=None)  # a label
    with open_slide(tmp_path / "a.tif") as slide:
        assert [level.downsample for level in slide.info.levels] == [1, 2, 4]


@pytest.mark.parametrize(("size", "unit", "mpp"), [(0.25, "µm", 0.25), (250, "nm", 0.25), (0.00025, "mm", 0.25)])
def test_ome_tiff_has_its_size_in_any_unit(tmp_path: Path, size: float, unit: str, mpp: float) -> None:
    with open_slide(write_ome(tmp_path / "a.ome.tif", PIXELS, size, unit)) as slide:
        assert slide.info.mpp_x == pytest.approx(mpp)
        assert np.array_equal(slide.read(0, 0, 0, 1000, 700), PIXELS)


def test_a_plain_image_is_a_slide_without_resolution(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(images.encode_png(PIXELS))
    with open_slide(tmp_path / "a.png") as slide:
        assert slide.info.mpp_x is None
        assert np.array_equal(slide.read(0, 10, 20, 30, 40), PIXELS[20:60, 10:40])


def test_a_thumbnail_is_the_slide_shrunk(pyramid: Path) -> None:
    with open_slide(pyramid) as slide:
        small = thumbnail(slide, 250)
    assert small.shape == (175, 250, 3)
    shrunk = PIXELS.reshape(175, 4, 250, 4, 3).mean((1, 3))
    assert np.abs(small - shrunk).max() <= 2


@given(st.sampled_from([2, 3, 4, 5, 8, 10, 16, 32, 64]), st.integers(3000, 90_000), st.integers(3000, 90_000))
def test_the_scale_of_a_level_whose_size_was_rounded_is_whole(factor: int, width: int, height: int) -> None:
    for size in ((width // factor, height // factor), (-(-width // factor), -(-height // factor))):
        assert levels_of([(width, height), size])[1].downsample == factor


def test_the_best_level_is_never_coarser_than_asked_for(pyramid: Path) -> None:
    with open_slide(pyramid) as slide:
        assert [best_level(slide.info, one) for one in (0.5, 1, 1.99, 2, 3.9, 4, 100)] == [0, 0, 0, 1, 1, 2, 2]


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    whole = write_pyramid(folder / "whole.tif", PIXELS).read_bytes()
    made: dict[str, tuple[Path, str]] = {}

    def put(name: str, data: bytes, expected: str) -> None:
        (folder / name).write_bytes(data)
        made[name] = folder / name, expected

    put("empty.svs", b"", "empty_file")
    put("text.svs", b"no slide at all", "unreadable_slide")
    put("page.html.tif", b"<html>", "unreadable_image")
    put("header.tif", whole[:16], "unreadable_slide")
    put("lone.mrxs", b"\xff\xd8", "incomplete_slide")
    put("cut.tif", _cut(folder), "unreadable_slide")
    tifffile.imwrite(folder / "grey.tif", PIXELS[..., 0], tile=(256, 256))
    made["grey.tif"] = folder / "grey.tif", "wrong_channels"
    tifffile.imwrite(folder / "deep.tif", PIXELS.astype(np.uint16), tile=(256, 256), photometric="rgb")
    made["deep.tif"] = folder / "deep.tif", "wrong_bit_depth"
    made["gone.svs"] = folder / "gone.svs", "unreadable_file"
    made["folder"] = folder, "not_a_file"
    os.mkfifo(folder / "pipe.svs")
    made["pipe.svs"] = folder / "pipe.svs", "not_a_file"
    return made


def _cut(folder: Path) -> bytes:
    """Return a file that ends within its tiles, its directory before them: what an aborted copy leaves."""
    tifffile.imwrite(folder / "a.tif", PIXELS, tile=(256, 256), photometric="rgb", metadata=None)
    return (folder / "a.tif").read_bytes()[:-300_000]


def test_every_bad_file_gets_its_reason_and_is_named(tmp_path: Path) -> None:
    for name, (path, expected) in bad_files(tmp_path).items():
        found, message = reason(path)
        assert (name, found) == (name, expected), message
        assert str(path) in message and ";" in message  # what, and the remedy


VMS = """[Virtual Microscope Specimen]
NoLayers=1
NoJpegColumns=1
NoJpegRows=1
ImageFile=image.jpg
MapFile=map.jpg
OptimisationFile=image.opt
SourceLens=20
PhysicalWidth=1000
PhysicalHeight=1000
"""


def test_a_slide_that_lacks_one_of_its_files_says_which(tmp_path: Path) -> None:
    (tmp_path / "a.vms").write_text(VMS)
    found, message = reason(tmp_path / "a.vms")
    assert found == "incomplete_slide" and "map.jpg" in message and "copy the whole folder" in message


def test_a_scanners_file_that_was_cut_short_never_passes_for_plain_tiff(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "a.svs", PIXELS, tile=(240, 240), description="Aperio Image Library v1\r\n", metadata=None
    )
    whole = (tmp_path / "a.svs").read_bytes()
    (tmp_path / "b.svs").write_bytes(whole[:-1000])
    assert reason(tmp_path / "b.svs")[0] == "unreadable_slide"


def test_a_lost_description_is_damage_and_no_other_resolution(tmp_path: Path) -> None:
    """tifffile only logs it, and an OME-TIFF would be taken for plain TIFF, with the resolution of its tags."""
    path = write_ome(tmp_path / "a.ome.tif", PIXELS)
    with tifffile.TiffFile(path) as file:
        tag = file.pages[0].tags["ImageDescription"]
        at = tag.offset + 8
    data = bytearray(path.read_bytes())
    data[at : at + 4] = (2**31).to_bytes(4, "little")
    path.write_bytes(data)
    found, message = reason(path)
    assert found == "unreadable_slide" and "copy it again" in message


def test_an_ome_pyramid_in_sub_files_has_its_levels(tmp_path: Path) -> None:
    options: dict[str, Any] = {"tile": (128, 128), "photometric": "rgb"}
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as file:
        size = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
        file.write(PIXELS, subifds=2, metadata={"axes": "YXS"} | size, **options)
        file.write(PIXELS[::2, ::2], subfiletype=1, **options)
        file.write(PIXELS[::4, ::4], subfiletype=1, **options)
    with open_slide(tmp_path / "a.ome.tif") as slide:
        assert [level.downsample for level in slide.info.levels] == [1, 2, 4]
        assert np.array_equal(slide.read(1, 0, 0, 500, 350), PIXELS[::2, ::2])


def test_damage_inside_a_tile_is_found_when_it_is_read(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tif", PIXELS, num_levels=1)
    with tifffile.TiffFile(path) as file:
        at = file.pages[0].dataoffsets[2]
    data = bytearray(path.read_bytes())
    data[at : at + 50] = bytes(50)
    path.write_bytes(data)
    with open_slide(path) as slide, pytest.raises(InputError) as caught:
        slide.read(0, 600, 0, 10, 10)
    assert caught.value.reason == "unreadable_slide" and "block 2, 0" in str(caught.value)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), max_size=8), st.integers(0, 12_000))
def test_no_damage_raises_anything_but_an_input_error(
    small: Path, changes: list[tuple[int, int]], num_bytes: int
) -> None:
    damaged = bytearray(small.read_bytes())
    for at, value in changes:
        damaged[at] = value
    path = small.with_name("damaged.tif")
    path.write_bytes(damaged[:num_bytes])
    try:
        with open_slide(path) as slide:
            if slide.info.width * slide.info.height < 10**7:
                thumbnail(slide, 64)
    except InputError as error:
        assert error.reason != "internal_error"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "a.tif"
    tifffile.imwrite(path, PIXELS[:64, :80], tile=(32, 32), photometric="rgb", compression="zlib", metadata=None)
    return path


def test_without_openslide_vendors_slides_say_what_to_install_and_others_open(
    tmp_path: Path, pyramid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "openslide":
            raise ImportError("No module named 'openslide'")
        return found(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    open_slide(pyramid).close()
    (tmp_path / "a.ndpi").write_bytes(b"anything")
    tifffile.imwrite(tmp_path / "a.svs", PIXELS, tile=(256, 256), description="Aperio Image Library v1", metadata=None)
    for name in ("a.ndpi", "a.svs"):
        found_reason, message = reason(tmp_path / name)
        assert found_reason == "missing_reader" and "pip install openslide-python" in message


REAL = {
    "CMU-1-Small-Region.svs": "aperio",
    "tcga-cr-7395-01a-01-ts1.svs": "aperio",
    "stas_mosaic.tif": "generic-tiff",
    "more/OS-1-detail.ome.tif": "ome",
    "more/OS-2-vsi.ome.tif": "ome",
    "more/bf2759_TRITC.ndpi": "hamamatsu",
    "more/dicom/sm_image.dcm": "dicom",
    "more/dicom/boxes/boxes_0.dcm": "dicom",
    "more/os_py/boxes.tiff": "generic-tiff",
    "more/os_py/small.svs": "aperio",
    "more/dicom/sm_image_jpegls.dcm": "unreadable_slide",  # a transfer syntax that is not supported
    "more/dicom/sm_annotations.dcm": "unreadable_slide",
    "more/os_py/unopenable.tiff": "unreadable_slide",
    "more/os_py/unreadable.svs": "unreadable_slide",  # opens, and fails at its first read
}


@pytest.mark.real_data
@pytest.mark.parametrize("name", REAL)
def test_real_slides_open_or_get_their_reason(shared: Path, name: str) -> None:
    path = shared / "data/slides" / name
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    try:
        with open_slide(path) as slide:
            found = slide.info.vendor
            thumbnail(slide, 200)
    except InputError as error:
        found = error.reason
    assert found == REAL[name]


@pytest.mark.real_data
def test_a_region_of_a_vendors_odd_level_does_not_depend_on_how_it_is_cut(shared: Path) -> None:
    path = shared / "data/slides/tcga-cr-7395-01a-01-ts1.svs"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    with open_slide(path) as slide:
        whole = slide.read(1, 900, 900, 300, 300)
    with open_slide(path) as slide:
        parts = [np.hstack([slide.read(1, 900 + x, 900 + y, 100, 100) for x in (0, 100, 200)]) for y in (0, 100, 200)]
    assert np.array_equal(np.vstack(parts), whole)
