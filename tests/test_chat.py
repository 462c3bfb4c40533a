"""Conversations: ids and assistant masks against transformers, what has a loss, what is refused, and shared rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command import done, llmkit
from hf_models import DECODERS, save
from transformers import AutoTokenizer

import llmkit as package
from llmkit import UserError
from llmkit.contracts import IGNORE
from llmkit.data.examples import packed
from llmkit.model.use import batch_of
from llmkit_plugins.head.completion import conversation
from llmkit_plugins.tokenizer import Pretrained

HEAD = """{% for message in messages %}
    {%- if loop.first and message.role != 'system' -%}
        <|im_start|>system be kind<|im_end|>{{ '\\n' }}
    {%- endif -%}
    {%- if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif -%}
    <|im_start|>{{ message.role }} """
TAIL = """{{ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant {% endif %}"""
SAID = "{{ message.content | trim }}<|im_end|>"
PLAIN = HEAD + SAID + TAIL
OPEN = "{% if message.role == 'assistant' %}{% generation %}"
MARKED = HEAD + OPEN + SAID + "{% endgeneration %}{% else %}" + SAID + "{% endif %}" + TAIL
TALKS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "ab cd"}, {"role": "assistant", "content": "ef"}],
    [
        {"role": "system", "content": "x y"},
        {"role": "user", "content": "hello  there"},
        {"role": "assistant", "content": " gh i"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "jkl"},
    ],
]


def write_template(folder: Path, template: str, in_file: bool = False) -> Path:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if in_file:
        (folder / "chat_template.jinja").write_text(template)
    else:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    save(folder, *DECODERS["gpt2"])
    return write_template(folder, PLAIN)


@pytest.mark.parametrize("in_file", [True, False])
def test_ids_and_masks_are_those_of_transformers(in_file: bool, tmp_path: Path) -> None:
    """Of a template with generation blocks; without them the same turns are found from what each adds."""
    save(tmp_path, *DECODERS["gpt2"])
    theirs: Any = AutoTokenizer.from_pretrained(write_template(tmp_path, MARKED, in_file))
    own = Pretrained(str(tmp_path), as_published=True)
    again = Pretrained("nowhere", as_published=True)
    again.from_state(own.to_state())
    for talk in TALKS:
        expected = theirs.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
        for tokenizer in (own, again):
            ids, wrote = tokenizer.chat(talk)
            assert ids == expected["input_ids"]
            assert [int(one) for one in wrote] == expected["assistant_masks"] and 0 < sum(wrote) < len(ids)
        ids, wrote = own.chat(talk[:-1], reply=True)
        asked = theirs.apply_chat_template(talk[:-1], add_generation_prompt=True, return_dict=True)
        assert ids == asked["input_ids"]
        own._template = PLAIN
        assert own.chat(talk) == again.chat(talk)
        own._template = MARKED


def test_a_message_cannot_spell_a_special_token(base: Path) -> None:
    own = Pretrained(str(base), as_published=True)
    said = "ab <|im_end|> \uffff cd \ufdd0"
    ids, wrote = own.chat([{"role": "user", "content": said}, {"role": "assistant", "content": said}])
    assert ids.count(2) == 3 and ids.count(1) == 3  # those of the template: system, user, assistant
    written = [number for number, one in zip(ids, wrote, strict=True) if one]
    assert len(written) == len(own.encode(said.strip())) + 1 and written[-1] == 2


def test_the_assistant_alone_has_a_loss(base: Path, tmp_path: Path) -> None:
    """In a fit from JSON lines whose last row teaches nothing; the checkpoint needs neither folder nor template."""
    rows = [{"messages": talk} for talk in TALKS * 3] + [{"messages": TALKS[0][:1]}]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("--data.train", tmp_path / "talks.jsonl", "--data.validation", tmp_path / "talks.jsonl")
    rest = ("--trainer.max_steps", 2, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
    head = ("--model.init_from", f"hf:{base}", "--model.head", "{name: completion, chat: true}")
    sizes = ("--data.batch_size", 7, "--model.context", 64, "--model.decoding.max_new_tokens", 4)
    words = ("fit", *given, *rest, *head, *sizes, "--output", tmp_path)
    fits = [done(*words), done(*words, "--data.pack", "true")]
    assert "data.train: 1 of 7 rows have nothing that the assistant wrote, and no loss" in fits[0].err
    texts = [re.findall(r"loss +(\d.*)", run.out)[0] for run in fits]
    assert float(texts[0]) == pytest.approx(float(texts[1]), abs=2e-4)  # rows that are shared change no number

    model = package.load(fits[0].checkpoint)
    assert model.tokenizer is not None
    for talk in TALKS:
        ids, wrote = model.tokenizer.chat(talk)  # type: ignore[attr-defined]
        batch = batch_of(model.head, model.tokenizer, 64, [{"messages": talk}], ("messages",))
        expected = [number if one else IGNORE for number, one in zip(ids, wrote, strict=True)][1:]
        assert batch["targets"].tolist() == [expected] and batch["ids"].tolist() == [ids[:-1]]
        asked: list[dict[str, Any]] = [{"messages": talk[:-1]}, {"messages": json.dumps(talk)}]
        one, other = model.predict(asked)
        assert one == other
    said = done("infer", fits[0].checkpoint, "ab cd", json.dumps([{"role": "user", "content": "ab cd"}]), "--json").out
    assert len(set(said.splitlines())) == 1 and said.count("\n") == 2
    done("export", fits[0].checkpoint, tmp_path / "out")
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.apply_chat_template(TALKS[1], return_dict=True)["input_ids"] == ids


def said_by(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]


@torch.no_grad()
def test_examples_that_share_rows_see_nothing_of_each_other(base: Path, tmp_path: Path) -> None:
    """The loss of each is the same, in fewer rows; a row is as long as it may be."""
    done("import", f"hf:{base}", tmp_path / "chat.ckpt", "--head", "{name: completion, chat: true}")
    model = package.load(tmp_path / "chat.ckpt")
    assert model.tokenizer is not None
    said = ("a", "bcd", "ef", "g", "hijk", "lm no")
    talks = [{"messages": [{"role": "system", "content": "x"}, *said_by(text)]} for text in said]
    batch = batch_of(model.head, model.tokenizer, 64, talks, ("messages",))
    shared = packed(batch, 64, model.tokenizer.pad_id)
    assert len(shared["ids"]) == 3 and 32 < shared["ids"].shape[1] <= 64
    assert int(shared["segments"].amax(1).sum()) == len(said)
    assert int((shared["segments"] > 0).sum()) == int(batch["segments"].sum())
    losses = [model.head.loss(model.network, one) for one in (batch, shared)]
    assert losses[0].count == losses[1].count
    torch.testing.assert_close(losses[0].total, losses[1].total, rtol=1e-5, atol=0)
    alone = packed(batch, 1, model.tokenizer.pad_id)  # no room for a second one
    assert sorted(alone["segments"].sum(1).tolist()) == sorted(batch["segments"].sum(1).tolist())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "messages: expected a list of {role, content}, got '[]'"),
        ('{"prompt": 1}', "messages: expected a list of {role, content}, got "),
        ([{"role": "user"}], "messages: each needs a role and a content, both text, got "),
        ([{"role": "usr", "content": "a"}], "messages: unknown role 'usr'. Did you mean 'user'?"),
    ],
)
def test_what_is_no_conversation(given: Any, says: str) -> None:
    with pytest.raises(UserError) as raised:
        conversation(given)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (PLAIN, "the chat template refuses them: no tools here"),
        ("{% for", "the chat template refuses them: unexpected 'end of template'"),
        ("{{ ''.__class__.mro() }}", "the chat template refuses them: access to attribute '__class__' of 'str' object"),
        ("{{ messages | length }}", "rewrites earlier turns"),
        (None, "messages: this tokenizer has no chat template"),
    ],
)
def test_templates_that_fail(template: str | None, says: str, base: Path) -> None:
    own = Pretrained(str(base), as_published=True)
    own.encode("a")
    own._template = template
    with pytest.raises(UserError) as raised:
        own.chat([{"role": "tool" if template == PLAIN else "assistant", "content": "a"}])
    assert says in str(raised.value)


def test_a_tokenizer_without_a_template(tmp_path: Path) -> None:
    (tmp_path / "talks.jsonl").write_text((json.dumps({"messages": TALKS[0]}) + "\n") * 9)
    given = ("--data.train", tmp_path / "talks.jsonl", "--data.tokenizer", "byte", "--output", tmp_path)
    result = llmkit("fit", *given, "--model.head", "{name: completion, chat: true}")
    assert result.code == 2 and "Byte has no chat template: use a pretrained tokenizer" in result.err, result.err
