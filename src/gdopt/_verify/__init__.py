"""The verification of a claim to be at a minimum."""
