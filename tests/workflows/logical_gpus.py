"""Run stages one after the other on a Ray that believes it has a GPU.

    python -m tests.workflows.logical_gpus <stage> <config.yaml> [<stage> <config.yaml> ...]

Between them, all that a stage held must become free.
"""

import importlib
import sys
import time
from pathlib import Path

import workflows  # noqa: F401 - before Ray: sets the environment that Ray reads when it is imported

import ray  # isort: skip

from stas_core import config
from stas_core.config import Config
from workflows.cluster import ray_session


def config_class(module: object) -> type[Config]:
    """Return the settings of a stage: the class of `run`'s first argument."""
    found: type[Config] = module.run.__annotations__["config"]  # type: ignore[attr-defined]
    return found


def main() -> None:
    with ray_session(num_cpus=2, num_gpus=1):
        for name, path in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
            module = importlib.import_module(f"workflows.{name}")
            print(f"== {path}", flush=True)
            status = module.run(config.load_config(config_class(module), Path(path)), False)
            print(f"ended with {status}", flush=True)
            end = time.monotonic() + 120
            while any(ray.available_resources().get(kind) != ray.cluster_resources()[kind] for kind in ("CPU", "GPU")):
                assert time.monotonic() < end, f"still held: {ray.available_resources()} of {ray.cluster_resources()}"
                time.sleep(0.2)
            print("all free", flush=True)


if __name__ == "__main__":
    main()
