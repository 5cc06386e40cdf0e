"""The ground that training stands on: keyed randomness, the objective, the models, pictures from them."""
