"""A healed model as a folder of the transformers library, with its thresholds beside the weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_moe.atomic import atomic_folder
from lightning_moe.errors import UserError
from lightning_moe.hf.healing import Healing
from lightning_moe.hf.sidecar import SIDECAR_FILE, STATE_FILE, write_sidecar
from lightning_moe.hf.trainable import fold
from lightning_moe.routing import CausalChoice, ExpertThreshold

#: files of a model's folder that are taken over as they are
TEXT_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
    "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip


def save_healed(healing: Healing, folder: Path, facts: Mapping[str, Any], replace: bool = False) -> None:
    """Write the folder, which appears under its name only when it is complete. The model cannot be trained afterwards.

    It holds the weights in the dtype that the model runs in, adapters merged, and the thresholds as `hf.sidecar` has
    them. So ``--model FOLDER`` and ``route_by_thresholds`` run it as it was healed, and ``from_pretrained`` alone runs
    it with the top-k of its configuration.

    Args:
        healing: healed model.
        folder: new folder.
        facts: what goes on record with the thresholds, as plain data.
        replace: whether the complete new folder takes the place of an existing one.

    Raises:
        UserError: the rule chooses by no thresholds, or the folder is that of the model itself.
        OSError: the folder exists, or cannot be written.
    """
    lm, rule = healing.lm, healing.lm.layers[0].rule
    assert healing.config.path is not None
    if rule.causal_choice is not CausalChoice.THRESHOLD:
        raise UserError(
            f"model.routing={type(rule).__name__}: a folder for transformers can hold thresholds, and this rule has "
            "none; the checkpoint itself runs by --ckpt_path"
        )
    source = Path(healing.config.path)
    if source.exists() and folder.exists() and source.resolve() == folder.resolve():
        raise UserError(f"--output {folder}: is the folder of the released model, which is never written; give another")
    with atomic_folder(folder, replace) as new:
        fold(lm)
        _to_expert_threshold(healing)
        lm.model.save_pretrained(new)
        _take_over(healing.config.path, new)
        write_sidecar(new, lm, str(folder.resolve()), facts)


@torch.no_grad()
def _to_expert_threshold(healing: Healing) -> None:
    """Let the layers keep their thresholds under the rule that every reader of a sidecar knows."""
    for layer in healing.lm.layers:
        found = dict(layer.state.named_buffers())
        layer.route_by(ExpertThreshold(), layer.state.num_experts_per_token)
        for name, buffer in layer.state.named_buffers():
            if name in found and found[name].shape == buffer.shape:
                buffer.copy_(found[name])


def _take_over(model: str, folder: Path) -> None:
    """Copy the tokenizer and what belongs to it."""
    source = Path(model)
    if not source.is_dir():
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(model).save_pretrained(folder)
        return
    for pattern in TEXT_FILES:
        for file in source.glob(pattern):
            if file.is_file() and file.name not in (SIDECAR_FILE, STATE_FILE):
                shutil.copyfile(file, folder / file.name)
