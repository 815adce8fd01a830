"""``python -m lightning_moe <command>``."""

from lightning_moe.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
