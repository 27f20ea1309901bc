"""A slide's mask against its truth: the same counts as on whole arrays, whatever the tiles."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from stas_core.errors import SizeMismatch, UnclearMask, UnreadableSlide
from stas_core.scores.metrics import count, count_targets
from stas_core.slides import truth_sources
from stas_core.slides.evaluation import evaluate_slide, small_layers
from stas_core.slides.phantom import PhantomSlideConfig, make_slide
from stas_core.slides.pyramid import Layout, write_pyramid
from stas_core.slides.stitching import ArraySource
from stas_core.slides.truth_sources import OutlineSource, TiffMask
from tests.slides.made import noise

SIZE, SMALL = (300, 400), (150, 200)


def blobs(seed: int, least: int = 150, size: tuple[int, int] = SIZE) -> np.ndarray:
    return noise(*size, seed)[..., 0] > least


def source(mask: np.ndarray) -> ArraySource:
    return ArraySource(np.where(mask, 255, 0).astype(np.uint8))


@settings(max_examples=30)
@given(st.integers(0, 99), st.integers(120, 220), st.integers(-9, 9), st.sampled_from([37, 128, 2048]))
def test_counts_are_those_of_the_whole_arrays(seed: int, least: int, shift: int, tile_px: int) -> None:
    truth = blobs(seed, least, SMALL)
    mask = np.roll(truth, shift, axis=1) & blobs(seed + 1, 60, SMALL)
    found = evaluate_slide(source(mask), source(truth), area_mm2=2.0, tile_px=tile_px)
    assert found.pixels == count(mask, truth)
    assert found.targets == count_targets(mask, truth)
    assert found.found_per_mm2 == ndimage.label(mask, np.ones((3, 3)))[1] / 2
    assert found.true_per_mm2 == ndimage.label(truth, np.ones((3, 3)))[1] / 2
    union = np.count_nonzero(mask | truth)
    assert found.iou == pytest.approx(np.count_nonzero(mask & truth) / union if union else 1)


@settings(max_examples=20)
@given(st.integers(0, 99), st.integers(140, 220), st.sampled_from([37, 2048]))
def test_small_layers_tell_missed_and_false_targets_apart(seed: int, least: int, tile_px: int) -> None:
    truth, region = blobs(seed, least, SMALL), blobs(seed + 2, 60, SMALL)
    mask = np.roll(truth, 2, axis=1) & blobs(seed + 1, 60, SMALL)
    found = evaluate_slide(source(mask), source(truth), area_mm2=2.0, region=source(region), tile_px=tile_px)
    ours, theirs = (ndimage.label(one & region, np.ones((3, 3)))[0] for one in (mask, truth))
    shared = np.zeros((theirs.max() + 1, ours.max() + 1))
    np.add.at(shared, (theirs, ours), 1)
    union = np.bincount(theirs.ravel())[:, None] + np.bincount(ours.ravel())[None] - shared
    matches = shared[1:, 1:] / union[1:, 1:] >= 0.5  # one to one, but for two halves of equal size
    layers = small_layers(found, SMALL)
    assert np.array_equal(layers["truth"], theirs > 0)
    if (matches.sum(axis=0) <= 1).all() and (matches.sum(axis=1) <= 1).all():
        assert np.array_equal(layers["missed"], np.isin(theirs, 1 + np.flatnonzero(~matches.any(axis=1))))
        assert np.array_equal(layers["false"], np.isin(ours, 1 + np.flatnonzero(~matches.any(axis=0))))
    half = small_layers(found, (SMALL[0] // 2, SMALL[1] // 2))
    for kind, layer in layers.items():
        assert np.array_equal(half[kind], layer.reshape(SMALL[0] // 2, 2, SMALL[1] // 2, 2).any(axis=(1, 3)))


@settings(max_examples=20)
@given(st.integers(0, 99), st.integers(120, 220), st.sampled_from([37, 2048]))
def test_a_region_of_interest_cuts_mask_and_truth(seed: int, least: int, tile_px: int) -> None:
    truth, mask, region = (blobs(seed + n, more, SMALL) for n, more in enumerate((least, least, 120)))
    found = evaluate_slide(source(mask), source(truth), area_mm2=2.0, region=source(region), tile_px=tile_px)
    assert found.pixels == count(mask & region, truth & region)
    assert found.targets == count_targets(mask & region, truth & region)
    labels, num = ndimage.label(truth, np.ones((3, 3)))
    within = ndimage.sum(region, labels, range(1, num + 1))
    whole = ndimage.sum(truth, labels, range(1, num + 1))
    assert found.num_outside == np.count_nonzero(within == 0)
    assert found.num_cut == np.count_nonzero((within > 0) & (within < whole))


@settings(max_examples=20)
@given(st.integers(0, 99), st.sampled_from([61, 2048]))
def test_froc_is_that_of_every_threshold(seed: int, tile_px: int) -> None:
    truth, mask, prob = blobs(seed, 170, SMALL), blobs(seed, 150, SMALL), noise(*SMALL, seed + 50)[..., 1].copy()
    found = evaluate_slide(source(mask), source(truth), area_mm2=0.5, prob=ArraySource(prob), tile_px=tile_px)
    labels, num = ndimage.label(mask, np.ones((3, 3)))
    means = np.array(ndimage.mean(prob, labels, range(1, num + 1))) / 255
    assert np.allclose(np.sort(found.mean_prob), np.sort(means))
    peaks = np.array(ndimage.maximum(prob, labels, range(1, num + 1))) / 255
    assert np.allclose(np.sort(found.peak_prob), np.sort(peaks))
    froc = found.froc()
    assert (np.diff(froc.sensitivity) >= 0).all() and (np.diff(froc.false_per_mm2) >= 0).all()
    num_true = ndimage.label(truth, np.ones((3, 3)))[1]
    for row in range(0, len(froc.threshold), 7):
        kept = np.isin(labels, np.flatnonzero(means >= froc.threshold[row] - 1e-12) + 1)
        counts = count_targets(kept, truth)
        assert froc.sensitivity[row] == pytest.approx(counts.tp / num_true)
        assert froc.false_per_mm2[row] == pytest.approx(counts.fp / 0.5)
    assert froc.sensitivity_at(np.inf) == pytest.approx(found.targets.recall)
    assert froc.sensitivity_at(-1) == 0


def test_empty_masks_agree() -> None:
    empty = source(np.zeros(SIZE, bool))
    found = evaluate_slide(empty, empty, area_mm2=1.0)
    assert found.pixels.dice == found.iou == found.targets.dice == 1
    assert len(found.froc().threshold) == 0
    missed = evaluate_slide(source(blobs(0)), empty, area_mm2=1.0)
    assert missed.pixels.dice == 0 and np.isnan(missed.froc().sensitivity).all()


def test_masks_of_one_frame_are_asked_for() -> None:
    with pytest.raises(SizeMismatch, match="one frame"):
        evaluate_slide(source(blobs(0)), source(blobs(0)[:-1]), area_mm2=1.0)


@settings(max_examples=30)
@given(st.data())
def test_any_box_of_a_mask_file_is_that_of_the_mask(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("mask") / "a.tif"
    mask = np.where(blobs(3), 255, 0).astype(np.uint8)
    write_pyramid(path, SIZE, [mask], mpp=0.5, layout=Layout(tile_px=64, smooth=False))
    factor = data.draw(st.sampled_from([1, 2, 4]))
    size = SIZE[0] // factor, SIZE[1] // factor
    y0, x0 = (data.draw(st.integers(0, length - 1)) for length in size)
    height, width = (data.draw(st.integers(1, length - at)) for length, at in zip(size, (y0, x0), strict=True))
    opened = TiffMask(path, size)
    expected = mask[factor // 2 :: factor, factor // 2 :: factor][y0 : y0 + height, x0 : x0 + width]
    assert opened.size == size and np.array_equal(opened.read(y0, x0, height, width), expected)
    opened.close()


def test_files_that_are_no_mask_of_the_slide_are_named(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "a.tif", SIZE, [noise(*SIZE)], mpp=0.5)
    with pytest.raises(UnclearMask, match="3 channel"):
        TiffMask(tmp_path / "a.tif")
    write_pyramid(tmp_path / "b.tif", SIZE, [noise(*SIZE)[..., 0].copy()], mpp=0.5)
    with pytest.raises(SizeMismatch, match="another shape"):
        TiffMask(tmp_path / "b.tif", (300, 300))
    (tmp_path / "c.tif").write_bytes(b"no TIFF")
    with pytest.raises(UnreadableSlide):
        TiffMask(tmp_path / "c.tif")


@settings(max_examples=30)
@given(st.integers(0, 299), st.integers(0, 399), st.integers(1, 300), st.integers(1, 400), st.sampled_from([1.0, 2.0]))
def test_any_box_of_outlines_is_that_of_their_mask(y0: int, x0: int, height: int, width: int, level0_px: float) -> None:
    size = int(SIZE[0] / level0_px), int(SIZE[1] / level0_px)
    y0, x0 = y0 % size[0], x0 % size[1]
    rings = [[[10.5, 20.2], [200.7, 30], [150, 250.1], [10.5, 20.2]], [[60.0, 50], [120, 50], [90, 100], [60, 50]]]
    triangle = [[[-20, 280], [420, 290], [200, 330], [-20, 280]]]
    features = [{"type": "Polygon", "coordinates": one} for one in (rings, triangle)]
    data = json.dumps({"type": "GeometryCollection", "geometries": features}).encode()
    outlines = OutlineSource.of(data, "a.geojson", size=size, level0_px=level0_px)
    expected = np.zeros((size[0] + 200, size[1] + 200), np.uint8)
    for one in (rings, triangle):
        drawn = np.zeros_like(expected)
        points = [np.round((np.array(ring) / level0_px - 0.5 + 100) * 256).astype(np.int32) for ring in one]
        cv2.fillPoly(drawn, points[:1], 255, cv2.LINE_8, 8)
        cv2.fillPoly(drawn, points[1:], 0, cv2.LINE_8, 8)
        expected |= drawn
    height, width = min(height, size[0] - y0), min(width, size[1] - x0)
    cut = expected[100 + y0 : 100 + y0 + height, 100 + x0 : 100 + x0 + width]
    assert np.array_equal(outlines.read(y0, x0, height, width), cut)
    assert not (outlines.is_blank(y0, x0, height, width) and cut.any())


def test_no_outlines_are_an_empty_truth() -> None:
    data = b'{"type": "FeatureCollection", "features": []}'
    outlines = OutlineSource.of(data, "a.geojson", size=SIZE, level0_px=1.0)
    assert outlines.is_blank(0, 0, *SIZE) and not outlines.read(0, 0, *SIZE).any()


def test_outlines_too_large_to_be_drawn_whole_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b'{"type": "Polygon", "coordinates": [[[10.5, 20.2], [390.7, 30], [150, 250.1], [10.5, 20.2]]]}'
    outlines = OutlineSource.of(data, "a.geojson", size=SIZE, level0_px=1.0)
    whole = outlines.read(0, 0, *SIZE)
    monkeypatch.setattr(truth_sources, "_LARGEST_PX", 0)
    parts = [outlines.read(y0, x0, 100, 100) for y0 in (0, 100, 200) for x0 in (0, 100, 200, 300)]
    joined = np.block([[parts[4 * row + col] for col in range(4)] for row in range(3)])
    less, more = cv2.erode(whole, np.ones((3, 3), np.uint8)), cv2.dilate(whole, np.ones((3, 3), np.uint8))
    assert ((less <= joined) & (joined <= more)).all()


def test_a_phantoms_mask_is_its_outlines(tmp_path: Path) -> None:
    config = PhantomSlideConfig(width_px=1300, height_px=1200, nests_per_mm2=20, seed=2)
    made = make_slide(config, 0, tmp_path)
    mask = TiffMask(made.mask)
    truth = OutlineSource.of(made.targets.read_bytes(), "targets", size=mask.size, level0_px=1.0)
    found = evaluate_slide(mask, truth, area_mm2=1.0, tile_px=500)
    assert len(found.truth) > 0 and found.pixels.dice == found.targets.dice == 1
    coarse = TiffMask(made.mask, (600, 650))
    truth = OutlineSource.of(made.targets.read_bytes(), "targets", size=coarse.size, level0_px=2.0)
    assert evaluate_slide(coarse, truth, area_mm2=1.0).pixels.dice > 0.97
