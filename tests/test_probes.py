"""Generated data: each task against a solver that reads the row alone, and how data sets get into a run."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command import done, llmkit
from torch import nn

from llmkit import registry
from llmkit.contracts import IGNORE, Dataset, Stage
from llmkit.data import DataModule
from llmkit.errors import UserError
from llmkit.study import cells
from llmkit.study.cells import plugin_modules
from llmkit.testing import check
from llmkit.testing.head.subject import TOKENIZER, Subject

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs" / "probes").glob("*.yaml"))
NAMES = sorted(registry.entries("dataset"))
Solver = Callable[[list[str]], list[str]]


def make(name: str, **arguments: Any) -> Any:
    return registry.plugin("dataset", name, **arguments)()


def read(name: str, split: Stage = "train", **arguments: Any) -> list[tuple[list[str], list[str]]]:
    rows = make(name, **{"examples": 60, **arguments}).rows(split)
    return [(row["symbols"].split(), row["expected"].split()) for row in rows]


# Solvers: what is expected after each symbol, found from the definition of the task


def last_value(symbols: list[str]) -> list[str]:
    """The symbol after the latest earlier place of each key, where the key has one."""
    found = []
    for place, symbol in enumerate(symbols):
        before = [i for i in range(place) if symbols[i] == symbol and symbol[0] == "a"]
        found.append(symbols[before[-1] + 1] if before else "-")
    return found


def queries(symbols: list[str]) -> list[str]:
    """As above with the first place: between two questions for other keys there may be no value."""
    first = {symbol: symbols[place + 1] for place, symbol in reversed(list(enumerate(symbols[:-1])))}
    return [first[s] if s[0] == "a" and s in symbols[:i] else "-" for i, s in enumerate(symbols)]


def marked(symbols: list[str]) -> list[str]:
    return ["-"] * (len(symbols) - 1) + [symbols[symbols.index("?") + 1]]


def fuzzy(symbols: list[str]) -> list[str]:
    """Cut into runs of a and b; a run of three a that was there before asks for all of the b that followed it."""
    runs: list[list[str]] = []
    for symbol in symbols:
        if runs and runs[-1][0][0] == symbol[0]:
            runs[-1].append(symbol)
        else:
            runs.append([symbol])
    found: list[str] = []
    for place, run in enumerate(runs):
        earlier = [i for i in range(place) if runs[i] == run]
        if run[0][0] == "a" and len(run) == 3 and earlier:
            found[len(found) :] = ["-", "-", runs[earlier[0] + 1][0]]
        elif run[0][0] == "b" and found[-1] != "-":
            found += [*run[1:], "-"]
        else:
            found += ["-"] * len(run)
    return found


def copied(symbols: list[str]) -> list[str]:
    kept = [symbol for symbol in symbols if symbol not in ("_", "?")]
    return ["-"] * (len(symbols) - len(kept)) + kept


def ordered(symbols: list[str]) -> list[str]:
    numbers = [int(symbol[1:]) for symbol in symbols if symbol != "?"]
    least = []
    while numbers:
        numbers.remove(min(numbers))
        least.append(0)
    kept = sorted((symbol for symbol in symbols if symbol != "?"), key=lambda symbol: int(symbol[1:]))
    return ["-"] * len(least) + kept


def parities(symbols: list[str]) -> list[str]:
    return [str(symbols[: i + 1].count("1") % 2) for i in range(len(symbols))]


def products(symbols: list[str]) -> list[str]:
    """By matrices: row i of a permutation's matrix has its one in column p(i)."""
    state, found = torch.eye(5), []
    for symbol in symbols:
        state = torch.eye(5)[[int(digit) for digit in symbol[1:]]] @ state
        found.append("p" + "".join(str(int(row.argmax())) for row in state))
    return found


def itself(symbols: list[str]) -> list[str]:
    return [*symbols[:-1], "-"]


def facts(symbols: list[str]) -> list[str]:
    """The pairs are those that other rows, of another split, show."""
    return [item for key in symbols[::2] for item in ("-", pairs()[key])]


@functools.cache
def pairs() -> dict[str, str]:
    found: dict[str, str] = {}
    for known, expected in read("memorization", "test", keys=12, length=24):
        found |= dict(zip(known[::2], expected[1::2], strict=True))
    assert len(set(found.values())) == len(found) == 12
    return found


TASKS: dict[str, tuple[Solver, dict[str, Any], int, int]] = {
    "mqar": (queries, {"pairs": 4, "length": 32, "keys": 9, "values": 5}, 15, 4),
    "induction": (marked, {"length": 12, "symbols": 5}, 6, 1),
    "in_context_recall": (last_value, {"length": 24, "keys": 4, "values": 3}, 7, 8),
    "noisy_recall": (last_value, {"length": 40, "keys": 4, "values": 3}, 23, 11),
    "fuzzy_recall": (fuzzy, {"length": 60, "pairs": 4}, 15, 10),
    "selective_copying": (copied, {"copies": 4, "length": 20, "symbols": 6}, 8, 4),
    "sorting": (ordered, {"length": 16, "symbols": 20}, 21, 8),
    "parity": (parities, {"length": 14}, 2, 14),
    "s5": (products, {"length": 10}, 120, 10),
    "compression": (itself, {"length": 9, "symbols": 5}, 6, 8),
    "memorization": (facts, {"length": 24, "keys": 12}, 25, 12),
}
"""The solver, arguments, the number of different symbols and answers, and how many answers a row has on average."""


def test_every_task_has_a_solver_and_a_config() -> None:
    assert sorted(TASKS) == NAMES == [path.stem for path in CONFIGS]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_what_it_says(name: str) -> None:
    solver, arguments, kinds, answers = TASKS[name]
    seen: set[str] = set()
    asked = []
    for symbols, expected in read(name, **arguments):
        assert len(symbols) == len(expected) == arguments["length"]
        assert solver(symbols) == expected
        seen |= {*symbols, *expected} - {"-"}
        asked.append(len(expected) - expected.count("-"))
        assert asked[-1] >= 1
    assert len(seen) == kinds
    assert sum(asked) / len(asked) == pytest.approx(answers, rel=0.35 if "recall" in name else 0)
    assert not {text for text, _ in map(texts, read(name, **arguments))} & {
        text for split in ("validation", "test") for text, _ in map(texts, read(name, split, **arguments))
    }
    # Another length adds rows, and changes none; another seed changes them.
    longer = read(name, **{**arguments, "length": [arguments["length"], 2 * arguments["length"]]})
    assert longer[:60] == read(name, **arguments) and {len(row) for row, _ in longer[60:]} == {2 * arguments["length"]}
    assert read(name, **arguments, seed=1) != read(name, **arguments)


def texts(row: tuple[list[str], list[str]]) -> tuple[str, str]:
    return " ".join(row[0]), " ".join(row[1])


def test_what_a_task_depends_on() -> None:
    assert {expected.count("-") for _, expected in read("parity", length=8, every=False, examples=20)} == {7}
    places: list[float] = []
    for power in (0.01, 1.0):
        rows = read("mqar", pairs=4, length=64, power=power)
        places.append(sum(i for _, expected in rows for i, e in enumerate(expected) if e != "-"))
    assert places[0] < 0.7 * places[1]  # most questions are asked soon
    noise = [sum(symbol[0] == "n" for symbol in row) for row, _ in read("noisy_recall", noise=0.5, length=100)]
    assert sum(noise) / len(noise) == pytest.approx(48, rel=0.1)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("mqar", {"pairs": 30}, "length must be at least 90, got 64"),
        ("mqar", {"keys": 4}, "keys must be at least 8, got 4"),
        ("sorting", {"length": 7}, "length must be even, got 7"),
        ("noisy_recall", {"noise": 1.5}, "noise must be at least 0 and below 1, got 1.5"),
        ("induction", {"length": []}, "length must be at least 1, got 0"),
        ("parity", {"examples": 0}, "examples must be at least 1, got 0"),
        ("selective_copying", {"copies": 16, "length": [64, 30]}, "length must be at least 32, got 30"),
    ],
)
def test_arguments_that_make_no_sense(name: str, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        make(name, **arguments)


def test_too_few_rows_to_set_some_aside() -> None:
    with pytest.raises(UserError, match="Parity has too few different rows of length 1 to set some aside: validation"):
        read("parity", "validation", length=1)


@pytest.mark.parametrize("name", NAMES)
def test_the_checks_of_the_family(name: str) -> None:
    assert not check("dataset", name).failed


class Broken(Dataset):
    """Rows with one thing wrong."""

    def __init__(self, how: str = "") -> None:
        self.how, self.calls = how, 0

    def rows(self, split: Stage) -> Iterator[Mapping[str, Any]]:
        self.calls += 1
        for number in range(3):
            row: Any = {"text": f"{split} {number}"}
            if self.how == "columns" and number == 2:
                row = {"other": "a"}
            elif self.how == "kind":
                row = {"text": {"a"}}
            elif self.how == "again":
                row = {"text": f"{split} {number} {self.calls}"}
            elif self.how == "draws":
                row = {"text": f"{split} {torch.rand(())}"}
            elif self.how == "same":
                row = {"text": str(number)}
            yield row


@pytest.mark.parametrize(
    ("how", "fails"),
    [
        ("columns", "rows"),
        ("kind", "rows"),
        ("again", "repeatable"),
        ("draws", "repeatable"),
        ("draws", "random_state"),
        ("same", "splits_apart"),
        ("", ""),
    ],
)
def test_the_checks_find_what_is_wrong(how: str, fails: str) -> None:
    failed = [result.name for result in check("dataset", functools.partial(Broken, how=how)).failed]
    assert (fails in failed) if fails else not failed


# In a run

SMALL = """
data: {train: {name: parity, length: 8, examples: 40}, validation: {examples: 9, length: [8, 16]}, tokenizer: word}
model: {head: probe, dim: 16, num_layers: 1, context: 16}
"""


def shown(*words: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done("config", "show", "--config", "a.yaml", "--json", *words).out)
    return {key: item["value"] for key, item in found.items() if key.startswith(("data.train", "data.validation"))}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(SMALL)
    return tmp_path


def test_validation_says_what_is_other_than_in_training(config: Path) -> None:
    found = shown()
    assert (found["data.train"], found["data.validation"]) == ("parity", "parity")
    assert (found["data.validation.length"], found["data.validation.examples"]) == ([8, 16], 9)
    found = shown("--data.train.every", "false", "--data.validation.examples", "7")
    assert (found["data.train.every"], found["data.validation.every"], found["data.validation.examples"]) == (
        *(False, False, 7),
    )
    found = shown("--data.train", "{name: induction, length: 12}", "--data.validation", "{length: [12, 24]}")
    assert (found["data.train"], found["data.validation"]) == ("induction", "induction")
    assert (found["data.train.symbols"], found["data.validation.length"]) == (16, [12, 24])
    origins = json.loads(done("config", "show", "--config", "a.yaml", "--json", "--data.train.seed", "3").out)
    assert origins["data.validation.seed"] == {"value": 3, "origin": "command line"}


def test_other_generated_data_leaves_the_old_validation_out(config: Path) -> None:
    result = done("config", "show", "--config", "a.yaml", "--json", "--data.train.name", "s5")
    assert "data.train is another one now (command line). Left out with the old one: data.validation" in result.err
    assert "data.validation.length" not in json.loads(result.out)
    Path("text.txt").write_text("a b")
    assert shown("--data.train", "text.txt")["data.train"] == "text.txt"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("--data.train.pairs=3",),
            "command line: data.train: Parity has no argument 'pairs'.",
        ),
        (("--data.train.name=parrity",), "data.train: unknown dataset 'parrity'. Did you mean 'parity'?"),
        (("--data.train.length=long",), "data.train.length: expected a whole number or a list, got 'long'"),
        (("--data.validation.length=0",), "command line: data.validation.length: length must be at least 1, got 0"),
        (("--data.validation", "{a: 5}"), "command line: data.validation: Parity has no argument 'a'."),
        (
            ("--data.tokenizer=byte", "--data.train", "{name: s5, examples: 5}"),
            "refused by the head: probe: the symbol",
        ),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], says: str, config: Path) -> None:
    result = llmkit("fit", "--config", "a.yaml", *words)
    assert result.code == 2
    (line,) = [line for line in result.err.splitlines() if line.startswith("llmkit: error: ")]
    assert says in line


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_probe_trains(path: Path, tmp_path: Path) -> None:
    """With another mixer, two steps; the row lengths that are validated on are reported by name."""
    words = ["--model.attention=min_gru", "--trainer.max_steps=2", "--data.batch_size=4", "--model.dim=16"]
    words += ["--data.train.examples=16", "--data.validation.examples=8", "--model.num_layers=1"]
    run = done("fit", "--config", path, *words, "--trainer.accelerator=cpu", "--output", tmp_path)
    results = json.loads((run.folder / "results.json").read_text())
    data = DataModule(**{"train": read_config(path)["train"], "validation": read_config(path)["validation"]})
    validated = data._corpus.given["validation"]
    assert isinstance(validated, Dataset)
    lengths = validated.lengths  # type: ignore[attr-defined]
    assert {name for name in results if "_to_" in name} == {f"val_accuracy_to_{length}" for length in lengths}
    assert results["val_accuracy"] == results[f"val_accuracy_to_{lengths[0]}"]
    assert results["val_loss"] > 0
    answer = json.loads(done("infer", run.checkpoint, "a0 a1", "--json").out)
    assert answer["symbols"] and len(answer["answers"].split()) <= 2


def read_config(path: Path) -> dict[str, Any]:
    from llmkit.check import settled
    from llmkit.config.files import read_yaml

    data: dict[str, Any] = settled(read_yaml(str(path)).tree)["data"]
    return data


def test_a_run_from_python_and_one_that_resumes_see_the_same_rows(tmp_path: Path) -> None:
    def batches(examples: int) -> tuple[list[Any], list[str]]:
        """Return the ids of each batch, and what is in the cache then."""
        train = {"name": "parity", "examples": examples}
        word = registry.plugin("tokenizer", "word")
        data = DataModule(train=train, cache_dir=str(tmp_path), tokenizer=word, batch_size=20)
        data.bind(registry.plugin("head", "probe")(), 32)
        data.setup("fit")
        return [batch["ids"].tolist() for batch in data.train_dataloader()], sorted(p.name for p in tmp_path.iterdir())

    first, entries = batches(20)
    assert batches(20) == (first, entries)  # read from the cache
    assert batches(19)[1] != entries


def test_a_study_reads_no_file_of_generated_data() -> None:
    """The code of the data set is part of what a cell depends on."""
    spec = {"class_path": "llmkit_plugins.dataset.states.Parity", "init_args": {"length": [8, 16]}}
    tree = {"data": {"train": spec, "validation": str(CONFIGS[0])}, "model": {}}
    assert plugin_modules(tree) == {"llmkit_plugins.dataset.states"}
    assert list(cells._files(tree["data"])) == [str(CONFIGS[0])]


# The head


def test_the_head_counts_answers_alone() -> None:
    """Loss and accuracies by hand, over rows of unequal lengths in one padded batch."""
    subject = Subject(registry.plugin("head", "probe"))  # type: ignore[arg-type]
    head, net = subject.head(), subject.net
    head.set_info({"longest": 4, "scored_share": 0.5})
    rows = {name: subject.columns[name] for name in ("symbols", "expected")}
    features = head.encode(rows, TOKENIZER, 64)
    items = [{name: column[i] for name, column in features.items()} for i in range(5)]
    metrics: dict[str, Any] = head.metrics("validation")
    head.evaluate(net, head.collate(items, TOKENIZER), metrics, TOKENIZER)
    right: dict[int, list[bool]] = {}
    losses: dict[int, list[float]] = {}
    for symbols, expected in zip(rows["symbols"], rows["expected"], strict=True):
        ids = torch.tensor([[6 + ord(symbol) for symbol in symbols.split()]])
        scores = net.decode(ids, seq_of(ids))[0] @ net.output_weight_VD.T
        for place, answer in enumerate(expected.split()):
            if answer != "-":
                target = 6 + ord(answer)
                right.setdefault(ids.shape[1], []).append(int(scores[place].argmax()) == target)
                losses.setdefault(ids.shape[1], []).append(F.cross_entropy(scores[place], torch.tensor(target)).item())
    known = [length for length in right if length <= 4]
    assert float(metrics["accuracy"].compute()) == pytest.approx(mean([x for n in known for x in right[n]]))
    assert float(metrics["loss"].compute()) == pytest.approx(mean([x for n in known for x in losses[n]]), rel=1e-6)
    by_length = dict(zip(metrics["accuracy_to"].labels, metrics["accuracy_to"].compute().tolist(), strict=True))
    assert by_length["2"] == mean([float(x) for x in right[2]])
    assert by_length["4"] == pytest.approx(mean([float(x) for n in (3, 4) for x in right[n]]))
    assert by_length["8"] == mean([float(x) for x in right[7]])
    head.learn(rows)
    assert head.info() == {"longest": 7, "scored_share": sum(map(len, right.values())) / 18}


def mean(values: list[Any]) -> float:
    return sum(map(float, values)) / len(values)


def seq_of(ids: torch.Tensor) -> Any:
    from llmkit.sequence import Sequence

    return Sequence.of(ids)


def test_answers_from_the_last_state_know_nothing_else() -> None:
    subject = Subject(registry.plugin("head", "probe", from_last=True))  # type: ignore[arg-type]
    head = subject.head()
    hidden = torch.randn(2, 5, 16, dtype=torch.float64)

    class Fixed:
        output_weight_VD = torch.eye(16, dtype=torch.float64)

        def decode(self, ids: torch.Tensor, seq: Any) -> torch.Tensor:
            return hidden

    batch = {"ids": torch.zeros(2, 5, dtype=torch.long), "segments": torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])}
    batch["targets"] = torch.tensor([[1, 2, 3, 4, IGNORE], [5, 6, IGNORE, IGNORE, IGNORE]])
    before = head.loss(Fixed(), batch)  # type: ignore[arg-type]
    hidden[0, :4] += 1
    hidden[1, [0, 1, 3, 4]] += 1
    assert head.loss(Fixed(), batch).total == before.total  # type: ignore[arg-type]
    hidden[1, 2] += 1
    assert head.loss(Fixed(), batch).total != before.total  # type: ignore[arg-type]
    assert sum(isinstance(part, nn.Linear) for part in head.modules()) == 2


@pytest.mark.parametrize(
    ("symbols", "expected", "says"),
    [("a b", "-", "2 symbols, but 'expected' has 1: 'a b'"), ("", "", "a row has no symbols")],
)
def test_rows_that_the_head_refuses(symbols: str, expected: str, says: str) -> None:
    head = registry.plugin("head", "probe")()
    with pytest.raises(UserError, match=says):
        head.encode({"symbols": [symbols], "expected": [expected]}, TOKENIZER, 64)
