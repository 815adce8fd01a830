"""docs/python.md: every block runs, in order, in one session, and does what the page says."""

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers.small_run import Command

from lightning_moe.errors import UserError
from lightning_moe.runs.open import open_run

PAGE = Path(__file__).parent.parent / "docs" / "python.md"


def test_every_block_of_the_page_runs(
    command: Command, workplace: Path, small_data: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = command("fit", "--config", "small", "--run_name=a")
    assert code == 0, err
    [corpus] = small_data["corpus"]["init_args"]["paths"]
    shutil.copytree(corpus, workplace / "text")
    text = PAGE.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == text.count("\n```\n") > 5  # so every block of the page is Python
    session: dict[str, Any] = {"__name__": "session"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), session)
    assert not [str(warning.message) for warning in caught if "routing state" in str(warning.message)]

    run = session["run"]
    assert run.step == 4
    assert run.checkpoint_path == Path("runs/a/checkpoints/last.ckpt")
    code, out, err = command(
        "generate", "--ckpt_path", str(run.checkpoint_path), "--prompt=line 1", "--max_new_tokens=5", "--temperature=0"
    )
    assert code == 0, err
    assert out.rstrip("\n") == "line 1" + session["continuation"].text
    code, out, err = command("validate", "--config", "small", "--ckpt_path", str(run.checkpoint_path))
    assert code == 0, err
    # the command looks at two batches (limit_val_batches of the small experiment)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, limit_val_batches=2)
    [scores] = trainer.validate(run.model, datamodule=run.data, verbose=False)
    assert f"{scores['val/loss']:.4f}" in out + err
    for state in (
        session["model"].decoder.blocks[1].moe.state,
        session["regression"].moe.state,
        session["module"].moe.state,
    ):
        assert state["threshold"].any()
    assert session["trainer"].callback_metrics["loss"] < 1.9  # 2 is that of a layer that adds nothing


def test_what_cannot_be_opened_is_named(command: Command, workplace: Path) -> None:
    (workplace / "empty/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="empty: the run has no checkpoint yet"):
        open_run("empty")
    with pytest.raises(UserError, match=r"gone"):
        open_run("gone")


def test_an_export_opens_like_its_checkpoint(command: Command, workplace: Path) -> None:
    assert command("fit", "--config", "small", "--run_name=a")[0] == 0
    assert command("export", "--ckpt_path=runs/a/checkpoints/last.ckpt", "--output_dir=model")[0] == 0
    run, export = open_run("runs/a"), open_run("model")
    assert export.tokenizer.fingerprint == run.tokenizer.fingerprint
    for name, value in run.model.state_dict().items():
        assert torch.equal(export.model.state_dict()[name], value)
    with pytest.raises(UserError, match="its text is not known: give the folder of a run"):
        _ = export.data
