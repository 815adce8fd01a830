"""Timings as ratios, side by side: the MoE layer, the training step, decoding, and what routing state costs."""
