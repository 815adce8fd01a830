"""Training a model: the run from its configuration to its summary, its checkpoints, its processes, its progress."""
