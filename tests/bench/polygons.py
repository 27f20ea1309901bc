"""Outlines of targets: seconds and peak memory of a million, and the time against two other ways.

    python -m tests.bench.polygons [SIDE of the labels of the comparison, 4096]

Comparison: labels to GeoJSON on one thread, by the former way (one target after another, by OpenCV's contours on a grid
twice as fine) and by GDAL (`rasterio.features.shapes`, as text by json). Then a made slide of 32768 px square with a
million targets, in a process of its own: labels from the stitched mask, outlines, GeoJSON, and GeoParquet too.
"""

import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import shapely

from stas_core.arrays import Labels, ProbMapU8
from stas_core.predict.geojson import GeoJsonWriter, to_geojson
from stas_core.predict.geoparquet import GeoParquetWriter
from stas_core.predict.placement import Placement, TargetFacts
from stas_core.predict.polygons import trace_shapes
from stas_core.predict.postprocess import PostprocessConfig, StepConfig, Targets, find_targets
from stas_core.slides.polygons import trace_targets
from stas_core.slides.stitching import postprocess_slide

PERIOD_PX = 4096
STEP = StepConfig(drop=128, high=128, core=128, ratio=0, low=128)
AS_IT_IS = PostprocessConfig(
    steps=(STEP,), closing_count=0, border_fill="none", max_hole_px=0, min_target_px=0, max_foreground_share=None
)


def made_map(side: int) -> ProbMapU8:
    """Small blobs over a fifth of the map, some of them with holes."""
    rng = np.random.default_rng(0)
    blobs = cv2.GaussianBlur(rng.standard_normal((side, side), np.float32), (0, 0), 4.6)
    return np.where((blobs / blobs.std() > 0.85) & (rng.random((side, side)) > 0.0005), 200, 0).astype(np.uint8)


class MadeSlide:
    """A slide of any size that repeats one map."""

    def __init__(self, side: int, period: ProbMapU8) -> None:
        self.size = (side, side)
        self._period = period

    def is_blank(self, y0: int, x0: int, height: int, width: int) -> bool:
        return False

    def read(self, y0: int, x0: int, height: int, width: int) -> ProbMapU8:
        y, x = y0 % PERIOD_PX, x0 % PERIOD_PX
        return self._period[y : y + height, x : x + width]


def ours(labels: Labels, targets: Targets) -> int:
    return len(to_geojson(trace_shapes(labels), TargetFacts("made", targets)))


def formerly(labels: Labels, targets: Targets) -> int:
    from stas_core.data.edges import outlines  # not into the process whose memory is measured

    features = []
    for number, (x0, y0, x1, y1) in enumerate(targets.bbox.tolist(), start=1):
        (rings,) = outlines(labels[y0:y1, x0:x1] == number)
        coordinates = [
            [*(ring + (x0 + 0.5, y0 + 0.5)).tolist(), (ring[0] + (x0 + 0.5, y0 + 0.5)).tolist()] for ring in rings
        ]
        features.append(feature(number, {"type": "Polygon", "coordinates": coordinates}, targets))
    return len(json.dumps({"type": "FeatureCollection", "features": features}))


def by_gdal(labels: Labels, targets: Targets) -> int:
    import rasterio.features  # not into the process whose memory is measured

    found = rasterio.features.shapes(labels, mask=labels > 0, connectivity=4)
    features = [feature(int(number), geometry, targets) for geometry, number in found]
    return len(json.dumps({"type": "FeatureCollection", "features": features}))


def feature(number: int, geometry: dict[str, object], targets: Targets) -> dict[str, object]:
    row = number - 1
    measurements = {"Area px": int(targets.area_px[row]), "Mean probability": float(targets.mean_prob[row])}
    properties = {"objectType": "annotation", "name": f"STAS {number}", "measurements": measurements}
    return {"type": "Feature", "id": f"made-{number}", "geometry": geometry, "properties": properties}


def side_by_side(side: int, repeats: int = 3) -> None:
    prob_u8 = made_map(side)
    labels, targets = find_targets(prob_u8 > 0, prob_u8)
    shapes = trace_shapes(labels).geometry
    assert shapely.is_valid(shapes).all() and (shapely.area(shapes) == targets.area_px).all()
    ways: dict[str, Callable[[Labels, Targets], int]] = {"ours": ours, "formerly": formerly, "by GDAL": by_gdal}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.process_time()
            way(labels, targets)
            times[name].append(time.process_time() - start)
    median = {name: statistics.median(taken) for name, taken in times.items()}
    print(f"{side} px square, {len(targets)} targets, one thread, medians of {repeats} turns")
    print(f"labels to GeoJSON: {1e6 * median['ours'] / len(targets):.0f} us a target")
    print(f"time of the former way / ours: {median['formerly'] / median['ours']:.1f}")
    print(f"time of GDAL / ours: {median['by GDAL'] / median['ours']:.1f}")


def peak_mb() -> float:
    """Return the peak of this program alone: that of getrusage includes the process that started it."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def a_million(folder: str, with_table: bool) -> None:
    pa.set_memory_pool(pa.system_memory_pool())  # as the task that finishes slides does
    slide = MadeSlide(8 * PERIOD_PX, np.load(f"{folder}/map.npy", mmap_mode="r"))
    stitched = postprocess_slide(slide, AS_IT_IS)
    before_mb = peak_mb()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    start_mb = peak_mb()
    facts = TargetFacts("made", stitched.targets, Placement(level0_px=2, corner=(100, 200), mpp=0.5))
    start = time.process_time()
    with Path(folder, "made.geojson").open("wb") as file, GeoJsonWriter(file, facts) as geojson:
        if with_table:
            with GeoParquetWriter(f"{folder}/made.parquet", facts) as table:
                for shapes in trace_targets(stitched):
                    geojson.write(shapes)
                    table.write(shapes)
        else:
            for shapes in trace_targets(stitched):
                geojson.write(shapes)
    took = time.process_time() - start
    size_mb = Path(folder, "made.geojson").stat().st_size / 1e6
    what = "GeoJSON and GeoParquet" if with_table else "GeoJSON"
    print(
        f"{len(stitched.targets)} targets to {what}: {took:.1f} s of processor time (bar for GeoJSON: 60), peak "
        f"{peak_mb():.0f} MB (bar: 500), {start_mb:.0f} of it there before; GeoJSON of {size_mb:.0f} MB; the peak of "
        f"post-processing was {before_mb:.0f} MB",
        flush=True,
    )


def main() -> None:
    cv2.setNumThreads(1)
    if sys.argv[1:2] == ["million"]:
        return a_million(sys.argv[2], sys.argv[3] == "table")
    side_by_side(int(sys.argv[1]) if len(sys.argv) > 1 else PERIOD_PX)
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/map.npy", made_map(PERIOD_PX))
        for files in ("geojson", "table"):
            subprocess.run([sys.executable, "-m", "tests.bench.polygons", "million", folder, files], check=True)
    return None


if __name__ == "__main__":
    main()
