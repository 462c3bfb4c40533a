"""What a command does, as a function: a config and what it is overridden by in, the run folder out."""
