"""The human evaluation: which of two pictures is nearer to the subject, and which fits its prompt better."""
