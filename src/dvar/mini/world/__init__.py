"""The picture book: the world of the bundled model, drawn by code.

Importing any of its rooms enters every class in `classes.CLASSES`.
"""

from dvar.mini.world import animals, household, outdoors

__all__ = ["animals", "household", "outdoors"]
