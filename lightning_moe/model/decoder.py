"""The decoder: embedding, blocks of attention and (dense or MoE) feed-forward, head. Pure torch.

Shape letters: B sequences, S tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_moe.errors import UserError
from lightning_moe.internals.torch import (
    any_number_of_rows,
    compile_in_place,
    compile_with_sizes_that_depend_on_data,
    undo_compilation,
)
from lightning_moe.model.causal_lm import CausalLM, DecoderLoss, DecoderOutput, ModelSize
from lightning_moe.model.config import DecoderConfig
from lightning_moe.model.initialise import initialise, parent_initialises
from lightning_moe.model.layers import Attention, FeedForward, LayerCache, RMSNorm, rotary_tables
from lightning_moe.model.loss_head import IGNORED, chunked_next_token_loss
from lightning_moe.model.moe import MoELayer
from lightning_moe.routing.base import RoutingRule

Rotary = tuple[Tensor, Tensor]


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + feed-forward or MoE (norm(x))."""

    def __init__(self, config: DecoderConfig, layer: int, rule: RoutingRule | None) -> None:
        super().__init__()
        self.norm = RMSNorm(config.norm_eps)
        self.feed_forward: FeedForward | None = None
        self.moe: MoELayer | None = None
        rate = config.rates_per_layer[layer]
        with parent_initialises():
            self.attention = Attention(config)
            if rule is not None and layer >= config.num_dense_layers:
                self.moe = MoELayer(config, rule, rate)
            else:
                self.feed_forward = FeedForward(config.hidden_size, config.dense_size(rate), config.activation)
        initialise(self)

    def reset_parameters(self) -> None:
        """Set the initial weights, and the initial routing state."""
        self.attention.reset_parameters()
        for part in (self.moe, self.feed_forward):
            if part is not None:
                part.reset_parameters()

    def forward(self, x: Tensor, rotary: Rotary, cache: LayerCache | None = None) -> tuple[Tensor, Tensor | None]:
        x = x + self.attention(self.norm(x), rotary, cache)
        if self.moe is not None:
            y, aux_loss = self.moe(self.norm(x))
            return x + y, aux_loss
        assert self.feed_forward is not None
        return x + self.feed_forward(self.norm(x)), None


class Decoder(CausalLM):
    """A causal language model. ``rule=None`` gives the dense model of the same active FLOPs.

    Args:
        config: sizes and options.
        rule: the routing rule of every MoE layer.
    """

    def __init__(self, config: DecoderConfig, rule: RoutingRule | None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        with parent_initialises():
            self.blocks = nn.ModuleList(Block(config, layer, rule) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.compiled = False
        initialise(self)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the initial weights of the paper: down and output projections and an untied head start at zero."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.reset_parameters()
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight  # again, because leaving the meta device separates them
            # The head needs small rows; the norm after the embedding undoes the scale there.
            nn.init.normal_(self.embedding.weight, std=self.config.hidden_size**-0.5)
        else:
            nn.init.normal_(self.embedding.weight)
            nn.init.zeros_(self.head.weight)

    def compile_blocks(self, or_eager: bool = False, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile each block in place, once. The state dict stays as it is.

        Blocks of one kind share their graphs, one for each phase, rate of a layer and shape of the batch in training.
        Evaluation has one graph for all numbers of sequences, because its last batch is smaller.

        Args:
            or_eager: whether an error of the compiler gives a warning, and the blocks then run as without this call.
            backend: back end of ``torch.compile``; ``aot_eager`` has the same graphs and generates no code.
        """
        if not self.compiled:
            self.compiled = True
            # How many pairs an expert layer computes depends on the data; without this the graph would break there.
            compile_with_sizes_that_depend_on_data()
            kinds = 1 + len(set(self.config.rates_per_layer))  # dense and MoE
            for block in self.blocks:
                compile_in_place(block, 8 * kinds, self._stay_eager if or_eager else None, backend)

    def _stay_eager(self, error: Exception) -> None:
        """Undo `compile_blocks` after an error of the compiler."""
        if self.compiled:
            self.compiled = False
            for block in self.blocks:
                undo_compilation(block)
            reason = " ".join(str(error).strip().splitlines()[:2])  # which compiler, then its error
            warnings.warn(
                f"torch.compile failed, so the blocks run uncompiled, which is slower: {reason} "
                "(--model.compile=true shows the whole error, --model.compile=false does not try)",
                stacklevel=2,
            )

    def moe_layers(self) -> Iterator[MoELayer]:
        return (module for module in self.modules() if isinstance(module, MoELayer))

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def max_sequence_length(self) -> int:
        return self.config.max_sequence_length

    @property
    def size(self) -> ModelSize:
        config = self.config
        total = sum(parameter.numel() for parameter in self.parameters())
        inactive = sum(
            layer.state.num_experts * layer.parameters_per_expert * (1 - layer.state.rate)
            for layer in self.moe_layers()
        )
        active = round(total - inactive)
        look_up = 0 if config.tie_embeddings else self.embedding.weight.numel()
        attention = 6 * config.num_layers * config.hidden_size * config.max_sequence_length
        return ModelSize(total, active, 6 * (active - look_up) + attention)

    def new_cache(self, batch_size: int, length: int | None = None) -> list[LayerCache]:
        config, weight = self.config, self.embedding.weight
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        positions = config.max_sequence_length if length is None else length
        shape = (batch_size, config.key_value_heads, positions, config.head_dim)
        new = lambda: torch.empty(shape, dtype=dtype, device=weight.device)  # noqa: E731
        return [LayerCache(new(), new()) for _ in self.blocks]

    def forward(
        self,
        input_ids: Tensor,
        cache: list[LayerCache] | None = None,
        last_only: bool = False,
        labels: Tensor | None = None,
    ) -> DecoderOutput | DecoderLoss:
        """Compute logits or losses as `CausalLM.forward` says.

        With labels the logits exist in chunks only, and so do their gradients, which the forward pass computes
        (`model.loss_head`).

        Raises:
            UserError: the tokens do not fit into ``max_sequence_length``, or into the cache.
            ValueError: the labels have another shape than the input.
        """
        start = cache[0].length if cache else 0
        end = start + input_ids.shape[1]
        if end > self.config.max_sequence_length:
            raise UserError(
                f"{end} tokens of context: model.decoder.max_sequence_length is {self.config.max_sequence_length}."
            )
        if cache and end > cache[0].keys.shape[2]:
            raise UserError(f"{end} tokens of context: the cache was made for {cache[0].keys.shape[2]}.")
        positions = torch.arange(start, end, device=input_ids.device)
        rotary = rotary_tables(positions, self.config.head_dim, self.config.rope_theta)
        x = self.norm(self.embedding(input_ids))
        aux_losses = []
        for index, block in enumerate(self.blocks):
            if self.compiled and not self.training:
                x = any_number_of_rows(x)
            if self.config.activation_checkpointing and cache is None and torch.is_grad_enabled():
                x, aux_loss = checkpoint(block, x, rotary, use_reentrant=False)
            elif cache is not None and self.compiled:  # each length of the cache would be another graph
                with torch.compiler.set_stance("force_eager"):
                    x, aux_loss = block(x, rotary, cache[index])
            else:
                x, aux_loss = block(x, rotary, cache[index] if cache else None)
            if aux_loss is not None:
                aux_losses.append(aux_loss)
        x = self.norm(x[:, -1:] if last_only else x)
        aux_loss = torch.stack(aux_losses).sum() if aux_losses else None
        softcap = self.config.logit_softcap
        if labels is not None:
            # Here and not in a caller: under FSDP2 the head's weight is whole inside of this forward pass only.
            predicted = torch.full_like(labels, IGNORED) if self.predicts and not torch.is_grad_enabled() else None
            total, token_loss = chunked_next_token_loss(x, self.head.weight, labels, softcap, predicted=predicted)
            return DecoderLoss(total / labels.numel(), token_loss, aux_loss, predicted)
        logits = self.head(x).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return DecoderOutput(logits, aux_loss)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of every position in nats, fp32 [B, S]; 0 where the label is -100.

    For those who have the logits anyway. Training and evaluation give the decoder ``labels`` instead.

    Args:
        logits: fp32 [B, S, V].
        labels: int64 [B, S], already shifted: ``labels[b, s]`` follows ``input_ids[b, s]``.
    """
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
    return loss.view_as(labels)
