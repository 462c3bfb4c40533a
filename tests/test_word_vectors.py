"""``model.word_vectors``: a new run's embedding begins with vectors that others trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import TINY, done, llmkit

from llmkit import UserError
from llmkit.model.vectors import take_vectors
from llmkit_plugins.tokenizer import Word

FILE = """\
the 1 2 3 -4
. . . 9 9 9 9
cat 0.5 -1e0 0 2
dog 1 1 1 1
cat 7 7 7 7
"""


@pytest.fixture
def tokenizer() -> Word:
    found = Word()
    found.train(iter(["The cat sat the the"]))
    return found


def taken(tokenizer: Word, path: Path, text: str) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Return the embedding before and after it took the vectors of a file, and the note."""
    path.write_text(text)
    before = 0.02 * torch.randn(tokenizer.vocab_size, 4, generator=torch.Generator().manual_seed(0))
    after = before.clone()
    return before, after, take_vectors(after, tokenizer, str(path))


@pytest.mark.parametrize("header", ["", "4 4\n"], ids=["GloVe", "word2vec"])
def test_words_get_their_vectors(header: str, tokenizer: Word, tmp_path: Path) -> None:
    before, after, note = taken(tokenizer, tmp_path / "vectors.txt", header + FILE)
    upper, lower, cat, sat = (tokenizer.encode(word)[0] for word in ("The", "the", "cat", "sat"))
    vectors = torch.tensor([[1.0, 2, 3, -4], [1, 2, 3, -4], [0.5, -1, 0, 2]])  # "The" is in the file as "the" only
    vectors = vectors[[1, 0, 2]] * (before.std() / vectors.std())
    torch.testing.assert_close(after[[lower, upper, cat]], vectors)
    others = [i for i in range(len(before)) if i not in (upper, lower, cat)]
    assert sat in others and torch.equal(after[others], before[others])
    assert note.startswith("3 of 4 words begin with their vector")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("the 1 2 3\n", "has vectors of 3 numbers, and model.dim is 4"),
        ("bird 1 2 3 4\n", "has none of the tokenizer's 4 words"),
        ("bird 1 2 3 4\nthe 1 2 3 x\n", "could not convert string to float: 'x'"),
        ("the 1 2 3 nan\n", "has numbers that are not finite"),
    ],
)
def test_a_file_that_does_not_fit(text: str, says: str, tokenizer: Word, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        taken(tokenizer, tmp_path / "vectors.txt", text)
    assert str(caught.value).startswith("model.word_vectors: ") and says in str(caught.value)


def test_a_run_begins_with_them(tmp_path: Path) -> None:
    """And its checkpoint does without the file."""
    (tmp_path / "text.txt").write_text("the cat sat on the mat\n" * 60)
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("".join(f"{word}{f' {i}.5 -1' * 8}\n" for i, word in enumerate(["the", "cat", "tree"])))
    words: tuple[object, ...] = (
        "fit",
        "--data.train",
        tmp_path / "text.txt",
        *TINY,
        "--data.tokenizer",
        "word",
        "--output",
        tmp_path,
    )
    words += ("--model.word_vectors", vectors, "--model.optimizer.lr", "1e-9")
    first = done(*words)
    assert "note: model.word_vectors: 2 of 5 words begin with their vector" in first.err
    content = torch.load(first.folder / "checkpoints" / "last.ckpt", weights_only=True)
    vocabulary = Word()
    vocabulary.from_state(content["llmkit"]["tokenizer_state"])
    embedding = content["state_dict"]["net.embedding.weight"]
    the, cat = (embedding[vocabulary.encode(word)[0]] for word in ("the", "cat"))
    torch.testing.assert_close(the[::2] * -2, the[1::2], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(cat[::2] * -2, 3 * cat[1::2], atol=1e-6, rtol=1e-4)
    vectors.unlink()
    done(*words, "--ckpt_path", "last", "--trainer.max_steps", "3")
    done("infer", first.checkpoint, "the cat")
    assert "cannot be read: No such file" in llmkit(*words).err
