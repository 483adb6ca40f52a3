"""Traces and executables: equal programs share one."""
