"""The optimizer: Muon and AdamW as one, parameter groups, and learning-rate schedules."""

from lightning_moe.optim.clipping import clip_by_global_norm, global_norm
from lightning_moe.optim.grouping import OptimizerConfig, build_optimizer
from lightning_moe.optim.muon_adamw import MuonAdamW
from lightning_moe.optim.schedule import ScheduleConfig, build_schedule

__all__ = [
    "MuonAdamW",
    "OptimizerConfig",
    "ScheduleConfig",
    "build_optimizer",
    "build_schedule",
    "clip_by_global_norm",
    "global_norm",
]
