"""Random observations, as a checkpoint would give them, and how they are put together."""

import torch

from lightning_moe.analysis.observe import Observation

SEQUENCE, LAYERS, EXPERTS, VOCABULARY, DOMAINS = 6, 2, 4, 9, 2


def random_observation(seed: int, batch: int = 3, padding: bool = True, share: float = 0.3) -> Observation:
    generator = torch.Generator().manual_seed(seed)
    valid = torch.ones(batch, SEQUENCE, dtype=torch.bool)
    if padding:
        valid[-1, torch.randint(1, SEQUENCE, (), generator=generator) :] = False
    logits = torch.randn(batch, SEQUENCE, LAYERS, EXPERTS, generator=generator)
    loss = torch.rand(batch, SEQUENCE, generator=generator) * 20
    tokens = torch.randint(0, VOCABULARY, (batch, SEQUENCE), generator=generator)
    domains = torch.randint(0, DOMAINS, (batch,), generator=generator)
    experts = torch.rand(logits.shape, generator=generator) < share
    return Observation(
        tokens,
        valid,
        domains,
        torch.where(valid, loss, 0.0),
        logits,
        experts,
        torch.where(experts, logits.softmax(-1), 0.0),
        torch.where(valid, tokens.roll(-1, 1), -100),
        torch.where(valid, torch.randint(0, VOCABULARY, valid.shape, generator=generator), -100),
    )


def tokens_of(seen: list[Observation]) -> list[dict]:
    """Every valid token of some observations, in plain Python."""
    return [
        {
            "row": (number, row),
            "position": position,
            "token": int(o.tokens[row, position]),
            "domain": int(o.domains[row]),
            "loss": float(o.loss[row, position]),
            "logits": o.logits[row, position].tolist(),
            "experts": o.experts[row, position].tolist(),
            "gates": o.gates[row, position].tolist(),
            "next": int(o.next_tokens[row, position]),
            "predicted": None if o.predicted is None else int(o.predicted[row, position]),
        }
        for number, o in enumerate(seen)
        for row in range(o.tokens.shape[0])
        for position in range(o.tokens.shape[1])
        if o.valid[row, position]
    ]
