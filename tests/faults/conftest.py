"""One workplace per layout, with the run that nothing happens to; the tests make other runs beside it."""

from collections.abc import Callable

import pytest
from fault_runs import Workplace


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Workplace]:
    """By layout."""
    made: dict[str, Workplace] = {}

    def of(layout: str = "1 process") -> Workplace:
        if layout not in made:
            made[layout] = Workplace(tmp_path_factory.mktemp("faults") / "work", layout)
            done = made[layout].fit("--run_name=whole")
            assert done.code == 0, done.output
        return made[layout]

    return of
