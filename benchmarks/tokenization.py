"""Speed of byte-level BPE: llmkit's tokenizer beside tiktoken and ``tokenizers`` on the same real text.

    python benchmarks/tokenization.py

The vocabulary of a corpus is the 8,192 pieces that llmkit trains on it; all use it and give equal ids, which is
checked. A turn builds the tokenizer from what was learned and encodes the first million characters of the corpus once,
as a data module does: a text file in pieces of 256 Ki characters, or 1,000 lines at a time. llmkit encodes by tiktoken
where the ids are sure to be those of ``tokenizers``; the rest of its time goes into making sure. ``tokenizers``, which
transformers calls too, is called by its fast batch method. ``to a token file`` is what ``llmkit fit`` does before its
first step: read the file, encode it, write the ids.
"""

from __future__ import annotations

import functools
import json
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

from kit import DATA, OURS, Report, arguments, find, interleave, timed

from llmkit import DataModule, plugin
from llmkit_plugins.tokenizer import BPE
from llmkit_plugins.tokenizer.byte_pairs import WORDS, bytes_by_character

Encode = Callable[[list[str]], list[list[int]]]
RATE, TRAINING = 3.0, 30.0
"""The goals: MB of text encoded in a CPU second, at least; CPU seconds of training, at most."""


def llmkit(state: str) -> Encode:
    """Return llmkit's tokenizer."""
    tokenizer = BPE()
    tokenizer.from_state(state)
    return tokenizer.encode_batch


def tokenizers(state: str) -> Encode:
    """Return the fast batch method of ``tokenizers``."""
    from tokenizers import Tokenizer

    hf = Tokenizer.from_str(json.dumps(json.loads(state)["model"]))
    return lambda texts: [found.ids for found in hf.encode_batch_fast(texts, add_special_tokens=False)]


def tiktoken(state: str) -> Encode:
    """Return tiktoken with the same pieces; it merges by the rank of the result, which is the id."""
    from tiktoken import Encoding

    byte_of = bytes_by_character()
    vocab: dict[str, int] = json.loads(state)["model"]["model"]["vocab"]
    ranks = {bytes(map(byte_of.__getitem__, piece)): i for piece, i in vocab.items() if byte_of.keys() >= set(piece)}
    encoding = Encoding("bench", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})
    return lambda texts: [encoding.encode_ordinary(text) for text in texts]


PEERS: dict[str, Callable[[str], Encode]] = {"tiktoken": tiktoken, "tokenizers": tokenizers}


def encoded(make: Callable[[str], Encode], state: str, groups: list[list[str]]) -> list[list[int]]:
    """Build a tokenizer and encode all groups of texts."""
    encode = make(state)
    return [ids for group in groups for ids in encode(group)]


def prepared(state: str, path: str) -> None:
    """Make a text file a token file, as ``llmkit fit`` does."""
    tokenizer = BPE()
    tokenizer.from_state(state)
    with tempfile.TemporaryDirectory() as folder:
        data = DataModule(path, validation_share=0, cache_dir=folder)
        data.bind(plugin("head", "generation")(), 256, tokenizer)
        data.setup("fit")


def corpora() -> dict[str, list[list[str]]]:
    """Return texts, in the groups in which they are encoded."""
    found = {}
    for name, file in {"wikitext-2": "wikitext-2/train.txt", "tinyshakespeare": "tinyshakespeare/input.txt"}.items():
        text = (DATA / file).read_text("utf-8")[:1_000_000]
        found[name] = [[text[at : at + 2**18]] for at in range(0, len(text), 2**18)]
    for name, file in {"Multi30k": "multi30k/train.en", "chnsenticorp": "chnsenticorp/train.tsv"}.items():
        lines = (DATA / file).read_text("utf-8")[:1_000_000].splitlines()
        found[f"{name}, by line"] = [lines[at : at + 1000] for at in range(0, len(lines), 1000)]
    return found


def rate(report: Report, case: str, name: str, megabytes: float, seconds: list[float]) -> None:
    """Add the line of a speed and its goal."""
    value = megabytes / statistics.median(seconds)
    report.add(case, name, round(value, 2), "MB a CPU second", goal=f"at least {RATE:g}", met=value >= RATE)


def main() -> None:
    """Train the vocabulary, then encode with each."""
    args = arguments(__doc__)
    report = Report("tokenization", args.json)
    wikitext = DATA / "wikitext-2" / "train.txt"
    text, megabytes = wikitext.read_text("utf-8"), wikitext.stat().st_size / 1e6
    tokenizer = BPE(8192)
    lines = text.splitlines(keepends=True)
    seconds = timed(lambda: tokenizer.train(iter(lines)))
    case = f"train a vocabulary of 8,192 on {megabytes:.1f} MB"
    report.add(case, OURS, round(seconds, 2), "s", goal=f"under {TRAINING:g} s", met=seconds < TRAINING)
    learned = tokenizer.to_state()
    for name, groups in corpora().items():
        tokenizer = BPE(8192)
        tokenizer.train(text for group in groups for text in group)
        state = tokenizer.to_state()
        wanted = encoded(llmkit, state, groups)
        peers, missing = find({peer: functools.partial(encoded, make, state, groups) for peer, make in PEERS.items()})
        for peer, ids in peers.items():
            if ids != wanted:
                raise SystemExit(f"{peer} gives other ids on {name}")
        turns: dict[str, Callable[[], Any]] = {
            peer: functools.partial(encoded, make, state, groups)
            for peer, make in {OURS: llmkit, **PEERS}.items()
            if peer not in missing
        }
        times = interleave(turns, args.cycles, warm=0)
        size = sum(len(text.encode()) for group in groups for text in group) / 1e6
        report.compare(name, times, "ms a MB", 1e3 / size, missing=missing)
        rate(report, name, OURS, size, times[OURS])
    times = interleave({OURS: functools.partial(prepared, learned, str(wikitext))}, args.cycles, warm=0)
    rate(report, "wikitext-2 to a token file", OURS, megabytes, times[OURS])
    report.close()


if __name__ == "__main__":
    main()
