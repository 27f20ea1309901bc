"""Dashboard and alerts ask for what monitoring sees of runs, and for nothing else."""

import json
import re
import shutil
import subprocess

import pytest
import yaml

from tests.conftest import ROOT
from workflows import score_slides
from workflows.run_metrics import FIGURES

MONITORING = ROOT / "cluster" / "monitoring"
EXPORTED = {f"ray_{name}_total" if one.kind == "counter" else f"ray_{name}": one for name, one in FIGURES.items()}


AT_WORK = "and on (stage, run, run_id) ray_stas_running"
"""Exporters keep the counters of runs that have ended."""


def alerts() -> dict[str, str]:
    """Return the queries of the alerts, by name."""
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    return {rule["alert"]: " ".join(rule["expr"].split()) for group in groups for rule in group["rules"]}


def drawn() -> list[str]:
    """Return the queries of the dashboard."""
    panels = json.loads((MONITORING / "grafana.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def expressions() -> list[str]:
    """Return the queries of the dashboard and of the alerts."""
    return drawn() + list(alerts().values())


@pytest.mark.parametrize("name", alerts())
def test_a_run_that_has_ended_alerts_for_nobody(name: str) -> None:
    condition, join, rest = alerts()[name].rpartition(AT_WORK)
    assert join and rest == " == 1"
    for counters in re.findall(r"sum by \(([^)]*)\)", condition):
        assert counters == "stage, run, run_id"  # of a start that has ended, others count nothing


def test_panels_of_counts_show_what_is_at_work_alone() -> None:
    counts = [query for query in drawn() if "_total{" in query and "rate(" not in query]
    assert len(counts) == 3
    assert all(f"{AT_WORK})" in query for query in counts)


def test_failures_are_held_against_what_stages_count() -> None:
    found = re.search(r'items=~"([^"]*)"', alerts()["StasManyFailures"])
    assert found is not None
    assert set(found[1].split("|")) == {"images", f"{score_slides.SURVEY}slides"}


def test_every_run_can_be_chosen_and_has_its_stages_and_trials_with_it() -> None:
    board = json.loads((MONITORING / "grafana.json").read_text())
    (run,) = (one for one in board["templating"]["list"] if one["name"] == "run")
    assert run["query"]["query"] == 'label_values({__name__=~"ray_stas_.+"}, run)' and run["allValue"] == ".*"
    chosen = {selector for query in drawn() for selector in re.findall(r"ray_stas_\w+\{([^}]*)\}", query)}
    assert chosen == {'run=~"($run)(/.*)?"'}
    # As Grafana writes out the choice of one run, of two and of all.
    for chosen_runs, is_shown in ((r"/out", True), (r"(/a|/out)", True), (".*", True), (r"/ou", False)):
        assert bool(re.fullmatch(f"({chosen_runs})(/.*)?", "/out/folds")) is is_shown


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
