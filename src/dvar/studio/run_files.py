"""The names of the files that the studio writes into the folder of a run, beside those of the run itself."""

from __future__ import annotations

IMAGES = "images"
"""The instance images that were dropped, with their captions."""
SETTINGS = "settings.toml"
"""The settings of the run, as `dvar train METHOD --config` reads them."""
REQUEST = "queued.json"
"""A request to train, until its turn has come: the method, the moment, and whether the run is resumed."""
HELD = "held.json"
"""A request that was taken out of the queue."""
STARTED = "started.json"
"""The process that was started for the run, from its turn on until it ends."""
LOG = "training.log"
"""What the training process prints."""
SCORES = "scores.json"
"""Likeness and obedience of the sample images by step, with the CLIP that measured them."""

HOME = ".studio"
"""The folder in the library with what belongs to no run: the draft of the next one."""
QUEUE_LOCK = ".queue.lock"
"""The lock of the process that trains the queued runs, in the library."""
