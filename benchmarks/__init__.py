"""Timings as ratios: the MoE layer, the training step, decoding, memory, and the cost of routing state."""
