"""Checkpoints on disk: one file, a sharded folder, or an export, read as the same dictionary."""
