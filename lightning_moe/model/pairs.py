"""The chosen token-expert pairs of a layer, in the order of the experts and in that of the tokens.

How many pairs there are is known only on the device. The host would have to wait for the number, once per layer, to
make tensors of that size. Where the rule gives a bound (`Selection.max_pairs`), the tensors get the size of the bound
instead, and the rows after the last pair are *padding*:

* their ``cell`` and ``token`` are valid, so that a gather reads real numbers;
* no expert's range and no token's range has them, so products, sums and gradients of weights leave them out;
* whatever a product wrote for them is uninitialised memory: a sum over all rows must select them away, because
  0 · NaN is NaN.

Shape letters: N tokens, E experts, M chosen pairs, or the bound on their number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moe.errors import UserError


class Pairs(NamedTuple):
    """Chosen token-expert pairs, sorted by expert and then by token.

    Args:
        cell: place of each pair in the flattened transposed mask (expert · N + token), int64 [M].
        token: token of each pair, int64 [M].
        offsets: ends of the experts' pairs, int32 [E]; pairs ``offsets[i-1]:offsets[i]`` belong to expert i.
        by_token: positions of the pairs in the order of their tokens, and then of their experts, int64 [M].
        token_ends: ends of the tokens' pairs in ``by_token``, int64 [N].
    """

    cell: Tensor
    token: Tensor
    offsets: Tensor
    by_token: Tensor
    token_ends: Tensor


def sort_pairs(mask: Tensor, max_pairs: int | None = None) -> Pairs:
    """Sort the chosen pairs, in tensors of exactly their number. The host waits for that number.

    Args:
        mask: chosen experts of each token, bool [N, E].
        max_pairs: bound on the number of pairs that the rule promises; `None` for none.

    Raises:
        UserError: there are more pairs than promised.
    """
    return Pairs(*(_exactly_op if torch.compiler.is_compiling() else _exactly)(mask, max_pairs))


def pack_pairs(mask: Tensor, max_pairs: int) -> Pairs:
    """Sort the chosen pairs, in tensors with room for ``max_pairs``. The host does not wait.

    Args:
        mask: chosen experts of each token, bool [N, E]; with more than ``max_pairs`` pairs the result is meaningless.
        max_pairs: number M of rows of the results, at least 1.
    """
    return Pairs(*(_packed_op if torch.compiler.is_compiling() else _packed)(mask, max_pairs))


def pairs_in_order(token: Tensor, offsets: Tensor, num_tokens: int) -> Pairs:
    """Return pairs that are sorted by expert already, such as those that arrived from other ranks.

    Args:
        token: token of each pair, int64 [M].
        offsets: ends of the experts' pairs, int32 [E].
        num_tokens: number N of tokens.
    """
    by_token = token.argsort(stable=True)
    ends = torch.searchsorted(token.index_select(0, by_token), torch.arange(1, num_tokens + 1, device=token.device))
    return Pairs(torch.arange(token.shape[0], device=token.device), token, offsets, by_token, ends)


def _exactly(mask: Tensor, max_pairs: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    mask_EN = mask.t().contiguous()
    cell_M = mask_EN.view(-1).nonzero().squeeze(-1)
    if max_pairs is not None and cell_M.shape[0] > max_pairs:
        raise UserError(
            f"model.routing: {cell_M.shape[0]} token-expert pairs were chosen, but the rule's Selection.max_pairs "
            f"promised at most {max_pairs}."
        )
    token_M = cell_M.remainder(mask.shape[0])
    offsets_E = mask_EN.sum(1).cumsum(0).to(torch.int32)
    return cell_M, token_M, offsets_E, token_M.argsort(stable=True), mask.sum(1).cumsum(0)


def _packed(mask: Tensor, max_pairs: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Number the pairs by prefix sums over the mask, in both orders, and write each one to its number's place."""
    num_tokens, num_experts = mask.shape
    by_expert, mask_EN = _numbers(mask.t(), max_pairs)  # the pair's place in the order of the experts, from 1
    by_token, mask_NE = _numbers(mask, max_pairs)
    places = torch.arange(max_pairs + 1, device=mask.device)  # the last place takes what is no pair
    all_cells = torch.arange(mask.numel(), device=mask.device)
    cell_M = places.scatter(0, torch.where(mask_EN, by_expert - 1, max_pairs), all_cells)[:max_pairs]
    position_of_pair = (by_expert - 1).view(num_experts, num_tokens).t().reshape(-1)
    by_token_M = torch.zeros_like(places).scatter_(0, torch.where(mask_NE, by_token - 1, max_pairs), position_of_pair)
    return (
        cell_M.contiguous(),
        cell_M.remainder(num_tokens),
        by_expert.view(num_experts, num_tokens)[:, -1].to(torch.int32),
        by_token_M[:max_pairs].contiguous(),
        by_token.view(num_tokens, num_experts)[:, -1].contiguous(),
    )


def _numbers(mask: Tensor, max_pairs: int) -> tuple[Tensor, Tensor]:
    """Return how many true values there are up to each place, at most ``max_pairs``, and the mask; both flat."""
    flat = mask.reshape(-1)
    return flat.cumsum(0).clamp_(max=max_pairs), flat


_exactly_op = torch.library.custom_op("lightning_moe::sort_pairs", _exactly, mutates_args=())
_packed_op = torch.library.custom_op("lightning_moe::pack_pairs", _packed, mutates_args=())


@_exactly_op.register_fake
def _(mask: Tensor, max_pairs: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _like(mask, torch.library.get_ctx().new_dynamic_size())


@_packed_op.register_fake
def _(mask: Tensor, max_pairs: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _like(mask, max_pairs)


def _like(mask: Tensor, num_pairs: int | torch.SymInt) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_tokens, num_experts = mask.shape
    cell, token, by_token = (mask.new_empty(num_pairs, dtype=torch.int64) for _ in range(3))
    offsets = mask.new_empty(num_experts, dtype=torch.int32)
    return cell, token, offsets, by_token, mask.new_empty(num_tokens, dtype=torch.int64)
