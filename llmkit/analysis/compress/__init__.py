"""Compressed models: chains of methods, what they cost and save, and the frontier."""
