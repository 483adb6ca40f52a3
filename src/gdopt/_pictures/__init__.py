"""The pictures of `gdopt.plot`, one module for each kind."""
