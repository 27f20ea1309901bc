"""What the annotations of a cohort hold: formats and labels, counted, with what is to be done about unknown ones."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from stas_core.data.annotation_listing import count_formats
from stas_core.data.annotations import AnnotationConfig, how_to_list
from stas_core.data.masks import FOREGROUND

SHOWN = 10
"""Labels that are listed; the manifest has all."""


@dataclass(frozen=True)
class Contents:
    """Formats and labels of all annotations that could be parsed."""

    formats: dict[str, int]
    labels: dict[str, dict[str, Any]]
    """Of each label: its shapes, the images that have it, and what it means."""
    listed: Mapping[str, str]
    """`annotation.labels`."""

    def lines(self) -> list[str]:
        """Return the counts as lines of text."""
        if not self.formats:
            return []
        formats = count_formats(form for form, count in self.formats.items() for _ in range(count))
        lines = [f"annotations: {formats}"]
        known = {label: one for label, one in self.labels.items() if one["means"] != "unknown"}
        unknown = {label: one for label, one in self.labels.items() if one["means"] == "unknown"}
        if known:
            lines.append(f"labels: {_listed(known, means=True)}")
        if unknown:
            how = how_to_list(list(unknown)[:3], self.listed)
            lines.append(f"labels that annotation.labels does not list: {_listed(unknown)}; {how}")
        return lines


def _listed(labels: Mapping[str, Mapping[str, Any]], *, means: bool = False) -> str:
    items = []
    for label, one in list(labels.items())[:SHOWN]:
        meaning = f" ({one['means']})" if means else ""
        items.append(f"{label!r}{meaning}: {one['shapes']} in {one['images']} image(s)")
    return ", ".join(items) + (f", and {len(labels) - SHOWN} more" if len(labels) > SHOWN else "")


def summarise_labels(rows: Iterable[Mapping[str, Any]], config: AnnotationConfig) -> Contents:
    """Count formats and labels over images; a row has `annotation_format` and `label_counts`, null if not known.

    The most frequent come first.
    """
    formats, num_shapes, num_images = Counter[str](), Counter[str](), Counter[str]()
    for row in rows:
        if row["annotation_format"] is None:
            continue
        formats[row["annotation_format"]] += 1
        counts = json.loads(row["label_counts"])
        num_shapes.update(counts)
        num_images.update(counts.keys())
    is_mask = "mask" in formats

    def meaning(label: str) -> str:
        if label == FOREGROUND and is_mask:
            return "target"
        means = config.meaning_of(label)
        return "unknown" if means == "error" else means

    labels = {
        label: {"shapes": count, "images": num_images[label], "means": meaning(label)}
        for label, count in num_shapes.most_common()
    }
    return Contents(dict(formats.most_common()), labels, config.labels)
