"""COCO: one JSON for many images, with polygons and RLE in px from each image's upper left corner.

Polygons have no holes; RLE, plain or compressed, says any pixels. Several polygons of an annotation are united. An
annotation without a segmentation is a box, which has no area here. An image's id is its file's name without suffix.

The file that was read last is kept: each of its images is measured on its own.
"""

import functools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco

from stas_core.arrays import Mask
from stas_core.data import ids
from stas_core.data.file_limits import parse_json, shown
from stas_core.data.shapes import CORNER_PX, Annotation, Polygon, RunPixels, Shape
from stas_core.errors import DuplicateId, InputError, MissingAnnotation, UnreadableAnnotation

MAX_VALUES = 8_000_000
"""Of a file; see `file_limits.MAX_VALUES`."""
Id = int | str


@dataclass(frozen=True)
class CocoFile:
    """What a file says, by image id."""

    images: dict[str, tuple[Annotation, ...]]
    """Several where images of several folders have one name."""

    def annotation_of(self, image_id: str, name: str) -> Annotation:
        """Return what it says of an image: the only one, whatever its name, or that of this id (`ids.as_file`).

        Raises:
            MissingAnnotation, DuplicateId: naming the file.
        """
        found = self._by_key.get(ids.as_file(image_id), ())
        if not found and len(self.images) == 1:
            (found,) = self.images.values()
        if not found:
            raise MissingAnnotation(
                f"{name} is a COCO file of {len(self.images)} images, none of them called {image_id}; add it there"
            )
        if len(found) > 1:
            paths = ", ".join(shown(one.image_path) for one in found[:3])
            raise DuplicateId(f"{name} names {len(found)} images {image_id} ({paths}); ids must be unique, rename one")
        return found[0]

    @functools.cached_property
    def _by_key(self) -> dict[str, tuple[Annotation, ...]]:
        found: dict[str, tuple[Annotation, ...]] = {}
        for image_id, some in self.images.items():
            key = ids.as_file(image_id)
            found[key] = (*found.get(key, ()), *some)
        return found

    def count_labels(self) -> dict[str, int]:
        """Count the shapes of each label, in all images."""
        total = Counter[str]()
        for found in self.images.values():
            for one in found:
                total.update(one.count_labels())
        return dict(sorted(total.items()))


def read(data: bytes, name: str) -> CocoFile | None:
    """Read a COCO file; None: it is none.

    Raises:
        UnreadableAnnotation, OversizedAnnotation: naming the file.
    """
    if not all(key in data for key in (b'"images"', b'"annotations"')):
        return None
    try:
        return _read(data)
    except InputError as error:
        raise type(error)(f"{name}: {error}") from error


@functools.lru_cache(maxsize=1)
def _read(data: bytes) -> CocoFile | None:
    """Read a file whose name is not known: it has another one for each of its images."""
    try:
        values = parse_json(data, "the file", MAX_VALUES)
    except UnicodeDecodeError as error:
        raise UnreadableAnnotation(f"the file is not JSON: {error}; save it as UTF-8") from error
    keys = ("images", "annotations")
    if not isinstance(values, dict) or "shapes" in values or not all(isinstance(values.get(key), list) for key in keys):
        return None
    try:
        return _from_json(values)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UnreadableAnnotation(
            f"the file is not COCO ({type(error).__name__}: {error}); expected `images`, `annotations` and "
            "`categories` as lists of objects with their ids"
        ) from error


def _from_json(values: Any) -> CocoFile:
    labels = _by_id(values.get("categories", []), "category")
    images = _by_id(values["images"], "image")
    shapes: dict[Id, list[Shape]] = {image: [] for image in images}
    for annotation in values["annotations"]:
        image, category = annotation["image_id"], annotation["category_id"]
        for key, value, known in (("image_id", image, images), ("category_id", category, labels)):
            if not isinstance(value, (int, str)) or value not in known:
                raise ValueError(f"annotation {shown(annotation.get('id'))} has {key} {shown(value)}, which it lacks")
        size = _size(images[image])
        shapes[image] += _shapes(annotation.get("segmentation"), str(labels[category]["name"]), size)
    found: dict[str, tuple[Annotation, ...]] = {}
    for image, facts in images.items():
        path, (height, width) = facts["file_name"], _size(facts)
        if not isinstance(path, str) or not path:
            raise TypeError(f"file_name of image {shown(image)} is {shown(path)}")
        one = Annotation(tuple(shapes[image]), height, width, path, format="coco")
        image_id = id_of(path)
        found[image_id] = (*found.get(image_id, ()), one)
    return CocoFile(found)


def id_of(path: str) -> str:
    """Return the id of an image by its path in a file."""
    name = path.replace("\\", "/").rpartition("/")[2]
    return name.rpartition(".")[0] or name


def _by_id(items: Any, what: str) -> dict[Id, Any]:
    found: dict[Id, Any] = {}
    for item in items:
        key = item["id"]
        if not isinstance(key, (int, str)) or key in found:
            raise ValueError(f"the {what} id {shown(key)} is there twice, or no number")
        found[key] = item
    return found


def _size(image: Any) -> tuple[int, int]:
    height, width = image["height"], image["width"]
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in (height, width)):
        raise ValueError(f"image {shown(image['id'])} has height {shown(height)} and width {shown(width)}")
    return height, width


def _shapes(segmentation: Any, label: str, size: tuple[int, int]) -> list[Shape]:
    if isinstance(segmentation, dict):
        height, width = segmentation["size"]
        if (height, width) != size:
            raise ValueError(f"an RLE of {shown([height, width])} in an image of {list(size)} (height, width)")
        box = np.array([[0, 0], [width - 1, height - 1]], np.float64)
        return [Shape(label, "mask", box, RunPixels(_runs(segmentation["counts"], size), size))]
    polygons = [_polygon(values) for values in segmentation or ()]
    if not polygons:
        return [Shape(label, "box", np.zeros((0, 2)), shift_px=CORNER_PX)]
    return [Shape(label, "polygon", points, shift_px=CORNER_PX) for points in polygons]


def _polygon(values: Any) -> Polygon:
    if not isinstance(values, list) or len(values) % 2 or not all(isinstance(value, (int, float)) for value in values):
        raise ValueError(f"a polygon {shown(values)} is no list of x, y, x, y...")
    return np.array([float(value) for value in values], np.float64).reshape(-1, 2)


def _runs(counts: Any, size: tuple[int, int]) -> npt.NDArray[np.int64]:
    """Return run lengths that add up to all pixels: what draws them may rely on it."""
    num_px = size[0] * size[1]
    runs = decompress(counts) if isinstance(counts, str) else counts
    if not all(isinstance(run, int) and 0 <= run <= num_px for run in runs) or sum(runs) != num_px:
        raise ValueError(f"an RLE whose runs do not add up to the {num_px} px of its image")
    return np.array(runs, np.int64)


def decompress(text: str) -> list[int]:
    """Return the runs of a compressed RLE: base 32 digits, the lowest first; from the third on differences.

    >>> decompress("52203")
    [5, 2, 2, 2, 5]
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        digit = ord(character) - 48
        if not 0 <= digit < 64:
            raise ValueError(f"a compressed RLE holds {shown(character)}")
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            if shift > 60:
                raise ValueError("a compressed RLE holds a number of more than 60 bits")
            continue
        if digit & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("a compressed RLE that is cut short")
    return runs


def annotations_of(targets: Iterable["Sequence[Polygon] | Mask"]) -> list[dict[str, Any]]:
    """Return what a file says of an image's targets, but for the ids."""
    return [_pixels(one) if isinstance(one, np.ndarray) else _polygons(one) for one in targets]


def _polygons(polygons: Sequence[Polygon]) -> dict[str, Any]:
    points = np.concatenate(polygons)
    (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    area = sum(abs(_signed_area(ring)) for ring in polygons)
    segmentation = [ring.ravel().tolist() for ring in polygons]
    return {"segmentation": segmentation, "area": area, "bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0}


def _signed_area(ring: Polygon) -> float:
    x, y = ring.T
    return float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2)


def _pixels(mask: Mask) -> dict[str, Any]:
    packed = coco.encode(np.asfortranarray(mask.view(np.uint8)))
    box, area = coco.toBbox(packed).tolist(), int(coco.area(packed))
    segmentation = {"size": list(mask.shape), "counts": packed["counts"].decode()}
    return {"segmentation": segmentation, "area": area, "bbox": box, "iscrowd": 0}


def to_coco(images: Sequence[tuple[str, tuple[int, int], Sequence[dict[str, Any]]]], *labels: str) -> bytes:
    """Write a file of images: the path, the (height, width) and the `annotations_of` of each.

    Annotations are of the first label, but for those that say another `category_id`, from 1.
    """
    listed: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (path, (height, width), found) in enumerate(images, start=1):
        listed.append({"id": number, "file_name": path, "height": height, "width": width})
        for one in found:
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": 1, **one})
    categories = [{"id": number, "name": label} for number, label in enumerate(labels, start=1)]
    values = {"images": listed, "annotations": annotations, "categories": categories}
    return json.dumps(values, separators=(",", ":")).encode()
