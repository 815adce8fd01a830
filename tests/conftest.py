"""One thread per test process (tiny tensors; machines with few cores), and no time limits in property tests."""

import signal
from collections.abc import Iterator

import pytest
import torch
from helpers.gloo_pair import GlooPair
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("quick", deadline=None, max_examples=50)
settings.load_profile("quick")
# A suite that a script starts in the background inherits an ignored Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def gloo_pair() -> Iterator[GlooPair]:
    """Two processes that form one gloo group, shared by all tests of the session."""
    with GlooPair() as pair:
        yield pair
