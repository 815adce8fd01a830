"""Tokens on a terminal, coloured by how many routed experts they take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_moe.model import CausalLM

#: dark to light in even steps, which colour-blind readers can tell apart too (matplotlib's cividis)
RAMP = ((0, 34, 78), (18, 53, 112), (59, 73, 108), (87, 93, 109), (112, 113, 115), (138, 134, 120), (165, 156, 116),
        (195, 179, 105), (225, 204, 85), (254, 232, 56))  # fmt: skip
RESET = "\x1b[0m"
SWATCHES = 7  # in the legend


@dataclass(frozen=True)
class Palette:
    """Colours for the number of routed experts of a token, summed over layers.

    Args:
        layers: number of MoE layers.
        target: mean number of routed experts per token, summed over layers, that the model was trained for.
        color: whether to use colours; otherwise the number stands after the token.
    """

    layers: int
    target: float
    color: bool

    @classmethod
    def of(cls, decoder: CausalLM, color: bool, asked: Sequence[float] | None = None) -> Palette:
        """Build the palette of a model, as trained or for the asked ``inference_num_experts_per_token``."""
        rates = [layer.state.num_experts_per_token for layer in decoder.moe_layers()]
        target = sum(rates) if asked is None else sum(asked) * (len(rates) if len(asked) == 1 else 1)
        return cls(len(rates), target, color)

    @property
    def highest(self) -> int:
        """The fanout of the last colour: twice the target, or more."""
        return max(1, round(2 * self.target))

    def paint(self, text: str, fanout: int) -> str:
        """Return the text of a token in its colour.

        Line ends stay outside of the colour, or a terminal would paint the rest of the line. A token of line ends only
        shows as ``↵``.
        """
        if not text:
            return ""
        visible = text.rstrip("\n")
        shown, line_ends = visible or "↵", text[len(visible) :]
        if not self.color:
            return f"{visible}⟨{fanout}⟩{line_ends}"
        index = round(min(fanout, self.highest) / self.highest * (len(RAMP) - 1))
        back = ";".join(map(str, RAMP[index]))
        front = "255;255;255" if index < len(RAMP) // 2 else "0;0;0"
        start = f"\x1b[38;2;{front}m\x1b[48;2;{back}m"
        return "\n".join(f"{start}{line}{RESET}" for line in shown.split("\n")) + line_ends

    def legend(self) -> str:
        """Return what the colours, or the numbers, mean."""
        if not self.layers:
            return "dense model: every token takes the same path, there is no routing to show"
        what = f"routed experts of a token, summed over {self.layers} MoE layers (target {self.target:g})"
        if not self.color:
            return f"⟨n⟩ after a token: {what}"
        steps = sorted({round(self.highest * index / (SWATCHES - 1)) for index in range(SWATCHES)})
        marks = [self.paint(f" {step}{'+' if step == self.highest else ''} ", step) for step in steps]
        return f"{what}: {''.join(marks)}"
