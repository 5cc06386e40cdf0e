"""The studio: runs prepared, watched and used in a browser."""
