"""What each kind of process loads: memory, processor time, heavy packages; beside numpy, OpenCV, Arrow and pydantic.

    python -m tests.bench.processes

A fresh interpreter for each, in turns; medians of three.
"""

import json
import statistics
import subprocess
import sys
from typing import NamedTuple

ROUNDS = 3
BASELINE = "numpy, cv2, pyarrow, pydantic"
KINDS = {
    BASELINE: "import numpy, cv2, pyarrow, pydantic",
    "the reader that can be ended": "import workflows.scoring.guarded_reader",
    "reading and finishing images": "import workflows.scoring.tasks",
    "pipeline of a scoring run": "import workflows.scoring.pipeline",
    "predicting actor": "import workflows.scoring.actor",
    "controller of a fold": "import workflows.folds.launch",
    "training worker": "import workflows.folds.worker",
    "study of thresholds": "import stas_core.search.threshold_search",
    "prepare_data --help": "import workflows.prepare_data",
    "train_folds --help": "import workflows.train_folds",
    "score_images --help": "import workflows.score_images",
    "pipeline --help": "import workflows.pipeline",
}
HEAVY = ("torch", "torchvision", "timm", "albumentations", "matplotlib", "scipy", "skimage", "pandas", "optuna", "ray")
PROGRAM = """
import json, resource, sys
{statement}
used = resource.getrusage(resource.RUSAGE_SELF)
loaded = [name for name in {heavy!r} if name in sys.modules]
print(json.dumps([used.ru_maxrss / 1024, used.ru_utime + used.ru_stime, loaded]))
"""


class Use(NamedTuple):
    """What a fresh interpreter took for a statement."""

    megabytes: float
    cpu_s: float
    heavy: list[str]


def measure(statement: str) -> Use:
    program = PROGRAM.format(statement=statement, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return Use(*json.loads(done.stdout.splitlines()[-1]))


def median(uses: list[Use]) -> Use:
    megabytes = statistics.median(use.megabytes for use in uses)
    return Use(megabytes, statistics.median(use.cpu_s for use in uses), uses[0].heavy)


def main() -> None:
    runs = [{kind: measure(statement) for kind, statement in KINDS.items()} for _ in range(ROUNDS)]
    medians = {kind: median([run[kind] for run in runs]) for kind in KINDS}
    base = medians[BASELINE]
    for kind, use in medians.items():
        print(
            f"{kind}: {use.megabytes:.0f} MB ({use.megabytes / base.megabytes:.2f}), {use.cpu_s:.2f} CPU s "
            f"({use.cpu_s / base.cpu_s:.2f}); heavy packages: {', '.join(use.heavy) or 'none'}"
        )


if __name__ == "__main__":
    main()
