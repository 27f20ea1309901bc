"""Annotation to mask: exactness and ms per field, against PIL, scikit-image and OpenCV.

    python tests/bench/rasterise.py [FOLDER of labelme files]

On the outlines of made fields, or the annotations given. Exact means equal to the published rule, pixel for pixel.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw
from skimage.draw import polygon2mask

from stas_core.data.annotations import rasterise
from stas_core.data.labelme import parse_labelme
from stas_core.data.phantom import PhantomConfig, make_phantom
from stas_core.data.shapes import Annotation, Polygon

Draw = Callable[[Annotation, tuple[int, int]], np.ndarray]


def by_pil(annotation: Annotation, size: tuple[int, int]) -> np.ndarray:
    image = Image.new("1", (size[1], size[0]))
    for shape in annotation.shapes:
        ImageDraw.Draw(image).polygon([(x, y) for x, y in shape.points.tolist()], fill=1)
    return np.asarray(image)


def by_opencv(annotation: Annotation, size: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    for shape in annotation.shapes:
        cv2.fillPoly(mask, [np.round(shape.points * 16).astype(np.int32)], 1, shift=4)
    return mask > 0


def by_skimage(annotation: Annotation, size: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(size, bool)
    for shape in annotation.shapes:
        outline: Polygon = shape.points[:, ::-1]
        mask |= polygon2mask(size, outline)
    return mask


def by_us(annotation: Annotation, size: tuple[int, int]) -> np.ndarray:
    return rasterise(annotation, size)[0]


def main() -> None:
    cv2.setNumThreads(0)
    if len(sys.argv) > 1:
        files = [path.read_bytes() for path in sorted(Path(sys.argv[1]).glob("*.json"))]
    else:
        files = [make_phantom(PhantomConfig(), index).labelme for index in range(20)]
    fields = [parse_labelme(data, "field") for data in files]
    sizes = [(field.height or 942, field.width or 1716) for field in fields]
    exact = [by_us(field, size) for field, size in zip(fields, sizes, strict=True)]
    methods: dict[str, Draw] = {"ours": by_us, "PIL": by_pil, "skimage": by_skimage, "cv2": by_opencv}
    times: dict[str, list[float]] = {name: [] for name in methods}
    dice: dict[str, list[float]] = {name: [] for name in methods}
    for field, size, truth in zip(fields, sizes, exact, strict=True):
        for name, draw in methods.items():
            start = time.perf_counter()
            mask = draw(field, size)
            times[name].append(1000 * (time.perf_counter() - start))
            dice[name].append(2 * int((mask & truth).sum()) / max(1, int(mask.sum()) + int(truth.sum())))
    for name in methods:
        same = sum(value == 1 for value in dice[name])
        print(
            f"{name:8s} {statistics.median(times[name]):7.2f} ms a field   Dice to the rule: mean "
            f"{statistics.mean(dice[name]):.4f}, min {min(dice[name]):.4f}; exact on {same} of {len(fields)}"
        )


if __name__ == "__main__":
    main()
