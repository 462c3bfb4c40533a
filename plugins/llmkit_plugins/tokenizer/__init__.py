"""The first-party tokenizers."""

from .learned import BPE, Unigram, Word, WordPiece
from .plain import Byte, Char
from .pretrained import Pretrained

__all__ = ["BPE", "Byte", "Char", "Pretrained", "Unigram", "Word", "WordPiece"]
