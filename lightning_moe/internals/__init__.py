"""Private names of other libraries that this package uses, one file per library.

Each function says in which version it found the name and what to do on an upgrade. `tests/internals/` fails when a
library changes such a name.
"""
