"""Two thousand bad inputs: each is used, or refused in a line that names the key or the file, and changes nothing.

``python tests/fuzz/fuzz_collect.py --inputs 500 --seed 7`` tries others.
"""

import sys
from pathlib import Path

import pytest
from fuzz_collect import collect


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses /proc, pidfd and device files")
def test_bad_input_is_used_or_refused_in_one_line(tmp_path: Path) -> None:
    collection = collect(2000, tmp_path)
    print(collection.table())
    assert not collection.kinds, f"\n{collection.table()}"
