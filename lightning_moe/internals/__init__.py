"""Private doors of other libraries: every name with an underscore that is used of somebody else's object.

One file per library. Each function says in which version its door was seen and what to do when an upgrade moves it;
`tests/internals/` fails when a library changes under it.
"""
