"""An ensemble as one ONNX file that takes whole images as they are: what `predictor.Predictor` does, as a graph.

The graph shrinks an image to each member's scale, pads it to the stride, normalises, predicts every flip, crops, and
averages over flips and members; height and width are free. torch's exporter by tracing (`dynamo=False`) makes it: in
torch 2.15 the other one cannot express the padding of a size that is not known beforehand. It needs the package `onnx`,
and the check `onnxruntime`: the extra `onnx`.
"""

import importlib.util
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import UInt8
from torch import Tensor, nn
from torch.nn import functional

from stas_core.arrays import AnyRgbImage, ProbMapU8
from stas_core.errors import CheckpointError, ConfigError
from stas_core.predict.inference import InferenceConfig
from stas_core.predict.predictor import Member, Transform, normalise

INPUT, OUTPUT = "images", "probabilities"
"""Names in the graph: uint8 (n, height, width, 3), RGB; and uint8 (n, height, width), k / 255."""
OPSET = 18
MOST_BYTES = 2**31 - 2**20
"""What an ONNX file can hold, less room for the graph."""
_NOT_IN_A_GRAPH: Mapping[str, str] = {
    "adaptive_px": "null: a graph takes every flip of every image",
    "compile": "false: whatever runs the file compiles it",
    "batch_size": "null: whoever runs the file chooses it",
    "batch_px": "null: whoever runs the file chooses it",
}


def require_onnx() -> None:
    """Check that the packages of the extra are there.

    Raises:
        ConfigError: naming what lacks, and how to install it.
    """
    lacking = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if lacking:
        raise ConfigError(f"{' and '.join(lacking)} not installed; run: pip install 'stas-on-ray[onnx]'")


def require_expressible(config: InferenceConfig) -> None:
    """Check that a graph can do what these settings ask for.

    Raises:
        ConfigError: naming the first setting that it cannot.
    """
    defaults = InferenceConfig()
    for key, remedy in _NOT_IN_A_GRAPH.items():
        if (value := getattr(config, key)) != getattr(defaults, key):
            raise ConfigError(f"inference.{key} = {value} cannot be expressed in an ONNX file; set it to {remedy}")
    if config.amp == "bf16":
        raise ConfigError("inference.amp = bf16 cannot be expressed in an ONNX file; set it to none: float32")


class WholeImages(nn.Module):
    """What `Predictor` computes of images of one size, in operations that can be traced for any size.

    Args:
        members: the ensemble, on the CPU; summed in the order of their names.
        config: flips and turns; see `require_expressible` for the rest.

    Example:
        >>> from stas_core.networks.architecture import ModelConfig
        >>> from stas_core.networks.model import build_model
        >>> small = ModelConfig(encoder="mobilenetv3_small_050", encoder_weights="none")
        >>> whole = WholeImages([Member("fold_0", build_model(small), scale=0.5)], InferenceConfig(flips=("identity",)))
        >>> whole(torch.zeros(1, 50, 70, 3, dtype=torch.uint8)).shape
        torch.Size([1, 50, 70])
    """

    def __init__(self, members: Sequence[Member], config: InferenceConfig):
        super().__init__()
        if not members:
            raise CheckpointError("an ensemble needs at least one member")
        require_expressible(config)
        self._members = sorted(members, key=lambda member: member.name)
        self.models = nn.ModuleList(member.model for member in self._members)
        upright = [Transform(flip, False) for flip in config.flips]
        turned = [Transform(flip, True) for flip in config.flips] if config.turns else []
        self._rounds = [transforms for transforms in (upright, turned) if transforms]
        self.eval()

    def forward(self, images: UInt8[Tensor, "n h w 3"]) -> UInt8[Tensor, "n h w"]:
        """Return the ensemble's probabilities as k / 255, rounded to the nearest k, at native size."""
        planes = images.permute(0, 3, 1, 2).float()
        native = _size(planes)
        small = {scale: _shrink(planes, scale) for scale in {member.scale for member in self._members}}
        total = torch.zeros_like(planes[:, 0])
        for member in self._members:
            strides = [other.model.stride for other in self._members if other.scale == member.scale]
            prob = self._mean_of_flips(member, small[member.scale], math.lcm(*strides))
            if member.scale != 1:
                prob = functional.interpolate(prob[:, None], size=native, mode="bilinear", align_corners=False)[:, 0]
            total = total + prob
        return ((total / len(self._members)).clamp(0, 1) * 255).round().to(torch.uint8)

    def _mean_of_flips(self, member: Member, planes: Tensor, stride: int) -> Tensor:
        height, width = _size(planes)
        full = _reflect(_reflect(planes, 2, stride), 3, stride)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (member.model.mean, member.model.std))
        total = torch.zeros_like(planes[:, 0])
        for transforms in self._rounds:
            batch = normalise(torch.cat([transform.apply(full) for transform in transforms]), mean, std)
            probs = torch.softmax(member.model(batch)[0].float(), dim=1)[:, 1].chunk(len(transforms))
            for transform, prob in zip(transforms, probs, strict=True):
                total = total + transform.undo(prob)[:, :height, :width]
        return total / sum(map(len, self._rounds))


def _size(planes: Tensor) -> tuple[Any, Any]:
    """Return height and width: numbers, or while a graph is traced, what it knows by these names."""
    return planes.shape[2], planes.shape[3]


def _count_to(length: Tensor) -> Tensor:
    numbers: Tensor = torch.arange(length)  # type: ignore[call-overload]
    return numbers


def _reflect(planes: Tensor, axis: int, stride: int) -> Tensor:
    """Pad to a multiple of the stride at the end of an axis, as `np.pad` does: images may be smaller than the rim."""
    length = torch.as_tensor(planes.shape[axis])
    period = (2 * (length - 1)).clamp(min=1)
    place = _count_to((length + stride - 1) // stride * stride) % period
    return planes.index_select(axis, torch.where(place < length, place, period - place))


def _shrink(planes: Tensor, scale: float) -> Tensor:
    """Shrink by area averaging to whole grey levels, as `images.resize` does."""
    if scale == 1:
        return planes
    sizes = [torch.as_tensor(length) for length in _size(planes)]
    smaller = [(size.double() * scale).round().clamp(min=1).long() for size in sizes]
    rows, columns = (_overlaps(size, to) for size, to in zip(sizes, smaller, strict=True))
    grey = torch.matmul(rows, torch.matmul(planes, columns.transpose(0, 1)))
    # OpenCV rounds halves up where it averages 2 x 2 px, and to even numbers everywhere else.
    is_halved = (sizes[0] == 2 * smaller[0]) & (sizes[1] == 2 * smaller[1])
    return torch.where(is_halved, (grey + 0.5).floor(), grey.round()).clamp(0, 255)


def _overlaps(size: Tensor, to: Tensor) -> Tensor:
    """Return (to, size): the share of each small pixel that each pixel covers."""
    step = size.double() / to.double()
    start = _count_to(to)[:, None].double() * step
    pixel = _count_to(size)[None].double()
    covered = torch.minimum(pixel + 1, start + step) - torch.maximum(pixel, start)
    return (covered.clamp(min=0) / step).float()


def export(whole: WholeImages, about: Mapping[str, str]) -> bytes:
    """Return the ONNX file of an ensemble.

    Args:
        whole: the ensemble.
        about: what the file says of itself, under `metadata_props`.

    Raises:
        ConfigError: onnx is not installed, the ensemble is larger than an ONNX file may be, or torch cannot export it.
    """
    require_onnx()
    import onnx

    num_bytes = sum(value.numel() * value.element_size() for value in whole.state_dict().values())
    if num_bytes > MOST_BYTES:
        raise ConfigError(
            f"the members take {num_bytes / 1e9:.1f} GB, and an ONNX file holds 2 GB; export an ensemble of fewer"
        )
    sides = sorted({member.model.stride for member in whole._members})
    # Of a size that no image to check on is likely to have: a size that got stuck in the graph is found by the check.
    example = torch.zeros(1, 2 * sides[-1] + 3, 3 * sides[-1] + 5, 3, dtype=torch.uint8)
    file: Any = io.BytesIO()
    free = {0: "n", 1: "height", 2: "width"}
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # about the checks of sizes in networks, and that tracing is the older way
        try:
            torch.onnx.export(
                whole,
                (example,),
                file,
                dynamo=False,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_axes={INPUT: free, OUTPUT: free},
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"torch {torch.__version__} cannot write this ensemble as ONNX ({reason}); the published network and "
                "convolutional encoders are known to work: leave the member out, or use Predictor"
            ) from error
    model = onnx.load_from_string(file.getvalue())
    onnx.helper.set_model_props(model, dict(about))
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


class OnnxPredictor:
    """An exported ensemble in onnxruntime, on the CPU."""

    def __init__(self, data: bytes, *, num_threads: int = 0):
        require_onnx()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def predict_u8(self, image: AnyRgbImage) -> ProbMapU8:
        """Return the probability map of one image as k / 255."""
        return np.asarray(self._session.run([OUTPUT], {INPUT: np.ascontiguousarray(image)[None]})[0][0])


@dataclass(frozen=True)
class ImageCheck:
    """A row of `check.parquet`: how far the file's map of an image is from `Predictor`'s."""

    id: str
    height_px: int
    width_px: int
    num_differing: int
    """Pixels whose 8-bit probability differs."""
    max_difference: int
    """The largest difference, in 255ths."""
    num_predicted: int
    """Pixels to which `Predictor` gives 50 % or more."""

    @classmethod
    def of(cls, image_id: str, expected: npt.NDArray[np.uint8], found: npt.NDArray[np.uint8]) -> "ImageCheck":
        """Compare two maps; one of another size differs everywhere."""
        height, width = expected.shape
        if found.shape != expected.shape:
            return cls(image_id, height, width, height * width, 255, int((expected >= 128).sum()))
        difference = np.abs(expected.astype(np.int16) - found)
        num_differing = int(np.count_nonzero(difference))
        return cls(image_id, height, width, num_differing, int(difference.max()), int((expected >= 128).sum()))
