"""Every error this project raises on purpose.

    StasError
    ├── ConfigError             a config file, override or combination of settings is wrong
    ├── StorageError            a path cannot be read or written
    ├── CheckpointError         weights or a saved state do not fit what they are loaded into
    ├── ResourceError           the cluster can never fit what was asked for
    ├── DivergedError           training left the finite numbers
    ├── StaleOutputError        the output folder holds another run's results
    │   └── ForeignOutputError      ... another stage's, or another program's
    └── InputError              one bad input item; carries a `reason` code for failures.parquet
        ├── EmptyFile               empty_file
        ├── UnreadableImage         unreadable_image
        ├── WrongChannels           wrong_channels
        ├── WrongBitDepth           wrong_bit_depth
        ├── OversizedImage          oversized_image
        ├── UnreadableAnnotation    unreadable_annotation
        ├── MissingShapes           missing_shapes
        ├── UnknownLabel            unknown_label
        ├── SizeMismatch            size_mismatch
        ├── MissingAnnotation       missing_annotation
        ├── MissingImage            missing_image
        ├── DuplicateId             duplicate_id
        ├── UnusableId              unusable_id
        ├── UnreadableFile          unreadable_file
        ├── SlowInput               slow
        ├── CrashedReader           crashed_reader
        ├── CrashedPrediction       crashed_prediction
        ├── OutOfMemory             out_of_memory
        └── InternalError           internal_error

All take the message alone: an exception with further constructor arguments fails to unpickle when it comes
back from a Ray worker.
"""

from typing import ClassVar


class StasError(Exception):
    """Root of the tree: catch this to catch everything the project raises on purpose."""


class ConfigError(StasError):
    """A config file, override or combination of settings is wrong."""


class StorageError(StasError):
    """A path cannot be read or written."""


class CheckpointError(StasError):
    """Weights or a saved state do not fit what they are loaded into."""


class ResourceError(StasError):
    """The cluster can never fit what was asked for."""


class DivergedError(StasError):
    """Training left the finite numbers."""


class StaleOutputError(StasError):
    """The output folder holds the results of another configuration or other inputs."""


class ForeignOutputError(StaleOutputError):
    """The output folder holds what another stage or another program made."""


class InputError(StasError):
    """One bad input item. `reason` is the stable code written to failures.parquet."""

    reason: ClassVar[str] = "bad_input"


class EmptyFile(InputError):
    reason = "empty_file"


class UnreadableImage(InputError):
    reason = "unreadable_image"


class WrongChannels(InputError):
    reason = "wrong_channels"


class WrongBitDepth(InputError):
    reason = "wrong_bit_depth"


class OversizedImage(InputError):
    reason = "oversized_image"


class UnreadableAnnotation(InputError):
    reason = "unreadable_annotation"


class MissingShapes(InputError):
    reason = "missing_shapes"


class UnknownLabel(InputError):
    reason = "unknown_label"


class SizeMismatch(InputError):
    reason = "size_mismatch"


class MissingAnnotation(InputError):
    reason = "missing_annotation"


class MissingImage(InputError):
    reason = "missing_image"


class DuplicateId(InputError):
    reason = "duplicate_id"


class UnusableId(InputError):
    reason = "unusable_id"


class UnreadableFile(InputError):
    """Storage could not deliver it; tried again in the next run."""

    reason = "unreadable_file"


class SlowInput(InputError):
    """It took longer than its deadline; tried again in the next run."""

    reason = "slow"


class CrashedReader(InputError):
    reason = "crashed_reader"


class CrashedPrediction(InputError):
    """The process that predicted it ended, each time; tried again in the next run."""

    reason = "crashed_prediction"


class OutOfMemory(InputError):
    reason = "out_of_memory"


class InternalError(InputError):
    """Our own code failed on it: a defect to be reported, with the item that shows it."""

    reason = "internal_error"
