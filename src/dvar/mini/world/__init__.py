"""The world of the bundled model, rendered by code."""

# Importing any of these modules registers every class in `classes.CLASSES`.

from dvar.mini.world import animals, household, outdoors

__all__ = ["animals", "household", "outdoors"]
