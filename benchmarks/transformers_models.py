"""The MoE of the installed `transformers` library: its experts with our weights, and a decoder of the same sizes.

Nemotron-H computes its experts as we do (ReLU², no gate matrix, sigmoid weights), so the very same function is
compared. Its choice is token choice, with the same number of experts for each token. `transformers` is optional.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from benchmarks.alternatives import Alternative
from benchmarks.setup import Setup
from lightning_moe.model import MoELayer

#: ways to compute experts that are measured; another one, ``batched_mm``, copies an expert's weights for each token
IMPLEMENTATIONS = ("grouped_mm", "eager")


def transformers_version() -> str | None:
    """Return the installed version; `None` if there is none, or one without Nemotron-H's stacks of experts."""
    try:
        import transformers
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts  # noqa: F401
    except ImportError:
        return None
    version: str = transformers.__version__
    return version


class TransformersExperts(Alternative):
    """The layer with Nemotron-H's experts.

    Args:
        layer: layer of token choice, with ReLU² experts.
        implementation: one of `IMPLEMENTATIONS`.
        setup: sizes of the layer.
    """

    def __init__(self, layer: MoELayer, implementation: str, setup: Setup) -> None:
        super().__init__(layer)
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

        self.num_experts_per_token = int(layer.state.num_experts_per_token)
        config = _config(setup, implementation)
        with torch.device(setup.device):
            self.experts = NemotronHExperts(config).to(setup.dtype)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.experts.up_proj.copy_(layer.experts.up.mT)
            self.experts.down_proj.copy_(layer.experts.down.mT)

    def routed(self, x: Tensor, mask: Tensor, gates: Tensor) -> Tensor:
        index = mask.nonzero()[:, 1].view(x.shape[0], self.num_experts_per_token)
        y: Tensor = self.experts(x, index, gates.gather(1, index).to(x.dtype))
        return y


def transformers_decoder(setup: Setup, implementation: str) -> Any:
    """Build a Nemotron-H of attention and MoE layers with the sizes of our decoder; random weights, `eval()`."""
    from transformers import NemotronHForCausalLM

    torch.manual_seed(0)
    with torch.device(setup.device):
        model = NemotronHForCausalLM(_config(setup, implementation))
    torch.nn.Module.to(model, setup.dtype)
    torch.nn.Module.eval(model)
    return model


def _config(setup: Setup, implementation: str) -> Any:
    from transformers import NemotronHConfig

    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns of missing generation options
    ours = setup.config()
    config = NemotronHConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.hidden_size,
        layers_block_type=["attention", "mlp"] + ["attention", "moe"] * (ours.num_layers - 1),
        num_attention_heads=ours.num_attention_heads,
        num_key_value_heads=ours.key_value_heads,
        head_dim=ours.head_dim,
        intermediate_size=ours.dense_size(1),
        moe_intermediate_size=ours.expert_size,
        moe_shared_expert_intermediate_size=ours.expert_size,
        n_routed_experts=ours.num_experts,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        mlp_hidden_act="relu2",
        max_position_embeddings=ours.max_sequence_length,
        tie_word_embeddings=False,
    )
    config._experts_implementation = implementation  # what its own loader sets; there is no public way for one layer
    return config
