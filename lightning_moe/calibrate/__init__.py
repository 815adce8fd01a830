"""Thresholds of any model from the quantiles of its router's scores on text."""

from lightning_moe.calibrate.measure import Measurement, difference, measure
from lightning_moe.calibrate.outcome import REPORT_FILE, Outcome, calibrate_and_measure
from lightning_moe.calibrate.target import Target, target_model
from lightning_moe.calibrate.thresholds import calibrate
from lightning_moe.calibrate.windows import Windows

__all__ = [
    "REPORT_FILE",
    "Measurement",
    "Outcome",
    "Target",
    "Windows",
    "calibrate",
    "calibrate_and_measure",
    "difference",
    "measure",
    "target_model",
]
