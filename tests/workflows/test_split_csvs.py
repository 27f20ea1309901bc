"""The CSVs of groups and of a published split, as prepare_data takes them; images are measured without Ray."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from stas_core import config
from stas_core.data import cohort
from stas_core.errors import ConfigError
from workflows import measuring, prepare_data
from workflows.prepare_data import PrepareConfig

IDS = [f"f{number:02d}" for number in range(8)]
PATIENTS = ["P 0", "P 0", "P 1", "P 1", "P 2", "P 2", "P 3", "P 3"]
GROUPS = "".join(f"{name},{patient}\n" for name, patient in zip(IDS, PATIENTS, strict=True))


@pytest.fixture(scope="module")
def fields(phantom_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the phantom fields under the ids f00 to f07."""
    folder = tmp_path_factory.mktemp("fields")
    for kind in ("images", "annotations"):
        (folder / kind).mkdir()
        for name, path in zip(IDS, sorted((phantom_folder / kind).iterdir()), strict=True):
            shutil.copy(path, folder / kind / f"{name}{path.suffix}")
    return folder


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Measure in this process, draw no figures; return the list that fills with the ids of what is measured."""
    seen: list[str] = []

    def stream(items: Any, *args: Any) -> Any:
        for item in items:
            seen.append(item["id"])
            yield measuring.measure_item(item, *args)

    monkeypatch.setattr(prepare_data, "stream", stream)
    monkeypatch.setattr(prepare_data, "_write_figures", lambda *_: None)
    return seen


def prepare(fields: Path, out: Path, data: bytes, key: str = "groups_csv", **split: Any) -> list[cohort.CohortRow]:
    table = out.parent / f"{out.name}.csv"
    table.write_bytes(data)
    split = {"num_folds": 2, "hold_out_fraction": 0, key: str(table)} | split
    folders = {"images": str(fields / "images"), "annotations": str(fields / "annotations")}
    assert prepare_data.run(config.build(PrepareConfig, {"data": folders, "out": str(out), "split": split}), False) == 0
    return cohort.read_cohort(str(out / "cohort.parquet"))


@pytest.mark.parametrize(
    "data",
    [
        b"image_id,group\n" + GROUPS.replace("f01,P 0", "f01,P 0 ").encode(),
        b"image_id, group\n" + GROUPS.replace(",", ", ").encode(),
        b"image_id;group\n" + GROUPS.replace(",", ";").encode(),
        b"\xef\xbb\xbfImage_ID,Group\n" + GROUPS.replace("\n", "\n\n").encode(),
        ("image_id,group\n" + GROUPS).encode("utf-16"),
        ("image_id,group\r" + GROUPS.replace("\n", "\r")).encode(),
        b"image_id,group\n" + GROUPS.replace(",", ".jpg,").encode(),
    ],
    ids=["blanks-after", "blanks-before", "semicolons", "bom-case-blank-rows", "utf-16", "cr", "extensions"],
)
def test_images_of_a_patient_stay_in_one_fold(fields: Path, tmp_path: Path, measured: list[str], data: bytes) -> None:
    rows = prepare(fields, tmp_path / "out", data)
    assert [row.group for row in rows] == PATIENTS
    assert all(rows[i].fold == rows[i + 1].fold for i in range(0, 8, 2))


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("groups_csv", GROUPS.replace("P 0", "病人"), "row 2: byte 19 is not UTF-8"),
        ("groups_csv", GROUPS + "f00,P 9\n", r"rows 2 and 10 contradict each other: f00 has group 'P 0' and 'P 9'"),
        ("groups_csv", GROUPS.replace("f03,P 1", "f03,"), "row 5, column group is empty"),
        ("groups_csv", GROUPS.replace("f03", "f0\0"), "row 5 holds a NUL"),
        ("groups_csv", GROUPS.replace("f03,P 1\n", ""), "has no row for 1 of 8 images, first f03"),
        ("groups_csv", "", "has no rows below its header"),
        ("published_csv", "".join(f"{name},0\n" for name in IDS), "has one fold to train on, 0"),
        ("published_csv", "".join(f"{name},{i % 3 - 1}\n" for i, name in enumerate(IDS)), "row 2 .*-1 is no fold"),
        ("published_csv", "".join(f"{name},0.5\n" for name in IDS), r"row 2 \(f00\), column fold: .*'0.5'"),
        ("published_csv", "".join(f"{name},{i % 2}\n" for i, name in enumerate(IDS[1:])), "no row for 1 of 8 images"),
        ("published_csv", "f00,1\nf00,2\n", "contradict"),
    ],
)
def test_a_csv_that_cannot_be_used_is_refused_before_any_image_is_read(
    fields: Path, tmp_path: Path, measured: list[str], key: str, text: str, message: str
) -> None:
    header = "image_id,group\n" if key == "groups_csv" else "image_id,fold\n"
    with pytest.raises(ConfigError, match=message):
        prepare(fields, tmp_path / "out", (header + text).encode("big5"), key)
    assert measured == []


def test_folds_written_by_a_spreadsheet_are_whole_numbers(fields: Path, tmp_path: Path, measured: list[str]) -> None:
    text = "image_id,fold\n" + "".join(f"{name},{i % 2}.0\n" for i, name in enumerate(IDS))
    assert [row.fold for row in prepare(fields, tmp_path / "out", text.encode(), "published_csv")] == [0, 1] * 4


def test_a_negative_fold_may_be_the_hold_out_and_one_that_is_not_there_may_not(
    fields: Path, tmp_path: Path, measured: list[str]
) -> None:
    data = ("image_id,fold\n" + "".join(f"{name},{i % 3 - 1}\n" for i, name in enumerate(IDS))).encode()
    rows = prepare(fields, tmp_path / "a", data, "published_csv", hold_out_fold=-1)
    assert [row.fold for row in rows] == [None, 0, 1, None, 0, 1, None, 0]
    with pytest.raises(ConfigError, match=r"hold_out_fold = 7: .* has no such fold, but \[0, 1\]"):
        text = "image_id,fold\n" + "".join(f"{name},{i % 2}\n" for i, name in enumerate(IDS))
        prepare(fields, tmp_path / "b", text.encode(), "published_csv", hold_out_fold=7)


def test_another_content_of_the_csv_is_another_split(fields: Path, tmp_path: Path, measured: list[str]) -> None:
    first = prepare(fields, tmp_path / "out", ("image_id,group\n" + GROUPS).encode())
    second = prepare(fields, tmp_path / "out", ("image_id,group\n" + GROUPS.replace("P 1", "P 0")).encode())
    assert first[2].group == "P 1" and second[2].group == "P 0" and len(measured) == 8


def test_rows_that_name_no_image_are_counted(
    fields: Path, tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(fields, tmp_path / "out", f"image_id,group\n{GROUPS}gone,P 7\n".encode())
    assert "1 row(s) name no image to prepare, first gone" in capsys.readouterr().out


def test_a_published_split_that_divides_a_patient_is_said_to(
    fields: Path, tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "g.csv").write_text("image_id,group\n" + GROUPS)
    data = ("image_id,fold\n" + "".join(f"{name},{i % 2}\n" for i, name in enumerate(IDS))).encode()
    prepare(fields, tmp_path / "out", data, "published_csv", groups_csv=str(tmp_path / "g.csv"))
    assert "divides 4 group(s)" in capsys.readouterr().out
