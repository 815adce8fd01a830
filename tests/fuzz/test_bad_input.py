"""Two thousand bad inputs: each is used, or refused in a line that names the key or the file, and changes nothing.

``python tests/fuzz/fuzz_collect.py --inputs 500 --seed 7`` tries others.
"""

import sys
from pathlib import Path

import pytest
from fuzz_collect import collect


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses /proc, pidfd and device files")
@pytest.mark.parametrize("seed", range(4))  # so that several test processes share the work
def test_bad_input_is_used_or_refused_in_one_line(seed: int, tmp_path: Path) -> None:
    collection = collect(500, tmp_path, random_seed=seed)
    print(collection.table())
    assert not collection.kinds, f"\n{collection.table()}"
