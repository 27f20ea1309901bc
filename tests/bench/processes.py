"""What each kind of process loads: memory, processor time, heavy packages; beside numpy, OpenCV, Arrow and pydantic.

    python -m tests.bench.processes

A fresh interpreter for each, in turns; medians of three.
"""

import json
import statistics
import subprocess
import sys

ROUNDS = 3
BASELINE = "numpy, cv2, pyarrow, pydantic"
KINDS = {
    BASELINE: "import numpy, cv2, pyarrow, pydantic",
    "the reader that can be ended": "import workflows.scoring.guarded_reader",
    "reading and finishing images": "import workflows.scoring.tasks",
    "predicting actor": "import workflows.scoring.actor",
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


def measure(statement: str) -> tuple[float, float, list[str]]:
    """Return MB, CPU seconds and heavy packages of a fresh interpreter after a statement."""
    program = PROGRAM.format(statement=statement, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    megabytes, seconds, loaded = json.loads(done.stdout.splitlines()[-1])
    return megabytes, seconds, loaded


def main() -> None:
    runs = [{kind: measure(statement) for kind, statement in KINDS.items()} for _ in range(ROUNDS)]
    base_mb, base_s = (statistics.median(run[BASELINE][index] for run in runs) for index in (0, 1))
    for kind in KINDS:
        megabytes, seconds = (statistics.median(run[kind][index] for run in runs) for index in (0, 1))
        loaded = ", ".join(runs[0][kind][2]) or "none"
        print(
            f"{kind}: {megabytes:.0f} MB ({megabytes / base_mb:.2f}), {seconds:.2f} CPU s ({seconds / base_s:.2f}); "
            f"heavy packages: {loaded}"
        )


if __name__ == "__main__":
    main()
