"""gdopt's optimizers, and what makes any optimizer one for the loop."""
