"""What monitoring sees of a run, and that dashboard and alerts ask for nothing else."""

import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from workflows import run_metrics
from workflows.progress import Progress
from workflows.run_metrics import FIGURES

MONITORING = ROOT / "cluster" / "monitoring"
EXPORTED = {f"ray_{name}_total" if one.kind == "counter" else f"ray_{name}": one for name, one in FIGURES.items()}


def expressions() -> list[str]:
    """Return the queries of the dashboard and of the alerts."""
    panels = json.loads((MONITORING / "grafana.json").read_text())["panels"]
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    drawn = [target["expr"] for panel in panels for target in panel["targets"]]
    return drawn + [rule["expr"] for group in groups for rule in group["rules"]]


def test_dashboard_and_alerts_ask_for_what_runs_give_and_the_page_names_it() -> None:
    asked = {name for query in expressions() for name in re.findall(r"ray_stas_\w+", query)}
    assert asked == EXPORTED.keys()
    page = (ROOT / "cluster" / "monitoring.md").read_text()
    folds = {name for name in EXPORTED if name.startswith("ray_stas_fold_")}
    assert all(f"`{name}`" in page for name in EXPORTED.keys() - folds)
    assert all(name.removeprefix("ray_stas_fold") in page for name in folds)


@pytest.mark.parametrize("query", expressions())
def test_what_is_summed_by_is_a_label(query: str) -> None:
    known = {
        label for name, one in EXPORTED.items() if name in query for label in ("stage", "run", "run_id", *one.labels)
    }
    labels = {label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")}
    assert labels <= known or "ray_stas" not in query


def test_panels_say_how_they_are_read() -> None:
    panels = json.loads((MONITORING / "grafana.json").read_text())["panels"]
    assert all(panel["title"] and panel["description"].endswith(".") for panel in panels)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)


def test_prometheus_takes_the_alerts() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool: install Prometheus")
    line = [promtool, "check", "rules", str(MONITORING / "alerts.yaml")]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_a_run_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_metrics, "_made", {})
    run_metrics.count("stas_items_done", items="images")
    run_metrics.show("stas_actors", 2)
    assert run_metrics._made == {}


def exported(nodes: list[Any], run: str, shows: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """Return what an exporter says of a run, as soon as it shows what is expected, or after a minute."""
    url = f"http://{nodes[0]['NodeManagerAddress']}:{nodes[0]['MetricsExportPort']}/metrics"
    found: dict[str, float] = {}
    deadline = time.monotonic() + 60
    while not shows(found) and time.monotonic() < deadline:
        time.sleep(0.5)
        with urllib.request.urlopen(url) as answer:
            lines = [line for line in answer.read().decode().splitlines() if f'run="{run}"' in line]
            assert all(re.search(r'run_id="[0-9a-f]+"', line) for line in lines)
        for name, labels, value in (re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line).groups() for line in lines):  # type: ignore[union-attr]
            own = dict(re.findall(r'(items|reason|step|fold)="([^"]*)"', labels))
            found[" ".join([name, *own.values()])] = float(value)
    return found


def test_an_exporter_shows_what_a_run_has_done(ray_nodes: list[Any], tmp_path: Path) -> None:
    import ray

    run = f"{tmp_path}/out"
    with run_metrics.of_run("score_images", run, "f00d"):
        progress = Progress(5)
        progress.step(2)
        progress.step()
        run_metrics.count("stas_items_failed", reason="slow")
        run_metrics.count("stas_step_seconds", 0.0, step="decode")
        run_metrics.show("stas_actors", 2)
        run_metrics.show("stas_fold_dice", None, fold="0")
    Progress(9).step(9)  # of no run
    expected = {
        "ray_stas_items_done_total images": 3.0,
        "ray_stas_items_failed_total slow": 1.0,
        "ray_stas_actors": 2.0,
    }
    assert exported(ray.nodes(), run, lambda found: found == expected) == expected


def test_a_scoring_run_shows_its_steps(scored: Path) -> None:
    import ray

    items = "ray_stas_items_done_total images"
    found = exported(ray.nodes(), str(scored), lambda found: found.get(items) == 24)
    assert found[items] == 24
    steps = {name for name in found if name.startswith("ray_stas_step_seconds_total")}
    assert {name.rpartition(" ")[2] for name in steps} == {"decode", "predict", "postprocess", "write"}
