"""Settings of training runs, their checks and presets."""
