"""Studies: many runs that answer one question, planned, run, and read from their folders."""
