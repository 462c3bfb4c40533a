"""``llmkit verify``: check on your own config that runs resume exactly and that batching changes no number."""
