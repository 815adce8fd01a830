"""lightning_moe: an experiment platform for Mixture-of-Experts routing, on PyTorch Lightning."""

__version__ = "0.1.0"
