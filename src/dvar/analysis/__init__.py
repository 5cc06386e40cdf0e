"""Strategies that end a run, and how good their stops are."""
