"""Which numbers the host reads from tensors."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

#: operations that give the host a number, or a tensor whose size it must know
READING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2",
    "aten::unique_dim", "aten::repeat_interleave.Tensor", "aten::bincount",
}  # fmt: skip


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in READING:
            ours = [frame for frame in traceback.extract_stack()[:-1] if "/torch/" not in frame.filename]
            self.found.append((func.name(), f"{ours[-1].filename}:{ours[-1].lineno}"))
        return func(*args, **(kwargs or {}))


@contextmanager
def numbers_read() -> Iterator[list[tuple[str, str]]]:
    """Collect the operations by which the host reads numbers inside the block, each with its place in the code."""
    with _Watch() as watch:
        yield watch.found
