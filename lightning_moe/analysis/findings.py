"""The summary that the report begins with: a few sentences and a small table with the main findings.

All numbers come from the measurements that the sections show, by the same methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from lightning_moe.analysis.collect import Measurements, Subject
from lightning_moe.analysis.load import Load
from lightning_moe.analysis.section import Value
from lightning_moe.analysis.specialization import Specialization

Numbers = Mapping[str, Value]

#: key → heading of its row, and the section that shows the number
ROWS = {
    "loss": ("loss / nats per token", "compute"),
    "fanout": ("routed experts per token and layer", "fanout"),
    "target": ("the same, target", "fanout"),
    "easiest": ("the same, easiest quarter of the predictions", "fanout"),
    "hardest": ("the same, hardest quarter of the predictions", "fanout"),
    "busiest": ("load of the busiest expert / mean of its layer", "load"),
    "busiest_expert": ("which expert that is", "load"),
    "dead": ("dead experts (no token)", "load"),
    "rarely_used": ("rarely used experts (under a tenth of the mean)", "load"),
    "pair": ("domains that differ most", "specialization"),
    "distance": ("their total variation, mean over layers", "specialization"),
    "by_documents": ("the same by the choice of documents alone", "specialization"),
    "threshold_error": ("|cutoff − threshold|, mean over experts / logit units", "cutoff_vs_usage"),
    "cutoff_std": ("std of the cutoff over batches / logit units", "cutoff_vs_usage"),
}


@dataclass(frozen=True)
class Finding:
    """A row of the summary's table, or one of its sentences.

    Args:
        text: heading of the row, or the sentence.
        section: name of the section that shows where it comes from; empty for none.
        values: label of the checkpoint → value, `None` where there is none; empty for a sentence.
    """

    text: str
    section: str
    values: Numbers


@dataclass(frozen=True)
class Summary:
    """What the report begins with."""

    sentences: Sequence[Finding]
    table: Sequence[Finding]


def summary(subjects: Sequence[Subject], measurements: Mapping[str, Measurements], domains: Sequence[str]) -> Summary:
    """Summarise the checkpoints.

    Args:
        subjects: checkpoints to analyse.
        measurements: label → what the pass over the text measured.
        domains: names of the domains.
    """
    numbers = {s.label: _numbers(s, measurements[s.label], domains) for s in subjects}
    rows = [
        Finding(heading, section, {label: found.get(key) for label, found in numbers.items()})
        for key, (heading, section) in ROWS.items()
    ]
    sentences = _sentences(numbers, max(len(s.layers) * s.num_experts for s in subjects))
    return Summary(sentences, [row for row in rows if any(value is not None for value in row.values.values())])


def _numbers(subject: Subject, measured: Measurements, domains: Sequence[str]) -> Numbers:
    """Return key of `ROWS` → number of one checkpoint."""
    numbers: dict[str, Value] = {"loss": measured.losses.mean}
    if not subject.layers:
        return numbers
    load = Load.of(measured.specialization, measured.usage)
    busiest, layer, expert = load.busiest()
    numbers["fanout"], numbers["easiest"], numbers["hardest"] = measured.fanout.by_difficulty()
    numbers["threshold_error"], numbers["cutoff_std"] = measured.usage.threshold_error()
    return numbers | {
        "target": subject.target,
        "busiest": busiest,
        "busiest_expert": f"{subject.layers[layer]}, expert {expert}",
        "dead": int(load.dead().sum()),
        "rarely_used": int(load.rarely_used().sum()),
        **_most_different(measured.specialization, domains),
    }


def _most_different(result: Specialization, domains: Sequence[str]) -> Numbers:
    """Return the numbers of the two domains whose use of the experts differs most; nothing with one domain."""
    distances = {pair: float(result.distance(*pair).mean()) for pair in combinations(range(len(domains)), 2)}
    if not distances:
        return {}
    first, second = max(distances, key=lambda pair: distances[pair])
    by_documents = result.distance_by_documents(first, second)
    return {
        "pair": f"{domains[first]} – {domains[second]}",
        "distance": distances[first, second],
        "by_documents": None if by_documents is None else float(by_documents.mean()),
    }


def _sentences(numbers: Mapping[str, Numbers], num_experts: int) -> list[Finding]:
    sentences: list[Finding] = []

    def say(section: str, template: str, *spans: str) -> None:
        """Add a sentence, unless there is nothing for one of its gaps."""
        if all(spans):
            sentences.append(Finding(template.format(*spans), section, {}))

    def span(key: str, decimals: int = 2) -> str:
        return _span({label: mine[key] for label, mine in numbers.items() if key in mine}, decimals)

    say("compute", "The loss on this text is {} nats per token.", span("loss", 3))
    say(
        "",
        "No routed experts, so only the loss is shown: {}.",
        ", ".join(n for n in numbers if "fanout" not in numbers[n]),
    )
    fits = _span(_ratios(numbers, "fanout", "target"))
    say("fanout", "A token takes {} times as many routed experts as the target, on average.", fits)
    hardest = _span(_ratios(numbers, "hardest", "easiest"))
    say(
        "fanout",
        "The quarter of the tokens whose next one is hardest to predict takes {} times as many experts as the easiest.",
        hardest,
    )
    say("load", "The busiest expert takes {} times the mean load of its layer.", span("busiest"))
    say(
        "load",
        f"Dead experts (no token): {{}} of {num_experts}; rarely used ones (under a tenth of the mean load): {{}}.",
        span("dead", 0),
        span("rarely_used", 0),
    )
    say(
        "specialization",
        "Domains differ in their use of experts by a total variation of {} (0: not at all, 1: other experts "
        "altogether); by the choice of documents alone it would be {}.",
        span("distance"),
        span("by_documents") or "unknown, because a domain is one document",
    )
    say(
        "cutoff_vs_usage",
        "Thresholds are {} logit units away from the mean cutoff of a batch of this text; cutoffs fluctuate by {} from "
        "batch to batch.",
        span("threshold_error"),
        span("cutoff_std"),
    )
    return sentences


def _ratios(numbers: Mapping[str, Numbers], above: str, below: str) -> Numbers:
    """Return label → quotient of two numbers, of the checkpoints that have both."""
    found: dict[str, Value] = {}
    for label, mine in numbers.items():
        dividend, divisor = mine.get(above), mine.get(below)
        if isinstance(dividend, float) and isinstance(divisor, float) and divisor > 0:
            found[label] = dividend / divisor
    return found


def _span(values: Numbers, decimals: int = 2) -> str:
    """Return the lowest and the highest number with their checkpoints, one number if all are alike; empty for none."""
    found = {label: value for label, value in values.items() if isinstance(value, int | float)}
    if not found:
        return ""
    low, high = (choose(found, key=lambda label: found[label]) for choose in (min, max))
    first, last = (f"{found[label]:.{decimals}f}" for label in (low, high))
    return first if first == last else f"{first} ({low}) to {last} ({high})"
