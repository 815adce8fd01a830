"""What we use of torch's private parts does what we use it for."""

import pytest
import torch
from helpers.gloo_pair import GlooPair
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lightning_moe.internals.torch import (
    all_to_all_single,
    all_to_all_single_autograd,
    any_number_of_rows,
    compile_in_place,
    compile_with_sizes_that_depend_on_data,
    fake_tensors,
    size_with,
    storage_id,
    undo_compilation,
    wait_tensor,
)


def test_sizes_without_data_are_symbols_that_can_be_replaced() -> None:
    with fake_tensors():
        x = torch.ones(4, 8)
        rows = x[torch.empty(4, dtype=torch.bool)]
        kept = torch.cat([rows, rows])
    assert size_with(x.untyped_storage().nbytes(), 3) == 4 * 8 * 4
    assert not isinstance(kept.untyped_storage().nbytes(), int)
    assert size_with(kept.untyped_storage().nbytes(), 3) == 2 * 3 * 8 * 4


@pytest.mark.parametrize("fake", [False, True])
def test_views_share_the_number_of_their_storage(fake: bool) -> None:
    with fake_tensors() if fake else torch.no_grad():
        x, other = torch.ones(4), torch.ones(4)
    assert storage_id(x.untyped_storage()) == storage_id(x[1:].untyped_storage())
    assert storage_id(x.untyped_storage()) != storage_id(other.untyped_storage())


def test_a_graph_holds_what_has_as_many_rows_as_the_data_say() -> None:
    compile_with_sizes_that_depend_on_data()

    @torch.compile(backend="eager", fullgraph=True)
    def positions(x: Tensor) -> Tensor:
        return x.nonzero() + 1

    assert positions(torch.tensor([0, 5, 7])).flatten().tolist() == [2, 3]


def exchange(rank: int) -> tuple[list[int], list[float], list[float]]:
    """Rank 0 sends 1 row to itself and 2 to rank 1; rank 1 sends 3 and 0."""
    group = torch.distributed.group.WORLD
    sent = [[1, 2], [3, 0]][rank]
    received = wait_tensor(all_to_all_single(torch.tensor(sent), None, None, group)).tolist()
    rows = torch.arange(3.0).add(10 * rank).requires_grad_()
    arrived = wait_tensor(all_to_all_single_autograd(rows, received, sent, group))
    (arrived * (rank + 1)).sum().backward()
    return received, arrived.tolist(), rows.grad.tolist()


def test_rows_and_their_gradients_travel(gloo_pair: GlooPair) -> None:
    assert gloo_pair.run(exchange, [(0,), (1,)]) == [
        ([1, 3], [0, 10, 11, 12], [1, 2, 2]),
        ([2, 0], [1, 2], [1, 1, 1]),
    ]


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_module_is_compiled_in_place_for_any_number_of_rows_and_can_be_undone() -> None:
    torch.compiler.reset()
    counter, module = CompileCounter(), Double()
    compile_in_place(module, 20, backend=counter)
    assert torch._dynamo.config.recompile_limit >= 20
    for rows in (4, 4, 2, 3):
        assert torch.equal(module(any_number_of_rows(torch.ones(rows, 2))), 2 * torch.ones(rows, 2))
    assert counter.frame_count == 1
    for columns in (5, 6):  # sizes that are not marked are constants
        module(any_number_of_rows(torch.ones(4, columns)))
    assert counter.frame_count == 3
    undo_compilation(module)
    module(torch.ones(4, 9))
    assert counter.frame_count == 3
