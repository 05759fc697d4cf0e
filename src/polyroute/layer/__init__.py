"""The adapted layers of a base model, and the factors that they apply."""
