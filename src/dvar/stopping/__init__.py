"""Rules that decide when a training run is done, and what they read."""
