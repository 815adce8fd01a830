"""Building a module from the content of a checkpoint, and comparing the two."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch

from lightning_moe.checkpoints.content import check_size, check_weights
from lightning_moe.errors import UserError
from lightning_moe.hf.pretrained import PretrainedConfig, differences, local_folder
from lightning_moe.model import DecoderConfig

Module = TypeVar("Module", bound=pl.LightningModule)

#: options of the decoder that may differ between a checkpoint and the run that continues it
RUNTIME_OPTIONS = {"activation_checkpointing", "max_sequence_length", "router_z_loss_coef"}


def build(new: Callable[[Mapping[str, Any]], Module], checkpoint: Mapping[str, Any], where: str) -> Module:
    """Build the module of a checkpoint, with weights and routing state, in ``eval()``.

    Args:
        new: function that builds the module of a checkpoint's ``hyper_parameters``.
        checkpoint: content, as `read_checkpoint` returns it.
        where: file of the checkpoint, for messages.

    Raises:
        UserError: its weights do not fit its configuration, or the released model that it needs cannot be used.
    """
    hyper_parameters, weights = checkpoint["hyper_parameters"], checkpoint["state_dict"]
    try:
        if hyper_parameters.get("pretrained") is None:
            check_size(hyper_parameters["decoder"], weights, where)
            with suppress(NotImplementedError, RuntimeError), torch.device("meta"):  # of rules that need real numbers
                check_weights(new(hyper_parameters).state_dict(), weights, where)
        module = new(hyper_parameters)
        if found := differences(hyper_parameters.get("pretrained"), module.hparams["pretrained"]):
            raise UserError("; ".join(found))
        check_weights(module.state_dict(), weights, where)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from None
    except (RuntimeError, TypeError, ValueError, ArithmeticError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: no model can be built from its hyper_parameters: {reason}") from error
    module.load_state_dict(weights)
    return module.eval()


def decoder_or_pretrained(hyper_parameters: Mapping[str, Any]) -> tuple[DecoderConfig, PretrainedConfig]:
    """Return the configuration of a checkpoint's decoder, or of the released model that it heals."""
    sizes, pretrained = hyper_parameters["decoder"], hyper_parameters.get("pretrained")
    if pretrained is None:
        return DecoderConfig(**sizes), PretrainedConfig()
    settings = {key: value for key, value in pretrained.items() if key not in ("digest", "thresholds")}
    settings["path"] = local_folder(settings["path"])
    settings["num_experts_per_token"] = sizes["num_experts_per_token"]
    return DecoderConfig(max_sequence_length=sizes["max_sequence_length"]), PretrainedConfig(**settings)


def check_architecture(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another architecture by naming what differs, before torch compares tensors.

    Args:
        theirs: ``hyper_parameters`` of the checkpoint.
        ours: those of the module.

    Raises:
        UserError: names each key with both values.
    """
    if "decoder" not in theirs:
        raise UserError("The checkpoint was not written by lightning_moe: it has no model.decoder configuration.")
    healed = theirs.get("pretrained"), ours.get("pretrained")
    differing = list(differences(*healed))
    if healed == (None, None):
        differing += [
            f"model.decoder.{key}: checkpoint {theirs['decoder'].get(key)!r}, this model {value!r}"
            for key, value in ours["decoder"].items()
            if key not in RUNTIME_OPTIONS and theirs["decoder"].get(key) != value
        ]
    rules = [(hparams["routing"] or {"class_path": None})["class_path"] for hparams in (theirs, ours)]
    if rules[0] != rules[1]:
        differing.append(f"model.routing: checkpoint {rules[0]!r}, this model {rules[1]!r}")
    if differing:
        raise UserError(f"The checkpoint is of another architecture: {'; '.join(differing)}")
