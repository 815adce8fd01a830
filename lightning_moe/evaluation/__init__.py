"""Checkpoints in EleutherAI's lm-evaluation-harness (the extra ``lm-eval``); importing this needs no harness."""
