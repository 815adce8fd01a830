"""The exported folder: configuration, weights, tokenizer, model code, card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_moe.errors import UserError
from lightning_moe.model import DecoderConfig
from lightning_moe.module import LanguageModel
from lightning_moe.routing import QuantileBalancing, RoutingRule, TokenChoice, rule_from_config
from lightning_moe.routing.threshold import ThresholdTracking

REMOTE_FILES = ("configuration_lightning_moe.py", "modeling_lightning_moe.py")
WEIGHTS_FILE = "model.safetensors"
HYPERPARAMETERS_KEY = "lightning_moe"  # of config.json: what the folder came from, for the way back
_PREFIX = "decoder."


def export_folder(
    folder: Path, hyper_parameters: Mapping[str, Any], state_dict: Mapping[str, Tensor], tokenizer_file: Path, card: str
) -> None:
    """Write the folder; it appears under its name only when it is complete.

    Args:
        folder: does not exist yet.
        hyper_parameters: of the checkpoint.
        state_dict: its weights and routing state; routing state is written in fp32, weights as they are.
        tokenizer_file: of the `tokenizers` library.
        card: Markdown, becomes README.md.

    Raises:
        UserError: the routing rule is not one that the exported code knows.
    """
    from safetensors.torch import save_file

    config = exported_config(hyper_parameters, state_dict)
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        weights = {name.removeprefix(_PREFIX): value.contiguous() for name, value in state_dict.items()}
        if config["tie_word_embeddings"]:
            del weights["head.weight"]
        save_file(weights, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _write_tokenizer(temporary, tokenizer_file, config["max_position_embeddings"])
        generation = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        (temporary / "generation_config.json").write_text(json.dumps(generation) + "\n", encoding="utf-8")
        for name in REMOTE_FILES:
            code = files("lightning_moe.export.remote").joinpath(name).read_text(encoding="utf-8")
            (temporary / name).write_text(code, encoding="utf-8")
        (temporary / "README.md").write_text(card, encoding="utf-8")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def import_folder(folder: Path) -> LanguageModel:
    """The module that a folder was exported from, with its weights and routing state, in ``eval()``.

    Raises:
        UserError: it is not such a folder.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS_FILE)
        hyper_parameters = config[HYPERPARAMETERS_KEY]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder}: not a folder that export wrote: {error!r}") from error
    model = LanguageModel.from_hyperparameters(hyper_parameters)
    state = {_PREFIX + name: value for name, value in weights.items()}
    if config["tie_word_embeddings"]:
        state[f"{_PREFIX}head.weight"] = state[f"{_PREFIX}embedding.weight"]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{folder}: its weights do not fit its configuration: {error}") from error
    return model.eval()


def exported_config(hyper_parameters: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """config.json.

    Raises:
        UserError: the routing rule is not one that the exported code knows.
    """
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
        "dtype": str(state_dict[f"{_PREFIX}embedding.weight"].dtype).removeprefix("torch."),
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
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        HYPERPARAMETERS_KEY: dict(hyper_parameters),
    }


def _selection(rule: RoutingRule | None) -> dict[str, str]:
    if rule is None or isinstance(rule, ThresholdTracking):
        return {"selection": "threshold", "selection_scores": "logits"}
    if isinstance(rule, TokenChoice):
        scores = "sigmoid" if isinstance(rule, QuantileBalancing) else "logits"
        return {"selection": "top_k", "selection_scores": scores}
    raise UserError(
        f"model.routing={type(rule).__name__}: the exported code knows thresholds (ET, EC) and token choice only; "
        "for another rule use --format safetensors."
    )


def _write_tokenizer(folder: Path, tokenizer_file: Path, max_length: int) -> None:
    from lightning_moe.data.tokenizer import END_OF_TEXT

    shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
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
