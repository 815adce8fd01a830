"""The experiment that the tests of the command line train, and how they call the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_moe.runs.loading import run_data

#: arguments → exit code, stdout, stderr
Command = Callable[..., tuple[int, str, str]]

SMALL: dict[str, Any] = {
    "model": {
        "decoder": {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "num_experts": 4},
        "schedule": {"kind": "constant", "adamw_warmup_steps": 1},
    },
    "data": {"sequence_length": 16, "global_batch_size": 8, "tokenizer": {"vocab_size": 300}},
    "threshold_warmup": {"steps": 0.5},
    "tracking": {"enabled": False},
    "trainer": {
        "max_steps": 4,
        "val_check_interval": 2,
        "limit_val_batches": 2,
        "limit_test_batches": 2,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
    },
}


def tokenizer_of(ckpt: str) -> str:
    """The tokenizer file of a checkpoint's run; the cache of a session holds several."""
    return str(run_data(Path(ckpt), "").store.directory / "tokenizer.json")
