"""What the backward pass keeps, found by a run of the model on tensors without data.

The forward pass of the same modules that train runs under torch's fake tensors, which have shapes and types only.
Autograd shows each tensor that it would keep. The number of token-expert pairs is a symbol there. It is replaced by the
room for pairs on a GPU, which is the rule's bound, or else by the target rate (decision 46).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moe.errors import UserError
from lightning_moe.internals.torch import fake_tensors, size_with, storage_id
from lightning_moe.model import Decoder, DecoderConfig
from lightning_moe.model.loss_head import chunk_size
from lightning_moe.routing import RoutingRule
from lightning_moe.routing.base import Phase, RoutingState, Selection

#: ``trainer.precision`` → (dtype of the parameters, dtype of autocast or None)
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "32-true": (torch.float32, None),
    "32": (torch.float32, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-true": (torch.bfloat16, None),
}


@dataclass(frozen=True)
class SavedBlock:
    """Bytes kept of one block.

    Args:
        saved: all bytes, ``input`` and ``expert_copies`` included.
        input: bytes of the residual stream before it; nothing else is kept under activation checkpointing.
        expert_copies: bytes of expert weights in autocast's dtype.
        gradients: bytes of gradients that exist at once in its backward pass, estimated: those before and after the
            operation on the largest tensor that is kept, those of the residual stream before and after the block, and
            a new one of its largest parameter.
    """

    saved: int
    input: int
    expert_copies: int
    gradients: int


@dataclass(frozen=True)
class SavedActivations:
    """Bytes kept for the backward pass of one micro-batch.

    Args:
        embedding: bytes before the blocks.
        blocks: bytes of each block, from bottom to top.
        head: bytes after the blocks: the last norm, and the gradients of the head and its input, which the forward pass
            makes.
        workspace: bytes that the loss takes while it computes a chunk of tokens, see `_workspace`.
    """

    embedding: int
    blocks: list[SavedBlock]
    head: int
    workspace: int

    def peak(self, checkpointing: bool, expert_parallel_size: int = 1) -> int:
        """Return the largest sum at any time.

        Without checkpointing, that is when the loss is computed. With it, it may be in the backward pass of a block,
        which exists in full then, after the head is freed.
        """
        blocks = [
            block.saved - block.expert_copies + block.expert_copies // expert_parallel_size for block in self.blocks
        ]
        if not checkpointing:
            return self.embedding + sum(blocks) + self.head + self.workspace
        recomputed = max(
            saved - block.input + block.gradients for saved, block in zip(blocks, self.blocks, strict=True)
        )
        inputs = sum(block.input for block in self.blocks)
        return self.embedding + inputs + max(self.head + self.workspace, recomputed)


def saved_activations(
    config: DecoderConfig, rule: RoutingRule | None, micro_batch: int, precision: str
) -> SavedActivations:
    """Run one forward pass and loss without data, and count what autograd keeps.

    Args:
        config: the decoder; its ``activation_checkpointing`` is ignored.
        rule: the routing rule; `None` for the dense model.
        micro_batch: number of sequences, each of ``max_sequence_length`` tokens.
        precision: one of ``PRECISIONS``.

    Raises:
        UserError: the precision is another one.
    """
    if precision not in PRECISIONS:
        raise UserError(f"trainer.precision={precision!r}: plan knows {', '.join(PRECISIONS)}")
    autocast = PRECISIONS[precision][1]
    tokens = micro_batch * config.max_sequence_length
    room = [0, *(_room(rule, config, rate, micro_batch) for rate in config.rates_per_layer), 0]
    with fake_tensors():
        model = build(replace(config, activation_checkpointing=False), rule, precision)
        for moe in model.moe_layers():
            moe.rule = _Unknown(moe.rule)
        watch = _Watch(model, room)
        input_ids = torch.zeros(micro_batch, config.max_sequence_length, dtype=torch.int64)
        keep = torch.autograd.graph.saved_tensors_hooks(watch.keep, lambda tensor: tensor)
        with keep, nullcontext() if autocast is None else torch.autocast("cpu", autocast):
            model(input_ids, labels=input_ids)
    parts = zip(watch.saved[1:-1], watch.inputs, watch.copies[1:-1], watch.largest[1:-1], model.blocks, strict=True)
    blocks = [
        SavedBlock(saved, given, copies, 2 * largest + 2 * given + max(p.nbytes for p in block.parameters()))
        for saved, given, copies, largest, block in parts
    ]
    return SavedActivations(watch.saved[0], blocks, watch.saved[-1], _workspace(config, tokens, precision))


def _workspace(config: DecoderConfig, tokens: int, precision: str) -> int:
    """Return the bytes of the head's input and what `model.loss_head` holds of one chunk at most.

    Two fp32 tensors of the chunk's logits, or one with the logits' gradient in another dtype and a product like the
    head's weight. Autocast adds a copy of that weight, and bf16 weights what the fp32 sum of their gradient takes more.
    """
    weights, autocast = PRECISIONS[precision]
    compute = autocast or weights
    logits, head = chunk_size(tokens, config.vocab_size) * config.vocab_size, config.vocab_size * config.hidden_size
    chunk = 2 * 4 * logits
    if compute != torch.float32:
        chunk = max(chunk, (4 + compute.itemsize) * logits, compute.itemsize * (logits + head))
    copy = 0 if compute == weights else compute.itemsize * head
    wider = (4 - weights.itemsize) * head
    return weights.itemsize * tokens * config.hidden_size + copy + wider + chunk


def _room(rule: RoutingRule | None, config: DecoderConfig, rate: float, micro_batch: int) -> int:
    """Return the rows that a layer of the target ``rate`` has for pairs on a GPU."""
    tokens = micro_batch * config.max_sequence_length
    if rule is None:
        return round(tokens * rate)
    logits = torch.zeros(micro_batch, config.max_sequence_length, config.num_experts)
    bound = rule.select(logits, RoutingState(rule, config.num_experts, rate), Phase.TRAIN).max_pairs
    return round(tokens * rate) if bound is None else bound


def build(config: DecoderConfig, rule: RoutingRule | None, precision: str) -> Decoder:
    """Build a decoder with parameters in the dtype of the precision (routers: fp32), on the default device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(PRECISIONS[precision][0])
    try:
        return Decoder(config, rule)
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class _Unknown(RoutingRule):
    """A rule with the losses of another one, but an unknown choice."""

    rule: RoutingRule

    def select(self, logits: Tensor, state: RoutingState, phase: Phase) -> Selection:
        return Selection(torch.empty(logits.shape, dtype=torch.bool))

    def aux_loss(self, logits: Tensor, state: RoutingState) -> Tensor | None:
        return self.rule.aux_loss(logits, state)


class _Watch:
    """A counter of what autograd keeps, in parts: before the blocks, each block, after the blocks."""

    def __init__(self, model: Decoder, room: list[int]) -> None:
        parts = len(model.blocks) + 2
        self.saved, self.copies, self.largest, self.inputs = [0] * parts, [0] * parts, [0] * parts, list[int]()
        self._part = 0
        self._pairs = room
        self._experts = [p.shape for moe in model.moe_layers() for p in moe.experts.parameters()]
        # We hold the storages, so that no other one gets their addresses.
        self._counted = {storage_id(p.untyped_storage()): p.untyped_storage() for p in model.parameters()}
        for block in model.blocks:
            block.register_forward_pre_hook(self._enter)
        model.norm.register_forward_pre_hook(self._leave_blocks)

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage_id(storage) not in self._counted:
            self._counted[storage_id(storage)] = storage
            size = size_with(storage.nbytes(), self._pairs[self._part])
            self.saved[self._part] += size
            self.largest[self._part] = max(self.largest[self._part], size)
            if isinstance(storage.nbytes(), int) and tensor.shape in self._experts:
                self.copies[self._part] += size
        return tensor

    def _enter(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        self._part += 1
        self.inputs.append(args[0].nbytes)

    def _leave_blocks(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        if self.inputs:  # the same norm follows the embedding, too
            self._part += 1
