"""What is said of a run that has ended."""
