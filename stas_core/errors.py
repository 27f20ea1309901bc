"""Every error this project raises on purpose.

    StasError
    ├── ConfigError             a config file, override or combination of settings is wrong
    ├── StorageError            a path cannot be read or written
    │   ├── WriteError              ... written: no image's fault, it ends the run
    │   │   └── LocalDiskError          ... to the machine's own disk: another machine may do
    │   └── WrongColumns            a table lacks a column, or has one of another type
    ├── CheckpointError         weights or a saved state do not fit what they are loaded into
    ├── ResourceError           the cluster can never fit what was asked for
    ├── DivergedError           training left the finite numbers
    ├── StaleOutputError        the output folder holds another run's results
    │   └── ForeignOutputError      ... another stage's, or another program's
    ├── OccupiedOutputError     another run holds the output folder, or took it over
    ├── DeletedOutputError      the output folder was deleted while the run worked there
    └── InputError              one bad input item; carries a `reason` code for failures.parquet
        ├── EmptyFile               empty_file
        ├── UnreadableImage         unreadable_image
        ├── WrongChannels           wrong_channels
        ├── WrongBitDepth           wrong_bit_depth
        ├── OversizedImage          oversized_image
        ├── MultiplePages           multiple_pages
        ├── UnreadableAnnotation    unreadable_annotation
        ├── OversizedAnnotation     oversized_annotation
        ├── MissingShapes           missing_shapes
        ├── UnknownLabel            unknown_label
        ├── TargetWithoutArea       target_without_area
        ├── WrongCoordinates        wrong_coordinates
        ├── UnclearMask             unclear_mask
        ├── SizeMismatch            size_mismatch
        ├── MissingAnnotation       missing_annotation
        ├── MissingImage            missing_image
        ├── ChangedInput            changed_input
        ├── DuplicateId             duplicate_id
        ├── UnusableId              unusable_id
        ├── UnreadableFile          unreadable_file
        ├── NotAFile                not_a_file (a StorageError, too)
        ├── SlowInput               slow
        ├── CrashedReader           crashed_reader
        ├── CrashedPrediction       crashed_prediction
        ├── NotFinite               not_finite
        ├── UnreadableSlide         unreadable_slide
        ├── IncompleteSlide         incomplete_slide
        ├── MissingReader           missing_reader
        ├── MissingMpp              missing_mpp
        ├── AbsurdMpp               absurd_mpp
        ├── AnisotropicMpp          anisotropic_mpp
        ├── CoarseSlide             coarse_slide
        ├── NoTissue                no_tissue
        ├── OutOfMemory             out_of_memory
        └── InternalError           internal_error

All take the message alone: an exception with further constructor arguments fails to unpickle when it comes
back from a Ray worker.
"""

import re
import traceback
from typing import ClassVar


class StasError(Exception):
    """Root of the tree: catch this to catch everything the project raises on purpose."""


class ConfigError(StasError):
    """A config file, override or combination of settings is wrong."""


class StorageError(StasError):
    """A path cannot be read or written."""


class WriteError(StorageError):
    """An output cannot be written (disk full, read-only, no permission): no input's fault, so it ends the run."""


class LocalDiskError(WriteError):
    """Temporary files cannot be written to this machine's own disk; another machine may have room."""


class WrongColumns(StorageError):
    """A table lacks a column, or has one of another type, or nulls where there must be none."""


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


class OccupiedOutputError(StasError):
    """Another run is using the output folder, or has taken it over."""


class DeletedOutputError(StasError):
    """The output folder was deleted while the run worked there."""


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


class MultiplePages(InputError):
    reason = "multiple_pages"


class UnreadableAnnotation(InputError):
    reason = "unreadable_annotation"


class OversizedAnnotation(InputError):
    """It has more bytes, values or vertices than can be read or drawn."""

    reason = "oversized_annotation"


class MissingShapes(InputError):
    reason = "missing_shapes"


class UnknownLabel(InputError):
    reason = "unknown_label"


class TargetWithoutArea(InputError):
    """A shape is labelled as target, but covers nothing that could be scored."""

    reason = "target_without_area"


class WrongCoordinates(InputError):
    """Coordinates are not pixels of the image: shares, percent, or x and y swapped."""

    reason = "wrong_coordinates"


class UnclearMask(InputError):
    """A mask does not say which of its values is target."""

    reason = "unclear_mask"


class SizeMismatch(InputError):
    reason = "size_mismatch"


class MissingAnnotation(InputError):
    reason = "missing_annotation"


class MissingImage(InputError):
    reason = "missing_image"


class ChangedInput(InputError):
    """A file is not the one that the cohort was made from, or that a run began with."""

    reason = "changed_input"


class DuplicateId(InputError):
    reason = "duplicate_id"


class UnusableId(InputError):
    reason = "unusable_id"


class UnreadableFile(InputError):
    """Storage could not deliver it; tried again in the next run."""

    reason = "unreadable_file"


class NotAFile(InputError, StorageError):
    """It is a folder, a pipe, a socket or a device."""

    reason = "not_a_file"


class SlowInput(InputError):
    """It took longer than its deadline; tried again in the next run."""

    reason = "slow"


class CrashedReader(InputError):
    reason = "crashed_reader"


class CrashedPrediction(InputError):
    """The process that predicted it died every time; tried again in the next run."""

    reason = "crashed_prediction"


class NotFinite(InputError):
    """The models' probabilities of an image are NaN or infinite."""

    reason = "not_finite"


class UnreadableSlide(InputError):
    """It is no slide that is read here, or it is damaged, perhaps only in some of its tiles."""

    reason = "unreadable_slide"


class IncompleteSlide(InputError):
    """A slide of several files lacks one."""

    reason = "incomplete_slide"


class MissingReader(InputError):
    """The machine lacks the library that reads the format; tried again in the next run."""

    reason = "missing_reader"


class MissingMpp(InputError):
    """Nothing says how many um a pixel has."""

    reason = "missing_mpp"


class AbsurdMpp(InputError):
    """No microscope gives such a resolution: it is a default of the program that wrote the file."""

    reason = "absurd_mpp"


class AnisotropicMpp(InputError):
    """Pixels are not square."""

    reason = "anisotropic_mpp"


class CoarseSlide(InputError):
    """It was scanned at a lower resolution than the model was trained at."""

    reason = "coarse_slide"


class NoTissue(InputError):
    """There is nothing on the slide to score."""

    reason = "no_tissue"


class OutOfMemory(InputError):
    reason = "out_of_memory"


class InternalError(InputError):
    """A defect in our own code: please report it with the item that triggers it."""

    reason = "internal_error"


TRY_AGAIN = frozenset(
    cls.reason
    for cls in (
        *(ChangedInput, UnreadableFile, SlowInput, CrashedReader, CrashedPrediction, MissingReader),
        *(OutOfMemory, InternalError),
    )
)
"""Reasons that lie in the surroundings, not in the item: the next run tries it again."""


def as_input_error(error: Exception, name: str) -> InputError:
    """Turn any exception into the failure of the item that raised it, so that the others can go on.

    What is not known becomes an `InternalError` with its traceback.
    """
    if isinstance(error, InputError):
        return error
    if isinstance(error, StorageError):
        return UnreadableFile(str(error))
    if isinstance(error, MemoryError):
        return OutOfMemory(f"{name} does not fit into memory; make it smaller, or give the process more")
    return InternalError(without_addresses(f"{name}: {''.join(traceback.format_exception(error))}".rstrip()))


def without_addresses(message: str) -> str:
    """Leave out addresses in memory, which differ between equal runs."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", message)
