"""Comparison of finished runs: means over seeds with intervals, and paired differences to a baseline."""
