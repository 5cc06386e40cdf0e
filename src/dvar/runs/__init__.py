"""What can be done with a finished run: load, generate, export, replay, report."""
