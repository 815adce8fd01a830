"""Timings as ratios, side by side: the MoE layer, the training step, decoding, memory, and what routing state costs."""
