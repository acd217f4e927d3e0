"""Which steps are unsound, and what the settings of `health` say about them."""

import math
from typing import Any

import pytest

from engine.config.read import ConfigError, HealthConfig
from engine.resilience.judge import SOUND, Health
from tests.checkpoint.jobs import job_config


def judge(*steps: tuple[float, float], **settings: Any) -> list[str]:
    health = Health(HealthConfig(**settings))
    return [health.judge(loss, norm).action for loss, norm in steps]


SPIKES: dict[str, Any] = {"on_spike": "rewind", "window_steps": 3}


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
@pytest.mark.parametrize("action", ["stop", "skip", "rewind"])
def test_what_is_not_finite(bad: tuple[float, float], action: str) -> None:
    assert judge((1.0, 1.0), bad, (1.0, 1.0), on_nonfinite=action) == ["apply", action, "apply"]


def test_a_spike_is_above_the_median_of_the_last_good_steps() -> None:
    calm = [(1.0, 5.0), (3.0, 1.0), (2.0, 2.0)]  # medians 2 and 2
    assert judge(*calm, (4.1, 1.0), (3.9, 1.0), loss_factor=2.0, **SPIKES)[3:] == ["rewind", "apply"]
    assert judge(*calm, (1.0, 6.1), (9.0, 5.9), gradient_factor=3.0, **SPIKES)[3:] == ["rewind", "apply"]
    # a spike is not a good step: a second one is judged by the same window
    assert judge(*calm, (5.0, 1.0), (5.0, 1.0), loss_factor=2.0, **SPIKES)[3:] == ["rewind", "rewind"]


def test_no_spike_before_the_window_is_full() -> None:
    assert judge((1.0, 1.0), (1.0, 1.0), (90.0, 1.0), loss_factor=2.0, **SPIKES) == ["apply"] * 3


def test_the_problem_names_the_numbers() -> None:
    health = Health(HealthConfig(loss_factor=2.0, **SPIKES))
    for _ in range(3):
        assert health.judge(1.0, 0.5) is SOUND
    assert health.judge(2.5, 0.5).problem == ("loss 2.5, gradient norm 0.5: loss above 2 x the median 1 of 3 steps")


def test_too_many_skips_in_a_row_stop() -> None:
    bad = (math.nan, 1.0)
    actions = judge(bad, bad, (1.0, 1.0), bad, bad, bad, on_nonfinite="skip", max_skips=2)
    assert actions == ["skip", "skip", "apply", "skip", "skip", "stop"]


def test_a_resumed_run_judges_as_the_one_it_continues() -> None:
    settings = HealthConfig(loss_factor=2.0, **SPIKES)
    first, second = Health(settings), Health(settings)
    for _ in range(3):
        first.judge(1.0, 1.0)
    second.load_state_dict(first.state_dict())
    assert second.judge(2.5, 1.0) == first.judge(2.5, 1.0) != SOUND
    assert Health(HealthConfig()).state_dict() == {}


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("health.on_nonfinite=ignore", "stop, skip, rewind"),
        ("health.on_spike=skip", "set both"),
        ("health.loss_factor=3", "set both"),
        ("health.loss_factor=0.5", "above 1"),
        ("health.window_steps=0", "window_steps"),
        ("health.max_rewinds=0", "max_rewinds"),
    ],
)
def test_refused(override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        job_config("runs/x", override)


def test_a_rewind_needs_checkpoints() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.every_steps"):
        job_config("runs/x", "health.on_nonfinite=rewind", "checkpoint.every_steps=0")
