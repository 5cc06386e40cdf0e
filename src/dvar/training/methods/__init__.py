"""The methods of personalisation, one module each, and their registry."""
