"""Ways to make a trained model smaller or faster, a module each."""
