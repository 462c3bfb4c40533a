"""``llmkit explain``: what a checkpoint's answers rest on."""
