"""Runs after training: reading, loading, generating, exporting, replaying and reporting."""
