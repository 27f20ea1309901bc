"""Everything that decides what a fold learns; the settings need no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from stas_core.config import Config, Uri
from stas_core.data.cohort import CohortRow
from stas_core.networks import architecture
from stas_core.networks.architecture import ModelConfig
from stas_core.predict.inference import Amp, Flip, InferenceConfig


class DataConfig(Config):
    """Which images are read and how they are cut into samples."""

    cohort: Uri | None = None
    """The cohort.parquet that prepare_data wrote (path or URI)."""
    scale: architecture.Scale = 1.0
    """Images are trained and predicted at this fraction of their native size."""
    mpp: float | None = Field(None, ge=0.05, le=5)
    """um per pixel of the images at native size: slides are scored at it, and images held to it. null: what the cohort
    states of all its images; where it does not, score_slides takes 0.5, as of a 20x objective, and says so."""
    crop_px: int | None = Field(None, ge=32)
    """Side of the square training crops at `scale`; null trains on whole images."""
    positive_fraction: float = Field(0.7, ge=0, le=1)
    """Share of the crops that are drawn around a target."""
    samples_per_image: int = Field(1, ge=1)
    """How many samples an epoch draws from each training image."""
    cache: Literal["memory", "none"] = "memory"
    """Keep decoded training images in memory (a 1716x942 field takes 6.5 MB at scale 1), or decode them every time."""
    num_loader_workers: int | None = Field(None, ge=0)
    """Processes that make samples, per training worker; null = all but one of its CPUs."""


class AugmentConfig(Config):
    """Augmentation of a training sample; the defaults are the published method."""

    policy: Literal["autoaugment_code", "autoaugment_paper", "none"] = "autoaugment_code"
    """AutoAugment's CIFAR-10 sub-policies as learned (the published code), or as the STAS paper lists their
    operations: shearX in place of shearY, and no sharpness."""
    policy_schedule: Literal["decay", "constant", "off"] = "decay"
    """How a sample's chance of a sub-policy runs: falling to 0.3 of policy_p0, then 0 in the last five epochs (paper);
    constant (what the published code does, since it never calls its schedule); or 0."""
    policy_p0: float = Field(0.4, ge=0, le=1)
    """Chance of a sub-policy in the first epoch."""
    translate_y_by: Literal["height", "width"] = "height"
    """Side that vertical shifts are a share of; `width` (published code) moves up to 777 of 942 px out of sight."""
    flip_lr_p: float = Field(0.5, ge=0, le=1)
    """Chance of a left-right flip."""
    flip_ud_p: float = Field(0.5, ge=0, le=1)
    """Chance of an upside-down flip."""
    rot90_p: float = Field(0.0, ge=0, le=1)
    """Chance of one to three quarter turns; images that are not square get a half turn, so batches keep their shape."""
    brightness_p: float = Field(0.1, ge=0, le=1)
    """Chance of a brightness change."""
    brightness_limit: float = Field(0.1, ge=0, le=1)
    """Largest brightness change, as a share of each grey level."""
    noise_p: float = Field(0.1, ge=0, le=1)
    """Chance of Gaussian noise."""
    noise_sigma: float = Field(0.01, ge=0, le=1)
    """Standard deviation of the noise, as a share of the grey range."""
    norm_p: float = Field(0.05, ge=0, le=1)
    """Chance of the stain-normalised image in place of the image."""
    hematoxylin_p: float = Field(0.05, ge=0, le=1)
    """Chance of the hematoxylin image in place of the image."""

    @model_validator(mode="after")
    def _variants_leave_room(self) -> "AugmentConfig":
        if self.norm_p + self.hematoxylin_p > 1:
            raise ValueError(
                f"norm_p + hematoxylin_p = {self.norm_p + self.hematoxylin_p:g}, expected at most 1: lower one"
            )
        return self


Weight = Annotated[float, Field(ge=0)]


class LossConfig(Config):
    """The loss; the defaults are the paper's."""

    dice_weight: Weight = 1.0
    """Weight of the Dice term."""
    focal_weight: Weight = 1.0
    """Weight of the focal term."""
    focal_alpha: Weight = 1.0
    """Factor of the focal term (Lin et al. 2017)."""
    focal_gamma: Weight = 2.0
    """How strongly pixels that are right already are faded out of the focal term; 0 is cross-entropy."""
    dice_over: Literal["both", "target"] = "both"
    """Classes the Dice term sums over. both: the paper's; as softmax sums to one, it equals one minus the mean
    probability of the true class, in which a small target weighs little. target: the foreground alone."""
    deep_supervision_weights: Annotated[tuple[Weight, ...], Field(min_length=1)] = (1.0, 0.25, 0.0625)
    """Weight of each head, full resolution first; further entries than the model has heads are not used."""
    deep_supervision_schedule: Literal["constant", "cosine"] = "constant"
    """cosine: the weights of the deeper heads fall to zero as cos(pi/2 * progress); the first keeps its weight."""


class ScheduleConfig(Config):
    """The learning rate over the training, as a factor of its peak."""

    kind: Literal["cosine", "step", "one_cycle", "constant"] = "cosine"
    """Course after the warm-up. one_cycle has its own: from 1/25 to the peak over the first 30 % of the run, then
    down, both as half cosines (Smith 2018, with torch's defaults); warmup_epochs is not used there."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 6
    """Epochs of linear rise from 0; at most half of the run, so that a short run reaches its peak too."""
    step_epochs: Annotated[float, Field(gt=0)] = 5
    """step: epochs between two reductions, counted from the end of the warm-up."""
    step_factor: Annotated[float, Field(gt=0, le=1)] = 0.75
    """step: what a reduction multiplies the rate by."""
    final_factor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Factor at the end of cosine and one_cycle, and the least that step falls to."""


class OptimConfig(Config):
    """AdamW, batch sizes, clipping and weight averaging."""

    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(1e-4, ge=0)
    """Decoupled weight decay of every parameter."""
    batch_size: int = Field(32, ge=1)
    """Images per optimiser step, over all workers of a fold and all accumulation passes."""
    micro_batch_size: int = Field(4, ge=1)
    """Images per forward pass of one worker; gradients are averaged up to `batch_size`."""
    clip_norm: float | None = Field(None, gt=0)
    """Clip the gradient's global norm to this; null leaves it."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Keep an exponential moving average of the weights and use it for validation and maps; null does not. The decay
    grows to this value over the first steps, so that short trainings are not averaged with untrained weights."""


class TrainingConfig(Config):
    """How long and how a fold is trained."""

    epochs: int = Field(150, ge=1)
    """Passes over the training images."""
    validate_every: int = Field(1, ge=1)
    """Validate after every so many epochs, and after the last."""
    validation_flips: tuple[Flip, ...] = Field(("identity",), min_length=1)
    """Test-time flips while validating during training (out-of-fold maps use `inference.flips`)."""
    top_k: int = Field(1, ge=0)
    """How many checkpoints to keep by validation Dice, besides the last."""
    save_state_every: int = Field(1, ge=1)
    """Save the state that a restart resumes from after every so many epochs, and after the last."""
    amp: Amp = "auto"
    """Arithmetic of convolutions and matrix products in training: bf16, none (float32), or auto: bf16 on CUDA only."""
    compile: bool = False
    """Compile the model with torch.compile."""
    deterministic: bool = True
    """Use deterministic kernels: the same bytes for fixed workers and threads. What has none on CUDA warns by name."""
    seed: int = Field(0, ge=0)
    """Seed of weights, sample order and augmentation. Every fold draws its own from it: members of an ensemble that
    start alike go wrong alike."""


class FoldRecipe(Config):
    """Everything that decides what a fold learns."""

    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    inference: InferenceConfig = InferenceConfig()


@dataclass(frozen=True)
class FoldTask:
    """Which fold to train, on what, and where its outputs go."""

    fold: int
    rows: Sequence[CohortRow]
    uri: str
    """Folder of the fold's outputs (absolute path or URI)."""
    provenance: Mapping[str, str]
