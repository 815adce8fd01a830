"""Tiny configurations of the Mixture-of-Experts families of `transformers`, with what is special about each."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from tests.helpers.hf_tokenizers import END_OF_TEXT_ID, VOCABULARY

HIDDEN, CONTEXT, EXPERTS, CHOSEN = 32, 64, 8, 2

# What nearly all configurations share. Weights of size 1/sqrt(hidden) make every layer count for the result.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "num_experts_per_tok": CHOSEN,
    "initializer_range": 0.18,
    "bos_token_id": END_OF_TEXT_ID,
    "eos_token_id": END_OF_TEXT_ID,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_LATENT_ATTENTION = {
    "kv_lora_rank": 16,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
_DEEPSEEK = {
    **_LATENT_ATTENTION,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}

# name -> (model type, what differs from _COMMON). The comment says what is special about its routing.
# "softmax" and "sigmoid" name the scores; "bias" is added to the scores for the choice only, never to the gates.
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # softmax over the chosen experts sums to 1 (softmax over all, then renormalised: the same)
    "mixtral": ("mixtral", {"num_local_experts": EXPERTS}),
    # softmax over all experts, gates not renormalised
    "olmoe": ("olmoe", {"num_experts": EXPERTS, "norm_topk_prob": False}),
    # not renormalised; a shared expert behind a sigmoid gate of its own (`shared_expert_gate`, one row: no router)
    "qwen2_moe": (
        "qwen2_moe",
        {"num_experts": EXPERTS, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20},
    ),
    # renormalised; the middle one of three layers is dense (`mlp_only_layers`)
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_experts": EXPERTS,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
            "head_dim": 8,
        },
    ),
    # softmax, gates times `routed_scaling_factor`; transformers ignores `norm_topk_prob`; first layer dense
    "deepseek_v2": ("deepseek_v2", {**_DEEPSEEK, "topk_method": "greedy"}),
    # the same, chosen inside the 2 groups (of 4) whose best expert is best; scores of other groups are set to 0
    "deepseek_v2_groups": (
        "deepseek_v2",
        {**_DEEPSEEK, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
    # sigmoid, bias; groups ranked by the sum of their two best biased scores; renormalised, then scaled
    "deepseek_v3": ("deepseek_v3", {**_DEEPSEEK, "n_group": 2, "topk_group": 1, "norm_topk_prob": True}),
    # logits have a bias of the router; top-k of logits, then softmax over the chosen; experts have biases, are stored
    # transposed with gate and up interleaved, and are clamped; attention has sinks
    "gpt_oss": (
        "gpt_oss",
        {
            "num_local_experts": EXPERTS,
            "head_dim": 8,
            "sliding_window": 16,
            "intermediate_size": 24,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": CONTEXT // 4,
            },
        },
    ),
    # top-k of logits, then softmax over the chosen; embeddings, residuals and logits have multipliers
    "granitemoe": (
        "granitemoe",
        {
            "num_local_experts": EXPERTS,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.3,
        },
    ),
    # as deepseek_v3 with ordinary attention
    "glm4_moe": (
        "glm4_moe",
        {
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "num_hidden_layers": 3,
            "routed_scaling_factor": 1.5,
            "n_group": 1,
            "topk_group": 1,
            "head_dim": 8,
        },
    ),
    # each layer is one of Mamba-2, attention, MoE (in `mixer`, the norm before it); as deepseek_v3; the experts have no
    # gate (up, squared ReLU, down)
    "nemotron_h": (
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "moe", "attention", "moe"],
            "n_routed_experts": EXPERTS,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 20,
            "routed_scaling_factor": 1.5,
            "head_dim": 8,
            "ssm_state_size": 12,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "chunk_size": 16,
        },
    ),
    # as nemotron_h; the routed experts work in a latent space narrower than the router's input
    "nemotron_h_latent": (
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "moe", "attention"],
            "n_routed_experts": EXPERTS,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 20,
            "moe_latent_size": 16,
            "head_dim": 8,
            "ssm_state_size": 12,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "chunk_size": 16,
        },
    ),
    # SparseMixer: each of the two gates is a softmax of its own, over the experts whose logits come close to the best
    # one (for the second: without the first); gates do not sum to 1; the router is a Linear, norms are LayerNorms
    "phimoe": ("phimoe", {"num_local_experts": EXPERTS, "head_dim": 8}),
    # as olmoe; norms after attention and after the MoE layer, not before
    "flex_olmo": ("flex_olmo", {"num_experts": EXPERTS}),
    # softmax, bias inside a module of its own (`moe_statics`), renormalised; every layer from the second one
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {
            "moe_num_experts": EXPERTS,
            "moe_k": CHOSEN,
            "moe_num_shared_experts": 1,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 3,
        },
    ),
    # as deepseek_v3, with sigmoid and ordinary attention with norms of queries and keys; not renormalised here
    "dots1": (
        "dots1",
        {
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.5,
            "norm_topk_prob": False,
            "num_key_value_heads": 4,
            "head_dim": 8,
        },
    ),
    # softmax, renormalised; the router is a Linear inside the gate (`gate.wg`); a shared MLP
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"num_experts": EXPERTS, "moe_topk": CHOSEN, "head_dim": 8}),
    # sigmoid, renormalised; the bias belongs to the block and is an argument of the router's forward
    "minimax_m2": ("minimax_m2", {"num_local_experts": EXPERTS, "head_dim": 8}),
    # sigmoid, bias named `expert_bias` at the block, renormalised; convolutions in some layers; `feed_forward`
    "lfm2_moe": (
        "lfm2_moe",
        {
            "num_experts": EXPERTS,
            "moe_intermediate_size": 24,
            "num_dense_layers": 1,
            "num_hidden_layers": 3,
            "layer_types": ["conv", "full_attention", "conv"],
        },
    ),
    # as granitemoe, with a shared MLP
    "granitemoeshared": ("granitemoeshared", {"num_local_experts": EXPERTS, "shared_intermediate_size": 20}),
}

# Mixture-of-Experts models whose layers are built in another way.
_OTHER: dict[str, tuple[str, dict[str, Any]]] = {
    # all experts of a layer in one matrix; the router is `ffn.router.layer`
    "dbrx": (
        "dbrx",
        {
            "d_model": HIDDEN,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": CONTEXT,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": EXPERTS, "moe_top_k": CHOSEN},
        },
    ),
    # attention is a mixture of experts, too; the router sorts tokens by expert
    "jetmoe": ("jetmoe", {"num_local_experts": EXPERTS, "kv_channels": 8}),
    # the gate (a sigmoid) multiplies the input of the experts, not their output
    "llama4_text": (
        "llama4_text",
        {"num_local_experts": EXPERTS, "head_dim": 8, "intermediate_size_mlp": 48, "attention_chunk_size": 32},
    ),
}

FAMILIES = tuple(_FAMILIES)
OTHER_FAMILIES = tuple(_OTHER)
DENSE = "qwen3"  # no Mixture of Experts at all


def make_config(family: str) -> Any:
    """Return the tiny configuration of a name in `FAMILIES`, `OTHER_FAMILIES`, or of `DENSE`."""
    tables = {**_FAMILIES, **_OTHER, DENSE: (DENSE, {"head_dim": 8})}
    model_type, options = tables[family]
    own_names = {"hidden_size", "num_hidden_layers", "num_attention_heads"} if "d_model" in options else set()
    if "layers_block_type" in options:  # its length is the number of layers
        own_names = {"num_hidden_layers"}
    common = {name: value for name, value in _COMMON.items() if name not in own_names}
    return AutoConfig.for_model(model_type, **{**common, **options})
