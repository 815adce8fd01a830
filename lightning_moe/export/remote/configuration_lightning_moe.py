"""Configuration of a decoder with routed experts, as `transformers` keeps it."""

from transformers import PretrainedConfig


class LightningMoeConfig(PretrainedConfig):
    """Sizes and options.

    Args:
        hidden_size: width D of the residual stream.
        num_hidden_layers: number of blocks.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key and value heads.
        num_experts: number E of routed experts of an MoE layer.
        expert_hidden_size: hidden size of one of them.
        shared_hidden_size: hidden size of the expert that all tokens pass; 0 if there is none.
        layer_hidden_sizes: for each block, hidden size of its dense network; `None` for an MoE layer.
        selection: way to choose a token's experts: ``threshold`` (logit above a stored number) or ``top_k``.
        selection_scores: scores that ``top_k`` compares, plus a stored bias: ``logits`` or ``sigmoid``.
        layer_num_experts_per_token: for each block, (mean) number of experts per token; `None` for dense blocks.
        router: kind of router, ``linear`` or ``cosine``.
        gate: function of the logits, ``sigmoid`` or ``softmax``.
        normalize_gates: whether a token's gates are divided by their sum.
        activation: activation of the experts, ``relu2`` or ``swiglu``.
        logit_softcap: bound c of the output logits, c·tanh(x/c); `None` for no bound.
        rope_theta: base of the rotary embedding.
        norm_eps: epsilon of every RMSNorm.
        max_position_embeddings: longest context in training.
        state_shapes: for each block, name → shape of the routing state's buffers.
    """

    model_type = "lightning_moe"
    keys_to_ignore_at_inference = ("past_key_values", "cache", "hidden_states")

    def __init__(
        self,
        vocab_size=4096,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=16,
        expert_hidden_size=256,
        shared_hidden_size=256,
        layer_hidden_sizes=None,
        selection="threshold",
        selection_scores="logits",
        layer_num_experts_per_token=None,
        router="linear",
        gate="sigmoid",
        normalize_gates=False,
        activation="relu2",
        logit_softcap=15.0,
        rope_theta=10000.0,
        norm_eps=1e-6,
        max_position_embeddings=256,
        state_shapes=None,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads
        self.num_experts = num_experts
        self.expert_hidden_size = expert_hidden_size
        self.shared_hidden_size = shared_hidden_size
        self.layer_hidden_sizes = layer_hidden_sizes or [None] * num_hidden_layers
        self.selection = selection
        self.selection_scores = selection_scores
        self.layer_num_experts_per_token = layer_num_experts_per_token or [1] * num_hidden_layers
        self.router = router
        self.gate = gate
        self.normalize_gates = normalize_gates
        self.activation = activation
        self.logit_softcap = logit_softcap
        self.rope_theta = rope_theta
        self.norm_eps = norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.state_shapes = state_shapes or [{}] * num_hidden_layers
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
