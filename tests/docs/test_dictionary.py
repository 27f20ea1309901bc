"""Columns and settings of the stages' pages: none is left out, each says what it is."""

import importlib

import pytest

from docs.generate.dictionary import INTERNAL, Table, tables_of
from docs.generate.settings import OF_OTHERS, config_of, settings_markdown
from stas_core import config as configs
from workflows.console import STAGES
from workflows.folds import training

TABLES = [(stage, table) for stage in STAGES for table in tables_of(stage)]


@pytest.mark.parametrize("stage", STAGES)
def test_every_parquet_file_that_a_stage_writes_is_described(stage: str) -> None:
    module = importlib.import_module(f"workflows.{stage}")
    outputs = training.OUTPUTS if stage == "train_folds" else getattr(module, "OUTPUTS", None)
    written = {name for name in (outputs.patterns if outputs else ()) if name.endswith(".parquet")} - set(INTERNAL)
    own = {name for name in written if not name.startswith("trials/")}  # a trial is a run of train_folds
    assert own == {table.pattern for table in tables_of(stage)} or stage == "report"


@pytest.mark.parametrize(("stage", "table"), TABLES, ids=[f"{stage}-{table.name}" for stage, table in TABLES])
def test_every_column_says_what_it_holds(stage: str, table: Table) -> None:
    assert [name for name in table.columns.names if not table.text(name)] == []
    assert table.rows.endswith(".")


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_is_on_the_page_of_its_stage(stage: str) -> None:
    page, others = settings_markdown(stage), OF_OTHERS.get(stage, {})
    for key in configs.fields(config_of(stage)):
        section = key.name.partition(".")[0]
        if section in others:
            assert key.name.partition(".")[2] in {"", *configs.keys(config_of(others[section]))}
        else:
            assert f"| `{key.name}`<br>= " in page and key.text
