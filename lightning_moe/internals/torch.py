"""Parts of torch that are private or called experimental."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd, wait_tensor

__all__ = [
    "all_to_all_single",
    "all_to_all_single_autograd",
    "any_number_of_rows",
    "compile_in_place",
    "compile_with_sizes_that_depend_on_data",
    "fake_tensors",
    "size_with",
    "storage_id",
    "undo_compilation",
    "wait_tensor",
]


def compile_with_sizes_that_depend_on_data() -> None:
    """Let ``torch.compile`` put operations into its graphs whose number of output rows depends on data."""
    import torch._dynamo as dynamo

    dynamo.config.capture_dynamic_output_shape_ops = True


def compile_in_place(
    module: nn.Module,
    graphs: int,
    on_failure: Callable[[Exception], None] | None = None,
    backend: str | Callable[..., Any] = "inductor",
) -> None:
    """Compile the call of a module as ``Module.compile`` does, with sizes that are known when it is compiled.

    Up to torch 2.11 the method takes no ``recompile_limit``, so torch's setting for all functions is raised. In both
    versions the method keeps the compiled call in ``_compiled_call_impl``. On an upgrade, look at ``Module.compile``.

    Args:
        module: module to compile.
        graphs: number of graphs that the code of its class may have, over all modules of this class.
        on_failure: function that is called with the compiler's error; the module then runs as it was, from this call
            on. `None` raises the error.
        backend: back end of ``torch.compile``.
    """
    import torch._dynamo as dynamo
    from torch._functorch import config as autograd

    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, graphs)
    module.compile(dynamic=False, backend=backend)
    if on_failure is None:
        return
    autograd.force_non_lazy_backward_lowering = True  # an error in the backward pass would come too late
    compiled: Callable[..., Any] = module._compiled_call_impl  # type: ignore[assignment]

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except dynamo.exc.TorchDynamoException as error:
            undo_compilation(module)
            on_failure(error)
            return module(*args, **kwargs)

    module._compiled_call_impl = call


def undo_compilation(module: nn.Module) -> None:
    """Let a module run as if it had never been compiled."""
    module._compiled_call_impl = None


def any_number_of_rows(x: torch.Tensor) -> torch.Tensor:
    """Let the graph that is compiled for ``x`` [B, ...] serve every B but 1, and return ``x``."""
    import torch._dynamo as dynamo

    dynamo.maybe_mark_dynamic(x, 0)
    return x


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
