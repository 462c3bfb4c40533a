"""``model.distill``: what the loss is, what is trained, what a checkpoint needs, and what is refused."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from command import TINY, Result, done, llmkit
from torch import Tensor

import llmkit as package
from llmkit.contracts import IGNORE
from llmkit.ops import losses
from llmkit.ops.distillation import Distillation, Logits, SoftTargets
from llmkit.ops.losses import linear_cross_entropy, plain_linear_cross_entropy
from llmkit.run.throughput import Meter


def values(rows: int, dim: int, vocab: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((rows, dim), (vocab, dim), (vocab,))
    hidden, weight, bias = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes)
    return hidden, weight, bias


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunk", [40, 10**6])
@pytest.mark.parametrize(("weight", "smoothing"), [(0.0, 0.1), (0.3, 0.1), (1.0, 0.0)])
def test_the_loss_in_chunks_equals_the_formula(padded: bool, chunk: int, weight: float, smoothing: float) -> None:
    """With its gradients: the paper's formula written out, and the plain definition."""
    own = [value.requires_grad_() for value in values(23, 6, 11, 0)]
    theirs, temperature = values(23, 4, 11, 1), 3.0
    targets = torch.arange(23) % 11
    targets[3:8] = IGNORE
    kept = targets != IGNORE
    scores, taught = ((hidden @ matrix.T + bias)[kept] for hidden, matrix, bias in (own, theirs))
    p, q = ((x / temperature).exp() / (x / temperature).exp().sum(-1, keepdim=True) for x in (taught, scores))
    hard = F.cross_entropy(scores, targets[kept], reduction="sum", label_smoothing=smoothing)
    expected = weight * temperature**2 * (p * (p / q).log()).sum() + (1 - weight) * hard
    wanted = torch.autograd.grad(expected, own, retain_graph=True)
    soft = SoftTargets(Logits(*theirs), temperature, weight)
    names = {"CHUNK_ELEMENTS": chunk, "MULTIPLE": {}} if padded else {"CHUNK_ELEMENTS": chunk}
    with mock.patch.multiple(losses, **names):
        for function in (linear_cross_entropy, plain_linear_cross_entropy):
            loss = function(own[0], own[1], targets, smoothing, own[2], soft)
            assert int(loss.count) == 18
            torch.testing.assert_close(loss.total, expected)
            torch.testing.assert_close(torch.autograd.grad(loss.total, own), wanted)


def test_no_scores_are_held_whole() -> None:
    """The buffers are those of a chunk."""
    made: list[int] = []
    new = Tensor.new_empty

    def recorded(self: Tensor, *size: Any, **rest: Any) -> Tensor:
        made.append(torch.Size(size).numel())
        return new(self, *size, **rest)

    own, theirs = values(512, 4, 64, 0), Logits(*values(512, 4, 64, 1))
    with mock.patch.object(losses, "CHUNK_ELEMENTS", 64 * 64), mock.patch.object(Tensor, "new_empty", recorded):
        linear_cross_entropy(own[0], own[1], torch.arange(512) % 64, soft=SoftTargets(theirs, 2.0, 0.5))
    assert made == [64 * 64] * 2


ROOT = Path(__file__).resolve().parent.parent
HEADS = {
    "generation": ("text.txt", ()),
    "classification": ("rows.csv", ("--model.head.topology", "decoder")),
    "translation": ("pairs.jsonl", ()),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("distill")
    (path / "text.txt").write_text("".join(f"word {i} of line {i * 7 % 13}\n" for i in range(60)))
    (path / "other.txt").write_text("".join(f"zz {i} yy\n" for i in range(60)))
    (path / "rows.csv").write_text("text,label\n" + "".join(f"word {i},{'ab'[i % 2]}\n" for i in range(40)))
    rows = [f'{{"source": "word {i}", "target": "wort {i}"}}\n' for i in range(40)]
    (path / "pairs.jsonl").write_text("".join(rows))
    return path


def words(folder: Path, head: str, name: str, *more: object) -> list[object]:
    data, options = HEADS[head]
    given = ["fit", "--data.train", folder / data, "--model.head", head, *options, *TINY]
    return [*given, "--output", folder / f"{head}_{name}", *more]


def last(run: Result) -> Path:
    return run.folder / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module", params=HEADS)
def taught(request: pytest.FixtureRequest, folder: Path) -> tuple[str, Path]:
    """A head, and a teacher with softmax attention for it."""
    run = done(*words(folder, request.param, "teacher", "--model.optimizer.lr", "0.01"))
    return request.param, last(run)


SMALL = ("--model.dim", 8, "--model.dropout", "0.1", "--model.scheduler.total_steps", 4)
STUDENT = {"generation": "lstm", "classification": "min_gru", "translation": "multi_head"}


def student(folder: Path, taught: tuple[str, Path], name: str, *more: object) -> list[object]:
    head, teacher = taught
    own = ("--model.attention", STUDENT[head], *SMALL)
    return words(folder, head, name, *own, "--model.distill.teacher", teacher, *more)


def content(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def test_weight_0_is_plain_training_to_the_bit(folder: Path, taught: tuple[str, Path]) -> None:
    plain = done(*words(folder, taught[0], "plain", "--model.attention", STUDENT[taught[0]], *SMALL))
    zero = done(*student(folder, taught, "zero", "--model.distill.weight", 0))
    ends = [content(last(run))["state_dict"] for run in (plain, zero)]
    assert ends[0].keys() == ends[1].keys()  # the teacher is not saved
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert f"llmkit: note: model.distill: learns from {taught[1]} (MultiHead, " in zero.err


@pytest.mark.parametrize("taught", ["translation"], indirect=True)
def test_a_run_is_resumed_exactly_with_the_same_teacher(folder: Path, taught: tuple[str, Path]) -> None:
    """Which may have moved. What comes out needs none."""
    teacher = taught[1]
    weight = ("--model.distill.weight", 0.7)
    whole, half = (done(*student(folder, taught, f"{n}", *weight, "--trainer.max_steps", n)) for n in (4, 2))
    stored = content(last(half))["llmkit"]["model"]["distill"]
    assert stored["weight"] == 0.7 and len(stored["sha256"]) == 64
    moved = teacher.with_name("moved.ckpt")
    shutil.copy(teacher, moved)
    again = ("fit", "--ckpt_path", last(half), "--trainer.max_steps", 4, "--output", folder / "again")
    resumed = done(*again, "--model.distill.teacher", moved)
    ends = [content(last(run))["state_dict"] for run in (whole, resumed)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    for given, says in (
        (("--model.distill.teacher", last(half)), f"{last(half)} has other weights than the teacher that the run"),
        (("--model.distill", "null"), "is no teacher, but the checkpoint's run began with"),
    ):
        refused = llmkit(*again, *given)
        assert refused.code == 2 and f"model.distill.teacher: {says}" in refused.err, refused.err
        assert len(refused.err.splitlines()) == 1
    moved.unlink()
    model = package.load(last(resumed))
    assert model.teacher is None and model.spec["distill"]["teacher"] == str(moved)
    done("validate", "--ckpt_path", last(resumed))


def test_what_is_trained_and_counted(taught: tuple[str, Path]) -> None:
    """Nothing of the teacher gets a gradient or is a parameter; its forward pass is counted."""
    teacher = taught[1]
    model = package.load(teacher)
    names = set(model.state_dict())
    alone = Meter(model)
    model.spec["distill"] = {"teacher": str(teacher)}
    model.load_teacher()
    assert model.teacher is not None and not model.teacher.model.training
    assert set(dict(model.named_parameters())) == names == set(model.state_dict())
    model.teacher.check(model)
    row = {"text": "word", "label": "a", "source": "word", "target": "wort"}
    batch = model._batch([row] * 2, (*model.head.inputs, *model.head.targets))
    both = Meter(model)
    for meter in (alone, both):
        meter.add(batch)
    assert 3 * both.totals().flops == pytest.approx(4 * alone.totals().flops)
    # A student that is its teacher is at no distance from it: what is left is its own loss.
    own = model.head.loss(model.network, batch)
    mixed = model.teacher.loss(model.head, model.network, batch)
    torch.testing.assert_close(mixed.total, own.total * 0.5)
    assert torch.equal(mixed.count, own.count)
    mixed.total.backward()
    assert all(value.grad is None for value in model.teacher.model.parameters())
    assert any(value.grad is not None for value in model.parameters())


@pytest.fixture(scope="module")
def generator(folder: Path) -> Path:
    """A teacher that writes text."""
    return last(done(*words(folder, "generation", "one")))


def test_half_precision(folder: Path, generator: Path) -> None:
    for precision in ("bf16-mixed", "bf16-true"):
        done(*student(folder, ("generation", generator), precision, "--trainer.precision", precision))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--model.distill.temperature", "0"), "model.distill.temperature: must be above 0, got 0.0"),
        (("--model.distill.weight", "1.5"), "model.distill.weight: must be between 0 and 1, got 1.5"),
        (("--model.distill.teacher", "nowhere.ckpt"), "model.distill.teacher: "),
        (("--model.distill.teacher", ""), "model.distill.teacher: must be set: the checkpoint or run folder to learn"),
        (("--model.distill.teachers", "x"), "unknown key 'model.distill.teachers'. Did you mean 'teacher'?"),
        (("--data.tokenizer", "byte"), "has the tokenizer Char, this model Byte: they must be the same"),
        (("--data.train", "other.txt"), "a vocabulary of"),
        (("--data.train", "swapped.txt"), "has a Char trained on other data than this model's Char: train both"),
        (("--model.context", "32"), "reads at most 16 positions, and this model 32 (model.context)"),
        (("--model.head", "masked_lm"), "model.distill: MaskedLM cannot learn from a teacher"),
        (
            ("--model.head", "completion", "--data.train", "prompts.jsonl"),
            "has the head Generation, this model Completion",
        ),
    ],
)
def test_what_is_refused(options: tuple[str, ...], says: str, folder: Path, generator: Path) -> None:
    (folder / "swapped.txt").write_text((folder / "text.txt").read_text().replace("w", "W"))
    (folder / "prompts.jsonl").write_text('{"prompt": "word 1", "completion": "of line"}\n' * 9)
    given = [str(folder / word) if word.endswith((".txt", ".jsonl")) else word for word in options]
    result = llmkit(*words(folder, "generation", "no", "--model.distill.teacher", generator, *given))
    errors = [line for line in result.err.splitlines() if not line.startswith("llmkit: note: ")]
    assert result.code == 2 and len(errors) == 1 and says in errors[0], result.err


def test_settings_are_checked() -> None:
    with pytest.raises(package.UserError, match="must be above 0, got nan"):
        Distillation("x", temperature=float("nan")).check()


def recipes() -> Iterator[list[str]]:
    """The commands of the guide, without the word ``llmkit``."""
    section = (ROOT / "docs" / "compressing.md").read_text("utf-8").partition("## Distillation\n")[2]
    for block in re.findall(r"```sh\n(.*?)```", section.partition("\n## ")[0], re.S):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line)[1:]


def test_the_recipes_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a small size. On sequences the student is trained on the best of the teacher's beams."""
    shutil.copy(folder / "pairs.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    done(*words(folder, "translation", "x")[:-2], "--name", "translator")
    commands = list(recipes())
    assert [command[0] for command in commands] == ["fit", "fit", "infer", "predict", "fit"]
    for command in commands:
        given = [word.replace("configs/", f"{ROOT}/configs/") for word in command]
        if command[0] == "fit":
            given += list(map(str, TINY))
            given += [] if "--data.train" in command else ["--data.train", str(folder / "text.txt")]
        if command[0] == "predict":
            given += ["--model.decoding.max_new_tokens", "4"]
        done(*given)
    rows = [json.loads(line) for line in Path("runs/translator/version_1/predictions.jsonl").read_text().splitlines()]
    options = package.DecodingOptions(num_beams=5, max_new_tokens=4)
    expected = package.load("runs/translator/version_0").predict([{"source": f"word {i}"} for i in range(2)], options)
    assert len(rows) == 40 and rows[:2] == expected
