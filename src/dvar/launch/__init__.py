"""Another program's training script, run unchanged and stopped by a rule."""
