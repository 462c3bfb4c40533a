"""What trained models do, and what they can do without."""
