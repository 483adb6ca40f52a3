"""The problem of a call, checked."""
