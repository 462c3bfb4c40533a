"""``llmkit explain``: maps of every variant, answers of every head, and the page that shows them."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import done, llmkit
from matplotlib.figure import Figure
from small_networks import decided

import llmkit as llmkit_package
import llmkit.model.language_model as home
from llmkit import LanguageModel, plugin, registry
from llmkit.analysis.explain import explain, maps, page, picture, tokens
from llmkit.analysis.explain.capture import Recording
from llmkit.analysis.explain.jacobian import norms
from llmkit.analysis.explain.reading import _with_answer
from llmkit.contracts import Tokenizer, Topology
from llmkit.sequence import Sequence
from llmkit.testing.head.examples import FIELDS
from llmkit_plugins.head.completion import Completion
from llmkit_plugins.tokenizer import BPE, Byte, Char, Word

OLD = Path(__file__).parent / "old_checkpoints"
GENERATION, TRANSLATION = OLD / "generation.ckpt", OLD / "translation.ckpt"
VARIANTS = registry.entries("attention")
ROLES: dict[str, Any] = {name: registry.target_of(plugin("attention", name)).roles for name in VARIANTS}
CROSS = [name for name, roles in ROLES.items() if "cross" in roles]


def passes(name: str, topology: Topology, length: int = 9) -> Recording:
    """A small network of a variant, and what happened when it read two rows, one of them padded."""
    torch.manual_seed(1)
    extra: dict[str, Any] = {"window": 3} if name == "sliding_window" else {}
    net = decided(name, topology, cross=name if name in CROSS else "multi_head", **extra)
    ids, segments = torch.randint(29, (2, length)), torch.ones(2, length, dtype=torch.long)
    segments[0, length - 3 :] = 0
    recording = Recording(net.double())
    seq = Sequence.from_segments(segments)
    with torch.no_grad():
        memory = None if topology == "decoder" else recording.encode(ids, seq)
        if topology != "encoder":
            own = seq if memory is None else Sequence.dense(5)
            recording.decode(ids if memory is None else ids[:, :5], own, memory=memory)
    return recording


@pytest.mark.parametrize("topology", ["decoder", "encoder_decoder"])
@pytest.mark.parametrize("name", VARIANTS)
def test_weights_times_values_are_the_output(name: str, topology: Topology) -> None:
    """Of every registered variant, in every role, but for lstm and gru; and no weight is where a mask is."""
    for done_pass in passes(name, topology).passes:
        for part in done_pass.parts:
            mixing = part.module.mixing(part.x_BTD, part.seq, memory=part.memory)
            found = maps.of(part, 0)
            columns = 6 if part.stack == "encoder" or topology == "decoder" else 5
            assert found.weights_HTS.shape[1:] == (columns, 6 if part.kind == "cross" else columns)
            if part.kind == "attention" and part.stack == "decoder":
                assert not found.weights_HTS.triu(1).any()
            assert (mixing is None) == (type(part.module).__name__ in ("LSTM", "GRU"))
            if mixing is None:
                assert (found.kind, found.how) == ("Jacobian norm", "exact")
                continue
            real = torch.ones(part.y_BTD.shape[:2]) > 0 if (some := part.seq.segments_BT) is None else some > 0
            torch.testing.assert_close(mixing.output()[real], part.y_BTD[real], rtol=1e-9, atol=1e-9)
            assert found.how.startswith("exact")
            assert len(found.heads) == len(found.weights_HTS) == (4 if mixing.unit == "channel" else len(found.heads))


def test_a_map_that_is_wrong_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    part = passes("multi_head", "decoder").passes[0].parts[0]
    mixing = part.module.mixing(part.x_BTD, part.seq)
    assert mixing is not None
    wrong = type(mixing)(2 * mixing.values_BHSE, mixing.weights, mixing.finish)
    monkeypatch.setattr(part.module, "mixing", lambda *args, **given: wrong)
    assert maps.of(part, 0).how.startswith("NOT exact")


def test_jacobian_norms() -> None:
    """Exact ones are torch's; estimates, and those of neighbouring outputs together, come near."""
    part = passes("lstm", "decoder").passes[0].parts[0]
    x, row = part.x_BTD[1].detach(), 1
    jacobian: Any = torch.autograd.functional.jacobian(lambda x: part.module(x[None], Sequence.dense(9))[0], x)
    expected = jacobian.square().sum((1, 3)).sqrt()
    torch.testing.assert_close(norms(part, row).norms_TS, expected, rtol=1e-4, atol=1e-6)
    estimated, how = norms(part, row, exact=0)
    assert how == "estimated from 8 random directions"
    assert float((estimated - expected).square().sum() / expected.square().sum()) < 0.05
    blocks, how = norms(part, row, exact=0, work=60)
    assert how == "estimated from 2 random directions, 3 neighbouring outputs together"
    assert torch.equal(blocks[0], blocks[2])
    means = expected.view(3, 3, 9).square().mean(1).sqrt().repeat_interleave(3, 0)
    assert float((blocks - means).square().sum() / means.square().sum()) < 0.15


# Tokens


def test_characters_that_span_tokens_are_readable() -> None:
    byte = Byte()
    byte.train(iter(["x"]))
    assert tokens.labels(byte, [byte.bos_id, *byte.encode("a 猫\n")]) == [
        *("<bos>", "a", " "),
        *("猫 1/3", "猫 2/3", "猫 3/3", "\n"),
    ]
    assert tokens.labels(byte, byte.encode("猫")[:2])[0] != ""  # half a character, as a model may write it


@pytest.mark.parametrize("tokenizer", [BPE(300), Char(), Word()])
def test_labels_are_the_text(tokenizer: Tokenizer) -> None:
    text = "the cat sat on the mat, they say"
    tokenizer.train(iter([text, "猫在垫子上"] * 3))
    ids = tokenizer.encode(text)
    assert "".join(tokens.labels(tokenizer, ids)).strip() == tokenizer.decode(ids)


# Heads


@pytest.fixture(autouse=True)
def _draw_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the picture of a translation alone: it costs more than all else."""
    if "translation" not in request.node.name:
        monkeypatch.setattr(picture, "_figure", lambda *args: Figure((1, 1)))


ATTACK = "a </script><img src=x onerror=\"document.title='hit'\">"


def model_of(head: str, tokenizer: Tokenizer, **settings: Any) -> LanguageModel:
    """An untrained model of a head that knows the labels of the example rows."""
    torch.manual_seed(0)
    model = LanguageModel(head=plugin("head", head), dim=16, num_layers=2, **{"context": 192, **settings})
    tokenizer.train(iter([json.dumps(values, ensure_ascii=False) + ATTACK for values in FIELDS.values()] * 2))
    model.tokenizer = tokenizer
    fields = (*model.head.inputs, *model.head.targets)
    model.head.learn({name: FIELDS[name] for name in fields})
    model.head_ready = True
    model.configure_model()
    return model.eval()


Explain = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Explain:
    """Run ``llmkit explain`` on a model as if it came from a checkpoint; return the rows of explain.json."""

    def run(model: LanguageModel, *words: object) -> list[dict[str, Any]]:
        monkeypatch.setattr(home, "load", lambda *args: model)
        output = done("explain", "a.ckpt", *words, "--output", tmp_path).out
        assert output.endswith(f"{tmp_path / 'explain.html'}\n")
        assert (tmp_path / "explain.png").read_bytes()[:4] == b"\x89PNG"
        rows: list[dict[str, Any]] = json.loads((tmp_path / "explain.json").read_text())["rows"]
        assert pictures((tmp_path / "explain.html").read_text()) is not None
        return rows

    return run


def pictures(text: str) -> list[dict[str, Any]]:
    """Return the rows in a page."""
    (_, rest) = text.split('<script type="application/json" id="data">')
    found: list[dict[str, Any]] = json.loads(rest.split("</script>")[0])["rows"]
    return found


@pytest.mark.parametrize("head", registry.entries("head"))
def test_every_head(head: str, ask: Explain) -> None:
    model = model_of(head, Word() if head == "probe" else Char())
    fields = model.head.inputs
    given = {name: FIELDS[name][2] for name in fields}
    (row,) = ask(model, json.dumps(given), "--max_new_tokens", "5", "--seed", "1")
    assert {name: row["row"][name] for name in fields if name != "text"} == {
        name: given[name] for name in fields if name != "text"
    }
    for found in row["maps"]:
        query, key = row["texts"][found["query"]], row["texts"][found["key"]]
        weights = torch.tensor(found["weights"])
        assert weights.shape == (len(found["heads"]), len(query["says"]), len(key["tokens"]))
        assert len(query["tokens"]) == len(query["says"])
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]), atol=2e-3, rtol=0)
    layers = [(found["stack"], found["layer"], found["part"]) for found in row["maps"]]
    text = row["texts"][-1]
    if model.head.topology == "encoder_decoder":
        decoder = [("decoder", n, part) for n in range(2) for part in ("attention", "cross")]
        assert layers == [("encoder", n, "attention") for n in range(2)] + decoder
        assert [one["name"] for one in row["texts"]] == ["source", "target"]
    else:
        assert layers == [(model.head.topology, n, "attention") for n in range(2)]
    if text["writes"]:
        written = "".join(text["says"][text["written"] :]).replace("<eos>", "")
        assert written.strip() == row["answer"]["text"].strip()
        assert text["tokens"][1:] == text["says"][:-1]
    elif head == "token_classification":
        (tags,) = {tuple(text["says"])}
        assert [tag for tag in tags if tag] and set(tags) <= {"", *row["answer"]["tags"]}
    elif head == "question_answering":
        said = [token for token, mark in zip(text["tokens"], text["says"], strict=True) if mark]
        assert "".join(said).replace(" ", "") == row["answer"]["answer"].replace(" ", "")
    elif head == "masked_lm":
        at = text["tokens"].index("<mask>")
        assert text["says"][at] == row["answer"]["masks"][0][0]["token"]
    elif head == "probe":
        assert text["says"] == row["answer"]["answers"].split()


def test_an_encoder_without_attention_and_long_questions(ask: Explain) -> None:
    """A question with two windows has two texts; a recurrent encoder has Jacobians."""
    model = model_of("question_answering", Char(), context=64, attention=plugin("attention", "gru"))
    context = "Ann is in Rome. " * 6
    (row,) = ask(model, json.dumps({"question": "Where is Ann?", "context": context}))
    assert [text["name"] for text in row["texts"]] == [f"window {n + 1}" for n in range(len(row["texts"]))]
    assert len(row["texts"]) > 1 and len(row["maps"]) == 2 * len(row["texts"])
    assert {found["kind"] for found in row["maps"]} == {"Jacobian norm"}


def test_a_given_target_is_explained_and_nothing_is_written() -> None:
    model = home.load(TRANSLATION)
    (one,) = explain(model, [{"source": "the cat", "target": "THE CAT"}])
    assert one.answer == {} and one.texts[1].says == [*"THE CAT", "<eos>"]
    model = home.load(GENERATION)
    (one,) = explain(model, ["the cat"], write=False)
    assert (one.texts[0].tokens, one.texts[0].says) == ([*"the ca"], [*"he cat"])
    torch.testing.assert_close(one.maps[0].weights_HTS.sum(-1), torch.ones(2, 6))


def test_a_conversation_goes_on_with_the_answer() -> None:
    head, said = Completion(chat=True), [{"role": "user", "content": "hi"}]
    for given in ("hi", said, json.dumps(said), json.dumps({"messages": said})):
        row = _with_answer({"messages": given}, head, {"prompt": "<user>hi", "text": "ho"})
        assert row == {"messages": [*said, {"role": "assistant", "content": "ho"}]}


def test_a_text_longer_than_the_context_ends_with_its_end() -> None:
    model = home.load(GENERATION)  # whose context is 16
    (one,) = explain(model, ["the cat on a mat on a cat"], write=False)
    assert "".join(one.texts[0].tokens) == "t on a mat on a ca"[-16:]
    assert one.texts[0].says[-1] == "t" and one.texts[0].written == 16


def test_nothing_of_the_model_is_changed() -> None:
    model = home.load(GENERATION).train()
    before = str(model), [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    explain(model, ["the"])
    after = str(model), [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert before == after and model.training and model.net is not None and model.net.training
    assert all(parameter.grad is None for parameter in model.parameters())


# Files


def test_the_recipes_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command and the Python of docs/explaining.md run."""
    guide = (Path(__file__).parent.parent / "docs" / "explaining.md").read_text("utf-8")
    models = {"quickstart": "generation", "letters": "translation", "reviews": "classification"}
    loaded = {f"runs/{run}": model_of(head, Char()) for run, head in models.items()}
    monkeypatch.setattr(home, "load", lambda path, *rest: loaded[str(path)])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new_reviews.txt").write_text("a dull film\na moving film\na new film\n")
    shell = re.findall(r"```sh\n(.*?)```", guide, re.DOTALL)[0]  # test_explain_commands.py runs the others
    commands = [shlex.split(line, comments=True) for line in shell.splitlines()]
    assert [words[0] for words in commands] == ["llmkit"] * 4
    for _, *words in commands:
        folder = words[words.index("--output") + 1] if "--output" in words else "explain"
        assert done(*words).out.endswith(f"{folder}/explain.html\n")
        kinds = ("html", "png", "pdf", "json")
        assert {path.name for path in Path(folder).iterdir()} == {f"explain.{kind}" for kind in kinds}
    (code,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    monkeypatch.setattr(llmkit_package, "load", home.load)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "explaining.md", "exec"), {})
    assert "decoder 1 MultiHead weights torch.Size([4, " in printed.getvalue()
    variants = set(re.findall(r"`(\w+)`", guide[guide.index("| variants |") : guide.index("For recurrences")]))
    assert variants == set(VARIANTS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "the cat\n\na mat\n"),
        ("a.csv", "text,more\nthe cat,1\na mat,2\n"),
        ("a.jsonl", '{"text": "the cat"}\n{"text": "a mat"}\n'),
        ("b.txt", '{"text": "the cat"}\n{"text": "a mat"}\n'),
    ],
)
def test_rows_of_files(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    words = ("explain", GENERATION, "--input", path, "--max_new_tokens", 0, "--output", tmp_path)
    assert done(*words).out == f"{tmp_path / 'explain.html'}\n"
    rows = json.loads((tmp_path / "explain.json").read_text())["rows"]
    assert ["".join(row["texts"][0]["tokens"]) for row in rows] == ["the ca", "a ma"]
    assert "the first 1 of 2 rows" in done(*words, "--limit", 1).err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([GENERATION], "no text given"),
        ([GENERATION, ""], "the text is empty"),
        ([GENERATION, "a", "--layer", 3], "there is no layer 3; layers: 0"),
        ([GENERATION, "a", "--head", 2], "there is no head 2; heads: 0 to 1"),
        ([GENERATION, "a", "--max_new_tokens", -1], "--max_new_tokens: must be at least 0"),
        ([GENERATION, "a", "--seed", 2**63], "seed must be below 2**63"),
        ([TRANSLATION, "a", "--max_new_tokens", 0], "a row needs its target"),
        ([GENERATION, "a", "--hed", 1], "--head"),
        ([GENERATION, "--input", "none.csv"], "no file 'none.csv'"),
        ([GENERATION, "--input", "none.txt"], "No such file"),
        ([GENERATION, "--input", "b.csv"], "b.csv:2: no text; columns: texts"),
        (["none.ckpt", "a"], "none.ckpt"),
    ],
)
def test_wrong_input_is_one_line(words: list[Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.csv").write_text("texts\nthe cat\n")
    refused = llmkit("explain", *words)
    assert refused.code == 2 and says in refused.err and refused.err.count("\n") == 1, refused.err


# The page


def test_the_page_has_the_numbers_and_no_markup_of_users() -> None:
    """Small pictures to four digits, large ones to two; differential attention has negative weights."""
    model = model_of("generation", Char(), attention=plugin("attention", "differential", num_heads=2))
    (one,) = explain(model, [ATTACK], write=False)
    text = page.page_of([one], ATTACK)
    assert text.count("</script>") == 2 and "<img" not in text
    (row,) = pictures(text)
    assert "".join(row["texts"][0]["tokens"]) == ATTACK[:-1] and row["maps"][0]["signed"]
    for large in (False, True):
        kind, top, digits = ("int8", 127, 2e-2) if large else ("<i2", 32767, 2e-4)
        for found, expected in zip(row["maps"], one.maps, strict=True):
            for head, weights in zip(found["heads"], expected.weights_HTS.numpy(), strict=True):
                raw = page._roots(weights, head["largest"], large).tobytes()
                if not large:
                    assert base64.b64decode(head["data"]) == raw
                roots = np.frombuffer(raw, kind).reshape(weights.shape) / top
                shown = roots * np.abs(roots) * head["largest"]
                assert np.abs(shown - weights).max() < digits * head["largest"]


def test_long_texts_stay_small() -> None:
    """What stays of 2,000 tokens: packed bytes on the page, the largest weights in the JSON."""
    torch.manual_seed(0)
    weights = torch.rand(1, 2000, 2000).tril().pow(8)
    one = maps.Map("decoder", 0, "attention", "Any", "weights", "exact", ["head 0"], weights)
    from llmkit.analysis.explain.explanation import _numbers

    (largest,) = _numbers(one)["largest"]
    assert len(largest) == 2000 and len(largest[-1]) == 16
    assert {place for place, _ in largest[-1]} == set(weights[0, -1].topk(16).indices.tolist())
    assert picture._pooled(torch.eye(2000)).diagonal().eq(1).all() and len(picture._pooled(-torch.eye(2000))) == 400
    found = page._map(one)
    assert found["packed"] and len(found["heads"][0]["data"]) < 4e6
    assert len(zlib.decompress(base64.b64decode(found["heads"][0]["data"]))) == 2000 * 2000


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_the_page_opens_in_a_browser(tmp_path: Path) -> None:
    """Without an error, without markup of users that runs, and with what the shown token rests on."""
    model = model_of("generation", Char())
    rows = explain(model, [ATTACK, "我爱学习 " * 60], write=False)
    values = {"embedding": [0.5, -1.0]}
    rows[0].contributions.append({"method": "occlusion", "explained": "x", "tokens": ["<", "<b>"], "values": values})
    path = tmp_path / "explain.html"
    path.write_text(page.page_of(rows, "a.ckpt"), encoding="utf-8")
    words = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", path.as_uri()]
    answer = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in answer.stderr
    assert "<title>What the answers of a.ckpt rest on</title>" in answer.stdout
    assert answer.stdout.count("<button") == 8  # two layers of four heads
    assert "rests on:" in answer.stdout and "occlusion of: x." in answer.stdout
    assert re.search(r'<span class="ask" style="background: rgba[^"]*">&lt;b&gt;</span>', answer.stdout)
