"""Phantom slides: Mpx/s on one core and memory as the slide grows, beside the painters of fields.

    python -m tests.bench.phantom_slides [SIDE of the smallest slide, 8192]

Slides of 1, 4 and 16 times the area, each in a process of its own; the fields are those of a phantom cohort, of
published size. Slides are written to a temporary folder: pyramid, mask and outlines, as a stage has them made.
"""

import statistics
import subprocess
import sys
import tempfile
import time

import cv2

from stas_core.data.phantom import PhantomConfig, make_phantom

MEASURED = """
import resource, sys, time
from pathlib import Path
import cv2
from stas_core.slides.phantom import PhantomSlideConfig, make_slide

cv2.setNumThreads(1)
side = int(sys.argv[1])
start = time.process_time()
make_slide(PhantomSlideConfig(width_px=side, height_px=side), 0, Path(sys.argv[2]))
print(time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def main() -> None:
    cv2.setNumThreads(1)
    config, times = PhantomConfig(), []
    for index in range(5):
        start = time.process_time()
        make_phantom(config, index)
        times.append(time.process_time() - start)
    fields = config.height * config.width / 1e6 / statistics.median(times)
    print(f"fields: {fields:.1f} Mpx/s")
    smallest = int(sys.argv[1]) if len(sys.argv) > 1 else 8192
    for times_larger in (1, 2, 4):
        side = smallest * times_larger
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", MEASURED, str(side), folder]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, rss_mb = map(float, done.stdout.split())
        speed = side * side / 1e6 / seconds
        print(f"slide of {side} px: {speed:.1f} Mpx/s, {speed / fields:.1f} times that of fields; {rss_mb:.0f} MB RSS")


if __name__ == "__main__":
    main()
