"""The ways to personalise a model, a leaf each."""
