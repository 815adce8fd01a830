"""The one error type for bad input."""


class UserError(ValueError):
    """Input that the user can correct: a key, a file, a layout.

    The message is complete: it names the key or file, the value found, and what would be right. The command line
    prints it without a traceback and exits with code 2.
    """


class TrainingDiverged(RuntimeError):
    """The loss is no longer a number; the message says at which step and where it began. Exit code 3."""
