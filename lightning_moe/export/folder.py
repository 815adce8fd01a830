"""The exported folder: configuration, weights, tokenizer, model code, card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_moe.atomic import atomic_folder
from lightning_moe.checkpoints.exported import (
    EXPORT_CONFIG_FILE,
    ORIGIN_KEY,
    PREFIX,
    WEIGHTS_FILE,
    origin,
)
from lightning_moe.data.document_start import with_document_start
from lightning_moe.data.tokenizer import END_OF_TEXT, Tokenizer
from lightning_moe.errors import UserError
from lightning_moe.filenames import TOKENIZER_FILE
from lightning_moe.model import DecoderConfig
from lightning_moe.routing import CausalChoice, Phase, RoutingRule, RoutingState, rule_from_config

REMOTE_FILES = ("configuration_lightning_moe.py", "modeling_lightning_moe.py")
INSTEAD = "`convert --output FILE.safetensors` writes the weights alone."
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
#: choice that the exported code can compute → its configuration: how experts are chosen, and by which scores
SELECTION: dict[CausalChoice | None, tuple[str, str]] = {
    None: ("threshold", "logits"),  # a dense model, which chooses nothing
    CausalChoice.THRESHOLD: ("threshold", "logits"),
    CausalChoice.TOP_K: ("top_k", "logits"),
    CausalChoice.TOP_K_OF_SIGMOID: ("top_k", "sigmoid"),
}


def export_folder(
    folder: Path, checkpoint: Mapping[str, Any], tokenizer: Tokenizer, card: str, replace: bool = False
) -> None:
    """Write the folder, which appears under its name only when it is complete; `read_checkpoint` reads it.

    Args:
        folder: new folder.
        checkpoint: ``hyper_parameters``, ``state_dict`` (weights and fp32 routing state, written as they are),
            ``global_step`` and, if there is one, the entry of the data module.
        tokenizer: tokenizer of the checkpoint.
        card: Markdown for README.md.
        replace: whether the complete new folder takes the place of an existing one.

    Raises:
        UserError: the exported code cannot choose as the routing rule does.
    """
    from safetensors.torch import save_file

    state_dict = checkpoint["state_dict"]
    config = exported_config(checkpoint, tokenizer.end_of_text_id)
    with atomic_folder(folder, replace) as new:
        weights = {name.removeprefix(PREFIX): value.contiguous() for name, value in state_dict.items()}
        if config["tie_word_embeddings"]:
            del weights["head.weight"]
        save_file(weights, new / WEIGHTS_FILE, metadata={"format": "pt"})
        (new / EXPORT_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _write_tokenizer(new, tokenizer, config["max_position_embeddings"])
        generation = {key: config[key] for key in SPECIAL_TOKENS}
        (new / "generation_config.json").write_text(json.dumps(generation) + "\n", encoding="utf-8")
        for name in REMOTE_FILES:
            code = files("lightning_moe.export.remote").joinpath(name).read_text(encoding="utf-8")
            (new / name).write_text(code, encoding="utf-8")
        (new / "README.md").write_text(card, encoding="utf-8")


def exported_config(checkpoint: Mapping[str, Any], end_of_text_id: int) -> dict[str, Any]:
    """Return the content of config.json.

    Args:
        checkpoint: content of the checkpoint, see `export_folder`.
        end_of_text_id: id of the token that begins, ends and pads every text.

    Raises:
        UserError: the exported code cannot choose as the routing rule does.
    """
    hyper_parameters: Mapping[str, Any] = checkpoint["hyper_parameters"]
    state_dict: Mapping[str, Tensor] = checkpoint["state_dict"]
    config = DecoderConfig(**hyper_parameters["decoder"])
    rule = rule_from_config(hyper_parameters["routing"])
    layers = range(config.num_layers)
    dense = [rule is None or layer < config.num_dense_layers for layer in layers]
    rates = config.rates_per_layer
    buffers: list[dict[str, Tensor]] = [{} for _ in layers]  # the routing state of each layer
    for name, value in state_dict.items():
        path, _, buffer = name.partition(".moe.state.")
        if buffer:
            buffers[int(path.rpartition(".")[2])][buffer] = value
    selection, scores = SELECTION[None if rule is None else _checked_choice(rule, config, buffers)]
    return {
        "model_type": "lightning_moe",
        "architectures": ["LightningMoeForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_lightning_moe.LightningMoeConfig",
            "AutoModelForCausalLM": "modeling_lightning_moe.LightningMoeForCausalLM",
        },
        "dtype": str(state_dict[f"{PREFIX}embedding.weight"].dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.key_value_heads,
        "num_experts": config.num_experts,
        "expert_hidden_size": config.expert_size,
        "shared_hidden_size": config.num_shared_experts * config.expert_size,
        "layer_hidden_sizes": [config.dense_size(rates[layer]) if dense[layer] else None for layer in layers],
        "layer_num_experts_per_token": [None if dense[layer] else rates[layer] for layer in layers],
        "selection": selection,
        "selection_scores": scores,
        "router": config.router,
        "gate": config.gate,
        "normalize_gates": config.normalize_gates,
        "activation": config.activation,
        "logit_softcap": config.logit_softcap,
        "rope_theta": config.rope_theta,
        "norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_sequence_length,
        "state_shapes": [{name: list(value.shape) for name, value in of_layer.items()} for of_layer in buffers],
        "tie_word_embeddings": config.tie_embeddings,
        **dict.fromkeys(SPECIAL_TOKENS, end_of_text_id),
        ORIGIN_KEY: origin(checkpoint),
    }


@torch.no_grad()
def _checked_choice(rule: RoutingRule, config: DecoderConfig, buffers: Sequence[Mapping[str, Tensor]]) -> CausalChoice:
    """Return the rule's `RoutingRule.causal_choice` after a comparison with its ``select`` on random logits.

    Args:
        rule: routing rule.
        config: sizes of the decoder.
        buffers: routing state of each layer, empty for dense ones.

    Raises:
        UserError: the rule declares no choice, or another one than it makes.
    """
    name, choice = f"model.routing={type(rule).__name__}", rule.causal_choice
    if choice is None:
        raise UserError(
            f"{name}: it declares no causal_choice (one of {', '.join(known.name for known in CausalChoice)}), so the "
            f"exported code cannot choose as it does; {INSTEAD}"
        )
    scales = torch.logspace(-1, 1, 16)[:, None, None]  # from below to far above thresholds and biases
    logits = scales * torch.randn(16, 64, config.num_experts, generator=torch.Generator().manual_seed(0))
    for layer in range(config.num_dense_layers, config.num_layers):
        state = RoutingState(rule, config.num_experts, config.rates_per_layer[layer])
        state.load_state_dict(buffers[layer])
        if not torch.equal(rule.select(logits, state, Phase.CAUSAL).mask, choice.mask(logits, state)):
            raise UserError(
                f"{name}: its causal_choice {choice.name} is not what its select does with random logits, so the "
                f"exported code would choose other experts; {INSTEAD}"
            )
    return choice


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, max_length: int) -> None:
    content = with_document_start(tokenizer.to_text(), END_OF_TEXT, tokenizer.end_of_text_id)
    (folder / TOKENIZER_FILE).write_text(content + "\n", encoding="utf-8")
    options = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "split_special_tokens": True,  # a special token is never read from a text, as in `Tokenizer`
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
