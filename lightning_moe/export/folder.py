"""The exported folder: configuration, weights, tokenizer, model code, card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_moe.atomic import atomic_folder
from lightning_moe.checkpoints.exported import (
    EXPORT_CONFIG_FILE,
    ORIGIN_KEY,
    PREFIX,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    origin,
)
from lightning_moe.data.tokenizer import END_OF_TEXT, Tokenizer
from lightning_moe.errors import UserError
from lightning_moe.model import DecoderConfig
from lightning_moe.routing import (
    ExpertChoice,
    ExpertThreshold,
    QuantileBalancing,
    RoutingRule,
    TokenChoice,
    TokenChoiceAuxLoss,
    TokenChoiceLossFree,
    rule_from_config,
)

REMOTE_FILES = ("configuration_lightning_moe.py", "modeling_lightning_moe.py")
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
#: What the exported code computes, by exact type: a derived rule may select otherwise.
THRESHOLD_RULES: tuple[type[RoutingRule], ...] = (ExpertThreshold, ExpertChoice)
TOP_K_SCORES: dict[type[RoutingRule], str] = {
    TokenChoice: "logits",
    TokenChoiceAuxLoss: "logits",
    TokenChoiceLossFree: "logits",
    QuantileBalancing: "sigmoid",
}


def export_folder(
    folder: Path, checkpoint: Mapping[str, Any], tokenizer_file: Path, card: str, replace: bool = False
) -> None:
    """Write the folder; it appears under its name only when it is complete; `read_checkpoint` reads it back.

    Args:
        folder: does not exist yet, unless ``replace``.
        checkpoint: its ``hyper_parameters``, ``state_dict`` (weights and fp32 routing state, written as they are),
            ``global_step`` and, where there is one, data.
        tokenizer_file: of the `tokenizers` library.
        card: Markdown, becomes README.md.
        replace: remove what has the folder's name, once the new one is complete.

    Raises:
        UserError: the routing rule is not one that the exported code knows.
    """
    from safetensors.torch import save_file

    state_dict = checkpoint["state_dict"]
    config = exported_config(checkpoint, Tokenizer.load(tokenizer_file).end_of_text_id)
    with atomic_folder(folder, replace) as new:
        weights = {name.removeprefix(PREFIX): value.contiguous() for name, value in state_dict.items()}
        if config["tie_word_embeddings"]:
            del weights["head.weight"]
        save_file(weights, new / WEIGHTS_FILE, metadata={"format": "pt"})
        (new / EXPORT_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _write_tokenizer(new, tokenizer_file, config["max_position_embeddings"])
        generation = {key: config[key] for key in SPECIAL_TOKENS}
        (new / "generation_config.json").write_text(json.dumps(generation) + "\n", encoding="utf-8")
        for name in REMOTE_FILES:
            code = files("lightning_moe.export.remote").joinpath(name).read_text(encoding="utf-8")
            (new / name).write_text(code, encoding="utf-8")
        (new / "README.md").write_text(card, encoding="utf-8")


def exported_config(checkpoint: Mapping[str, Any], end_of_text_id: int) -> dict[str, Any]:
    """config.json.

    Args:
        checkpoint: see `export_folder`.
        end_of_text_id: of the tokenizer; begins, ends and pads every text.

    Raises:
        UserError: the routing rule is not one that the exported code knows.
    """
    hyper_parameters: Mapping[str, Any] = checkpoint["hyper_parameters"]
    state_dict: Mapping[str, Tensor] = checkpoint["state_dict"]
    config = DecoderConfig(**hyper_parameters["decoder"])
    rule = rule_from_config(hyper_parameters["routing"])
    layers = range(config.num_layers)
    dense = [rule is None or layer < config.num_dense_layers for layer in layers]
    rates = config.rates_per_layer
    shapes: list[dict[str, list[int]]] = [{} for _ in layers]
    for name, value in state_dict.items():
        path, _, buffer = name.partition(".moe.state.")
        if buffer:
            shapes[int(path.rpartition(".")[2])][buffer] = list(value.shape)
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
        **_selection(rule),
        "router": config.router,
        "gate": config.gate,
        "normalize_gates": config.normalize_gates,
        "activation": config.activation,
        "logit_softcap": config.logit_softcap,
        "rope_theta": config.rope_theta,
        "norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_sequence_length,
        "state_shapes": shapes,
        "tie_word_embeddings": config.tie_embeddings,
        **dict.fromkeys(SPECIAL_TOKENS, end_of_text_id),
        ORIGIN_KEY: origin(checkpoint),
    }


def _selection(rule: RoutingRule | None) -> dict[str, str]:
    if rule is None or type(rule) in THRESHOLD_RULES:
        return {"selection": "threshold", "selection_scores": "logits"}
    if type(rule) in TOP_K_SCORES:
        return {"selection": "top_k", "selection_scores": TOP_K_SCORES[type(rule)]}
    known = ", ".join(kind.__name__ for kind in (*THRESHOLD_RULES, *TOP_K_SCORES))
    raise UserError(
        f"model.routing={type(rule).__name__}: the exported code knows {known} only; for another rule use "
        "--format safetensors."
    )


def _write_tokenizer(folder: Path, tokenizer_file: Path, max_length: int) -> None:
    shutil.copyfile(tokenizer_file, folder / TOKENIZER_FILE)
    options = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": max_length,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
