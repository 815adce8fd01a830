"""``convert``, and the sharded checkpoints that all commands read."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.foreign_module import global_batches, make_trainer, micro_batches, tiny_config
from helpers.gloo_pair import GlooPair
from helpers.small_run import Command
from safetensors import safe_open

from lightning_moe.callbacks import RoutingStateUpdate, ThresholdWarmup
from lightning_moe.checkpoints.read import read_checkpoint
from lightning_moe.checksums import digest
from lightning_moe.errors import UserError
from lightning_moe.module import LanguageModel
from lightning_moe.optim import ScheduleConfig
from lightning_moe.routing import ExpertThreshold
from lightning_moe.training.checkpoint_files import AtomicCheckpointIO
from lightning_moe.training.strategy import FullyShardedStrategy


def save_both_kinds(rank: int, folder: Path) -> None:
    """``folder/sharded``, and ``folder/whole`` as Lightning itself gathers it, of the same trained model."""
    torch.manual_seed(0)
    rule, schedule = ExpertThreshold(ema_decay=0.9, capacity_factor=None), ScheduleConfig(adamw_warmup_steps=1)
    module = LanguageModel(tiny_config(tie_embeddings=True), rule, schedule=schedule)
    strategy = FullyShardedStrategy(expert_parallel_size=2, save_distributed_checkpoint=True)
    trainer = make_trainer(
        [ThresholdWarmup(), RoutingStateUpdate()], strategy=strategy, devices=2, plugins=[AtomicCheckpointIO()]
    )
    trainer.fit(module, micro_batches(global_batches(2), 1, rank, 2))
    trainer.save_checkpoint(folder / "sharded")
    strategy._save_distributed_checkpoint = False
    trainer.save_checkpoint(folder / "whole")


@pytest.fixture(scope="module")
def saved(gloo_pair: GlooPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    gloo_pair.run(save_both_kinds, [(rank, folder) for rank in (0, 1)])
    return folder


def convert(source: Path, target: Path) -> tuple[str, ...]:
    """The command's line."""
    return "convert", f"--ckpt_path={source}", f"--output={target}"


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{where}[{index}]")
    else:
        assert found == expected, where


def test_one_file_is_what_lightning_would_have_gathered(command: Command, saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "one.ckpt"
    code, out, _ = command(*convert(saved / "sharded", target))
    assert code == 0
    assert "with the optimizer's state, of step 2" in out
    found = torch.load(target, weights_only=True)
    expected = torch.load(saved / "whole", weights_only=True)
    assert_same(found["optimizer_states"], expected["optimizer_states"])
    assert list(found["state_dict"]) == list(expected["state_dict"])
    assert_same({**found, "optimizer_states": None}, {**expected, "optimizer_states": None})
    assert os.listdir(target.parent) == ["one.ckpt"]


@pytest.mark.parametrize("source", ["sharded", "whole"])
def test_safetensors_has_weights_routing_state_and_configuration(
    command: Command, saved: Path, tmp_path: Path, source: str
) -> None:
    target = tmp_path / "model.safetensors"
    assert command(*convert(saved / source, target))[0] == 0
    expected = torch.load(saved / "whole", weights_only=True)
    with safe_open(target, "pt") as file:
        metadata = file.metadata()
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    assert_same(found, dict(expected["state_dict"]))
    assert all(tensor.dtype == torch.float32 for name, tensor in found.items() if ".state." in name)
    assert any(name.endswith(".state.threshold") for name in found)
    assert torch.equal(found["decoder.head.weight"], found["decoder.embedding.weight"])
    assert metadata["step"] == "2"
    assert json.loads(metadata["config"]) == json.loads(json.dumps(expected["hyper_parameters"]))


def test_a_folder_without_the_order_of_its_parameters_is_refused(command: Command, saved: Path, tmp_path: Path) -> None:
    """Versions before this one did not write it."""
    folder, target = tmp_path / "old", tmp_path / "one.ckpt"
    shutil.copytree(saved / "sharded", folder)
    header = torch.load(folder / "meta.pt", weights_only=True)
    del header["parameter_numbers"]
    torch.save(header, folder / "meta.pt")
    with_checksums(folder)
    assert command(*convert(folder, target)) == (
        2,
        "",
        f"error: {folder}: written by an older version of lightning_moe: its meta.pt has no parameter_numbers. "
        "Continue it with `fit` under FullyShardedStrategy, and use the checkpoint that this writes\n",
    )
    assert not target.exists()


def test_every_command_reads_the_folder(saved: Path) -> None:
    whole, sharded = (LanguageModel.load_from_checkpoint(saved / kind) for kind in ("whole", "sharded"))
    tokens = torch.arange(8).view(1, 8)
    assert torch.equal(whole(tokens), sharded(tokens))


def test_what_is_there_stays_unless_told(command: Command, saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "one.ckpt"
    target.write_text("mine")
    code, _, err = command(*convert(saved / "sharded", target))
    assert (code, err) == (2, f"error: --output {target}: exists; --overwrite replaces it.\n")
    assert target.read_text() == "mine"
    assert command(*convert(saved / "sharded", target), "--overwrite")[0] == 0
    assert torch.load(target, weights_only=True)["global_step"] == 2


def shard(folder: Path) -> Path:
    return max(folder.glob("*.distcp"))


def truncate(folder: Path) -> None:
    os.truncate(shard(folder), shard(folder).stat().st_size // 2)


def flip(path: Path, where: float) -> None:
    """One bit, in the file's tensors or in what describes them."""
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)


def with_checksums(folder: Path) -> None:
    """Such as somebody who wants to do harm would write."""
    files = {path.name: digest(path) for path in folder.iterdir() if path.name != "checksums.json"}
    (folder / "checksums.json").write_text(json.dumps(files))


class Code:
    """Leaves a file when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return Path.touch, (self.folder / "was_run",)


def code_in_a_shard(folder: Path) -> None:
    header = (folder / "meta.pt").read_bytes()
    shutil.rmtree(folder)
    dcp.save({"state_dict": {"weight": torch.zeros(2)}, "optimizer_0": {"lr": Code(folder)}}, checkpoint_id=folder)
    (folder / "meta.pt").write_bytes(header)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no shard": (lambda folder: shard(folder).unlink(), "it is incomplete: it has no __1_0.distcp"),
    "short shard": (truncate, "it is truncated: __1_0.distcp has [0-9]+ bytes of [0-9]+"),
    "no index": (lambda folder: (folder / ".metadata").unlink(), ".metadata: .*No such file"),
    "short index": (lambda folder: os.truncate(folder / ".metadata", 100), "not a sharded checkpoint: .metadata"),
    "code in a shard": (code_in_a_shard, "its shards are damaged: Weights only load failed"),
    "code in the index": (
        lambda folder: (folder / ".metadata").write_bytes(pickle.dumps(Code(folder))),
        r"not a sharded checkpoint: .metadata: refers to [a-z_.A-Z]+, which is no part",
    ),
    "no header": (lambda folder: (folder / "meta.pt").unlink(), "not a sharded checkpoint: meta.pt: .*No such file"),
    "short header": (lambda folder: os.truncate(folder / "meta.pt", 100), "not a sharded checkpoint: meta.pt"),
    "another program's": (
        lambda folder: torch.save({"state_dict": {}}, folder / "meta.pt"),
        "not written by lightning_moe: meta.pt has no hyper_parameters",
    ),
}


#: what only the checksums tell
FLIPPED: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard": (
        lambda folder: flip(shard(folder), 0.5),
        "damaged: __1_0.distcp does not match its checksum: offsets 0 to ",
    ),
    "a shard's last byte": (lambda folder: flip(shard(folder), 0.999999), "damaged: __1_0.distcp does not match"),
    "index": (lambda folder: flip(folder / ".metadata", 0.5), "damaged: .metadata does not match its checksum"),
    "header": (lambda folder: flip(folder / "meta.pt", 0.5), "damaged: meta.pt does not match its checksum"),
    "no checksums": (lambda folder: (folder / "checksums.json").unlink(), "incomplete: it has no checksums.json"),
    "short checksums": (
        lambda folder: os.truncate(folder / "checksums.json", 9),
        "checksums.json: is not JSON",
    ),
    "no list": (
        lambda folder: (folder / "checksums.json").write_text("[1]"),
        "checksums.json: holds [1]: must be a mapping",
    ),
    "no sizes": (
        lambda folder: (folder / "checksums.json").write_text('{"meta.pt": {}}'),
        "checksums.json: meta.pt.size: is missing",
    ),
}


#: command → its arguments, with which it would read a checkpoint
READERS = {
    "convert": ("--ckpt_path={path}", "--output={target}"),
    "export": ("--ckpt_path={path}", "--output={target}"),
    "generate": ("--ckpt_path={path}", "--prompt=a"),
    "analyze": ("--ckpt_path={path}", "--output_dir={target}"),
    "audit": ("--ckpt_path={path}",),
    "calibrate": ("--ckpt_path={path}", "--output_dir={target}"),
}


@pytest.mark.parametrize("damage", FLIPPED)
def test_one_flipped_bit_is_found(command: Command, saved: Path, tmp_path: Path, damage: str) -> None:
    folder, target = tmp_path / "damaged", tmp_path / "one.ckpt"
    shutil.copytree(saved / "sharded", folder)
    how, why = FLIPPED[damage]
    how(folder)
    for args in (convert(folder, target), ("fit", "--config", "small", f"--ckpt_path={folder}")):
        code, _, err = command(*args)
        assert code == 2
        assert "not a complete checkpoint: it is " in err
        assert str(folder) in err
        assert why in err
    assert not target.exists()


@pytest.mark.parametrize("reader", READERS)
def test_a_flipped_bit_of_one_file_is_found_by_every_command(
    command: Command, saved: Path, tmp_path: Path, reader: str
) -> None:
    path, target = tmp_path / "whole.ckpt", tmp_path / "target.safetensors"
    shutil.copy(saved / "whole", path)
    flip(path, 0.5)
    code, _, err = command(reader, *(word.format(path=path, target=target) for word in READERS[reader]))
    assert code == 2
    assert f"{path}: not a complete checkpoint: it is damaged: the checksum of its part" in err
    assert not target.exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_by_name(command: Command, saved: Path, tmp_path: Path, damage: str) -> None:
    folder, target = tmp_path / "damaged", tmp_path / "one.ckpt"
    shutil.copytree(saved / "sharded", folder)
    how, why = DAMAGES[damage]
    how(folder)
    with_checksums(folder)
    with pytest.raises(UserError, match=why):
        read_checkpoint(folder)
    code, _, err = command(*convert(folder, target))
    assert code == 2
    assert str(folder) in err
    assert not target.exists()
    assert not (folder / "was_run").exists()
    code, _, err = command("fit", "--config", "small", f"--ckpt_path={folder}")
    assert code == 2
    assert ("not written by" if damage == "another program's" else "not a complete checkpoint") in err


def test_wrong_arguments_are_refused(command: Command, saved: Path, tmp_path: Path) -> None:
    def error(source: Path, target: Path) -> str:
        code, out, err = command(*convert(source, target))
        assert (code, out) == (2, "")
        return err.splitlines()[-1]

    new, tensors = tmp_path / "new", tmp_path / "new.safetensors"
    assert error(saved / "nothing", new) == f"error: --ckpt_path {saved / 'nothing'}: no such checkpoint."
    assert error(saved / "whole", new).endswith("is one file already; --output FILE.safetensors makes another kind.")
    assert error(saved / "sharded", saved).endswith(
        f"--output {saved}: is a folder; give the name of the file to write."
    )
    assert error(saved, new).endswith("not a complete checkpoint: it is no checkpoint: it has no .metadata")
    (tmp_path / "text").write_text("no checkpoint")
    assert "not a complete checkpoint" in error(tmp_path / "text", tensors)
    torch.save({"state_dict": {}, "global_step": 1}, tmp_path / "theirs")
    assert "not a checkpoint of this program" in error(tmp_path / "theirs", tensors)
    assert not new.exists()
    assert not tensors.exists()


def test_a_checkpoint_is_not_replaced_by_what_cannot_be_read_back(
    command: Command, saved: Path, tmp_path: Path
) -> None:
    """`read_checkpoint` knows safetensors by their suffix, so no other name makes them."""
    mine = tmp_path / "last.ckpt"
    shutil.copy(saved / "whole", mine)
    assert command(*convert(mine, mine), "--overwrite")[0] == 2
    assert command("export", f"--ckpt_path={mine}", f"--output={mine}", "--overwrite")[0] == 2
    assert mine.read_bytes() == (saved / "whole").read_bytes()
