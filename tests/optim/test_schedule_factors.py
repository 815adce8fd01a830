"""Schedules against numbers worked out by hand."""

import io
import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_moe.errors import UserError
from lightning_moe.optim import MuonAdamW, ScheduleConfig, build_schedule
from lightning_moe.optim.schedule import ScheduleKind, learning_rate_factor


def factors(steps: list[int], warmup_steps: int, total_steps: int, **settings: Any) -> list[float]:
    config = ScheduleConfig(**settings)
    return [learning_rate_factor(step, config, warmup_steps, total_steps) for step in steps]


def test_linear() -> None:
    found = factors([0, 1, 3, 4, 54, 103, 104, 500], 4, 104, kind="linear", final_fraction=0.1)
    assert found == pytest.approx([0.25, 0.5, 1.0, 1.0, 0.55, 0.109, 0.1, 0.1])


def test_cosine() -> None:
    found = factors([0, 4, 29, 54, 79, 104, 105], 4, 104, kind="cosine", final_fraction=0.2)
    half = math.sqrt(2) / 2
    expected = [0.25, 1.0, 0.2 + 0.4 * (1 + half), 0.6, 0.2 + 0.4 * (1 - half), 0.2, 0.2]
    assert found == pytest.approx(expected)


def test_constant_then_decay() -> None:
    found = factors(
        [0, 9, 10, 80, 81, 90, 99, 100], 10, 100, kind="constant_then_decay", decay_fraction=0.2, final_fraction=0.0
    )
    assert found == pytest.approx([0.1, 1.0, 1.0, 1.0, 0.95, 0.5, 0.05, 0.0])


def test_constant() -> None:
    assert factors([0, 1, 2, 99, 100, 1000], 2, 100, kind="constant") == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]


@given(
    kind=st.sampled_from(get_args(ScheduleKind)),
    total_steps=st.integers(1, 300),
    final_fraction=st.floats(0, 1),
    decay_fraction=st.floats(0.01, 1),
    data=st.data(),
)
def test_rises_once_then_falls_to_the_final_fraction(
    kind: ScheduleKind, total_steps: int, final_fraction: float, decay_fraction: float, data: st.DataObject
) -> None:
    config = ScheduleConfig(kind, final_fraction=final_fraction, decay_fraction=decay_fraction)
    decay_steps = round(decay_fraction * total_steps) if kind == "constant_then_decay" else 0
    warmup_steps = data.draw(st.integers(0, total_steps - decay_steps))
    values = [learning_rate_factor(step, config, warmup_steps, total_steps) for step in range(total_steps + 3)]
    assert all(0 <= value <= 1 for value in values)
    peak = max(warmup_steps - 1, 0)
    assert values[:peak] == sorted(values[:peak])
    if peak < total_steps:
        assert values[peak] == 1.0 or kind == "constant_then_decay"
    assert all(later <= earlier + 1e-12 for earlier, later in zip(values[peak:], values[peak + 1 :], strict=False))
    assert values[total_steps:] == pytest.approx([1.0 if kind == "constant" else final_fraction] * 3)


def optimizer() -> MuonAdamW:
    return MuonAdamW(
        [
            {"params": [nn.Parameter(torch.ones(2, 2))], "rule": "muon", "lr": 0.02, "output_dim": -2},
            {"params": [nn.Parameter(torch.ones(2))], "rule": "adamw", "lr": 0.2},
        ]
    )


def test_each_rule_has_its_own_warmup_and_each_group_its_own_rate() -> None:
    groups = optimizer()
    schedule = build_schedule(groups, ScheduleConfig(adamw_warmup_steps=4, final_fraction=0.0), total_steps=8)
    rates = []
    for _ in range(9):
        rates.append([group["lr"] for group in groups.param_groups])
        groups.step()
        schedule.step()
    assert [rate[0] for rate in rates] == pytest.approx([0.02 * (8 - i) / 8 for i in range(9)])
    assert [rate[1] for rate in rates] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.15, 0.1, 0.05, 0.0])


def test_another_optimizer_has_the_adamw_warmup() -> None:
    other = torch.optim.AdamW([nn.Parameter(torch.ones(2))], lr=1.0)
    build_schedule(other, ScheduleConfig(adamw_warmup_steps=4), total_steps=8)
    assert other.param_groups[0]["lr"] == 0.25


def test_resume_continues_the_schedule() -> None:
    config = ScheduleConfig(adamw_warmup_steps=4)
    groups = optimizer()
    schedule = build_schedule(groups, config, total_steps=10)
    for _ in range(6):
        groups.step()
        schedule.step()
    file = io.BytesIO()
    torch.save([groups.state_dict(), schedule.state_dict()], file)
    file.seek(0)
    resumed = optimizer()
    resumed_schedule = build_schedule(resumed, config, total_steps=10)
    for each, state in zip((resumed, resumed_schedule), torch.load(file, weights_only=True), strict=True):
        each.load_state_dict(state)
    for _ in range(4):
        assert resumed_schedule.get_last_lr() == schedule.get_last_lr()
        assert [group["lr"] for group in resumed.param_groups] == schedule.get_last_lr()
        for each in (groups, schedule, resumed, resumed_schedule):
            each.step()


@pytest.mark.parametrize(("settings", "message"), [
    ({"kind": "linera"}, r"schedule.kind is 'linera'; must be one of \['linear', 'cosine'"),
    ({"adamw_warmup_steps": -1}, "schedule.adamw_warmup_steps is -1; must be a whole number"),
    ({"muon_warmup_steps": -1}, "schedule.muon_warmup_steps is -1"),
    ({"final_fraction": 1.5}, "schedule.final_fraction is 1.5; must be from 0 to 1"),
    ({"decay_fraction": 0.0}, "schedule.decay_fraction is 0.0; must be above 0 and at most 1"),
])  # fmt: skip
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ScheduleConfig(**settings)


def test_what_does_not_fit_into_the_run_is_refused() -> None:
    with pytest.raises(UserError, match=r"adamw_warmup_steps is 250, but the run has 100 .* at most 100"):
        build_schedule(optimizer(), ScheduleConfig(), total_steps=100)
    config = ScheduleConfig("constant_then_decay", adamw_warmup_steps=5, muon_warmup_steps=90)
    with pytest.raises(UserError, match=r"muon_warmup_steps is 90.* the last 20 are for the decay; must be at most 80"):
        build_schedule(optimizer(), config, total_steps=100)
    with pytest.raises(UserError, match="the run has 0 optimizer steps"):
        build_schedule(optimizer(), ScheduleConfig("constant", 0), total_steps=0)
