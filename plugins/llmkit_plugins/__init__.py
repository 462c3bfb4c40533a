"""The first-party plugins, found through entry points."""
