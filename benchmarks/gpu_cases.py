"""The cases of ``--suite gpu``: layers, training steps, the quickstart, decoding, and the parts around a step.

Each case builds its own model, so that few are on the device at a time. The dense baseline is compiled as ours is.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

import torch

from benchmarks.alternatives import Grouped
from benchmarks.measurement import host_waits, interleaved, launches, peak_memory
from benchmarks.models import NEW_TOKENS, Decoding, model_flops_utilisation
from benchmarks.setup import (
    RULES,
    Setup,
    decoder,
    decoder_pass,
    dense_layer,
    layer_input,
    layer_pass,
    moe_layer,
    training_step,
    update_state,
)
from benchmarks.suite import Case
from lightning_moe.cli.main import main
from lightning_moe.filenames import SUMMARY_FILE
from lightning_moe.internals.torch import compile_with_sizes_that_depend_on_data
from lightning_moe.optim import OptimizerConfig, build_optimizer

Values = Mapping[str, float]
#: rules whose whole steps are measured
STEPS = ("dense", "token choice", "expert threshold")


@dataclass(frozen=True)
class Sizes:
    """Sizes of the suite.

    Args:
        layer: sizes of layers, and of steps of the larger model.
        small: sizes of steps of the smaller model.
        passes: forward and backward passes of a step of the smaller model.
        quickstart: flags of the run of the quickstart.
    """

    layer: Setup
    small: Setup
    passes: int = 2
    quickstart: tuple[str, ...] = ("--trainer.max_steps=100", "--trainer.limit_val_batches=1")


def cases(sizes: Sizes) -> Iterator[Case]:
    """Yield all cases, the most important first."""
    d12, small = sizes.layer, sizes.small
    for name in ("dense", "expert threshold"):
        yield _step_case("step d12", name, d12, compiled=True)
    for name in RULES:
        for compiled in (False, True):
            yield Case("layer", _how(name, compiled), functools.partial(_layer, d12, name, compiled))
    yield Case("layer", "expert threshold, grouped_mm with autograd", functools.partial(_grouped, d12))
    for name in ("dense", "expert threshold"):
        yield _step_case("step small", name, small, compiled=True, passes=sizes.passes)
    yield Case("quickstart", "fit", functools.partial(_quickstart, d12, sizes.quickstart))
    yield Case("around the step", "Muon step, expert threshold", functools.partial(_muon, d12))
    yield Case("around the step", "state update, expert threshold", functools.partial(_state_update, d12))
    yield Case("around the step", "one dense layer, head and loss", functools.partial(_head, d12))
    yield _step_case("step d12", "token choice", d12, compiled=True)
    for name in STEPS:
        yield _step_case("step d12", name, d12, compiled=False)
    for name in ("dense", "expert threshold"):
        yield _step_case("step small", name, small, compiled=False, passes=sizes.passes)
    for name in ("dense", "expert threshold"):
        for batch in (1, 64):
            yield Case("decoding", f"{name}, batch {batch}", functools.partial(_decoding, d12, name, batch))


def _how(name: str, compiled: bool) -> str:
    return f"{name}, {'compiled' if compiled else 'eager'}"


def _step_case(group: str, name: str, setup: Setup, compiled: bool, passes: int = 1) -> Case:
    return Case(group, _how(name, compiled), functools.partial(_step, setup, name, compiled, passes))


def _layer(setup: Setup, name: str, compiled: bool) -> Values:
    rule = RULES[name]
    module: torch.nn.Module = dense_layer(setup) if rule is None else moe_layer(setup, rule)
    if compiled:
        compile_with_sizes_that_depend_on_data()  # as `Decoder.compile_blocks`
        module.compile()
    return _all(layer_pass(module, layer_input(setup), setup), setup)


def _grouped(setup: Setup) -> Values:
    rule = RULES["expert threshold"]
    assert rule is not None
    return _all(layer_pass(Grouped(moe_layer(setup, rule)), layer_input(setup), setup), setup)


def _step(setup: Setup, name: str, compiled: bool, passes: int) -> Values:
    model = decoder(setup, RULES[name])
    if compiled:
        model.compile_blocks()
    values = _all(training_step(model, setup, passes), setup)
    rate = passes * setup.num_tokens / (values["milliseconds"] / 1e3)
    return {**values, "tokens_per_second": rate, **model_flops_utilisation(setup, RULES[name], rate)}


def _quickstart(setup: Setup, flags: tuple[str, ...]) -> Values:
    """Train the default experiment by the real command, in a folder that is removed; its text is prepared first."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        on = {"cuda": ("--config=trainer/gpu", "--trainer.enable_progress_bar=false")}
        own = ("--output_dir", folder, "--run_name=quickstart", "--tracking.enabled=false")
        code = main(["fit", *on.get(setup.device.type, ()), *own, *flags])
        if code:
            raise RuntimeError(f"fit ended with exit code {code}; its message is on stderr")
        summary = json.loads((Path(folder) / "quickstart" / SUMMARY_FILE).read_text())
    return {"tokens_per_second": summary["tokens_per_second"]}


def _muon(setup: Setup) -> Values:
    model = decoder(setup, RULES["expert threshold"])
    optimizer = build_optimizer(model, OptimizerConfig())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return _all(optimizer.step, setup)


def _state_update(setup: Setup) -> Values:
    model = decoder(setup, RULES["expert threshold"])
    with torch.no_grad(), setup.autocast():
        model(setup.tokens(*setup.batch_shape))
    return _all(functools.partial(update_state, model), setup)


def _head(setup: Setup) -> Values:
    at = replace(setup, num_layers=1)
    model = decoder(at, None)
    model.compile_blocks()
    return _all(decoder_pass(model, at), at)


def _decoding(setup: Setup, name: str, batch: int) -> Values:
    run = Decoding(setup, decoder(setup, RULES[name]).eval())
    prompt = setup.tokens(batch, 32)
    seconds = _seconds(lambda: run(prompt, NEW_TOKENS), replace(setup, rounds=3))
    return {"milliseconds": 1e3 * seconds, "tokens_per_second": batch * NEW_TOKENS / seconds}


def _all(run: Callable[[], object], setup: Setup) -> dict[str, float]:
    """Return time, peak memory, waits of the host and launches of a function."""
    seconds = _seconds(run, setup)
    return {
        "milliseconds": 1e3 * seconds,
        "peak_bytes": peak_memory(run, setup.device),
        "waits": host_waits(run, setup.device),
        "launches": launches(run, setup.device),
    }


def _seconds(run: Callable[[], object], setup: Setup) -> float:
    return interleaved({"": run}, setup.rounds, setup.device)[""].value
