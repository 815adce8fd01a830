"""An experiment that a process of its own trains in seconds: its text, and its configuration."""

from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "model.decoder": {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "num_experts": 4},
    "data": {"sequence_length": 16, "global_batch_size": 8, "tokenizer": {"vocab_size": 300}},
    "threshold_warmup.steps": 2,
    "model.schedule.adamw_warmup_steps": 1,
}


def write_tiny_experiment(folder: Path, **trainer: Any) -> dict[str, Any]:
    """Write the text into ``folder`` and return the configuration, in dotted keys.

    Args:
        folder: an empty folder.
        trainer: keys of ``trainer``.
    """
    (folder / "text").mkdir()
    for number in range(200):
        lines = [f"line {i} of file {number} says {(i * number) % 97} in words" for i in range(12)]
        (folder / "text" / f"{number:03}.txt").write_text("\n".join(lines))
    corpus = {"class_path": "LocalFiles", "init_args": {"paths": [str(folder / "text")]}}
    options = {"limit_val_batches": 2, "log_every_n_steps": 1, "enable_progress_bar": False} | trainer
    return CONFIG | {"data": CONFIG["data"] | {"corpus": corpus}, "trainer": options}
