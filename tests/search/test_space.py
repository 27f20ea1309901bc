import pytest
from hypothesis import given
from hypothesis import strategies as st

from stas_core import config
from stas_core.errors import ConfigError
from stas_core.predict.postprocess import PostprocessConfig
from stas_core.search import space
from stas_core.search.space import Dimension, SearchConfig
from stas_core.train.recipe import FoldRecipe


def dimension(**values: object) -> Dimension:
    return config.build(Dimension, values)


def test_settings_are_laid_over_sections_and_list_items() -> None:
    base = PostprocessConfig()
    setting = {"steps.1.drop": 7, "closing_px": 5, "max_hole_px": 100}
    changed = space.apply(base, setting)
    assert changed.steps[1].drop == 7 and changed.steps[0] == base.steps[0]
    assert (changed.closing_px, changed.max_hole_px) == (5, 100)
    assert space.setting_of(changed, dict.fromkeys(setting, dimension(low=1, high=9))) == setting
    assert space.apply(FoldRecipe(), {"optim.lr": 0.5}).optim.lr == 0.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"low": 3}, "give both"),
        ({"low": 3, "high": 1}, "low not above high"),
        ({"low": 0, "high": 1, "log": True}, "low > 0"),
        ({"low": 0, "high": 1, "step": 0}, "above 0"),
        ({"choices": []}, "at least one value"),
        ({"choices": [1], "low": 0}, "nothing beside it"),
        ({"lo": 1}, "did you mean low"),
    ],
)
def test_a_wrong_dimension_says_what_is_wrong(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dimension(**values)


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        (
            "steps.0.dropp",
            {"low": 1, "high": 2},
            r"space\.steps\.0\.dropp: .*mean steps\.0\.drop",
        ),
        ("steps.9.drop", {"low": 1, "high": 2}, r"did you mean steps\.0\.drop"),
        ("steps", {"low": 1, "high": 2}, "no such key"),
        ("steps.0.drop", {"low": 1, "high": 300}, r"space\.steps\.0\.drop: .*300.*255"),
        ("closing_px", {"choices": [3, 4]}, "closing_px 4 is even"),
        ("closing_px", {"low": 1, "high": 21}, r"space\.closing_px: .*closing_px 2 is even"),
        ("steps.0.drop", {"low": 5.0, "high": 60.0}, r"space\.steps\.0\.drop"),
    ],
)
def test_every_key_and_value_is_checked_before_anything_runs(key: str, values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        space.check_space({key: dimension(**values)}, PostprocessConfig())


def test_ranges_of_numbers_may_be_written_as_integers() -> None:
    ratio = {"steps.0.ratio": dimension(low=0, high=1), "steps.0.drop": dimension(low=3, high=9)}
    checked = space.check_space(ratio, PostprocessConfig())
    assert not checked["steps.0.ratio"].is_integer and checked["steps.0.drop"].is_integer
    assert checked["steps.0.ratio"].holds(0.37) and not ratio["steps.0.ratio"].holds(0.37)
    steps = space.check_space({"steps.0.ratio": dimension(low=0, high=1, step=1)}, PostprocessConfig())
    assert steps["steps.0.ratio"].grid(9) == [0.0, 1.0]


@given(st.integers(4, 60))
def test_a_grid_has_no_more_settings_than_asked_for(num_settings: int) -> None:
    searched = {"a": dimension(low=1, high=100), "b": dimension(low=1e-4, high=1.0, log=True)}
    values = space.grid(searched, num_settings)
    assert len(values["a"]) * len(values["b"]) <= num_settings
    assert all(searched[key].holds(value) for key, options in values.items() for value in options)


def test_a_grid_of_many_choices_is_refused() -> None:
    with pytest.raises(ConfigError, match="6 settings, more than num_settings = 5"):
        space.grid({"a": dimension(choices=[1, 2, 3]), "b": dimension(choices=["x", "y"])}, 5)


def test_a_grid_that_does_not_search_a_range_is_refused() -> None:
    searched = {"a": dimension(low=1, high=9), "b": dimension(low=1, high=9), "c": dimension(low=4, high=4)}
    assert space.grid(searched, 4) == {"a": [1, 9], "b": [1, 9], "c": [4]}
    with pytest.raises(ConfigError, match="num_settings = 3 has room for one value only of a, b; it takes 4"):
        space.grid(searched, 3)


def test_steps_and_choices_decide_what_a_space_holds() -> None:
    assert dimension(low=1, high=9, step=2).holds(5) and not dimension(low=1, high=9, step=2).holds(4)
    assert dimension(low=0.0, high=0.8, step=0.05).holds(0.4)
    assert dimension(choices=[None, 3]).holds(None) and not dimension(low=0, high=3).holds(None)
    assert dimension(low=1, high=9).holds(9) and not dimension(low=1, high=9).holds(10)


def test_only_a_grid_has_points() -> None:
    searched = {"a": dimension(low=1, high=3), "b": dimension(choices=["x", "y"])}
    for name, expected in (("tpe", 0), ("random", 0), ("grid", 6)):
        points = space.grid_points(searched, SearchConfig(sampler=name, num_settings=50))
        assert len(points) == expected
