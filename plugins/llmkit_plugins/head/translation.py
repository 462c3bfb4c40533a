"""Translation with an encoder-decoder."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Literal, get_args

from torch import nn

from llmkit.errors import UserError, note, unknown
from llmkit.ops.metrics import BLEU, ChrF
from llmkit.sequence import DecodingOptions
from llmkit_plugins.head.sequence_to_sequence import SequenceToSequence

Tokenize = Literal[
    "auto", "13a", "intl", "zh", "ja-mecab", "ko-mecab", "char", "none", "spm", "flores101", "flores200", "spBLEU-1K"
]
"""``auto``, or one of sacrebleu's tokenizers."""

_LETTER = re.compile(r"[^\W\d_]")
_KANA = re.compile("[\u3041-\u30ff\uff66-\uff9f]")
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_OTHER_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")  # Thai, Lao, Burmese, Khmer


class Translation(SequenceToSequence):
    """Translation: reads a source text, writes a target text (encoder-decoder, label smoothing, beam search).

    Vaswani et al. 2017, arXiv:1706.03762.

    Args:
        label_smoothing: share of the probability spread evenly over the vocabulary while training.
        bleu_tokenize: how sacrebleu tokenizes for BLEU. ``auto`` goes by the script of the training targets: ``zh``
            for Chinese, ``ja-mecab`` for Japanese (``char`` where mecab is not installed), ``char`` for Thai, Lao,
            Burmese and Khmer, and ``13a`` for everything else.
        references: ``lines``: each line of a target is a reference of its own, the first of which is trained on.
        start: the tokens that the decoder reads before a target, of ``bos``, ``eos`` and ``pad``; None: bos.

    Raises:
        UserError: an unknown tokenizer, or one whose package is not installed.
    """

    inputs = ("source",)
    targets = ("target",)
    texts = ("source", "target")
    decoding = DecodingOptions(temperature=0.0, num_beams=5)

    def __init__(
        self,
        label_smoothing: float = 0.1,
        bleu_tokenize: Tokenize = "auto",
        references: Literal["one", "lines"] = "one",
        start: list[str] | None = None,
    ) -> None:
        super().__init__(label_smoothing, references, start)
        if bleu_tokenize not in get_args(Tokenize):
            raise UserError(unknown("bleu_tokenize", bleu_tokenize, get_args(Tokenize)))
        if bleu_tokenize != "auto":
            check_installed(bleu_tokenize)
        self.bleu_tokenize: str = bleu_tokenize
        self.by_script: str | None = None
        """What ``auto`` chose."""

    def learn(self, columns: Mapping[str, Iterable[Any]]) -> None:
        """Choose the tokenizer of BLEU by the script of the first training targets."""
        if self.bleu_tokenize != "auto":
            return
        self.by_script = tokenizer_for(str(text) for text in islice(columns["target"], 1000))
        without = self.by_script == "ja-mecab" and not importlib.util.find_spec("MeCab")
        if without:
            self.by_script = "char"
        if self.by_script != "13a":
            hint = "; published scores of Japanese use ja-mecab: pip install 'sacrebleu[ja]'" if without else ""
            note(f"BLEU uses sacrebleu's tokenizer {self.by_script}, by the script of the targets{hint}")

    def info(self) -> dict[str, Any]:
        """Return the tokenizer of BLEU where it was chosen."""
        return {} if self.by_script is None else {"bleu_tokenize": self.by_script}

    def set_info(self, info: dict[str, Any]) -> None:
        """Restore what was chosen. A checkpoint that has no choice was made with ``13a``."""
        found = info.get("bleu_tokenize")
        if found is not None and found not in get_args(Tokenize):
            raise TypeError(unknown("bleu_tokenize", str(found), get_args(Tokenize)))
        self.by_script = found

    def text_metrics(self) -> dict[str, nn.Module]:
        """Return BLEU and chrF."""
        tokenize = (self.by_script or "13a") if self.bleu_tokenize == "auto" else self.bleu_tokenize
        return {"bleu": BLEU(tokenize), "chrf": ChrF()}


def tokenizer_for(texts: Iterable[str]) -> str:
    """Return sacrebleu's tokenizer for the script that most letters of the texts are of."""
    text = "".join(texts)
    letters, kana, han, other = (len(kind.findall(text)) for kind in (_LETTER, _KANA, _HAN, _OTHER_UNSPACED))
    if 2 * (kana + han) > letters:
        return "ja-mecab" if 20 * kana > kana + han else "zh"  # half of a Japanese text is kana
    return "char" if 2 * other > letters else "13a"


def check_installed(tokenize: str) -> None:
    """Raise UserError when a tokenizer of sacrebleu needs a package that is not installed."""
    package = {"ja-mecab": "MeCab", "ko-mecab": "mecab_ko"}.get(tokenize)
    if tokenize.startswith(("spm", "flores", "spBLEU")):
        package = "sentencepiece"
    if package is not None and not importlib.util.find_spec(package):
        extra = {"MeCab": "sacrebleu[ja]", "mecab_ko": "sacrebleu[ko]"}.get(package, package)
        raise UserError(f"translation: bleu_tokenize {tokenize} needs the package {package}: pip install '{extra}'")
