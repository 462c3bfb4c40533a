"""Generated data: synthetic tasks with exact answers, rows for the head ``probe``."""
