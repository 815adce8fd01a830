"""The exported folder's README.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_moe.model import DecoderConfig, model_size
from lightning_moe.routing import rule_from_config


def model_card(
    name: str,
    hyper_parameters: Mapping[str, Any],
    global_step: int,
    summary: Mapping[str, Any],
    facts: Mapping[str, str],
) -> str:
    """Write Markdown with the front matter that model hubs read.

    Args:
        name: name of the model.
        hyper_parameters: hyper-parameters of the checkpoint.
        global_step: optimizer steps of training.
        summary: content of the run's ``summary.json``; may be empty.
        facts: further rows of the table: corpus, commit and so on.
    """
    config = DecoderConfig(**hyper_parameters["decoder"])
    rule = rule_from_config(hyper_parameters["routing"])
    size = model_size(config, rule)
    routing = "none (dense)" if rule is None else f"{type(rule).__name__}, {config.num_experts} experts per MoE layer"
    per_token = config.num_experts_per_token
    new_tokens = max(1, min(50, config.max_sequence_length // 2))
    rows = {
        "parameters": f"{size.total_parameters:,} in all, {size.active_parameters:,} active per token",
        "layers, width": f"{config.num_layers}, {config.hidden_size}",
        "routing": routing,
        **({} if rule is None else {"experts per token (target)": f"{per_token} + {config.num_shared_experts} shared"}),
        "context": f"{config.max_sequence_length} tokens",
        "vocabulary": f"{config.vocab_size} (byte-level BPE)",
        "training": f"{global_step:,} steps",
        **facts,
        **{key: f"{value:.4f}" for key, value in summary.items() if isinstance(value, float)},
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts{"" if rule is None else ", " + type(rule).__name__}]
---

# {name}

A decoder language model trained with lightning_moe.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/of/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("def ", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens={new_tokens})
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

The tokenizer puts `<|endoftext|>` before every text, as in training; the same characters inside a text are ordinary
text. A text and its continuation have at most {config.max_sequence_length} tokens.

Routers and thresholds stay float32 in every dtype. Routing is causal: which experts a token takes depends on that token
and stored numbers only.
"""
