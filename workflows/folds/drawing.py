"""Figures of a training run; imported where they are drawn, as they load matplotlib."""

from collections.abc import Sequence
from dataclasses import asdict

from stas_core import storage
from stas_core.data import images, overlay
from stas_core.data.cohort import CohortRow
from stas_core.data.fields import load_image, load_mask
from stas_core.figures import contact_sheet, training
from stas_core.runs import TrainingRun
from stas_core.scores import metrics
from workflows.progress import doing, told

EXAMPLES_OF_A_KIND, EXAMPLE_WIDTH_PX = 4, 640
"""Out-of-fold maps that are shown, of best, median and worst Dice each."""


@doing("drawing the figures")
def write_figures(run: TrainingRun, folds: Sequence[int], rows: Sequence[CohortRow]) -> None:
    """Draw the folds' curves and scores, and examples of their out-of-fold maps."""
    histories = {}
    for fold in folds:
        epochs = [asdict(row) for row in run.fold(fold).metrics()]
        histories[f"fold {fold}"] = [{k: v for k, v in row.items() if v is not None} for row in epochs]
    for name, history in told(list(histories.items()), "curves"):
        data = training.learning_curves(history, title=name)
        storage.write_bytes(run.path(f"figures/{name.replace(' ', '_')}.png"), data)
    storage.write_bytes(run.path("figures/folds.png"), training.fold_curves(histories))
    scores = {f"fold {fold}": [row.dice for row in run.fold(fold).oof()] for fold in folds}
    storage.write_bytes(run.path("figures/fold_scores.png"), training.fold_scores(scores))
    by_id = {row.id: row for row in rows}
    oof = [(fold, row) for fold in folds for row in run.fold(fold).oof()]
    picked = training.pick_examples(
        [row.id for _, row in oof], [row.dice for _, row in oof], num_each=EXAMPLES_OF_A_KIND
    )
    scored = {row.id: (run.fold(fold).path(row.map_uri), row.dice) for fold, row in oof}
    wanted = [(image_id, kind) for kind, ids in picked.items() for image_id in ids]
    tiles = [_example(by_id[name], *scored[name], kind) for name, kind in told(wanted, "examples")]
    sheet = contact_sheet.contact_sheet(
        tiles, columns=4, title="Out-of-fold examples at 0.5: truth cyan, prediction yellow"
    )
    storage.write_bytes(run.path("figures/oof_examples.png"), sheet)


def _example(row: CohortRow, map_uri: str, dice: float, kind: str) -> contact_sheet.Tile:
    prediction = metrics.is_target(images.decode_map(storage.read_bytes(map_uri), map_uri))
    image, truth = load_image(row, 1.0), load_mask(row)
    picture = overlay.draw(image, truth=truth, prediction=prediction, tint_errors=True)
    return contact_sheet.Tile(
        overlay.thumbnail(picture, width_px=EXAMPLE_WIDTH_PX), f"{kind}: {row.id}  Dice {dice:.3f}"
    )
