"""``llmkit config``: print a config in full, compare those of two runs, print their schema; one module each."""
