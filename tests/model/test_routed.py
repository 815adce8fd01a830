"""The experts' products and sums against the obvious loop in float64; gradients of any mix of dtypes."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lightning_moe.errors import UserError
from lightning_moe.model.pairs import Pairs, pack_pairs, pairs_in_order, sort_pairs
from lightning_moe.model.routed import grouped_outer, grouped_product, routed_experts
from lightning_moe.model.token_sum import sum_per_token

N, E, D, H = 20, 5, 8, 16


def example(activation: str = "relu2") -> tuple[Tensor, ...]:
    """x, gates [N, E], mask with an empty expert and a token without experts, up, gate or `None`, down; float64."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    mask = draw(N, E) > 0.3
    mask[:, 2] = False
    mask[4] = False
    gate = draw(E, D, H) if activation == "swiglu" else None
    return draw(N, D), draw(N, E).sigmoid(), mask, draw(E, D, H), gate, draw(E, H, D)


def routed(x: Tensor, gates: Tensor, pairs: Pairs, up: Tensor, gate: Tensor | None, down: Tensor) -> Tensor:
    return routed_experts(x, gates.t().reshape(-1)[pairs.cell], pairs, up, gate, down)


@pytest.fixture
def uninitialised_is_nan() -> Iterator[None]:
    """Fill memory that torch leaves uninitialised with NaN, as padding may hold on a GPU."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def reference(x: Tensor, gates: Tensor, mask: Tensor, up: Tensor, gate: Tensor | None, down: Tensor) -> Tensor:
    rows = []
    for t in range(N):
        y = torch.zeros(D, dtype=x.dtype)
        for i in mask[t].nonzero().flatten().tolist():
            h = x[t] @ up[i]
            hidden = h.relu() ** 2 if gate is None else torch.nn.functional.silu(x[t] @ gate[i]) * h
            y = y + gates[t, i] * (hidden @ down[i])
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("room", [None, 0, 1, 37])
@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
@pytest.mark.parametrize("dtypes", [("float64", "float64"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_values_and_gradients_are_those_of_the_loop(
    activation: str, dtypes: tuple[str, str], room: int | None, uninitialised_is_nan: None
) -> None:
    """``room``: rows of padding; `None` sorts exactly."""
    x, gates, mask, up, gate, down = example(activation)
    pairs = sort_pairs(mask) if room is None else pack_pairs(mask, int(mask.sum()) + room)
    exact = [t.clone().requires_grad_() for t in (x, gates, up, down)]
    expected = reference(exact[0], exact[1], mask, exact[2], gate, exact[3])
    weights = torch.randn(N, D, dtype=torch.float64)
    expected.backward(weights)

    of_x, of_weights = (getattr(torch, name) for name in dtypes)
    gates_dtype = torch.float64 if of_x == torch.float64 else torch.float32
    to = (of_x, gates_dtype, of_weights, of_weights)
    ours = [t.to(dtype).requires_grad_() for t, dtype in zip((x, gates, up, down), to, strict=True)]
    found = routed(ours[0], ours[1], pairs, ours[2], None if gate is None else gate.to(of_weights), ours[3])
    found.backward(weights.to(of_x))
    assert found.dtype == of_x
    tolerance = 1e-12 if of_x == torch.float64 else 0.02
    for got, want in [(found, expected), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]:
        assert float((got.detach().double() - want.detach()).abs().max() / want.detach().abs().max()) < tolerance
    assert [t.grad.dtype for t in ours] == list(to)
    with torch.no_grad():  # without gradients the same code runs outside of the operation
        again = routed(ours[0], ours[1], pairs, ours[2], None if gate is None else gate.to(of_weights), ours[3])
    assert torch.equal(again, found)


def test_an_expert_without_rows_has_a_zero_gradient_and_a_token_without_experts_a_zero_sum() -> None:
    x, _, mask, up, _, _ = example()
    pairs = sort_pairs(mask)
    rows, offsets = x[pairs.token], pairs.offsets
    assert torch.equal(grouped_outer(rows, rows, offsets, torch.float32)[2], torch.zeros(D, D))
    assert torch.equal(grouped_outer(rows, rows, offsets, torch.float64)[2], torch.zeros(D, D, dtype=torch.float64))
    total = sum_per_token(rows, pairs.by_token, pairs.token_ends)
    torch.testing.assert_close(total, x * mask.sum(1, keepdim=True))
    assert torch.equal(total[4], torch.zeros(D, dtype=torch.float64))
    nothing = torch.zeros(0, dtype=torch.int64)
    assert torch.equal(sum_per_token(x[:0], nothing, torch.zeros(N, dtype=torch.int64)), torch.zeros_like(x))
    none = pairs_in_order(nothing, torch.zeros(E, dtype=torch.int32), 0)
    assert sum_per_token(x[:0], none.by_token, none.token_ends).shape == (0, D)
    assert grouped_product(x[:0], up, torch.zeros(E, dtype=torch.int32)).shape == (0, H)


@pytest.mark.parametrize("room", [0, 5, 10_000])
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_packed_pairs_are_the_sorted_ones_followed_by_padding_that_no_range_has(density: float, room: int) -> None:
    mask = torch.rand(N, E) < density
    num_pairs = int(mask.sum())
    max_pairs = max(1, min(num_pairs + room, mask.numel()))
    exact, packed = sort_pairs(mask, max_pairs), pack_pairs(mask, max_pairs)
    listed = [(i, t) for i in range(E) for t in range(N) if mask[t, i]]
    assert exact.cell.tolist() == [i * N + t for i, t in listed]
    assert exact.token.tolist() == [t for _, t in listed]
    assert exact.offsets.tolist() == mask.sum(0).cumsum(0).tolist()
    assert exact.by_token.tolist() == sorted(range(num_pairs), key=lambda pair: (listed[pair][1], listed[pair][0]))
    assert exact.token_ends.tolist() == mask.sum(1).cumsum(0).tolist()
    assert [t.dtype for t in packed] == [t.dtype for t in exact]
    for ours, theirs in zip(packed, exact, strict=True):
        assert torch.equal(ours[: theirs.shape[0]], theirs)
    assert packed.cell.shape == packed.token.shape == packed.by_token.shape == (max_pairs,)
    assert packed.cell.max() < mask.numel()
    assert packed.token.max() < N


def test_pairs_in_the_order_of_experts_are_found_by_token() -> None:
    mask = torch.rand(N, E) < 0.4
    exact = sort_pairs(mask)
    again = pairs_in_order(exact.token, exact.offsets, N)
    assert torch.equal(again.by_token, exact.by_token)
    assert torch.equal(again.token_ends, exact.token_ends)


def test_more_pairs_than_promised_are_refused() -> None:
    with pytest.raises(UserError, match=r"20 token-expert pairs were chosen, but .* promised at most 19"):
        sort_pairs(torch.ones(4, 5, dtype=torch.bool), 19)
