"""Score 2,000 ids, 20 of them bad: what comes out, and the memory of all processes on the way.

    python -m tests.bench.score_memory [--names 2000] [--out memory.png]

100 distinct phantom fields of 572 x 314 px, each under 20 names, an untrained tiny network, a Ray of this machine.
Memory is the proportional set size (shared pages counted once) of the driver and everything it started.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
from PIL import Image

from stas_core.data import images
from stas_core.data.phantom import PhantomConfig, make_phantom
from stas_core.scored_runs import MASKS, RECORDS, ScoredRun
from tests.conftest import ROOT
from tests.workflows.made import make_ensemble, write_config

NUM_BAD = 20


def make_names(folder: Path, num_names: int) -> Counter[str]:
    """Write the images; return how many failures of each reason are expected."""
    folder.mkdir()
    phantom = PhantomConfig(num_images=100, height=314, width=572)
    data = [images.encode_jpeg(make_phantom(phantom, index).image) for index in range(100)]
    for index in range(num_names - NUM_BAD):
        (folder / f"field_{index:05d}.jpg").write_bytes(data[index % 100])
    grey = Image.new("L", (64, 64))
    for index in range(NUM_BAD // 4):
        (folder / f"empty_{index}.jpg").touch()
        (folder / f"truncated_{index}.jpg").write_bytes(data[index][:5000])
        grey.save(folder / f"grey_{index}.png")
        os.mkfifo(folder / f"blocking_{index}.png")
    return Counter(dict.fromkeys(("empty_file", "unreadable_image", "wrong_channels", "slow"), NUM_BAD // 4))


def used_mb(parent: psutil.Process) -> float:
    total = 0
    for process in [parent, *parent.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it ended between the two calls
            continue
    return total / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=None, help="draw the curve as a PNG")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = make_names(folder / "images", arguments.names)
        limits = {"timeout_s": 2.0}
        config = write_config(
            folder / "score.yaml",
            folder / "images",
            make_ensemble(folder / "run"),
            folder / "out",
            limits=limits,
            resources={"object_store_mb": 128},
            max_failed_fraction=0.05,
        )
        line = [sys.executable, str(ROOT / "workflows" / "score_images.py"), "--config", str(config)]
        curve = follow(line, folder / "out" / RECORDS)
        run = ScoredRun(str(folder / "out"))
        found = Counter(failure.reason for failure in run.failures())
        num_masks = len(run.files(MASKS))
    print(f"{num_masks} masks; failures {dict(found)}, as expected: {found == expected}")
    for share in (0.25, 0.5, 1.0):
        count = share * (arguments.names - NUM_BAD)
        near = [mb for done, mb in curve if 0.8 * count <= done <= count]
        mean = sum(near) / len(near)
        print(f"the fifth of the run before image {count:.0f}: {mean:.0f} MB on average, {max(near):.0f} MB at most")
    if arguments.out is not None:
        draw(curve, arguments.out)


def follow(line: list[str], records: Path) -> list[tuple[int, float]]:
    """Run the command; return (images done, MB used) over time."""
    start, curve = time.monotonic(), []
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            done = len(list(records.iterdir())) if records.exists() else 0
            if done:
                curve.append((done, used_mb(tree)))
            time.sleep(2)
        assert process.stdout is not None
        print("".join(process.stdout.readlines()[-6:]), end="")
    print(f"{time.monotonic() - start:.0f} s, exit status {process.returncode}")
    return curve


def draw(curve: list[tuple[int, float]], out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot(xlabel="Images done", ylabel="Memory of all processes (MB)")
    axes.plot(*zip(*curve, strict=True))
    axes.set_ylim(bottom=0)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main()
