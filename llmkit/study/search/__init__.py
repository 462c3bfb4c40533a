"""A search for settings: its space, the suggestions, the trials, and the report."""
