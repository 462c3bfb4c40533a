"""What a trained model does, and what it can do without."""
