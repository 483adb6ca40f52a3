"""The outcome of a run: its message, its success, and the origin of a NaN."""
