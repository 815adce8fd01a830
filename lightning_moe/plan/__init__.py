"""What a run will take, computed from its configuration before anything is allocated."""

from lightning_moe.plan.memory import STRATEGIES, MemoryPlan, memory_plan
from lightning_moe.plan.saved import SavedActivations, saved_activations

__all__ = [
    "STRATEGIES",
    "MemoryPlan",
    "SavedActivations",
    "memory_plan",
    "saved_activations",
]
