"""What a sweep's figures draw, against the trials themselves and slow computations."""

import math
from datetime import datetime, timedelta
from io import BytesIO
from typing import Any

import numpy as np
import optuna
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from small_sweep import DECAY, RATE, Make

from lightning_moe.report.figures import wrapped_key
from lightning_moe.sweep.figures import best_so_far, figures, history, parameter_pages, pareto_front
from lightning_moe.sweep.objective import Objective
from lightning_moe.sweep.pairs import pairs, surface
from lightning_moe.sweep.scales import Scale
from lightning_moe.sweep.spec import Sweep
from lightning_moe.sweep.surface import REACH, WIDTH
from lightning_moe.sweep.trials import best_trials, ended_trials, importances

WARMUP = "threshold_warmup.steps"
CAPACITY = "model.routing.init_args.capacity_factor"
SPACE: dict[str, Any] = {
    RATE: {"float": [0.001, 0.1], "log": True},
    DECAY: {"choices": [0.8, 0.9, 0.95]},
    WARMUP: {"int": [20, 140], "step": 20},
    "capacity": {"choices": {"bounded": {}, "free": {CAPACITY: None}}},
    CAPACITY: {"float": [0.1, 1.0], "when": {"capacity": "bounded"}},
}
DISTRIBUTIONS: dict[str, BaseDistribution] = {
    RATE: FloatDistribution(0.001, 0.1, log=True),
    DECAY: CategoricalDistribution([0.8, 0.9, 0.95]),
    WARMUP: IntDistribution(20, 140, step=20),
    "capacity": CategoricalDistribution(["bounded", "free"]),
    CAPACITY: FloatDistribution(0.1, 1.0),
}
START = datetime(2026, 1, 1)


def add(study: optuna.Study, params: dict[str, Any], end: Any, minutes: int = 0) -> None:
    """Add a trial that ends after ``minutes``; ``end`` is its value, its values, or a state without one."""
    state = end if isinstance(end, TrialState) else TrialState.COMPLETE
    values = None if isinstance(end, TrialState) else end if isinstance(end, list) else [end]
    distributions = {key: DISTRIBUTIONS[key] for key in params}
    trial = create_trial(state=state, values=values, params=params, distributions=distributions)
    trial.datetime_start, trial.datetime_complete = START, START + timedelta(minutes=minutes)
    study.add_trial(trial)


def random_study(count: int, seed: int = 1, directions: tuple[str, ...] = ("minimize",)) -> optuna.Study:
    """A study whose trials end in another order than they began; every fifth is pruned, every seventh fails."""
    random = np.random.default_rng(seed)
    study = optuna.create_study(directions=directions)
    for number, minutes in enumerate(random.permutation(count)):
        params: dict[str, Any] = {
            RATE: float(10 ** random.uniform(-3, -1)),
            DECAY: [0.8, 0.9, 0.95][random.integers(3)],
            WARMUP: int(20 + 20 * random.integers(7)),
            "capacity": ["bounded", "free"][random.integers(2)],
        }
        if params["capacity"] == "bounded":
            params[CAPACITY] = float(random.uniform(0.1, 1))
        value = 3 + abs(math.log10(params[RATE] / 0.02)) + 0.001 * params[WARMUP] + 0.01 * random.normal()
        end: Any = [value, *random.uniform(size=len(directions) - 1)]
        end = TrialState.PRUNED if number % 5 == 4 else TrialState.FAIL if number % 7 == 6 else end
        add(study, params, end, int(minutes))
    return study


def objective_of(sweep: Sweep, study: optuna.Study, index: int = 0) -> Objective:
    name, direction = list(sweep.objectives.items())[index]
    return Objective(index, name, direction, len(sweep.seeds), ended_trials(study))


def points(axes: Axes, label: str) -> list[tuple[float, float]]:
    """The points of a label, as the axes have them: places of data, or shares of the axes' height."""
    found = [collection for collection in axes.collections if str(collection.get_label()).startswith(label)]
    return [(float(x), float(y)) for collection in found for x, y in collection.get_offsets()]


def panels(figure: Figure) -> dict[str, Axes]:
    """The axes of a page of parameters, by the key below each."""
    found = {}
    for axes in figure.axes:
        if axes.get_visible():
            found[axes.get_xlabel().split("(")[0].replace("\n", "")] = axes
    return found


def in_state(study: optuna.Study, state: str, key: str) -> list[FrozenTrial]:
    return [trial for trial in study.trials if trial.state.name == state and key in trial.params]


def test_each_trial_is_one_point_over_each_parameter_that_it_has(make: Make) -> None:
    sweep, study = make(space=SPACE), random_study(30)
    objective = objective_of(sweep, study)
    (page,) = parameter_pages(sweep, objective, {WARMUP: 0.3, RATE: 0.6}, [study.best_trial])
    found = panels(page)
    assert list(found) == [RATE, WARMUP, DECAY, "capacity", CAPACITY], "the most important first"
    for key, axes in found.items():
        choices = {DECAY: [0.8, 0.9, 0.95], "capacity": ["bounded", "free"]}.get(key)

        def place(value: Any, choices: Any = choices) -> float:
            return float(choices.index(value)) if choices else float(value)

        def drawn(label: str, axes: Axes = axes, choices: Any = choices) -> list[tuple[float, float]]:
            return sorted((round(x) if choices else x, y) for x, y in points(axes, label))

        others = [trial for trial in in_state(study, "COMPLETE", key) if trial.number != study.best_trial.number]
        assert drawn("complete") == sorted((place(t.params[key]), t.value) for t in others)
        best = [(place(study.best_params[key]), study.best_value)] if key in study.best_params else []
        assert drawn("best") == best
        for state, label in (("PRUNED", "pruned"), ("FAIL", "failed")):
            without = in_state(study, state, key)
            assert [x for x, _ in drawn(label)] == sorted(place(t.params[key]) for t in without)
        top, bottom = axes.get_ylim()[1], axes.get_ylim()[0]
        worst = (max(trial.value for trial in in_state(study, "COMPLETE", RATE)) - bottom) / (top - bottom)
        assert all(y > worst for label in ("pruned", "failed") for _, y in points(axes, label)), "off the values' axis"
        assert max(axes.get_yticks()) < bottom + (top - bottom) * min(y for _, y in points(found[RATE], "pruned"))
        assert axes.get_xscale() == ("log" if key == RATE else "linear")
        if choices:
            assert [text.get_text() for text in axes.get_xticklabels()] == [str(choice) for choice in choices]
    assert "only capacity=bounded" in found[CAPACITY].get_xlabel().replace("\n", "")
    assert "log scale" in found[RATE].get_xlabel()
    assert found[RATE].get_ylabel() == "val/loss (nats per token)"


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_the_best_so_far_is_that_of_all_trials_that_ended_before(make: Make, direction: str) -> None:
    sweep, study = make(space=SPACE, objectives={"val/loss": direction}), random_study(40, directions=(direction,))
    objective = objective_of(sweep, study)
    by_end = sorted(study.trials, key=lambda trial: trial.datetime_complete or START)
    assert [trial.number for trial in by_end] != list(range(40))
    expected = []
    for count, trial in enumerate(by_end, 1):
        if trial.state == TrialState.COMPLETE:
            values = [earlier.value for earlier in by_end[:count] if earlier.state == TrialState.COMPLETE]
            expected.append((count, max(values) if direction == "maximize" else min(values)))
    assert best_so_far(objective) == expected
    axes = history(sweep, objective).axes[0]
    (line,) = axes.get_lines()
    assert line.get_drawstyle() == "steps-post"
    assert list(zip(*line.get_data(), strict=True)) == [*expected, (40, expected[-1][1])]
    ((x, y),) = points(axes, "best: trial")
    assert by_end[round(x) - 1].number == study.best_trial.number
    assert y == study.best_value
    drawn = {(round(x), y) for x, y in points(axes, "complete")}
    ended = [(i, t.value) for i, t in enumerate(by_end, 1) if t.value is not None]
    assert drawn == {(i, value) for i, value in ended if value != study.best_value}


def test_the_colours_between_the_trials_are_weighted_means_of_those_near_by(make: Make) -> None:
    sweep, study = make(space=SPACE), random_study(25)
    scales = {parameter.key: Scale(parameter) for parameter in sweep.space.parameters}
    found = surface(objective_of(sweep, study), scales[RATE], scales[DECAY])
    assert found is not None
    rates, places, values = found
    assert rates[[0, -1]] == pytest.approx([0.001, 0.1])
    assert places[[0, -1]] == pytest.approx([0, 2])
    trials = in_state(study, "COMPLETE", RATE)
    for column in range(0, len(rates), 23):
        for row in range(0, len(places), 23):
            total = weight = 0.0
            nearest = math.inf
            for trial in trials:
                across = (math.log10(rates[column]) - math.log10(trial.params[RATE])) / 2  # two decades
                up = (places[row] - [0.8, 0.9, 0.95].index(trial.params[DECAY])) / 2  # two steps
                nearest = min(nearest, math.hypot(across, up))
                one = math.exp(-0.5 * (math.hypot(across, up) / WIDTH) ** 2)
                total, weight = total + one * trial.value, weight + one
            if nearest > REACH * WIDTH:
                assert math.isnan(values[row, column])
            else:
                assert values[row, column] == pytest.approx(total / weight)
    assert np.isnan(values).any()
    assert not np.isnan(values).all()


def test_pairs_are_of_the_three_most_important_parameters_with_an_order(make: Make) -> None:
    sweep, study = make(space=SPACE), random_study(40)
    shares = importances(study, 0)
    assert next(iter(shares)) == RATE
    assert CAPACITY not in shares, "not every trial has it"
    figure = pairs(sweep, objective_of(sweep, study), {WARMUP: 0.5, "capacity": 0.4, RATE: 0.3}, [study.best_trial])
    assert figure is not None
    *drawn, bar = figure.axes
    assert [(a.get_xlabel().split("\n")[0], a.get_ylabel().split("\n")[0]) for a in drawn] == [
        (WARMUP, RATE), (WARMUP, "model.routing.init_args."), (RATE, "model.routing.init_args."),
    ]  # fmt: skip
    assert drawn[2].get_ylabel().replace("\n", "") == DECAY
    assert bar.get_ylabel() == "val/loss (nats per token)"
    others = [trial for trial in in_state(study, "COMPLETE", RATE) if trial.number != study.best_trial.number]
    collection = next(c for c in drawn[0].collections if c.get_label() == "complete")
    coloured = {
        (x, y): value for (x, y), value in zip(points(drawn[0], "complete"), collection.get_array(), strict=True)
    }
    assert coloured == {(float(t.params[WARMUP]), t.params[RATE]): t.value for t in others}
    assert len(points(drawn[0], "pruned")) == len(in_state(study, "PRUNED", RATE))
    assert "the 3 most important of 4" in str(figure.get_suptitle())


def test_the_front_is_marked_over_each_two_objectives(make: Make) -> None:
    names = ["val/loss", "val_routing/max_load", "summary/flops_per_token"]
    sweep = make(space=SPACE, objectives=dict.fromkeys(names, "minimize"))
    study = random_study(20, directions=("minimize",) * 3)
    objectives = [objective_of(sweep, study, index) for index in range(3)]
    complete = in_state(study, "COMPLETE", RATE)
    front = [
        trial for trial in complete
        if not any(all(np.less_equal(o.values, trial.values)) and o.values != trial.values for o in complete)
    ]  # fmt: skip
    figure = pareto_front(sweep, objectives, best_trials(sweep, study))
    for axes, (x, y) in zip(figure.axes, ((0, 1), (0, 2), (1, 2)), strict=True):
        assert sorted(points(axes, "Pareto front")) == sorted((t.values[x], t.values[y]) for t in front)
        assert len(points(axes, "complete")) == len(complete) - len(front)
        assert axes.get_xlabel().startswith(names[x])
        assert axes.get_ylabel().endswith("minimize")


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_values_far_away_do_not_squeeze_the_others(make: Make, direction: str) -> None:
    sign = 1 if direction == "minimize" else -1
    sweep, study = make(space=SPACE, objectives={"val/loss": direction}), optuna.create_study(direction=direction)
    for number in range(20):
        value = 900.0 if number == 3 else math.inf if number == 4 else 3 + number / 100
        add(study, {RATE: 0.01 + number / 1000}, sign * value, number)
    objective = objective_of(sweep, study)
    assert [trial.number for trial in objective.trials if objective.is_far(trial)] == [3, 4]
    axes = history(sweep, objective).axes[0]
    low, high = sorted(sign * limit for limit in axes.get_ylim())
    assert 2.9 < low < 3
    assert 3.19 < high < 3.3
    (label,) = [str(c.get_label()) for c in axes.collections if "worse" in str(c.get_label())]
    assert label == f"worse than {objective.fence:.4g} or not finite (2)"
    assert [x for x, _ in points(axes, "worse")] == [4, 5]


def test_an_arm_of_a_parabola_is_not_far_away(make: Make) -> None:
    sweep, study = make(space=SPACE), optuna.create_study()
    for number in range(20):
        add(study, {RATE: 0.01}, 3 + (number / 10 - 1) ** 2, number)
    assert objective_of(sweep, study).fence is None


ONE = {RATE: 0.01, DECAY: 0.9, WARMUP: 20, "capacity": "free"}
FEW: dict[str, tuple[list[Any], set[str]]] = {
    "no trial": ([], set()),
    "one": ([(ONE, 3.0)], {"history", "parameters"}),
    "two": ([(ONE, 3.0), (ONE | {RATE: 0.02}, 2.0)], {"history", "parameters"}),
    "only failures": ([(ONE, TrialState.FAIL)] * 3, {"parameters"}),
    "only infinite": ([(ONE, math.inf)] * 3, {"parameters"}),
    "the same values": ([(ONE, 3.0)] * 9, {"history", "parameters", "pairs"}),
    "the same parameters": ([(ONE, 3.0 + n) for n in range(9)], {"history", "parameters", "pairs"}),
    "one differs": ([(ONE | {RATE: 0.01 + n / 100}, 3.0 + n) for n in range(9)], {"history", "parameters", "pairs"}),
}


@pytest.mark.parametrize("case", FEW)
def test_few_or_constant_trials_draw_what_they_can(make: Make, case: str) -> None:
    trials, expected = FEW[case]
    sweep, study = make(space=SPACE), optuna.create_study()
    for number, (params, end) in enumerate(trials):
        add(study, params, end, number)
    drawn = dict(figures(sweep, study))
    assert set(drawn) - {"importance"} == expected
    for image in drawn.values():
        height, width, _ = imread(BytesIO(image), format="png").shape
        assert 200 < height < 3000
        assert 200 < width < 3000


def test_many_parameters_fill_pages_each_once(make: Make) -> None:
    keys = [f"model.some_part.init_args.a_parameter_with_a_long_name_{number:02}" for number in range(20)]
    sweep, study = make(space={key: {"float": [0, 1]} for key in keys}), optuna.create_study()
    for number in range(5):
        study.enqueue_trial(dict.fromkeys(keys, number / 10))
        trial = study.ask({key: FloatDistribution(0, 1) for key in keys})
        study.tell(trial, 1 + number)
    pages = list(parameter_pages(sweep, objective_of(sweep, study), {keys[15]: 0.5}, [study.best_trial]))
    shown = [key for page in pages for key in panels(page)]
    assert shown[0] == keys[15]
    assert sorted(shown) == keys
    assert [len(panels(page)) for page in pages] == [9, 9, 2]
    assert "page 2 of 3, the most important of 20 parameters first" in str(pages[1].get_suptitle())
    names = dict(figures(sweep, study))
    assert {"parameters", "parameters_2", "parameters_3"} <= set(names)


@pytest.mark.parametrize(("key", "width", "lines"), [
    ("model.routing.init_args.ema_decay", 32, ["model.routing.init_args.", "ema_decay"]),
    ("token_choice_loss_free", 14, ["token_choice_", "loss_free"]),
    ("(only capacity=bounded/free)", 40, ["(only capacity=bounded/free)"]),
    ("a" * 50, 10, ["a" * 50]),
    ("__a__b.c", 4, ["__", "a__", "b.c"]),
])  # fmt: skip
def test_a_long_name_is_broken_and_never_cut(key: str, width: int, lines: list[str]) -> None:
    assert wrapped_key(key, width).split("\n") == lines


def test_equal_choices_of_other_types_have_places_of_their_own(make: Make) -> None:
    (parameter,) = make(space={DECAY: {"choices": [1, True, 1.0, None, "1"]}}).space.parameters
    scale = Scale(parameter)
    assert [scale.position(value) for value in (1, True, 1.0, None, "1")] == [0, 1, 2, 3, 4]
    assert math.isnan(scale.position("of another storage"))
    assert not scale.is_numeric


def test_choices_are_no_formulas(make: Make) -> None:
    choices = ["$x^{", "a $b$ c", "plain"]
    sweep = make(space={DECAY: {"choices": choices}, RATE: {"float": [0.1, 1], "when": {DECAY: choices[:2]}}})
    study = optuna.create_study()
    for value in choices:
        params: dict[str, Any] = {DECAY: value}
        study.add_trial(create_trial(value=1, params=params, distributions={DECAY: CategoricalDistribution(choices)}))
    assert "parameters" in dict(figures(sweep, study))


@pytest.mark.parametrize(("low", "high"), [(0.001, 0.1), (0.03, 0.05), (1e-9, 1e3), (2, 3), (1, 100_000)])
def test_a_log_axis_has_two_to_six_ticks(make: Make, low: float, high: float) -> None:
    (parameter,) = make(space={RATE: {"float": [low, high], "log": True}}).space.parameters
    axes = Figure().subplots()
    Scale(parameter).draw(axes.xaxis, 0.05)
    ticks = axes.get_xticks()
    assert 2 <= len(ticks) <= 6
    assert all(low * 0.3 < tick < high * 3 for tick in ticks)
