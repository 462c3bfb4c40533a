"""Broken configs and command lines, made from the shipped ones: each with what its message has to say.

A mutation is a rule, not a list: it is applied to every shipped config that has what it breaks, or to one in turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
GROUPS = ("data", "model", "trainer")


class Broken(NamedTuple):
    """A config with one mistake, or a whole one with a mistake in the words behind it."""

    kind: str
    name: str
    """The shipped config that it was made from."""
    text: str
    says: tuple[str, ...]
    """Must stand in one line of the message; ``@`` in front stands for the file and the line."""
    words: tuple[str, ...] = ()


class Shipped(NamedTuple):
    """A config as it is in the repository, without its comments."""

    name: str
    lines: list[str]

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    def has(self, key: str) -> bool:
        return key in self._numbers()

    def line(self, key: str) -> int:
        """The number, from 0, of the line of ``model`` or ``model.dim``."""
        return self._numbers()[key]

    def _numbers(self) -> dict[str, int]:
        found: dict[str, int] = {}
        group = ""
        for number, line in enumerate(self.lines):
            match = re.match(r"( *)(\w+):", line)
            assert match, line
            group = group if match[1] else match[2]
            found[f"{group}.{match[2]}" if match[1] else group] = number
        return found

    def value(self, key: str) -> str:
        return self.lines[self.line(key)].partition(":")[2].strip()

    def keys(self, group: str) -> list[str]:
        return [key.partition(".")[2] for key in self._numbers() if key.startswith(f"{group}.")]

    def plugin(self, key: str) -> tuple[str, dict[str, str]]:
        """The short name of a plugin and its arguments, as text."""
        value = self.value(key)
        if not value.startswith("{"):
            return value, {}
        pairs = dict(pair.split(": ", 1) for pair in re.split(r", (?=\w+: )", value[1:-1]))
        return pairs.pop("name"), pairs

    def replaced(self, number: int, *lines: str) -> str:
        return "\n".join([*self.lines[:number], *lines, *self.lines[number + 1 :]]) + "\n"


def shipped() -> list[Shipped]:
    found = []
    # Studies, and configs that are all alike.
    others = {CONFIGS / "compare.yaml", CONFIGS / "tune.yaml", *(CONFIGS / "probes").iterdir()}
    for path in sorted({*CONFIGS.rglob("*.yaml")} - others):
        lines = [re.sub(r"(^| +)# .*", "", line) for line in path.read_text(encoding="utf-8").splitlines()]
        found.append(Shipped(path.stem, [line for line in lines if line.strip()]))
    return found


def typo(word: str, turn: int) -> str:
    """A slip of the finger: two letters swapped, one left out, or one too many."""
    at = len(word) // 2
    swapped = word[: at - 1] + word[at] + word[at - 1] + word[at + 1 :]
    slips = [swapped, word[:at] + word[at + 1 :], word[:at] + word[at - 1] + word[at:]]
    slips = [slip for slip in slips if slip != word and len(word) > 4] or [word + word[-1]]
    return slips[turn % len(slips)]


def flow(name: str, arguments: dict[str, str]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in {"name": name, **arguments}.items()) + "}"


def place(number: int) -> str:
    return f"@{number + 1}: "


def meant(word: str) -> str:
    return f"Did you mean '{word}'?"


PLUGINS = ("data.tokenizer", "model.head", "model.attention", "model.optimizer", "model.scheduler")


def misspelled_keys(config: Shipped, turn: int) -> Iterator[Broken]:
    """A key at the top, a key in each of two groups, and an argument of every third plugin."""
    group = GROUPS[turn % 3]
    number, wrong = config.line(group), typo(group, turn)
    text = config.replaced(number, f"{wrong}:")
    yield Broken("key", config.name, text, (place(number), f"'{wrong}'", meant(group)))
    for group in (GROUPS[turn % 3], GROUPS[(turn + 1) % 3]):
        keys = config.keys(group)
        key = keys[turn % len(keys)]
        number, wrong = config.line(f"{group}.{key}"), typo(key, turn)
        text = config.replaced(number, config.lines[number].replace(key, wrong, 1))
        yield Broken("key", config.name, text, (place(number), f"'{group}.{wrong}'", meant(key)))
    for key in PLUGINS[turn % 3 :: 3]:
        name, arguments = config.plugin(key)
        if not arguments:
            continue
        argument = list(arguments)[turn % len(arguments)]
        number, wrong = config.line(key), typo(argument, turn)
        mutated = {wrong if one == argument else one: value for one, value in arguments.items()}
        text = config.replaced(number, f"  {key.partition('.')[2]}: {flow(name, mutated)}")
        yield Broken("argument", config.name, text, (place(number), key, f"'{wrong}'", meant(argument)))


def misspelled_names(config: Shipped, turn: int) -> Iterator[Broken]:
    """The short name of a plugin: written on one line, and over several."""
    key = PLUGINS[turn % 5]
    if not config.has(key):
        return
    name, arguments = config.plugin(key)
    number, wrong, leaf = config.line(key), typo(name, turn), key.partition(".")[2]
    lines = [f"  {leaf}: {flow(wrong, arguments)}"]
    if turn % 2:
        lines = [f"  {leaf}:", *(f"    {one}: {value}" for one, value in arguments.items()), f"    name: {wrong}"]
    text = config.replaced(number, *lines)
    yield Broken("name", config.name, text, (place(number + len(lines) - 1), key, f"'{wrong}'", meant(name)))


INT, FLOAT, BOOL = "a whole number", "a number", "true or false"
TYPES = {
    "model.dim": ("big", INT),
    "model.num_layers": ("[2]", INT),
    "model.context": ("64.5", INT),
    "model.dropout": ("a lot", FLOAT),
    "model.norm_first": ("perhaps", BOOL),
    "model.tie_embeddings": ("2", BOOL),
    "model.init_from": ("[a, b]", "text"),
    "data.batch_size": ("many", INT),
    "data.batch_tokens": ("{a: 1}", INT),
    "data.validation_share": ("a tenth", FLOAT),
    "data.pack": ("sometimes", BOOL),
    "data.columns": ("text", "a mapping"),
    "data.column_names": ("3", "a list"),
    "data.train": ("7", "text"),
    "data.num_workers": ("two", INT),
    "trainer.max_steps": ("often", INT),
    "trainer.max_epochs": ("[1]", INT),
    "trainer.benchmark": ("mostly", BOOL),
    "trainer.log_every_n_steps": ("1.5", INT),
    "model.decoding.top_k": ("few", INT),
    "model.decoding.top_p": ("[1]", FLOAT),
    "seed_everything": ("lucky", f"{BOOL} or {INT}"),
    "name": ("[a]", "text"),
}
"""Key -> a value of the wrong type, and what is expected."""
RANGES = {
    "model.dim": ("0", "at least 1"),
    "model.num_layers": ("-2", "at least 1"),
    "model.context": ("1", "at least 2"),
    "model.dropout": ("1.5", "below 1"),
    "data.batch_size": ("0", "at least 1"),
    "data.batch_tokens": ("-5", "at least 1"),
    "data.validation_share": ("2", "below 1"),
    "data.shuffle_buffer": ("0", "at least 1"),
    "data.num_workers": ("-1", "at least 0"),
    "trainer.max_steps": ("-7", "-7"),
    "trainer.accumulate_grad_batches": ("0", "at least 1"),
    "trainer.val_check_interval": ("0", "at least 1"),
    "trainer.devices": ("0", "devices"),
    "trainer.gradient_clip_algorithm": ("norms", "norm, value"),
    "model.decoding.temperature": ("-1", "0 (greedy) or more"),
    "model.decoding.num_beams": ("0", "at least 1"),
    "name": ("../elsewhere", "relative path"),
    "output": ("null", "null"),
    "model.tie_embeddings": ("null", "true or false"),
    "model.optimizer": ("{name: adamw, lr: -1}", "learning rate"),
    "model.attention": ("{name: multi_head, dropout: 1.5}", "below 1"),
    "model.head": ("{name: masked_lm, mask_rate: 2}", "at most 1"),
    "model.feedforward": ("{name: gelu, multiple: -1}", "multiple"),
    "data.tokenizer": ("{name: bpe, vocab_size: 10}", "262"),
}
"""Key -> a value out of range, or null, and what the message says of it."""
CHOICES = {
    "data.format": ("conl", "conll"),
    "data.documents": ("lines", "line"),
    "trainer.precision": ("bf16-mixd", "bf16-mixed"),
    "trainer.accelerator": ("cpuu", "cpu"),
    "trainer.strategy": ("ddpp", "ddp"),
    "trainer.callbacks": ("EarlyStoping", "EarlyStopping"),
    "trainer.logger": ("TensorBoardLoger", "TensorBoardLogger"),
    "model.position": ("rotery", "rotary"),
    "model.feedforward": ("swiglue", "swiglu"),
    "model.norm": ("rsm", "rms"),
    "model.optimizer": ("rmspop", "rmsprop"),
    "model.scheduler": ("onecylelr", "onecyclelr"),
    "model.cross_attention": ("multi_hed", "multi_head"),
}
"""Key -> a misspelled choice, and the right one."""


def with_value(config: Shipped, key: str, value: str) -> tuple[str, int]:
    """The config with another value of a key, or with the key as the first one of its group, and the line of it."""
    group, *rest = key.split(".")
    if not rest:
        return config.replaced(0, f"{key}: {value}", config.lines[0]), 0
    lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate(rest, 1)]
    lines[-1] += f" {value}"
    beside = f"{group}.{rest[0]}"
    at = config.line(beside if config.has(beside) else group)
    kept = [] if config.has(beside) else [config.lines[at]]
    return config.replaced(at, *kept, *lines), at + len(kept) + len(lines) - 1


def wrong_values(configs: list[Shipped]) -> Iterator[Broken]:
    """Every wrong value, in one config after the other."""
    for kind, table in {"type": TYPES, "range": RANGES, "choice": CHOICES}.items():
        for turn, (key, (value, says)) in enumerate(table.items()):
            config = configs[turn % len(configs)]
            text, number = with_value(config, key, value)
            told = {"type": f"{key}: expected {says}", "choice": meant(says)}.get(kind, says)
            yield Broken(kind, config.name, text, (place(number), key, told))
    arguments = {
        "model.attention.num_heads": "two",
        "data.tokenizer.vocab_size": "[4000]",
        "model.optimizer.lr": "fast",
        "model.scheduler.warmup_steps": "some",
        "model.head.dropout": "much",
        "model.scheduler.min_lr_ratio": "{a: 1}",
        "data.tokenizer.lowercase": "never",
    }
    for key, value in arguments.items():
        spec, _, argument = key.rpartition(".")
        config = next(one for one in configs if one.has(spec) and argument in one.plugin(spec)[1])
        name, given = config.plugin(spec)
        text = config.replaced(
            config.line(spec), f"  {spec.partition('.')[2]}: {flow(name, {**given, argument: value})}"
        )
        yield Broken("type", config.name, text, (place(config.line(spec)), f"{key}: expected"))


STRAYS = {
    "data.dim": "model.dim",
    "model.batch_size": "data.batch_size",
    "lr": "model.optimizer.lr",
    "model.lr": "model.optimizer.lr",
    "model.max_steps": "trainer.max_steps",
    "num_layers": "model.num_layers",
    "trainer.tokenizer": "data.tokenizer",
    "model.temperature": "model.decoding.temperature",
    "model.num_heads": "model.attention.num_heads",
}
"""A key in the wrong place, and where it belongs."""


def broken_yaml(config: Shipped) -> list[tuple[str, tuple[str, ...]]]:
    """What is no YAML, a key given twice, a variable that is not set, a file that is not there."""
    dim, train = config.line("model.dim"), config.line("data.train")
    missing = "${LLMKIT_DATA}/nowhere/nothing.txt"
    return [
        (config.replaced(dim, "\tdim: 8"), (place(dim), "YAML")),
        (config.replaced(dim, "  dim: 8", "  dim: 16"), (place(dim + 1), "'dim'", "twice")),
        (config.replaced(dim, "  dim: [8"), ("@", "YAML")),
        (config.replaced(dim, "  dim: 8: 9"), (place(dim), "YAML")),
        (config.replaced(dim, "  dim 8", config.lines[dim]), ("@", "YAML")),
        (
            config.replaced(train, "  train: ${LLMKIT_DTAA}/x.txt"),
            (place(train), "data.train", "LLMKIT_DTAA", meant("LLMKIT_DATA")),
        ),
        (config.replaced(train, f"  train: {missing}"), (place(train), "data.train", "nowhere/nothing.txt")),
        (
            config.replaced(train, config.lines[train], f"  predict: {missing}", "  validation: nothing.txt"),
            (place(train + 2), "data.validation", "nothing.txt"),
        ),
        (config.replaced(train, "  train: ''"), (place(train), "data.train")),
        (f"imports: mine_plugins.py\n{config.text}", (place(0), "imports", "mine_plugins.py", "does not exist")),
        (f"imports: [tourch]\n{config.text}", (place(0), "imports", "tourch", meant("torch"))),
        (
            config.replaced(dim, config.lines[dim], "  init_from: runs/none.ckpt"),
            (place(dim + 1), "model.init_from", "none.ckpt"),
        ),
        (f"- {config.lines[0]}\n", ("expected a mapping",)),
        (
            config.text.replace("model:", "model: 5\nx:"),
            (place(config.line("model")), "model: expected a mapping", "got '5'"),
        ),
    ]


def combinations(configs: list[Shipped]) -> Iterator[Broken]:
    """Parts that cannot work together, in the config of the task."""

    def find(task: str) -> Shipped:
        return next(config for config in configs if config.plugin("model.head")[0] == task)

    softmax = "llmkit_plugins.attention.softmax"
    stopping = "[{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {%s}}]"
    rules: list[tuple[str, str, str, tuple[str, ...]]] = [
        ("generation", "model.attention", "{name: multi_head, num_heads: 7}", ("num_heads: dim 128", "nearest")),
        ("generation", "model.attention", "{name: grouped_query, num_kv_heads: 3}", ("num_kv_heads 3", "allowed: 1")),
        (
            "generation",
            "model.attention",
            "{name: sliding_window, window: 0}",
            ("model.attention.window", "at least 1"),
        ),
        (
            "generation",
            "model.attention",
            f"{softmax}.MultHead",
            ("model.attention", meant("MultiHead")),
        ),
        ("generation", "model.optimizer", "{name: lbfgs}", ("model.optimizer", "LBFGS")),
        ("generation", "model.scheduler", "onecyclelr", ("model.scheduler", "max_lr")),
        ("generation", "data.format", "lines", ("data.format", "data.pattern")),
        ("generation", "data.pattern", "'(?P<text'", ("data.pattern", "regular expression")),
        ("generation", "data.encoding", "utf9", ("data.encoding", "utf9")),
        ("classification", "data.tokenizer", "pretrained", ("data.tokenizer", "path")),
        ("classification", "data.columns", "{txet: text}", ("data.columns", "'txet'", meant("text"))),
        (
            "classification",
            "model.attention",
            "my_plugins.attention.Mine",
            ("model.attention", "my_plugins", "imports"),
        ),
        ("classification", "model.attention", "torch.nn.Identity", ("model.attention", "contracts.Attention")),
        ("translation", "model.cross_attention", "lstm", ("model.cross_attention", "'cross'", "It supports")),
        ("summarization", "model.cross_attention", "gru", ("model.cross_attention", "'cross'", "It supports")),
        ("masked_lm", "model.attention", "{class_path: multi_head}", ("model.attention", "multi_head")),
        ("masked_lm", "model.attention", "{num_haeds: 4}", ("model.attention", meant("num_heads"))),
        ("masked_lm", "model.attention", "{name: gru, class_path: torch.nn.GRU}", ("model.attention", "class_path")),
        ("translation", "trainer.callbacks", stopping % "patiense: 3", ("trainer.callbacks", meant("patience"))),
        ("translation", "trainer.callbacks", stopping % "monitor: val_loss, patience: x", ("trainer.callbacks", INT)),
    ]
    for head, key, value, says in rules:
        text, number = with_value(find(head), key, value)
        yield Broken("combination", find(head).name, text, (place(number), *says))
    config = next(one for one in configs if one.has("trainer.max_epochs"))
    text, _ = with_value(config, "data.streaming", "true")
    yield Broken("combination", config.name, text, ("default: trainer.max_steps: must be set",))
    config = find("classification")
    text, _ = with_value(config, "model.attention", f"{{name: multi_head, num_heads: {config.value('model.dim')}}}")
    yield Broken("combination", config.name, text, ("model.attention", "even width"))


COMMAND_LINES: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("--model.dmi", "8"), ("'model.dmi'", meant("dim"))),
    (("--modl.dim", "8"), ("'modl'", meant("model"))),
    (("--data.batchsize=8",), ("'data.batchsize'", meant("batch_size"))),
    (("--trainer.max_step", "8"), ("'trainer.max_step'", meant("max_steps"))),
    (("--outputs", "x"), ("'outputs'", meant("output"))),
    (("--lr", "0.1"), ("'lr'", meant("model.optimizer.lr"))),
    (("--model.head", "generaton"), ("model.head", meant("generation"))),
    (("--model.attention", "{name: muti_head}"), ("model.attention", meant("multi_head"))),
    (("--model.attention=gro",), ("model.attention", meant("gru"))),
    (("--model.optimizer", "amadw"), ("model.optimizer", meant("adamw"))),
    (("--data.tokenizer.vocab_sise", "9"), ("data.tokenizer", meant("vocab_size"))),
    (("--model.optimizer.learning_rate", "9"), ("model.optimizer", "'learning_rate'", "It takes: lr")),
    (("--model.scheduler.warmup_step", "9"), ("model.scheduler", meant("warmup_steps"))),
    (("--model.decoding.temprature", "1"), ("model.decoding.temprature", meant("temperature"))),
    (("--model.decoding", "{topk: 1}"), ("model.decoding.topk", meant("top_k"))),
    (("--model.dim", "wide"), ("model.dim: expected a whole number", "'wide'")),
    (("--model.dim", "[8]"), ("model.dim: expected a whole number", "[8]")),
    (("--model.dim", "null"), ("model.dim: expected a whole number", "null")),
    (("--model.attention.num_heads", "4.5"), ("model.attention.num_heads: expected a whole number", "'4.5'")),
    (("--model.attention", "{name: multi_head, num_heads: many}"), ("model.attention.num_heads: expected a whole",)),
    (("--model.optimizer.lr", "[1]"), ("model.optimizer.lr: expected a number",)),
    (("--model.decoding.top_k", "some"), ("model.decoding.top_k: expected a whole number",)),
    (("--trainer.max_steps", "few"), ("trainer.max_steps: expected a whole number", "'few'")),
    (("--trainer.precision", "half"), ("trainer.precision", "'half'", "16-mixed")),
    (("--data.columns", "text"), ("data.columns: expected a mapping",)),
    (("--data.batch_size", "0"), ("data.batch_size", "at least 1")),
    (("--model.dropout", "1.5"), ("model.dropout", "below 1")),
    (("--model.attention.num_heads", "7"), ("model.attention.num_heads", "divisible")),
    (("--trainer.accelerator", "gpuu"), ("trainer.accelerator", meant("gpu"))),
    (("--trainer.callbacks+=EarlyStoping",), ("trainer.callbacks", meant("EarlyStopping"))),
    (("--data.train", "no/such/file.txt"), ("data.train", "no/such/file.txt")),
    (("--name", "/tmp/x"), ("name", "relative path", "/tmp/x")),
    (("--name", "../x"), ("name", "relative path", "../x")),
    (("--imports", "mine.py"), ("imports", "mine.py", "does not exist")),
    (("--model.attention", "{name: gru"), ("model.attention", "YAML")),
    (("--ckpt_path", "nowhere.ckpt"), ("nowhere.ckpt", "does not exist")),
    (("--ckpt_path", "best"), ("--ckpt_path best", "no run")),
    (("stray",), ("'stray'", "--key value")),
    (("--config",), ("--config needs a value",)),
    (("--config", "quikstart.yaml"), ("--config quikstart.yaml does not exist", meant("quickstart.yaml"))),
]
"""Words behind a shipped config, and what is said; the place is the command line, or the option itself."""


def corpus() -> list[Broken]:
    """All cases, always the same ones in the same order."""
    configs = [config for config in shipped() if not config.has("model.init_from")]
    found: list[Broken] = []
    for turn, config in enumerate(configs):
        found += misspelled_keys(config, turn)
        found += misspelled_names(config, turn)
    for turn, (key, right) in enumerate(STRAYS.items()):
        config = configs[turn % len(configs)]
        text, number = with_value(config, key, "8")
        found.append(Broken("nesting", config.name, text, (place(number), f"'{key}'", meant(right))))
    plain = [config for config in configs if not config.has("data.validation")]
    for turn in range(len(broken_yaml(plain[0]))):
        config = plain[turn % len(plain)]
        found.append(Broken("yaml", config.name, *broken_yaml(config)[turn]))
    found += wrong_values(configs)
    found += combinations(configs)
    for turn, (words, says) in enumerate(COMMAND_LINES):
        config = configs[turn % len(configs)]
        where = () if words[0] in ("stray", "--config") else ("command line: ",)
        found.append(Broken("command line", config.name, config.text, (*where, *says), words))
    return found


def write_data(folder: Path) -> None:
    """Write a few rows in place of each data set that the shipped configs read."""
    text = [f"line {i} of a small text , with number {i * 7 % 13}" for i in range(40)]
    lines = "\n".join(text)
    asked = {"id": "1", "question": "What is small?", "answers": [{"text": "small text", "answer_start": 12}]}
    squad = json.dumps({"data": [{"paragraphs": [{"context": line, "qas": [asked]}]} for line in text[:12]]})
    conll = "".join(f"{i % 10}{i % 4}\tO\n\n" if i % 3 else f"word{i % 10}\tB-PER\n" for i in range(60)) + "x1\tO\n"
    labels = [str(i % 2) for i in range(40)]
    kinds = {
        lines: (
            *("stdlib/a.py", "tinyshakespeare/input.txt", "wikitext-2/train.txt", "wikitext-2/valid.txt"),
            *(f"multi30k/{part}.{side}" for part in ("train", "val", "test_2016_flickr") for side in ("en", "de")),
        ),
        conll: (
            *(f"weibo_ner/weiboNER_2nd_conll.{part}" for part in ("train", "dev", "test")),
            *(f"wnut17/{name}" for name in ("wnut17train.conll", "emerging.dev.conll", "emerging.test.annotated")),
        ),
        squad: (
            *("xquad/xquad.en.json", "cmrc2018/cmrc2018_trial.json"),
            *(f"jaquad/train/jaquad_train_000{i}.json" for i in range(8)),
        ),
        "\n".join(f"{line}\t{line}\tme" for line in text): (
            f"tatoeba_en_zh/{part}.tsv" for part in ("train", "valid", "test")
        ),
        "\n".join(f"{label} {line}" for label, line in zip(labels, text, strict=True)): (
            f"sst2/stsa.binary.{part}" for part in ("train", "dev", "test")
        ),
        "\n".join(f"{label}\t{line}" for label, line in zip(["label", *labels], ["text_a", *text], strict=True)): (
            f"chnsenticorp/{part}.tsv" for part in ("train", "dev", "test")
        ),
        "\n".join(f"KIND{label}:x {line}" for label, line in zip(labels, text, strict=True)): (
            f"trec/TREC.{part}" for part in ("train", "test")
        ),
        "\n".join(json.dumps({"dialogue": line, "summary": line}) for line in text): (
            f"dialogsum/dialogsum.{part}.jsonl" for part in ("train", "dev")
        ),
    }
    for content, names in kinds.items():
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content + "\n", encoding="utf-8")


class Several(NamedTuple):
    """Two config files and a command line with several mistakes."""

    name: str
    base: str
    overlay: str
    words: tuple[str, ...]
    says: tuple[tuple[str, ...], ...]
    """For each mistake what must stand in one line of the message."""


MISTAKES: list[tuple[str, str, str]] = [
    ("model.dim", "wide", "model.dim: expected a whole number, got 'wide'"),
    ("data.batch_size", "many", "data.batch_size: expected a whole number, got 'many'"),
    ("trainer.max_steps", "often", "trainer.max_steps: expected a whole number, got 'often'"),
    ("model.norm", "rsm", meant("rms")),
    ("data.shufle_buffer", "8", "unknown key 'data.shufle_buffer'. Did you mean 'shuffle_buffer'?"),
    ("trainer.precision", "bf16-mixd", meant("bf16-mixed")),
    ("model.dropout", "a lot", "model.dropout: expected a number, got 'a lot'"),
    ("data.documents", "lines", meant("line")),
    ("trainer.callbacks", "EarlyStoping", meant("EarlyStopping")),
    ("model.widht", "8", "unknown key 'model.widht'"),
    ("data.num_workers", "two", "data.num_workers: expected a whole number, got 'two'"),
    ("trainer.benchmark", "mostly", "trainer.benchmark: expected true or false, got 'mostly'"),
    ("model.feedforward", "{name: gelu, multiple: 2}", "GELU has no argument 'multiple'"),
    ("data.encoding", "[a]", "data.encoding: expected text"),
    ("trainer.log_every_n_step", "5", "unknown key 'trainer.log_every_n_step'. Did you mean 'log_every_n_steps'?"),
    ("model.tie_embeddings", "null", "model.tie_embeddings: expected true or false, got 'null'"),
    ("data.dim", "8", "unknown key 'data.dim'. Did you mean 'model.dim'?"),
    ("trainer.logger", "TensorBoardLoger", meant("TensorBoardLogger")),
    ("model.position", "rotery", meant("rotary")),
    ("data.validation_share", "a tenth", "data.validation_share: expected a number, got 'a tenth'"),
    ("trainer.detect_anomaly", "3", "trainer.detect_anomaly: expected true or false, got '3'"),
    (
        "model.cross_attention",
        "{name: multi_head, num_heads: two}",
        "model.cross_attention.num_heads: expected a whole",
    ),
]
"""Key, wrong value, and what the message says of it."""
ABOVE: list[tuple[str, str, str]] = [
    ("checkpoint.keep", "[1]", "checkpoint.keep: expected a whole number, got '[1]'"),
    ("seed_everything", "lucky", "seed_everything: expected true or false or a whole number, got 'lucky'"),
    ("outptu", "x", "unknown key 'outptu'. Did you mean 'output'?"),
    ("checkpoint.every_n_step", "5", "unknown key 'checkpoint.every_n_step'. Did you mean 'every_n_steps'?"),
    ("model.init_from", "[a]", "model.init_from: expected text"),
    ("name", "[a]", "name: expected text"),
    ("model.max_bad_steps", "few", "model.max_bad_steps: expected a whole number, got 'few'"),
]
"""More of them, for the second file and the command line, which need not have the group."""


def several_mistakes() -> list[Several]:
    """Two mistakes in a shipped config, one in a file above it, one on the command line; all must be reported."""
    configs = [config for config in shipped() if not config.has("model.init_from")]
    found = []
    for turn in range(44):
        config = configs[turn % len(configs)]
        two = [MISTAKES[(2 * turn) % len(MISTAKES)], MISTAKES[(2 * turn + 3) % len(MISTAKES)]]
        above, word = ABOVE[turn % len(ABOVE)], MISTAKES[(2 * turn + 8) % len(MISTAKES)]
        base, says = config, []
        for key, value, text in two:
            base = Shipped(config.name, with_value(base, key, value)[0].splitlines())
            says.append((key, text))
        numbers = [base.line(key) for key, _ in says]  # the second mistake may have moved the first
        expected = [(f"base.yaml:{number + 1}: ", text) for number, (_, text) in zip(numbers, says, strict=True)]
        names = above[0].split(".")
        overlay = "\n".join(f"{'  ' * depth}{name}:" for depth, name in enumerate(names)) + f" {above[1]}\n"
        expected.append((f"overlay.yaml:{len(names)}: ", above[2]))
        expected.append(("command line: ", word[2]))
        words = (f"--{word[0]}", word[1])
        found.append(Several(config.name, base.text, overlay, words, tuple(expected)))
    return found
