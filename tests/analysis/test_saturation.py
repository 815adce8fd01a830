"""Router saturation: against a loop over tokens, over the checkpoints of several runs, with a planted layer."""

from itertools import combinations

import pytest
import torch

from lightning_moe.analysis.consistency import Consistency
from lightning_moe.analysis.saturation import points, section
from lightning_moe.report.figures import png

LAYERS, EXPERTS, K, TOKENS = 3, 8, 2, 200
NAMES = ["layer_00", "layer_01", "layer_02"]


def choices(generator: torch.Generator) -> torch.Tensor:
    """K random experts for every token: bool [1, TOKENS, LAYERS, EXPERTS]."""
    picked = torch.rand(1, TOKENS, LAYERS, EXPERTS, generator=generator).topk(K).indices
    return torch.zeros(1, TOKENS, LAYERS, EXPERTS, dtype=torch.bool).scatter(-1, picked, True)


@pytest.fixture
def experts() -> dict[str, torch.Tensor]:
    """A run's checkpoints: layer 1 is final from the middle on; and one of another run."""
    generator = torch.Generator().manual_seed(1)
    found = {label: choices(generator) for label in ("end", "start", "middle", "other")}
    found["middle"][:, :, 1] = found["end"][:, :, 1]
    return found


CHECKPOINTS = {"end": ("run", 300), "start": ("run", 100), "middle": ("run", 200), "other": ("else", 100)}


def pairs(experts: dict[str, torch.Tensor]) -> dict[tuple[str, str], Consistency]:
    found = {(a, b): Consistency(LAYERS, EXPERTS) for a, b in combinations(experts, 2)}
    for (a, b), consistency in found.items():
        consistency.update(experts[a], experts[b], torch.ones(1, TOKENS, dtype=torch.bool))
    return found


@pytest.mark.parametrize("order", [["end", "start", "middle", "other"], ["start", "other", "end", "middle"]])
def test_saturation_is_the_mean_overlap_of_a_tokens_experts(experts: dict[str, torch.Tensor], order: list[str]) -> None:
    found = points(pairs({label: experts[label] for label in order}), {label: CHECKPOINTS[label] for label in order})
    assert list(found) == ["run"]
    assert [(point.label, point.last, point.step, point.last_step) for point in found["run"]] == [
        ("start", "end", 100, 300),
        ("middle", "end", 200, 300),
    ]
    for point in found["run"]:
        overlaps = []
        for layer in range(LAYERS):
            mine = []
            for token in range(TOKENS):
                a, b = (
                    {e for e in range(EXPERTS) if experts[label][0, token, layer, e]} for label in (point.label, "end")
                )
                mine.append(len(a & b) / K)
            overlaps.append(sum(mine) / TOKENS)
        assert [share for share, _ in point.layers] == pytest.approx(overlaps)
        assert point.joint[0] == pytest.approx(sum(overlaps) / LAYERS)
        assert point.joint[1] == pytest.approx(K / EXPERTS, abs=0.01)
    assert found["run"][1].layers[1][0] == 1.0
    assert found["run"][1].layers[0][0] == pytest.approx(K / EXPERTS, abs=0.08)


def test_with_a_variable_number_of_experts_it_is_the_share_of_the_last_choices() -> None:
    generator = torch.Generator().manual_seed(2)
    early, last = (torch.rand(1, TOKENS, LAYERS, EXPERTS, generator=generator) < share for share in (0.5, 0.1))
    early |= last  # all of the last choices, and more
    for order in (("early", "last"), ("last", "early")):
        both = {"early": early, "last": last}
        steps = {"early": ("run", 1), "last": ("run", 2)}
        [point] = points(pairs({label: both[label] for label in order}), steps)["run"]
        assert point.joint[0] == 1.0
        assert point.joint[1] == pytest.approx(float(early.float().mean()), abs=0.02)


def test_the_section(experts: dict[str, torch.Tensor]) -> None:
    found = section(pairs(experts), CHECKPOINTS, NAMES)
    assert [row["least saturated layer"] for row in found.summary][1] != "layer_01"
    assert len(found.tables["saturation"]) == 2 * (LAYERS + 1)
    assert len(png(found.figures["saturation"])) > 1000
    for missing in (
        section({}, {}, NAMES),
        section(pairs(experts), {"end": ("run", 300), "start": ("run", 300), "other": ("else", 100)}, NAMES),
    ):
        assert not missing.figures
        assert "earlier checkpoint of the same run" in missing.missing[0]
