"""Parts of torch that are private or called experimental."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd, wait_tensor

__all__ = [
    "all_to_all_single",
    "all_to_all_single_autograd",
    "compile_with_sizes_that_depend_on_data",
    "fake_tensors",
    "size_with",
    "storage_id",
    "wait_tensor",
]


def compile_with_sizes_that_depend_on_data() -> None:
    """Let ``torch.compile`` put operations into its graphs whose number of output rows depends on data."""
    import torch._dynamo as dynamo

    dynamo.config.capture_dynamic_output_shape_ops = True


def fake_tensors() -> AbstractContextManager[Any]:
    """Return a context in which tensors have shapes, dtypes and gradients, but no data.

    A size that depends on data, such as that of ``nonzero``, is a symbol there.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(shape_env=ShapeEnv(allow_dynamic_output_shape_ops=True))


def size_with(size: int | torch.SymInt, value: int) -> int:
    """Compute a size with ``value`` in the place of every symbol in it."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.xreplace(dict.fromkeys(expression.free_symbols, value)))


def storage_id(storage: torch.UntypedStorage) -> int:
    """Return a number that a storage shares with no other one while it lives; those of fake tensors have one, too."""
    number: int = storage._cdata
    return number
