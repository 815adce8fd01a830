"""A stand-in for ``fit`` that keeps the same record without a model: starts in a tenth of a second.

Its loss is (ema_decay − 0.9)² + seed/1000 + 1/step. ``adamw_lr`` > 1 crashes, > 0.5 diverges.
"""

import json
import sys
import time
from pathlib import Path

import yaml

arguments = dict(zip(sys.argv[1:], [*sys.argv[2:], ""], strict=True))
flags = dict(argument.split("=", 1) for argument in sys.argv[1:] if argument.startswith("--") and "=" in argument)
config = yaml.safe_load(Path(arguments["--config"]).read_text())
folder = Path(arguments["--output_dir"]) / (arguments.get("--run_name") or flags["--run_name"])
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
last = folder / "checkpoints" / "last.ckpt"
start = int(last.read_text()) if last.exists() else 0
with (folder / "starts").open("a") as starts:
    starts.write(f"{start}\n")
(folder / "tags.json").write_text(flags.get("--tracking.tags", "{}"))
steps = int(flags.get("--trainer.max_steps", config["trainer"]["max_steps"]))
beta, rate = config["model"]["routing"]["init_args"]["ema_decay"], config["model"]["optimizer"]["adamw_lr"]
if rate > 1:
    print("Traceback …\nRuntimeError: out of memory")
    sys.exit(1)
if rate > 0.5:
    print("error: The loss is not finite at step 1")
    sys.exit(3)
with (folder / "metrics.jsonl").open("a") as metrics:
    for step in range(start + 1, steps + 1):
        loss = (beta - 0.9) ** 2 + config["seed_everything"] / 1000 + 1 / step
        metrics.write(json.dumps({"step": step, "time": time.time(), "val/loss": loss}) + "\n")
        metrics.flush()
        time.sleep(0.02)
        last.with_suffix(".tmp").write_text(str(step))
        last.with_suffix(".tmp").rename(last)
(folder / "summary.json").write_text(json.dumps({"loss": loss, "flops_per_token": 1000 * beta, "sample": "text"}))
with (folder / "ends").open("a") as ends:
    ends.write("end\n")
