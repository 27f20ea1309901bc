"""The model card that goes with an exported ensemble: what it is, what it was trained on, how good, and its limits."""

from collections.abc import Sequence

from stas_core import markdown, storage
from stas_core.data.reference import CohortReference
from stas_core.networks import checkpoints
from stas_core.networks.checkpoints import CheckpointRecord
from stas_core.predict.inference import InferenceConfig
from stas_core.runs import TrainingRun, read_reference
from stas_core.verdicts import Verdict

_RUN_IT = """\
```python
import numpy as np, onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("ensemble.onnx", providers=["CPUExecutionProvider"])
images = np.asarray(Image.open("field.jpg").convert("RGB"))[None]
probability = session.run(["probabilities"], {"images": images})[0][0] / 255
```

| | name | dtype | layout |
| --- | --- | --- | --- |
| input | `images` | uint8 | (n, height, width, 3): RGB, 0 to 255, as decoded; images of one call share their size |
| output | `probabilities` | uint8 | (n, height, width): probability of target as k / 255, at the input's size |

Shrinking, padding, normalisation, flips and the mean over the members are in the file. Post-processing is not: cut the
map at 128, or give it to `stas_core.predict.postprocess`."""


def write_card(uri: str, folders: Sequence[str], inference: InferenceConfig, verdict: Verdict, check: str) -> str:
    """Return the card of an ensemble, as Markdown.

    Args:
        uri: where it was found, as `ensemble.find_checkpoints` takes it.
        folders: its checkpoints.
        inference: flips and turns that are in the file.
        verdict: of the check.
        check: its result, in words.
    """
    records = [checkpoints.read_record(folder) for folder in folders]
    flips = f"{', '.join(inference.flips)}{', each also turned by 90 degrees' if inference.turns else ''}"
    return "\n\n".join(
        [
            "# Model card",
            f"{len(folders)} network(s) that give each pixel of an H&E image its probability of being target (a tumour "
            f"nest, as the training annotations draw them). Flips: {flips}.",
            "## Members",
            _members(records),
            "## Data",
            "\n".join(_data(read_reference(uri), records)),
            "## Scores",
            _scores(uri, records),
            "## Check of the file",
            f"{check}.",
            verdict.markdown(),
            "## Intended use",
            "Research on images like those that it was trained on. It is not a medical device, and not for diagnosis.",
            "## Limits",
            "\n".join(_limits(records)),
            "## How to run it",
            _RUN_IT,
            "## Licence",
            "The software: Apache-2.0. The weights: what the owners of the training images, and of the encoder's "
            "pretrained weights where there were any, allow.\n",
        ]
    )


def _members(records: Sequence[CheckpointRecord]) -> str:
    rows = [
        [
            str(record.fold),
            str(record.epoch),
            f"{record.model.get('arch')} on {record.model.get('encoder')}",
            str(record.model.get("encoder_weights")),
            f"{record.scale:g}",
            ", ".join(f"{name} {value:.3f}" for name, value in sorted(record.scores.items())),
            record.provenance.get("commit", "unknown"),
        ]
        for record in records
    ]
    columns = ["fold", "epoch", "network", "encoder began from", "scale", "scores in training", "commit"]
    return markdown.table(columns, rows)


def _data(cohort: CohortReference | None, records: Sequence[CheckpointRecord]) -> list[str]:
    sizes = sorted({f"{record.mpp:g}" for record in records if record.mpp is not None})
    lines = [f"- Pixel size of the training images: {' and '.join(sizes) or 'not stated'}{' um' if sizes else ''}."]
    if cohort is None:
        return [*lines, "- The ensemble says nothing of the cohort that it was trained on."]
    lines.append(
        f"- {cohort.num_images} training images; {cohort.empty_share:.1%} without a target, {cohort.large_share:.1%} "
        "more than half target."
    )
    lines += [f"- {name.replace('_', ' ')}: {low:.3g} to {high:.3g}" for name, (low, high) in cohort.looks.items()]
    if cohort.disagreement is not None:
        lines.append(f"- Mean disagreement of the members on a hold-out image: at most {cohort.disagreement:.3g}.")
    return lines


def _scores(uri: str, records: Sequence[CheckpointRecord]) -> str:
    run = TrainingRun(uri.rpartition("/")[0] if uri.endswith(".json") else uri)
    if not storage.exists(run.path(run.FOLDS)):
        return "No table of out-of-fold scores lies beside the ensemble; those in training stand above."
    used = {record.fold for record in records}
    rows = [
        [
            str(row.fold),
            str(row.num_images),
            f"{row.dice_mean:.3f} ({_interval(row.dice_low, row.dice_high)})",
            f"{row.precision_mean:.3f}",
            f"{row.recall_mean:.3f}",
        ]
        for row in run.folds()
        if row.fold in used
    ]
    columns = ["fold", "images", "Dice (95 % interval)", "precision", "recall"]
    return f"Of each fold alone, on images it was not trained on, cut at 0.5:\n\n{markdown.table(columns, rows)}"


def _interval(low: float | None, high: float | None) -> str:
    return "n/a: too few images" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _limits(records: Sequence[CheckpointRecord]) -> list[str]:
    mpp = sorted({record.mpp for record in records if record.mpp is not None})
    size = f"{mpp[0]:g} um per pixel" if len(mpp) == 1 else "the pixel size of the training images"
    return [
        f"- It knows targets at {size} alone: resample images of another one first.",
        "- Other stains, scanners, organs and tumours than those of the training are not measured.",
        "- Whole slides go in tiles with a margin: `score_slides` does this, the file alone does not.",
        "- It computes in float32; another runtime, or a GPU, may round a probability the other way.",
    ]
