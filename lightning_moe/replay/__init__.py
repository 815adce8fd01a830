"""Routing replay: the experts of a generation on record, and passes over its tokens that take them again."""

from lightning_moe.replay.file import read_routes, write_routes
from lightning_moe.replay.record import Recorder, generate_routes, weights_fingerprint
from lightning_moe.replay.routes import Made, ReplayBatch, Routes
from lightning_moe.replay.score import Divergence, Flips, Score, score

__all__ = [
    "Divergence",
    "Flips",
    "Made",
    "Recorder",
    "ReplayBatch",
    "Routes",
    "Score",
    "generate_routes",
    "read_routes",
    "score",
    "weights_fingerprint",
    "write_routes",
]
