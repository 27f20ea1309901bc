from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from stas_core import config
from stas_core.config import Config
from stas_core.errors import ConfigError


class Optim(Config):
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""


class Top(Config):
    """A config."""

    optim: Optim = Optim()
    folds: tuple[int, ...] = (0, 1)
    name: str | None = None


def test_yaml_states_what_differs_and_overrides_win(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("optim:\n  lr: 5e-4\nname: a\n")
    loaded = config.load_config(Top, path, ["name=b", "folds=[3]"])
    assert loaded == Top(optim=Optim(lr=5e-4), folds=(3,), name="b")


@given(st.floats(min_value=1e-12, max_value=1e12), st.lists(st.integers(), max_size=3), st.text(max_size=8))
def test_dump_reads_back_equal(lr: float, folds: list[int], name: str) -> None:
    original = Top(optim=Optim(lr=lr), folds=tuple(folds), name=name)
    assert config.build(Top, config.parse_yaml(config.dump(original))) == original


@pytest.mark.parametrize("text", ["5e-4", "5E-4", "1e3", "+2e-1", "1.5e-3"])
def test_exponents_are_numbers(text: str) -> None:
    assert config.parse_overrides([f"optim.lr={text}"]) == {"optim": {"lr": float(text)}}


def test_one_level_of_extends(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("optim: {lr: 0.1}\nname: base\n")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\nname: child\n")
    assert config.load_config(Top, tmp_path / "child.yaml") == Top(optim=Optim(lr=0.1), name="child")
    (tmp_path / "grandchild.yaml").write_text("extends: child.yaml\n")
    with pytest.raises(ConfigError, match="only one level"):
        config.load_config(Top, tmp_path / "grandchild.yaml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lrr=1"], r"unknown key optim\.lrr = 1: did you mean optim\.lr\?"),
        (["lr=1"], r"unknown key lr = 1: did you mean optim\.lr\?"),
        (["optim.lr=-1"], r"optim\.lr = -1: .*greater than 0"),
        (["optim.lr"], r"'optim\.lr' is not of the form key=value"),
        (["folds=[a]"], r"folds\.0 = 'a'"),
    ],
)
def test_errors_name_key_value_and_remedy(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load_config(Top, None, overrides)


def test_duplicate_keys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("name: a\nname: b\n")
    with pytest.raises(ConfigError, match=r"duplicate key 'name' at line 2 of .*a\.yaml"):
        config.load_config(Top, path)


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read config file .*none\.yaml"):
        config.load_config(Top, tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(ConfigError, match="holds a list, expected a mapping"):
        config.load_config(Top, tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        config.load_config(Top, tmp_path / "bad.yaml")


def test_describe_is_yaml_with_descriptions() -> None:
    text = config.describe(Top())
    assert "lr: 0.001  # Peak learning rate." in text
    assert config.build(Top, config.parse_yaml(text)) == Top()


def test_keys_and_frozen() -> None:
    assert list(config.keys(Top)) == ["optim.lr", "folds", "name"]
    with pytest.raises(ValueError, match="frozen"):
        Top().name = "x"  # type: ignore[misc]
