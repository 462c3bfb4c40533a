"""Kill real training runs with SIGKILL at random moments, resume them, and compare every byte with runs left alone.

    python docs/reliability/kill.py                    # all configurations, 8 kills each, about half an hour
    python docs/reliability/kill.py translation --kills 3

Writes ``kills.json`` next to this file, from which ``table.py`` makes the table of ``docs/reliability.md``.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from llmkit.testing.resume import MOMENTS, check

HERE = Path(__file__).resolve().parent
WORDS = ("river", "stone", "house", "green", "walk", "small", "light", "water", "seven", "seldom", "bright", "corner")


def write_data(folder: Path) -> None:
    """Write small data sets of each kind, with lengths that differ."""
    rng = random.Random(0)

    def sentence(least: int = 2, most: int = 12) -> list[str]:
        return rng.choices(WORDS, k=rng.randint(least, most))

    rows = [sentence() for _ in range(150)]
    (folder / "text.txt").write_text("\n".join(" ".join(sentence()) for _ in range(600)) + "\n")
    (folder / "labels.csv").write_text("text,label\n" + "".join(f"{' '.join(r)},{len(r) % 3}\n" for r in rows))
    pairs = [{"source": " ".join(r), "target": " ".join(reversed(r[: 1 + len(r) // 2]))} for r in rows]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tagged = ("".join(f"{w}\t{'B-X' if w[0] == 's' else 'O'}\n" for w in r) for r in rows)
    (folder / "tags.conll").write_text("\n".join(tagged))
    questions = []
    for number, row in enumerate(rows):
        context, answer = " ".join(row), row[len(row) // 2]
        found = {"text": answer, "answer_start": context.index(answer)}
        question = {"id": str(number), "question": f"what is {answer[:2]}", "answers": [found]}
        questions.append({"context": context, "qas": [question]})
    (folder / "questions.json").write_text(json.dumps({"data": [{"title": "t", "paragraphs": questions}]}))


def configs(data: Path) -> dict[str, dict[str, Any]]:
    """Return the configurations: heads x loaders x accumulation x variants, all with dropout."""
    text, labels, pairs = (str(data / name) for name in ("text.txt", "labels.csv", "pairs.jsonl"))
    tags, questions = str(data / "tags.conll"), str(data / "questions.json")
    conll = {"train": tags, "validation": tags, "format": "conll"}
    squad = {"train": questions, "validation": questions, "format": "squad"}
    lines, two = {"train": text, "documents": "line"}, {"workers": 2}
    stream = {**lines, "validation": text, "streaming": True}
    rows: list[tuple[str, str, str, int, dict[str, Any], dict[str, Any]]] = [
        ("generation", "generation", "multi_head", 1, {"train": text}, {}),
        (
            "packed",
            "generation",
            "grouped_query",
            4,
            {"train": text, "documents": "line", "pack": True},
            {"workers": 2},
        ),
        ("streaming", "generation", "lstm", 2, {**stream, "shuffle_buffer": 64}, {}),
        ("streaming, workers", "generation", "linear", 1, stream, two),
        ("epochs, muon", "generation", "min_gru", 3, {"train": text}, {"optimizer": "muon"}),
        ("classification", "classification", "gru", 3, {"train": labels}, two),
        (
            "classification, stream",
            "classification",
            "standard",
            2,
            {**stream, "train": labels, "validation": labels},
            {},
        ),
        ("translation", "translation", "multi_head", 4, {"train": pairs, "batch_tokens": 96}, {}),
        ("translation, workers", "translation", "lstm", 1, {"train": pairs}, two),
        ("summarization", "summarization", "differential", 2, {"train": pairs}, {"columns": ("document", "summary")}),
        ("masked_lm", "masked_lm", "latent", 1, lines, two),
        (
            "masked_lm, stream",
            "masked_lm",
            "multi_head",
            4,
            stream,
            {},
        ),
        ("token_classification", "token_classification", "multi_head", 2, conll, {}),
        ("question_answering", "question_answering", "multi_head", 3, squad, two),
    ]
    found = {}
    for name, head, attention, accumulate, source, more in rows:
        own = {"tokenizer": "char" if head == "generation" else {"name": "bpe", "vocab_size": 300}}
        if "columns" in more:
            own["columns"] = dict(zip(more["columns"], ("source", "target"), strict=True))
        found[name] = {
            "data": {"batch_size": 4, "num_workers": more.get("workers", 0), **source, **own},
            "model": {
                **{"head": head, "attention": attention, "dim": 32, "num_layers": 2, "context": 48, "dropout": 0.1},
                "optimizer": more.get("optimizer", "adamw"),
            },
            "trainer": {"accumulate_grad_batches": accumulate, "log_every_n_steps": 1},
        }
    return found


def main() -> None:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="configurations; default: all")
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--steps", type=int, default=36)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="llmkit_kills_"))
    write_data(folder)
    rows = []
    for number, (name, config) in enumerate(configs(folder).items()):
        if options.names and name not in options.names:
            continue
        path, output = folder / "config.yaml", folder / "runs"
        path.write_text(yaml.safe_dump(config))
        began = time.monotonic()
        length = ["--trainer.max_steps=-1", "--trainer.max_epochs=3"] if name.startswith("epochs") else []
        verdict = check(["--config", str(path), *length], output, options.steps, options.kills, seed=number)
        moments = Counter(kill.moment for kill in verdict.kills)
        row = {
            "configuration": name,
            **{key: config["model"][key] for key in ("head", "attention")},
            "workers": config["data"]["num_workers"],
            "accumulation": config["trainer"]["accumulate_grad_batches"],
            "kills": len(verdict.kills),
            **{f"kills_{moment}": moments[moment] for moment in MOMENTS},
            "from_the_start": sum(kill.resumed_at == 0 for kill in verdict.kills),
            "losses": verdict.batches,
            "validations": verdict.validations,
            "tensors": verdict.tensors,
            "differences": verdict.differences,
            "seconds": round(time.monotonic() - began),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
        shutil.rmtree(output)
    if not options.names:
        (HERE / "kills.json").write_text(json.dumps(rows, indent=1) + "\n")
    shutil.rmtree(folder)
    print(f"{sum(row['kills'] for row in rows)} kills, {sum(len(row['differences']) for row in rows)} differences")


if __name__ == "__main__":
    main()
