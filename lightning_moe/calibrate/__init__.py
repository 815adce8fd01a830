"""Thresholds of any checkpoint from the quantiles of its router's scores on text."""

from lightning_moe.calibrate.measure import Measurement, measure
from lightning_moe.calibrate.target import Target, target_model
from lightning_moe.calibrate.thresholds import calibrate

__all__ = ["Measurement", "Target", "calibrate", "measure", "target_model"]
