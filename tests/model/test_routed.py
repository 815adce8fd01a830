"""The experts' products and sums against the obvious loop in float64; gradients of any mix of dtypes."""

import pytest
import torch
from torch import Tensor

from lightning_moe.model.routed import grouped_outer, grouped_product, routed_experts, sort_pairs, sum_per_token

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


def routed(x: Tensor, gates: Tensor, mask: Tensor, up: Tensor, gate: Tensor | None, down: Tensor) -> Tensor:
    pairs, token_index, offsets = sort_pairs(mask)
    return routed_experts(x, gates.t().reshape(-1)[pairs], token_index, offsets, up, gate, down)


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


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
@pytest.mark.parametrize("dtypes", [("float64", "float64"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_values_and_gradients_are_those_of_the_loop(activation: str, dtypes: tuple[str, str]) -> None:
    x, gates, mask, up, gate, down = example(activation)
    exact = [t.clone().requires_grad_() for t in (x, gates, up, down)]
    expected = reference(exact[0], exact[1], mask, exact[2], gate, exact[3])
    weights = torch.randn(N, D, dtype=torch.float64)
    expected.backward(weights)

    of_x, of_weights = (getattr(torch, name) for name in dtypes)
    gates_dtype = torch.float64 if of_x == torch.float64 else torch.float32
    to = (of_x, gates_dtype, of_weights, of_weights)
    ours = [t.to(dtype).requires_grad_() for t, dtype in zip((x, gates, up, down), to, strict=True)]
    found = routed(ours[0], ours[1], mask, ours[2], None if gate is None else gate.to(of_weights), ours[3])
    found.backward(weights.to(of_x))
    assert found.dtype == of_x
    tolerance = 1e-12 if of_x == torch.float64 else 0.02
    for got, want in [(found, expected), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]:
        assert float((got.detach().double() - want.detach()).abs().max() / want.detach().abs().max()) < tolerance
    assert [t.grad.dtype for t in ours] == list(to)
    with torch.no_grad():  # without gradients the same code runs outside of the operation
        again = routed(ours[0], ours[1], mask, ours[2], None if gate is None else gate.to(of_weights), ours[3])
    assert torch.equal(again, found)


def test_an_expert_without_rows_has_a_zero_gradient_and_a_token_without_experts_a_zero_sum() -> None:
    x, _, mask, up, _, _ = example()
    _, token_index, offsets = sort_pairs(mask)
    rows = x[token_index]
    assert torch.equal(grouped_outer(rows, rows, offsets, torch.float32)[2], torch.zeros(D, D))
    assert torch.equal(grouped_outer(rows, rows, offsets, torch.float64)[2], torch.zeros(D, D, dtype=torch.float64))
    total = sum_per_token(rows, token_index, N)
    torch.testing.assert_close(total, x * mask.sum(1, keepdim=True))
    assert torch.equal(total[4], torch.zeros(D, dtype=torch.float64))
    nothing = torch.zeros(0, dtype=torch.int64)
    assert torch.equal(sum_per_token(x[:0], nothing, N), torch.zeros_like(x))
    assert grouped_product(x[:0], up, torch.zeros(E, dtype=torch.int32)).shape == (0, H)
