"""What the documents say is so: commands, the tree, versions, the list of guarantees."""

import importlib
import importlib.metadata
import importlib.util
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import stas_core
from tests.conftest import ROOT
from workflows.console import STAGES
from workflows.folds import training

README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
CLUSTER_PAGES = sorted((ROOT / "cluster").glob("*.md"))
DOCS = sorted((ROOT / "docs").rglob("*.md"))
STAGE_PAGES = ROOT / "docs" / "stages"


def commands() -> list[list[str]]:
    """Return the arguments of every stage that README, docs, headers of configs and pages of clusters show."""
    files = [*sorted((ROOT / "configs").glob("*.yaml")), *DOCS, *CLUSTER_PAGES]
    texts = [README, *(path.read_text() for path in files)]
    before = r"(?:^    |^# COMMAND: |-- |^    .*(?:\.sbatch|submit|run gpu|await_nodes 1) )"
    shown = re.compile(before + r"(?:(?:python )?workflows/|stas )(\w+(?:\.py)? .+?)(?:   \(or.*)?$", re.M)
    lines = {line: None for text in texts for line in shown.findall(re.sub(r"\\\n\s+", "", text))}
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_that_are_shown_can_be_run(
    command: list[str], stage: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "thresholds").mkdir()  # what an earlier command of the README leaves for a later one
    shutil.copy(ROOT / "configs" / "postprocess" / "default.yaml", tmp_path / "thresholds" / "postprocess.tuned.yaml")
    script, *arguments = (part.replace("/data/stas", str(tmp_path)) for part in command)
    done = stage(script.removesuffix(".py"), *arguments, *([] if "--dry-run" in arguments else ["--dry-run"]))
    assert done.status == 0, done.err


def test_modules_that_are_run_exist() -> None:
    pages = [ROOT / "CONTRIBUTING.md", *(ROOT / "tests").rglob("README.md"), *DOCS, *CLUSTER_PAGES]
    texts = (README, *(page.read_text() for page in pages))
    shown = {module for text in texts for module in re.findall(r"python -m (\w[\w.]*)", text)}
    assert {"tests.gpu.check", "docs.generate.pictures", "workflows.await_nodes"} <= shown
    assert [module for module in sorted(shown) if importlib.util.find_spec(module) is None] == []


def test_every_stage_has_a_page_which_shows_its_command() -> None:
    listed = re.findall(r"^\| \[`(\w+)`\]\((\w+)\.md\) \|", (STAGE_PAGES / "index.md").read_text(), re.M)
    assert {name for name, _ in listed} == set(STAGES) == {path.stem for path in STAGE_PAGES.glob("[!i]*.md")}
    for name, page in listed:
        text = (STAGE_PAGES / f"{page}.md").read_text()
        assert name == page and text.startswith(f"# {name}\n") and f"    python workflows/{name}.py " in text


def test_the_page_of_a_stage_names_all_that_the_stage_writes() -> None:
    for name in STAGES:
        outputs = getattr(importlib.import_module(f"workflows.{name}"), "OUTPUTS", None) or training.OUTPUTS
        text = (STAGE_PAGES / f"{name}.md").read_text()
        for pattern in set(outputs.patterns) - {"state/**"} if name != "report" else ():
            part = pattern.partition("/")[0].replace("fold_*", "fold_<k>")
            assert re.search(rf"`(?:[\w<>]+/)?{re.escape(part)}[`/]", text), f"{name}.md lacks {part} ({pattern})"


def test_make_targets_that_are_shown_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, re.M))
    pages = [ROOT / "CONTRIBUTING.md", ROOT / "tests" / "README.md", *DOCS, *CLUSTER_PAGES]
    texts = (README, *(page.read_text() for page in pages))
    shown = {target for text in texts for target in re.findall(r"(?:^    |`)make ([\w-]+)", text, re.M)}
    assert {"demo", "test", "test-fast", "check", "docs"} <= shown <= targets


def test_the_readme_is_about_a_screen_and_names_what_ci_runs() -> None:
    assert len(README.splitlines()) <= 80
    assert "\n    make test-all " in README and "\nmake test-all\n" in (ROOT / ".ci" / "run").read_text()


def test_the_tree_of_the_docs_is_that_of_the_disk() -> None:
    tree = (ROOT / "docs" / "tree.md").read_text()
    tree = "\n".join(line for line in tree.splitlines() if line.startswith("    "))
    modules = [
        path.relative_to(ROOT)
        for package in ("stas_core", "workflows")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    ]
    words = set(re.findall(r"\w+", tree))
    missing = [str(path) for path in modules if not {*path.parts[:-1], path.stem} <= words]
    assert missing == []
    gone = set(re.findall(r"(?<!\S)(\w+\.py)(?!\S)", tree)) - {path.name for path in modules}
    assert gone == set()
    for folder in re.findall(r"^ *(\w+)/ ", tree, re.M):
        assert list(ROOT.glob(folder)) or list(ROOT.glob(f"*/{folder}")), folder


def layers(text: str) -> list[set[str]]:
    return [{name.strip() for name in layer.split("|")} for layer in text.split(">")]


def test_the_layers_of_the_architecture_are_those_of_the_contracts() -> None:
    block = (ROOT / "ARCHITECTURE.md").read_text().partition("## Layers")[2].partition("\n## ")[0]
    lines = re.sub(r"\n +>", " >", block)  # a line that goes on
    shown = {name: layers(text) for name, text in re.findall(r"^    +(\w+) +(.+)$", lines, re.M)}
    kept = {}
    for contract in (ROOT / "pyproject.toml").read_text().split("[[tool.importlinter.contracts]]")[1:]:
        if container := re.search(r'containers = \["(?:.+\.)?(\w+)"\]', contract):
            listed = re.findall(r'^    "(.+)",$', contract, re.M)
            there = [re.sub(r"[()]", "", layer) for layer in listed]
            kept[container[1]] = layers(" > ".join(there))
    assert shown == kept


def test_one_version() -> None:
    newest = re.findall(r"^## (\S+)(?: \((\d{4}-\d\d-\d\d)\))?$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest[0] == ("Unreleased", "")
    assert newest[1][0] == stas_core.__version__ == importlib.metadata.version("stas-on-ray")
    assert all(date for _, date in newest[1:])
    assert "\nversion = " not in (ROOT / "pyproject.toml").read_text().split("[tool.", maxsplit=1)[0]


def test_pre_commit_runs_what_make_check_runs() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]]
    recipe = MAKEFILE.split("\ncheck: install\n")[1].split("\n\n")[0].replace("$(BIN)", ".venv/bin")
    assert hooks == [line.strip().removesuffix(" .") for line in recipe.splitlines()]


def guarantees() -> list[str]:
    """Return every `file::test` that tests/README.md names."""
    return re.findall(r"`([\w/]+\.py(?:::\w+)?)`", (ROOT / "tests" / "README.md").read_text())


def test_the_tests_that_hold_the_guarantees_exist() -> None:
    named = guarantees()
    assert len(named) > 40
    sources = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    for entry in named:
        name, _, test = entry.partition("::")
        assert name in sources, f"tests/README.md names {entry}; there is no such file"
        assert not test or f"\ndef {test}(" in sources[name], f"tests/README.md names {entry}; there is no such test"


def test_links_of_the_cluster_pages_lead_somewhere() -> None:
    assert len(CLUSTER_PAGES) == 6
    for page in CLUSTER_PAGES:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
        assert page.name == "README.md" or f"({page.name})" in (ROOT / "cluster" / "README.md").read_text()
        assert f"(cluster/{page.name})" in README


def test_what_the_cluster_pages_say_of_scripts_is_there() -> None:
    folder = ROOT / "cluster"
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"]
    scripts = "".join(path.read_text() for path in (*files, ROOT / "workflows" / "run_log.py"))
    for page in CLUSTER_PAGES:
        for name in re.findall(r"`cluster/([\w./]+)", page.read_text()):
            assert (folder / name).exists(), f"{page.name} names {name}"
        for variable in re.findall(r"\b(STAS_\w+)", page.read_text()):
            assert variable in scripts, f"{page.name} names {variable}"


MESSAGES = [
    "Ray did not come up within two minutes",
    "is relative, but a Ray job works in a temporary copy",
    "no node that works joined",
    "has a character that a shell on the way takes for its own",
    "expected a stage below",
    "no Ray answers at RAY_ADDRESS",
    "Ray ended before the stage",
    "no group can ever run",
    "cannot join the Ray at RAY_ADDRESS",
    "going on",
]


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_of_ours_that_the_cluster_pages_explain_are_said(message: str) -> None:
    assert any(message in page.read_text() for page in CLUSTER_PAGES)
    sources = [*(ROOT / "workflows").rglob("*.py"), *(ROOT / "cluster").glob("*.s*")]
    assert any(message in path.read_text() for path in sources)
