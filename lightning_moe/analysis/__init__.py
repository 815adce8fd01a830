"""What a checkpoint's router does with text, and what its run recorded: numbers, figures and a report."""
