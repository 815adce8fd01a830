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

#: name of the key/value cache in this version of transformers, which renamed it in 5.24
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
#: further arguments of `forward`: options of the loss, and one that older versions pass and nobody needs
OTHER_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels", "cache_position")


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


class Float32Module(nn.Module):
    """A module that stays float32 under ``.to(dtype)``, ``.half()`` and ``.bfloat16()``."""

    def _apply(self, fn, recurse=True):
        def keep_float32(tensor):
            out = fn(tensor)
            return tensor.to(out.device) if tensor.dtype == torch.float32 != out.dtype else out

        return super()._apply(keep_float32, recurse)


class Router(Float32Module):
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


class State(Float32Module):
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
    """The language model; see `LightningMoeConfig`. Attention is always torch's scaled dot product."""

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

    @torch.no_grad()
    def _init_weights(self, module):
        """Set the initial weights of a model that is built without a checkpoint."""
        if isinstance(module, (nn.Linear, nn.Embedding, Router)):
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        if isinstance(module, Router) and module.scale is not None:
            nn.init.constant_(module.scale, module.weight.shape[1] ** 0.5)
        if isinstance(module, Experts):
            for weight in (module.up, module.gate, module.down):
                if weight is not None:
                    nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def get_input_embeddings(self):
        return self.embedding

    def set_input_embeddings(self, value):
        self.embedding = value

    def get_output_embeddings(self):
        return self.head

    def set_output_embeddings(self, value):
        self.head = value

    def generate(self, inputs=None, generation_config=None, **kwargs):
        """Continue prompts as `GenerationMixin.generate` does.

        Raises:
            ValueError: a prompt and its new tokens do not fit into the context.
        """
        given = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        prompt = next((tensor for tensor in given if tensor is not None), None)
        length = width = 1 if prompt is None else prompt.shape[1]
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.shape[1:] == (width,):
            length = int(mask.sum(-1).max())  # without padding
        config = self.generation_config if generation_config is None else generation_config
        new = kwargs.get("max_new_tokens", config.max_new_tokens)
        total = kwargs.get("max_length", None if generation_config is None else generation_config.max_length)
        if new is None and total is not None:
            new = max(0, total - width)
        room = self.config.max_position_embeddings
        if length > room or length + (new or 0) > room + 1:  # the last new token is not fed
            raise ValueError(
                f"a prompt of {length} tokens and {new or 0} new ones: the model's context has room for {room}, and "
                "one new token after them. Shorten the prompt, or give a smaller max_new_tokens."
            )
        return super().generate(inputs, generation_config, **kwargs)

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
        output_hidden_states=None,
        return_dict=None,
        cache=None,
        **kwargs,
    ):
        """Compute the logits of the next token at every position.

        Args:
            input_ids: ids [B, S]; or give ``inputs_embeds`` [B, S, D].
            attention_mask: [B, tokens seen + S], 0 for padding.
            position_ids: positions [1 or B, S]; `None` counts on from the cache.
            past_key_values: keys and values of the tokens before; `cache` is the same under its newer name.
            labels: ids [B, S], not shifted; then the output has a loss.
            use_cache: whether the output has the cache.
            logits_to_keep: number of last positions whose logits are wanted, 0 for all; or their indices.
            output_hidden_states: whether the output has ``hidden_states``: the input of each block, and what the head
                reads, each [B, S, D].
            return_dict: whether the output is an object; otherwise it is a tuple.

        Returns:
            ``logits`` float32 [B, S, vocabulary], and what was asked for.

        Raises:
            ValueError: the tokens do not fit into the context, or an argument is not known here.
        """
        self._check_arguments(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if output_hidden_states is None:
            output_hidden_states = getattr(self.config, "output_hidden_states", False)
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        if use_cache is None:
            use_cache = getattr(self.config, "use_cache", True)
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        x = self.norm(self.embedding(input_ids) if inputs_embeds is None else inputs_embeds)
        if position_ids is None:
            past = 0 if cache is None else int(cache.get_seq_length())
            position_ids = torch.arange(past, past + x.shape[1], device=x.device).unsqueeze(0)
        self._check_positions(position_ids)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )
        dim = self.config.head_dim
        exponents = torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) / dim
        angles = position_ids.float()[:, None, :, None] * self.config.rope_theta**-exponents  # [B, 1, S, K/2]
        rotary = angles.cos(), angles.sin()
        states = []
        for block in self.blocks:
            states.append(x)
            x = block(x, rotary, mask, cache)
        x = self.norm(x)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        logits = self.head(x[:, kept] if isinstance(logits_to_keep, int) else x[:, logits_to_keep]).float()
        if self.config.logit_softcap is not None:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        loss = None
        if labels is not None:
            kwargs.pop("cache_position", None)
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=(*states, x) if output_hidden_states else None,
            **{CACHE: cache if use_cache else None},
        )
        return output if return_dict else output.to_tuple()

    def _check_arguments(self, others):
        """Refuse what `forward` would otherwise ignore."""
        wanted = {name for name, value in others.items() if value is not None and value is not False}
        if getattr(self.config, "output_attentions", False):
            wanted.add("output_attentions")
        unknown = sorted(wanted.difference(OTHER_ARGUMENTS))
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: this model does not know it; leave it out")

    def _check_positions(self, position_ids):
        if torch.compiler.is_compiling():
            return  # reading a number would break the graph
        last, room = int(position_ids.max()) + 1, self.config.max_position_embeddings
        if last > room:
            raise ValueError(f"{last} tokens of context: the model was trained for at most {room}; shorten the text")
