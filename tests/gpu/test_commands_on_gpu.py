"""The commands that take ``--device``, with a checkpoint that was trained on the same device."""

import re

import pytest
import torch
from helpers.small_run import Command

from lightning_moe.model.compilation import why_not_compiled

pytestmark = pytest.mark.gpu
CKPT = "--ckpt_path=runs/a/checkpoints/last.ckpt"


@pytest.fixture
def trained(command: Command, flags: tuple[str, ...]) -> Command:
    """The command line, in a folder with the run ``a``."""
    code, _, err = command("fit", "--config=small", *flags, "--run_name=a", "--trainer.enable_progress_bar=false")
    assert code == 0, err
    return command


def test_commands_run_on_the_device_and_say_what_the_cpu_says(trained: Command, device: torch.device) -> None:
    on = f"--device={device.type}"
    for arguments in (
        ("generate", CKPT, "--prompt=line 1", "--max_new_tokens=5", "--temperature=0"),
        ("audit", CKPT),
        ("calibrate", CKPT, "--output_dir=runs/b", "--max_tokens=2000", "--num_experts_per_token=0.5"),
        ("analyze", CKPT, "--output_dir=report", "--max_tokens=400", "--no_mlflow"),
        ("generate", "--ckpt_path=runs/b/checkpoints/last.ckpt", "--prompt=line 1", "--max_new_tokens=5"),
    ):
        code, out, err = trained(*arguments, on)
        assert code == 0, f"{arguments}: {out[-1000:]}{err[-1000:]}"
    assert "verdict: causal." in trained("audit", CKPT, on)[1]


def test_scores_of_the_device_are_those_of_the_cpu(trained: Command, flags: tuple[str, ...]) -> None:
    """bf16 on a GPU, fp32 on the CPU."""
    losses = []
    for on in (flags, ("--config=trainer/cpu",)):
        code, out, err = trained("validate", CKPT, *on, "--trainer.enable_progress_bar=false")
        assert code == 0, err
        losses.append(float(re.search(r"^loss +(\d+\.\d+)", out, flags=re.MULTILINE)[1]))
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_the_shipped_trainer_of_a_gpu_trains_as_it_is(
    command: Command, gpu: torch.device, recwarn: pytest.WarningsRecorder
) -> None:
    """With everything that ``trainer/gpu`` switches on, compilation too, and without falling back."""
    if (reason := why_not_compiled(gpu)) is not None:
        pytest.skip(f"torch.compile cannot work here: {reason}")
    code, _, err = command("fit", "--config=small", "--config=trainer/gpu", "--run_name=a")
    assert code == 0, err
    assert [str(warning.message) for warning in recwarn.list if "compil" in str(warning.message)] == []
