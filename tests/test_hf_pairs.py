"""Encoder-decoders of Hugging Face in and out, against transformers' own results."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import done
from hf_models import BART, MARIAN, PAIRS, ROWS, T5, save
from safetensors.torch import load_file, save_file
from test_hf import assert_equal, exported, padded_ids, scores
from torch import Tensor
from transformers import AutoTokenizer

import llmkit
from llmkit import LanguageModel, UserError, plugin
from llmkit.contracts import IGNORE, Network
from llmkit.hf.folder import Config
from llmkit.hf.native import native
from llmkit.hf.start import architecture_of
from llmkit.ops.decoding import beam_search, generate
from llmkit.ops.sampling import Rules
from llmkit.sequence import DecodingOptions, Sequence

TEXTS = ["abc de", "f", "ghij klm no pq rst uvw xyz abc def"]
NEW = 12


@pytest.mark.parametrize("case", PAIRS)
@torch.no_grad()
def test_encoder_decoders_equal_transformers(case: str, tmp_path: Path) -> None:
    """Logits, greedy decoding with the cache and beams; then those of the exported model, and its texts."""
    theirs = save(tmp_path, *PAIRS[case])
    ours = llmkit.load(f"hf:{tmp_path}")
    net: Network = ours.network
    ids, real = padded_ids(theirs.config.pad_token_id)
    targets = torch.randint(5, ROWS, (3, 17), generator=torch.Generator().manual_seed(4))
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": real}
    expected = theirs(**given, decoder_input_ids=targets).logits
    memory = net.encode(ids, Sequence.of(ids, real))
    found = scores(net, net.decode(targets, Sequence.of(targets), memory=memory))
    assert_equal(found, expected, torch.ones_like(targets))

    start = [theirs.config.decoder_start_token_id, *([0] if case.startswith("bart") else [])]
    how: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "length_penalty": 0.0}
    how |= {"forced_bos_token_id": 0} if len(start) > 1 else {}
    theirs.generation_config.use_cache = cached = case != "t5 1.1"  # their cache has as many layers as the encoder
    for beams in (1, 3):
        written = theirs.generate(**given, **how, num_beams=beams, num_return_sequences=beams)
        options = DecodingOptions(NEW + 1 - len(start), temperature=0.0, num_beams=beams, length_penalty=0.0)
        if beams == 1:
            own = [[ids] for ids in generate(net, [start] * 3, options, eos_id=2, memory=memory)]
        else:
            rules = Rules(options, (), 2, torch.device("cpu"))
            own = [[ids for _, ids in row] for row in beam_search(net, [start] * 3, rules, memory)]
        for row, each in zip(own, written.unflatten(0, (3, beams)).tolist(), strict=True):
            for one, other in zip(row, each, strict=True):
                other = other[len(start) :]
                assert one == (other[: other.index(2)] if 2 in other else other)

    again = exported(ours, tmp_path / "out", "AutoModelForSeq2SeqLM")
    assert again.config.model_type == {"mt5": "t5"}.get(case, theirs.config.model_type)
    assert_equal(again(**given, decoder_input_ids=targets).logits, expected, torch.ones_like(targets))
    back = LanguageModel.published(f"hf:{tmp_path / 'out'}")
    assert back.spec == ours.spec
    state = ours.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in back.state_dict().items())

    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    read = tokenizer(TEXTS, return_tensors="pt", padding=True)
    batch = ours._batch(TEXTS, ours.head.inputs)
    assert torch.equal(read["input_ids"], batch["source"])
    answers = ours.predict(TEXTS, DecodingOptions(NEW, temperature=0.0))
    written = again.generate(**read, num_beams=1, max_new_tokens=NEW + len(start) - 1, use_cache=cached)
    assert tokenizer.batch_decode(written, skip_special_tokens=True) == [answer["text"] for answer in answers]


@pytest.mark.parametrize(
    ("case", "head"), [("marian", "translation"), ("bart", "summarization"), ("t5", "summarization")]
)
def test_fine_tuning(case: str, head: str, tmp_path: Path) -> None:
    """The loss of a target is that of transformers; a run takes a step, and its checkpoint needs no folder."""
    theirs = save(tmp_path / "model", *PAIRS[case])
    ours = LanguageModel.published(f"hf:{tmp_path / 'model'}", {"name": head, "label_smoothing": 0.0}).eval()
    assert ours.tokenizer is not None
    source, target = ours.head.inputs[0], ours.head.targets[0]
    rows = [{source: text, target: text[::-1]} for text in TEXTS]
    batch = ours._batch(rows, (source, target))
    written = [ours.tokenizer.encode(text[::-1]) for text in TEXTS]
    start = [2, 0] if case == "bart" else [0]
    with torch.no_grad():
        loss = ours.head.loss(ours.network, batch)
        expected = sum(
            theirs(
                input_ids=batch["source"][row : row + 1, : len(source)],
                decoder_input_ids=torch.tensor([[*start, *written[row]]]),
                labels=torch.tensor([[*[IGNORE] * (len(start) - 1), *written[row], 2]]),
            ).loss
            * (len(written[row]) + 1)
            for row, source in enumerate(ours.head.encode({source: TEXTS}, ours.tokenizer, 48)["source"])
        )
    assert int(loss.count) == sum(map(len, written)) + len(TEXTS)
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-5)

    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows * 4)))
    result = done(
        *("fit", "--model.init_from", f"hf:{tmp_path / 'model'}", "--data.train", tmp_path / "rows.jsonl"),
        *("--model.head", head, "--model.context", "24", "--data.batch_size", "2", "--trainer.max_steps", "1"),
        *("--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu", "--output", tmp_path),
        *("--trainer.enable_progress_bar", "false", "--model.decoding.num_beams", "2"),
    )
    shutil.rmtree(tmp_path / "model")
    tuned = llmkit.load(result.checkpoint)
    assert tuned.head.start == ours.head.start and tuned.context == 24
    before, after = ours.state_dict(), tuned.state_dict()
    for name in ("net.embedding.weight", "net.decoder.0.cross.q.weight"):
        assert before[name].shape == after[name].shape and not torch.equal(before[name], after[name])
    assert tuned.predict(TEXTS)[0]["text"]


OWN: dict[str, dict[str, Any]] = {
    "t5": {
        **{"attention": {"name": "multi_head", "qk_norm": False, "scale": 1.0}, "position": "relative"},
        **{"feedforward": {"name": "silu", "gated": True}, "output_scale": 24**-0.5, "decoder_layers": 2},
    },
    "marian": {
        **{"attention": {"name": "multi_head", "qk_norm": False, "bias": True}, "norm": "layer", "norm_first": False},
        **{"position": {"name": "sinusoidal", "layout": "halves"}, "feedforward": {"name": "gelu", "bias": True}},
        "output_bias": True,
    },
    "bart": {
        **{"attention": {"name": "multi_head", "qk_norm": False, "bias": True}, "norm": "layer", "norm_first": False},
        **{"position": "learned", "embedding_norm": True, "separate_positions": True},
        **{"feedforward": {"name": "relu", "bias": True}, "output_bias": True},
    },
}


@pytest.mark.parametrize("kind", OWN)
@torch.no_grad()
def test_models_of_ours_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """Ids and texts by the saved tokenizer, which ends a source as the head does; scores; what is generated."""
    model = LanguageModel(head=plugin("head", "translation"), dim=24, num_layers=2, context=32, **OWN[kind])
    model.tokenizer = plugin("tokenizer", "bpe", vocab_size=300)()
    model.tokenizer.train(iter(["a text to learn from, and another one " * 9]))
    model.configure_model()
    model.eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    theirs = exported(model, tmp_path / "out", "AutoModelForSeq2SeqLM")
    assert theirs.config.model_type == kind
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = ["a text", "another text to learn from </s>"]
    read = tokenizer(texts, return_tensors="pt", padding=True)
    batch = model._batch([{"source": text, "target": "another one"} for text in texts], ("source", "target"))
    assert torch.equal(read["input_ids"], batch["source"])
    memory = model.network.encode(batch["source"], Sequence.of(batch["source"], batch["segments"]))
    own = scores(model.network, model.network.decode(batch["ids"], Sequence.of(batch["ids"]), memory=memory))
    found = theirs(**read, decoder_input_ids=batch["ids"]).logits
    assert_equal(found, own, torch.ones_like(batch["ids"]))
    answers = [answer["text"] for answer in model.predict(texts, DecodingOptions(9, temperature=0.0))]
    written = theirs.generate(**read, num_beams=1, max_new_tokens=9)
    assert [text.rstrip("\ufffd") for text in tokenizer.batch_decode(written, skip_special_tokens=True)] == answers


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        (
            "t5",
            {"output_scale": 1.0},
            "these outputs with relative positions (T5: output_scale 1 / sqrt(dim) with tie_",
        ),
        ("t5", {"feedforward": {"name": "gelu", "gated": True}}, "a gated gelu without the approximation tanh"),
        ("t5", {"norm": "layer"}, "these parts with relative positions (T5: rms norms first, no biases)"),
        ("t5", {"attention": {"name": "multi_head", "qk_norm": False}}, "this beginning or attention with relative"),
        ("t5", {"cross_attention": "multi_head"}, "a cross-attention that is not like the attention"),
        ("marian", {"position": "sinusoidal"}, "this beginning (Marian: sinusoidal positions in halves"),
        ("marian", {"output_bias": False}, "these outputs (Marian: tie_embeddings and output_bias, no output_scale)"),
        ("marian", {"norm_first": True}, "these norms (Marian: layer with eps 1e-5 and biases, norm_first false)"),
        ("bart", {"separate_positions": False}, "this beginning (BART: embedding_norm, separate_positions"),
        ("bart", {"head": {"name": "translation", "start": ["eos"]}}, "this beginning (BART: embedding_norm, sep"),
        ("bart", {"attention": "multi_head"}, "this attention in an encoder-decoder (all have multi_head without"),
    ],
)
def test_what_transformers_does_not_have(kind: str, changes: dict[str, Any], says: str) -> None:
    model = LanguageModel(**{"head": plugin("head", "translation"), "dim": 24, "context": 32, **OWN[kind], **changes})
    model.tokenizer = plugin("tokenizer", "byte")()
    model.configure_model()
    with pytest.raises(UserError, match=re.escape(f"transformers has no architecture with {says}")):
        native(model.spec, model.state_dict(), [])


def without(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {name: value for name, value in weights.items() if name not in names}


def test_weights_that_are_missing_left_over_or_there_twice(tmp_path: Path) -> None:
    for case in ("marian", "t5"):
        save(tmp_path / case, *PAIRS[case])
    weights = {case: load_file(tmp_path / case / "model.safetensors") for case in ("marian", "t5")}

    def read(case: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> LanguageModel:
        save_file(change(weights[case]), tmp_path / case / "model.safetensors")
        return LanguageModel.published(f"hf:{tmp_path / case}")

    bias = read("marian", without("final_logits_bias")).network.output_bias
    assert bias is not None and not bias.any()
    shared = weights["t5"]["shared.weight"]
    moved = read("t5", lambda given: {**without("shared.weight")(given), "encoder.embed_tokens.weight": shared})
    assert torch.equal(moved.network.embedding.weight, shared)
    save(tmp_path / "bare", "BartModel", BART)
    bare = LanguageModel.published(f"hf:{tmp_path / 'bare'}", "translation")
    assert bare.spec["head"]["init_args"] == {"start": ["eos", "bos"]} and bare.network.output_bias is not None
    with pytest.raises(UserError, match="model.head: must be set"):
        LanguageModel.published(f"hf:{tmp_path / 'bare'}")
    key = "decoder.layers.1.encoder_attn.k_proj.weight"
    with pytest.raises(UserError, match=f"weights are missing: {key}$"):
        read("marian", without(f"model.{key}"))
    with pytest.raises(UserError, match="weights that nothing takes: encoder.block.7.layer.0.SelfAttention.q.weight$"):
        read("t5", lambda given: {**given, "encoder.block.7.layer.0.SelfAttention.q.weight": torch.ones(2)})
    with pytest.raises(UserError, match=r"lm_head.weight is not shared.weight, though"):
        read("t5", lambda given: {**given, "lm_head.weight": shared + 1})
    with pytest.raises(UserError, match=r"final_logits_bias should be one row, it has the shape \(3, 64\)"):
        read("marian", lambda given: {**given, "final_logits_bias": torch.ones(3, 64)})
    (tmp_path / "marian" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="it has no tokenizer.json"):
        read("marian", without())


def message(*fields: tuple[int, int | float | bytes]) -> bytes:
    """A message in the format of Protocol Buffers, of numbers below 128."""
    data = b""
    for number, value in fields:
        if isinstance(value, bytes):
            data += bytes([number << 3 | 2, len(value)]) + value
        elif isinstance(value, float):
            data += bytes([number << 3 | 5]) + struct.pack("<f", value)
        else:
            data += bytes([number << 3, value])
    return data


def sentencepiece(scores: dict[str, float], kind: int = 1) -> bytes:
    """A model of these pieces, ``_`` being the mark of a blank."""
    pieces = [(piece.replace("_", "\u2581").encode(), score) for piece, score in scores.items()]
    special = [message((1, name), (2, 0.0), (3, 2 if name == b"<unk>" else 3)) for name in (b"<unk>", b"</s>")]
    texts = [message((1, piece), (2, score)) for piece, score in pieces]
    return message(*((1, piece) for piece in (*special, *texts)), (2, message((3, kind))), (3, message((1, b"none"))))


def test_the_tokenizer_of_a_marian_folder(tmp_path: Path) -> None:
    """The likeliest pieces of the source, ids of both languages; a longer piece of the target alone is never read."""
    scores = {"_a": -1.0, "b": -1.5, "_ab": -2.0, "_": -3.0, "a": -4.0, "c": -2.0}
    (tmp_path / "source.spm").write_bytes(sentencepiece(scores))
    names = ["</s>", "<unk>", ">>fra<<", *scores, "_x", "xb", "x", "<pad>"]
    ids = {name.replace("_", "\u2581"): number for number, name in enumerate(names)}
    (tmp_path / "vocab.json").write_text(json.dumps(ids))
    tokenizer: Any = plugin("tokenizer", "pretrained", path=str(tmp_path), as_published=True)()

    def pieces(text: str) -> list[str]:
        return [names[number] for number in tokenizer.encode(text)]

    assert pieces("ab") == ["_ab"] and pieces("  abb   ac ") == ["_ab", "b", "_a", "c"]
    assert pieces("xb") == ["_", "x", "b"]  # transformers looks up an unknown character as it stands
    assert pieces("a\u4e2d\u6587") == ["_a", "<unk>"]
    assert pieces(">>fra<< a") == [">>fra<<", "_a"] and ">>fra<<" not in pieces("a >> fra <<")
    assert pieces("</s>")[-1] == "<unk>"
    assert tokenizer.decode([ids["\u2581x"], ids["xb"], ids["x"], ids["\u2581a"], 0]) == "xxbx a"
    assert (tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id) == (0, 1, len(names) - 1)
    assert tokenizer.around[::2] == ([], [0]) and tokenizer.vocab_size == len(names)

    whole = sentencepiece(scores)
    for data, says in (
        (whole[:-3], "is not a SentencePiece model of the kind unigram (it is cut short)"),
        (whole + b"\x0f", "is not a SentencePiece model of the kind unigram (it has a field of an unknown kind)"),
        (sentencepiece(scores, 2), "of the kind unigram (its kind is 2, and it has 6 pieces)"),
        (b"", "of the kind unigram (its kind is 1, and it has 0 pieces)"),
    ):
        (tmp_path / "source.spm").write_bytes(data)
        with pytest.raises(UserError, match=re.escape(says)):
            plugin("tokenizer", "pretrained", path=str(tmp_path))().encode("a")
    (tmp_path / "source.spm").write_bytes(whole)
    for content, says in (
        (
            '{"<unk>": 0, "</s>": 2, "<pad>": 1, "a": 4}',
            "should give each piece a number, from 0 without gaps",
        ),
        ('{"<unk>": 0, "</s>": 1}', "vocab.json has no <pad>"),
        ("[", "vocab.json is not JSON"),
    ):
        (tmp_path / "vocab.json").write_text(content)
        with pytest.raises(UserError, match=re.escape(says)):
            plugin("tokenizer", "pretrained", path=str(tmp_path))().encode("a")


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        (
            "marian",
            {**MARIAN, "decoder_attention_heads": 2},
            "different encoder_attention_heads and decoder_",
        ),
        ("bart", {**BART, "decoder_ffn_dim": 8}, "different encoder_ffn_dim and decoder_ffn_dim"),
        ("marian", {**MARIAN, "share_encoder_decoder_embeddings": False}, "embeddings of its own on each side"),
        ("bart", {**BART, "tie_word_embeddings": False}, "an output matrix of its own"),
        (
            "marian",
            {**MARIAN, "decoder_start_token_id": 7},
            "begins with the id 7, which is not pad, eos or bos",
        ),
        ("t5", {**T5, "feed_forward_proj": "gated-tanh"}, "the activation 'tanh' is not supported"),
        ("mbart", BART, "model_type 'mbart' is not supported: its texts begin with a token of their language"),
    ],
)
def test_what_is_refused(kind: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        architecture = architecture_of(Config("a folder", {"model_type": kind, **settings}))
        architecture.settings()
        architecture.tasks()


def test_version_1_1_in_the_words_of_older_and_newer_files() -> None:
    """tie_word_embeddings, or since transformers 5 scale_decoder_outputs."""
    for words in ({"tie_word_embeddings": False}, {"tie_word_embeddings": True, "scale_decoder_outputs": False}):
        settings = architecture_of(Config("a folder", {"model_type": "t5", **T5, **words})).settings()
        assert (settings["tie_embeddings"], settings["output_scale"]) == (False, 1.0)


def test_a_model_whose_tokenizer_has_other_ids(tmp_path: Path) -> None:
    save(tmp_path, "T5ForConditionalGeneration", {**T5, "pad_token_id": 4, "decoder_start_token_id": 4})
    with pytest.raises(UserError, match="the id of pad is 4 in its config.json, 0 in its tokenizer"):
        LanguageModel.published(f"hf:{tmp_path}")
