"""Readers of the log formats of other programs."""
