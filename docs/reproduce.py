"""Train the rows of ``docs/results.md`` from the shipped configs, and write the tables from what was measured.

    python docs/reproduce.py                       # list the rows
    python docs/reproduce.py multi30k sst2         # train and measure these, then write the tables
    python docs/reproduce.py --render              # only rewrite docs/results.md and docs/curves.png

Each row is kept as ``docs/results/ROW.json``: command, config hash, seed, time, machine, figures. Nothing is typed in.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmkit.checkpoint.content import read
from llmkit.model.language_model import load
from llmkit.run import figures

ROOT = Path(__file__).resolve().parent.parent
ROWS_FOLDER = ROOT / "docs" / "results"
SAMPLES = 10


@dataclass(frozen=True)
class Row:
    """One line of a table: a config, what is changed on the command line, and what is measured."""

    table: str
    config: str
    changes: tuple[str, ...] = ()
    test: bool = False
    samples: str = ""
    """A TSV of the test data whose first column is translated as samples."""
    starts_from: str = ""
    """The row whose best checkpoint gives the weights to begin with."""


SHAKESPEARE = "configs/generation/tinyshakespeare.yaml"
BUDGET = ("--trainer.max_steps", "400")  # 512,000 training tokens, a quarter of a pass
LM, MT, CLS, MLM = "Language modelling", "Translation", "Classification", "Masked words"
NER, QA, SUM = "Named entities", "Question answering", "Summarization"
VARIANTS = (
    *("standard", "lstm", "gru", "differential", "latent", "linear", "retention", "low_rank"),
    "min_gru",
)
ONE_PASS = ("--model.head.r_drop", "0")
WORDS = "{name: word, vocab_size: 20000, min_frequency: 2, lowercase: true}"
ROWS: dict[str, Row] = {
    "tinyshakespeare_multi_head": Row(LM, SHAKESPEARE),
    **{f"tinyshakespeare_{name}": Row(LM, SHAKESPEARE, ("--model.attention", name)) for name in VARIANTS},
    "tinyshakespeare_sliding_window": Row(
        LM, SHAKESPEARE, ("--model.attention", "sliding_window", "--model.attention.window", "16")
    ),
    "wikitext2_multi_head": Row(LM, "configs/generation/wikitext2_transformer.yaml", BUDGET),
    "wikitext2_lstm": Row(LM, "configs/generation/wikitext2_lstm.yaml", BUDGET),
    "multi30k": Row(MT, "configs/translation/multi30k.yaml", test=True),
    "multi30k_lstm": Row(
        MT,
        "configs/translation/multi30k.yaml",
        ("--model.attention", "lstm", "--trainer.max_epochs", "2"),
        test=True,
    ),
    "tatoeba": Row(
        MT,
        "configs/translation/tatoeba.yaml",
        ("--trainer.max_epochs", "4"),
        test=True,
        samples="tatoeba_en_zh/test.tsv",
    ),
    **{
        f"{name}_{attention}": Row(
            CLS, f"configs/classification/{name}.yaml", ("--model.attention", attention), test=True
        )
        for name in ("sst2", "trec", "chnsenticorp")
        for attention in ("multi_head", "lstm")
    },
    "sst2_masked_lm": Row(MLM, "configs/masked_lm/sst2_masked_lm.yaml"),
    "sst2_pretrained": Row(CLS, "configs/classification/sst2_pretrained.yaml", test=True, starts_from="sst2_masked_lm"),
    "sst2_not_pretrained": Row(
        CLS,
        "configs/classification/sst2_pretrained.yaml",
        ("--model.init_from", "null", "--data.tokenizer", WORDS),
        test=True,
    ),
    **{
        f"sst2_bert{name}": Row(CLS, "configs/classification/sst2_bert.yaml", changes, test=True)
        for name, changes in {
            "": (),
            "_seed_1": ("--seed_everything", "1"),
            "_one_pass": ONE_PASS,
            "_one_pass_seed_1": (*ONE_PASS, "--seed_everything", "1"),
            "_lora": (
                *(*ONE_PASS, "--model.lora", "{rank: 8, targets: [attention, feedforward]}"),
                *("--model.optimizer.lr", "1e-3"),
            ),
            "_frozen": (
                *(*ONE_PASS, "--model.freeze", "[embedding, position, token_types, embedding_norm, encoder]"),
                *("--model.optimizer.lr", "3e-3"),
            ),
        }.items()
    },
    "trec_bert": Row(CLS, "configs/classification/trec_bert.yaml", test=True),
    **{name: Row(NER, f"configs/token_classification/{name}.yaml", test=True) for name in ("wnut17", "weibo_ner")},
    "jaquad": Row(QA, "configs/question_answering/jaquad.yaml", test=True),
    **{name: Row(QA, f"configs/question_answering/{name}.yaml") for name in ("xquad", "cmrc2018")},
    "dialogsum": Row(SUM, "configs/summarization/dialogsum.yaml", test=True),
}


def llmkit(*words: str) -> str:
    """Run the command as a user would and return what it printed."""
    command = [sys.executable, "-m", "llmkit", *words]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def machine() -> str:
    """Return processor and threads."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    if torch.cuda.is_available():
        model = torch.cuda.get_device_name()
    return f"{model}, {torch.get_num_threads()} thread(s)"


def measure(name: str, output: Path, trained: bool = False) -> None:
    """Train one row, unless it is ``trained`` already, and write its JSON file."""
    row = ROWS[name]
    words = ["fit", "--config", row.config, *row.changes]
    place = ["--name", name, "--output", str(output)]
    cpu = os.times()
    if not trained:
        start = ["--model.init_from", str(_best(output / row.starts_from))] if row.starts_from else []
        llmkit(*words, *start, *place)
    cpu_end = os.times()
    cpu_seconds = cpu_end.children_user + cpu_end.children_system - cpu.children_user - cpu.children_system
    best = _best(output / name)
    folder = best.parent.parent
    model = load(best)
    record: dict[str, Any] = {
        "row": name,
        "table": row.table,
        "command": " ".join(["llmkit", *words]),
        "config_sha256": hashlib.sha256((ROOT / row.config).read_bytes()).hexdigest()[:12],
        "seed": model.config["seed_everything"],
        "machine": machine(),
        "torch": torch.__version__,
        "seconds": round(_time(folder / "results.json") - _time(folder / "config.yaml")),
        "cpu_seconds": None if trained else round(cpu_seconds),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": int(read(best)["global_step"]),
        "results": _figures(folder),
        "curve": figures.read_metrics(folder / "metrics.csv").get("val_loss", []),
    }
    record["precision"] = record["results"].pop("precision")
    if row.test:
        llmkit("test", "--ckpt_path", str(best), *place)
        tested = max((output / name).glob("version_*"), key=lambda path: int(path.name.partition("_")[2]))
        record["results"] |= _figures(tested)
    if row.samples:
        data = Path(os.environ.get("LLMKIT_DATA", "../shared/data"))
        lines = (ROOT / data / row.samples).read_text(encoding="utf-8").splitlines()[:SAMPLES]
        sources = [line.split("\t")[0] for line in lines]
        answers = [json.loads(line) for line in llmkit("infer", str(best), *sources, "--json").splitlines()]
        record["samples"] = [
            [s, line.split("\t")[1], a["text"]] for s, line, a in zip(sources, lines, answers, strict=True)
        ]
    ROWS_FOLDER.mkdir(parents=True, exist_ok=True)
    (ROWS_FOLDER / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _figures(folder: Path) -> dict[str, Any]:
    """Return the figures of a run, without what made it."""
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    found.pop("provenance", None)
    return found


def _best(folder: Path) -> Path:
    """Return the best checkpoint of the newest run below a folder."""
    checkpoints = max(folder.glob("version_*/checkpoints"), key=_time)
    best = checkpoints / "best.ckpt"
    return best if best.exists() else checkpoints / "last.ckpt"  # a run shorter than one validation interval


def _time(path: Path) -> float:
    return path.stat().st_mtime


COLUMNS = {
    LM: {"val_loss": "val loss", "val_perplexity": "val perplexity", "val_bits_per_byte": "bits per byte"},
    MT: {"test_bleu": "BLEU", "test_chrf": "chrF", "test_perplexity": "test perplexity"},
    MLM: {"val_loss": "val loss", "val_perplexity": "val perplexity", "val_accuracy": "words guessed"},
    NER: {"test_f1": "test F1", "test_precision": "precision", "test_recall": "recall", "val_f1": "val F1"},
    QA: {
        **{"test_exact_match": "test EM", "test_f1": "test F1"},
        **{"val_exact_match": "val EM", "val_f1": "val F1"},
    },
    SUM: {"test_rouge1": "ROUGE-1", "test_rouge2": "ROUGE-2", "test_rougeL": "ROUGE-L", "val_loss": "val loss"},
    CLS: {"test_accuracy": "test accuracy", "test_macro_f1": "macro F1", "val_accuracy": "val accuracy"},
}


HIGHLIGHTS = {
    "tinyshakespeare_multi_head": ("characters of Shakespeare, 2,000 steps, attention", "val_loss", "validation loss"),
    "tinyshakespeare_lstm": ("the same with an LSTM", "val_loss", "validation loss"),
    "tinyshakespeare_min_gru": ("the same with a minGRU", "val_loss", "validation loss"),
    "multi30k": ("Multi30k, English to German, test 2016", "test_bleu", "BLEU"),
    "sst2_lstm": ("SST-2, sentences only", "test_accuracy", "test accuracy"),
    "trec_multi_head": ("TREC, six classes", "test_accuracy", "test accuracy"),
    "chnsenticorp_multi_head": ("ChnSentiCorp", "test_accuracy", "test accuracy"),
    "weibo_ner": ("named entities in Weibo posts", "test_f1", "test F1"),
    "jaquad": ("answers to questions in Japanese, JaQuAD", "test_f1", "test F1"),
    "dialogsum": ("summaries of dialogues, DialogSum", "test_rouge1", "ROUGE-1"),
}
"""The rows that README.md shows: what, which figure, its name."""


def highlights(records: dict[str, Any]) -> str:
    """Return the table of README.md."""
    lines = ["| data | model | figure | training took |", "|---|---|---|---|"]
    for name, (what, key, figure) in HIGHLIGHTS.items():
        record = records.get(name)
        if record:
            value = _number(record["results"][key])
            size = f"{record['parameters'] / 1e6:.1f}M parameters"
            lines.append(f"| {what} | {size} | {figure} {value} | {record['seconds'] / 60:.0f} min |")
    return "\n".join(lines)


HEAD = """\
# Results

Written by `docs/reproduce.py` from `docs/results/*.json`; do not edit. Each row was trained by the command shown, from
a shipped config. The figures are those of the run's best checkpoint on the validation data, or of its last step if the
run is shorter than one validation interval. CPU s is the CPU time of the whole training command (- if it was not
measured); the wall-clock time is given below each table, on a machine that had other work to do.

The settings of SST-2 (dropout, minimum frequency, epochs) and TREC (dropout) were chosen from a handful of variants
with both validation and test accuracy visible, so these two test figures may be slightly optimistic. Those of all
other rows were chosen on validation data alone. That includes the fine-tuning rate of sst2_pretrained, although test
figures with a lower rate had been measured before. XQuAD and CMRC are one file each: their figures are for the tenth
of its paragraphs that is set aside, which also chose the checkpoint. The test data of DialogSum is the file of its
validation split. No row but sst2_bert was repeated with other seeds: differences between variants of about a point
may be chance.

The rows sst2_bert and trec_bert begin with a published MiniLM; `hf:FOLDER` is a copy of it. Settings of sst2_bert
were compared on the validation sentences alone. In one pass (`r_drop: 0`) two seeds have 88.3 and 88.9 there, a rate
of 2e-4 with a layer_decay of 0.8 or 0.9 88.4, four epochs of the latter 87.8, batches of 16 with a rate of 5e-5 87.4,
frozen word embeddings 88.8, and averages of the weights no more than the weights; none is better than a seed. R-Drop
with a weight of 1 has 89.0 with both seeds; with a weight of 4 three seeds have 89.2, 89.4 and 89.6, and a loss of
0.31 at the end where one pass has 0.42. That was chosen before its test figures were read. The rows of one pass, and
those of LoRA and of a frozen encoder, are from before the config had it.

**All rows but those of MiniLM are from before these changes, and a row trained today differs**: batches by length mix
rows in each epoch (every row but those of language modelling), Muon takes fused maps by their parts (tinyshakespeare,
multi30k, tatoeba, masked words, dialogsum), LSTM and GRU run in single precision, WikiText-2 keeps its blank lines,
bits per byte charge unknown tokens for the bytes they hide and count the newlines of single lines, and BLEU of
Chinese is no longer `13a`.
"""


def render() -> None:
    """Write ``docs/results.md``, ``docs/curves.png`` and the table of README.md from the rows measured so far."""
    records = {name: json.loads((ROWS_FOLDER / f"{name}.json").read_text()) for name in ROWS if _measured(name)}
    lines = [HEAD]
    for table, columns in COLUMNS.items():
        rows = [record for record in records.values() if record["table"] == table]
        if not rows:
            continue
        lines += [f"## {table}", "", f"| row | {' | '.join(columns.values())} | parameters | best step | CPU s |"]
        lines += ["|---" * (len(columns) + 4) + "|"]
        for record in rows:
            cells = [_number(record["results"].get(key)) for key in columns]
            cpu = record["cpu_seconds"]
            counts = [f"{record['parameters']:,}", f"{record['steps']:,}", "-" if cpu is None else f"{cpu:,}"]
            lines.append(f"| {record['row']} | {' | '.join([*cells, *counts])} |")
        lines.append("")
        for record in rows:
            signature = record["results"].get("test_bleu_signature")
            extra = f"; BLEU `{signature}`" if signature else ""
            lines.append(
                f"- **{record['row']}**: `{record['command']}`, config {record['config_sha256']}, seed "
                f"{record['seed']}, {record['precision']}, {record['seconds']:,} s on {record['machine']}, torch "
                f"{record['torch']}{extra}"
            )
        lines.append("")
        for record in rows:
            if record.get("samples"):
                lines += [f"Samples of {record['row']}:", "", "| source | reference | translation |", "|---|---|---|"]
                lines += [
                    f"| {' | '.join(text.replace('|', '/') for text in sample)} |" for sample in record["samples"]
                ]
                lines.append("")
    curves = {
        name.partition("_")[2]: record["curve"]
        for name, record in records.items()
        if name.startswith("tinyshakespeare")
    }
    if curves:
        figures.comparison_curves(curves, ROOT / "docs" / "curves.png", "validation loss (nats per character)")
        lines += ["![Validation loss of all variants on tinyshakespeare](curves.png)", ""]
    lines += trusted()
    (ROOT / "docs" / "results.md").write_text("\n".join(lines), encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    begin, end = "<!-- results -->\n", "<!-- /results -->"
    before, after = readme.partition(begin)[0], readme.partition(end)[2]
    (ROOT / "README.md").write_text(f"{before}{begin}{highlights(records)}\n{end}{after}", encoding="utf-8")


TRUSTED = """\
## What explains an answer

Faithfulness of five methods by attention variant, written by `docs/studies/explain/faithfulness.py`: classifiers of
TREC's questions, two layers, 64 wide, two passes over the training questions, one seed. Means over {texts} test
questions with 95 % intervals (bootstrap over questions). *Deletion*: by how much the area under the probability of the
answer is below that of random orders when the most relevant words go first; *insertion*: by how much it is above it
when they come first. Both are better the larger they are. *Random weights*: rank correlation of the relevances with
those of the same network with random weights; near 0 is good, and near 1 the method shows the question, not the model.
The map of gru and lstm is the norm of the Jacobian. [explaining.md](explaining.md) has the definitions, and what the
figures do not show.
"""


def trusted() -> list[str]:
    """Return the table of the faithfulness of methods by variant."""
    found = json.loads((ROOT / "docs" / "studies" / "explain" / "faithfulness.json").read_text())
    texts = next(iter(next(iter(found.values()))["methods"].values()))["texts"]
    lines = [TRUSTED.format(texts=texts)]
    lines += ["| variant (test accuracy) | method | deletion | insertion | random weights |", "|---|---|---|---|---|"]
    for variant, measured in found.items():
        title = f"{variant} ({measured['accuracy']:.3f})"
        for method, one in measured["methods"].items():
            cells = [one["deletion_gain"], one["insertion_gain"], one["randomised"]]
            shown = [f"{mean:+.2f} ({low:+.2f} to {high:+.2f})" for mean, low, high in cells]
            lines.append(f"| {title} | {method} | {' | '.join(shown)} |")
            title = ""
    text = (
        "A decoder of two layers learns to recall (`docs/studies/explain/mqar.sh`): the scores of its heads on "
        "repeated random symbols, every 50 steps. Heads of the first layer turn to the previous token while those of "
        "the second become induction heads."
    )
    return [*lines, "", text, "", "![Scores of heads over the steps of a run](studies/explain/heads.png)", ""]


def _measured(name: str) -> bool:
    return (ROWS_FOLDER / f"{name}.json").exists()


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}" if value < 10 else f"{value:.2f}"


def main() -> None:
    """Measure the named rows one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "results")
    parser.add_argument("--trained", action="store_true", help="measure the newest run of each row, without training")
    parser.add_argument("--render", action="store_true")
    args = parser.parse_args()
    unknown = sorted(set(args.rows) - set(ROWS))
    if unknown:
        parser.error(f"unknown rows {', '.join(unknown)}; known rows: {', '.join(ROWS)}")
    if not args.rows and not args.render:
        print("\n".join(f"{name:<28} {'measured' if _measured(name) else ''}" for name in ROWS))
        return
    for name in args.rows:
        measure(name, args.output.resolve(), args.trained)
    render()


if __name__ == "__main__":
    main()
