"""One file for each table or figure: what it takes from recorded runs, and how it says it."""
