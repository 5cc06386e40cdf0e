"""Pages, charts and styles in HTML."""
