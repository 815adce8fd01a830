"""``python -m lightning_moe.evaluation``: the harness's own command, which knows ``--model lightning_moe``."""

from __future__ import annotations

import sys

from lightning_moe.errors import UserError


def main() -> int:
    """Run the harness on ``sys.argv`` and return the exit code: 0, or 2 for bad input."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        print(f"error: lm-evaluation-harness: {error}: pip install -e '.[lm-eval]' in a checkout", file=sys.stderr)
        return 2
    import torch

    import lightning_moe.evaluation.lm_eval  # noqa: F401 - registers the model

    if sys.argv[1:2] == ["run"] and not torch.cuda.is_available() and not any("--device" in arg for arg in sys.argv):
        sys.argv += ["--device", "cpu"]  # the harness's own default is cuda:0
    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
