"""One small task for every host, whose stop the plain loop knows."""

from __future__ import annotations

import os

# Read when Keras is first imported, by whatever test that is.
os.environ["KERAS_BACKEND"] = "torch"
