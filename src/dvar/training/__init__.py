"""Personalising a model: images in, a stopped run out."""
