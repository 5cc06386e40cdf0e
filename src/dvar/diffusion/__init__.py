"""Diffusion models: backbones, the objective, sampling, tokens, CLIP and randomness."""
