"""Word vectors that others trained, as the first values of a network's embedding."""

from __future__ import annotations

from collections.abc import Iterator, Set
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from llmkit.contracts import Tokenizer
from llmkit.errors import Problem, UserError, note
from llmkit.model.backbone import Backbone

KEY = "model.word_vectors"


def begin_with_vectors(net: Backbone, tokenizer: Tokenizer, path: str | None, rank: int) -> None:
    """Do what ``take_vectors`` does for a network, if there is a file; the first process says what was done."""
    if path is not None:
        taken = take_vectors(net.embedding.weight, tokenizer, path)
        if rank == 0:
            note(f"{KEY}: {taken}")


@torch.no_grad()
def take_vectors(embedding_VD: Tensor, tokenizer: Tokenizer, path: str) -> str:
    """Set the rows of an embedding whose tokens are words of a file; returns what was done, in words.

    The file is in the text format of GloVe (Pennington et al. 2014, "GloVe: Global Vectors for Word Representation"):
    a word and its numbers on each line, divided by blanks; word2vec's line with the two sizes may come first. A word
    that the file has in lower case only gets that vector. The vectors are scaled to the spread that the embedding was
    initialised with: the layers that follow were, too.

    Raises:
        UserError: the file cannot be read, has vectors of another width, or knows none of the words.
    """
    size, dim = embedding_VD.shape
    texts = tokenizer.decode_batch([[i] for i in range(size)])
    words = {texts[i]: i for i, ids in enumerate(tokenizer.encode_batch(texts)) if ids == [i]}
    found: dict[str, list[float]] = {}
    for word, vector in _vectors(path, words.keys() | {word.lower() for word in words}, dim):
        found.setdefault(word, vector)
    vectors = {i: found.get(word) or found.get(word.lower()) for word, i in words.items()}
    rows = {i: vector for i, vector in vectors.items() if vector}
    if not rows:
        raise UserError(Problem(KEY, f"{path} has none of the tokenizer's {len(words):,} words"))
    taken_ND = torch.tensor(list(rows.values()), dtype=torch.float64)
    if not torch.isfinite(taken_ND).all():
        raise UserError(Problem(KEY, f"{path} has numbers that are not finite"))
    scale = float(embedding_VD.double().std() / taken_ND.std().clamp(min=1e-12))
    embedding_VD[torch.tensor(list(rows))] = (taken_ND * scale).to(embedding_VD)
    return f"{len(rows):,} of {len(words):,} words begin with their vector in {path}, scaled by {scale:.3g}"


def _vectors(path: str, wanted: Set[str], dim: int) -> Iterator[tuple[str, list[float]]]:
    """Yield the vector of each wanted word of the file; words that hold blanks themselves are left out."""
    width = 0
    try:
        with Path(path).expanduser().open(encoding="utf-8", errors="replace", newline="\n") as file:
            for number, line in enumerate(tqdm(file, desc="word vectors", unit=" lines", delay=2, disable=None), 1):
                word, *numbers = line.rstrip().split(" ")
                if number == 1 and len(numbers) == 1:  # word2vec: how many vectors, of what width
                    continue
                width = width or len(numbers)
                if width != dim:
                    text = f"{path} has vectors of {width} numbers, and model.dim is {dim}"
                    raise UserError(Problem(KEY, text))
                if word in wanted and len(numbers) == dim:
                    try:
                        yield word, [float(item) for item in numbers]
                    except ValueError as error:
                        raise UserError(Problem(KEY, f"{path}:{number}: {error}")) from error
    except OSError as error:
        raise UserError(Problem(KEY, f"{path} cannot be read: {error.strerror}")) from error
