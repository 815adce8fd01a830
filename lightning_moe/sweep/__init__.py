"""Hyper-parameter sweeps: an Optuna study whose trials are real ``fit`` commands in processes of their own."""
