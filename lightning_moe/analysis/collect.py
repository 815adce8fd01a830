"""One pass over the text, with all checkpoints side by side. What is kept does not grow with the text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from lightning_moe.analysis.ablation import Ablation
from lightning_moe.analysis.coactivation import Coactivation
from lightning_moe.analysis.compute import ComputeSweep
from lightning_moe.analysis.consistency import Consistency
from lightning_moe.analysis.fanout import Fanout
from lightning_moe.analysis.fanout_loss import FanoutLoss
from lightning_moe.analysis.gates import Gates
from lightning_moe.analysis.intensity import Intensity
from lightning_moe.analysis.observe import Batch, Observation, observe
from lightning_moe.analysis.pools import PoolSweep
from lightning_moe.analysis.router_logits import RouterLogits
from lightning_moe.analysis.specialization import Specialization
from lightning_moe.analysis.training_routing import TrainingRouting
from lightning_moe.analysis.usage import CutoffUsage
from lightning_moe.analysis.vocabulary import Vocabulary
from lightning_moe.errors import UserError
from lightning_moe.model import CausalLM
from lightning_moe.model.moe_layers import named_moe_layers
from lightning_moe.routing import CausalChoice, Phase, RoutingRule


class Losses:
    """The loss on the text, overall and per domain.

    Args:
        token_bytes: int64 [vocabulary], bytes of text per token.
        num_domains: number D of domains.
    """

    def __init__(self, token_bytes: Tensor, num_domains: int) -> None:
        self.token_bytes = token_bytes
        self.nll = torch.zeros(num_domains, dtype=torch.float64)
        self.tokens = torch.zeros(num_domains, dtype=torch.int64)
        self.bytes = torch.zeros(num_domains, dtype=torch.int64)

    def update(self, batch: Batch, loss: Tensor) -> None:
        """Add losses fp32 [B, S] of a batch."""
        valid = batch.labels != -100
        sizes = torch.where(valid, self.token_bytes[batch.labels.clamp_min(0)], 0)
        self.nll.index_add_(0, batch.domains, loss.double().sum(-1))
        self.tokens.index_add_(0, batch.domains, valid.sum(-1))
        self.bytes.index_add_(0, batch.domains, sizes.sum(-1))

    @property
    def mean(self) -> float:
        """Nats per token over all domains."""
        return float(self.nll.sum() / self.tokens.sum())

    def bits_per_byte(self, domain: int | None = None) -> float:
        """Return the bits per byte over all domains, or of one."""
        chosen = slice(None) if domain is None else slice(domain, domain + 1)
        return float(self.nll[chosen].sum()) / math.log(2) / max(1, int(self.bytes[chosen].sum()))


@dataclass
class Subject:
    """A checkpoint under analysis.

    Args:
        label: name in the figures.
        decoder: decoder with its weights and routing state.
        training_phase: phase in which its training routed when it was written; see `training_record.training_phase`.
        layers: names of its MoE layers; empty for a dense model.
        rates: target share ρ of the tokens per expert, for each layer.
        threshold: fp32 [L, E] of rules that choose by thresholds at inference, else `None`.
    """

    label: str
    decoder: CausalLM
    training_phase: Phase = Phase.TRAIN
    layers: list[str] = field(init=False)
    rates: list[float] = field(init=False)
    threshold: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        layers = named_moe_layers(self.decoder)
        self.layers = list(layers)
        self.rates = [layer.state.rate for layer in layers.values()]
        self.threshold = None
        if self.rule is not None and self.rule.causal_choice is CausalChoice.THRESHOLD:
            self.threshold = torch.stack([layer.state["threshold"].detach().cpu() for layer in layers.values()])

    @property
    def rule(self) -> RoutingRule | None:
        """Rule of its MoE layers; `None` for a dense model."""
        return next((layer.rule for layer in self.decoder.moe_layers()), None)

    @property
    def num_experts(self) -> int:
        return self.decoder.num_experts

    @property
    def target(self) -> float:
        """Routed experts per token, mean over layers."""
        return sum(self.rates) * self.num_experts / max(1, len(self.rates))


class Measurements:
    """What is measured of one checkpoint in the pass."""

    def __init__(
        self,
        subject: Subject,
        num_domains: int,
        sequence_length: int,
        token_bytes: Tensor,
        end_of_text_id: int,
        inference_num_experts_per_token: Sequence[float] | None,
        pools: Sequence[int],
        batch_size: int,
        ablation_tokens: int,
    ) -> None:
        self.compute = ComputeSweep(subject.decoder, inference_num_experts_per_token)
        self.pools = None if subject.threshold is None else PoolSweep(subject.decoder, pools, batch_size)
        self.losses = Losses(token_bytes, num_domains)
        self.training_routing = TrainingRouting(subject.decoder, subject.training_phase, batch_size)
        self.fanout = Fanout(len(subject.layers), sequence_length)
        self.specialization = Specialization(num_domains, len(subject.layers), subject.num_experts, end_of_text_id)
        self.usage = CutoffUsage(subject.threshold, subject.rates)
        self.router_logits = RouterLogits(subject.threshold)
        self.intensity = Intensity(len(token_bytes))
        sizes = len(subject.layers), subject.num_experts
        self.coactivation = Coactivation(*sizes)
        self.fanout_loss = FanoutLoss(*sizes)
        self.gates = Gates(*sizes)
        self.vocabulary = Vocabulary(*sizes, subject.decoder.vocab_size)
        self.ablation = Ablation(subject.decoder, ablation_tokens)

    def update(self, batch: Batch, seen: Observation) -> None:
        """Add a batch of a model with experts, and what it did with it."""
        for part in (
            self.fanout,
            self.specialization,
            self.usage,
            self.router_logits,
            self.intensity,
            self.coactivation,
            self.fanout_loss,
            self.gates,
            self.vocabulary,
        ):
            part.update(seen)
        self.ablation.update(batch, seen)


@dataclass(frozen=True)
class Collected:
    """The result of the pass.

    Args:
        measurements: measurements by label.
        pairs: consistency of two checkpoints with experts, by their labels.
        num_tokens: number of tokens scored, per domain.
    """

    measurements: dict[str, Measurements]
    pairs: dict[tuple[str, str], Consistency]
    num_tokens: list[int]


def collect(
    subjects: Sequence[Subject],
    batches: Iterator[Batch],
    num_domains: int,
    sequence_length: int,
    token_bytes: Tensor,
    end_of_text_id: int,
    inference_num_experts_per_token: Sequence[float] | None = (),
    pools: Sequence[int] = (),
    batch_size: int = 1,
    ablation_tokens: int = 0,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Collected:
    """Run all checkpoints over all batches.

    Args:
        subjects: checkpoints; those with experts must have the same layers and numbers of experts.
        batches: text, batch by batch.
        num_domains: number D of domains.
        sequence_length: tokens S of a window.
        token_bytes: int64 [vocabulary], bytes of text per token.
        end_of_text_id: id of the token that begins each document.
        inference_num_experts_per_token: values of the compute dial, see `ComputeSweep`.
        pools: sizes of the routing pools, see `PoolSweep`.
        batch_size: number of windows in a full batch.
        ablation_tokens: number of tokens on which each expert is taken away once, see `Ablation`.
        progress: function that is called with the number of tokens of each batch.

    Raises:
        UserError: there is no text.
    """
    asked = inference_num_experts_per_token
    measured = {
        s.label: Measurements(
            s, num_domains, sequence_length, token_bytes, end_of_text_id, asked, pools, batch_size, ablation_tokens
        )
        for s in subjects
    }
    routed = [subject for subject in subjects if subject.layers]
    pairs = {(a.label, b.label): Consistency(len(a.layers), a.num_experts) for a, b in combinations(routed, 2)}
    for batch in batches:
        experts: dict[str, Tensor] = {}
        for subject in subjects:
            seen = observe(subject.decoder, batch, with_predictions=True)
            mine = measured[subject.label]
            mine.losses.update(batch, seen.loss)
            mine.compute.update(batch, seen)
            mine.training_routing.update(batch, seen)
            if subject.layers:
                mine.update(batch, seen)
                experts[subject.label] = seen.experts
            if mine.pools is not None:
                mine.pools.update(batch, seen)
        for (a, b), consistency in pairs.items():
            consistency.update(experts[a], experts[b], batch.labels != -100)
        progress(int((batch.labels != -100).sum()))
    tokens = next(iter(measured.values())).losses.tokens.tolist()
    if not sum(tokens):
        raise UserError("there is no text to analyse: every domain is empty.")
    return Collected(measured, pairs, tokens)
