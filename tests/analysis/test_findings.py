"""The summary of the report against a slow count of the recorded routing, and where there is little to summarise."""

import math
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_checkpoints_side_by_side import SIZES, make

from lightning_moe.analysis.collect import Subject, collect
from lightning_moe.analysis.findings import ROWS, Summary, summary
from lightning_moe.analysis.observe import Batch
from lightning_moe.analysis.report import write_report
from lightning_moe.analysis.run import Origin, sections
from lightning_moe.data import Tokenizer
from lightning_moe.model import Decoder, next_token_loss
from lightning_moe.routing import ExpertThreshold, RoutingRule, TokenChoice, target_count

BATCHES, ROWS_OF_A_BATCH, LENGTH = 5, 4, 8


def text(domains: int = 3) -> list[Batch]:
    """Batches whose rows are windows of the domains in turn, with documents of some five tokens; the end is padded."""
    found = []
    for number in range(BATCHES):
        tokens = torch.randint(0, 6, (ROWS_OF_A_BATCH, LENGTH + 1))  # 0 begins a document
        labels = tokens[:, 1:].clone()
        if number == BATCHES - 1:
            labels[-1, 5:] = -100
        found.append(Batch(tokens[:, :-1], labels, torch.arange(ROWS_OF_A_BATCH) % domains))
    return found


def with_thresholds(decoder: Decoder, seed: int) -> Decoder:
    """Thresholds as unlike as those of a trained model may be; the first expert's lets nothing through."""
    generator = torch.Generator().manual_seed(seed)
    for layer in decoder.moe_layers():
        threshold = layer.state["threshold"]
        threshold.copy_(torch.randn(threshold.shape, generator=generator) * 0.3)
        threshold[0] = 1e3
    return decoder


def summarised(subjects: list[Subject], batches: list[Batch], domains: list[str]) -> Summary:
    sizes = torch.ones(SIZES["vocab_size"], dtype=torch.int64)
    collected = collect(subjects, iter(batches), len(domains), LENGTH, sizes, 0)
    return summary(subjects, collected.measurements, domains)


def by_key(found: Summary, label: str) -> dict[str, Any]:
    keys = {heading: key for key, (heading, _) in ROWS.items()}
    return {keys[row.text]: row.values[label] for row in found.table}


def recorded(decoder: Decoder, batches: list[Batch]) -> list[dict[str, Any]]:
    """Every token: its batch, domain, loss, and of each layer the logits and the experts that it took."""
    tokens = []
    for number, batch in enumerate(batches):
        with torch.no_grad():
            loss = next_token_loss(decoder(batch.input_ids).logits, batch.labels)
        records = [layer.record for layer in decoder.moe_layers()]
        for row in range(ROWS_OF_A_BATCH):
            for position in range(LENGTH):
                if batch.labels[row, position] != -100:
                    tokens.append(
                        {
                            "batch": number,
                            "domain": int(batch.domains[row]),
                            "starts": int(batch.input_ids[row, position]) == 0,
                            "loss": float(loss[row, position]),
                            "logits": [record.logits[row, position].tolist() for record in records],
                            "experts": [record.selection.mask[row, position].tolist() for record in records],
                        }
                    )
    return tokens


def counts(tokens: list[dict[str, Any]]) -> np.ndarray:
    """Tokens of each layer and expert."""
    return np.sum([token["experts"] for token in tokens], axis=0)


def variation(first: np.ndarray, second: np.ndarray) -> float:
    """Total variation of the use of the experts, mean over layers."""
    layers = zip(first, second, strict=True)
    return float(
        np.mean([sum(abs(p / a.sum() - q / b.sum()) for p, q in zip(a, b, strict=True)) / 2 for a, b in layers])
    )


def halves(tokens: list[dict[str, Any]]) -> list[np.ndarray]:
    """The counts of two halves of a domain: whole documents, each in the half that has fewer tokens so far."""
    parts: list[list[dict[str, Any]]] = [[], []]
    half = 0
    for token in tokens:
        if token["starts"]:
            half = 0 if len(parts[0]) <= len(parts[1]) else 1
        parts[half].append(token)
    return [counts(part) for part in parts]


def quarter(tokens: list[dict[str, Any]], hardest: bool) -> list[dict[str, Any]]:
    """Whole bins of half a nat, from one end, as long as they hold at most a quarter; the first in any case."""
    chosen: list[dict[str, Any]] = []
    bins = sorted({int(token["loss"] / 0.5) for token in tokens}, reverse=hardest)
    for bin_ in bins:
        more = [token for token in tokens if int(token["loss"] / 0.5) == bin_]
        if chosen and len(chosen) + len(more) > len(tokens) / 4:
            break
        chosen += more
    return chosen


def expected(decoder: Decoder, batches: list[Batch]) -> dict[str, Any]:
    tokens = recorded(decoder, batches)
    loads = counts(tokens)
    relative = loads / loads.mean(axis=1, keepdims=True)
    layer, expert = np.unravel_index(relative.argmax(), relative.shape)
    of_domain = [[token for token in tokens if token["domain"] == domain] for domain in range(3)]
    distances = {(a, b): variation(counts(of_domain[a]), counts(of_domain[b])) for a, b in combinations(range(3), 2)}
    first, second = max(distances, key=lambda pair: distances[pair])
    noise = []
    for number in range(len(loads)):
        h = [variation(*(half[number : number + 1] for half in halves(of_domain[d]))) for d in (first, second)]
        noise.append(math.sqrt(h[0] ** 2 + h[1] ** 2) / 2)
    found = {
        "loss": np.mean([token["loss"] for token in tokens]),
        "fanout": loads.sum() / len(tokens) / len(loads),
        "target": 1.0,
        "easiest": counts(quarter(tokens, False)).sum() / len(quarter(tokens, False)) / len(loads),
        "hardest": counts(quarter(tokens, True)).sum() / len(quarter(tokens, True)) / len(loads),
        "busiest": relative.max(),
        "busiest_expert": f"layer_{layer + 1:02d}, expert {expert}",
        "dead": sum(load == 0 for load in loads.flatten()),
        "rarely_used": sum(value < 0.1 for value in relative.flatten()),
        "pair": f"{'xyz'[first]} – {'xyz'[second]}",
        "distance": distances[first, second],
        "by_documents": np.mean(noise),
    }
    layers = list(decoder.moe_layers())
    if "threshold" in layers[0].state:
        cutoffs = np.zeros((BATCHES, *loads.shape))
        for batch in range(BATCHES):
            logits = np.array([token["logits"] for token in tokens if token["batch"] == batch])
            k = target_count(len(logits), 1 / 4)
            cutoffs[batch] = np.sort(logits, axis=0)[-k]
        thresholds = np.array([state.state["threshold"].tolist() for state in layers])
        found["threshold_error"] = np.mean(abs(cutoffs.mean(axis=0) - thresholds))
        found["cutoff_std"] = np.mean(cutoffs.std(axis=0))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_the_numbers_are_those_of_a_slow_count(seed: int) -> None:
    torch.manual_seed(seed)
    batches = text()
    et, tc = with_thresholds(make(ExpertThreshold()), seed), make(TokenChoice())
    found = summarised([Subject("et", et), Subject("tc", tc), Subject("dense", make(None))], batches, list("xyz"))
    for label, decoder in (("et", et), ("tc", tc)):
        numbers = {key: value for key, value in by_key(found, label).items() if value is not None}
        slow = expected(decoder, batches)
        assert numbers.keys() == slow.keys()
        for key, value in slow.items():
            assert numbers[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-6)), key
    assert by_key(found, "et")["dead"] >= 2  # those that let nothing through
    assert [key for key, value in by_key(found, "dense").items() if value is not None] == ["loss"]


def test_sentences_give_the_range_over_checkpoints() -> None:
    batches = text()
    subjects = [Subject(f"et {seed}", with_thresholds(make(ExpertThreshold()), seed)) for seed in range(3)]
    subjects.append(Subject("dense", make(None)))
    found = summarised(subjects, batches, list("xyz"))
    busiest = {label: by_key(found, label)["busiest"] for label in ("et 0", "et 1", "et 2")}
    (low, least), (high, most) = (choose((value, label) for label, value in busiest.items()) for choose in (min, max))
    said = [sentence.text for sentence in found.sentences]
    assert (
        f"The busiest expert takes {low:.2f} ({least}) to {high:.2f} ({most}) times the mean load of its layer." in said
    )
    assert "No routed experts, so only the loss is shown: dense." in said
    [alone] = [s.text for s in summarised(subjects[:1], batches, list("xyz")).sentences if "busiest" in s.text]
    assert alone == f"The busiest expert takes {busiest['et 0']:.2f} times the mean load of its layer."


@pytest.mark.parametrize(
    ("rule", "sizes", "domains", "sentences"),
    [
        (None, {}, 2, {"compute", ""}),
        (ExpertThreshold(), {"num_experts": 1}, 2, {"compute", "fanout", "load", "specialization", "cutoff_vs_usage"}),
        (TokenChoice(), {"num_experts": 1}, 2, {"compute", "fanout", "load", "specialization"}),
        (ExpertThreshold(), {"num_layers": 2}, 1, {"compute", "fanout", "load", "cutoff_vs_usage"}),
        (TokenChoice(), {"num_layers": 2}, 2, {"compute", "fanout", "load", "specialization"}),
    ],
    ids=["dense", "one expert", "one expert, chosen by tokens", "one domain, one MoE layer", "one MoE layer"],
)
def test_little_to_summarise(
    rule: RoutingRule | None, sizes: dict[str, int], domains: int, sentences: set[str], tmp_path: Path
) -> None:
    """All of the report is written, each link leads to a section, and no number is missing or no number."""
    tokenizer = Tokenizer.train(["some text"] * 3, 260)
    subject = Subject("a <b>", make(rule, vocab_size=260, **sizes))
    names = list("xyz")[:domains]
    collected = collect([subject], iter(text(domains)), domains, LENGTH, tokenizer.token_bytes, 0, batch_size=4)
    found = summary([subject], collected.measurements, names)
    assert {sentence.section for sentence in found.sentences} == sentences
    numbers = by_key(found, "a <b>")
    assert all(value is not None and (isinstance(value, str) or math.isfinite(value)) for value in numbers.values())
    if "num_experts" in sizes:
        assert (numbers["busiest"], numbers["distance"], numbers["by_documents"]) == (1.0, 0.0, 0.0)
    origins = {"a <b>": Origin(Path("a.ckpt"), "rule", 1, None, {})}
    parts = sections([subject], origins, collected, names, tokenizer, LENGTH, {})
    [page, *_] = write_report(tmp_path, "title", found, {}, parts)
    ids = set(re.findall(r'id="([^"]*)"', page.read_text()))
    links = set(re.findall(r'href="#([^"]*)"', page.read_text()))
    assert links <= ids
    assert sentences - {""} <= links
