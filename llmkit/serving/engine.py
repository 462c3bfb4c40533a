"""One thread that owns the network, and answers what many clients ask at the same time."""

from __future__ import annotations

import dataclasses
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from llmkit.errors import UserError
from llmkit.model.language_model import LanguageModel
from llmkit.model.use import Scores, evaluating
from llmkit.ops.decoding import Decoder, column_major, kept_from
from llmkit.ops.sampling import Rules, drawn, row_keys, scrambled
from llmkit.ops.writing import Ends, Stream, special_ids, split
from llmkit.sequence import DecodingOptions, padded, segments_of


@runtime_checkable
class Chats(Protocol):
    """A tokenizer that has a chat template."""

    @property
    def chat_template(self) -> str | None:
        """The template, in Jinja, if there is one."""

    def chat(self, messages: list[dict[str, str]], reply: bool = False) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation, and which the assistant wrote; ``reply``: it ends where that begins."""


def chats(model: LanguageModel) -> bool:
    """Return whether a model has a chat template."""
    return isinstance(model.tokenizer, Chats) and model.tokenizer.chat_template is not None


def writes_text(model: LanguageModel) -> bool:
    """Return whether a model is a language model, which continues texts."""
    return model.head.topology == "decoder" and isinstance(model.head, Scores)


def plain_options(options: DecodingOptions) -> DecodingOptions:
    """Return options without beams, which need whole texts: the best token each time stands for them."""
    if options.num_beams == 1:
        return options
    return dataclasses.replace(options, num_beams=1, num_return_sequences=1, length_penalty=1.0, temperature=0.0)


REREAD = 8
"""Tokens of a text that may be read again for each that is written, so that others can join."""


class BusyError(Exception):
    """As much is waiting as the engine accepts."""


class ClosedError(RuntimeError):
    """The engine has been closed."""


@dataclass(frozen=True)
class Part:
    """What a client gets of a text: a piece of it, or its end."""

    text: str = ""
    finish: str | None = None
    """Why the text ended: ``stop`` (the end of a text, or a stop string) or ``length``; None: it continues."""
    whole: str = ""
    """At the end: all of the text."""
    ids: list[int] = field(default_factory=list)
    """At the end: the new ids."""
    scores: list[TokenScore] | None = None
    """At the end, if asked for: of each id of prompt and text."""


@dataclass(frozen=True)
class TokenScore:
    """How probable the model finds one token of a text; the first one has no probability."""

    token: int
    log_probability: float | None
    best: list[tuple[int, float]]


@dataclass(eq=False)
class Job:
    """A thing that a client asks for.

    Attributes:
        send: called from the engine's thread with each part of the answer, or the exception that ended it.
        cancelled: set by the client's side when nobody waits for the answer any more.
    """

    send: Callable[[Any], None]
    cancelled: bool = False


@dataclass(eq=False, kw_only=True)
class TextJob(Job):
    """A prompt to be continued.

    Attributes:
        prompt: its ids, at least one.
        options: how the text is written; ``max_new_tokens`` is set, and there are no beams.
        row: which of the texts of one seed this is.
        best: log probabilities are asked for, with those of the best ``best`` tokens; None: none.
    """

    prompt: list[int]
    options: DecodingOptions
    row: int = 0
    best: int | None = None


@dataclass(eq=False, kw_only=True)
class RowJob(Job):
    """A row for a head that answers it as a whole."""

    row: Any


class Engine(ABC):
    """Takes jobs from any thread, and works on them in one of its own.

    Args:
        model: a model that is built.
        max_batch: most jobs that are worked on together.
        max_waiting: most jobs that wait.
    """

    def __init__(self, model: LanguageModel, max_batch: int = 32, max_waiting: int = 256) -> None:
        self.model, self.max_batch, self.max_waiting = model, max_batch, max_waiting
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="llmkit-engine", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all of these jobs, or none.

        Raises BusyError when there is no room for them, and ClosedError after ``close``.
        """
        with self._changed:
            if self._closed:
                raise ClosedError("the engine is closed")
            if len(self._waiting) + len(jobs) > self.max_waiting:
                raise BusyError
            self._waiting.extend(jobs)
            self._changed.notify()

    def close(self) -> None:
        """Stop after the present step, and end what is not finished with a ClosedError."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        with torch.inference_mode(), evaluating(self.model):
            try:
                self._work()
            except BaseException as error:  # a bug: nobody may wait for ever
                with self._changed:
                    self._closed = True
                self._end_all(error)
                raise
            self._end_all(ClosedError("the server is shutting down"))

    def _end_all(self, error: BaseException) -> None:
        for job in [*self._active(), *self._waiting]:
            job.send(error)
        self._waiting.clear()

    def _taken(self, room: int, wait: bool) -> list[Any]:
        """Return up to ``room`` jobs in the order in which they came; ``wait``: until there is one, or the end."""
        with self._changed:
            while wait and not self._waiting and not self._closed:
                self._changed.wait()
            taken: list[Job] = []
            while self._waiting and len(taken) < room and not self._closed:
                job = self._waiting.popleft()
                if not job.cancelled:
                    taken.append(job)
            return taken

    @abstractmethod
    def _active(self) -> list[Job]:
        """Return the jobs that are worked on."""

    @abstractmethod
    def _work(self) -> None:
        """Answer jobs until the engine is closed."""


class Rows(Engine):
    """Answers rows by the head's ``predict``, those that wait together in one batch."""

    def __init__(self, model: LanguageModel, max_batch: int = 32, max_waiting: int = 256) -> None:
        self._jobs: list[RowJob] = []
        super().__init__(model, max_batch, max_waiting)

    def _active(self) -> list[Job]:
        return list(self._jobs)

    def _work(self) -> None:
        while not self._closed:
            self._jobs = self._taken(self.max_batch, wait=True)
            try:
                answers = self.model.predict([job.row for job in self._jobs])
            except Exception:  # one row must not fail the others
                answers = [self._answer(job.row) for job in self._jobs]
            jobs, self._jobs = self._jobs, []
            for job, answer in zip(jobs, answers, strict=True):
                job.send(answer)

    def _answer(self, row: Any) -> Any:
        try:
            return self.model.predict([row])[0]
        except Exception as error:
            return error


class _Text:
    """A text that is being written."""

    def __init__(self, job: TextJob, tokenizer: Any) -> None:
        self.job, self.tokenizer = job, tokenizer
        self.ids = list(job.prompt)
        self.start = 0  # of what the network still sees
        self.key = row_keys(job.options.seed, torch.tensor([job.row]))
        self.stops = job.options.stop_strings or []
        self.stream = Stream(tokenizer, job.prompt, self.stops)
        self.ends = Ends(tokenizer, [job.prompt], self.stops) if self.stops else None
        self.sent: int | None = None  # characters of the text that the client has
        self.last: list[int] = []  # the id that ended it, which is not text but has a probability

    @property
    def new(self) -> list[int]:
        return self.ids[len(self.job.prompt) :]

    def add(self, token: int, eos_id: int) -> str | None:
        """Take a token; return why the text ends, or None: it continues. Sends what can be shown."""
        self.last = [token] if token == eos_id else []
        if self.last:
            return "stop"
        self.ids.append(token)
        if self.sent is None:  # pieces are of prompt and text: the client has the prompt
            self.stream.shown, _ = split(self.tokenizer, self.job.prompt, self.new)
            self.sent = 0
        if piece := self.stream.add(token):
            self.sent += len(piece)
            self.job.send(Part(piece))
        if self.ends is not None and self.ends(0, self.new):
            return "stop"
        return "length" if len(self.new) == self.job.options.max_new_tokens else None

    def end(self, finish: str, scores: list[TokenScore] | None) -> None:
        """Send the end of the text."""
        _, whole = split(self.tokenizer, self.job.prompt, self.new, self.stops)
        self.job.send(Part(whole[self.sent or 0 :], finish, whole, self.new, scores))


class Texts(Engine):
    """Continues prompts. A text may join and leave at any token: it never waits for the others to end.

    All texts take each step together. When some join, what the others have written is read again with them.
    What is written for a prompt does not depend on its neighbours: see ``llmkit.ops.sampling``.
    """

    def __init__(self, model: LanguageModel, max_batch: int = 32, max_waiting: int = 256) -> None:
        tokenizer = model.tokenizer
        assert tokenizer is not None
        self.tokenizer = tokenizer
        self.banned = sorted(special_ids(tokenizer) - {tokenizer.eos_id})
        self._texts: list[_Text] = []
        super().__init__(model, max_batch, max_waiting)

    def prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt."""
        return [*self.tokenizer.around[0], *self.tokenizer.encode(text)] or [self.tokenizer.bos_id]

    def conversation(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the ids of a conversation up to the assistant's turn.

        Raises UserError when there is no template, or it refuses the messages.
        """
        if not isinstance(self.tokenizer, Chats):
            raise UserError(f"messages: {type(self.tokenizer).__name__} has no chat template")
        return self.tokenizer.chat(messages, reply=True)[0]

    def _active(self) -> list[Job]:
        return [text.job for text in self._texts]

    def _work(self) -> None:
        with column_major(self.model.network):
            decoder: Decoder | None = None
            chosen: list[int] = []
            steps = 0  # since a text joined
            while not self._closed:
                # Reading all again must stay cheap next to the steps between: a long text lets others wait longer.
                longest = max((len(text.ids) - text.start for text in self._texts), default=0)
                room = self.max_batch - len(self._texts) if REREAD * steps >= longest else 0
                joined = [_Text(job, self.tokenizer) for job in self._taken(room, wait=not self._texts)]
                steps = 0 if joined else steps + 1
                self._texts += joined
                if not self._texts:
                    continue
                try:
                    decoder, chosen = self._step(None if joined else decoder, chosen)
                except Exception as error:  # out of memory, say: these fail, later ones may not
                    for text in self._texts:
                        text.job.send(error)
                    self._texts, decoder = [], None

    def _step(self, decoder: Decoder | None, chosen: list[int]) -> tuple[Decoder, list[int]]:
        """Write one token of each text; return the decoder, and the tokens of those that continue."""
        net, device = self.model.network, self.model.device
        if decoder is None or decoder.columns + 1 >= net.max_length:
            for text in self._texts:
                text.start = kept_from(text.start, len(text.ids), net)
            kept = [text.ids[text.start :] for text in self._texts]
            left = max((text.job.options.max_new_tokens or 0) - len(text.new) for text in self._texts)
            decoder = Decoder(net, len(kept), min(net.max_length, max(map(len, kept)) + left), steps=left - 1)
            segments_BT = segments_of([len(row) for row in kept])
            segments_BT = None if segments_BT is None else segments_BT.to(device)
            scores_BV = decoder.feed(padded(kept, self.tokenizer.eos_id).to(device), segments_BT)
        else:
            scores_BV = decoder.feed(torch.tensor(chosen, device=device)[:, None])
        tokens = self._choose(scores_BV.float())
        rows: list[int] = []
        for row, (text, token) in enumerate(zip(self._texts, tokens, strict=True)):
            if text.job.cancelled:
                continue
            finish = text.add(token, self.tokenizer.eos_id)
            if finish is None:
                rows.append(row)
            else:
                text.end(finish, self._scores(text) if text.job.best is not None else None)
        if len(rows) < len(self._texts):
            self._texts = [self._texts[row] for row in rows]
            tokens = [tokens[row] for row in rows]
            if rows:
                decoder.reorder(torch.tensor(rows, device=device))
        return decoder, tokens

    def _choose(self, scores_BV: torch.Tensor) -> list[int]:
        """Return the next token of each text, chosen as its own options say."""
        device, chosen = scores_BV.device, [0] * len(self._texts)
        groups: dict[Any, list[int]] = {}
        for row, text in enumerate(self._texts):
            options = dataclasses.replace(text.job.options, seed=0, max_new_tokens=None, stop_strings=None)
            groups.setdefault((options, len(text.new) < options.min_new_tokens), []).append(row)
        for (options, early), rows in groups.items():
            texts = [self._texts[row] for row in rows]
            rules = Rules(options, self.banned, self.tokenizer.eos_id, device)
            texts_BL = None
            if rules.read_texts:
                longest = max(len(text.ids) for text in texts)
                whole = [[-1] * (longest - len(text.ids)) + text.ids for text in texts]
                texts_BL = torch.tensor(whole, device=device)
            own_BV = rules(scores_BV[rows], 0 if early else options.min_new_tokens, texts_BL)
            if options.temperature == 0:
                tokens_B = own_BV.argmax(-1)
            elif not bool(own_BV.amax(-1).isfinite().all()):
                raise UserError("the model's scores are NaN or infinite: its weights have diverged, or are damaged")
            else:
                keys_B = torch.cat([text.key + len(text.new) for text in texts]).to(device)
                tokens_B = drawn(own_BV, options, scrambled(keys_B))
            for row, token in zip(rows, tokens_B.tolist(), strict=True):
                chosen[row] = int(token)
        return chosen

    def _scores(self, text: _Text) -> list[TokenScore]:
        """Return the log probability of each token of prompt and text; they fit into the context."""
        net, best = self.model.network, text.job.best or 0
        ids = text.ids + text.last
        ids_1T = torch.tensor([ids], device=self.model.device)
        found = [TokenScore(ids[0], None, [])]
        if len(ids) > 1:
            decoder = Decoder(net, 1, len(ids))
            hidden_1TD, _ = decoder.states(ids_1T[:, :-1])
            logp_TV = decoder.scores(hidden_1TD[0]).float().log_softmax(-1)
            own_T = logp_TV.gather(1, ids_1T[0, 1:, None])[:, 0]
            top = logp_TV.topk(min(max(1, best), logp_TV.shape[1]), -1)
            for token, own, values, names in zip(
                ids[1:], own_T.tolist(), top.values.tolist(), top.indices.tolist(), strict=True
            ):
                found.append(TokenScore(token, own, list(zip(names, values, strict=True))))
        return found
