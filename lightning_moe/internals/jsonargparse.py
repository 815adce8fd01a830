"""Private names of jsonargparse, as in version 4.53."""

from __future__ import annotations

from typing import Any


def typed_arguments(parser: Any) -> dict[str, Any]:
    """Return dotted key → type of every argument of a parser that has one.

    jsonargparse 4.53 lists arguments only in ``parser._actions``, as argparse does, and keeps a type hint (unlike a
    plain ``type``) in ``_typehint`` of the action. On an upgrade, see whether the parser offers its arguments publicly.

    Args:
        parser: `ArgumentParser` of jsonargparse whose arguments are all added.
    """
    types = {}
    for action in parser._actions:
        typehint = getattr(action, "_typehint", action.type)
        if action.option_strings and typehint is not None and not action.dest.endswith(".help"):
            types[action.dest] = typehint
    return types
