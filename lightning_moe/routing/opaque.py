"""Operations that ``torch.compile`` puts into its graphs without looking inside.

Selections are made of sorts, scans and scatters, which code generators do worst: Inductor of torch 2.11 fails on the
int64 ``cumsum`` of `pooling.top_count_mask` over 16,384 tokens on CUDA. They have no gradient, and there is next to
nothing to fuse.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def opaque(result: Callable[P, Tensor]) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Return a decorator that makes a function one operation for ``torch.compile``; elsewhere it stays as it is.

    The function takes tensors, numbers and `None`, has annotations for them, and changes no argument. Its result has no
    gradient and shares no memory with an argument.

    Args:
        result: function of the same arguments that makes an empty tensor with shape, dtype and strides of the result.
    """

    def decorate(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
        operation = torch.library.custom_op(f"lightning_moe::{function.__name__.strip('_')}", function, mutates_args=())
        operation.register_fake(result)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            found: Tensor = (operation if torch.compiler.is_compiling() else function)(*args, **kwargs)
            return found

        return call

    return decorate
