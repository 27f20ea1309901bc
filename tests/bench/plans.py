"""What plans foresee over what comes, of every stage, on a small made cohort and two made slides.

    python -m tests.bench.plans [--fields 24] [--height 480] [--epochs 6] [--slide_px 2000] [--without search]

Prints for each stage the forecast over the actual of time, memory of the largest process, and disk, and what each part
of its output takes; pages are written after that is counted. This process runs all stages: its memory is that of all.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stas_core import config as configs
from stas_core import local_files, storage
from stas_core.slides.phantom import PhantomSlideConfig, make_slide
from tests.conftest import TINY_MODEL
from workflows import (
    choose_ensemble,
    evaluate,
    export,
    export_model,
    prepare_data,
    score_images,
    score_slides,
    train_folds,
    tune_postprocess,
    tune_training,
)
from workflows.cluster import ray_session
from workflows.folds.training import TrainFoldsConfig

EASY = {"steps": [{"drop": 100, "high": 130, "core": 120, "ratio": 0.1, "low": 110}], "min_target_px": 10}


def stages(folder: str, given: argparse.Namespace) -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """Yield each stage, the name of its folder, and its settings."""
    phantom = {"num_images": given.fields, "height": given.height, "width": given.height * 3 // 2, "num_groups": 8}
    yield prepare_data, "cohort", {"phantom": phantom, "split": {"num_folds": 2, "hold_out_fraction": 0.25}}
    cohort = f"{folder}/cohort/cohort.parquet"
    recipe = {
        "data": {"cohort": cohort, "crop_px": 128, "num_loader_workers": 0},
        "model": TINY_MODEL,
        "optim": {"batch_size": 4, "micro_batch_size": 4},
        "training": {"epochs": given.epochs},
        "accept_warnings": True,
    }
    yield train_folds, "folds", recipe
    space = {"optim.lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    shared = {name: value for name, value in recipe.items() if name != "accept_warnings"}
    search = {"num_settings": 3, "num_random": 2}
    stopping = {"enabled": False}
    yield (
        tune_training,
        "search",
        {"train": shared, "space": space, "search": search, "stopping": stopping, "accept_warnings": True},
    )
    run = {"run": f"{folder}/folds", "accept_warnings": True}
    keys = {"min_target_px": {"low": 0, "high": 40}, "closing_px": {"low": 1, "high": 9, "step": 2}}
    yield tune_postprocess, "thresholds", run | {"space": keys, "search": {"num_settings": 60}}
    yield choose_ensemble, "ensemble", {"runs": [f"{folder}/folds"], "top_k": 1, "accept_warnings": True}
    ensemble = {"ensemble": {"uri": f"{folder}/folds/ensemble.json"}, "accept_warnings": True}
    fields = {"images": cohort, "split": None}
    loose = {"postprocess": EASY | {"max_foreground_share": None}}
    yield score_images, "scores", ensemble | loose | {"data": fields, "max_failed_fraction": 1.0}
    everything = {"save": {"disagreement": True, "overlays": True, "geojson_gz": True}}
    yield score_images, "all", ensemble | loose | everything | {"data": fields}
    made = {"width_px": given.slide_px, "height_px": given.slide_px, "num_slides": 2}
    for index in range(made["num_slides"]):
        make_slide(PhantomSlideConfig(**made), index, Path(folder, "made"))
    tile = {"tile": {"px": 256, "halo_px": 32}, "model_mpp": 1.0}
    yield score_slides, "slides", ensemble | tile | {"slides": f"{folder}/made/slides"}
    judged = {"run": f"{folder}/slides", "truth": {"slides": f"{folder}/made/targets"}, "accept_warnings": True}
    yield evaluate, "slides_evaluation", judged
    scored = {"run": f"{folder}/scores"}
    yield evaluate, "evaluation", scored | {"truth": {"cohort": cohort}, "accept_warnings": True}
    for form in ("geojson", "labelme", "asap", "mask", "coco"):
        yield export, f"as_{form}", scored | {"formats": [form]}
    yield export_model, "onnx", ensemble


FIGURES = ("seconds", "memory_bytes", "disk_bytes")


def compare(module: Any, config: Any) -> str:
    """Plan and run a stage; return a line of what was planned over what came."""
    (plan,) = module.plan(config, False)
    status = module.run(config, False)
    held, out = storage.read_json(f"{config.out}/manifest.json")["forecast"], config.out
    came = {name: held[name]["actual"] for name in FIGURES}
    foreseen = {name: getattr(plan, name) for name in FIGURES}
    ratios = {name: f"{foreseen[name] / came[name]:.2f}" if foreseen[name] and came[name] else "-" for name in FIGURES}
    taken = Counter[str]()
    for path in local_files.find_all(out):
        *folders, name = Path(path).relative_to(out).parts
        taken["/".join(folders[:2]) or name] += Path(path).stat().st_size
    parts = ", ".join(f"{part} {num / 1e3:.0f}" for part, num in taken.most_common(9))
    return f"{storage.name_of(out):18} status {status}, ratios {ratios}; kB: {parts}"


def main() -> None:
    """Compare all stages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--fields", type=int, default=24)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--slide_px", type=int, default=2000)
    parser.add_argument("--without", nargs="*", default=[], help="folders of stages that are left out")
    given = parser.parse_args()
    lines = list[str]()
    with local_files.temporary_folder() as folder, ray_session():
        for module, name, values in stages(folder, given):
            if name not in given.without:
                cls = TrainFoldsConfig if module is train_folds else next(iter(module.run.__annotations__.values()))
                lines.append(compare(module, configs.build(cls, values | {"out": f"{folder}/{name}"})))
                print(f"ROW {lines[-1]}", flush=True)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
