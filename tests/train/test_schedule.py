"""The learning rate's course: the published numbers, torch's own schedulers, and short runs; decay of averages."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.utils.model_ema import ModelEmaV3

from stas_core.train.recipe import ScheduleConfig
from stas_core.train.schedule import ema_decay, lr_factor

KINDS = ["cosine", "step", "one_cycle", "constant"]


def course(config: ScheduleConfig, *, steps_per_epoch: int = 10, num_epochs: int = 150) -> list[float]:
    return [
        lr_factor(config, step=step, steps_per_epoch=steps_per_epoch, num_epochs=num_epochs)
        for step in range(steps_per_epoch * num_epochs)
    ]


def torch_course(make: type[torch.optim.lr_scheduler.LRScheduler], num_steps: int, **options: object) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer, **options)  # type: ignore[arg-type]
    rates = []
    for _ in range(num_steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("kind", ["cosine", "step", "constant"])
def test_warm_up_is_linear_from_zero_over_six_epochs(kind: str) -> None:
    factors = course(ScheduleConfig.model_validate({"kind": kind}))
    assert factors[:61] == pytest.approx([step / 60 for step in range(61)])
    assert factors[0] == 0


def test_cosine_equals_torchs() -> None:
    factors = course(ScheduleConfig(final_factor=0.1))
    expected = torch_course(torch.optim.lr_scheduler.CosineAnnealingLR, 1440, T_max=1440, eta_min=0.1)
    assert factors[60:] == pytest.approx(expected)


def test_step_falls_28_times_in_150_epochs() -> None:
    factors = course(ScheduleConfig(kind="step"))
    falls = [step for step, (a, b) in enumerate(itertools.pairwise(factors), start=1) if b < a]
    assert falls == [60 + 50 * i for i in range(1, 29)]
    assert factors[-1] == pytest.approx(0.75**28)
    assert min(course(ScheduleConfig(kind="step", final_factor=0.2))[60:]) == 0.2


def test_one_cycle_equals_torchs() -> None:
    factors = course(ScheduleConfig(kind="one_cycle", final_factor=0.01), num_epochs=20)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR
    # torch's class refuses to be stepped past its end, so the last factor is compared with its least rate.
    expected = torch_course(one_cycle, 199, max_lr=1.0, total_steps=200, final_div_factor=0.04 / 0.01)
    assert factors == pytest.approx([*expected, 0.01])


def test_constant_stays_at_the_peak() -> None:
    assert set(course(ScheduleConfig(kind="constant"))[60:]) == {1.0}


def test_warm_up_takes_at_most_half_of_a_short_run() -> None:
    factors = course(ScheduleConfig(), num_epochs=4)
    assert factors[:21] == pytest.approx([step / 20 for step in range(21)])
    assert factors[-1] < 0.01


def test_run_of_one_step_trains_at_the_peak() -> None:
    assert course(ScheduleConfig(), steps_per_epoch=1, num_epochs=1) == [1.0]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    warmup_epochs=st.floats(0, 20),
    final_factor=st.floats(0, 0.5),
    steps_per_epoch=st.integers(1, 12),
    num_epochs=st.integers(1, 15),
)
def test_any_run_stays_between_zero_and_a_reached_peak(
    kind: str, warmup_epochs: float, final_factor: float, steps_per_epoch: int, num_epochs: int
) -> None:
    config = ScheduleConfig.model_validate({"kind": kind, "warmup_epochs": warmup_epochs, "final_factor": final_factor})
    factors = course(config, steps_per_epoch=steps_per_epoch, num_epochs=num_epochs)
    assert all(0 <= factor <= 1 for factor in factors)
    assert max(factors) > 0.8  # four steps of one_cycle straddle the peak
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


@pytest.mark.parametrize("kind", ["cosine", "one_cycle"])
def test_steps_beyond_the_run_keep_the_final_factor(kind: str) -> None:
    config = ScheduleConfig.model_validate({"kind": kind, "final_factor": 0.05})
    assert lr_factor(config, step=10_000, steps_per_epoch=10, num_epochs=20) == pytest.approx(0.05)


@pytest.mark.parametrize("most", [0.5, 0.9, 0.99, 0.9999])
def test_the_average_warms_up_as_timms(most: float) -> None:
    theirs = ModelEmaV3(torch.nn.Linear(1, 1), decay=most, use_warmup=True)
    for step in (0, 1, 2, 10, 100, 10_000):
        assert ema_decay(most, step) == pytest.approx(theirs.get_decay(step + 1))


@given(most=st.floats(0.01, 0.9999), step=st.integers(0, 10**7))
def test_the_decay_grows_to_what_is_asked_for(most: float, step: int) -> None:
    assert 0 <= ema_decay(most, step) <= ema_decay(most, step + 1) <= most
    assert ema_decay(most, 10**9) == most
