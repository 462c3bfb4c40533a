"""Commands as functions: settings in, the folder of the run out."""
