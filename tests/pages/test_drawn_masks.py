"""Masks on pages: no target where there is none, whatever room there is; what is not drawn is counted."""

import io
import math
import re

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stas_core.arrays import Mask, ResizedMask
from stas_core.data import images
from stas_core.pages.drawn_masks import LARGEST_SIDE_PX, DrawnMask, astray_px, draw_mask, outline_path
from tests.pages.made import blob

SHAPE = (301, 403)


def discs(seed: int, num: int, most_px: int, spread: float = 1.0, shape: tuple[int, int] = SHAPE) -> Mask:
    """Return discs, the smallest of one pixel, all over the image or about its middle."""
    rng, mask = np.random.default_rng(seed), np.zeros(shape, np.uint8)
    for _ in range(num):
        y, x = (int(side * (0.5 + spread * rng.uniform(-0.5, 0.5))) for side in shape)
        cv2.circle(mask, (x, y), int(rng.integers(most_px)), 1, -1)
    return mask.astype(bool)


def grid() -> Mask:
    """Return squares in rows, half of them with a pixel less, so that no pattern shortens them."""
    mask, rng = np.zeros(SHAPE, bool), np.random.default_rng(2)
    for y in range(3, SHAPE[0] - 3, 9):
        for x in range(3, SHAPE[1] - 3, 9):
            mask[y : y + 3, x : x + 3] = True
            mask[y, x] = rng.random() < 0.5
    return mask


def net() -> Mask:
    """Return one target with many holes, and threads that no simple outline follows."""
    mask = ~cv2.dilate(grid().astype(np.uint8), np.ones((4, 4), np.uint8)).astype(bool)
    mask[::9, 5::18] = False
    return mask


def speckled() -> Mask:
    """Return a ring with a rough edge and many small holes."""
    mask = cv2.circle(np.zeros(SHAPE, np.uint8), (200, 150), 120, 1, 30).astype(bool)
    return mask & (np.random.default_rng(3).random(SHAPE) > 0.1)


MASKS = {
    "few": discs(0, 30, 12),
    "scattered": discs(0, 300, 3),
    "many": discs(0, 1500, 3),
    "clustered": discs(1, 400, 4, 0.3),
    "grid": grid(),
    "net": net(),
    "speckled": speckled(),
}


def shown(drawn: DrawnMask, shape: tuple[int, ...]) -> ResizedMask:
    """Return what a browser shows, in px of the mask: an outline's inside and its line, which every ring has."""
    if drawn.picture:
        with Image.open(io.BytesIO(drawn.picture)) as picture:
            stretched = picture.convert("L").resize(shape[::-1], Image.Resampling.NEAREST)
        return np.asarray(stretched) > 127
    rings, lines = rings_of(drawn.path), np.zeros(shape, np.uint8)
    cv2.polylines(lines, [2 * ring.astype(np.int32) - 1 for ring in rings], True, 1, shift=1)
    return np.asarray(fill(rings, shape) | lines.astype(bool))


def rings_of(path: str) -> list[np.ndarray]:
    """Return the corners (x, y) of each ring of a path of straight lines."""
    rings = []
    for ring in filter(None, path.split("M")):
        at, points = np.zeros(2, np.int64), []
        for kind, numbers in re.findall(r"(^|[lhv])([-\d ]+)", ring):
            values = [int(number) for number in numbers.split()]
            at = at + {"h": [values[0], 0], "v": [0, values[0]]}.get(kind, values)
            points.append(at)
        rings.append(np.array(points))
    return rings


def fill(rings: list[np.ndarray], shape: tuple[int, ...]) -> ResizedMask:
    """Draw rings by the even-odd rule, at pixel centres."""
    height, width = shape
    crossings = np.zeros((height, width + 1), np.int64)  # how many edges lie left of each centre
    for ring in rings:
        for (x0, y0), (x1, y1) in zip(ring.tolist(), np.roll(ring, -1, axis=0).tolist(), strict=True):
            for y in range(min(y0, y1), max(y0, y1)):
                x = x0 + (y + 0.5 - y0) * (x1 - x0) / (y1 - y0)
                crossings[y, min(width, max(0, math.ceil(x - 0.5)))] += 1
    return np.asarray(np.cumsum(crossings, axis=1)[:, :width] % 2 == 1)


def astray(mask: Mask, from_: Mask, px: int) -> int:
    """Count the pixels of a mask farther than `px` from another."""
    near = cv2.dilate(from_.astype(np.uint8), np.ones((2 * px + 1, 2 * px + 1), np.uint8)).astype(bool)
    return int((mask & ~near).sum())


def check(mask: Mask, drawn: DrawnMask, num_characters: int) -> None:
    """Check that a layer keeps to its room, and to its mask; that what it lacks is counted."""
    assert len(drawn.path) <= num_characters and 4 * len(drawn.picture) / 3 <= num_characters
    seen, px = shown(drawn, mask.shape), astray_px(mask.shape) + 1  # a pixel's centre may lie on either side of a line
    num, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    must = may = mask
    if drawn.note:
        num_left, num_all = (int(text.replace(",", "")) for text in re.findall(r"[\d,]*\d", drawn.note))
        assert "are not drawn" in drawn.note and num_all == num - 1 and 0 < num_left <= num_all
        areas = stats[:, cv2.CC_STAT_AREA]
        largest = np.sort(areas[1:])[::-1][: num_all - num_left]
        least = largest[-1] if len(largest) else mask.size
        must, may = (np.asarray(mask & is_kept[labels]) for is_kept in (areas > least, areas >= least))
    assert astray(seen, may, px) == 0 == astray(must, seen, px)
    assert seen.any() >= must.any() and seen.any() <= may.any()


@pytest.mark.parametrize("num_characters", [200, 600, 1_250, 3_750, 42_000])
@pytest.mark.parametrize("kind", MASKS)
def test_a_layer_shows_no_target_where_there_is_none_and_counts_what_it_lacks(kind: str, num_characters: int) -> None:
    check(MASKS[kind], draw_mask(MASKS[kind], num_characters), num_characters)


@settings(max_examples=25)
@given(
    st.integers(0, 10**6),
    st.integers(0, 400),
    st.integers(1, 30),
    st.floats(0.1, 1),
    st.sampled_from([(60, 97), (200, 300), (801, 1000)]),
    st.integers(60, 6_000),
)
def test_layers_keep_to_their_masks_whatever_they_are(
    seed: int, num: int, most_px: int, spread: float, shape: tuple[int, int], num_characters: int
) -> None:
    mask = discs(seed, num, most_px, spread, shape) ^ discs(seed + 1, num // 2, max(1, most_px // 2), spread, shape)
    check(mask, draw_mask(mask, num_characters), num_characters)


def test_of_equal_targets_those_drawn_lie_anywhere() -> None:
    mask = np.zeros(SHAPE, bool)
    for y, x in np.random.default_rng(5).integers(0, (75, 100), (900, 2)) * 4:
        mask[y : y + 2, x : x + 2] = True
    drawn = draw_mask(mask, 500)
    assert "are not drawn" in drawn.note
    for places, side in zip(np.nonzero(shown(drawn, SHAPE)), SHAPE, strict=True):
        assert abs(places.mean() / side - 0.5) < 0.08 and places.min() < 0.2 * side and places.max() > 0.8 * side


@pytest.mark.parametrize("seed", [242, 1124])
def test_threads_keep_their_ends(seed: int) -> None:
    """Simplifying cuts them short, as it measures from a line without ends: such outlines are not shown."""
    rng, mask = np.random.default_rng(seed), np.zeros((801, 1000), np.uint8)
    for _ in range(int(rng.integers(1, 30))):
        points = rng.integers(0, [1000, 801], (int(rng.integers(2, 5)), 2)).astype(np.int32)
        points[1:] = points[0] + rng.integers(-60, 60, (len(points) - 1, 2))
        cv2.polylines(mask, [points], False, 1, int(rng.integers(1, 4)))
    threads = mask.astype(bool)
    num_characters = int(0.8 * len(outline_path(threads, 10**6) or ""))
    check(threads, draw_mask(threads, num_characters), num_characters)


def test_each_way_of_drawing_is_taken_where_it_should_be() -> None:
    ways = [draw_mask(MASKS["many"], num) for num in (100_000, 7_000, 1_250, 40)]
    assert [(bool(one.path), bool(one.picture), bool(one.note)) for one in ways] == [
        (True, False, False),
        (False, True, False),
        (False, True, True),
        (False, False, True),
    ]
    assert np.array_equal(shown(draw_mask(MASKS["grid"], 7_000), SHAPE), MASKS["grid"])  # to the pixel
    assert "(none is)" in ways[3].note and "(only the largest are)" in ways[2].note


@pytest.mark.parametrize("num_characters", [60, 3_750])
def test_large_masks_are_drawn_at_a_pages_size(num_characters: int) -> None:
    mask = np.kron(MASKS["few"], np.ones((10, 10), bool))
    assert max(mask.shape) > LARGEST_SIDE_PX
    drawn = draw_mask(mask, num_characters)
    check(mask, drawn, num_characters)
    assert bool(drawn.note) == (num_characters == 60)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (7, 5)])
@pytest.mark.parametrize("value", [False, True])
def test_masks_that_are_all_or_nothing(shape: tuple[int, int], value: bool) -> None:
    drawn = draw_mask(np.full(shape, value), 100)
    assert bool(drawn.path) == value and not drawn.picture and not drawn.note
    assert shown(drawn, shape).all() if value else drawn.path == ""


def test_a_mask_that_was_read_is_drawn_as_it_was() -> None:
    read_again = images.decode_mask(images.encode_mask(MASKS["few"]), "a.png")  # its bytes are not 0 and 1
    for num_characters in (600, 3_750, 42_000):
        assert draw_mask(read_again, num_characters) == draw_mask(MASKS["few"], num_characters)


@pytest.mark.parametrize("index", range(6))
def test_outlines_enclose_their_masks(index: int) -> None:
    mask = blob(60, 96, index)
    path = outline_path(mask)
    assert path is not None and bool(path) == mask.any()
    assert (fill(rings_of(path), mask.shape) ^ mask).sum() <= 0.05 * max(1, mask.sum())


def test_the_smallest_targets_keep_their_outlines() -> None:
    mask = np.zeros((201, 303), bool)
    mask.flat[np.random.default_rng(0).integers(0, mask.size, 150)] = True  # a pixel each
    path = outline_path(mask, 10_000)
    assert path is not None and fill(rings_of(path), mask.shape)[mask].all()
