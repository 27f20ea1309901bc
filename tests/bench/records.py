"""How long a run of score_images takes to settle and to gather many finished images, and with how much memory.

    python -m tests.bench.records [--records 100000] [--targets 5] [--folder /tmp] [--sides before,migrate,after]
    python -m tests.bench.records --records 1000000 --packed

Before: a JSON record for each image, all read into objects, when a run settles what is left to do and when it gathers
tables; the code as it was. Migrate: the same folder with the code of today, which packs the records into parts first.
After: with the parts. On disk, each in a process of its own, whose peak memory is told less that of the list of images;
and in a store in memory that counts requests as an object store would answer them (1000 names a listing or deletion).
With --packed the parts are
written at once, and after is measured alone. Masks are links to one file; the archive of all
masks and the contact sheet are left out on all sides.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
from fsspec.spec import AbstractFileSystem

from stas_core import record_parts, scored_verdicts, storage, tables
from stas_core.data.appearance import Look
from stas_core.data.reference import CohortReference
from stas_core.failures import Failure
from stas_core.predict.postprocess import PostprocessConfig
from stas_core.scored_runs import MAPS, MASKS, RECORDS, ImageRecord, ScoredImage, ScoredTarget
from stas_core.verdicts import VerdictConfig
from workflows.scoring import image_results
from workflows.scoring.image_results import Given, write_results
from workflows.scoring.settling import read_standings, split_todo
from workflows.scoring.tasks import STEPS, Item, LimitsConfig, SaveConfig, ScoreTask

SAVE = SaveConfig(maps=False, overlays=False, geojson=False, archive=False)
LINKS = 30_000
LOOK = Look(181.0, 0.31, 1.52, 0.83, 0.65, 0.27, 0.21, 0.09)
REFERENCE = CohortReference(
    num_images=228, empty_share=0.05, large_share=0.1, looks={"brightness": (150.0, 210.0)}, disagreement=0.02
)


def task_in(out: str) -> ScoreTask:
    return ScoreTask(out, "f" * 32, PostprocessConfig(), SAVE, LimitsConfig())


def item_of(number: int) -> Item:
    item_id = f"field_{number:08d}"
    return Item(id=item_id, image_uri=f"/data/images/{item_id}.jpg", stamp=f"/data/images/{item_id}.jpg 184467:17.25")


class Template:
    """Text of the record of any image."""

    def __init__(self, task: ScoreTask, num_targets: int):
        item = item_of(99_999_999)
        found = ScoredImage(item["id"], item["image_uri"], 942, 1716, 0.173219, num_targets, 1, 0.0123456, 4, LOOK)
        targets = [
            ScoredTarget(item["id"], n, 15_243, 812.4567, 301.25, 700, 250, 910, 380, 0.8123456, 0.97, False)
            for n in range(1, num_targets + 1)
        ]
        record = ImageRecord(
            id=item["id"],
            image_uri=item["image_uri"],
            stamp=item["stamp"],
            found=found,
            targets=targets,
            folders=[MASKS],
            predict_key=task.predict_key,
            finish_key=task.finish_key,
            limits_key=task.limits.key,
            seconds=dict.fromkeys(STEPS, 0.1234567),
        )
        self._text = json.dumps(record.to_json(), indent=1)

    def of(self, number: int) -> bytes:
        share = f"0.{number % 999_983:06d}"
        text = self._text.replace("99999999", f"{number:08d}").replace("0.173219", share)
        return text.encode()


class Objects(AbstractFileSystem):  # type: ignore[misc]
    """A store of objects in memory that counts requests; loose records are made when they are read."""

    protocol = "objects"
    held: ClassVar[dict[str, dict[str, bytes | None]]] = {}
    requests: ClassVar[Counter[str]] = Counter()
    template: Template
    lock = threading.Lock()

    def _folder(self, path: str) -> tuple[dict[str, bytes | None], str]:
        folder, _, name = path.rstrip("/").rpartition("/")
        return self.held.setdefault(folder, {}), name

    def _count(self, what: str, number: int = 1) -> None:
        with self.lock:
            self.requests[what] += number

    def exists(self, path: str, **_: Any) -> bool:
        self._count("head")
        folder, name = self._folder(path)
        return name in folder or path in self.held

    def isdir(self, path: str) -> bool:
        self._count("head")
        return bool(self.held.get(path))

    def find(self, path: str, **_: Any) -> list[str]:
        names = self.held.get(path, {})
        self._count("list", -(-len(names) // 1000) or 1)
        return [f"{path}/{name}" for name in names]

    def info(self, path: str, **_: Any) -> dict[str, Any]:  # of what was listed: no request
        return {"name": path, "size": 1, "type": "file", "ETag": "1"}

    def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        self._count("get")
        folder, name = self._folder(path)
        data = folder[name]
        return self.template.of(int(name[6:14])) if data is None else data

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        Path(lpath).write_bytes(self.cat_file(rpath))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        self._count("put")
        folder, name = self._folder(path)
        folder[name] = value

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def rm(self, path: Any, **_: Any) -> None:
        paths = [path] if isinstance(path, str) else path
        self._count("delete", -(-len(paths) // 1000))
        for one in paths:
            folder, name = self._folder(one)
            folder.pop(name, None)


fsspec.register_implementation("objects", Objects)


def fill(out: str, num: int, template: Template, *, packed: bool = False) -> None:
    """Write the records and masks of finished images."""
    task = task_in(out)
    if not storage.is_local(out):
        Objects.template = template
        root = out.partition("://")[2]
        Objects.held[f"{root}/{RECORDS}"] = {f"{item_of(n)['id']}.json": None for n in range(num)}
        Objects.held[f"{root}/{MASKS}"] = {f"{item_of(n)['id']}.png": None for n in range(num)}
        return
    for kind in (RECORDS, MASKS):
        Path(out, kind).mkdir(parents=True)
    mask = Path(out, MASKS)
    for number in range(num):
        item = item_of(number)
        if not packed:
            Path(task.file(RECORDS, item["id"])).write_bytes(template.of(number))
        path = Path(task.file(MASKS, item["id"]))
        if number % LINKS == 0:
            path.write_bytes(b"mask")
            mask = path
        else:
            os.link(mask, path)
    if packed:
        pack_all(out, num, template)


def pack_all(out: str, num: int, template: Template) -> None:
    """Write the records of finished images as parts."""
    task = task_in(out)
    (Path(out) / "one").write_bytes(template.of(0))
    one = record_parts.pack([ImageRecord.read(f"{out}/one")])
    (Path(out) / "one").unlink()
    for start in range(0, num, record_parts.PART_ROWS):
        numbers = range(start, min(start + record_parts.PART_ROWS, num))
        table = pa.concat_tables([one] * len(numbers)).combine_chunks()
        ids = pa.array([item_of(number)["id"] for number in numbers])
        table = table.set_column(0, table.field(0), ids)
        table = table.set_column(1, table.field(1), pa.array([item_of(number)["image_uri"] for number in numbers]))
        table = table.set_column(2, table.field(2), pa.array([item_of(number)["stamp"] for number in numbers]))
        found: Any = table["found"].combine_chunks()
        inner = [ids if field.name == "id" else found.field(field.name) for field in found.type]
        index = table.column_names.index("found")
        table = table.set_column(index, table.field(index), pa.StructArray.from_arrays(inner, fields=list(found.type)))
        name = f"part-{start // record_parts.PART_ROWS + 1:06d}-00000000.parquet"
        tables.write_table(f"{task.run.path(RECORDS)}/{name}", table, rows_per_group=1000)


def settle_before(task: ScoreTask, items: list[Item]) -> int:
    """Count what is left to do, as it was done."""
    records = {record.id: record for record in _read_all(task)}
    written = {kind: task.run.files(kind) for kind in task.run.KINDS}
    todo = 0
    for item in items:
        record = records.get(item["id"])
        if record is None or record.stamp != item["stamp"] or record.predict_key != task.predict_key:
            todo += 1
        elif record.found is not None:
            held = {kind for kind in record.folders if item["id"] in written[kind]}
            reusable = held.issuperset([MAPS])
            todo += record.finish_key != task.finish_key or (not held.issuperset(task.save.folders()) and not reusable)
    return todo


def _read_all(task: ScoreTask) -> list[ImageRecord]:
    uris = [uri for _, uri in sorted(task.run.files(RECORDS).items())]
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(task.run.read_record, uris))


def gather_before(task: ScoreTask, items: list[Item]) -> None:
    """Gather records into tables, as it was done."""
    stamps = {item["id"]: item["stamp"] for item in items}
    records = [record for record in _read_all(task) if record.id in stamps]
    assert all(record.stamp == stamps[record.id] and record.finish_key == task.finish_key for record in records)
    good = [record.found for record in records if record.found is not None]
    good = scored_verdicts.with_drift(good, REFERENCE)
    targets = [target for record in records for target in record.targets]
    timings = [{"id": record.id, **record.seconds} for record in records]
    own = set(stamps)
    for kind in task.run.KINDS:
        assert kind in (RECORDS, MASKS) or not task.run.files(kind).keys() & own
    if storage.is_local(task.out):
        assert not list(Path(task.out).rglob(".*.tmp"))
    run = task.run
    tables.write_rows(run.path(run.TABLE), ScoredImage, good)
    tables.write_rows(run.path(run.TARGETS), ScoredTarget, targets)
    tables.write_rows(run.path(run.FAILURES), Failure, [])
    tables.write_table(run.path(run.TIMINGS), pa.Table.from_pylist(timings))
    boxes: dict[str, list[list[float]]] = {found.id: [] for found in good}
    for row in targets:
        boxes[row.id].append([row.x0, row.y0, row.x1 - 1, row.y1 - 1, round(row.mean_prob, 6)])
    storage.write_bytes(run.path(run.DETECTION), json.dumps(boxes, indent=0).encode())
    scored_verdicts.of_images(good, 0, REFERENCE, VerdictConfig())


def settle_after(task: ScoreTask, items: list[Item]) -> int:
    record_parts.compact_if_many(task.run, verify=lambda: None)
    fresh, from_maps = split_todo(items, read_standings(task.run, items), task)
    return len(fresh) + len(from_maps)


def gather_after(task: ScoreTask, items: list[Item]) -> None:
    image_results.contact_sheet = lambda *_: b""
    given = Given(items, [], {}, REFERENCE, ())
    write_results(task, given, own=frozenset(item["id"] for item in items), limits=VerdictConfig())


def megabytes() -> float:
    """Return the most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(side: str, out: str, num: int) -> dict[str, Any]:
    """Settle and gather in this process."""
    task, items = task_in(out), [item_of(number) for number in range(num)]
    at_first, found = megabytes(), dict[str, Any]()
    for step in ("settle", "gather"):
        Objects.requests.clear()
        start, used = time.perf_counter(), time.process_time()
        if step == "settle":
            todo = (settle_before if side == "before" else settle_after)(task, items)
            assert todo == 0, f"{todo} of {num} images would be done again"
        else:
            (gather_before if side == "before" else gather_after)(task, items)
        found[step] = {
            "seconds": time.perf_counter() - start,
            "cpu_s": time.process_time() - used,
            "mb": megabytes() - at_first,
            "requests": dict(Objects.requests),
        }
    return found


def show(where: str, side: str, num: int, found: dict[str, Any]) -> None:
    for step, one in found.items():
        requests = f"; {one['requests']}" if one["requests"] else ""
        memory = f", {one['mb']:,.0f} MB" if not requests else ""
        print(
            f"{num:,} records {where}, {side}, {step}: {one['seconds']:.1f} s, {one['cpu_s']:.1f} of CPUs"
            f"{memory}{requests}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--targets", type=int, default=5)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--sides", default="before,migrate,after")
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one[0], given.one[1], given.records)))
        return
    sides = ["after"] if given.packed else given.sides.split(",")
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        out = str(Path(folder, "out"))
        start = time.perf_counter()
        fill(out, given.records, Template(task_in(out), given.targets), packed=given.packed)
        print(f"{given.records:,} records written in {time.perf_counter() - start:.0f} s", flush=True)
        for side in sides:
            line = [sys.executable, "-m", "tests.bench.records", "--records", str(given.records), "--one", side, out]
            answer = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout
            show("on disk", side, given.records, json.loads(answer.splitlines()[-1]))
            if side == "before":
                expected = tables.read_table(task_in(out).run.path("images.parquet"))
            elif "before" in sides:
                assert tables.read_table(task_in(out).run.path("images.parquet")).equals(expected)
    if given.packed:
        return
    fill("objects://bucket/out", given.records, Template(task_in("objects://bucket/out"), given.targets))
    for side in sides:
        show("in a store of objects", side, given.records, measure(side, "objects://bucket/out", given.records))


if __name__ == "__main__":
    main()
