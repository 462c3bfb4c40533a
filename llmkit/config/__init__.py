"""Defaults, checkpoint, files and command line become one checked tree, each value with its origin."""
