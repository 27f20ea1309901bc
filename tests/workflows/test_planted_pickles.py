"""Code that lies in an output folder as a pickle is not run when a stage goes on there."""

from pathlib import Path

import pytest
from ray import tune

from stas_core.train.recipe import FoldRecipe
from tests.workflows.planted import plant_pickles
from tests.workflows.test_tune_training import settings
from workflows import tune_training
from workflows.cluster import Node


class Stopped(Exception):
    pass


def stop(*_: object, **__: object) -> None:
    raise Stopped


def test_a_search_that_goes_on_reads_no_pickle(
    ray_nodes: list[Node],
    tmp_path: Path,
    tiny_recipe: FoldRecipe,
    cohort_uri: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, ran = tmp_path / "out", tmp_path / "planted code ran"
    wanted = settings(tiny_recipe, cohort_uri, out)
    monkeypatch.setattr(tune.Tuner, "fit", stop)
    with pytest.raises(Stopped):
        tune_training.run(wanted, False)
    plant_pickles(out, ran)
    with pytest.raises(Stopped):
        tune_training.run(wanted, False)
    assert not ran.exists()
