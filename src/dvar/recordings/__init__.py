"""Recorded runs: what is recorded, how, and how it is read again."""
