"""``llmkit scale``: how the loss depends on size and tokens."""
