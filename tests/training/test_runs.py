"""The real commands on a tiny budget: what a run leaves on disk, and how it is continued, evaluated and refused."""

import gzip
import json
import lzma
import pickle
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.small_run import Command
from safetensors.torch import load_file

from lightning_moe.tracking import read_metrics
from lightning_moe.training.checkpoint_files import AtomicCheckpointIO

SMALL = ("--config", "small")


def fit(command: Command, *args: str) -> str:
    code, out, err = command("fit", *args)
    assert code == 0, err
    return out


def checkpoint(run: str, name: str = "last") -> dict[str, Any]:
    content = torch.load(f"runs/{run}/checkpoints/{name}.ckpt", weights_only=True)
    assert isinstance(content, dict)
    return content


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_leaves_config_record_checkpoint_and_summary(command: Command, workplace: Path) -> None:
    out = fit(command, *SMALL, "--run_name=a", "--trainer.max_steps=5")
    run = workplace / "runs/a"
    summary = json.loads((run / "summary.json").read_text())
    assert checkpoint("a")["global_step"] == 5  # the interval of 100 steps never came: the end is kept all the same

    # the last validation in training was after 4 steps; the summary's came after 5 (Lightning counts steps from 0)
    validations = [line for line in read_metrics(run) if "val/loss" in line]
    assert [line["step"] for line in validations] == [1, 3, 4]
    assert max(line["step"] for line in read_metrics(run) if "train/loss" in line) == 4
    assert summary["loss"] == pytest.approx(validations[-1]["val/loss"])
    assert summary["perplexity"] == pytest.approx(2.718281828 ** summary["loss"], rel=1e-4)
    assert summary["steps"] == 5

    shown = dict(re.findall(r"^(\S.*?)  +(\S.*)$", out, flags=re.MULTILINE))
    assert shown["loss"] == f"{summary['loss']:.4f} nats per token"
    assert shown["bits per byte"] == f"{summary['bits_per_byte']:.4f}"
    assert shown["checkpoint"] == "runs/a/checkpoints/last.ckpt"
    assert summary["compressors"] == {}
    assert "same text" not in out, "the validation was of two batches, not of the text that was compressed"
    assert re.search(r"layer_01 +\d+\.\d\d +\d+ +\d\.\d{3}\n", out)
    assert set(summary["layers"]) == {"layer_01"}
    assert summary["total_parameters"] > summary["active_parameters"] > 0
    assert summary["sample"]


def test_config_of_a_run_repeats_the_run_under_a_new_name(command: Command, workplace: Path) -> None:
    fit(command, *SMALL, "--run_name=a", "--model.routing=TokenChoice", "--seed_everything=3")
    fit(command, "--config=runs/a/config.yaml", "--run_name=b")
    first, second = (yaml.safe_load((workplace / f"runs/{run}/config.yaml").read_text()) for run in "ab")
    assert first == second
    assert first["data"]["seed"] == 3
    a, b = checkpoint("a")["state_dict"], checkpoint("b")["state_dict"]
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_compressors_stand_beside_the_score_of_the_whole_text(command: Command, workplace: Path) -> None:
    out = fit(command, *SMALL, "--run_name=a", "--trainer.limit_val_batches=1.0")
    assert re.search(r"gzip -9, same text +\d\.\d{4}\n.*xz -9, same text +\d\.\d{4}\n", out)
    assert set(json.loads((workplace / "runs/a/summary.json").read_text())["compressors"]) == {"gzip -9", "xz -9"}


def test_compressors_are_those_of_the_standard_tools() -> None:
    from lightning_moe.training.summary import compressor_bits_per_byte

    text = b"the same words again and again, " * 400 + bytes(range(256))
    found = compressor_bits_per_byte(text)
    assert gzip.decompress(gzip.compress(text, 9)) == lzma.decompress(lzma.compress(text, preset=9)) == text
    assert found == {
        "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }
    assert compressor_bits_per_byte(b"") == {}


def test_an_existing_run_is_refused_and_left_alone(command: Command, workplace: Path) -> None:
    fit(command, *SMALL, "--run_name=a", "--trainer.max_steps=2")
    before = files(workplace / "runs")
    code, _, err = command("fit", *SMALL, "--run_name=a")
    assert code == 2
    assert "run_name='a'" in err
    assert "nothing is overwritten" in err
    assert files(workplace / "runs") == before


def test_resuming_equals_not_having_stopped(command: Command, workplace: Path) -> None:
    warmup = "--threshold_warmup.steps=2"  # a fraction would be another length in a longer run
    fit(command, *SMALL, "--run_name=whole", "--trainer.max_steps=6", warmup)
    fit(command, *SMALL, "--run_name=parts", "--trainer.max_steps=3", warmup)
    fit(command, "--ckpt_path=last", "--run_name=parts", "--trainer.max_steps=6")
    whole, parts = checkpoint("whole"), checkpoint("parts")
    assert whole["global_step"] == parts["global_step"] == 6
    assert whole["state_dict"].keys() == parts["state_dict"].keys()
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, parts["state_dict"][name]), name
    losses = [
        [(line["step"], line["train/loss"]) for line in read_metrics(f"runs/{run}") if "train/loss" in line]
        for run in ("whole", "parts")
    ]
    assert losses[0] == losses[1]


def test_last_without_a_name_continues_the_newest_run_with_its_own_settings(command: Command, workplace: Path) -> None:
    fit(command, *SMALL, "--run_name=old", "--trainer.max_steps=2")
    fit(command, *SMALL, "--run_name=new", "--trainer.max_steps=2", "--model.decoder.hidden_size=48")
    fit(command, "--ckpt_path=last", "--trainer.max_steps=3")
    assert checkpoint("new")["global_step"] == 3
    assert checkpoint("old")["global_step"] == 2
    assert sorted(p.name for p in (workplace / "runs").iterdir()) == ["new", "old"]


def test_last_without_any_checkpoint_warns_and_starts(command: Command, workplace: Path) -> None:
    for attempt in range(2):  # the same line of a job's script, before and after an interruption
        code, _, err = command(
            "fit", *SMALL, "--run_name=job", "--ckpt_path=last", f"--trainer.max_steps={attempt + 2}"
        )
        assert code == 0, err
        assert ("no checkpoint under runs/job yet; starting from scratch" in err) == (attempt == 0)
    assert checkpoint("job")["global_step"] == 3


def test_a_checkpoint_of_one_run_starts_another_by_name(command: Command, workplace: Path) -> None:
    fit(command, *SMALL, "--run_name=a", "--trainer.max_steps=2")
    before = files(workplace / "runs/a")
    fit(command, "--ckpt_path=runs/a/checkpoints/last.ckpt", "--run_name=b", "--trainer.max_steps=3")
    assert checkpoint("b")["global_step"] == 3
    assert files(workplace / "runs/a") == before


def test_the_record_has_gradient_norm_learning_rates_and_tokens(command: Command, workplace: Path) -> None:
    """Accumulation and clipping change none of them."""
    flags = ("--model.routing=null", "--trainer.max_steps=2")
    fit(command, *SMALL, *flags, "--run_name=whole")
    fit(command, *SMALL, *flags, "--run_name=parts", "--trainer.accumulate_grad_batches=4")
    fit(command, *SMALL, *flags, "--run_name=clipped", "--trainer.gradient_clip_val=1e-3")
    lines = {
        run: [line for line in read_metrics(workplace / "runs" / run) if "train/loss" in line]
        for run in ("whole", "parts", "clipped")
    }
    assert [line["train/tokens_seen"] for line in lines["whole"]] == [8 * 16, 2 * 8 * 16]
    assert lines["whole"][0]["train/muon_learning_rate"] == pytest.approx(0.02)
    for run in ("parts", "clipped"):
        norm = lines["whole"][0]["train/gradient_norm"]
        assert norm > 1e-2
        assert lines[run][0]["train/gradient_norm"] == pytest.approx(norm, rel=1e-4)


def test_tokens_seen_count_each_part_of_a_run(command: Command, workplace: Path) -> None:
    fit(command, *SMALL, "--run_name=a", "--trainer.max_steps=2")
    fit(command, "--run_name=a", "--ckpt_path=last", "--trainer.max_steps=4", "--data.global_batch_size=4")
    seen = [line["train/tokens_seen"] for line in read_metrics(workplace / "runs/a") if "train/tokens_seen" in line]
    assert seen == [16 * windows for windows in (8, 16, 20, 24)]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "{class_path: lightning_moe.training.strategy.FullyShardedStrategy}"])
def test_the_gradient_norm_is_that_of_one_process(strategy: str, workplace: Path) -> None:
    def norms(run: str, *flags: str) -> list[float]:
        arguments = ["fit", *SMALL, "--model.routing=null", "--trainer.max_steps=3", f"--run_name={run}", *flags]
        subprocess.run([sys.executable, "-m", "lightning_moe", *arguments], check=True, capture_output=True)
        return [line["train/gradient_norm"] for line in read_metrics(workplace / "runs" / run) if "train/loss" in line]

    two = norms("two", "--trainer.devices=2", f"--trainer.strategy={strategy}")
    assert len(two) == 3
    assert two == pytest.approx(norms("one"), rel=1e-3)


def test_validate_test_and_predict_use_the_configuration_of_the_run(command: Command, workplace: Path) -> None:
    fit(command, *SMALL, "--run_name=a", "--model.decoder.hidden_size=48")
    summary = json.loads((workplace / "runs/a/summary.json").read_text())
    before = files(workplace / "runs")
    for name, flag in (("validate", "runs/a/checkpoints/last.ckpt"), ("test", "last")):
        code, out, err = command(name, f"--ckpt_path={flag}")
        assert code == 0, err
        assert f"loss           {summary['loss']:.4f} nats per token" in out
        (record,) = (workplace / "runs/a/evaluations").glob(f"a-{name}-*Z")
        (line,) = read_metrics(record)
        assert line["step"] == 3  # the last of 4 steps, as of a validation inside of training
        assert line[f"{'val' if name == 'validate' else name}/loss"] == pytest.approx(summary["loss"])
        events = [json.loads(event) for event in (record / "tracking.jsonl").read_text().splitlines()]
        tags = {tag: value for event in events for tag, value in event.get("tags", {}).items()}
        assert (tags["kind"], tags["source_run"], tags["routing"]) == (name, "a", "expert_threshold")
        (start,) = (event for event in events if event["event"] == "start")
        assert start["experiment_name"] == "lightning_moe: evaluations"
        assert [event["status"] for event in events if event["event"] == "end"] == ["FINISHED"]
        assert tags["mlflow.note.content"].strip("`\n") in out, "the description is what was printed"
        assert f"loss           {summary['loss']:.4f} nats per token" in tags["mlflow.note.content"]
    after = {path: content for path, content in files(workplace / "runs").items() if "/evaluations/" not in path}
    assert after == before

    code, out, err = command("predict", "--ckpt_path=last")
    assert code == 0, err
    assert "predictions: runs/a/predictions/last.safetensors" in out
    tensors = load_file(workplace / "runs/a/predictions/last.safetensors")
    assert tensors["loss"].shape == tensors["labels"].shape == tensors["fanout"].shape
    assert tensors["labels"].shape[1] == 16


def test_predictions_that_cannot_be_written_are_refused_before_the_work(command: Command, workplace: Path) -> None:
    assert command("fit", "--config", "small.yaml", "--run_name=r")[0] == 0
    (workplace / "runs/r/predictions").write_text("no folder")
    code, out, err = command("predict", "--ckpt_path=runs/r/checkpoints/last.ckpt")
    assert code == 2
    assert "predict writes to" in err
    assert "cannot be written" in err
    assert "Predicting" not in out + err


def test_keep_all_keeps_each_checkpoint(command: Command, workplace: Path) -> None:
    fit(command, *SMALL, "--run_name=a", "--checkpoint.every_n_train_steps=2", "--checkpoint.keep_all=true")
    names = sorted(p.name for p in (workplace / "runs/a/checkpoints").iterdir())
    assert names == ["last.ckpt", "previous.ckpt", "step-000002.ckpt", "step-000004.ckpt"]
    assert [checkpoint("a", name)["global_step"] for name in ("last", "previous")] == [4, 2]
    assert checkpoint("a", "step-000002")["global_step"] == 2


REFUSED = [
    (["validate", "--ckpt_path=gone.ckpt"], "ckpt_path='gone.ckpt': no such file"),
    (["validate", "--ckpt_path=last", "--output_dir=elsewhere"], "no checkpoint under elsewhere"),
    (["validate", *SMALL], "validate needs --ckpt_path"),
    (["fit", "--ckpt_path=truncated.ckpt", *SMALL], "ckpt_path='truncated.ckpt': not a complete checkpoint"),
    (["fit", "--ckpt_path=empty.ckpt", *SMALL], "ckpt_path='empty.ckpt': not a complete checkpoint"),
    (["fit", "--ckpt_path=other.ckpt", *SMALL], "ckpt_path: other.ckpt: not a checkpoint of this program"),
    (["fit", "--ckpt_path=code.ckpt", *SMALL], "ckpt_path: code.ckpt: not a complete checkpoint"),
    (
        ["fit", "--ckpt_path=last", "--model.decoder.hidden_size=64", "--model.decoder.num_experts=8"],
        "runs/a/checkpoints/last.ckpt.*architecture: .*hidden_size: checkpoint 32, this model 64; .*num_exp",
    ),
]


def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_changes(command: Command, workplace: Path) -> None:
    fit(command, *SMALL, "--run_name=a", "--trainer.max_steps=2")
    content = (workplace / "runs/a/checkpoints/last.ckpt").read_bytes()
    (workplace / "truncated.ckpt").write_bytes(content[: len(content) // 2])
    (workplace / "empty.ckpt").write_bytes(b"")
    torch.save({"weights": torch.zeros(2)}, workplace / "other.ckpt")
    torch.save({"state_dict": Harmful()}, workplace / "code.ckpt")
    before = files(workplace)
    for args, message in REFUSED:
        code, _, err = command(*args)
        assert code == 2, args
        assert "Traceback" not in err, args
        assert re.search(message, err, flags=re.DOTALL), (args, err)
        assert files(workplace) == before, args


class Harmful:
    """What a checkpoint from somebody else may hold: loading it must not run it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harmed"),)


def test_bad_data_leaves_no_run(command: Command, workplace: Path) -> None:
    (workplace / "empty.txt").write_text("")
    code, _, err = command("fit", *SMALL, "--data.corpus.init_args.paths=[empty.txt]")
    assert code == 2
    assert "empty.txt is empty" in err
    assert not list(workplace.glob("runs/*"))


def test_a_run_that_diverges_stops_and_keeps_the_last_checkpoint(command: Command, workplace: Path) -> None:
    """A weight decay of 1e13 multiplies the weights at each step until fp32 ends."""
    code, _, err = command(
        "fit", *SMALL, "--run_name=a", "--checkpoint.every_n_train_steps=1", "--model.optimizer.weight_decay=1e13"
    )
    assert code == 3
    assert re.search(r"^error: .*not finite.*last good checkpoint is \S+/runs/a/checkpoints/last\.ckpt", err, re.M)
    assert 1 <= checkpoint("a")["global_step"] < 4
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint("a")["state_dict"].values())


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(workplace: Path) -> None:
    path = workplace / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1, "weights": torch.arange(1000)}, path)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        AtomicCheckpointIO().save_checkpoint({"weights": torch.arange(1000), "cannot be saved": lambda: None}, path)
    assert torch.load(path, weights_only=True)["step"] == 1
    assert not [p for p in workplace.iterdir() if p.name.startswith(".last")]


def test_checkpoints_do_not_pass_through_the_temporary_folder_of_the_system(
    command: Command, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be on another disk, where the last step is a copy: half a checkpoint after a crash."""
    monkeypatch.setattr(tempfile, "tempdir", str(workplace / "no such folder"))
    fit(command, *SMALL, "--run_name=a", "--trainer.max_steps=2")
    assert checkpoint("a")["global_step"] == 2
