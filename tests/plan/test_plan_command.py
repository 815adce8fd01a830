"""`plan` from the command line: the paper's models, and numbers by hand."""

import re

import pytest

from lightning_moe.cli import main


@pytest.mark.parametrize(
    ("experiment", "total", "active"), [("paper_d12_et", "575", "186"), ("paper_d20_et", "2429", "561")]
)
def test_published_parameter_counts_time_and_cost(
    experiment: str, total: str, active: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--gpu", "a100", "--num_gpus", "8", "--mfu", "0.5", "--hours", "10", "--price", "2"]
    flags = ["--trainer.max_steps=1000", "--trainer.accumulate_grad_batches=16", *options]
    assert main(["plan", "--config", f"experiment/{experiment}", *flags]) == 0
    out = capsys.readouterr().out
    counts = [
        str(round(float(number))) for number in re.search(r"parameters +([\d.]+)M in all, ([\d.]+)M", out).groups()
    ]
    assert counts == [total, active]
    per_token = float(re.search(r"FLOPs +(\S+) per token", out)[1])
    tokens = 1000 * 256 * 2048
    hours = per_token * tokens / (8 * 312e12 * 0.5) / 3600
    assert float(re.search(r"time +(\S+) h", out)[1]) == pytest.approx(hours, rel=1e-3)
    assert float(re.search(r"cost +(\S+)", out)[1]) == pytest.approx(hours * 16, rel=0.02)
    assert float(re.search(r"within +10 h: (\S+) tokens", out)[1]) == pytest.approx(tokens / 36000, rel=1e-3)
    rows = dict(re.findall(r"^(single|ddp|fsdp) +(\S+)", out, re.M))
    assert float(rows["fsdp"]) * 8 == pytest.approx(float(rows["ddp"]), abs=0.01)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_gpus=3"], "data.global_batch_size=8: must be a multiple of 3 GPUs"),
        (["--gpu=H1000"], "--gpu 'H1000': not in the table"),
        (["--trainer.max_steps=-1"], "trainer.max_steps=-1 (the command line): must be at least 1"),
        (["--model.decoder.hiden_size=3"], "hiden_size"),
    ],
)
def test_what_does_not_fit_is_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
