"""``llmkit plugins``: list, check, show and create plugins; one module each."""
