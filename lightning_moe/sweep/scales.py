"""Where the values of a parameter lie on an axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_moe.report.figures import wrapped_key
from lightning_moe.report.tables import shown
from lightning_moe.sweep.space import Choice, Parameter
from lightning_moe.sweep.spec import Sweep

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axis import Axis

STRIP = 0.3  # half the width of a choice's strip of points, in choices
LONGEST_TICK = 14  # characters of a choice's name in one line
LONGEST_SLANTED = 30  # the same, of a slanted name
UPRIGHT_TICKS = 36  # characters of all ticks that fit side by side


@dataclass(frozen=True)
class Scale:
    """The axis of one parameter: numbers as they are, and choices at 0, 1, 2, … in the order of the file.

    Args:
        parameter: parameter of the axis.
    """

    parameter: Parameter

    @property
    def choices(self) -> Sequence[Any] | None:
        """Choices of the parameter; `None` for a range."""
        return self.parameter.domain.values if isinstance(self.parameter.domain, Choice) else None

    @property
    def is_log(self) -> bool:
        """Whether the axis is logarithmic."""
        return not isinstance(self.parameter.domain, Choice) and self.parameter.domain.log

    @property
    def is_numeric(self) -> bool:
        """Whether the values have an order: a range, or choices of ascending or descending numbers."""
        values = self.choices
        if values is None:
            return True
        if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
            return False
        return list(values) in (sorted(values), sorted(values, reverse=True))

    @property
    def ends(self) -> tuple[float, float]:
        """First and last position."""
        domain = self.parameter.domain
        return (0.0, len(domain.values) - 1.0) if isinstance(domain, Choice) else (domain.low, domain.high)

    def position(self, value: Any) -> float:
        """Return where a value lies; NaN, which is not drawn, for one that is none of the choices."""
        if self.choices is None:
            return float(value)
        # True == 1 == 1.0, but they may be three choices
        same = (i for i, choice in enumerate(self.choices) if type(choice) is type(value) and choice == value)
        return float(next(same, math.nan))

    def to_unit(self, positions: np.ndarray) -> np.ndarray:
        """Map positions on the axis to [0, 1], from end to end; any shape, float64."""
        import numpy as np

        low, high = self.ends
        if self.is_log:
            return np.log(positions / low) / math.log(high / low)
        return (positions - low) / (high - low)

    def from_unit(self, unit: np.ndarray) -> np.ndarray:
        """Map [0, 1] to positions; the inverse of `to_unit`."""
        import numpy as np

        low, high = self.ends
        return np.asarray(low * (high / low) ** unit if self.is_log else low + (high - low) * unit)

    @property
    def label(self) -> str:
        """Label of the axis: the key, in lines that fit a panel, and what the axis does."""
        parameter = self.parameter
        notes = ["log scale"] if self.is_log else []
        notes += [f"only {key}={'/'.join(map(shown, values))}" for key, values in parameter.when.items()]
        return "\n".join([wrapped_key(parameter.key, 32), *(wrapped_key(f"({note})", 36) for note in notes)])

    def draw(self, ruler: Axis, margin: float) -> None:
        """Give an axis its scale, limits, ticks and label.

        Args:
            ruler: x-axis or y-axis.
            margin: room beyond both ends: a share of a range, or choices.
        """
        import numpy as np

        axes: Any = ruler.axes
        which = "x" if ruler is axes.xaxis else "y"
        low, high = self.ends
        if self.choices is not None:
            limits = (low - margin, high + margin)
            style: dict[str, Any] = {"parse_math": False}  # a choice's text may have dollar signs
            names = [wrapped_key(shown(value), LONGEST_TICK) for value in self.choices]
            if which == "x" and sum(max(map(len, name.split("\n"))) for name in names) > UPRIGHT_TICKS:
                names = [wrapped_key(shown(value), LONGEST_SLANTED) for value in self.choices]
                style |= {"rotation": 90, "va": "center"} if len(names) > 8 else {"rotation": 35, "va": "top"}
                style |= {"ha": "right", "rotation_mode": "anchor"}
            ruler.set_ticks(range(len(names)), names, **style)
        else:
            ends = self.from_unit(np.array([-margin, 1 + margin]))
            limits = (float(ends[0]), float(ends[1]))
            if self.is_log:
                getattr(axes, f"set_{which}scale")("log")
                _log_ticks(ruler, *limits)
        getattr(axes, f"set_{which}lim")(*limits)
        ruler.set_label_text(self.label, parse_math=False)


def by_importance(sweep: Sweep, shares: Mapping[str, float]) -> list[Scale]:
    """Return the axes of all parameters, those with the largest shares first, then the others as in the file."""
    found = sorted(sweep.space.parameters, key=lambda parameter: -shares.get(parameter.key, -1.0))
    return [Scale(parameter) for parameter in found]


def _log_ticks(ruler: Axis, low: float, high: float) -> None:
    """Put two to six ticks at 1, 2 and 5 times powers of ten, or at round numbers of a short range."""
    from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**power for power in decades for factor in factors if low <= factor * 10.0**power <= high]
        if len(ticks) <= 6:
            break
    ticks = ticks[:: -(-len(ticks) // 6) or 1]
    if len(ticks) < 2:
        ticks = [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
    ruler.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    ruler.set_minor_locator(NullLocator())
    ruler.set_minor_formatter(NullFormatter())
