"""What a model's answers rest on: maps of every attention variant, as a page, pictures and numbers."""

from llmkit.analysis.explain.explanation import Explanation, Text, explain
from llmkit.analysis.explain.maps import Map

__all__ = ["Explanation", "Map", "Text", "explain"]
