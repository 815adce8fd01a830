"""What is measured in training and evaluation: a catalogue of all metrics, and those that sum over ranks."""
