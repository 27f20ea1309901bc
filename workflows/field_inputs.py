"""Which images a cohort is made of, each with its annotation; and the files that match none."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from stas_core import storage
from stas_core.data import images, listing
from stas_core.data.annotation_listing import EXPECTED, AnnotationListing, Describe, find_annotations
from stas_core.data.id_table import IdTable
from stas_core.errors import ConfigError, MissingAnnotation, MissingImage
from stas_core.failures import Failure

Unannotated = Literal["refuse", "leave_out", "negative"]
"""What an image without an annotation is: a failure, none of the inputs, or an image without targets."""


WITHOUT_ANNOTATION = "images without annotation"


class Item(TypedDict):
    """An image and its annotation, as Ray Data passes them on."""

    id: str
    image_uri: str
    annotation_uri: str
    stamp: str
    """Marks the versions of both."""


@dataclass(frozen=True)
class Inputs:
    """What the two folders hold."""

    items: list[Item]
    """Images with their annotations, sorted by id."""
    failed: list[Failure]
    """Failure rows of files without a partner, of slides, and of names that are no ids or occur twice."""
    passed_over: dict[str, dict[str, int]]
    """Of each folder, by key: how many files there are of each suffix that is not read, and images left out."""


def find_inputs(
    stage: str,
    image_folder: str,
    annotation_folder: str,
    describe: Describe,
    *,
    unannotated: Unannotated = "refuse",
    negative: str | None = None,
    negatives: IdTable[str] | None = None,
) -> Inputs:
    """Match images with annotations of any format.

    Args:
        stage: what failure rows name.
        image_folder: folder, glob or file of images.
        annotation_folder: folder, glob or file of annotations.
        describe: looks into an annotation file that is named like no image.
        unannotated: what an image without an annotation is.
        negative: the annotation of images without targets, where there may be such.
        negatives: images that are said to have no target.

    Raises:
        ConfigError: there is neither, all images would be left out, or one without a target has an annotation.
    """
    found = listing.find(image_folder, images.IMAGE_SUFFIXES).with_slides_refused()
    annotated = find_annotations(
        annotation_folder, found.uris.keys(), image_uris=found.uris.values(), describe=describe
    )
    passed_over = {"data.images": found.passed_over, "data.annotations": annotated.passed_over}
    notes = [f"{key}: passed over {listing.in_words(counts)}" for key, counts in passed_over.items() if counts]
    if not (found.uris or found.refused or annotated.uris or annotated.refused):
        raise ConfigError(_nothing(image_folder, annotation_folder, notes))
    for note in notes:
        print(note)
    refused = dict([*found.refused, *annotated.refused])
    failed = [Failure.of(image_id, stage, error) for image_id, error in refused.items()]
    listed = set() if negatives is None else _without_target(negatives, list(found.uris), annotated.uris)
    pairs, left_out = [], []
    for image_id in sorted({*found.uris, *annotated.uris} - refused.keys()):
        image_uri, annotation_uri = found.uris.get(image_id), annotated.uris.get(image_id)
        if image_uri is None:
            message = _without_image(str(annotation_uri), image_id, image_folder, annotated.strangers)
            failed.append(Failure(image_id, stage, MissingImage.reason, message))
        elif annotation_uri is not None:
            pairs.append((image_id, image_uri, annotation_uri))
        elif negative is not None and (unannotated == "negative" or image_id in listed):
            pairs.append((image_id, image_uri, negative))
        elif unannotated == "leave_out":
            left_out.append(image_id)
        else:
            message = _without_annotation(image_uri, annotation_folder, annotated)
            failed.append(Failure(image_id, stage, MissingAnnotation.reason, message))
    if left_out and not (pairs or failed):
        raise ConfigError(_all_left_out(len(left_out), image_folder, annotation_folder))
    if num_negative := sum(image_id not in annotated.uris for image_id, *_ in pairs):
        print(f"{num_negative} of {len(pairs)} images have no annotation and count as images without targets")
    if left_out:
        print(f"{len(left_out)} images have no annotation and are left out (data.unannotated=leave_out)")
        passed_over["data.images"] |= {WITHOUT_ANNOTATION: len(left_out)}
    return Inputs(_items(pairs), failed, passed_over)


def _nothing(image_folder: str, annotation_folder: str, notes: list[str]) -> str:
    return (
        f"data.images = {image_folder} holds no images ({', '.join(images.IMAGE_SUFFIXES)}) and data.annotations = "
        f"{annotation_folder} no annotations: {EXPECTED}; {'; '.join(notes)}"
    )


def _all_left_out(num: int, image_folder: str, annotation_folder: str) -> str:
    return (
        f"none of the {num} images in data.images = {image_folder} has an annotation in data.annotations = "
        f"{annotation_folder}, and data.unannotated=leave_out leaves all of them out; give the folder of their "
        "annotations"
    )


def _without_target(negatives: IdTable[str], names: list[str], annotations: Mapping[str, str]) -> set[str]:
    """Return the images that are said to have no target.

    Raises:
        ConfigError: one has an annotation.
    """
    listed = set(negatives.named(names))
    # A COCO file may list images that have no shapes: of these it says the same.
    num_images = Counter(annotations.values())
    both = sorted(name for name in listed & annotations.keys() if num_images[annotations[name]] == 1)
    if both:
        raise ConfigError(
            f"{negatives.source}: {len(both)} of its images have an annotation, such as {both[0]}: "
            f"{annotations[both[0]]}; take them out of one of the two"
        )
    return listed


def _items(pairs: Sequence[tuple[str, str, str]]) -> list[Item]:
    """Return items of ids, images and annotations."""
    stamps = zip(*(storage.stamps([pair[place] for pair in pairs]) for place in (1, 2)), strict=True)
    return [
        Item(id=image_id, image_uri=image, annotation_uri=annotation, stamp=" ".join([image, annotation, *both]))
        for (image_id, image, annotation), both in zip(pairs, stamps, strict=True)
    ]


def _without_annotation(image_uri: str, folder: str, annotated: AnnotationListing) -> str:
    kinds = listing.in_words(annotated.passed_over)
    there = [f"{kinds} that are not read"] if kinds else []
    if annotated.strangers:
        there.append(f"{len(annotated.strangers)} named like no image, such as {min(annotated.strangers)}")
    found = f"found {', '.join(there)}; " if there else ""
    return f"{image_uri} has no annotation in {folder}: {found}expected {EXPECTED}; annotate it or take it out"


def _without_image(annotation_uri: str, image_id: str, folder: str, strangers: Mapping[str, str]) -> str:
    if image_id not in strangers:
        return f"{annotation_uri} annotates an image {image_id}, which is not in {folder}; add it or take it out"
    said = strangers[image_id] or "is no COCO file"
    return (
        f"{annotation_uri} has no image {image_id} in {folder}, and {said}: a file of labelme, GeoJSON or ASAP XML, or "
        "a mask, is named like its image; only a COCO .json names its images itself; add the image or take the file out"
    )
