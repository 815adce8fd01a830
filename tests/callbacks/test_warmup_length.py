"""A warm-up may be a fraction of the run, and never takes the whole run without a word."""

import pytest
from helpers.small_run import Command

from lightning_moe.callbacks import ThresholdWarmup
from lightning_moe.errors import UserError
from lightning_moe.optim import ScheduleConfig
from lightning_moe.optim.schedule import steps_of

SMALL = ("--config", "small", "--run_name=a")


@pytest.mark.parametrize(("length", "total", "steps"), [(0.4, 400, 160), (0.025, 400, 10), (0.2, 1831, 366), (7, 9, 7)])
def test_a_length_below_one_is_a_fraction(length: float, total: int, steps: int) -> None:
    assert steps_of(length, total) == steps


@pytest.mark.parametrize("length", [-1, 1.5, float("nan"), float("inf")])
def test_what_is_no_length_is_refused(length: float) -> None:
    for make in (lambda: ThresholdWarmup(steps=length), lambda: ScheduleConfig(adamw_warmup_steps=length)):
        with pytest.raises(UserError, match="a whole number of steps from 0, or below 1 a fraction"):
            make()


TOO_LONG = {
    "--threshold_warmup.steps=5": "threshold_warmup.steps=5: the run has 4 optimizer steps, so thresholds would never",
    "--threshold_warmup={auto: true, steps: 0}": "threshold_warmup.min_steps=100: the run has 4 optimizer steps",
    "--model.schedule.adamw_warmup_steps=5": "must be at most 4, or a fraction of the run, such as 0.02",
}


@pytest.mark.parametrize("flag", TOO_LONG)
def test_a_warmup_that_does_not_fit_is_refused(flag: str, command: Command) -> None:
    code, _, err = command("fit", *SMALL, flag)
    assert code == 2, err
    assert TOO_LONG[flag] in err


def test_a_dense_model_has_no_warmup_to_refuse(command: Command) -> None:
    assert command("fit", *SMALL, "--threshold_warmup.steps=400", "--model.routing=null")[0] == 0


@pytest.mark.parametrize("flags", [("--trainer.max_steps=1",), ("--trainer.fast_dev_run=true",)])
def test_the_default_experiment_fits_into_any_run(flags: tuple[str, ...], command: Command) -> None:
    lengths = ("--threshold_warmup.steps=0.4", "--model.schedule.adamw_warmup_steps=0.025")
    code, _, err = command("fit", *SMALL, *lengths, *flags)
    assert code == 0, err


def test_a_rehearsal_of_any_configuration_cuts_its_warmups(command: Command) -> None:
    lengths = ("--threshold_warmup.steps=4000", "--model.schedule.adamw_warmup_steps=250", "--trainer.max_steps=19073")
    code, _, err = command("fit", *SMALL, *lengths, "--trainer.fast_dev_run=2")
    assert code == 0, err


def test_a_run_that_ends_in_its_warmup_says_so(command: Command) -> None:
    with pytest.warns(UserWarning, match=r"did not end in 4 steps: this model was trained by expert choice only"):
        code, _, err = command("fit", *SMALL, "--threshold_warmup.steps=0", "--threshold_warmup.tokens=100000")
    assert code == 0, err
