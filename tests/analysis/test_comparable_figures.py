"""Figures of several checkpoints: one pair of limits, experts in the order of their own mean, zoom where it helps."""

from dataclasses import replace

import pytest
import torch
from matplotlib.axes import Axes
from observations import DOMAINS, EXPERTS, LAYERS, SEQUENCE, random_observation, tokens_of

from lightning_moe.analysis import fanout, intensity, load, router_logits, specialization, training_record, usage
from lightning_moe.analysis.experts import by_mean
from lightning_moe.analysis.fanout import Fanout
from lightning_moe.analysis.intensity import Intensity
from lightning_moe.analysis.load import Load
from lightning_moe.analysis.observe import Observation
from lightning_moe.analysis.router_logits import RouterLogits
from lightning_moe.analysis.specialization import Specialization
from lightning_moe.analysis.training_record import TrainingRecord
from lightning_moe.analysis.usage import CutoffUsage
from lightning_moe.data import Tokenizer

NAMES = ["layer_01", "layer_02"]
RATES = [0.25, 0.5]
#: few experts per token and narrow logits; many and wide ones
SEEN = {
    "narrow": random_observation(1, batch=8, share=0.2),
    "wide": replace(random_observation(2, batch=8, share=0.8), logits=random_observation(2, batch=8).logits * 5),
}


def same(axes: list[Axes], ruler: str) -> bool:
    return len({getattr(axis, f"get_{ruler}lim")() for axis in axes}) == 1


def inside(axis: Axes) -> bool:
    """Whether everything that is drawn is within the limits."""
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    drawn = axis.dataLim
    return left <= drawn.x0 and drawn.x1 <= right and bottom <= drawn.y0 and drawn.y1 <= top


def experts_of(axis: Axes) -> list[int]:
    return [int(text.get_text()) for text in axis.get_xticklabels()]


def test_fanout() -> None:
    results = {label: Fanout(LAYERS, SEQUENCE) for label in SEEN}
    for label, result in results.items():
        result.update(SEEN[label])
    axes = fanout.section(results, NAMES, dict.fromkeys(SEEN, 1.5)).figures["fanout"].axes
    assert same(axes, "y")
    assert same(axes[1::2], "x")
    assert all(axis.get_ylim()[0] == 0 for axis in axes)
    assert all(inside(axis) for axis in axes)


def test_cutoffs_and_usage() -> None:
    results = {label: CutoffUsage(torch.zeros(LAYERS, EXPERTS), RATES) for label in SEEN}
    results["none"] = CutoffUsage(None, RATES)
    for label, result in results.items():
        for _ in range(3):
            result.update(SEEN.get(label, SEEN["wide"]))
    axes = usage.section(results, NAMES).figures["cutoff_vs_usage"].axes
    lefts, rights = [axis for axis in axes[::2] if axis.get_visible()], axes[1::2]
    assert (len(lefts), len(rights)) == (2, 3)
    assert same(lefts, "y")
    assert same(rights, "y")
    assert all(inside(axis) for axis in [*lefts, *rights])


def test_usage_of_equal_loads_is_zoomed() -> None:
    seen = SEEN["narrow"]
    everything = replace(seen, valid=torch.ones_like(seen.valid), experts=torch.ones_like(seen.experts))
    result = CutoffUsage(None, [0.98, 1.0])  # usage 1.02 and 1
    result.update(everything)
    axis = usage.section({"a": result}, NAMES).figures["cutoff_vs_usage"].axes[1]
    assert "zoomed" in axis.get_ylabel()
    assert axis.get_ylim() == pytest.approx((0.999, 1.0217), abs=1e-3)


def counted(seen: Observation) -> tuple[Specialization, CutoffUsage]:
    counts, batches = Specialization(DOMAINS, LAYERS, EXPERTS, 0), CutoffUsage(None, RATES)
    for part in (counts, batches):
        part.update(seen)
    return counts, batches


def test_load() -> None:
    found = load.section({label: Load.of(*counted(seen)) for label, seen in SEEN.items()}, NAMES)
    axes = [axis for figure in found.figures.values() for axis in figure.axes]
    assert len(axes) == 2 * LAYERS
    assert same(axes, "y")
    assert all(inside(axis) for axis in axes)
    for number, (label, seen) in enumerate(SEEN.items()):
        tokens = tokens_of([seen])
        for layer in range(LAYERS):
            loads = [sum(t["experts"][layer][expert] for t in tokens) for expert in range(EXPERTS)]
            order = sorted(range(EXPERTS), key=lambda expert: (-loads[expert], expert))
            axis = axes[LAYERS * number + layer]
            assert experts_of(axis) == order
            drawn = axis.lines[0].get_ydata()
            assert drawn == pytest.approx([loads[expert] / len(tokens) / RATES[layer] for expert in order])
            [row] = [row for row in found.summary if (row["checkpoint"], row["layer"]) == (label, NAMES[layer])]
            assert (row["busiest expert"], row["dead"]) == (order[0], 0)
            assert row["highest / mean"] == pytest.approx(max(loads) / (sum(loads) / EXPERTS))


def test_rarely_used_is_less_than_a_tenth_of_the_mean() -> None:
    found = Load(torch.tensor([[0, 9, 10, 381], [100, 100, 100, 100]]), 1000, [0.1, 0.1], torch.zeros(2, 4))
    assert found.rarely_used().sum(1).tolist() == [2, 0]
    assert found.dead().sum(1).tolist() == [1, 0]
    assert found.busiest() == (pytest.approx(3.81), 0, 3)


def test_loads_that_are_close_together_are_zoomed() -> None:
    """A row of equal points would say nothing."""
    even = Load(torch.tensor([[98, 102, 100, 100]]), 400, [0.25], torch.zeros(1, 4))
    [axis] = load.section({"a": even}, NAMES[:1]).figures["load"].axes
    assert axis.get_ylabel() == "tokens / target\n(zoomed: 0.978 to 1.022)"
    assert axis.get_ylim() == pytest.approx((0.9776, 1.0224))
    assert experts_of(axis) == [1, 2, 3, 0]


def test_router_logits() -> None:
    results = {label: RouterLogits(torch.arange(8).view(LAYERS, EXPERTS) / 10) for label in SEEN}
    for label, result in results.items():
        result.update(SEEN[label])
    figures = router_logits.section(results, NAMES, dict.fromkeys(SEEN, RATES)).figures
    for layer in range(LAYERS):
        axes = [figure.axes[layer] for figure in figures.values()]
        assert same(axes, "y")
        for axis, (label, seen) in zip(axes, SEEN.items(), strict=True):
            logits = [t["logits"][layer] for t in tokens_of([seen])]
            low, high = axis.get_ylim()
            assert low <= min(map(min, logits))
            assert max(map(max, logits)) <= high
            means = [sum(column) for column in zip(*logits, strict=True)]
            order = sorted(range(EXPERTS), key=means.__getitem__, reverse=True)
            assert experts_of(axis) == order
            assert [line.get_ydata()[0] for line in axis.lines] == pytest.approx(
                [(EXPERTS * layer + expert) / 10 for expert in order]
            )
            counts = results[label].counts[layer, order].t()
            shown = torch.from_numpy(axis.images[0].get_array().data)
            assert torch.equal(shown > 0, counts > 0)
            assert (axis.images[0].norm.vmin, axis.images[0].norm.vmax) == (1e-3, 1.0)


def test_specialization() -> None:
    results = {label: counted(seen)[0] for label, seen in SEEN.items()}
    names = ["code", "prose"]
    figure = specialization.section(results, names, NAMES, dict.fromkeys(SEEN, RATES)).figures["specialization"]
    panels = figure.axes[: len(SEEN) * DOMAINS]
    assert len({(axis.images[0].norm.vmin, axis.images[0].norm.vmax) for axis in panels}) == 1
    assert same(panels, "x")
    assert same(panels, "y")
    for number, seen in enumerate(SEEN.values()):
        tokens = tokens_of([seen])
        shares = [[[0.0] * EXPERTS for _ in range(LAYERS)] for _ in range(DOMAINS)]
        for domain in range(DOMAINS):
            of_domain = [t for t in tokens if t["domain"] == domain]
            for layer in range(LAYERS):
                for expert in range(EXPERTS):
                    taken = sum(t["experts"][layer][expert] for t in of_domain)
                    shares[domain][layer][expert] = taken / len(of_domain) / RATES[layer]
        for domain in range(DOMAINS):
            axis = panels[DOMAINS * number + domain]
            image = axis.images[0].get_array()
            written = {text.get_position(): int(text.get_text()) for text in axis.texts}
            for layer in range(LAYERS):
                means = [shares[0][layer][expert] + shares[1][layer][expert] for expert in range(EXPERTS)]
                order = sorted(range(EXPERTS), key=lambda expert: (-round(means[expert], 9), expert))
                assert [written[place, layer] for place in range(EXPERTS)] == order
                expected = [min(8, max(1 / 8, shares[domain][layer][expert])) for expert in order]
                assert image[layer].tolist() == pytest.approx(expected)


def test_an_expert_without_tokens_is_framed() -> None:
    seen = SEEN["narrow"]
    experts = seen.experts.clone()
    experts[..., 1, 2] = False
    result = counted(replace(seen, experts=experts))[0]
    figure = specialization.section({"a": result}, ["code", "prose"], NAMES, {"a": RATES}).figures["specialization"]
    for axis in figure.axes[:DOMAINS]:
        [frame] = axis.patches
        assert frame.get_xy() == (EXPERTS - 1.45, 0.55)  # the last of layer 2


def test_intensity() -> None:
    results = {label: Intensity(300) for label in SEEN}
    for label, result in results.items():
        result.update(SEEN[label])
    tokenizer = Tokenizer.train(["some text"] * 3, 260)
    found = intensity.section(results, ["code", "prose"], NAMES, {"narrow": 1.0, "wide": 4.0}, tokenizer)
    axes = found.figures["intensity"].axes
    assert same(axes, "x")
    assert axes[0].get_xlim()[0] == 0
    assert all(axis.dataLim.x1 < axis.get_xlim()[1] for axis in axes)
    legends = {part.partition(" target")[0] for part in found.html.split("experts per token: ")[1:]}
    assert len(legends) == 1  # one scale of colours, that of the higher target
    assert "8+" in legends.pop()


def test_capacity_of_runs() -> None:
    def record(scale: float) -> TrainingRecord:
        names = ("raw_fanout_mean", "saturation_rate", "starvation_rate")
        places = ("routing", *(f"routing/{name}" for name in NAMES))
        series = {f"{place}/{name}": ([1, 2, 3], [0.0, scale, scale / 2]) for name in names for place in places}
        return TrainingRecord(series, NAMES, [1.0, 1.0], 1)

    figure = training_record.capacity_section({"low": record(0.1), "high": record(2.0)}, []).figures["capacity"]
    for column in range(3):
        axes = figure.axes[column::3]
        assert len(axes) == 2
        assert same(axes, "y")
        assert same(axes, "x")
        assert axes[0].get_ylim()[1] > 2.0


def test_equal_means_keep_the_order_of_the_numbers() -> None:
    assert by_mean(torch.tensor([[1.0, 3.0, 1.0, 3.0], [0.0] * 4])).tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]
