"""A decoder with routed experts, for inference with `transformers`: causal routing by stored thresholds or by top-k.

    y_t = shared(x_t) + Σ_i z_{t,i} · gate(r_t)_i · expert_i(x_t)          (Eq. 2 of arXiv 2603.11535)

Routers and stored numbers stay float32 in every dtype: rounded logits tie, and rounded thresholds move.

Shape letters: B sequences, S new tokens, D hidden size, H heads, K head size, E routed experts, N = B·S.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_lightning_moe import LightningMoeConfig


def activate(up, gate):
    """Return relu(up)², or silu(gate) · up."""
    return torch.relu(up).square() if gate is None else F.silu(gate) * up


class RMSNorm(nn.Module):
    """RMSNorm without a learned scale."""

    def __init__(self, eps):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)


class FeedForward(nn.Module):
    def __init__(self, config, hidden_size):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, hidden_size, bias=False)
        self.gate = nn.Linear(config.hidden_size, hidden_size, bias=False) if config.activation == "swiglu" else None
        self.down = nn.Linear(hidden_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down(activate(self.up(x), None if self.gate is None else self.gate(x)))


class Router(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, dtype=torch.float32))
        self.scale = nn.Parameter(torch.empty(1, dtype=torch.float32)) if config.router == "cosine" else None

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if self.scale is None:
                return F.linear(x, self.weight)
            return self.scale * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


class Experts(nn.Module):
    def __init__(self, config):
        super().__init__()
        num, d, f = config.num_experts, config.hidden_size, config.expert_hidden_size
        self.up = nn.Parameter(torch.empty(num, d, f))
        self.gate = nn.Parameter(torch.empty(num, d, f)) if config.activation == "swiglu" else None
        self.down = nn.Parameter(torch.empty(num, f, d))

    def forward(self, x, mask, gates):
        """Return the gated sum of the experts' outputs: [N, D], bool [N, E], float32 [N, E] → [N, D]."""
        y = torch.zeros_like(x)
        for index in mask.any(0).nonzero().flatten().tolist():
            tokens = mask[:, index].nonzero().squeeze(-1)
            rows = x[tokens]
            hidden = activate(rows @ self.up[index], None if self.gate is None else rows @ self.gate[index])
            out = (hidden @ self.down[index]) * gates[tokens, index, None]
            y.index_add_(0, tokens, out.to(y.dtype))
        return y


class State(nn.Module):
    """The routing state of a layer as training left it, float32."""

    def __init__(self, shapes):
        super().__init__()
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))


class MoE(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.num_experts_per_token = config, config.layer_num_experts_per_token[layer]
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared_expert = FeedForward(config, config.shared_hidden_size) if config.shared_hidden_size else None
        self.state = State(config.state_shapes[layer])

    def select(self, logits):
        """Return the chosen experts, bool [B, S, E]; each token's depend on its own logits and stored numbers only."""
        if self.config.selection == "threshold":
            return logits > self.state.threshold
        scores = logits.sigmoid() if self.config.selection_scores == "sigmoid" else logits
        if hasattr(self.state, "selection_bias"):
            scores = scores + self.state.selection_bias
        top = scores.sort(dim=-1, descending=True, stable=True).indices[..., : int(self.num_experts_per_token)]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, top, True)

    def forward(self, x):
        logits = self.router(x)  # float32 [B, S, E]
        mask = self.select(logits)
        gates = logits.sigmoid() if self.config.gate == "sigmoid" else logits.softmax(dim=-1)
        if self.config.normalize_gates:
            gates = gates / (gates * mask).sum(-1, keepdim=True).clamp_min(1e-9)
        flat = x.flatten(0, 1)
        y = self.experts(flat, mask.flatten(0, 1), gates.flatten(0, 1))
        if self.shared_expert is not None:
            y = y + self.shared_expert(flat)
        return y.view_as(x)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        d, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.query = nn.Linear(d, d, bias=False)
        self.key = nn.Linear(d, kv, bias=False)
        self.value = nn.Linear(d, kv, bias=False)
        self.output = nn.Linear(d, d, bias=False)
        self.norm = RMSNorm(config.norm_eps)

    def forward(self, x, rotary, mask, cache):
        heads = lambda t: t.view(*t.shape[:-1], -1, self.config.head_dim).transpose(1, 2)  # noqa: E731
        query, key, value = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        query, key = (rotate(self.norm(t), *rotary).to(value.dtype) for t in (query, key))
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        grouped = self.config.num_key_value_heads != self.config.num_attention_heads
        causal = mask is None and query.shape[2] > 1
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        return self.output(out.transpose(1, 2).reshape(x.shape))


def rotate(x, cos, sin):
    """Rotate the halves of each head of x [B, H, S, K] by the angles of cos and sin [B, 1, S, K/2]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.norm = RMSNorm(config.norm_eps)
        self.attention = Attention(config, layer)
        size = config.layer_hidden_sizes[layer]
        self.feed_forward = None if size is None else FeedForward(config, size)
        self.moe = MoE(config, layer) if size is None else None

    def forward(self, x, rotary, mask, cache):
        x = x + self.attention(self.norm(x), rotary, mask, cache)
        return x + (self.feed_forward or self.moe)(self.norm(x))


class LightningMoeForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model; see `LightningMoeConfig`."""

    config_class = LightningMoeConfig
    base_model_prefix = "model"
    _no_split_modules = ("Block",)
    _keep_in_fp32_modules_strict = ("router", "state")
    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        """Do nothing: the folder holds all weights."""

    def get_input_embeddings(self):
        return self.embedding

    def set_input_embeddings(self, value):
        self.embedding = value

    def get_output_embeddings(self):
        return self.head

    def set_output_embeddings(self, value):
        self.head = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """Return logits float32 [B, S, vocabulary] for ids [B, S], and a loss for ``labels`` [B, S] (not shifted)."""
        x = self.norm(self.embedding(input_ids) if inputs_embeds is None else inputs_embeds)
        use_cache = self.config.use_cache if use_cache is None and hasattr(self.config, "use_cache") else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(past, past + x.shape[1], device=x.device).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        dim = self.config.head_dim
        exponents = torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) / dim
        angles = position_ids.float()[:, None, :, None] * self.config.rope_theta**-exponents  # [B, 1, S, K/2]
        rotary = angles.cos(), angles.sin()
        for block in self.blocks:
            x = block(x, rotary, mask, past_key_values)
        x = self.norm(x)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        logits = self.head(x[:, kept] if isinstance(logits_to_keep, int) else x[:, logits_to_keep]).float()
        if self.config.logit_softcap is not None:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
