"""Initial weights: every module sets its own when it is built, unless a module around it sets them all afterwards.

So a module that is used alone is ready, and one inside another draws its random numbers only once. What a seed gives
to a whole decoder does not depend on the order in which its parts are built.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from torch import Tensor, nn

_PARENT_INITIALISES = ContextVar("_PARENT_INITIALISES", default=False)


class Resettable(Protocol):
    """A module that can set its initial weights."""

    def reset_parameters(self) -> None:
        """Set the initial weights in place, those of all parts included."""


@contextmanager
def parent_initialises() -> Iterator[None]:
    """Let modules that are built inside leave their weights unset, because the caller sets them."""
    token = _PARENT_INITIALISES.set(True)
    try:
        yield
    finally:
        _PARENT_INITIALISES.reset(token)


def initialise(module: Resettable) -> None:
    """Set a module's initial weights at the end of its construction, unless the module around it does that."""
    if not _PARENT_INITIALISES.get():
        module.reset_parameters()


def init_matrix(weight: Tensor, d_in: int, d_out: int) -> None:
    """Fill a matrix from N(0, std²) with std = d_in^−½ · min(1, sqrt(d_out / d_in)) (paper's settings)."""
    std = d_in**-0.5 * min(1.0, (d_out / d_in) ** 0.5)
    nn.init.normal_(weight, mean=0.0, std=std)
