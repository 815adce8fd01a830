"""A calibration from beginning to end, and what came of it on text that it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lightning_moe.calibrate.measure import Measurement, difference, measure
from lightning_moe.calibrate.thresholds import calibrate
from lightning_moe.calibrate.windows import Windows
from lightning_moe.data.sharded_tokens import ShardedTokens
from lightning_moe.model import CausalLM
from lightning_moe.report.tables import text_table

REPORT_FILE = "calibration.json"


@dataclass(frozen=True)
class Outcome:
    """Losses and loads before and after a calibration.

    Args:
        num_tokens: number of tokens that calibrated.
        before: name of a text → measurement of the source.
        after: the same with the new thresholds.
    """

    num_tokens: int
    before: dict[str, Measurement]
    after: dict[str, Measurement]

    def table(self) -> str:
        """Return the numbers as text, to be printed."""
        losses = [("loss in nats per token", "before", "after", "after − before", "standard error")]
        loads: list[tuple[str, ...]] = [
            ("experts per token over target, and the expert farthest from it", "before", "", "after", "")
        ]
        for name, after in self.after.items():
            before = self.before[name]
            change, error = difference(after.window_losses, before.window_losses)
            losses.append((name, f"{before.loss:.4f}", f"{after.loss:.4f}", f"{change:+.4f}", f"{error:.4f}"))
            for layer in range(len(after.usage)):
                cells = [
                    cell
                    for measured in (before, after)  # a dense source has no loads
                    for cell in (
                        (f"{measured.fanout[layer]:.3f}", f"{measured.worst[layer]:.1%}") if measured.usage else "--"
                    )
                ]
                loads.append((f"MoE layer {layer}, {name}", *cells))
        return "\n\n".join(text_table(table, right=range(1, 5)) for table in (losses, loads))

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as plain data."""

        def plain(found: Measurement) -> dict[str, Any]:
            usage = [layer.tolist() for layer in found.usage]
            return {"loss": found.loss, "num_tokens": found.num_tokens, "usage": usage}

        return {
            "num_tokens": self.num_tokens,
            "before": {name: plain(found) for name, found in self.before.items()},
            "after": {name: plain(found) for name, found in self.after.items()},
        }


def calibrate_and_measure(
    source: CausalLM,
    target: Callable[[], CausalLM],
    tokens: np.ndarray | ShardedTokens,
    validation: np.ndarray | ShardedTokens | None,
    sequence_length: int,
    max_tokens: int,
    keep_loads: bool = False,
) -> Outcome:
    """Calibrate on every second window of a text, and measure on the others and on other text.

    Args:
        source: model as it was.
        target: function that returns the model to calibrate, which may be ``source`` itself, changed.
        tokens: token ids of the text.
        validation: token ids of other text; `None` for none.
        sequence_length: tokens of a window.
        max_tokens: tokens to calibrate on at most; 0 for all.
        keep_loads: as in `calibrate.calibrate`.

    Raises:
        UserError: the text is too short.
    """
    from tqdm import tqdm

    most = max_tokens or len(tokens)
    text, unused = Windows.spread(tokens, sequence_length, 2 * most).split()
    measured = {"other windows of it": unused}
    if validation is not None and len(validation) > sequence_length:
        measured["validation text"] = Windows.spread(validation, sequence_length, most // 4)
    num_batches = 2 * sum(map(len, measured.values())) + len(list(source.moe_layers())) * len(text)
    with tqdm(total=num_batches, desc="calibrating", unit="batch", leave=False) as progress:

        def read(batches: Iterable[Tensor]) -> Iterator[Tensor]:
            for batch in batches:
                yield batch
                progress.update()

        before = {name: measure(source, read(batches)) for name, batches in measured.items()}
        decoder = target()
        calibrate(decoder, lambda: (batch[:, :-1] for batch in read(text)), keep_loads)
        after = {name: measure(decoder, read(batches)) for name, batches in measured.items()}
    return Outcome(len(text.starts) * sequence_length, before, after)
