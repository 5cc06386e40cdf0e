"""Diffusion models: the objective, sampling, tokens, CLIP and keyed randomness."""
