"""Targets as GeoJSON that QuPath imports, written as they come: memory does not grow with their number.

Equal targets give equal bytes: ids follow from the image and the number, and nothing holds the time.
"""

import gzip
import io
import json
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stas_core.predict.exports import target_id
from stas_core.predict.placement import TargetFacts
from stas_core.predict.polygons import TargetShapes

FORMAT = "2"
"""Changes where the same targets come out as other bytes: files of another one are written anew."""
MAX_ANNOTATIONS = 2000
"""QuPath grows slow with more annotations; more targets are detections, which it shows by the million."""
_CORNERS_AT_ONCE = 1 << 16
_POLYGON = ('","geometry":{"type":"Polygon","coordinates":[[', "]]}")
_MULTIPOLYGON = ('","geometry":{"type":"MultiPolygon","coordinates":[[[', "]]]}")
_CLASS = '"classification":{"name":"STAS","color":[255,200,0]}'


@runtime_checkable
class Sink(Protocol):
    """An open file, or what takes bytes like one."""

    def write(self, data: bytes, /) -> object:
        """Take bytes."""

    def flush(self) -> object:
        """Pass on what was taken."""


class GeoJsonWriter:
    """Writes a feature per target: a polygon, or a multipolygon, with its measurements.

    Example:
        >>> from stas_core.predict.postprocess import find_targets
        >>> from stas_core.predict.polygons import trace_shapes
        >>> mask = np.zeros((4, 5), bool)
        >>> mask[1:3, 1:4] = True
        >>> labels, targets = find_targets(mask, np.full((4, 5), 255, np.uint8))
        >>> sink = io.BytesIO()
        >>> with GeoJsonWriter(sink, TargetFacts("0007", targets)) as writer:
        ...     writer.write(trace_shapes(labels))
        >>> json.loads(sink.getvalue())["features"][0]["geometry"]
        {'type': 'Polygon', 'coordinates': [[[1, 1], [1, 3], [4, 3], [4, 1], [1, 1]]]}
    """

    def __init__(
        self, sink: Sink, facts: TargetFacts, *, compress: bool = False, max_annotations: int = MAX_ANNOTATIONS
    ) -> None:
        """Begin a file.

        Args:
            sink: where it goes; it stays open.
            facts: what is said of the targets.
            compress: write gzip.
            max_annotations: with more targets they are detections.
        """
        self._packed = gzip.GzipFile("", "wb", compresslevel=6, fileobj=sink, mtime=0) if compress else None
        self._sink: Sink = self._packed or sink
        self._facts = facts
        self._measurements = _measurements(facts)
        self._lines = tuple(_lines(facts, axis) for axis in (0, 1))
        kind = "annotation" if len(facts.targets) <= max_annotations else "detection"
        self._properties = f',"properties":{{"objectType":"{kind}","name":"STAS '
        self._separator = b""
        head = json.dumps(facts.record(), separators=(",", ":"), ensure_ascii=False)
        self._sink.write(f'{{"type":"FeatureCollection","metadata":{head},"features":['.encode())

    def write(self, shapes: TargetShapes) -> None:
        """Add targets."""
        for some in shapes.batches(_CORNERS_AT_ONCE):
            self._sink.write(self._separator + self._features(some))
            self._separator = b","

    def close(self) -> None:
        """End the file; it is no GeoJSON before."""
        self._sink.write(b"]}")
        if self._packed:
            self._packed.close()

    def __enter__(self) -> "GeoJsonWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None:
            self.close()

    def _features(self, shapes: TargetShapes) -> bytes:
        # Arrow joins columns of text: Python would take minutes for a million targets.
        image_id, rows = self._facts.image_id, shapes.numbers - 1
        several = pa.array(np.diff(shapes.targets) > 1)
        measured = [_measured(name, values[rows]) for name, values in self._measurements]
        features: Any = pc.binary_join_element_wise(
            '{"type":"Feature","id":"',
            pa.array([target_id(image_id, number) for number in shapes.numbers.tolist()]),
            pc.if_else(several, _MULTIPOLYGON[0], _POLYGON[0]),
            self._coordinates(shapes),
            pc.if_else(several, _MULTIPOLYGON[1], _POLYGON[1]),
            self._properties,
            pa.array(shapes.numbers).cast(pa.string()),
            f'",{_CLASS},"measurements":{{',
            pc.binary_join_element_wise(*measured, ",", null_handling="skip"),
            "}}}",
            "",
        )
        together: Any = pc.binary_join(pa.ListArray.from_arrays(pa.array([0, len(shapes)], pa.int32()), features), ",")
        return bytes(together.buffers()[2] or b"")

    def _coordinates(self, shapes: TargetShapes) -> Any:
        """Return the text of each target's rings, but for the outer brackets."""
        x, y = (lines.take(pa.array(px)) for lines, px in zip(self._lines, shapes.corners.T, strict=True))
        texts: Any = pc.binary_join_element_wise(x, y, ",")
        for offsets, between in ((shapes.rings, ","), (shapes.polygons, "],["), (shapes.targets, "]],[[")):
            texts = pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), texts), between)
        return texts


def to_geojson(shapes: TargetShapes, facts: TargetFacts, *, compress: bool = False) -> bytes:
    """Return all targets of an image at once; see `GeoJsonWriter`."""
    sink = io.BytesIO()
    write_geojson(sink, [shapes], facts, compress=compress)
    return sink.getvalue()


def write_geojson(sink: Sink, shapes: Iterable[TargetShapes], facts: TargetFacts, *, compress: bool = False) -> None:
    """Write all targets of an image; see `GeoJsonWriter`."""
    with GeoJsonWriter(sink, facts, compress=compress) as writer:
        for some in shapes:
            writer.write(some)


def _measurements(facts: TargetFacts) -> list[tuple[str, np.ndarray]]:
    targets = facts.targets
    known = {f"area_{facts.placement.area_unit}": facts.area}
    known |= {"mean_probability": targets.mean_prob, "peak_probability": targets.peak_prob}
    known |= {name: values for name, values in facts.columns.items() if values is not None}
    return [(_title(name), values) for name, values in known.items()]


def _title(name: str) -> str:
    """Return a column's name as QuPath shows it: `area_um2` is "Area um^2"."""
    words = [f"{word[:-1]}^2" if word in ("px2", "um2", "mm2") else word for word in name.split("_")]
    title = " ".join(words)
    return json.dumps(title[:1].upper() + title[1:], ensure_ascii=False)[1:-1]


def _measured(name: str, values: np.ndarray) -> Any:
    """Return the text of a measurement; null where it is not finite."""
    rounded = np.round(values.astype(np.float64), 4) + 0.0  # no negative zero
    texts = pa.array(rounded, mask=~np.isfinite(rounded)).cast(pa.string())
    return pc.binary_join_element_wise(f'"{name}":', texts, "")


def _lines(facts: TargetFacts, axis: int) -> Any:
    """Return one side of the text of points for each line of pixels on which targets can have corners, from 0."""
    bbox = facts.targets.bbox
    most = int(bbox[:, 2 + axis].max()) if len(bbox) else 0
    lines = facts.placement.on_level0(np.arange(most + 1), axis).tolist()
    texts = [str(int(value)) if value.is_integer() else repr(value) for value in lines]
    return pa.array([f"[{text}" for text in texts] if axis == 0 else [f"{text}]" for text in texts])
