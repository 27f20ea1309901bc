"""What bounds a run of score_images on 1 to 512 GPUs and 10^3 to 10^7 images, by simulation on recorded costs.

    python -m tests.bench.scale [--predict-ms 80] [--cpus-per-gpu 8] [--gpus 1 8 64 512] [--images 1000 ... 10000000]
    python -m tests.bench.scale --before

No Ray: discrete events, seconds of CPU. Each block of images is read, predicted and finished on what `plan_scoring` and
`Calibration.fit` give a cluster of nodes of eight GPUs; its tasks pass through what there is one of: the process that
lays out the pipeline, the ledger that is told of each image, and the driver, which counts rows and packs records. What
these cost is recorded (`Costs`, with its source); seconds on a GPU are assumed, as none was at hand. What the driver
keeps of an image, and what packing its record takes, is measured here, on real objects.

The store answers a request in 30 ms, on ten connections a process (botocore's default). --before plays the code as it
was: every image asks for an older record, which is a HEAD and a list; records are listed and read to be packed; blocks
are of the same size in small runs. The baseline of the speed-up is one GPU that is never kept waiting.
"""

import argparse
import gc
import heapq
import json
import math
import time
import tracemalloc
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

from stas_core import record_parts
from stas_core.scored_runs import ScoredRun
from tests.bench.records import Objects, Template, fill, item_of, task_in
from workflows.cluster import Node
from workflows.progress import duration
from workflows.scoring.pipeline import Calibration
from workflows.scoring.plan import MIN_CALIBRATED, ScorePlan, ScoreResources, plan_scoring
from workflows.scoring.settling import split_todo

GPUS_PER_NODE = 8
FILES = 5
"""Mask, map, overlay, GeoJSON and record of an image."""
KINDS = 7
"""Folders and suffixes of a run's files, each listed when it begins and when it ends."""
NAMES_PER_LIST = 1000
BLOCK_BYTES = 10_000
"""What the pipeline's process keeps of a block: its memory at 2,000 blocks, on a Ray of this machine."""


@dataclass(frozen=True)
class Costs:
    """Seconds, processor time where nothing else is said; per image unless a line says otherwise."""

    predict: float
    """On a GPU, by the clock: assumed."""
    decode: float = 0.029
    """A field of 1716 x 942 px, median of nine."""
    finish: float = 0.089
    """The same, with all files of the defaults but the disagreement."""
    layout: float = 0.018
    """Of the pipeline's process, for the three tasks of a block: 2,000 blocks through a Ray of this machine."""
    ledger: float = 0.0006
    """Of the ledger, for a call: 20,000 calls of two workers."""
    row: float = 32e-6
    """Of the driver, to count a finished image, with metrics: 50,000 rows."""
    pack: float = 0.0
    """Of the driver, to put its record into a part; measured by each run of this script."""
    settle: float = 31e-6
    """To settle what is left to do: `tests.bench.records`, a million records in parts."""
    gather: float = 132e-6
    """To gather records into tables: the same."""
    request: float = 0.03
    """Of the store, for a request, by the clock."""
    connections: int = 10


@dataclass(frozen=True)
class Outcome:
    """How a run went, by the clock of the simulation."""

    pipeline_s: float
    """Until the last image is finished."""
    driver_s: float
    """Until the driver has packed its records."""
    tables_s: float
    busy: float
    """Share of the pipeline's time that GPUs predict."""
    bound: str
    requests: Counter[str]

    @property
    def seconds(self) -> float:
        return self.driver_s + self.tables_s


class Server:
    """What there is one of: does one thing after the other."""

    def __init__(self) -> None:
        self.free = self.worked = 0.0

    def serve(self, now: float, seconds: float) -> float:
        """Return when it is done with what it is asked now."""
        self.free = max(now, self.free) + seconds
        self.worked += seconds
        return self.free


class Driver:
    """Counts rows, and packs records as they become many."""

    def __init__(self, costs: Costs, requests: Counter[str], *, before: bool):
        self._costs, self._requests, self._before = costs, requests, before
        self._finished = self._packed = self._unpacked = 0
        self.server = Server()

    def take(self, now: float, num_images: int) -> None:
        """Take the rows of a block that was finished; it comes to them when it has packed what came earlier."""
        self._finished += num_images
        self._unpacked += num_images
        self.server.serve(now, num_images * self._costs.row)
        if self._unpacked >= record_parts.PART_ROWS:
            self.server.serve(now, self._pack(self._unpacked))
            self._unpacked = 0

    def _pack(self, num: int) -> float:
        costs, found = self._costs, Counter({"put": 1, "delete": math.ceil(num / NAMES_PER_LIST)})
        at_once = 0.0
        if self._before:
            loose = self._finished - self._packed  # what was finished while it was busy lies there, too
            found["list"] += 3 * math.ceil(loose / NAMES_PER_LIST)
            at_once = 2 * num * costs.request / costs.connections  # s3fs asks for the size of what it reads
            found["get"] += num
        self._packed += num
        self._requests.update(found)
        return num * costs.pack + at_once + costs.request * sum(found[one] for one in ("put", "delete", "list"))


@dataclass(frozen=True)
class Steps:
    """How long a task of each step works on an image, and how many calls of the ledger it makes for it."""

    seconds: dict[str, float]
    calls: dict[str, float]


def simulate(plan: ScorePlan, cpus: float, num_images: int, steps: Steps, costs: Costs, driver: Driver) -> Outcome:
    """Play a run in blocks; a task begins when the pipeline's process comes to it and the ledger has noted it."""
    size = plan.images_per_block
    blocks = [size] * (num_images // size) + [num_images % size] * bool(num_images % size)
    waiting: dict[str, deque[int]] = {"decode": deque(blocks), "predict": deque(), "finish": deque()}
    actors = min(plan.actors, num_images)
    free = {"slots": plan.task_slots(cpus), "actors": actors}
    most_ahead = max(size, plan.run_ahead_bytes // plan.image_bytes)
    layout, ledger, worked = Server(), Server(), dict.fromkeys(waiting, 0.0)
    running: list[tuple[float, int, str, int]] = []
    ahead, number, now = 0, 0, 0.0

    def begin(step: str) -> None:
        nonlocal number, ahead
        num = waiting[step].popleft()
        free["actors" if step == "predict" else "slots"] -= 1
        ahead += num if step == "decode" else -num if step == "predict" else 0
        noted = ledger.serve(layout.serve(now, costs.layout / 3), num * steps.calls[step] * costs.ledger)
        worked[step] += num * steps.seconds[step]
        number += 1
        heapq.heappush(running, (max(noted, layout.free + num * steps.seconds[step]), number, step, num))

    while any(waiting.values()) or running:
        while free["actors"] and waiting["predict"]:
            begin("predict")
        while free["slots"] and (waiting["finish"] or (waiting["decode"] and ahead < most_ahead)):
            begin("finish" if waiting["finish"] else "decode")
        now, _, step, num = heapq.heappop(running)
        free["actors" if step == "predict" else "slots"] += 1
        if step == "finish":
            driver.take(now, num)
        else:
            waiting["predict" if step == "decode" else "finish"].append(num)
    tasks = worked["decode"] + worked["finish"]
    shares = {
        "GPUs": worked["predict"] / (plan.actors * now),
        "CPUs": tasks / (plan.task_slots(cpus) * now),
        "ledger": ledger.worked / now,
        "pipeline's process": layout.worked / now,
        "driver": driver.server.worked / now,
    }
    bound = max(shares, key=lambda name: shares[name])
    bound = bound if shares[bound] > 0.8 or len(blocks) >= actors * 4 else "too few images"
    return Outcome(now, max(now, driver.server.free), 0.0, shares["GPUs"], bound, Counter())


def play(num_gpus: int, num_images: int, costs: Costs, *, cpus_per_gpu: float, before: bool) -> tuple[Outcome, int]:
    """Plan a run as score_images does and simulate it; return also how many blocks it has."""
    sizes = [min(GPUS_PER_NODE, num_gpus - start) for start in range(0, num_gpus, GPUS_PER_NODE)]
    nodes = [Node(size * cpus_per_gpu, float(size)) for size in sizes]
    plan, batch = plan_scoring(nodes, ScoreResources()), 1
    if num_images >= MIN_CALIBRATED * plan.actors:
        batch = 8
        plan = Calibration(costs.decode, costs.predict, costs.finish, batch).fit(plan)
    plan = plan if before else plan.in_even_blocks(num_images, batch)
    asked = 2 if before else 0
    waits = {"decode": 2 * costs.request, "predict": 0.0, "finish": (FILES + asked) * costs.request}
    seconds = {"decode": costs.decode, "predict": costs.predict, "finish": costs.finish}
    steps = Steps(
        {name: seconds[name] + waits[name] for name in seconds}, {"decode": 1, "predict": 1 / batch, "finish": 1}
    )
    lists = 2 * KINDS * math.ceil(num_images / NAMES_PER_LIST)
    requests = Counter({"list": lists + before * num_images, "head": (1 + before) * num_images, "get": num_images})
    requests["put"] = FILES * num_images
    driver = Driver(costs, requests, before=before)
    found = simulate(plan, sum(node.num_cpus for node in nodes), num_images, steps, costs, driver)
    num_parts = math.ceil(num_images / record_parts.PART_ROWS)
    requests["get"] += num_parts
    tables = num_images * (costs.settle + costs.gather) + lists * costs.request
    tables += num_parts * costs.request / costs.connections
    return replace(found, tables_s=tables, requests=requests), math.ceil(num_images / plan.images_per_block)


def packing_seconds(num_images: int) -> float:
    """Return the processor time that the driver takes to pack a record, on a store in memory."""
    out, texts = "objects://bucket/scale", Template(task_in("objects://bucket/scale"), 5)
    fill(out, num_images, texts)
    rows = [{"id": item_of(n)["id"], "record": texts.of(n)} for n in range(num_images)]
    start = time.process_time()
    for _ in record_parts.packing(ScoredRun(out), rows, verify=lambda: None):
        pass
    return (time.process_time() - start) / num_images


def kept_per_image(num_images: int) -> dict[str, float]:
    """Return the bytes that the driver of a first run keeps of an image while it runs, by what they are for."""
    out = "objects://bucket/empty"
    Objects.held["bucket/empty"] = {}
    task, found = task_in(out), dict[str, float]()
    gc.collect()
    tracemalloc.start()
    last = tracemalloc.get_traced_memory()[0]

    def note(what: str) -> None:
        nonlocal last
        used = tracemalloc.get_traced_memory()[0]
        found[what], last = (used - last) / num_images, used

    items = [{**item_of(number), "part": None} for number in range(num_images)]
    for item in items:
        item["stamp"] = f"{item['image_uri']} 184467:17.25"  # each a text of its own
    note("items")
    named = frozenset(item["id"] for item in items)
    owned = frozenset(json.loads(json.dumps(sorted(named))))
    note("ids of the claim")
    fresh, _ = split_todo(items, {}, task)  # type: ignore[arg-type]
    todo, unfinished = {item["id"]: item for item in fresh}, {item["id"] for item in fresh}
    note("what is left to do")
    assert len(todo) == len(unfinished) == len(owned) == num_images
    tracemalloc.stop()
    return found


def rows_of(arguments: argparse.Namespace, costs: Costs, kept: float) -> Iterator[tuple[str, ...]]:
    for num_gpus in arguments.gpus:
        for num_images in arguments.images:
            found, num_blocks = play(
                num_gpus, num_images, costs, cpus_per_gpu=arguments.cpus_per_gpu, before=arguments.before
            )
            alone = num_images * costs.predict
            yield (
                f"{num_gpus}",
                f"{num_images:,}",
                f"{num_images / found.seconds:,.1f}",
                duration(found.seconds),
                f"{alone / found.seconds:.1f}",
                f"{found.busy:.0%}",
                found.bound,
                duration(found.driver_s - found.pipeline_s),
                duration(found.tables_s),
                f"{kept * num_images / 1e9:.2f}",
                f"{(kept * num_images + num_blocks * BLOCK_BYTES) / 1e9:.2f}",
                f"{found.requests['list']:,}",
                f"{found.requests.total() / num_images:.2f}",
            )


HEAD = (
    "GPUs",
    "images",
    "images/s",
    "time",
    "x one GPU",
    "GPUs busy",
    "bound by",
    "driver behind",
    "tables",
    "driver, GB",
    "pipeline's process, GB",
    "lists",
    "requests/image",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predict-ms", type=float, default=80.0)
    parser.add_argument("--cpus-per-gpu", type=float, default=8.0)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--images", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--measured", type=int, default=100_000, help="images whose objects are made and measured")
    parser.add_argument("--before", action="store_true")
    arguments = parser.parse_args()
    kept = kept_per_image(arguments.measured)
    costs = Costs(arguments.predict_ms / 1000, pack=packing_seconds(2 * record_parts.PART_ROWS))
    each = ", ".join(f"{what} {num_bytes:.0f}" for what, num_bytes in kept.items())
    print(f"bytes that the driver keeps of an image ({arguments.measured:,} of them, above it extrapolated): {each}")
    print(
        f"driver: {1e6 * costs.pack:.0f} us to pack a record, so {1 / (costs.pack + costs.row):,.0f} records/s at most"
    )
    print(f"ledger: {1 / costs.ledger:,.0f} calls/s at most; pipeline's process: {1 / costs.layout:.0f} blocks/s\n")
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD))
    for row in rows_of(arguments, costs, sum(kept.values())):
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
