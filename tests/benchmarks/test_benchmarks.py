"""The benchmark's cases compute what they say, its ratios are those of the rounds, and the command writes all files."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import layers, measurement, models, report, setup
from benchmarks.comparisons import COMPARISONS
from benchmarks.transformers_models import transformers_decoder
from lightning_moe.cli.main import report_errors
from lightning_moe.errors import UserError
from lightning_moe.model import loss_head
from lightning_moe.routing import ExpertChoice, TokenChoiceAuxLoss, TokenChoiceLossFree

TINY = setup.Setup(hidden_size=32, num_tokens=64, num_experts=4, num_layers=2, vocab_size=64, rounds=3)
CPU = torch.device("cpu")


def main(args: list[str]) -> int:
    """``python -m benchmarks``, in this process."""
    return report_errors(lambda: command.run(args))


def test_ratios_are_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both cases slow down together from round to round, so their ratio does not change; a clock of our own."""
    calls: list[str] = []
    now = 0.0

    def case(name: str, factor: float) -> None:
        nonlocal now
        calls.append(name)
        now += factor * calls.count(name)

    monkeypatch.setattr(measurement.time, "perf_counter", lambda: now)
    cases = {"one": lambda: case("one", 1), "three": lambda: case("three", 3)}
    monkeypatch.setattr(measurement, "WARMUP_ROUNDS", 1)
    found = measurement.interleaved(cases, 4, CPU)
    assert calls == ["one", "three", "three", "one"] * 2 + ["one", "three"]  # what comes first is slower or faster
    assert found["one"] == measurement.Measurement(3.5, "s", 1, 1, 1)  # rounds of 2, 3, 4, 5; the first does not count
    assert found["three"] == measurement.Measurement(10.5, "s", 3, 3, 3)


@torch.library.custom_op("lightning_moe_test::three_buffers", mutates_args=())
def three_buffers(x: torch.Tensor) -> torch.Tensor:
    """Two tensors beside the result live at once, inside one operation."""
    return x + 1 + (x + 2) * 3


def test_memory_is_what_lives_at_once_inside_of_operations_too() -> None:
    x = torch.ones(1000)
    kept: list[torch.Tensor] = []

    def run() -> None:
        kept.append(three_buffers(x))

    assert measurement.peak_memory(run, CPU) == pytest.approx(3 * 4000, abs=100)
    assert measurement.peak_memory(run, CPU, at_end=True) == pytest.approx(4000, abs=100)
    assert measurement.peak_memory(lambda: None, CPU) == 0


def test_memory_that_was_there_before_does_not_count() -> None:
    held = [torch.ones(100_000)]

    def run() -> None:
        held.append(held.pop() + 1)  # one more while it is computed, none more after it

    assert measurement.peak_memory(run, CPU) == pytest.approx(400_000, abs=100)


@pytest.mark.parametrize(
    ("run", "waits"),
    [
        (lambda: torch.ones(3).sum().item(), 1),
        (lambda: torch.ones(3).nonzero(), 1),
        (lambda: bool(torch.ones(3).any()), 1),
        (lambda: torch.ones(3) + 1, 0),
        (
            lambda: torch.nn.functional.grouped_mm(torch.ones(4, 4), torch.ones(1, 4, 4), offs=torch.tensor([4]).int()),
            0,
        ),
    ],
)
def test_host_waits(run: Callable[[], object], waits: int) -> None:
    assert measurement.host_waits(run, CPU) == waits


@pytest.mark.parametrize("name", ["dense", "token choice", "expert threshold"])
def test_no_training_step_waits(name: str) -> None:
    at = replace(TINY, num_layers=3)
    run = models.training_step(setup.decoder(at, setup.RULES[name]), at)
    run()
    assert measurement.host_waits(run, CPU) == 0


GROUPS = {
    "layer": 1,
    "products": 3,
    "memory": 3,
    "scaling": 4,
    "loss": 2,
    "step": 1,
    "step_costs": 2,
    "lengths": 1,
    "compile": 3,
    "decoding": 4,
    "overhead": 2,
}
SLOW = ("compile", "decoding", "scaling", "overhead")


def test_the_command_knows_all_comparisons_and_presets() -> None:
    assert set(COMPARISONS) == set(GROUPS)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in GROUPS])
def test_every_comparison_runs(name: str) -> None:
    rows = list(COMPARISONS[name](TINY))
    assert len({(row.comparison, row.size) for row in rows}) == GROUPS[name]
    assert all(row.measured.value > 0 or row.measured.unit == "waits" for row in rows)


@pytest.mark.parametrize("precision", setup.PRECISIONS)
def test_all_implementations_agree_in_every_precision(precision: str) -> None:
    """`implementations` raises where one computes something else."""
    at = replace(TINY, precision=precision)
    found = layers.implementations(at, setup.layer_input(at))
    assert len(found) == 10
    assert "token choice, transformers grouped_mm" in found


def test_an_alternative_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(layers.ALTERNATIVES["loop over experts"]):  # type: ignore[misc]
        def routed(self, x: torch.Tensor, mask: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
            return super().routed(x, mask, gates) * 1.01

    monkeypatch.setitem(layers.ALTERNATIVES, "wrong", Wrong)
    with pytest.raises(AssertionError, match="wrong computes something else"):
        list(layers.layer(TINY))


def test_a_result_that_is_no_number_is_not_equal() -> None:
    ones = torch.ones(2)
    measurement.require_close(ones, ones, TINY.precision, "same")
    for wrong in (ones * torch.nan, ones * torch.inf):
        with pytest.raises(AssertionError, match="computes something else"):
            measurement.require_close(wrong, ones, TINY.precision, "wrong")


def test_the_loss_in_chunks_needs_a_part_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_head, "CHUNK_BYTES", 256 * 1024 * 4)
    at = replace(TINY, num_tokens=4096, vocab_size=1024)
    time, _, whole, chunks = COMPARISONS["loss"](at)
    assert time.comparison == "head and loss, forward + backward"
    assert [whole.case, chunks.case] == ["whole logits", "chunks"]
    assert whole.measured.value > 3 * 4096 * 1024 * 4
    assert chunks.measured.value < 3 * 256 * 1024 * 4


def test_rates_are_of_the_tokens_that_were_computed() -> None:
    with pytest.raises(UserError, match=r"--num_tokens 100: must be a multiple of --sequence_length 48"):
        replace(TINY, num_tokens=100, sequence_length=48)
    at = replace(TINY, num_tokens=96, sequence_length=48, rounds=2)
    assert at.batch_shape == (2, 48)
    assert replace(at, num_tokens=40).batch_shape == (1, 40)
    longer = replace(at, num_tokens=240)
    assert len(list(COMPARISONS["lengths"](longer))) == 2 * 2  # windows of 48 and of 240; four times 48 do not divide
    for row in COMPARISONS["step"](at):
        assert row.extras["tokens_per_second"] == pytest.approx(96 / row.measured.value)


def test_nothing_is_a_multiple_of_nothing() -> None:
    rows = list(setup.counted("waits", "tiny", [("dense", 0), ("one", 2)], "waits"))
    assert [row.measured.ratio for row in rows] == [None, None]
    lines = report.table(rows).splitlines()
    assert [line.split() for line in lines[1:]] == [["dense", "–", "0", "waits"], ["one", "–", "2", "waits"]]
    shown = report.figure(rows, "t").subfigs[0].axes[0]
    assert [text.get_text() for text in shown.texts] == ["–  (0 waits)", "–  (2 waits)"]
    assert json.loads(json.dumps(report.document(rows, {})))["rows"][1]["measured"]["ratio"] is None


def test_without_transformers_its_cases_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert not any("transformers" in name for name in layers.implementations(TINY, setup.layer_input(TINY)))
    assert "not installed" in report.machine()["transformers"]


def test_their_decoder_has_our_parameters() -> None:
    at = replace(TINY, num_layers=3)
    theirs = transformers_decoder(at, "grouped_mm")
    ours = setup.decoder(at, setup.RULES["token choice"])
    matrices = [sorted(tuple(sorted(p.shape)) for p in model.parameters() if p.ndim > 1) for model in (theirs, ours)]
    assert matrices[0] == matrices[1]  # transposed; and it has scales in its norms


def test_the_layers_thresholds_select_the_target_share() -> None:
    layer = setup.moe_layer(TINY, setup.ExpertThreshold(capacity_factor=None))
    layer(setup.layer_input(TINY))
    assert layer.record.selection.mask.sum() == pytest.approx(64, abs=32)


def test_the_command_writes_table_json_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--hidden_size=32", "--num_tokens=64", "--num_experts=4", "--num_layers=2", "--rounds=2"]
    output = tmp_path / "out"
    assert main(["--compare", "layer", "memory", *sizes, f"--output_dir={output}"]) == 0
    document = json.loads((output / "bench.json").read_text())
    assert len(document["rows"]) == 32
    assert document["machine"]["threads"] == torch.get_num_threads()
    assert document["setups"]["cpu"]["precision"] == "32-true"
    assert (output / "bench.txt").read_text().strip() in capsys.readouterr().out
    assert (output / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert main([f"--output_dir={output}"]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert main(["--device=nowhere"]) == 2
    capsys.readouterr()
    assert main(["--compare", "layer", *sizes, f"--output_dir={output}/bench.txt/new"]) == 2
    assert "bench.txt/new: cannot be written: Not a directory" in capsys.readouterr().err


def test_rules_of_ones_own_are_cases_beside_the_others(tmp_path: Path) -> None:
    """A name under conf/routing, a class with its defaults, and a file with options."""
    own = tmp_path / "mine.yaml"
    own.write_text("model:\n  routing:\n    class_path: lightning_moe.routing.ExpertChoice\n    init_args: {pool: 2}\n")
    names = ("token_choice_aux", "lightning_moe.routing.TokenChoiceLossFree", str(own))
    at = replace(TINY, num_tokens=128, sequence_length=64, routing=names)
    assert [at.rules[name] for name in names] == [TokenChoiceAuxLoss(), TokenChoiceLossFree(), ExpertChoice(pool=2)]
    for comparison in ("layer", "step", "step_costs"):
        rows = list(COMPARISONS[comparison](at))
        for name in names:
            assert sum(row.case == name for row in rows) == GROUPS[comparison]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("tokn_choice", "did you mean 'routing/token_choice'?"),
        ("no_such_file_here.TopP", "'no_such_file_here.TopP' cannot be imported"),
        ("trainer/cpu.yaml", "--routing trainer/cpu.yaml: the file has no model.routing."),
    ],
)
def test_a_rule_that_is_not_there_is_named_before_anything_is_timed(
    rule: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--routing", rule]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.slow
def test_the_gpu_call_of_the_documentation_at_tiny_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    """Both presets in one call, on the CPU, with everything that can be made small made small."""
    sizes = ["--hidden_size=32", "--num_tokens=64", "--sequence_length=32", "--num_experts=4", "--num_layers=2"]
    small = [*sizes, "--vocab_size=64", "--rounds=2", "--precision=bf16-mixed"]
    assert main(["--preset", "d12", "d20", "--compare", "layer", "step", "step_costs", *small]) == 0
    out = capsys.readouterr().out
    assert "waits of the host" in out
    assert "tokens/s" in out
