"""Models of llmkit as other libraries know models: transformers, lm-evaluation-harness."""
