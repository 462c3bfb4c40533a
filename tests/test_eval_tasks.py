"""``llmkit eval --tasks``: what lm-evaluation-harness finds, against its own model on the export and plain loops."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command import done, llmkit
from torch import Tensor

from llmkit import LanguageModel, UserError, load, plugin
from llmkit.run.saving import save_model
from llmkit.sequence import DecodingOptions, Sequence

lm_eval = pytest.importorskip("lm_eval")

CONTEXT = 24
DOCS: list[dict[str, Any]] = [
    {"question": "the cat sat on", "choices": [" the mat", " a hat and a mat", " mats"], "gold": 0},
    {
        "question": "the hat is on the mat, and the cat is on the hat, and the mat is",
        "choices": [" on", " a cat", " the"],
    },
    {"question": "a mat", "choices": [" sat", " is a mat and a hat", "s"], "gold": 2},
]
COMMON = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1}}
TASKS: dict[str, dict[str, Any]] = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    },
    "roll": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} {{question}} {{question}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 10},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """A recurrent model whose texts are not packed: its documents begin with the end of a text."""
    made = LanguageModel(
        head=plugin("head", "generation"), attention=plugin("attention", "gru"), dim=16, context=CONTEXT
    )
    made.tokenizer = plugin("tokenizer", "char")()
    made.tokenizer.train(iter(["the cat sat on the mat, and the hat is a hat"] * 9))
    made.configure_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made.eval()


@torch.no_grad()
def log_probability(model: LanguageModel, ids: list[int]) -> Tensor:
    """Of each token after the first, given all before it."""
    hidden = model.network.decode(torch.tensor([ids[:-1]]), Sequence.dense(len(ids) - 1))[0]
    logp = (hidden @ model.network.output_weight_VD.T).log_softmax(-1)
    return logp.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def expected(model: LanguageModel) -> dict[str, float]:
    """The figures of the tasks by plain loops, one text at a time."""
    words = model.tokenizer
    assert words is not None
    right, bits, size = 0, 0.0, 0
    for doc in DOCS:
        totals = []
        for choice in doc["choices"]:
            whole, context = words.encode(doc["question"] + choice), words.encode(doc["question"])
            totals.append(float(log_probability(model, whole[-CONTEXT - 1 :])[len(context) - len(whole) :].sum()))
        right += totals.index(max(totals)) == doc["gold"]
        text = " ".join([doc["question"]] * 3)
        ids, at = words.encode(text), 0
        while at < len(ids):  # windows that overlap by the one token that is read first
            read = [words.eos_id, *ids][at : at + CONTEXT + 1]
            if at and len(ids) - at < CONTEXT:  # the last one is as long as the others, but counts what is left
                read = [words.eos_id, *ids][-CONTEXT - 1 :]
            bits -= float(log_probability(model, read)[-min(CONTEXT, len(ids) - at) :].sum()) / math.log(2)
            at += CONTEXT
        size += len(text.encode())
    found = sum(written(model, doc["question"]) == doc["answer"] for doc in DOCS)
    return {"acc": right / len(DOCS), "bits_per_byte": bits / size, "exact_match": found / len(DOCS)}


def written(model: LanguageModel, question: str) -> str:
    """What is written before an e; of a question is read what leaves room for it, a token a character."""
    return str(model.predict([question[10 - CONTEXT :]], GREEDY)[0]["text"]).split("e")[0]


GREEDY = DecodingOptions(max_new_tokens=10, temperature=0.0)


@pytest.fixture(scope="module")
def folder(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint, its export, and a folder of tasks with their data. One answer of three is what it writes."""
    path = tmp_path_factory.mktemp("eval")
    for number, doc in enumerate(DOCS):
        doc.setdefault("gold", 1)
        doc["answer"] = written(model, doc["question"]) if number == 1 else "no"
    (path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    (path / "tasks").mkdir()
    for name, task in TASKS.items():
        content = {**COMMON, "task": name, **task, "dataset_kwargs": {"data_files": {"test": str(path / "docs.jsonl")}}}
        (path / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    (path / "tasks" / "all.yaml").write_text(yaml.safe_dump({"group": "all_three", "task": [*TASKS]}))
    save_model(model, path / "model.ckpt")
    done("export", path / "model.ckpt", path / "out")
    return path


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)


def test_the_command_finds_what_plain_loops_find(model: LanguageModel, folder: Path, tmp_path: Path) -> None:
    files = [folder / "tasks" / f"{name}.yaml" for name in TASKS]
    words = ("eval", folder / "model.ckpt", "--tasks", *files, "--batch_size", 2)
    result = done(*words, "--output", tmp_path / "judged", "--json")
    facts = json.loads(result.out)["tasks"]
    assert facts == json.loads((tmp_path / "judged" / "tasks.json").read_text())
    own = {name: value for found in facts["results"].values() for name, value in found.items()}
    for name, value in expected(model).items():
        assert own[f"{name},none"] == pytest.approx(value, rel=1e-5), name
    assert own["exact_match,none"] == pytest.approx(1 / 3)
    table = done("eval", f"hf:{folder / 'out'}", "--tasks", folder / "tasks" / "all.yaml", "--limit", 2).out
    assert "choose" in table and "bits_per_byte" in table and "  2\n" in table


def test_each_answer_is_that_of_the_harness_on_the_export(model: LanguageModel, folder: Path) -> None:
    pytest.importorskip("accelerate")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    import llmkit.interop.transformers  # noqa: F401
    from llmkit.interop.lm_eval import Adapter

    theirs = HFLM(pretrained=str(folder / "out"), device="cpu", dtype="float32", batch_size=2, max_length=CONTEXT)
    own = Adapter(load(folder / "model.ckpt"), batch_size=2)
    pairs = [(doc["question"], choice) for doc in DOCS for choice in doc["choices"]] + [("", " the mat"), ("a ", "cat")]
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    for one, other in zip(own.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert one == (pytest.approx(other[0], abs=1e-5 * abs(other[0])), other[1])
    asked = [Instance("rolling", {}, (doc["question"] * 4,), number) for number, doc in enumerate(DOCS)]
    totals = theirs.loglikelihood_rolling(asked)
    assert own.loglikelihood_rolling(asked) == pytest.approx(totals, rel=1e-5)
    given = [{"until": ["e"], "max_gen_toks": 10}, {"until": [], "max_gen_toks": 8}, {"until": "s", "max_gen_toks": 10}]
    asked = [Instance("write", {}, (doc["question"], how), 0) for doc in DOCS for how in given]
    assert own.generate_until(asked) == theirs.generate_until(asked)


def test_what_cannot_be_judged(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.yaml").write_text("task: broken\ndataset_path: json\ndataset_kwargs: {data_files: gone.json}\n")
    path = folder / "model.ckpt"
    for words, says in {
        (): "nothing to judge by: give --pairs FILE or --tasks NAME_OR_YAML",
        ("--tasks", "gone.yaml"): "eval: gone.yaml does not exist",
        ("--tasks", tmp_path / "broken.yaml"): "broken.yaml cannot be loaded: ",
    }.items():
        result = llmkit("eval", path, *words)
        assert result.code == 2 and says in result.err, result.err
    from llmkit.interop import lm_eval as ours

    def few(include_path: Any, include_defaults: bool) -> Any:
        """The harness with three tasks of its own: to read all of them takes ten seconds."""
        assert include_defaults and not include_path
        return lm_eval.tasks.TaskManager(include_path=str(folder / "tasks"), include_defaults=False)

    monkeypatch.setattr(ours, "TaskManager", few)
    result = llmkit("eval", path, "--tasks", "chose")
    assert result.code == 2 and "unknown task 'chose'. Did you mean 'choose'? Allowed: a YAML file, or" in result.err
    assert "choose" in done("eval", path, "--tasks", "choose", "--limit", 1).out
    other = LanguageModel(head=plugin("head", "masked_lm"), dim=8, num_layers=1)
    with pytest.raises(UserError, match="MaskedLM is not a language model: tasks are for generation and completion"):
        ours.Adapter(other)
    monkeypatch.setattr("llmkit.commands.eval.find_spec", lambda name: None)
    result = llmkit("eval", path, "--tasks", folder / "tasks" / "roll.yaml")
    assert result.code == 2 and result.err.endswith("needs lm-evaluation-harness: pip install 'llmkit[eval]'\n")
    assert "lm_eval" in sys.modules
