"""A run's folder on disk: its name, its files, and what a command needs of the run that wrote a checkpoint."""
