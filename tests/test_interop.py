"""Folders of llmkit's own architecture: transformers runs them as llmkit does, and llmkit reads them back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command import done, llmkit
from test_hf import assert_equal, scores
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

import llmkit.interop.transformers as interop
from llmkit import LanguageModel, UserError, load, plugin, registry
from llmkit.checkpoint.content import section
from llmkit.contracts import Tokenizer
from llmkit.hf.export import Exported, export
from llmkit.sequence import DecodingOptions, Sequence

WORDS = "a text to learn from, and another one; the third text is longer than the others are. " * 9
PROMPTS = ["a text to learn", "another one is", "the third text is longer than"]
CONTEXT = 24
STEP = (
    *("--data.batch_size", "2", "--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu"),
    *("--trainer.enable_progress_bar", "false"),
)
COLUMNS: dict[str, list[Any]] = {
    "label": ["bad", "fair", "good"],
    "labels": [["x"], ["y", "z"]],
    "score": [1.0, 2.0, 4.0],
    "target": ["x"],
    "answers": [{"text": ["x"], "answer_start": [0]}],
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found: Tokenizer = plugin("tokenizer", "bpe", vocab_size=300)()
    found.train(iter([WORDS]))
    return found


def scrambled(tokenizer: Tokenizer, head: str | dict[str, Any] = "generation", **parts: Any) -> LanguageModel:
    """A small model, built, whose weights are far from their initial values."""
    sizes = {"dim": 16, "num_layers": 1, "context": CONTEXT}
    model = LanguageModel(**{**sizes, "head": head, **parts})
    model.tokenizer, model.head_ready = tokenizer, True
    model.head.learn(COLUMNS)
    model.configure_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def written(model: LanguageModel, folder: Path) -> Exported:
    assert model.tokenizer is not None
    part = section(model.spec, model.tokenizer, model.head, {})
    return export(folder, part, model.state_dict(), model.tokenizer, "card")


def exported(model: LanguageModel, folder: Path, kind: str, **how: Any) -> Any:
    """A model written, and loaded by transformers."""
    result = written(model, folder)
    assert result.architecture == f"LlmkitFor{kind}" and result.reason
    loader = getattr(transformers, f"AutoModelFor{kind}")
    found, info = loader.from_pretrained(folder, output_loading_info=True, **how)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return found.eval()


def ended(texts: list[str]) -> list[str]:
    """Texts without the bytes of an incomplete character at the end, which llmkit leaves out."""
    return [text.rstrip("\ufffd") for text in texts]


VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"attention": name} for name in registry.entries("attention") if name != "pattern"},
    "pattern": {"attention": ["lstm", {"name": "sliding_window", "window": 4}], "num_layers": 2},
    "alibi": {"position": "alibi", "tie_embeddings": False, "output_bias": True},
    "learned": {"position": "learned", "norm_first": False, "embedding_norm": True, "norm": "layer"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_decoder_of_any_variant(variant: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Scores of left-padded rows; text beyond the context, with the cache; beams with the cache and without."""
    model = scrambled(tokenizer, **VARIANTS[variant])
    theirs = exported(model, tmp_path / "out", "CausalLM")
    own: Any = AutoTokenizer.from_pretrained(tmp_path / "out", padding_side="left")
    read = own(PROMPTS, return_tensors="pt", padding=True)
    ids, real = read["input_ids"], read["attention_mask"]
    logits = theirs(**read).logits
    for row in range(len(ids)):
        alone = ids[row : row + 1, real[row] > 0]
        expected = scores(model.network, model.network.decode(alone, Sequence.of(alone)))
        assert_equal(logits[row, real[row] > 0][None], expected, torch.ones_like(alone))

    answers = [answer["text"] for answer in model.predict(PROMPTS, DecodingOptions(max_new_tokens=22, temperature=0.0))]
    texts = theirs.generate(**read, max_new_tokens=22, do_sample=False)[:, ids.shape[1] :]
    assert ended(own.batch_decode(texts, skip_special_tokens=True)) == ended(answers)
    assert int(real.sum(1).min()) + 22 > CONTEXT

    how = {**read, "max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    assert torch.equal(theirs.generate(**how), theirs.generate(**how, use_cache=False))


@torch.no_grad()
def test_generation_by_a_pipeline_in_half_precision_and_saved_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = scrambled(tokenizer, attention="lstm")
    theirs = exported(model, tmp_path / "out", "CausalLM")
    pipe: Any = transformers.pipeline("text-generation", model=str(tmp_path / "out"))
    expected = model.predict(PROMPTS[:1], DecodingOptions(max_new_tokens=8, temperature=0.0))[0]
    (answer,) = pipe(PROMPTS[0], max_new_tokens=8, do_sample=False)
    assert ended([answer["generated_text"]]) == ended([expected["prompt"] + expected["text"]])

    half: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert {value.dtype for value in half.state_dict().values()} == {torch.bfloat16}
    ids = torch.tensor([tokenizer.encode(PROMPTS[2])])
    torch.testing.assert_close(half(ids).logits.float(), theirs(ids).logits, rtol=0.05, atol=0.1)
    half.generate(ids, max_new_tokens=30)

    # Trained on and saved by transformers: the loss is that of the next token, and code comes from llmkit.
    with torch.enable_grad():
        loss = theirs(ids, labels=ids).loss
        loss.backward()
    assert float(loss) == pytest.approx(-model.score(PROMPTS[2:])[0]["log_probability"] / (ids.shape[1] - 1), rel=1e-5)
    theirs.resize_token_embeddings(305)
    theirs.save_pretrained(tmp_path / "again")
    again: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert type(again) is interop.LlmkitForCausalLM and torch.equal(again(ids).logits, theirs(ids).logits)
    again.save_pretrained(tmp_path / "third")
    assert {path.name for path in (tmp_path / "third").iterdir()} == {
        path.name for path in (tmp_path / "again").iterdir()
    }
    AutoTokenizer.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert load(f"hf:{tmp_path / 'again'}").network.embedding.weight.shape == (305, 16)


@torch.no_grad()
def test_a_translator(tokenizer: Tokenizer, tmp_path: Path) -> None:
    head = {"name": "translation", "start": ["eos", "bos"]}
    model = scrambled(tokenizer, head, attention="differential", separate_positions=True, embedding_scale=4.0)
    theirs = exported(model, tmp_path / "out", "Seq2SeqLM")
    own: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    read = own(PROMPTS, return_tensors="pt", padding=True)
    answers = [answer["text"] for answer in model.predict(PROMPTS, DecodingOptions(max_new_tokens=20, temperature=0.0))]
    how: dict[str, Any] = {**read, "do_sample": False, "num_beams": 1, "max_new_tokens": 21}
    assert ended(own.batch_decode(theirs.generate(**how), skip_special_tokens=True)) == ended(answers)
    how |= {"num_beams": 3, "max_new_tokens": 6}
    assert torch.equal(theirs.generate(**how), theirs.generate(**how, use_cache=False))
    left: Any = AutoTokenizer.from_pretrained(tmp_path / "out", padding_side="left")
    labels = left(text_target=PROMPTS[:1], return_tensors="pt")["input_ids"]
    given = left(PROMPTS[1:2], return_tensors="pt")
    begun = torch.cat([torch.tensor([[tokenizer.eos_id]]), labels[:, :-1]], 1)
    logits = theirs(**given, decoder_input_ids=begun).logits
    assert torch.equal(theirs(**given, labels=labels).loss, torch.nn.functional.cross_entropy(logits[0], labels[0]))


CLASSIFIERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mean": ({"name": "classification"}, {"attention": "linear"}),
    "last": ({"name": "classification", "topology": "decoder"}, {"attention": "gru"}),
    "first, pair": ({"name": "classification", "pool": "first", "pair": True}, {"token_types": 2}),
    "pooler": ({"name": "multi_label", "pool": "pooler"}, {}),
    "regression": ({"name": "regression"}, {}),
}


@pytest.mark.parametrize("case", CLASSIFIERS)
@torch.no_grad()
def test_classifiers(case: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    head, parts = CLASSIFIERS[case]
    model = scrambled(tokenizer, head, **parts)
    theirs = exported(model, tmp_path / "out", "SequenceClassification")
    others = PROMPTS[::-1]
    rows = [{"text": one, "text_pair": other} for one, other in zip(PROMPTS, others, strict=True)]
    answers = [answer.get("probabilities") or answer for answer in model.predict(rows)]
    for side in ("right", "left"):
        own: Any = AutoTokenizer.from_pretrained(tmp_path / "out", padding_side=side)
        texts = (PROMPTS, others) if head.get("pair") else (PROMPTS,)
        logits = theirs(**own(*texts, return_tensors="pt", padding=True, truncation=True)).logits
        if "score" not in answers[0]:
            logits = logits.sigmoid() if head["name"] == "multi_label" else logits.softmax(-1)
        for row, answer in zip(logits, answers, strict=True):
            assert row.tolist() == pytest.approx([*answer.values()], abs=1e-5)
    pipe: Any = transformers.pipeline("text-classification", model=theirs, tokenizer=own, top_k=None)
    given = {"text": PROMPTS[0], "text_pair": others[0]} if head.get("pair") else PROMPTS[:1]
    found = pipe(given)
    found = found if isinstance(found[0], dict) else found[0]
    assert {one["label"]: one["score"] for one in found} == pytest.approx(answers[0], abs=1e-5)


@torch.no_grad()
def test_a_masked_language_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = scrambled(tokenizer, {"name": "masked_lm", "transform": True}, attention="low_rank")
    theirs = exported(model, tmp_path / "out", "MaskedLM")
    own: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    read = own(PROMPTS, return_tensors="pt", padding=True)
    ids, real = read["input_ids"], read["attention_mask"]
    hidden: Tensor = model.head.dense(model.network.encode(ids, Sequence.of(ids, real)).x_BSD)  # type: ignore[operator]
    assert_equal(theirs(**read).logits, scores(model.network, hidden), real)
    pipe: Any = transformers.pipeline("fill-mask", model=theirs, tokenizer=own)
    (found,) = pipe(f"a text{own.mask_token}", top_k=1, tokenizer_kwargs={"split_special_tokens": False})
    ids = torch.tensor([[*tokenizer.encode("a text"), tokenizer.mask_id]])
    assert found["score"] == pytest.approx(float(theirs(ids).logits[0, -1].softmax(-1).max()), abs=1e-5)


def test_transformers_builds_installed_plugins_only(tokenizer: Tokenizer, tmp_path: Path) -> None:
    written(scrambled(tokenizer, attention="gru"), tmp_path / "out")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    content["llmkit"]["model"]["attention"] = {"class_path": "os.mkdir", "init_args": {"path": str(tmp_path / "x")}}
    (tmp_path / "out" / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="out config.json needs attention os.mkdir, which is not an installed plugin"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not (tmp_path / "x").exists()


def test_heads_without_a_class_of_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = scrambled(tokenizer, "question_answering")
    with pytest.raises(UserError, match="no counterpart of the head question_answering; these can be written"):
        written(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_is_the_checkpoint_that_it_was_made_from(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Weights, settings and tokenizer, by every way in which a folder is used; and by the command."""
    model = scrambled(tokenizer, attention={"name": "min_gru"}, decoding={"max_new_tokens": 5})
    written(model, tmp_path / "out")
    again = load(f"hf:{tmp_path / 'out'}")
    assert again.tokenizer is not None and again.tokenizer.to_state() == tokenizer.to_state()
    assert again.spec == json.loads(json.dumps({**model.spec, "vocab_size": 300}))
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    (tmp_path / "text.txt").write_text(WORDS)
    words = ("--data.train", tmp_path / "text.txt", "--output", tmp_path, "--model.attention", "min_gru", *STEP)
    result = done("fit", "--model.init_from", f"hf:{tmp_path / 'out'}", *words, "--trainer.max_steps", 1)
    assert f"{len(model.state_dict())} weights taken, and its tokenizer" in result.err
    printed = done("export", result.folder, tmp_path / "next").out
    assert "LlmkitForCausalLM" in printed and "needs llmkit to load it: transformers has no arch" in printed
    card = (tmp_path / "next" / "README.md").read_text()
    assert "import llmkit.interop.transformers" in card and "the attention min_gru" in card
    config = AutoConfig.from_pretrained(tmp_path / "next")
    assert (config.vocab_size, config.max_position_embeddings) == (300, CONTEXT)
    shutil.rmtree(tmp_path / "out")
    assert done("infer", f"hf:{tmp_path / 'next'}", "a text", "--greedy").out
    wrong = llmkit("fit", "--model.init_from", f"hf:{tmp_path / 'next'}", *words[:4], "--model.attention", "lstm")
    assert wrong.code == 2 and "model.attention: is LSTM, but hf:" in wrong.err
