"""MuonAdamW against slow float64 references and torch's own optimizers."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_moe.errors import UserError
from lightning_moe.optim import MuonAdamW, muon_adamw, newton_schulz

STEPS = 6


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Run the test once for each dtype of the iteration, whatever this CPU's default is."""
    monkeypatch.setattr(newton_schulz, "cheapest_dtype", lambda device_type: request.param)
    return request.param


@pytest.fixture
def float32_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newton_schulz, "cheapest_dtype", lambda device_type: torch.float32)


def gradients(*shape: int, steps: int = STEPS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) * 1e-3 for _ in range(steps)]


def muon(*parameters: nn.Parameter, output_dim: int = -2, **settings: Any) -> MuonAdamW:
    group = {"params": list(parameters), "rule": "muon", "lr": 0.02, "output_dim": output_dim, **settings}
    return MuonAdamW([group])


def run(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, grads: list[Tensor]) -> Tensor:
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    return parameter.detach()


def muon_reference(weight: Tensor, grads: list[Tensor], lr: float, momentum: float, decay: float) -> Tensor:
    """Muon for one [out, in] matrix, by SVD in float64."""
    weight, velocity = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for grad in grads:
        velocity = momentum * velocity + grad.double()
        u, s, vh = torch.linalg.svd(grad.double() + momentum * velocity, full_matrices=False)
        s = s / s.square().sum().sqrt()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        d_out, d_in = weight.shape
        weight = weight - lr * decay * weight - lr * max(1, d_out / d_in) ** 0.5 * (u @ s.diag() @ vh)
    return weight


@pytest.mark.parametrize("shape", [(24, 6), (6, 24), (1, 5)])
@pytest.mark.parametrize(("momentum", "decay"), [(0.95, 0.0), (0.8, 0.5)])
def test_muon_follows_the_reference(shape: tuple[int, int], momentum: float, decay: float, dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(shape))
    expected = muon_reference(weight.detach(), gradients(*shape), 0.02, momentum, decay)
    found = run(muon(weight, momentum=momentum, weight_decay=decay), weight, gradients(*shape))
    # One step moves an entry by up to 0.02 · sqrt(scale); float32 rounding and bfloat16 rounding of six of them:
    tolerance = 2e-5 if dtype == torch.float32 else 3e-3
    assert (found.double() - expected).abs().max() < tolerance


def test_muon_equals_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newton_schulz, "cheapest_dtype", lambda device_type: torch.bfloat16)  # as torch.optim.Muon
    ours, theirs = (nn.Parameter(torch.ones(16, 6)) for _ in range(2))
    found = run(muon(ours, weight_decay=0.1), ours, gradients(16, 6))
    expected = run(torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1), theirs, gradients(16, 6))
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize(("d_in", "d_out"), [(6, 24), (24, 6), (8, 8)])
def test_stacked_experts_are_so_many_linear_layers(d_in: int, d_out: int, float32_iteration: None) -> None:
    """The same linear maps as [num_experts, in, out] and as separate [out, in] take the same steps."""
    stack = nn.Parameter(torch.randn(3, d_in, d_out))
    layers = [nn.Parameter(matrix.detach().T.contiguous()) for matrix in stack]
    grads = gradients(3, d_in, d_out)
    found = run(muon(stack, output_dim=-1), stack, grads)
    optimizer = muon(*layers, output_dim=-2)
    for grad in grads:
        for layer, expert_grad in zip(layers, grad, strict=True):
            layer.grad = expert_grad.T.contiguous()
        optimizer.step()
    expected = torch.stack([layer.detach().T for layer in layers])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("shape", "output_dim", "size"), [
    ((32, 2), -2, 4.0), ((32, 2), -1, 1.0), ((2, 32), -2, 1.0), ((3, 2, 32), -1, 4.0), ((3, 32, 2), -1, 1.0),
])  # fmt: skip
def test_scale_is_the_root_of_outputs_per_input(
    shape: tuple[int, ...], output_dim: int, size: float, float32_iteration: None
) -> None:
    weight = nn.Parameter(torch.zeros(shape))
    update = run(muon(weight, output_dim=output_dim, lr=1.0), weight, gradients(*shape, steps=1))
    values = torch.linalg.svdvals(update) / size
    assert values.min() > 0.67
    assert values.max() < 1.22


@pytest.mark.parametrize("largest", [2**22, 200], ids=["one batch of a shape", "batches of four and two"])
def test_matrices_of_one_group_do_not_touch_each_other(
    dtype: torch.dtype, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon_adamw, "_LARGEST_BATCH_CPU", largest)
    shapes = [(8, 6), (6, 8), (8, 6), (2, 8, 6), (8, 6), (2, 8, 6), (8, 6), (2, 8, 6), (8, 6), (3, 8, 6)]
    together = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    alone = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizers = [muon(*together), *(muon(parameter) for parameter in alone)]
    for step in range(3):
        for i, (one, other) in enumerate(zip(together, alone, strict=True)):
            one.grad = gradients(*one.shape)[step] * (i + 1) + i * 1e-3
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def adamw(*parameters: nn.Parameter, **settings: Any) -> MuonAdamW:
    return MuonAdamW([{"params": list(parameters), "rule": "adamw", "lr": 0.01, **settings}])


def test_adamw_is_torchs_bit_for_bit() -> None:
    settings: dict[str, Any] = {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    ours, theirs = (nn.Parameter(torch.ones(7, 5)) for _ in range(2))
    found = run(adamw(ours, **settings), ours, gradients(7, 5))
    expected = run(torch.optim.AdamW([theirs], lr=0.01, fused=True, **settings), theirs, gradients(7, 5))
    assert torch.equal(found, expected)


def test_adamw_defaults_follow_the_formula() -> None:
    weight = nn.Parameter(torch.ones(7))
    expected, m, v = torch.ones(7, dtype=torch.float64), 0.0, 0.0
    for t, grad in enumerate(gradients(7), start=1):
        m = 0.9 * m + 0.1 * grad.double()
        v = 0.95 * v + 0.05 * grad.double() ** 2
        expected = expected - 0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-10)
    found = run(adamw(weight), weight, gradients(7))
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)


def both_rules() -> tuple[list[nn.Parameter], MuonAdamW]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 4), (6, 4), (3, 4, 8), (5,), ()]
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    groups = [
        {"name": "matrices", "params": parameters[:2], "rule": "muon", "lr": 0.02, "output_dim": -2},
        {"name": "experts", "params": parameters[2:3], "rule": "muon", "lr": 0.02, "output_dim": -1},
        {"name": "other", "params": parameters[3:], "rule": "adamw", "lr": 0.01, "betas": (0.9, 0.95)},
    ]
    return parameters, MuonAdamW(groups)


def set_gradients(parameters: list[nn.Parameter], step: int) -> None:
    for parameter in parameters:
        parameter.grad = gradients(*parameter.shape)[step]


def test_missing_gradients_are_skipped_and_zero_gradients_change_nothing() -> None:
    parameters, optimizer = both_rules()
    before = copy.deepcopy(parameters)
    optimizer.step()  # no gradient anywhere
    assert not optimizer.state
    parameters[1].grad = torch.zeros_like(parameters[1])
    parameters[2].grad = gradients(3, 4, 8)[0]
    parameters[2].grad[1] = 0  # an expert without tokens
    parameters[3].grad = torch.zeros_like(parameters[3])
    optimizer.step()
    assert set(optimizer.state) == {parameters[1], parameters[2], parameters[3]}
    for i in (0, 1, 3, 4):
        assert torch.equal(parameters[i], before[i])
    changed = (parameters[2] != before[2]).flatten(1).any(1)
    assert changed.tolist() == [True, False, True]


def test_resume_from_a_saved_state_is_bit_equal() -> None:
    parameters, optimizer = both_rules()
    for step in range(3):
        set_gradients(parameters, step)
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.015  # as a scheduler would
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "parameters": parameters}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    resumed, resumed_optimizer = both_rules()
    for parameter, value in zip(resumed, saved["parameters"], strict=True):
        parameter.data.copy_(value)
    resumed_optimizer.load_state_dict(saved["optimizer"])
    for step in range(3, STEPS):
        for params, each in ((parameters, optimizer), (resumed, resumed_optimizer)):
            set_gradients(params, step)
            each.step()
    for one, other in zip(parameters, resumed, strict=True):
        assert torch.equal(one, other)


def test_state_of_other_groups_is_refused() -> None:
    _, optimizer = both_rules()
    weight = nn.Parameter(torch.ones(6, 4))
    with pytest.raises(UserError, match=r"do not fit.*'muon', 1\).*'adamw', 1\)"):
        adamw(weight).load_state_dict(muon(weight).state_dict())
    with pytest.raises(UserError, match="resume with the optimizer settings"):
        muon(weight).load_state_dict(optimizer.state_dict())


def test_closure_runs_with_gradients_and_its_loss_is_returned() -> None:
    weight = nn.Parameter(torch.ones(3, 3))
    optimizer = muon(weight)

    def closure() -> float:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 9.0
    assert not torch.equal(weight, torch.ones(3, 3))


@pytest.mark.parametrize("parameter_dtype", [torch.bfloat16, torch.float64])
def test_other_parameter_dtypes(parameter_dtype: torch.dtype) -> None:
    parameters, optimizer = both_rules()
    for parameter in parameters:
        parameter.data = parameter.data.to(parameter_dtype)
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(parameters)
    optimizer.step()
    for parameter, old in zip(parameters, before, strict=True):
        assert parameter.dtype == parameter_dtype
        assert torch.isfinite(parameter).all()
        assert not torch.equal(parameter, old)


@pytest.mark.parametrize(("group", "message"), [
    ({"rule": "sgd", "lr": 0.1}, r"rule is 'sgd'; must be one of \['adamw', 'muon'\]"),
    ({"lr": 0.1}, "rule is None"),
    ({"rule": "adamw"}, "lr is None; must be a number >= 0"),
    ({"rule": "muon", "lr": -1.0, "output_dim": -2}, "lr is -1.0"),
    ({"rule": "muon", "lr": 0.1}, "output_dim is None; must be -2"),
    ({"rule": "muon", "lr": 0.1, "output_dim": -2, "params": [nn.Parameter(torch.ones(3))]}, r"shape \[\(3,\)\]"),
])  # fmt: skip
def test_bad_groups_are_named(group: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MuonAdamW([{"params": [nn.Parameter(torch.ones(3, 3))], **group}])
