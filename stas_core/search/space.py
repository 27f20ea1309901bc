"""Search spaces in YAML: which keys of a config are searched, and over what; settings as flat mappings of such keys.

    steps.0.drop: {low: 5, high: 60}
    optim.lr: {low: 1e-4, high: 1e-2, log: true}
    model.activation: {choices: [relu, mish]}

A key is a dotted path into the config; list items by their number.
"""

import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field, model_validator

from stas_core import config as configs
from stas_core.config import Config
from stas_core.errors import ConfigError

if TYPE_CHECKING:  # reading and checking a space need not wait for Optuna
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

C = TypeVar("C", bound=Config)
Scalar = bool | int | float | str | None
Setting = Mapping[str, Scalar]
"""A value for each key of a space."""
CHECKED_VALUES, CHECKED_BETWEEN = 300, 18
"""How many values of a range are tried before the first trial: of one with steps, and of one without."""


class Dimension(Config):
    """What one key is searched over: a range with both ends in it, or choices."""

    low: int | float | None = None
    """Lower end of the range."""
    high: int | float | None = None
    """Upper end of the range."""
    step: int | float | None = None
    """Values lie this far apart from `low` on; null: every integer, or every number."""
    log: bool = False
    """Take every order of magnitude for equally likely."""
    choices: tuple[Scalar, ...] | None = None
    """Values to choose from, in place of a range."""

    @model_validator(mode="after")
    def _one_kind(self) -> "Dimension":
        if self.choices is not None:
            if not self.choices or (self.low, self.high, self.step, self.log) != (None, None, None, False):
                raise ValueError("give choices: [...] with at least one value and nothing beside it, or low and high")
            return self
        if self.low is None or self.high is None or self.low > self.high:
            raise ValueError(f"low = {self.low}, high = {self.high}: give both, low not above high, or choices")
        if self.log and (self.step is not None or self.low <= 0):
            raise ValueError("log = true needs low > 0 and goes without step")
        if self.step is not None and self.step <= 0:
            raise ValueError(f"step = {self.step} must be above 0")
        return self

    @property
    def is_integer(self) -> bool:
        """Whether the range is one of integers."""
        return isinstance(self.low, int) and isinstance(self.high, int) and not isinstance(self.step, float)

    def of_numbers(self) -> "Dimension":
        """Return the range as one of floats, even if its ends are written as integers."""
        if self.choices is not None or not self.is_integer:
            return self
        step = None if self.step is None else float(self.step)
        assert self.low is not None and self.high is not None
        return self.model_copy(update={"low": float(self.low), "high": float(self.high), "step": step})

    def distribution(self) -> "BaseDistribution":
        """Return the dimension as Optuna knows it."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices is not None:
            return CategoricalDistribution(self.choices)
        assert self.low is not None and self.high is not None
        if self.is_integer:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(float(self.low), float(self.high), log=self.log, step=self.step)

    def grid(self, num_values: int) -> list[Scalar]:
        """All values if there are at most `num_values`, else that many evenly spaced ones (log-spaced if `log`)."""
        if self.choices is not None:
            return list(self.choices)
        assert self.low is not None and self.high is not None
        step = self.step or (1 if self.is_integer and not self.log else None)
        if step is not None:
            values = [self.low + index * step for index in range(int((self.high - self.low) / step + 1e-9) + 1)]
            spread = [values[round(index)] for index in _spread(0, len(values) - 1, min(num_values, len(values)))]
        elif self.log:
            logs = _spread(math.log(self.low), math.log(self.high), num_values)
            spread = [min(max(math.exp(value), self.low), self.high) for value in logs]
        else:
            spread = _spread(self.low, self.high, num_values)
        return list(dict.fromkeys(round(value) if self.is_integer else float(value) for value in spread))

    def holds(self, value: Scalar) -> bool:
        """Tell whether the search could propose a value."""
        if self.choices is not None:
            return value in self.choices
        assert self.low is not None and self.high is not None
        if isinstance(value, bool | str) or value is None or not self.low <= value <= self.high:
            return False
        steps = (value - self.low) / (self.step or (1 if self.is_integer else math.inf))
        return abs(steps - round(steps)) < 1e-9


def _spread(low: float, high: float, num_values: int) -> list[float]:
    if num_values <= 1:
        return [low]
    return [low + (high - low) * index / (num_values - 1) for index in range(num_values)]


Space = dict[str, Dimension]


def check_space(space: Mapping[str, Dimension], base: Config, name: str = "space") -> Space:
    """Check that every key exists and takes what the search may propose; return the space ready for the search.

    Every choice and every value of a stepped range is tried on the config (of ranges without steps, and of very long
    ones, values spread over them). Ranges of keys that hold numbers become such, also where written as integers.

    Raises:
        ConfigError: naming key, value, what was expected, and the nearest valid name.
    """
    if not space:
        raise ConfigError(f"{name} is empty: name at least one key, for example optim.lr: {{low: 1e-4, high: 1e-2}}")
    known, checked = flatten(base), {}
    for given, dimension in space.items():
        key = configs.current_name(type(base), given)
        if key in checked:
            raise ConfigError(f"{name} has {key} under its former name, too; keep {name}.{key}")
        if key not in known:
            near = configs.nearest(key, list(known))
            raise ConfigError(f"{name}.{key}: no such key; did you mean {near}? (one value, not a section)")
        checked[key] = dimension.of_numbers() if isinstance(known[key], float) else dimension
        stepped = dimension.step is not None or checked[key].is_integer
        between = checked[key].grid(CHECKED_VALUES if stepped else CHECKED_BETWEEN)
        for value in (between[0], between[-1], *between):
            try:
                apply(base, {key: value})
            except ConfigError as error:
                raise ConfigError(f"{name}.{key}: {error}") from None
    return checked


def flatten(config: Config) -> dict[str, Any]:
    """Return a config's values by dotted key."""
    return dict(_leaves(config.model_dump(mode="json"), ""))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        items: Sequence[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, list) and value:
        items = list(enumerate(value))
    else:
        yield path, value
        return
    for key, item in items:
        yield from _leaves(item, f"{path}.{key}" if path else str(key))


def apply(base: C, setting: Setting) -> C:
    """Lay a setting over a config.

    Raises:
        ConfigError: a value is not valid there.

    Example:
        >>> from stas_core.train.recipe import FoldRecipe
        >>> apply(FoldRecipe(), {"optim.lr": 0.002}).optim.lr
        0.002
    """
    values = base.model_dump(mode="json")
    for key, value in setting.items():
        *parents, last = key.split(".")
        section: Any = values
        for part in parents:
            section = section[int(part)] if isinstance(section, list) else section[part]
        section[int(last) if isinstance(section, list) else last] = value
    return configs.build(type(base), values)


def setting_of(config: Config, space: Mapping[str, Dimension]) -> dict[str, Scalar]:
    """Return a config's values for the keys of a space."""
    known = flatten(config)
    return {key: known[key] for key in space}


class SearchConfig(Config):
    """How settings are proposed."""

    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """tpe: Optuna's tree-structured Parzen estimator; random; grid: as even as num_settings allows."""
    num_settings: int = Field(2000, ge=1)
    """Settings to try; of a grid at most so many."""
    seed: int = 0
    """Seed of the proposals."""
    num_random: int = Field(100, ge=1)
    """Settings that tpe draws at random before it begins to learn."""


def grid_points(space: Mapping[str, Dimension], config: SearchConfig) -> list[Setting]:
    """Return the settings that are fixed beforehand: the points of a grid, else none.

    Raises:
        ConfigError: a grid of the choices alone has more settings than may be tried.
    """
    if config.sampler != "grid":
        return []
    values = grid(space, config.num_settings)
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def empty_study() -> "optuna.Study":
    """Return an Optuna study in memory, of a score that is the better the higher it is; it prints nothing."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(direction="maximize")


def make_sampler(space: Mapping[str, Dimension], config: SearchConfig) -> "BaseSampler":
    """Return Optuna's sampler; that of a grid, whose points are fixed beforehand (`grid_points`), draws at random."""
    import optuna
    from optuna.samplers import RandomSampler, TPESampler

    if config.sampler != "tpe":
        return RandomSampler(seed=config.seed)
    distributions = {key: space[key].distribution() for key in sorted(space)}
    searched = {key: given for key, given in distributions.items() if not given.single()}

    class OneSpaceTpe(TPESampler):
        """TPE that knows its space: a new sampler would find it out from all trials, most of its time at 2,000."""

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, "BaseDistribution"]:
            return searched

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # so is multivariate TPE marked
        return OneSpaceTpe(seed=config.seed, n_startup_trials=config.num_random, multivariate=True)


def grid(space: Mapping[str, Dimension], num_settings: int) -> dict[str, list[Scalar]]:
    """Choose values for a grid of at most `num_settings` points, about as many for each key.

    Raises:
        ConfigError: the choices alone make more, or leave room for one value only of each range.
    """

    def size(per_key: int) -> int:
        return math.prod(len(dimension.grid(per_key)) for dimension in space.values())

    per_key = 1
    while size(per_key) < size(per_key + 1) <= num_settings:
        per_key += 1
    if size(per_key) > num_settings:
        raise ConfigError(
            f"a grid of the choices alone has {size(1)} settings, more than num_settings = {num_settings}"
        )
    found = {key: dimension.grid(per_key) for key, dimension in space.items()}
    fixed = [key for key, values in found.items() if len(values) < min(2, len(space[key].grid(2)))]
    if fixed:
        raise ConfigError(
            f"a grid of at most num_settings = {num_settings} has room for one value only of {', '.join(fixed)}; it "
            f"takes {size(2)} for two of each; search fewer keys, or use sampler=tpe or random"
        )
    return found
