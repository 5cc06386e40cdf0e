"""The laboratory: what is read off finished runs."""
