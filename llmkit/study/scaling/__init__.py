"""Scaling laws: how the loss of trained models depends on their size and on their tokens, and what runs cannot show."""
