"""Integrations with other training frameworks, one module for each."""
