"""Training: personalise a model on the images of a concept until a rule stops it."""
