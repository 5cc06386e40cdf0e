"""Personalising a model: pictures in, a stopped run out."""
