"""YAML that is no config: each is a ConfigError that says where, at once and in little memory."""

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stas_core import config
from stas_core.config import Config
from stas_core.errors import ConfigError

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
)


class Top(Config):
    name: str | None = None
    rate: float = 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, r"line \d+: more than 100000 values once aliases are written out"),
        ("base: &b {x: 1}\nname: {<<: *b}\n", r"line 2: merge keys \(<<\) are not supported"),
        ("name: &a [*a]\n", r"line 1: an alias within what it stands for"),
        ("name: \n  - &a " + "x" * 200_000 + "\n" + "  - *a\n" * 100, "more than 100000 values"),
        ("[" * 5000, r"line 1: more than 50 levels of nesting"),
        ("\n" + "{a: " * 300, r"line 2: more than 50 levels of nesting"),
        ("- " * 300, r"line 1: more than 50 levels of nesting"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]\n", r"c\.yaml.*line 2"),
        ("a: 1\nrate: " + "9" * 5000, r"line 2: 9+ is no int"),
        ("rate: 0x" + "f" * 300, r"line 1: an integer of 1200 bits"),
        ("a: 2024-13-45", r"line 1: 2024-13-45 is no timestamp"),
        ("a: !!int x", r"line 1: x is no int"),
        ("a: !!bool x", r"line 1: x is no bool"),
        ("a: !!timestamp x", r"line 1: x is no timestamp"),
        ("a: 1\n2: x", r"line 2: key 2 is of type int, expected a name; quote it"),
        ("on: x", r"line 1: key True is of type bool"),
        ("? [a]\n: x", r"line 1: key .'a'. is of type list"),
        ('a: "\\ud800"', "line 1: .*surrogate"),
        ("a: \x00", r"c\.yaml is not valid YAML"),
        ("rate: .nan", r"rate = nan: .*finite"),
        ("rate: -.inf", r"rate = -inf: .*finite"),
        ("extends: 3", r"c\.yaml extends 3, expected the path"),
        ('extends: "a\\0b"', r"cannot read config file"),
        ("a: " + "x" * 2_000_000, r"c\.yaml has more than 1048576 bytes"),
    ],
)
def test_it_is_refused_by_file_and_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    start = time.process_time()
    with pytest.raises(ConfigError, match=message):
        config.load_config(Top, tmp_path / "c.yaml")
    assert time.process_time() - start < 5


def test_other_encodings_are_refused_and_a_byte_order_mark_is_not(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"rate: 2\nname: \xe4\n")
    with pytest.raises(ConfigError, match=r"c\.yaml, line 2: not UTF-8 .*save the file as UTF-8"):
        config.load_config(Top, path)
    path.write_bytes("name: ä\n".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"c\.yaml, line 1: not UTF-8"):
        config.load_config(Top, path)
    path.write_bytes("name: ä\n".encode("utf-8-sig"))
    assert config.load_config(Top, path).name == "ä"


PIECES = [
    "&a ",
    "*a",
    "<<: ",
    "[",
    "]",
    "{",
    "}",
    ": ",
    "- ",
    "\n",
    "  ",
    "!!",
    "int ",
    "0x",
    "1",
    "e",
    "#",
    "'",
    '"',
    "?",
]


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=20).map("".join) | st.binary(max_size=40))
def test_whatever_a_file_holds_it_is_a_config_or_a_config_error(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        config.load_config(Top, path)
    except ConfigError as error:
        assert str(error)


def test_what_is_shared_in_moderation_is_read() -> None:
    assert config.parse_yaml("a: &x [1, 2]\nb: *x\nc: *x\n") == {"a": [1, 2], "b": [1, 2], "c": [1, 2]}
