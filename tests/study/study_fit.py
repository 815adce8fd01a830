"""A stand-in for ``fit`` that keeps a run's record without a model.

Its loss is 3 + log10(muon_lr / best)² + seed / 100 (+ ema_decay for Expert Threshold), with best = 0.04 for token
choice and 0.02 for the others; one tenth less in training. ``muon_lr`` > 1 diverges, and so does ``head_lr`` < 1e-9;
``head_lr`` > 1 crashes unless a file ``repaired`` is there, and every step takes ``embedding_lr`` seconds.
"""

import json
import math
import sys
import time
from pathlib import Path

import yaml

STEPS = 10
arguments = dict(zip(sys.argv[1:], [*sys.argv[2:], ""], strict=True))
tags = json.loads(next(a for a in sys.argv if a.startswith("--tracking.tags=")).partition("=")[2])
config = yaml.safe_load(Path(arguments["--config"]).read_text())
folder = Path(arguments["--output_dir"]) / arguments["--run_name"]
folder.mkdir(parents=True, exist_ok=True)
with (folder / "starts").open("a") as starts:
    starts.write("start\n")
optimizer, routing = config["model"].get("optimizer", {}), config["model"]["routing"]
muon_lr, head_lr = optimizer.get("muon_lr", 0.02), optimizer.get("head_lr", 0.1)
if muon_lr > 1 or head_lr < 1e-9:
    print("error: The loss is not finite at step 1")
    sys.exit(3)
if head_lr > 1 and not Path("repaired").exists():
    print("Traceback …\nRuntimeError: out of memory")
    sys.exit(1)
best = 0.04 if "TokenChoice" in routing["class_path"] else 0.02
decay = (routing.get("init_args") or {}).get("ema_decay") or 0.0
loss = 3 + math.log10(muon_lr / best) ** 2 + config["seed_everything"] / 100 + decay
config["trainer"] |= {"precision": "32-true", "limit_val_batches": None}
(folder / "config.yaml").write_text(yaml.safe_dump(config))
with (folder / "metrics.jsonl").open("a") as metrics:
    every = config["trainer"]["log_every_n_steps"]
    for step in range(every - 1, STEPS, every):
        metrics.write(json.dumps({"step": step, "time": time.time(), "train/loss": loss - 0.1 + (step < 9)}) + "\n")
        metrics.flush()
        time.sleep(optimizer.get("embedding_lr", 0))
event = {
    "event": "tags",
    "time": 0.0,
    "tags": {"git_commit": "abcdef0123", "git_dirty": "false", "device": "a CPU"} | tags,
}
(folder / "tracking.jsonl").write_text(json.dumps(event) + "\n")
data = {"fingerprint": "f", "tokenizer": "t", "corpus": "Text", "vocab_size": 256, "sequence_length": 32}
data |= {"validation_documents": 2, "validation_tokens": 99, "validation_bytes": 300}
summary = {
    "loss": loss,
    "bits_per_byte": loss / 2,
    "steps": STEPS,
    "train_tokens": 640,
    "world_size": 1,
    "micro_batch_size": 4,
    "segments": [],
    "data": data,
}
summary |= {
    "layers": {"layer_01": {"fanout_mean": 0.75, "max_load": 1.5}},
    "flops_per_token": 9,
    "tokens_per_second": 9,
}
summary |= {"total_parameters": 4_000_000, "active_parameters": 1_000_000}
(folder / "summary.json").write_text(json.dumps(summary))
