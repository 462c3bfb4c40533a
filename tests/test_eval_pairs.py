"""``llmkit eval --pairs``: accuracies against plain computations."""

from __future__ import annotations

import json
import math
from pathlib import Path

import hf_folder
import pytest
import torch
from command import done, llmkit

from llmkit import load
from llmkit.model.pairs import Accuracy, judge, read_pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and two files of pairs; the second one has a blank line and no names."""
    path = tmp_path_factory.mktemp("pairs")
    hf_folder.write(path / "gpt2")
    rows = [(f"ABC{letter}", f"CB{letter}A") for letter in "DEFGHIJKLM"] + [("A", "A")]
    lines = [
        json.dumps({"sentence_good": good, "sentence_bad": bad, "UID": f"rule_{i % 2}", "linguistics_term": "order"})
        for i, (good, bad) in enumerate(rows)
    ]
    (path / "one.jsonl").write_text("\n".join(lines) + "\n")
    (path / "two.jsonl").write_text('{"sentence_good": "A", "sentence_bad": "BCDEFG"}\n\n')
    return path


@torch.no_grad()
def test_it_is_the_sum_of_the_log_probabilities(folder: Path) -> None:
    """Each sentence alone, token by token, after the end of a document; equal ones are wrong."""
    model = load(f"hf:{folder / 'gpt2'}")
    assert model.tokenizer is not None
    net = model.network

    def total(text: str) -> float:
        assert model.tokenizer is not None
        ids = [model.tokenizer.eos_id, *model.tokenizer.encode(text)]
        seen = hf_logits(ids)
        return sum(float(seen[i].log_softmax(-1)[ids[i + 1]]) for i in range(len(ids) - 1))

    def hf_logits(ids: list[int]) -> torch.Tensor:
        from llmkit.sequence import Sequence

        tokens = torch.tensor([ids])
        return net.decode(tokens, Sequence.of(tokens))[0] @ net.output_weight_VD.T

    pairs = [pair for name in ("one", "two") for pair in read_pairs(folder / f"{name}.jsonl")]
    expected = [total(pair.good) > total(pair.bad) for pair in pairs]
    assert judge(model, pairs) == judge(model, pairs, batch_size=3) == expected
    assert not expected[-2] and 0 < sum(expected) < len(expected)


def test_the_command(folder: Path, tmp_path: Path) -> None:
    words = ("eval", f"hf:{folder / 'gpt2'}", "--pairs", folder / "*.jsonl")
    facts = json.loads(done(*words, "--json", "--output", tmp_path / "out").out)
    assert facts == json.loads((tmp_path / "out" / "pairs.json").read_text())
    assert (tmp_path / "out" / "pairs.png").stat().st_size > 1000
    assert facts["pairs"] == 12 and list(facts["uid"]) == ["rule_0", "rule_1", "two"]
    assert list(facts["term"]) == ["order", "two"] and facts["term"]["order"]["pairs"] == 11
    shares = [facts["uid"][name]["accuracy"] for name in facts["uid"]]
    assert facts["mean"] == pytest.approx(sum(shares) / 3)
    assert facts["term"]["order"]["right"] == facts["uid"]["rule_0"]["right"] + facts["uid"]["rule_1"]["right"]
    printed = done(*words, "--limit", 2).out
    assert "paradigm" in printed and f"mean over paradigms: {facts['mean']:.3f}"[:20] in printed


@pytest.mark.parametrize(
    ("right", "count", "low", "high"), [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (500, 1000, 0.4691, 0.5309)]
)
def test_the_interval_is_wilsons(right: int, count: int, low: float, high: float) -> None:
    assert Accuracy("x", right, count).interval == pytest.approx((low, high), abs=1e-4)
    p, (left, right_end) = right / count, Accuracy("x", right, count).interval
    for end in (left, right_end):  # where the score test is just significant
        assert abs(p - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / count), abs=1e-9)


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"sentence_good": "A", "sentence_bad": "B"}\n{"sentence_good": "A"}\n')
    (tmp_path / "empty.jsonl").write_text('{"sentence_good": "A", "sentence_bad": " "}\n')
    (tmp_path / "none.jsonl").write_text("\n")
    bert = hf_folder.write_bert(tmp_path / "bert")
    done("import", f"hf:{bert}", tmp_path / "bert.ckpt", "--head", "masked_lm")
    model, pairs = f"hf:{folder / 'gpt2'}", folder / "one.jsonl"
    for checkpoint, file, says in [
        (model, tmp_path / "bad.jsonl", "bad.jsonl:2: expected a JSON object with sentence_good and sentence_bad"),
        (model, tmp_path / "empty.jsonl", "empty.jsonl:1: sentence_good and sentence_bad should be texts that are"),
        (model, tmp_path / "none.jsonl", "eval: there are no pairs in "),
        (model, tmp_path / "gone.jsonl", "gone.jsonl: No such file or directory"),
        (tmp_path / "bert.ckpt", pairs, "MaskedLM does not say how probable a text is: pairs are for generation"),
    ]:
        result = llmkit("eval", checkpoint, "--pairs", file)
        assert result.code == 2 and says in result.err, result.err
