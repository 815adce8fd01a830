"""Two steps of training before the first trial: what does a run log, and does it run at all?"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from lightning_moe.errors import UserError
from lightning_moe.filenames import CONFIG_FILE
from lightning_moe.sweep.configuration import write_trial_config
from lightning_moe.sweep.results import final_values, last_line
from lightning_moe.sweep.spec import Sweep

FLAGS = (
    "--run_name=probe",
    "--tracking.enabled=false",
    "--trainer.max_steps=2",
    # a warm-up longer than the run is refused, and this run is shorter than any that is meant
    "--model.schedule.adamw_warmup_steps=0",
    "--model.schedule.muon_warmup_steps=0",
    "--trainer.limit_val_batches=1",
    "--trainer.log_every_n_steps=1",
)


def probe(sweep: Sweep, fit: Sequence[str]) -> None:
    """Train the first corner of the space for two steps and see that every objective is among what it logs.

    It also prepares the data, which all trials then find in the cache.

    Args:
        sweep: the sweep.
        fit: the command that trains, before its options.

    Raises:
        UserError: the run fails, or an objective is not logged.
    """
    with tempfile.TemporaryDirectory(prefix="lightning_moe-probe-") as temporary:
        folder = Path(temporary)
        config, log = folder / CONFIG_FILE, folder / "log"
        write_trial_config(sweep, next(sweep.space.corners()), sweep.seeds[0], config)
        command = [*fit, "--config", str(config), "--output_dir", temporary, *FLAGS]
        with log.open("wb") as output:
            code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
        if code:
            kept = sweep.folder / "probe.log"
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(log.read_bytes())
            raise UserError(
                f"{sweep.path}: a first run of two steps ends with exit code {code}: {last_line(log)} (log: {kept})"
            )
        logged = final_values(folder / "probe")
    for metric in sweep.objectives:
        if metric not in logged:
            near = get_close_matches(metric, logged, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it logs {', '.join(sorted(logged))}"
            raise UserError(f"{sweep.path}: objectives: {metric!r} is not logged by a run of two steps: {hint}")
    if sys.stdout.isatty():
        print("A first run of two steps went well.")
