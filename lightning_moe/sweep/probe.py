"""Two steps of training before the first trial, to see that a run works and which metrics it logs."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lightning_moe.errors import UserError, did_you_mean
from lightning_moe.sweep.configuration import write_trial_config
from lightning_moe.sweep.pool import Pool, PoolRun, say
from lightning_moe.sweep.results import final_values
from lightning_moe.sweep.spec import Sweep

FLAGS = (
    "--tracking.enabled=false",
    "--trainer.max_steps=2",
    # a warm-up longer than the run is refused, and this run is shorter than any trial
    "--model.schedule.adamw_warmup_steps=0",
    "--model.schedule.muon_warmup_steps=0",
    "--threshold_warmup.steps=0",
    "--threshold_warmup.tokens=null",
    "--threshold_warmup.auto=false",
    "--trainer.limit_val_batches=1",
    "--trainer.log_every_n_steps=1",
)


def probe(sweep: Sweep) -> None:
    """Train the first corner of the space for two steps, and check that it logs every objective.

    It also prepares the data, which all trials then find in the cache.

    Raises:
        UserError: the run fails, or an objective is not logged.
    """
    with tempfile.TemporaryDirectory(prefix="lightning_moe-probe-") as temporary:
        run = PoolRun(Path(temporary), "probe")
        write_trial_config(sweep, next(iter(sweep.space.corners())), sweep.seeds[0], run.config)
        with Pool[PoolRun](1) as pool:
            pool.start(run, {}, FLAGS)
            ((_, outcome),) = pool.wait()
        if outcome.kind != "finished":
            kept = sweep.folder / "probe.log"
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(run.log.read_bytes())
            raise UserError(f"{sweep.path}: a first run of two steps {outcome.kind}: {outcome.reason} (log: {kept})")
        logged = final_values(run.folder)
    for metric in sweep.objectives:
        if metric not in logged:
            hint = did_you_mean(metric, sorted(logged), "it logs")
            raise UserError(f"{sweep.path}: objectives: {metric!r} is not logged by a run of two steps: {hint}")
    say("the first run of two steps went well")
