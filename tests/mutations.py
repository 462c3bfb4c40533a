"""What ``docs/reliability/fuzz.py`` damages, and how: small real checkpoints, tokenizers and data files."""

from __future__ import annotations

import copy
import io
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmkit import main, registry

SENTENCES = [f"line {n}: the quick brown fox, number {n * 7 % 13}, jumps\n" for n in range(40)] + ["Zwölf 狐狸 👩\n"]
SIZES = {"dim": 16, "num_layers": 1, "context": 16}
LIMITS = {"max_steps": 1, "limit_val_batches": 1, "accelerator": "cpu", "enable_progress_bar": "false"}
MODELS = {
    "generation": ("text.txt", "char", "multi_head", "rotary"),
    "classification": ("rows.csv", "word", "lstm", "learned"),
    "translation": ("pairs.tsv", "wordpiece", "grouped_query", "sinusoidal"),
    "masked_lm": ("text.txt", "unigram", "sliding_window", "alibi"),
    "token_classification": ("tags.conll", "byte", "low_rank", "rotary"),
    "question_answering": ("squad.json", "bpe", "differential", "rotary"),
}
"""One checkpoint a head: data, tokenizer, attention, position."""

Saved = bytes | dict[str, bytes]
"""A file, or several of one folder."""


def data_files() -> dict[str, Saved]:
    """Return a small data file of each format by the name of its format."""
    rows = [{"text": text.strip(), "label": "ab"[n % 2]} for n, text in enumerate(SENTENCES)]
    pairs = [(text.strip(), text.strip().upper()) for text in SENTENCES]
    words = ["\n".join(f"{word}\t{'O' if len(word) > 3 else 'B-X'}" for word in text.split()) for text in SENTENCES]
    asked = [
        {
            "id": str(n),
            "question": "which fox?",
            "answers": [{"text": "the quick", "answer_start": text.index("the quick")}],
        }
        for n, text in enumerate(SENTENCES[:40])
    ]
    told = [{"context": text, "qas": [entry]} for text, entry in zip(SENTENCES, asked, strict=False)]
    table = "".join(f'"{row["text"]}",{row["label"]}\n' for row in rows)
    files: dict[str, Saved] = {
        "text": "".join(SENTENCES).encode(),
        "csv": ("text,label\n" + table).encode(),
        "tsv": ("source\ttarget\n" + "".join(f"{a}\t{b}\n" for a, b in pairs)).encode(),
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "json": json.dumps(rows).encode(),
        "lines": "".join(f"{row['label']} {row['text']}\n" for row in rows).encode(),
        "conll": "\n\n".join(words).encode(),
        "squad": json.dumps({"data": [{"title": "t", "paragraphs": told}]}).encode(),
        "parallel": {
            "source": "\n".join(a for a, _ in pairs).encode(),
            "target": "\n".join(b for _, b in pairs).encode(),
        },
        "parquet": parquet(rows),
    }
    return files


def parquet(rows: list[dict[str, str]]) -> bytes:
    """Return rows as a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def tokenizers() -> dict[str, Saved]:
    """Return the state of each trained tokenizer by its class path, and files that ``pretrained`` reads."""
    sizes = {"bpe": 330, "word": 60, "wordpiece": 220, "unigram": 150}
    found: dict[str, Saved] = {}
    for name in ("char", "byte", *sizes):
        entry = registry.find("tokenizer", name)
        tokenizer = entry.load()(**({"vocab_size": sizes[name]} if name in sizes else {}))
        tokenizer.train(iter(SENTENCES))
        found[entry.class_path] = tokenizer.to_state().encode()
        if name in sizes:
            model = json.loads(tokenizer.to_state())["model"]
            found[f"{name}/tokenizer.json"] = json.dumps(model).encode()
        if name == "bpe":
            merges = "".join(f"{a} {b}\n" for a, b in model["model"]["merges"])
            found["folder"] = {
                "vocab.json": json.dumps(model["model"]["vocab"]).encode(),
                "merges.txt": f"#version: 0.2\n{merges}".encode(),
            }
    return found


def checkpoints(folder: Path, heads: list[str]) -> dict[str, Path]:
    """Train a tiny model of each head; returns the checkpoints by head."""
    found = {}
    names = {"text": "text.txt", "csv": "rows.csv", "tsv": "pairs.tsv", "conll": "tags.conll", "squad": "squad.json"}
    for format, content in data_files().items():
        if format in names:
            assert isinstance(content, bytes)
            (folder / names[format]).write_bytes(content)
    for head in heads:
        data, tokenizer, attention, position = MODELS[head]
        words = ["--data.train", str(folder / data), "--data.tokenizer", tokenizer, "--model.head", head]
        words += ["--model.attention", attention, "--model.position", position, "--output", str(folder), "--name", head]
        words += {"conll": ["--data.format", "conll"], "json": ["--data.format", "squad"]}.get(
            data.partition(".")[2], []
        )
        given = {f"model.{key}": value for key, value in SIZES.items()} | {f"trainer.{k}": v for k, v in LIMITS.items()}
        assert main.main(["fit", *words, *(f"--{key}={value}" for key, value in given.items())]) == 0
        (found[head],) = folder.glob(f"{head}/version_0/checkpoints/last.ckpt")
    return found


# --- bytes


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return a file with one to four places damaged."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        size = len(data)
        if not size:
            break
        start = rng.randrange(size)
        end = min(size, start + rng.choice([1, 2, 8, 100, 1000]))
        block = bytes(data[start:end])
        kind = rng.randrange(9)
        if kind == 0:
            data[start] = rng.randrange(256)
        elif kind == 1:
            data[start] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[start:]
        elif kind == 3:
            data[start:start] = rng.randbytes(end - start)
        elif kind == 4:
            del data[start:end]
        elif kind == 5:
            data[start:start] = block * rng.choice([1, 1, 50])
        elif kind == 6:
            data[start:end] = bytes(end - start)
        elif kind == 7:
            other = rng.randrange(size)
            data[start:end], data[other : other + len(block)] = data[other : other + len(block)], block
        else:
            data[start:end] = rng.choice([b"\xff\xfe", b"\xed\xa0\x80", b"\x00", b'"', b"\r", b"{", b"-1", b"1e999"])
    return bytes(data)


def repacked(content: bytes, rng: random.Random) -> bytes:
    """Return a checkpoint one of whose members is damaged, with the right checksums."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    name = pickled if rng.random() < 0.7 else rng.choice(list(members))
    members[name] = damaged(members[name], rng)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, member in members.items():
            archive.writestr(zipfile.ZipInfo(name), member)
    return buffer.getvalue()


# --- values

EVIL = [
    "os.system",
    "subprocess.Popen",
    "evil_module.Evil",
    "llmkit.__main__.main",
    "builtins.eval",
    "../../x",
    "/etc/x",
]
JUNK: list[Callable[[], Any]] = [
    *(lambda value=value: value for value in EVIL),
    *(lambda value=value: value for value in (None, True, False, 0, 1, 2, 3, 7, 17, -1, 10**6, 10**9, 2**63, 1.5)),
    *(lambda value=value: value for value in (float("nan"), float("inf"), -0.0, "", "x", "10", "ä\ud800", "%s" * 40)),
    lambda: "x" * 100_000,
    lambda: [],
    lambda: {},
    lambda: ["a", "b", 1],
    lambda: {"class_path": "os.system", "init_args": {"command": "true"}},
    lambda: list(range(10_000)),
    lambda: {str(n): n for n in range(1000)},
    lambda: nested(150),
]


def nested(depth: int) -> Any:
    """Return lists in lists."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def place(value: Any, rng: random.Random) -> tuple[Any, Any]:
    """Return the container and the key of a value somewhere in a tree that is not empty; each level is as likely."""
    node, key = value, rng.choice(_keys(value))
    while isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
        node = node[key]
        key = rng.choice(_keys(node))
    return node, key


def _keys(node: Any) -> list[Any]:
    return list(node) if isinstance(node, dict) else list(range(len(node)))


def altered(value: Any, rng: random.Random) -> Any:
    """Return a tree of values with one to three of them removed, renamed, moved or replaced."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 2, 3])):
        if not isinstance(value, dict | list) or not value:
            return rng.choice(JUNK)()
        node, key = place(value, rng)
        old = node[key]
        kind = rng.random()
        if isinstance(old, str) and old.startswith("{") and kind < 0.7:
            node[key] = json.dumps(altered(json.loads(old), rng))
        elif kind < 0.15:
            del node[key]
        elif kind < 0.25 and isinstance(node, dict):
            node[rng.choice(["x", f"{key}s", 3, *node])] = node.pop(key)
        elif kind < 0.4:
            other, where = place(value, rng)
            node[key] = copy.deepcopy(other[where])
        elif kind < 0.7 and isinstance(old, int | float):
            node[key] = rng.choice([old + 1, old - 1, old * 2, -old, old * 10**6, float(old), str(old), bool(old)])
        elif kind < 0.6 and isinstance(node, list):
            node.insert(rng.randrange(len(node) + 1), copy.deepcopy(old))
        else:
            node[key] = rng.choice(JUNK)()
    return value


def reshaped(weights: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Return weights with one of another name, shape or type, or with numbers that no training gives."""
    weights = dict(weights)
    name = rng.choice(list(weights))
    old = weights[name]
    changes: list[Callable[[], Any]] = [
        lambda: old.T.contiguous() if old.dim() == 2 else old[None],
        lambda: old[:-1].clone(),
        lambda: torch.cat([old, old]),
        lambda: old.flatten(),
        lambda: old[:1].expand(10**9, *old.shape[1:]),
        lambda: old.double(),
        lambda: old.to(torch.bfloat16),
        lambda: old.to(torch.int64),
        lambda: old.to(torch.complex64),
        lambda: old.bool(),
        lambda: old.to_sparse(),
        lambda: old.to("meta"),
        lambda: torch.full_like(old, float("nan")),
        lambda: torch.full_like(old, float("inf")),
        lambda: old * 1e30,
        lambda: torch.zeros_like(old),
        lambda: torch.nn.Parameter(old.clone()),
        lambda: torch.empty(0),
        lambda: old.tolist(),
        lambda: rng.choice(JUNK)(),
    ]
    kind = rng.random()
    if kind < 0.1:
        del weights[name]
    elif kind < 0.2:
        weights[rng.choice(["x", f"{name}.x", name.replace("0", "1"), name.replace("0", "9" * 12)])] = weights.pop(name)
    else:
        weights[name] = rng.choice(changes)()
    return weights


def checkpoint(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Return how a checkpoint was damaged, and the damaged one."""
    kind = rng.random()
    if kind < 0.2:
        return "bytes", damaged(content, rng)
    if kind < 0.4:
        return "bytes with checksums", repacked(content, rng)
    loaded = torch.load(io.BytesIO(content), weights_only=True)
    if kind < 0.55:
        loaded["state_dict"] = reshaped(loaded["state_dict"], rng)
        what = "weights"
    elif kind < 0.65:
        rest = {key: value for key, value in loaded.items() if key not in ("state_dict", "llmkit")}
        loaded |= altered(rest, rng) or {}
        what = "training state"
    else:
        loaded["llmkit"] = altered(loaded["llmkit"], rng)
        what = "description"
    buffer = io.BytesIO()
    torch.save(loaded, buffer)
    return what, buffer.getvalue()


def text(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Return how a file of text, of JSON perhaps, was damaged, and the damaged one."""
    if content[:1] in (b"{", b"[") and rng.random() < 0.7:
        lines = content.splitlines()
        n = rng.randrange(len(lines))
        lines[n] = json.dumps(altered(json.loads(lines[n]), rng)).encode()
        return "values", b"\n".join(lines)
    return "bytes", damaged(content, rng)


def several(content: Saved, rng: random.Random, change: Callable[[bytes, random.Random], tuple[str, bytes]]) -> Any:
    """Return how one file, or one of several, was damaged, and what there is then."""
    if isinstance(content, bytes):
        return change(content, rng)
    name = rng.choice(list(content))
    what, new = change(content[name], rng)
    return what, {**content, name: new}
