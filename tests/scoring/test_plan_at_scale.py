"""The plan of scoring from one CPU to 512 GPUs, and from a thousand to ten million images; without Ray."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa
import pytest

from stas_core import record_parts
from stas_core.scored_runs import MASKS, RECORDS, ScoredRun
from stas_core.verdicts import VerdictConfig
from tests.bench import scale
from tests.bench.records import REFERENCE, Objects, Template, fill, item_of, task_in
from tests.scoring.test_score_again import predicted
from workflows.cluster import MOST_NODES, Node
from workflows.scoring import image_results, tasks
from workflows.scoring.pipeline import Calibration
from workflows.scoring.plan import IMAGE_BYTES, MIN_CALIBRATED, ScorePlan, ScoreResources, plan_scoring
from workflows.scoring.settling import read_standings, split_todo
from workflows.scoring.suspects import Ledger

MEASURED = scale.Costs(0.08)
"""Of a field: read in 29 ms and finished in 89 ms of a CPU; four members and four flips, some 80 ms of a GPU."""
CLUSTERS = {
    "a workstation": [Node(8, 1)],
    "a small GPU host": [Node(2, 1)],
    "one CPU beside a GPU": [Node(1, 1)],
    "eight GPUs": [Node(96, 8)],
    "eight GPUs, few CPUs": [Node(8, 8)],
    "64 GPUs": [Node(64, 8)] * 8,
    "512 GPUs": [Node(0), *[Node(64, 8)] * 64],
    "512 single GPUs": [Node(0), *[Node(8, 1)] * MOST_NODES],
    "of two kinds": [Node(4), *[Node(96, 8)] * 3, *[Node(8, 1)] * 10],
    "beside readers": [*[Node(16, 4)] * 4, *[Node(64)] * 4],
    "a node of few CPUs": [Node(64, 8), Node(3, 4)],
    "CPUs": [Node(2), Node(16), Node(64)],
    "a thousand CPUs": [Node(64)] * 16,
}
SIZES = [10**3, 10**4, 10**5, 10**6, 10**7]


def place(nodes: Sequence[Node], plan: ScorePlan) -> list[int]:
    """Return how many of the plan's actors lie on each node: placed one by one, with room left for a task."""
    left, placed = plan.actors, []
    for node in nodes:
        cpus, gpus = node.num_cpus - plan.cpus_per_task, [1.0] * int(node.num_gpus)
        here = 0
        while left and cpus + 1e-9 >= plan.cpus_per_actor:
            if plan.gpus_per_actor >= 1:
                if len(gpus) < plan.gpus_per_actor:
                    break
                del gpus[: int(plan.gpus_per_actor)]
            elif plan.gpus_per_actor:
                found = next((i for i, rest in enumerate(gpus) if rest + 1e-9 >= plan.gpus_per_actor), None)
                if found is None:
                    break
                gpus[found] -= plan.gpus_per_actor
            cpus, here, left = cpus - plan.cpus_per_actor, here + 1, left - 1
        placed.append(here)
    return placed


@pytest.mark.parametrize("gpus", [None, 0.25, 0.4, 2])
@pytest.mark.parametrize("name", CLUSTERS)
def test_nothing_asks_for_more_than_there_is(name: str, gpus: float | None) -> None:
    nodes = CLUSTERS[name]
    if gpus is not None and not any(node.num_gpus >= gpus for node in nodes):
        pytest.skip("no node has these GPUs")
    plan = plan_scoring(nodes, ScoreResources(gpus_per_actor=gpus))
    assert sum(place(nodes, plan)) == plan.actors >= 1
    assert plan.actors * plan.cpus_per_actor + plan.cpus_per_task <= sum(node.num_cpus for node in nodes)
    assert plan.num_gpus <= sum(node.num_gpus for node in nodes)


@pytest.mark.parametrize("gpus", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("name", [name for name, nodes in CLUSTERS.items() if any(node.num_gpus for node in nodes)])
def test_every_gpu_gets_an_actor_where_its_node_has_half_a_cpu_for_each(name: str, gpus: float) -> None:
    """Fractions, too: actors of half a CPU go where there are few, before a GPU stays empty."""
    nodes = CLUSTERS[name]
    plan = plan_scoring(nodes, ScoreResources(gpus_per_actor=gpus))
    for node, here in zip(nodes, place(nodes, plan), strict=True):
        wanted = int(node.num_gpus) * int(1 / gpus)
        if node.num_cpus >= 0.5 * wanted + 0.25:
            assert here == wanted


@pytest.mark.parametrize(("cpus_per_gpu", "enough"), [(2, False), (3, True), (8, True), (12, True)])
@pytest.mark.parametrize("num_gpus", [1, 8, 64, 512])
def test_readers_and_finishers_keep_up_with_gpus_of_three_cpus_each(
    num_gpus: int, cpus_per_gpu: int, enough: bool
) -> None:
    """At measured costs; with fewer, the simulation and the run itself name the CPUs as what bounds it."""
    per_node = min(8, num_gpus)
    nodes = [Node(per_node * cpus_per_gpu, per_node)] * (num_gpus // per_node)
    plan = plan_scoring(nodes, ScoreResources())
    slots = plan.task_slots(sum(node.num_cpus for node in nodes))
    assert plan.actors == num_gpus
    assert (slots / (MEASURED.decode + MEASURED.finish) >= num_gpus / MEASURED.predict) == enough


@pytest.mark.parametrize(("name", "num_images"), list(itertools.product(CLUSTERS, SIZES)))
def test_blocks_are_small_enough_for_all_actors_and_bounded_in_memory(name: str, num_images: int) -> None:
    nodes = CLUSTERS[name]
    plan, batch = plan_scoring(nodes, ScoreResources()), 1
    if num_images >= MIN_CALIBRATED * plan.actors:
        on_gpus = plan.gpus_per_actor > 0
        batch = 8 if on_gpus else 1
        predict = MEASURED.predict if on_gpus else 4.0
        plan = Calibration(MEASURED.decode, predict, MEASURED.finish, batch).fit(plan)
    even = plan.in_even_blocks(num_images, batch)
    assert 1 <= even.images_per_block <= plan.images_per_block <= 16 * batch
    assert even.images_per_block % batch == 0 or even.images_per_block == 4
    if num_images >= MIN_CALIBRATED * plan.actors:
        assert num_images // even.images_per_block >= 6 * even.actors
    # Two blocks of an actor wait between two steps, not more: what lies in the nodes' memory grows with actors alone.
    assert even.run_ahead_bytes == max(2**28, 2 * even.actors * even.images_per_block * IMAGE_BYTES)
    assert even.run_ahead_bytes <= max(2**28, plan.actors * 256 * IMAGE_BYTES)


def test_a_driver_keeps_less_than_a_kilobyte_of_an_image() -> None:
    assert 300 < sum(scale.kept_per_image(5_000).values()) < 1000


def test_a_ledger_keeps_what_is_begun_alone() -> None:
    ledger = Ledger()
    for number in range(1000):
        for worker, step in enumerate(("decode", "predict", "finish")):
            ledger.begin(f"worker {worker}", step, [str(number)], "node")
    assert {image_id for image_id, _, _ in ledger.begun()} == {"999"}
    assert len(ledger._begun) == len(ledger._nodes) == 1


def requests_of_a_run(num_images: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Return the requests of the driver of a first run: it settles, packs what comes, and gathers."""
    out = "objects://bucket/run"
    task, items = task_in(out), [item_of(number) for number in range(num_images)]
    monkeypatch.setattr(record_parts, "PART_ROWS", 500)
    monkeypatch.setattr(image_results, "contact_sheet", lambda *_: b"")
    Objects.held.clear()
    Objects.requests.clear()
    fresh, _ = split_todo(items, read_standings(task.run, items), task)
    assert all(item["part"] is None for item in fresh)
    asked = Objects.requests.copy()
    fill(out, num_images, texts := Template(task, 1))
    rows = [{"id": item["id"], "record": texts.of(number)} for number, item in enumerate(items)]
    for _ in record_parts.packing(ScoredRun(out), rows, verify=lambda: None):
        pass
    assert not Objects.held[f"bucket/run/{RECORDS}"].keys() & {f"{item['id']}.json" for item in items}
    given = image_results.Given(items, [], {}, REFERENCE, ())
    image_results.write_results(task, given, own=frozenset(item["id"] for item in items), limits=VerdictConfig())
    return dict(asked + Objects.requests - asked)


def test_a_driver_asks_for_a_thousand_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two runs, the larger makes no request more for each image, but some for each thousand, and for each part."""
    small, large = (requests_of_a_run(num, monkeypatch) for num in (1000, 4000))
    more = {what: large.get(what, 0) - small.get(what, 0) for what in large}
    assert more["list"] <= 3 * scale.KINDS
    assert more["put"] == more["get"] == 6  # parts
    assert more.get("delete", 0) <= 2 * 6
    assert more.get("head", 0) == 0


def test_a_worker_asks_for_no_older_record_of_a_new_image() -> None:
    """On S3 what is not there costs a HEAD and a list: of each image, that would be most of the requests."""
    out = "objects://bucket/worker"
    task = task_in(out)
    item = tasks.Item(id="a", image_uri="a.png", stamp="1", part=None)
    for part, asked in ((None, 0), (tasks.LOOSE, 1)):
        Objects.held.clear()
        Objects.requests.clear()
        row = predicted({**item, "part": part})
        tasks.finish(task, pa.Table.from_pylist([row], tasks.PREDICTED))
        assert Objects.requests["head"] == asked and Objects.requests["list"] == 0
        assert Objects.requests["put"] == 1 + len(task.save.folders()) and MASKS in task.save.folders()


def test_the_simulation_names_what_bounds_a_run() -> None:
    def bound(num_gpus: int, num_images: int, **changes: float) -> str:
        costs = replace(scale.Costs(0.08, pack=1e-4), **changes)  # type: ignore[arg-type]
        return scale.play(num_gpus, num_images, costs, cpus_per_gpu=8, before=False)[0].bound

    assert bound(8, 20_000) == "GPUs"
    assert bound(8, 20_000, finish=2.0) == "CPUs"
    assert bound(512, 100_000) == "ledger"
    assert bound(8, 20_000, pack=0.1) == "driver"
    one, eight = (scale.play(num, 20_000, MEASURED, cpus_per_gpu=8, before=False)[0] for num in (1, 8))
    assert 7 < one.pipeline_s / eight.pipeline_s <= 8 and eight.busy > 0.9
