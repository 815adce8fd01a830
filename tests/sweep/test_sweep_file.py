"""What a sweep's file may say, and how it is refused."""

from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from small_sweep import CONTENT, DECAY, Make

from lightning_moe.config.compose import conf_root, merge
from lightning_moe.errors import UserError
from lightning_moe.sweep.configuration import check_space, run_environment, trial_layers, write_trial_config
from lightning_moe.sweep.record import _recorded_trials
from lightning_moe.sweep.space import read_space
from lightning_moe.sweep.spec import read_sweep
from lightning_moe.training.parse import parse

CAPACITY = "model.routing.init_args.capacity_factor"
SWITCH = {"free": {CAPACITY: None}, "bounded": {}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {}}, "unknown key 'objective': did you mean 'objectives'"),
        ({"space": None}, "space: missing"),
        ({"space": {}}, "space: must be a mapping"),
        ({"space": {DECAY: [0.1, 0.9]}}, rf"space: {DECAY}=\[0.1, 0.9\]: must be"),
        ({"space": {DECAY: {"flot": [0.1, 0.9]}}}, "unknown key 'flot': did you mean 'float'"),
        ({"space": {DECAY: {"float": [0.9, 0.1]}}}, rf"{DECAY}: float=\[0.9, 0.1\]: the first number must be below"),
        ({"space": {DECAY: {"float": [0.5, 0.5]}}}, "the first number must be below"),
        ({"space": {DECAY: {"float": [0.0, 0.5], "log": True}}}, "both must be above 0"),
        ({"space": {DECAY: {"float": [0.1, 0.5], "log": True, "step": 0.1}}}, "not together with log"),
        ({"space": {DECAY: {"int": [0.1, 5]}}}, r"int=\[0.1, 5\]: must be two whole numbers"),
        ({"space": {DECAY: {"choices": [0.5]}}}, "two or more different values"),
        ({"space": {DECAY: {"choices": [0.5, 0.5]}}}, "two or more different values"),
        ({"space": {DECAY: {"choices": [[1], [2]]}}}, "give pieces of configuration a name"),
        ({"space": {"on_off": {"choices": {True: {}, False: {}}}}}, "True: a name must be text"),
        ({"space": {CAPACITY: {"float": [0.1, 0.5], "when": {"capacty": "x"}}}}, "'capacty' is no earlier key"),
        (
            {"space": {"c": {"choices": SWITCH}, CAPACITY: {"float": [0.1, 0.5], "when": {"c": "bound"}}}},
            "when: c='bound': is none of its choices",
        ),
        ({"objectives": {"val/loss": "minimise"}}, "val/loss='minimise': must be minimize or maximize"),
        ({"budget": {}}, "budget.trials: missing"),
        ({"budget": {"trials": 0}}, "budget.trials=0: must be a whole number above 0"),
        ({"budget": {"trial": 3}}, "unknown key 'trial': did you mean 'trials'"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"seeds": 3}, "seeds=3: must be a list"),
        ({"name": "../x"}, "must be a plain folder name"),
        ({"config": ["rooting/expert_choice"]}, "rooting/expert_choice"),
        ({"storage": "${oc.env:NO_SUCH_VARIABLE_HERE}"}, "NO_SUCH_VARIABLE_HERE"),
        (
            {"budget": {"trials": 1, "tokens_per_trial": 10}, "space": {"trainer.max_steps": {"int": [1, 5]}}},
            "trainer.max_steps: follows from budget.tokens_per_trial",
        ),
        (
            {"pruner": {"name": "MedianPruner"}, "objectives": {"val/loss": "minimize", "b": "maximize"}},
            "MedianPruner: Optuna prunes with one objective only",
        ),
    ],
)
def test_a_bad_file_is_refused_by_key(changes: dict[str, Any], message: str, make: Make) -> None:
    with pytest.raises(UserError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"space": {"model.routing.init_args.ema_decey": {"float": [0.5, 0.9]}}},
            "unknown key 'model.routing.init_args.ema_decey' in .*sweep.yaml: did you mean '" + DECAY,
        ),
        ({"space": {"model.decoder.num_experts": {"float": [1.5, 8.5]}}}, r"num_experts=1.5 \(.*sweep.yaml\)"),
        ({"space": {"c": {"choices": {"a": {"model.routing.init_args.bta": 1}, "b": {}}}}}, "init_args.bta'"),
        ({"space": {"r": {"choices": {"a": {}, "b": {"include": ["routing/no"]}}}}}, "'routing/no' not found"),
        ({"budget": {"trials": 1, "tokens_per_trial": 10}}, "tokens_per_trial=10: must be at least the 2048 tokens"),
    ],
)
def test_a_space_that_does_not_fit_the_configuration_is_refused(
    changes: dict[str, Any], message: str, make: Make
) -> None:
    with pytest.raises(UserError, match=message):
        check_space(make(**changes))


def test_corners_reach_every_end_and_choice_under_its_conditions() -> None:
    content = {
        "kind": {"choices": {"a": {}, "b": {}}},
        "x": {"float": [0.0, 1.0], "when": {"kind": "b"}},
        "y": {"choices": [1, 2, 3], "when": {"kind": ["b"]}},
        "z": {"int": [4, 8], "when": {"y": [3]}},
    }
    space = read_space(content, Path("f"))
    corners = list(space.corners())
    assert {(key, value) for corner in corners for key, value in corner.items()} == {
        ("kind", "a"), ("kind", "b"), ("x", 0.0), ("x", 1.0), ("y", 1), ("y", 2), ("y", 3), ("z", 4), ("z", 8),
    }  # fmt: skip
    for corner in corners:
        assert ("x" in corner) == ("y" in corner) == (corner["kind"] == "b")
        assert ("z" in corner) == (corner.get("y") == 3)
    assert space.size() is None
    del content["x"]
    assert read_space(content, Path("f")).size() == 1 + 2 + 5  # a; b with y=1, 2; b with y=3 and five z


@given(st.lists(st.integers(2, 5), min_size=1, max_size=4))
def test_size_without_conditions_is_the_product(sizes: list[int]) -> None:
    product = 1
    for size in sizes:
        product *= size
    content = {f"k{i}": {"choices": list(range(size))} for i, size in enumerate(sizes)}
    assert read_space(content, Path("f")).size() == product


@pytest.mark.parametrize(
    ("entry", "size"),
    [
        ({"int": [1, 6]}, 6),
        ({"int": [40, 280], "step": 40}, 7),
        ({"int": [1, 6], "step": 2}, 3),
        ({"float": [0.1, 0.5], "step": 0.1}, 5),
        ({"float": [0.0, 1.0], "step": 0.3}, 4),
    ],
)
def test_a_stepped_range_has_as_many_values_as_optuna_s_grid(entry: dict[str, Any], size: int) -> None:
    assert read_space({"k": entry}, Path("f")).size() == size
    study = optuna.create_study(sampler=optuna.samplers.BruteForceSampler(seed=1))
    seen = set()

    def objective(trial: optuna.Trial) -> float:
        seen.add(read_space({"k": entry}, Path("f")).sample(trial)["k"])
        return 0.0

    study.optimize(objective, n_trials=50)  # stops by itself when all is seen
    assert len(seen) == size


def test_values_become_configuration(make: Make) -> None:
    sweep = make(
        space={
            "rule": {"choices": {"et": {"include": ["routing/expert_threshold"]}, "dense": {"model.routing": None}}},
            DECAY: {"float": [0.5, 0.9], "when": {"rule": "et"}},
        },
        budget={"trials": 1, "tokens_per_trial": 9000},
    )
    config = parse(trial_layers(sweep, {"rule": "et", DECAY: 0.625}, 7)).config
    assert config.model.routing.init_args.ema_decay == 0.625
    assert config.seed_everything == config.data.seed == 7
    assert config.trainer.max_steps == 4  # of 2048 tokens
    assert parse(trial_layers(sweep, {"rule": "dense"}, 7)).config.model.routing is None


def test_command_line_configuration_lies_over_the_file(make: Make, tmp_path: Path) -> None:
    make(config=["experiment/quickstart", {"trainer.max_steps": 7}])
    sweep = read_sweep(tmp_path / "sweep.yaml", ["routing/token_choice"], "other")
    merged = merge(sweep.base)
    assert merged["model"]["routing"]["class_path"].endswith("TokenChoice")
    assert merged["trainer"]["max_steps"] == 7
    assert sweep.folder == Path("runs/other")


SHIPPED = [path for path in sorted((conf_root().parent / "sweeps").glob("*.yaml")) if path.stem != "study"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_sweeps_fit_the_configuration(path: Path) -> None:
    assert set(CONTENT) - {"name"} <= set(yaml.safe_load(path.read_text()))
    check_space(read_sweep(path))


def test_a_password_reaches_the_runs_by_their_environment_only(make: Make, tmp_path: Path) -> None:
    uri = "postgresql://me:S3cret@127.0.0.1:9/m"
    sweep = make(config=[{"tracking.tracking_uri": uri}])
    write_trial_config(sweep, {DECAY: 0.9}, 1, tmp_path / "config.yaml")
    assert "S3cret" not in (tmp_path / "config.yaml").read_text() + str(sweep.identity())
    assert run_environment(sweep.base) == {"MLFLOW_TRACKING_URI": uri}


@pytest.mark.parametrize("number", ['"Infinity"', '"NaN"', "1e400", "1.5"])
def test_a_sweeps_record_without_the_number_of_a_trial_is_refused(number: str, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0, "time": 1.0, "sweep/trial": 3}\n')
    assert _recorded_trials(file) == [3]
    file.write_text(f'{{"step": 0, "time": 1.0, "sweep/trial": {number}}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: sweep/trial=.*: must be the number of a trial"):
        _recorded_trials(file)
