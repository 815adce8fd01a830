"""The end of a message about an unknown name."""

import re
from pathlib import Path

import lightning_moe
from lightning_moe.errors import did_you_mean


def test_the_nearest_name_is_offered_or_all_are_listed() -> None:
    known = {"threshold": 1, "token_choice": 2}
    assert did_you_mean("tresholds", known, "known are") == "did you mean 'threshold'?"
    assert did_you_mean("xyz", known, "the methods are") == "the methods are threshold, token_choice"
    assert did_you_mean(7, ["8"], "known are") == "known are 8"
    assert did_you_mean("x", [], "known are") == "known are none"


def test_nobody_else_looks_for_the_nearest_name() -> None:
    """But for keys of a configuration, which are found by their last part, too."""
    source = Path(lightning_moe.__file__).parent
    found = {p.name for p in source.rglob("*.py") if re.search("did you mean|get_close_matches", p.read_text())}
    assert found == {"errors.py", "explain.py"}
