"""Loss of a released model against its mean number of experts per token, for several ways to choose them."""

from lightning_moe.dial.measure import Point, default_targets, dial
from lightning_moe.dial.methods import METHODS, refusal, use_method

__all__ = ["METHODS", "Point", "default_targets", "dial", "refusal", "use_method"]
