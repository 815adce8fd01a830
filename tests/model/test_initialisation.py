"""Initial weights: every module is ready when it is built, alone or inside a decoder, and can be set back."""

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.foreign_module import tiny_config
from torch import Tensor, nn

from lightning_moe.model import Decoder, MoELayer
from lightning_moe.model.decoder import Block
from lightning_moe.model.experts import Experts
from lightning_moe.model.layers import Attention, FeedForward
from lightning_moe.model.moe import Router
from lightning_moe.routing import ExpertThreshold

RULE = ExpertThreshold()
MODULES: dict[str, Callable[[], nn.Module]] = {
    "Router": lambda: Router(16, 4, cosine=True),
    "Experts": lambda: Experts(4, 16, 8, "swiglu"),
    "FeedForward": lambda: FeedForward(16, 8, "swiglu"),
    "Attention": lambda: Attention(tiny_config()),
    "MoELayer": lambda: MoELayer(tiny_config(), RULE, 1),
    "dense Block": lambda: Block(tiny_config(), 0, RULE),
    "MoE Block": lambda: Block(tiny_config(), 1, RULE),
    "Decoder": lambda: Decoder(tiny_config(), RULE),
}


@pytest.fixture
def _new_memory_is_nan() -> Iterator[None]:
    """What nobody sets is NaN for certain, not only on an unlucky day."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_new_memory_is_nan")
@pytest.mark.parametrize("name", MODULES)
def test_a_module_alone_is_initialised_when_it_is_built(name: str) -> None:
    torch.manual_seed(1)
    module = MODULES[name]()
    assert all(value.isfinite().all() for value in module.state_dict().values())
    built = {name: value.clone() for name, value in module.state_dict().items()}

    with torch.no_grad():
        for value in module.state_dict().values():
            value.fill_(7)
    torch.manual_seed(1)
    assert callable(module.reset_parameters)
    module.reset_parameters()
    for name, value in module.state_dict().items():
        assert not (value == 7).any()
        if not value.any() or value.std(correction=0) == 0:
            assert torch.equal(value, built[name])  # zeros, and constants
        else:  # other draws of the same distribution, because building nn.Linear draws numbers of its own
            assert 0.5 < value.std(correction=0) / built[name].std(correction=0) < 2


def test_the_layer_alone_trains() -> None:
    layer = MoELayer(tiny_config(), RULE, 1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
    x, target = torch.randn(4, 16, 16), torch.randn(4, 16, 16)
    losses = []
    for _ in range(30):
        y, _ = layer(x)
        loss = (y - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_what_a_seed_gives_a_decoder_is_drawn_in_this_order() -> None:
    """So results of a seed stay what they were, however the modules are built: each draw is written down here."""
    config, d, f = tiny_config(), 16, 8
    torch.manual_seed(3)
    model = Decoder(config, RULE)
    rest = torch.rand(3)

    torch.manual_seed(3)
    nn.Embedding(config.vocab_size, d)
    for width in (2 * f, f, f):  # a dense block of the active size; MoE blocks with their shared expert
        for _ in range(4):
            nn.Linear(d, d, bias=False)
        nn.Linear(d, width, bias=False)
        nn.Linear(width, d, bias=False)
    nn.Linear(d, config.vocab_size, bias=False)

    def normal(d_in: int, *shape: int) -> Tensor:
        std = d_in**-0.5 * min(1.0, (shape[-1] / d_in) ** 0.5)
        return torch.empty(shape).normal_(std=std)

    def linear(d_in: int, d_out: int) -> Tensor:
        std = d_in**-0.5 * min(1.0, (d_out / d_in) ** 0.5)
        return torch.empty(d_out, d_in).normal_(std=std)

    expected = {}
    for layer in range(3):
        at = f"blocks.{layer}"
        for name in ("query", "key", "value"):
            expected[f"{at}.attention.{name}.weight"] = linear(d, d)
        if layer == 0:
            expected[f"{at}.feed_forward.up.weight"] = linear(d, 2 * f)
        else:
            expected[f"{at}.moe.router.weight"] = torch.empty(4, d).normal_(std=d**-0.5)
            expected[f"{at}.moe.experts.up"] = normal(d, 4, d, f)
            expected[f"{at}.moe.shared_expert.up.weight"] = linear(d, f)
    expected["embedding.weight"] = torch.empty(config.vocab_size, d).normal_()

    for name, value in model.named_parameters():
        assert torch.equal(value, expected.get(name, torch.zeros_like(value))), name
    assert torch.equal(torch.rand(3), rest)
