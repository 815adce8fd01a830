"""Vocabulary specialisation against counts in dictionaries, and with an expert that takes one token only."""

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from observations import EXPERTS, LAYERS, VOCABULARY, random_observation, tokens_of

from lightning_moe.analysis import vocabulary_section
from lightning_moe.analysis.sparse_counts import SparseCounts
from lightning_moe.analysis.vocabulary import FEWEST_OCCURRENCES, KINDS, Vocabulary
from lightning_moe.data import Tokenizer
from lightning_moe.report.figures import png

seeds = st.lists(st.integers(0, 2**31), min_size=1, max_size=3, unique=True)
NAMES = ["layer_01", "layer_02"]
ID_OF = {"input": "token", "next": "next", "predicted": "predicted"}


@given(parts=st.lists(st.lists(st.integers(0, 5) | st.integers(10**15, 10**15 + 3), max_size=8), max_size=6))
def test_sparse_counts(parts: list[list[int]]) -> None:
    counts = SparseCounts()
    for part in parts:
        counts.add(torch.tensor(part, dtype=torch.int64))
        counts.result() if len(part) % 3 == 0 else None
    keys, found = counts.result()
    expected = sorted(Counter(key for part in parts for key in part).items())
    assert list(zip(keys.tolist(), found.tolist(), strict=True)) == expected


@settings(max_examples=15)
@given(seeds=seeds)
def test_specialisation_of_token_ids(seeds: list[int]) -> None:
    seen = [random_observation(seed, batch=12, share=0.5) for seed in seeds]
    result = Vocabulary(LAYERS, EXPERTS, VOCABULARY)
    for observation in seen:
        result.update(observation)
    tokens = tokens_of(seen)
    for kind in KINDS:
        for layer in range(LAYERS):
            firsts: dict[int, list[int]] = defaultdict(list)
            for t in tokens:
                if any(t["experts"][layer]):
                    firsts[t[ID_OF[kind]]].append(int(np.argmax(t["gates"][layer])))
            shares = {x: max(Counter(mine).values()) / len(mine) for x, mine in firsts.items()}
            fewest = min(FEWEST_OCCURRENCES, max(map(len, firsts.values())))
            often = [x for x, mine in firsts.items() if len(mine) >= fewest]
            mean = result.mean(kind, layer)
            assert mean is not None
            assert mean.num_ids == len(often)
            assert mean.value == pytest.approx(np.mean([shares[x] for x in often]))
            assert mean.of_all == pytest.approx(np.mean(list(shares.values())))
    entries = result.entries(3)
    occurrences = Counter(t["token"] for t in tokens)
    fewest = min(FEWEST_OCCURRENCES, max(occurrences.values()))
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            mine = Counter(t["token"] for t in tokens if t["experts"][layer][expert])
            if not mine:
                assert (layer, expert) not in entries
                continue
            typical, frequent = entries[layer, expert]
            by_share = [x for x in mine if occurrences[x] >= fewest]
            by_share.sort(key=lambda x: (-mine[x] / occurrences[x], -mine[x], x))
            assert [entry.token for entry in typical] == by_share[:3]
            assert [entry.token for entry in frequent] == sorted(mine, key=lambda x: (-mine[x], x))[:3]
            for entry in [*typical, *frequent]:
                assert entry.count == mine[entry.token]
                assert entry.of_token == pytest.approx(mine[entry.token] / occurrences[entry.token])
                assert entry.of_expert == pytest.approx(mine[entry.token] / sum(mine.values()))


def test_an_expert_that_takes_one_token_only() -> None:
    seen = random_observation(1, batch=200, padding=False, share=0.4)
    experts = seen.experts.clone()
    experts[:, :, 1] = False
    experts[:, :, 1, 2] = seen.tokens == 5
    experts[:, :, 1, 3] = seen.tokens != 5
    result = Vocabulary(LAYERS, EXPERTS, VOCABULARY)
    result.update(replace(seen, experts=experts, gates=torch.where(experts, seen.gates, 0.0)))
    typical, frequent = result.entries(4)[1, 2]
    [entry] = typical
    assert typical == frequent
    assert (entry.token, entry.of_expert, entry.of_token) == (5, 1.0, 1.0)
    specialised, random = result.mean("input", 1), result.mean("next", 1)
    assert specialised is not None
    assert random is not None
    assert specialised.value == 1.0
    assert specialised.by_chance < 0.95
    assert random.value == pytest.approx(random.by_chance, abs=0.03)  # tokens are independent of their neighbours
    # the gates of layer 0 know nothing of the token, either
    unspecialised = result.mean("input", 0)
    assert unspecialised is not None
    assert unspecialised.value == pytest.approx(unspecialised.by_chance, abs=0.05)


@pytest.mark.parametrize("with_predictions", [True, False])
def test_the_section_names_tokens(with_predictions: bool) -> None:
    tokenizer = Tokenizer.train(["some text"] * 3, 260)
    seen = random_observation(1, batch=30)
    seen = replace(seen, tokens=seen.tokens + 40, predicted=seen.predicted if with_predictions else None)
    result = Vocabulary(LAYERS, EXPERTS, tokenizer.vocab_size)
    result.update(seen)
    found = vocabulary_section.section({"<a>": result}, NAMES, tokenizer)
    assert list(found.missing) == ([] if with_predictions else ["<a>: the model does not say which token it predicts."])
    assert found.summary[0]["input token"] is not None
    assert (found.summary[0]["predicted token"] is None) is not with_predictions
    assert found.html.count("<details>") == LAYERS
    assert "&lt;a&gt; · layer_02" in found.html
    assert f"<code>{found.tables['vocabulary_of_experts'][0]['text']}</code>" in found.html
    assert len(png(found.figures["vocabulary"])) > 1000


def test_no_token_takes_an_expert() -> None:
    seen = random_observation(1)
    nothing = torch.zeros_like(seen.experts)
    result = Vocabulary(LAYERS, EXPERTS, VOCABULARY)
    result.update(replace(seen, experts=nothing, gates=nothing.float()))
    assert result.entries(3) == {}
    assert result.mean("input", 0) is None
    found = vocabulary_section.section({"a": result}, NAMES, Tokenizer.train(["some text"] * 3, 260))
    assert found.summary[0]["input token"] is None
    assert len(png(found.figures["vocabulary"])) > 1000
