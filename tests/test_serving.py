"""``llmkit serve`` and ``llmkit chat``: many clients get what each alone would get, mistakes get a clear answer."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import queue
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from command import done, llmkit
from hf_models import DECODERS, save
from starlette.testclient import TestClient
from test_chat import PLAIN, write_template

from llmkit import LanguageModel, load, plugin
from llmkit.run.saving import save_model
from llmkit.sequence import DecodingOptions
from llmkit.serving.app import create_app
from llmkit.serving.engine import BusyError, Part, RowJob, Rows, TextJob, Texts
from llmkit.serving.protocol import Limits

TEXT = "the cat sat on the mat, and the hat is a hat"
CONTEXT = 24
LIMITS = Limits(max_batch=4, max_waiting=8, max_tokens=64)


def language_model(attention: str = "multi_head") -> LanguageModel:
    made = LanguageModel(
        head=plugin("head", "generation"), attention=plugin("attention", attention), dim=16, context=CONTEXT
    )
    made.tokenizer = plugin("tokenizer", "char")()
    made.tokenizer.train(iter([TEXT] * 9))
    torch.manual_seed(0)
    made.configure_model()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(8)  # an untrained network would be undecided everywhere
    return made.eval()


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return language_model()


def labels_model(head: str, **settings: Any) -> LanguageModel:
    made = LanguageModel(head=plugin("head", head, **settings), dim=16, context=CONTEXT)
    made.tokenizer = plugin("tokenizer", "char")()
    made.tokenizer.train(iter([TEXT] * 9))
    if head == "classification":
        made.head.learn({"label": ["a", "b"]})
    made.configure_model()
    return made.eval()


class Client:
    """Somebody who waits for a text."""

    def __init__(self, prompt: list[int], options: DecodingOptions, row: int = 0) -> None:
        self.parts: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.job = TextJob(self.parts.put, prompt=prompt, options=options, row=row)
        self.pieces: list[str] = []

    def end(self) -> Part:
        while True:
            part = self.parts.get(timeout=60)
            if not isinstance(part, Part):
                raise part
            self.pieces.append(part.text)
            if part.finish is not None:
                return part


@pytest.mark.parametrize("attention", ["multi_head", "lstm", "differential"])
def test_a_text_does_not_depend_on_who_else_is_served(attention: str) -> None:
    """Texts that join and leave at any moment, longer than the context too, against ``predict`` of each alone."""
    model = language_model(attention)
    assert model.tokenizer is not None
    kinds = [
        DecodingOptions(max_new_tokens=40, temperature=0.0),
        DecodingOptions(max_new_tokens=13, temperature=0.9, seed=5),
        DecodingOptions(max_new_tokens=33, temperature=1.3, top_p=0.9, seed=-7),
        DecodingOptions(max_new_tokens=20, temperature=0.7, top_k=3, repetition_penalty=1.2, min_new_tokens=18),
        DecodingOptions(max_new_tokens=30, temperature=0.8, seed=2, stop_strings=["at", "is"]),
    ]
    asked = [(prompt, kind, row) for row, prompt in enumerate(["the c", "a", TEXT[:20], "hat"]) for kind in kinds]
    engine = Texts(model, max_batch=6)
    clients = []
    for prompt, options, row in asked:
        clients.append(Client(model.tokenizer.encode(prompt), options, row))
        engine.submit([clients[-1].job])
        if len(clients) == 11:
            first = clients[0].end()  # some come only when others have ended
    for (prompt, options, row), client in zip(asked, clients, strict=True):
        part = client.end() if client is not clients[0] else first
        alone = model.predict([prompt], options, row)[0]["text"]
        assert part.whole == alone
        assert "".join(client.pieces) == alone
        assert part.finish == ("length" if len(part.ids) == options.max_new_tokens else "stop")
    engine.close()


def test_who_has_gone_makes_room_and_the_queue_has_an_end(model: LanguageModel) -> None:
    assert model.tokenizer is not None
    ids = model.tokenizer.encode("the")
    engine = Texts(model, max_batch=1, max_waiting=2)
    long = Client(ids, DecodingOptions(max_new_tokens=10**6, temperature=0.5, min_new_tokens=10**6))
    engine.submit([long.job])
    long.parts.get(timeout=60)  # it is being written
    short = [Client(ids, DecodingOptions(max_new_tokens=3, min_new_tokens=3)) for _ in range(3)]
    engine.submit([client.job for client in short[:2]])
    with pytest.raises(BusyError):
        engine.submit([short[2].job])
    long.job.cancelled = True
    assert [len(client.end().ids) for client in short[:2]] == [3, 3]
    waits = Client(ids, DecodingOptions(max_new_tokens=10**6, min_new_tokens=10**6))
    engine.submit([waits.job])
    waits.parts.get(timeout=60)
    engine.close()
    with pytest.raises(RuntimeError, match="shutting down"):
        waits.end()
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit([short[2].job])


def test_a_row_that_fails_does_not_fail_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    model = labels_model("classification")
    predict = model.predict
    lengths = []

    def fussy(rows: Any) -> Any:
        lengths.append(len(rows))
        if any(row["text"] == "bad" for row in rows):
            raise ValueError("bad row")
        return predict(rows)

    monkeypatch.setattr(model, "predict", fussy)
    engine = Rows(model)
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    texts = ["the", "bad", "cat"]
    engine.submit([RowJob(functools.partial(_put, answers, text), row={"text": text}) for text in texts])
    found = dict(answers.get(timeout=60) for _ in texts)
    engine.close()
    assert isinstance(found["bad"], ValueError)
    assert [found[text]["label"] for text in ("the", "cat")] == [predict([text])[0]["label"] for text in ("the", "cat")]
    assert lengths[0] == 3  # they are one batch at first


@pytest.fixture(scope="module")
def client(model: LanguageModel) -> Iterator[TestClient]:
    with TestClient(create_app(model, "cats", LIMITS)) as made:
        yield made


def _put(answers: queue.SimpleQueue[Any], text: str, answer: Any) -> None:
    answers.put((text, answer))


def events(response: Any) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_completions(client: TestClient, model: LanguageModel) -> None:
    plain = {"model": "cats", "prompt": ["the c", "a h"], "n": 2, "max_tokens": 9, "temperature": 0.9, "seed": 4}
    whole = client.post("/v1/completions", json=plain).json()
    options = DecodingOptions(max_new_tokens=9, temperature=0.9, seed=4)
    expected = [model.predict([p], options, row)[0]["text"] for row, p in enumerate(["the c", "the c", "a h", "a h"])]
    assert [(choice["index"], choice["text"]) for choice in whole["choices"]] == list(enumerate(expected))
    assert whole["usage"]["prompt_tokens"] == 8
    streamed = events(
        client.post("/v1/completions", json={**plain, "stream": True, "stream_options": {"include_usage": True}})
    )
    assert streamed.pop()["usage"] == whole["usage"]
    pieces = ["", "", "", ""]
    for event in streamed:
        pieces[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert pieces == expected
    ids = model.tokenizer.encode("the c")  # type: ignore[union-attr]
    same = client.post("/v1/completions", json={**plain, "prompt": ids, "n": 1, "echo": True}).json()
    assert same["choices"][0]["text"] == "the c" + expected[0]


def test_log_probabilities_are_those_of_the_score(client: TestClient, model: LanguageModel) -> None:
    asked = {"prompt": "a h", "max_tokens": 4, "temperature": 0, "logprobs": 2, "echo": True}
    whole = client.post("/v1/completions", json=asked).json()
    choice, written = whole["choices"][0], whole["usage"]["completion_tokens"]
    assert written > 1
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"] and logprobs["token_logprobs"][0] is None
    total = model.score([choice["text"]])[0]["log_probability"]
    assert sum(logprobs["token_logprobs"][1:]) == pytest.approx(total, abs=1e-4)
    for token, value, top in list(zip(*list(logprobs.values())[:3], strict=True))[-written:]:
        assert value == top[token] and len(top) in (2, 3)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("completions", {}, 400, "prompt: Field required"),
        ("completions", {"prompt": "a", "temprature": 1}, 400, "temprature"),
        ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature"),
        ("completions", {"prompt": "a", "logprobs": False}, 400, "logprobs"),
        ("completions", {"prompt": "a", "max_tokens": 65}, 400, "at most 64 tokens"),
        ("completions", {"prompt": "a" * 25}, 400, "the context is 24"),
        ("completions", {"prompt": "a", "logprobs": 1, "max_tokens": 24}, 400, "must fit into the context"),
        ("completions", {"prompt": [0, 10**9]}, 400, "there is no token 1000000000"),
        ("completions", {"prompt": ["a"] * 100, "n": 2}, 400, "128 texts"),
        ("completions", {"prompt": ["a"] * 9}, 429, "too many requests"),
        ("completions", {"prompt": "a", "model": "dogs"}, 404, "the model is 'cats'"),
        ("completions", '{"prompt": "\\ud800"}', 400, "half of a surrogate pair"),
        ("completions", "nonsense", 400, "JSON"),
        ("completions", " " * 2**20 + "{}", 413, "1,048,576 bytes"),
        ("chat/completions", {"messages": []}, 404, "serves /v1/completions"),
        ("classify", {"inputs": ["a"]}, 404, "this model (Generation) serves"),
    ],
)
def test_mistakes(client: TestClient, path: str, body: Any, status: int, message: str) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    response = client.post(f"/v1/{path}", content=content, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    assert message in response.json()["error"]["message"]


def test_heads_that_answer_rows(model: LanguageModel) -> None:
    classifier = labels_model("classification")
    with TestClient(create_app(classifier, "labels", LIMITS)) as client:
        for path in ("classify", "predict"):
            answer = client.post(f"/v1/{path}", json={"inputs": ["the cat", {"text": "a mat"}]}).json()
            assert answer["data"] == classifier.predict(["the cat", "a mat"])
        for row in ({"txt": "a"}, {"text": "a", "more": "b"}, {"text": ""}):
            response = client.post("/v1/classify", json={"inputs": [row]})
            assert response.status_code == 400 and "inputs[0]" in response.json()["error"]["message"]
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 404
    translator = labels_model("translation")
    with TestClient(create_app(translator, "words", LIMITS)) as client:
        answer = client.post("/v1/translate", json={"inputs": ["the cat"]}).json()
        assert answer["data"] == translator.predict(["the cat"])


def test_a_token_and_the_names_of_this_machine(model: LanguageModel) -> None:
    app = create_app(model, "cats", LIMITS, token="secret", hosts=["localhost"])
    with TestClient(app, base_url="http://localhost") as client:
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            response = client.get("/v1/models", headers=header)
            assert response.status_code == 401 and "token" in response.json()["error"]["message"]
        mine = {"Authorization": "Bearer secret"}
        assert client.get("/v1/models", headers=mine).json()["data"][0]["id"] == "cats"
        assert client.get("/v1/models", headers={**mine, "Host": "elsewhere.org"}).status_code == 400


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with a chat template, as a checkpoint."""
    folder = tmp_path_factory.mktemp("talker")
    save(folder, *DECODERS["gpt2"])
    write_template(folder, PLAIN)
    out = folder / "talker.ckpt"
    done("import", f"hf:{folder}", str(out))
    return out


def test_chats(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(talker)
    messages = [{"role": "user", "content": "ab"}]
    with TestClient(create_app(model, "talker", LIMITS)) as client:
        asked = {"messages": messages, "max_tokens": 5, "temperature": 0}
        choice = client.post("/v1/chat/completions", json=asked).json()["choices"][0]
        ids, _ = model.tokenizer.chat(messages, reply=True)  # type: ignore[union-attr]
        plain = client.post("/v1/completions", json={"prompt": ids, "max_tokens": 5, "temperature": 0}).json()
        assert choice["message"] == {"role": "assistant", "content": plain["choices"][0]["text"]}
        streamed = events(client.post("/v1/chat/completions", json={**asked, "stream": True}))
        deltas = [event["choices"][0]["delta"] for event in streamed]
        assert deltas[0]["role"] == "assistant"
        assert "".join(delta["content"] for delta in deltas) == choice["message"]["content"]
        refused = client.post("/v1/chat/completions", json={"messages": [{"role": "tool", "content": "x"}]})
        assert refused.status_code == 400 and "no tools here" in refused.json()["error"]["message"]
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\n\n/new\nab\n"))
    result = llmkit("chat", str(talker), "--temperature", "0", "--max_new_tokens", "5")
    said = choice["message"]["content"]
    assert result.code == 0 and result.out == f"{said}\n{said}\n"


def test_chat_continues_texts_without_a_template(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(model, tmp_path / "m.ckpt")
    monkeypatch.setattr("sys.stdin", io.StringIO("hat a\n"))
    result = llmkit("chat", str(tmp_path / "m.ckpt"), "--seed", "3", "--max_new_tokens", "9")
    options = dataclasses.replace(model.head.decoding, max_new_tokens=9, seed=3)
    text = model.predict(["hat a"], options)[0]["text"]
    assert (result.code, result.out) == (0, text + "\n"), result.err
    for argv, message in [
        (["--system", "x"], "chat: --system is for models that have a chat template"),
        (["--temperature", "-1"], "chat: temperature must be 0 (greedy) or more"),
    ]:
        result = llmkit("chat", str(tmp_path / "m.ckpt"), *argv)
        assert result.code == 2 and message in result.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--host", "0.0.0.0"], "can be reached from other machines: set the environment variable LLMKIT_TOKEN"),
        (["--port", "70000"], "--port must be at most 65535"),
        (["--max_batch", "0"], "must be at least 1"),
    ],
)
def test_mistakes_of_the_command(argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMKIT_TOKEN", raising=False)
    result = llmkit("serve", "x.ckpt", *argv)
    assert result.code == 2 and message in result.err


@pytest.fixture(scope="module")
def address(model: LanguageModel) -> Iterator[str]:
    """A server on a free port of this machine."""
    server = uvicorn.Server(uvicorn.Config(create_app(model, "cats", LIMITS), log_config=None, log_level="error"))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    server.should_exit = True
    thread.join()


def test_the_client_of_openai(address: str, model: LanguageModel) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
    assert [one.id for one in client.models.list()] == ["cats"]
    text = model.predict(["a h"], DecodingOptions(max_new_tokens=9, temperature=0.9, seed=4))[0]["text"]
    asked = {"model": "cats", "prompt": "a h", "max_tokens": 9, "temperature": 0.9, "seed": 4}
    assert client.completions.create(**asked).choices[0].text == text
    assert "".join(part.choices[0].text for part in client.completions.create(**asked, stream=True)) == text
    with pytest.raises(openai.BadRequestError, match="at most 64 tokens"):
        client.completions.create(**{**asked, "max_tokens": 100})


def test_tasks_of_lm_eval_through_the_server(address: str, model: LanguageModel, tmp_path: Path) -> None:
    """What the harness gets by HTTP is what it gets of the model in its own process."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from llmkit.interop.lm_eval import Adapter

    save_model(model, tmp_path / "m.ckpt")
    done("export", str(tmp_path / "m.ckpt"), str(tmp_path / "hf"))
    theirs = LocalCompletionsAPI(
        base_url=f"{address}/completions",
        model="cats",
        tokenizer=str(tmp_path / "hf"),
        tokenizer_backend="huggingface",
        max_length=CONTEXT,
    )
    ours = Adapter(model)
    pairs = [("the c", "at sat"), ("a h", "at is a"), ("hat", " mat")]
    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    for (value, greedy), (expected, expected_greedy) in zip(
        theirs.loglikelihood(asked), ours.loglikelihood(asked), strict=True
    ):
        assert value == pytest.approx(expected, abs=1e-4) and greedy == expected_greedy
    rules = {"until": ["s"], "max_gen_toks": 9}
    write = [Instance("generate_until", {}, (text, dict(rules)), index) for index, (text, _) in enumerate(pairs)]
    again = [Instance("generate_until", {}, (text, dict(rules)), index) for index, (text, _) in enumerate(pairs)]
    assert theirs.generate_until(write) == ours.generate_until(again)
