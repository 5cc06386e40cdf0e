"""The backbones: a module for each family of base models."""
