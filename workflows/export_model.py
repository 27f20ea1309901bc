"""Write an ensemble as one ONNX file, checked against the predictions of this package, with a model card.

    python workflows/export_model.py ensemble.uri=/data/stas/folds/ensemble.json data.images=/data/stas/Test_Images \
        out=/data/stas/onnx

Shrinking, padding, normalisation, flips and the mean over members are in the file: an 8-bit RGB image of any size goes
in, its 8-bit probability map comes out. Writes <out>/ensemble.onnx, check.parquet (how far its maps are from those of
score_images, an image a row), MODEL_CARD.md (data, scores, use, limits, how to run it) and, last, manifest.json. Where
a pixel differs by more than 1 of 255 the verdict is `do not use`. It needs the extra: pip install 'stas-on-ray[onnx]'.
"""

import sys

if __name__ == "__main__" and not (__package__ or getattr(sys.flags, "safe_path", False)):  # a script
    import environment  # noqa: F401 - ends where this Python lacks what follows

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from stas_core import storage, tables
from stas_core.arrays import RgbImage
from stas_core.config import Config, Uri
from stas_core.data import images, listing
from stas_core.data.phantom import PhantomConfig, make_phantom, phantom_id
from stas_core.errors import ConfigError, InputError
from stas_core.predict.inference import InferenceConfig
from stas_core.verdicts import DO_NOT_USE, LOOK, Reason, Verdict, VerdictConfig
from workflows.cli import main
from workflows.conclusion import conclude, conclude_again, recorded
from workflows.forecast import Forecast, begin, peak_bytes, shown_bytes, spread, try_out
from workflows.out_folder import (
    OutFolder,
    Outputs,
    claim_for_stage,
    require_apart,
    require_out,
    require_uri,
)
from workflows.progress import doing
from workflows.scoring.plan import EnsembleConfig

if TYPE_CHECKING:  # they load torch, which --help does without
    from stas_core.predict.onnx_export import ImageCheck, OnnxPredictor
    from stas_core.predict.predictor import Predictor

STAGE = "export_model"
MODEL, CHECK, CARD = "ensemble.onnx", "check.parquet", "MODEL_CARD.md"
OUTPUTS = Outputs(STAGE, (MODEL, CHECK, CARD))
MOST_CHECKED, TRIED = 20, 2
MAX_DIFFERENCE = 1
"""In 255ths: where a probability lies between two of them, the last bit decides."""
_PHANTOM_SIZES = ((257, 391), (320, 480), (96, 501), (33, 40))
"""Height and width of made images: odd, even, long, and barely as large as a stride."""
_QUIET_S = 10.0
EXPORTING = 4
"""How often all weights are in memory, beside those that predict: members, graph, file, and what reads it."""


class CheckConfig(Config):
    """What the file is checked on."""

    images: Uri | None = None
    """Folder, glob or file of images, of which up to 20 are taken, evenly spread; null: phantom fields made on the
    spot."""


class ExportModelConfig(Config):
    """Settings of export_model."""

    out: Uri | None = None
    """Folder of the outputs; path or URI."""
    ensemble: EnsembleConfig = EnsembleConfig()
    data: CheckConfig = CheckConfig()
    inference: InferenceConfig = InferenceConfig()
    accept_warnings: bool = False
    """Exit with status 0 even where the verdict is `do not use`."""


@dataclass(frozen=True)
class Field:
    """An image of the check."""

    id: str
    load: Callable[[], RgbImage]


@dataclass(frozen=True)
class Opened:
    """An export that could begin."""

    config: ExportModelConfig
    out: str
    checkpoints: list[str]
    fields: list[Field]
    work: tuple[ExportModelConfig, str]
    """What makes it the same export: settings and fingerprint of the inputs."""


def run(config: ExportModelConfig, force: bool) -> int:
    """Export, check and describe the ensemble; return the exit status."""
    opened = _opened(config)
    with claim_for_stage(opened.out, OUTPUTS, force=force) as folder:
        return _export(opened, folder)


def plan(config: ExportModelConfig, force: bool) -> list[Forecast]:
    """Say what the export would take, from an image that is predicted here."""
    opened = _opened(config)
    base = begin(opened.out, OUTPUTS, opened.work, force=force, starts_over=True)
    if base.is_nothing:
        return [base]
    found, notes = _readable(opened, TRIED)
    predictor = _predictor(opened)
    tried = try_out(lambda image, _: predictor.predict_u8(image), found)
    sizes = [storage.size(storage.join(uri, "weights.safetensors")) for uri in opened.checkpoints]
    forecast = replace(
        base,
        work=f"{len(opened.checkpoints)} member(s) as one file, to be checked on {len(opened.fields)} images",
        layout="this machine",
        seconds=10.0 * len(sizes) + 2 * tried.seconds * len(opened.fields),
        basis=tried.basis("images"),
        memory_bytes=peak_bytes() + EXPORTING * sum(sizes),
        disk_bytes=sum(sizes) + shown_bytes(0),
        notes=notes,
    )
    return [forecast]


def _readable(opened: Opened, count: int) -> tuple[list[RgbImage], list[str]]:
    """Return the first images of the check that can be read, and notes on those before that cannot.

    Raises:
        ConfigError: none can be read.
    """
    found, notes = list[RgbImage](), list[str]()
    for field in opened.fields:
        try:
            found.append(field.load())
        except InputError as error:
            notes.append(_left_out(field, error))
        if len(found) == count:
            break
    if not found:
        raise _none_readable(opened)
    return found, notes


def _left_out(field: Field, error: InputError) -> str:
    return f"{field.id} is left out of the check: {error}"


def _none_readable(opened: Opened) -> ConfigError:
    return ConfigError(
        f"data.images = {opened.config.data.images}: none of the {len(opened.fields)} images taken can be read; "
        "give others to check the file on"
    )


def _opened(config: ExportModelConfig) -> Opened:
    """Find checkpoints and images, before anything is written.

    Raises:
        ConfigError: a setting is wrong, cannot be expressed in the file, or what writes it is not installed.
        CheckpointError: there is no ensemble.
    """
    out = require_out(config.out, "/data/onnx")
    uri = require_uri("ensemble.uri", config.ensemble.uri, "/data/folds/ensemble.json")
    source = config.data.images and require_uri("data.images", config.data.images, "/data/Test_Images")
    require_apart(out, {"ensemble.uri": uri, "data.images": source}, listed=["data.images"])
    from stas_core.predict import ensemble, onnx_export

    onnx_export.require_onnx()
    onnx_export.require_expressible(config.inference)
    checkpoints = ensemble.find_checkpoints(uri, top_k=config.ensemble.top_k)
    fields, stamps = _phantoms() if source is None else _images(source)
    paths = {
        "out": out,
        "ensemble": config.ensemble.model_copy(update={"uri": uri}),
        "data": CheckConfig(images=source),
    }
    config = config.model_copy(update=paths)
    weights = sorted(ensemble.checkpoint_fingerprint(folder) for folder in checkpoints)
    identity = config.model_copy(update={"accept_warnings": False})
    return Opened(config, out, checkpoints, fields, (identity, storage.fingerprint(*weights, *stamps)))


def _phantoms() -> tuple[list[Field], list[str]]:
    def make(index: int) -> RgbImage:
        height, width = _PHANTOM_SIZES[index % len(_PHANTOM_SIZES)]
        return make_phantom(PhantomConfig(height=height, width=width), index).image

    return [Field(phantom_id(i), lambda i=i: make(i)) for i in range(MOST_CHECKED)], []  # type: ignore[misc]


def _images(source: str) -> tuple[list[Field], list[str]]:
    def load(uri: str) -> RgbImage:
        return images.decode_image(storage.read_bytes(uri), uri)

    found = listing.find(source, images.IMAGE_SUFFIXES)
    if not found.uris:
        raise ConfigError(
            f"data.images = {source} holds no images ({', '.join(images.IMAGE_SUFFIXES)}); leave it out, and phantom "
            "fields are made"
        )
    chosen = spread(list(found.uris.items()), MOST_CHECKED)
    fields = [Field(name, lambda uri=uri: load(uri)) for name, uri in chosen]  # type: ignore[misc]
    return fields, storage.stamps([uri for _, uri in chosen])


def _predictor(opened: Opened) -> "Predictor":
    import torch

    from stas_core.predict import ensemble
    from stas_core.predict.predictor import Predictor

    device = torch.device("cpu")
    members = ensemble.load_members(opened.checkpoints, device)
    return Predictor(members, device=device, config=opened.config.inference)


def _export(opened: Opened, folder: OutFolder) -> int:
    out, start = opened.out, time.monotonic()
    accept = opened.config.accept_warnings
    if folder.is_finished(*opened.work):
        print(f"nothing to do: {out} is up to date")
        return conclude_again(out, accept_warnings=accept)
    folder.discard()
    import torch

    from stas_core.predict import ensemble, model_card, onnx_export

    print(f"writing {len(opened.checkpoints)} member(s) as one ONNX file", flush=True)
    members = ensemble.load_members(opened.checkpoints, torch.device("cpu"))
    inference = opened.config.inference
    about = {
        "members": " ".join(sorted(member.name for member in members)),
        "flips": " ".join(inference.flips),
        "turns": str(inference.turns).lower(),
        "input": "uint8 (n, height, width, 3), RGB",
        "output": "uint8 (n, height, width): probability of target = k / 255",
    }
    with doing("exporting"):
        data = onnx_export.export(onnx_export.WholeImages(members, inference), about)
    storage.write_bytes(storage.join(out, MODEL), data)
    checks = list(_check(_predictor(opened), onnx_export.OnnxPredictor(data), opened.fields))
    if not checks:
        raise _none_readable(opened)
    tables.write_rows(storage.join(out, CHECK), onnx_export.ImageCheck, checks)
    verdict = _judge(checks, is_phantom=opened.config.data.images is None)
    num_px = sum(check.height_px * check.width_px for check in checks)
    share = sum(check.num_differing for check in checks) / num_px
    facts = {
        "num_members": len(members),
        "num_images": len(checks),
        "max_difference": max(check.max_difference for check in checks),
        "share_of_differing_pixels": share,
        "model_bytes": len(data),
    }
    said = (
        f"{MODEL}: {len(data) / 1e6:.1f} MB; on {len(checks)} images its maps differ in {share:.2g} of the pixels, by "
    )
    said += f"at most {facts['max_difference']} of 255"
    print(said, flush=True)
    card = model_card.write_card(opened.config.ensemble.uri or "", opened.checkpoints, inference, verdict, said)
    storage.write_bytes(storage.join(out, CARD), card.encode())
    facts |= {"seconds": round(time.monotonic() - start, 1)} | recorded(verdict, VerdictConfig())
    folder.write_manifest(*opened.work, facts)
    print(f"look at {out}/{CARD}")
    return conclude(verdict, accept_warnings=accept)


def _check(predictor: "Predictor", exported: "OnnxPredictor", fields: Sequence[Field]) -> Iterator["ImageCheck"]:
    """Predict each image both ways."""
    from stas_core.predict.onnx_export import ImageCheck

    told = time.monotonic()
    for number, field in enumerate(fields, 1):
        try:
            image = field.load()
        except InputError as error:
            print(_left_out(field, error), flush=True)
            continue
        yield ImageCheck.of(field.id, predictor.predict_u8(image), exported.predict_u8(image))
        if time.monotonic() - told > _QUIET_S:
            print(f"checked {number} of {len(fields)} images", flush=True)
            told = time.monotonic()


def _judge(checks: Sequence["ImageCheck"], *, is_phantom: bool) -> Verdict:
    worst = checks[int(np.argmax([check.max_difference for check in checks]))]
    reasons = []
    if worst.max_difference > MAX_DIFFERENCE:
        reasons.append(
            Reason(
                DO_NOT_USE,
                "onnx_differs",
                f"the file's map of {worst.id} differs by {worst.max_difference} of 255 from the package's",
                f"at most {MAX_DIFFERENCE}",
                f"Its network does something that the file lacks, such as going by the image's size: see {CHECK}; "
                "export another architecture, or use stas_core's Predictor",
            )
        )
    if not any(check.num_predicted for check in checks):
        reasons.append(
            Reason(
                LOOK,
                "onnx_checked_on_nothing",
                "no pixel of the images checked on has a probability of 50 % or more",
                "some: empty maps agree easily",
                "Give images with targets: data.images",
            )
        )
    unchecked = ["images of your own: data.images is not given, and phantom fields were taken"] if is_phantom else []
    return Verdict.of(reasons, unchecked)


if __name__ == "__main__":
    main(STAGE, ExportModelConfig, run, __doc__ or "", plan=plan)
