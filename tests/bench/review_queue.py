"""How many planted errors of annotations the review queue of a training run has at its top.

    python -m tests.bench.review_queue [--images 60] [--epochs 10] [--folder /tmp/queue] [--seed 7]

Phantom fields whose annotations are wrong in a tenth of them, a quarter each: a nest is missing, one is half its side
off, there is a nest of another field, or all is another field's. Two folds are trained on them, errors included; then
the first fifth of the queue is looked at, beside an order by the Dice of the out-of-fold maps, and a random one. Then
other errors are planted on the same maps, again and again (--again), which the training has not seen.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import yaml

from stas_core import review, tables
from stas_core.arrays import Mask, ProbMapU8
from stas_core.data import images
from stas_core.data.phantom import PhantomConfig, make_phantom, phantom_id
from stas_core.review import ReviewField
from stas_core.runs import TrainingRun
from tests.conftest import ROOT

KINDS = ("missing", "shifted", "extra", "wrong file")
LEAST_PX = 800
"""Of a nest that is missing, shifted or too much."""
TOP = 0.2


def components(mask: Mask) -> list[Mask]:
    count, labels = cv2.connectedComponents(mask.view(np.uint8), connectivity=8)
    found = [labels == number for number in range(1, count)]
    return [one for one in found if one.sum() >= LEAST_PX]


def moved(mask: Mask, dy: int, dx: int) -> Mask:
    by = np.array([[1, 0, dx], [0, 1, dy]], np.float32)
    return np.asarray(cv2.warpAffine(mask.view(np.uint8), by, (mask.shape[1], mask.shape[0])) > 0)


def planted(kind: str, index: int, truths: Sequence[Mask], rng: np.random.Generator) -> Mask | None:
    """Return the wrong annotation of a field; None: it cannot have this error."""
    truth, other = truths[index], truths[(index + int(rng.integers(1, len(truths)))) % len(truths)]
    mine, others = components(truth), components(other)
    if kind == "wrong file":
        return other
    if kind == "extra":
        for _ in range(50 if others else 0):
            nest = moved(others[rng.integers(len(others))], *(int(by) for by in rng.integers(-200, 200, 2)))
            if nest.sum() >= LEAST_PX and not (cv2.dilate(nest.view(np.uint8), np.ones((9, 9))) & truth).any():
                return np.asarray(truth | nest)
        return None
    if not mine:
        return None
    nest = mine[rng.integers(len(mine))]
    if kind == "missing":
        return np.asarray(truth & ~nest)
    angle, far = rng.random() * 2 * np.pi, 0.5 * float(nest.sum()) ** 0.5
    return np.asarray((truth & ~nest) | moved(nest, int(far * np.sin(angle)), int(far * np.cos(angle))))


def plant(truths: Sequence[Mask], seed: int) -> dict[int, tuple[str, Mask]]:
    """Return the wrong annotations of a tenth of the fields, each with its kind, by index."""
    rng, errors = np.random.default_rng(seed), dict[int, tuple[str, Mask]]()
    for index in rng.permutation(len(truths)).tolist():
        kind = KINDS[len(errors) % len(KINDS)]
        mask = planted(kind, index, truths, rng) if len(errors) < len(truths) / 10 else None
        if mask is not None and (mask ^ truths[index]).sum() >= LEAST_PX // 2:
            errors[index] = (kind, mask)
    return errors


def plant_again(run: TrainingRun, num: int, seed: int, times: int) -> None:
    """Plant other errors on the maps of a run; print the mean recall of both orders."""
    config = PhantomConfig(num_images=num, height=384, width=512, num_groups=max(2, num // 4), seed=seed)
    truths = [np.asarray(make_phantom(config, index).mask) for index in range(num)]
    rows = {row.id: run.fold(fold).path(row.map_uri) for fold in (0, 1) for row in run.fold(fold).oof()}
    maps = [images.decode_map(Path(rows[phantom_id(n)]).read_bytes(), phantom_id(n)) for n in range(num)]
    typical = review.typical_px(int(one.sum()) for mask in truths for one in components(mask))
    scored = [_scores(prob, truth, typical) for prob, truth in zip(maps, truths, strict=True)]
    recalls = []
    for turn in range(times):
        errors = plant(truths, seed + 1 + turn)
        both = list(scored)
        for index, (_, mask) in errors.items():
            both[index] = _scores(maps[index], mask, typical)
        recall = []
        for which in (0, 1):
            top = sorted(range(num), key=lambda index: both[index][which])[: round(TOP * num)]
            recall.append(len(set(top) & set(errors)) / len(errors))
        recalls.append(recall)
    queue, dice = np.mean(recalls, axis=0)
    print(f"{times} times other errors on the same maps: recall of the queue {queue:.2f}, of Dice {dice:.2f}, mean")


def _scores(prob: ProbMapU8, annotated: Mask, typical: float) -> tuple[float, float]:
    found = review.compare("a", prob, annotated, typical)
    response = prob >= 128
    dice = 2 * float((response & annotated).sum()) / max(1, int(response.sum() + annotated.sum()))
    return -review.together(one.row.priority for one in found), dice


def make_cohort(folder: Path, num: int, seed: int) -> dict[str, str]:
    """Write fields and annotations; return the kind of error by id."""
    config = PhantomConfig(num_images=num, height=384, width=512, num_groups=max(2, num // 4), seed=seed)
    phantoms = [make_phantom(config, index) for index in range(num)]
    truths = [np.asarray(one.mask) for one in phantoms]
    errors = plant(truths, seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for index, phantom in enumerate(phantoms):
        mask = errors[index][1] if index in errors else truths[index]
        (folder / "images" / f"{phantom_id(index)}.jpg").write_bytes(images.encode_jpeg(phantom.image))
        (folder / "masks" / f"{phantom_id(index)}.png").write_bytes(images.encode_mask(mask))
    return {phantom_id(index): kind for index, (kind, _) in errors.items()}


def train(folder: Path, epochs: int) -> TrainingRun:
    config = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())["train"]
    config["training"]["epochs"] = epochs
    (folder / "train.yaml").write_text(yaml.safe_dump(config))
    prepare = [f"data.images={folder}/images", f"data.annotations={folder}/masks", f"out={folder}/cohort"]
    prepare += ["split.num_folds=2", "split.hold_out_fraction=0"]
    folds = ["--config", f"{folder}/train.yaml", f"data.cohort={folder}/cohort/cohort.parquet", f"out={folder}/run"]
    for stage, line in (("prepare_data", prepare), ("train_folds", [*folds, "accept_warnings=true"])):
        subprocess.run([sys.executable, str(ROOT / "workflows" / f"{stage}.py"), *line], check=True)
    return TrainingRun(f"{folder}/run")


def show(name: str, order: Sequence[str], errors: dict[str, str]) -> None:
    top = order[: round(TOP * len(order))]
    by_kind = []
    for kind in KINDS:
        planted_ids = [image_id for image_id, one in errors.items() if one == kind]
        by_kind.append(f"{kind} {len(set(planted_ids) & set(top))} of {len(planted_ids)}")
    hits = len(set(errors) & set(top))
    recall, precision = hits / len(errors), hits / len(top)
    print(f"{name}: recall {recall:.2f}, precision {precision:.2f} ({', '.join(by_kind)})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--again", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = (given.folder or Path(made)).resolve()
        errors = make_cohort(folder, given.images, given.seed)
        run = train(folder, given.epochs)
        fields = tables.read_rows(run.path(run.REVIEW), ReviewField)
        queue = [field.id for field in fields]
        print(f"{len(fields)} fields, {len(errors)} planted errors; the first {TOP:.0%} of")
        show("the queue", queue, errors)
        show("Dice", [field.id for field in sorted(fields, key=lambda field: field.dice or 0.0)], errors)
        expected = len(errors) / len(fields)
        print(f"random order: recall {TOP:.2f}, precision {expected:.2f} (expected)")
        plant_again(run, given.images, given.seed, given.again)


if __name__ == "__main__":
    main()
