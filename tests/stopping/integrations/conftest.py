"""The backend of Keras for these tests."""

from __future__ import annotations

import os

# Read when Keras is first imported, by whatever test that is.
os.environ["KERAS_BACKEND"] = "torch"
