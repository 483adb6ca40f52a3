"""Arrays on many devices, and several processes."""
