"""Models of Hugging Face: read without running anything of theirs, and written in their format."""
