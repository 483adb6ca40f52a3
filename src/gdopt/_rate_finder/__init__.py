"""The learning-rate finder, and the rates of "auto" for mini-batches."""
