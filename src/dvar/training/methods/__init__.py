"""The methods of personalisation, one module for each."""
