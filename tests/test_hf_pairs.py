"""Encoder-decoders of Hugging Face in and out, against transformers' own results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import PAIRS, ROWS, save
from test_hf import assert_equal, exported, padded_ids, scores
from transformers import AutoTokenizer

import llmkit
from llmkit import LanguageModel
from llmkit.contracts import Network
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
    assert again.config.model_type == theirs.config.model_type
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
