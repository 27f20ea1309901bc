"""The shell of every page: verdict and next commands, what was run, figures, the table of images with its viewer.

One HTML file holds its style, script and pictures, so that it opens from anywhere without a request. Whatever comes
from files (ids, messages, settings) is escaped, and a content policy lets no script run but the page's own.
"""

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

import stas_core
from stas_core.pages import charts
from stas_core.pages.contents import Column, Contents, Figure, Item, PictureSource
from stas_core.pages.pictures import Picture
from stas_core.pages.settings import Setting
from stas_core.spelling import without_passwords
from stas_core.verdicts import DO_NOT_USE, LOOK, OK, Verdict

LEVELS: Mapping[str, Mapping[str, str]] = {
    OK: {"css": "ok", "sign": "✓"},
    LOOK: {"css": "look", "sign": "!"},
    DO_NOT_USE: {"css": "bad", "sign": "✕"},
    "no verdict": {"css": "none", "sign": "\u2013"},
}
"""How each level of a verdict is shown."""
_FINE = "Nothing that is checked is out of the ordinary."
_TAG_SEPARATOR = "\x1f"
_DASH = "\u2013"


@dataclass(frozen=True)
class Run:
    """What a page says of the run itself."""

    stage: str
    where: str
    """Its folder."""
    verdict: Any
    """As the manifest has it."""
    next: Sequence[Mapping[str, str]]
    """Commands that come next, each with `why`."""
    provenance: Sequence[tuple[str, str]]
    """What was run: what, and its value."""
    settings: Sequence[Setting]


@dataclass(frozen=True)
class Sheet:
    """One page of a run that may have several."""

    number: int
    """From 1."""
    names: Sequence[str]
    """Of all pages."""
    items: Sequence[Item]
    pictures: Sequence[Picture]
    """Of each item."""
    paging: str = ""
    """What is on which page, as a sentence."""


def render(contents: Contents, run: Run, sheet: Sheet) -> str:
    """Return a page as HTML."""
    style, script = _asset("page.css"), _asset("page.js")
    first = sheet.number == 1
    figures = [_figure(figure, index) for index, figure in enumerate(contents.figures)] if first else []
    return _template().render(
        page=contents,
        number=sheet.number,
        pages=sheet.names,
        paging=sheet.paging,
        stage=run.stage,
        where=run.where,
        verdict=_verdict(run.verdict),
        levels=LEVELS,
        next=run.next,
        provenance=run.provenance,
        settings=run.settings,
        figures=figures,
        tables=[_table(table.title, table.reading, table.columns, table.rows) for table in contents.tables],
        items=_items(contents, sheet),
        data=_embedded(_data(contents, sheet, first)),
        css=Markup(style),
        script=Markup(script),
        script_hash=_hash(script),
        version=stas_core.__version__,
    )


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )
    return environment.from_string(_asset("page.html.j2"))


@cache
def _asset(name: str) -> str:
    return (files("stas_core.pages") / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """Return what a content policy knows a script by: no other can run, wherever it came from."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _shown(value: Any) -> Any:
    """Return what is shown of a value: no passwords of URIs, for a page is passed on."""
    if isinstance(value, Mapping):
        return {key: _shown(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(one) for one in value]
    return without_passwords(value) if type(value) is str and "://" in value else value


def _embedded(values: Any) -> Markup:
    """Return values as JSON that cannot end its element, whatever texts are in it."""
    text = json.dumps(_shown(values), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character, code in (("<", "\\u003c"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029")):
        text = text.replace(character, code)
    return Markup(text)


def _verdict(values: Any) -> dict[str, Any]:
    level = values.get("level") if isinstance(values, Mapping) else None
    if not isinstance(level, str) or level not in LEVELS:
        return {
            "level": "no verdict",
            **LEVELS["no verdict"],
            "reasons": (),
            "unchecked": (),
            "summary": "This stage passes no judgement on its result.",
        }
    found = Verdict.from_json(values)
    return {
        "level": level,
        **LEVELS[level],
        "reasons": () if found is None else [_without_stop(reason) for reason in found.reasons],
        "unchecked": () if found is None else found.unchecked,
        "summary": _FINE if level == OK else "The stages below say why." if found is None else "",
    }


def _without_stop(reason: Any) -> dict[str, str]:
    return {
        "level": reason.level,
        "figure": reason.figure,
        "limit": reason.limit,
        "remedy": reason.remedy.rstrip("."),
    }


def _figure(figure: Figure, index: int) -> dict[str, Any]:
    chart = figure.chart
    return {
        "title": figure.title,
        "reading": figure.reading,
        "is_wide": figure.is_wide,
        "image": figure.image,
        "strips": figure.strips,
        "index": index,
        "svg": None if chart is None else charts.draw(chart, figure.title),
        "legend": []
        if chart is None
        else [
            {"name": line.name, "colour": charts.colour_of(line, number), "is_dashed": line.is_dashed}
            for number, line in enumerate(chart.series)
        ],
    }


def _table(title: str, reading: str, columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    shown = [[cell(column, row.get(column.key)) for column in columns] for row in rows]
    return {"title": title, "reading": reading, "columns": [_header(column) for column in columns], "rows": shown}


def _header(column: Column) -> dict[str, str]:
    return {"title": column.title, "help": column.help, "css": _css(column)}


def _css(column: Column) -> str:
    return "text" if column.kind in ("text", "flag") else "number"


def cell(column: Column, value: Any) -> dict[str, str]:
    """Return a value as it is shown and as it is sorted."""
    return {"text": shown(column, value), "value": _sorted_by(value), "css": _css(column)}


def shown(column: Column, value: Any) -> str:
    """Return a value as a person reads it.

    >>> shown(Column("a", "area", kind="share", digits=1), 0.256)
    '25.6 %'
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return _DASH
    match column.kind:
        case "whole":
            return f"{value:,.0f}"
        case "number":
            return f"{value:,.{column.digits}f}"
        case "share":
            return f"{100 * value:.{column.digits}f} %"
        case "flag":
            return "yes" if value else "no"
    return str(value)


def _sorted_by(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return f"{value:.9g}" if isinstance(value, float) else str(int(value) if isinstance(value, bool) else value)


def _items(contents: Contents, sheet: Sheet) -> dict[str, Any]:
    word = contents.item_word
    num_all = len(contents.items) if contents.num_items is None else contents.num_items
    rows = []
    counts: dict[str, int] = {}
    for item, picture in zip(sheet.items, sheet.pictures, strict=True):
        values = dict(item.values)
        if "dice" in values and values["dice"] is None and picture.dice is not None:
            values["dice"] = picture.dice
        for tag in item.tags:
            counts[tag] = counts.get(tag, 0) + 1
        rows.append(
            {
                "id": item.id,
                "tags": _TAG_SEPARATOR.join(item.tags),
                "problem": item.problem,
                "cells": [cell(column, values.get(column.key)) for column in contents.columns],
            }
        )
    order = f"In the order of {contents.item_order}. " if contents.item_order else ""
    return {
        "title": f"{num_all:,} {word}{'' if num_all == 1 else 's'}",
        "note": f"{order}A click on a heading sorts; a click on a row shows the {word}. {sheet.paging}".strip(),
        "word": word,
        "tags": sorted(counts.items()),
        "columns": [_header(column) for column in contents.columns],
        "rows": rows,
    }


def _data(contents: Contents, sheet: Sheet, first: bool) -> dict[str, Any]:
    items = []
    for item, picture in zip(sheet.items, sheet.pictures, strict=True):
        one = picture.to_json() if item.source is not None else {}
        if item.source is not None and (mpp := _mpp(item.source, picture)) is not None:
            one |= {"mpp": mpp, "mpp_note": item.source.mpp_note}
        if item.targets:
            scale = _scale(item.source, picture)
            one["targets"] = [_target(contents, target, scale) for target in item.targets]
        one |= {"targets_note": item.targets_note} if item.targets_note else {}
        items.append(one)
    chosen = contents.figures if first else ()
    return {
        "charts": [None if figure.chart is None else charts.to_json(figure.chart) for figure in chosen],
        "items": items,
        "names": dict(contents.layer_names),
        "targets": [[column.title, column.help] for column in contents.target_columns],
    }


def _mpp(source: PictureSource, picture: Picture) -> float | None:
    """Return the um per pixel of an image."""
    if source.width_um is None or not picture.width:
        return source.mpp
    return source.width_um / picture.width


def _scale(source: PictureSource | None, picture: Picture) -> float:
    """Return px of the picture per px of the targets' boxes."""
    if source is None or source.full_width_px is None or not picture.width:
        return 1
    return picture.width / source.full_width_px


def _target(contents: Contents, target: Mapping[str, Any], scale: float) -> dict[str, Any]:
    texts = [shown(column, target.get(column.key)) for column in contents.target_columns]
    box = target["box"]
    if box is not None:
        box = list(box) if scale == 1 else [round(scale * value, 2) for value in box]
    return {"texts": [str(target["number"]), *texts], "box": box}
