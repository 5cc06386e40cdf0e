"""A survey that asks people which of two runs generates better images."""
