"""What a run will take, computed from its configuration before anything is allocated."""

from lightning_moe.plan.devices import DEVICES, Device, find_device
from lightning_moe.plan.memory import STRATEGIES, MemoryPlan, memory_plan
from lightning_moe.plan.saved import SavedActivations, saved_activations

__all__ = [
    "DEVICES",
    "STRATEGIES",
    "Device",
    "MemoryPlan",
    "SavedActivations",
    "find_device",
    "memory_plan",
    "saved_activations",
]
