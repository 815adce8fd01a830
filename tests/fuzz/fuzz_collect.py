"""Run many bad inputs and collect what is wrong, by kind: ``python tests/fuzz/fuzz_collect.py --help``."""

from __future__ import annotations

import argparse
import gc
import re
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from fuzz_inputs import BASES, REFUSED_BASES, make_input
from fuzz_judge import Problem, judge
from fuzz_mutations import Input
from fuzz_place import Place, copy, import_everything, remove, snapshot


@dataclass
class Kind:
    """All failures of one kind.

    Args:
        example: command line of one of them, to paste into a shell.
        detail: what happened.
        count: how many there were.
    """

    example: str
    detail: str
    count: int = 1


@dataclass
class Collection:
    """What a series of inputs showed.

    Args:
        kinds: kind → its failures.
        outcomes: how the inputs ended → how many.
        seconds: wall time of all inputs.
        slowest: seconds and command line of the slowest ones.
    """

    kinds: dict[str, Kind] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    slowest: list[tuple[float, str]] = field(default_factory=list)

    def table(self) -> str:
        lines = [f"{sum(self.outcomes.values())} inputs in {self.seconds:.0f} s: {dict(self.outcomes.most_common())}"]
        for kind, found in sorted(self.kinds.items(), key=lambda item: (-item[1].count, item[0])):
            lines += ["", f"{found.count:4} × {kind}", f"       {found.detail}", f"       {found.example}"]
        return "\n".join(lines)


def collect(number: int, folder: Path, random_seed: int = 0, seconds: float = 60) -> Collection:
    """Run inputs and judge them.

    Args:
        number: number of inputs.
        folder: empty folder; the examples are kept in it.
        random_seed: seed of the inputs.
        seconds: time that an input may take.
    """
    import_everything()
    place, collection = Place(folder, seconds), Collection()
    kept = folder / "kept"
    kept.mkdir()
    pristine: dict[str, tuple[object, ...]] = {}

    def attempt(given_input: Input) -> tuple[list[Problem], str]:
        nonlocal pristine
        if not pristine or snapshot(place.work) != pristine:
            pristine = snapshot(place.fresh())
        argv = given_input.apply(place.work)
        if argv is None:
            return [], "no input"
        before = snapshot(place.work)
        outcome = place.run(argv)
        problems = judge(given_input.argv[0], given_input.mutations, outcome, before, snapshot(place.work))
        how = (outcome.accepted or "").split(" ")[0] or f"exit code {outcome.code}"
        collection.slowest = sorted([*collection.slowest, (outcome.seconds, repr(argv)[:200])])[-10:]
        return problems, "failure" if problems else how

    def look(given_input: Input) -> None:
        problems, how = attempt(given_input)
        collection.outcomes[how] += 1
        for problem in problems:
            known = collection.kinds.get(problem.kind)
            if known is not None:
                known.count += 1
                continue
            smaller, smallest = _smallest(given_input, problem, attempt)
            example = kept / str(len(collection.kinds))
            argv = smaller.apply(place.fresh())
            remove(example)
            copy(place.work, example)
            pristine.clear()
            changes = "; ".join(shortened(repr(mutation)) for mutation in smaller.mutations)
            collection.kinds[problem.kind] = Kind(paste(argv or [], example, place), f"{changes} → {smallest.detail}")
            collection.seconds = time.monotonic() - started
            (folder / "table.txt").write_text(collection.table(), encoding="utf-8", errors="replace")

    gc.freeze()  # a collection in a fork would copy all pages
    started = time.monotonic()
    for base in BASES:
        place.fresh()
        outcome = place.run(list(base))
        if outcome.accepted is None and outcome.code not in (0, 5) and base not in REFUSED_BASES:
            collection.kinds[f"{base[0]}: the command itself fails"] = Kind(" ".join(base), repr(outcome)[-500:])
    for index in range(number):
        look(make_input(index, random_seed))
    collection.seconds = time.monotonic() - started
    return collection


def _smallest(
    given_input: Input, problem: Problem, attempt: Callable[[Input], tuple[list[Problem], str]]
) -> tuple[Input, Problem]:
    """Return the input with one change only that shows the same, if there is one."""
    if len(given_input.mutations) > 1:
        for mutation in given_input.mutations:
            alone = Input(given_input.argv, (mutation,))
            for found in attempt(alone)[0]:
                if found.kind == problem.kind:
                    return alone, found
    return given_input, problem


def paste(argv: list[str], folder: Path, place: Place) -> str:
    """Return a line for bash that runs a command in a kept folder."""
    variables = ("XDG_STATE_HOME", "LIGHTNING_MOE_CACHE")
    settings_ = " ".join(f"{name}={place.environment[name]}" for name in variables)
    return f"cd {folder} && {settings_} python -m lightning_moe {' '.join(map(_quoted, argv))}"


def shortened(text: str) -> str:
    """Return a text in which a long repetition of a character is one of them and their number."""
    return re.sub(r"(.{1,2})\1{30,}", lambda found: f"{found[1]}…×{len(found[0])}", text)


def _quoted(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    special = {ord("'"): "\\'", ord("\\"): "\\\\"}
    encoded = word.translate(special).encode("utf-8", "surrogateescape")
    return "$'" + "".join(chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}" for byte in encoded) + "'"


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60, help="time for one input")
    parser.add_argument("--folder", type=Path, help="new folder, in which examples are kept")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="fuzz-collect-"))
    folder.mkdir(parents=True, exist_ok=True)
    import torch

    torch.set_num_threads(1)
    collection = collect(options.inputs, folder, options.seed, options.seconds)
    print(collection.table())
    for seconds, argv in collection.slowest:
        print(f"{seconds:6.1f} s {argv}")


if __name__ == "__main__":
    _main()
