"""What is wrong with how a command line ended."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fuzz_child import Outcome
from fuzz_keys import keys
from fuzz_mutations import Mutation

#: docs/running.md
EXIT_CODES = (0, 2, 3, 4, 6, 130, 143, 141)
OF_AUDIT = (1, 5)
#: files that another part of the machine writes, or that hold nothing of the user's
NOT_OURS = ("PWNED",)


@dataclass(frozen=True)
class Problem:
    """One wrong thing.

    Args:
        kind: same text for the same fault in the code.
        detail: text of this case.
    """

    kind: str
    detail: str


def judge(
    command: str,
    mutations: Sequence[Mutation],
    outcome: Outcome,
    before: Mapping[str, tuple[Any, ...]],
    after: Mapping[str, tuple[Any, ...]],
) -> list[Problem]:
    """Return what is wrong; nothing if the input was used, or refused as docs/running.md promises.

    Args:
        command: name of the command.
        mutations: changes of the base command line.
        outcome: how it ended.
        before: `fuzz_place.snapshot` of the folder before.
        after: the same after it.
    """
    problems = []
    last = (outcome.stderr.strip().splitlines() or [""])[-1]
    place = re.sub(r":\d+", "", outcome.place or "")
    if "PWNED" in after:
        problems.append(Problem("RAN CODE OF A FILE", "os.system was called"))
    if outcome.hung:
        problems.append(Problem(f"hangs in {place}", f"{outcome.seconds:.0f} s, {outcome.place}"))
    elif outcome.signal is not None:
        problems.append(Problem(f"signal {signal.Signals(outcome.signal).name} in {place}", f"{outcome.place}"))
    elif outcome.exception is not None:
        problems.append(Problem(f"{outcome.exception} in {place}", f"{outcome.place}: {last}"))
    elif "Traceback (most recent call last)" in outcome.stderr + outcome.stdout:
        problems.append(Problem(f"{command}: a traceback in the output, exit code {outcome.code}", last))
    elif outcome.accepted is not None:
        wants_many = any(mutation.wants_many_processes() for mutation in mutations)
        if outcome.accepted.startswith("starts") and wants_many and command in ("fit", "prepare"):
            problems.append(Problem(f"{command}: too many processes are accepted", outcome.accepted))
    elif outcome.code not in (*EXIT_CODES, *(OF_AUDIT if command == "audit" else ())):
        problems.append(Problem(f"{command}: exit code {outcome.code}", last))
    elif outcome.code == 2:
        problems += _judge_refusal(command, mutations, outcome.stderr, before)
        problems += _judge_changes(command, before, after)
    return problems


def _judge_refusal(
    command: str, mutations: Sequence[Mutation], stderr: str, files: Mapping[str, tuple[Any, ...]]
) -> list[Problem]:
    at = stderr.find("error:")
    if at < 0:
        return [Problem(f"{command}: exit code 2 without an error: line", stderr[-300:])]
    message = stderr[at:]
    # a study that is another one, and right; the base's own refusal; a file or key that a changed value leads to
    right = ("no finished run", "no such store", "error: argument ", *(file for file in files if len(file) > 4))
    known = [key.name for key in keys() if "." in key.name]
    named = [name for mutation in mutations for name in mutation.names()]
    leaves = [name.rpartition(".")[2] for name in named]
    if not any(name and name in message for name in (*right, *known, *named, *leaves)):
        words = re.sub(r"'[^']*'|\S*[\d/.]\S*", "…", message.splitlines()[0])
        return [Problem(f"{command}: names neither key nor file: {words[:70]}", message[:300])]
    return []


def _judge_changes(
    command: str, before: Mapping[str, tuple[Any, ...]], after: Mapping[str, tuple[Any, ...]]
) -> list[Problem]:
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    changed = [path for path in changed if path not in NOT_OURS]
    if not changed:
        return []
    words = [
        f"{'+' if path not in before else '-' if path not in after else '~'} "
        f"{'folder ' if after.get(path, ('',))[0] == 0o040000 else ''}{path}"
        for path in changed
    ]
    shape = re.sub(r"\d{8}T\d{6}Z|[\w.]{40,}", "…", words[0])
    return [Problem(f"{command}: refused, but changed: {shape[:60]}", ", ".join(words)[:300])]
