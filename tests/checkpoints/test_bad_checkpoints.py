"""Checkpoints that are whole by their checksums and wrong inside: refused in a line, before anything is written."""

import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.bad_content import EVERY, no_longer_than, one_each, surprises, wrong_contents
from helpers.small_run import Command
from safetensors.torch import load_file, save_file

from lightning_moe.analysis.training_record import switch_step, training_phase
from lightning_moe.calibrate.target import target_model
from lightning_moe.checkpoints.exported import WEIGHTS_INDEX
from lightning_moe.checkpoints.files import CHECKSUMS, HEADER
from lightning_moe.checkpoints.read import read_header, read_verified
from lightning_moe.checksums import digest
from lightning_moe.errors import UserError
from lightning_moe.module import LanguageModel
from lightning_moe.runs.loading import check_tokenizer, own_tokenizer, rule_name
from lightning_moe.runs.open import open_run
from lightning_moe.training.trainer import check_initial_weights, open_checkpoint

FACTS = ("step", "config", "data")

SMALL = ("--config", "small", "--trainer.max_steps=2")


@pytest.fixture
def run(command: Command, workplace: Path) -> Path:
    """A run whose checkpoint has something under every key."""
    warmup = ("--threshold_warmup.auto=true", "--threshold_warmup.steps=0", "--threshold_warmup.min_steps=1")
    assert command("fit", *SMALL, "--run_name=a", *warmup)[0] == 0
    assert command("fit", "--run_name=a", "--ckpt_path=last", "--trainer.max_steps=3")[0] == 0
    return workplace / "runs/a"


def content_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert content["callbacks"]["ThresholdWarmup"]["window"]
    return content


def wrong_tensors(content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Tensors of other shapes and types, in the weights, the routing state and the optimizer's state."""
    weights, [optimizer] = content["state_dict"], content["optimizer_states"]
    tensors = {
        "empty": torch.zeros(0),
        "wide": torch.zeros(3, 3, 3),
        "text": "text",
        "int": torch.ones(4, dtype=torch.int64),
        "bool": torch.ones(4, dtype=torch.bool),
        "complex": torch.zeros(4, dtype=torch.complex64),
        "sparse": torch.zeros(4).to_sparse(),
        "meta": torch.zeros(4, device="meta"),
        "float16": torch.zeros(4, dtype=torch.float16),
    }
    threshold = next(name for name in weights if name.endswith("threshold"))
    for kind, tensor in tensors.items():
        yield f"{threshold}: {kind}", {**content, "state_dict": {**weights, threshold: tensor}}
        for number in (0, 3):
            for key in optimizer["state"][number]:
                states = {**optimizer["state"], number: {**optimizer["state"][number], key: tensor}}
                wrong = {**content, "optimizer_states": [{**optimizer, "state": states}]}
                yield f"optimizer_states.{number}.{key}: {kind}", wrong
        counts = {**content["callbacks"]["LoadBalance"]["layer_01"], "load": tensor}
        callbacks = {**content["callbacks"], "LoadBalance": {"layer_01": counts}}
        yield f"LoadBalance: {kind}", {**content, "callbacks": callbacks}
    yield "an unknown tensor", {**content, "state_dict": {**weights, "decoder.more": torch.zeros(1)}}
    yield "an unknown key", {**content, "hyper_parameters": {**content["hyper_parameters"], "decoder": {"sizes": 3}}}
    yield "two optimizers", {**content, "optimizer_states": [optimizer, optimizer]}
    yield (
        "a state without its parameter",
        {
            **content,
            "optimizer_states": [{**optimizer, "state": {**optimizer["state"], 1000: optimizer["state"][0]}}],
        },
    )


def read_everything(path: Path) -> None:
    """Read a checkpoint as each command does, short of training."""
    content = read_verified(path)
    model = LanguageModel.from_checkpoint(content, str(path))
    codec = own_tokenizer(path, content)
    if codec is not None:
        check_tokenizer(codec, content, "--tokenizer")
    rule_name(content)
    training_phase(content)
    switch_step(content)
    target_model(content["hyper_parameters"], content["state_dict"])
    read_header(path)
    start = open_checkpoint(path, model, training=True)
    start.checkpoint_io.load_checkpoint(path)
    model.init_from = str(path)
    check_initial_weights(model)


@pytest.mark.filterwarnings("ignore")
@EVERY
def test_every_key_of_a_checkpoint(every: bool, run: Path) -> None:
    path = run / "checkpoints/bad.ckpt"

    def read(content: Any) -> None:
        torch.save(content, path)
        read_everything(path)

    content = content_of(run)
    keys = wrong_contents(content)
    assert surprises(keys if every else one_each(keys), read, str(path)) == []
    assert surprises(wrong_tensors(content), read, str(path)) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(4))
def test_what_is_refused_changes_nothing(part: int, run: Path, command: Command, workplace: Path) -> None:
    """A third of the keys with a wrong value each, as `fit` and `validate` meet it; the rest only takes longer."""
    content, path, found = content_of(run), run / "checkpoints/last.ckpt", []
    whole = workplace / "whole"
    shutil.copytree(run, whole)
    for wrong, changed in islice([*one_each(wrong_contents(content)), *wrong_tensors(content)], part, None, 12):
        for line in (
            ("fit", "--ckpt_path=last", "--run_name=a", "--trainer.max_steps=4"),
            ("fit", "--config=small", "--run_name=b", f"--model.init_from={path}"),
            ("validate", f"--ckpt_path={path}"),
        ):
            shutil.rmtree(run)
            shutil.copytree(whole, run)
            shutil.rmtree(workplace / "runs/b", ignore_errors=True)
            torch.save(changed, path)
            before = tree(workplace / "runs")
            try:
                with no_longer_than(60):
                    code, _, err = command(*line)
            except BaseException as error:
                found.append(f"{line[0]}: {wrong}: {type(error).__name__}: {error}"[:300])
                continue
            errors = [text for text in err.splitlines() if text.startswith("error:")]
            if code not in (0, 2) or (code == 2 and len(errors) != 1):
                found.append(f"{line[0]}: {wrong}: {code}: {err[-300:]}")
            elif code == 2 and tree(workplace / "runs") != before:
                found.append(f"{line[0]}: {wrong}: refused, but files have changed")
    assert found == []


def tree(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def exported(run: Path, command: Command, workplace: Path) -> Path:
    assert command("export", f"--ckpt_path={run}/checkpoints/last.ckpt", "--output=e")[0] == 0
    return workplace / "e"


def read_export(path: Path) -> None:
    try:
        open_run(path)
    except UserError as error:
        if "is not the checkpoint's" not in str(error):  # a message about the tokenizer, which has a file of its own
            raise


@EVERY
def test_every_key_of_an_exports_configuration(every: bool, exported: Path) -> None:
    file = exported / "config.json"

    def read(content: Any) -> None:
        file.write_text(json.dumps(content))
        read_export(exported)

    content = json.loads(file.read_text())
    own = {key: content[key] for key in ("lightning_moe", "tie_word_embeddings")}  # the others are for transformers
    wrong = ((what, {**content, **one} if isinstance(one, dict) else one) for what, one in wrong_contents(own))
    assert surprises(wrong if every else one_each(wrong), read, str(exported)) == []


def test_every_key_of_the_index_of_an_export(exported: Path) -> None:
    names = load_file(exported / "model.safetensors")
    content = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}

    def read(content: Any) -> None:
        (exported / WEIGHTS_INDEX).write_text(json.dumps(content))
        read_export(exported)

    assert surprises(wrong_contents(content), read, str(exported)) == []


@EVERY
def test_every_key_of_a_safetensors_file(every: bool, run: Path, command: Command, workplace: Path) -> None:
    path = workplace / "one.safetensors"
    assert command("convert", f"--ckpt_path={run}/checkpoints/last.ckpt", f"--output={path}")[0] == 0
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    weights = load_file(path)

    def read(content: Any) -> None:
        save_file(weights, path, content)
        read_export(path)

    def texts(content: Any) -> dict[str, str]:
        return {
            key: json.dumps(value) if key in ("step", "config", "data") else value for key, value in content.items()
        }

    content = {key: json.loads(metadata[key]) for key in FACTS}
    wrong = ((what, texts({**metadata, **one})) for what, one in wrong_contents(content) if isinstance(one, dict))
    assert surprises(wrong if every else one_each(wrong), read, str(path)) == []
    deleted = ((key, {k: v for k, v in metadata.items() if k != key}) for key in metadata if key != "tokenizer")
    assert surprises(iter([*deleted, ("tokenizer", {**metadata, "tokenizer": "[]"})]), read, str(path)) == []


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "a: [", "2026-99-99", "? [a]\n: b", "[" * 3000, "a: &a [*a]", "data: 3", "\ud800"]
)
def test_the_configuration_in_a_checkpoint(text: str, run: Path) -> None:
    content, path = content_of(run), run / "checkpoints/bad.ckpt"

    def read(content: Any) -> None:
        torch.save(content, path)
        read_everything(path)

    wrong = {**content, "run": {**content["run"], "config": text}}
    assert surprises(iter([("run.config", wrong)]), read, str(path)) == []


def test_every_key_of_the_configuration_in_a_checkpoint(run: Path) -> None:
    content, path = content_of(run), run / "checkpoints/bad.ckpt"

    def read(config: Any) -> None:
        torch.save({**content, "run": {**content["run"], "config": yaml.safe_dump(config)}}, path)
        read_everything(path)

    assert surprises(one_each(wrong_contents(yaml.safe_load(content["run"]["config"]))), read, str(path)) == []


@pytest.mark.filterwarnings("ignore")
def test_every_key_of_the_header_of_a_sharded_checkpoint(command: Command, workplace: Path) -> None:
    sharded = (
        "--config=trainer/fsdp", "--trainer.accelerator=cpu", "--trainer.devices=1",
        "--trainer.strategy.init_args.save_distributed_checkpoint=true",
    )  # fmt: skip
    assert command("fit", *SMALL, *sharded, "--run_name=a")[0] == 0
    path = workplace / "runs/a/checkpoints/last.ckpt"
    assert path.is_dir()
    content = torch.load(path / HEADER, weights_only=True)

    def read(content: Any) -> None:
        torch.save(content, path / HEADER)
        checksums = json.loads((path / CHECKSUMS).read_text()) | {HEADER: digest(path / HEADER)}
        (path / CHECKSUMS).write_text(json.dumps(checksums))
        read_everything(path)

    torch.distributed.destroy_process_group()
    read(content)
    assert surprises(one_each(wrong_contents(content)), read, str(path)) == []
