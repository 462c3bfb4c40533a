"""Completions and chats: requests to jobs, and parts of texts to answers."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from llmkit.errors import UserError
from llmkit.sequence import DecodingOptions
from llmkit.serving.engine import Part, TextJob, Texts, TokenScore, plain_options
from llmkit.serving.protocol import MOST_TEXTS, ChatRequest, CompletionRequest, Limits, Reply, Writing, usage
from llmkit.serving.refusals import RefusedError, body, refused_by, submit


class Completions:
    """Completions: requests to jobs, parts of texts to answers."""

    def __init__(self, engine: Texts, name: str, limits: Limits) -> None:
        self.engine, self.name, self.limits = engine, name, limits
        self.tokenizer, self.net = engine.tokenizer, engine.model.network

    def prompts(self, request: CompletionRequest) -> list[list[int]]:
        """Return the ids of each prompt. Raises RefusedError for one without tokens, or with ids out of range."""
        found = []
        for prompt in request.prompts:
            ids = self.engine.prompt(prompt) if isinstance(prompt, str) else prompt
            if max(ids) >= self.tokenizer.vocab_size:
                raise RefusedError(
                    400, f"there is no token {max(ids)}: ids are below {self.tokenizer.vocab_size}", "prompt"
                )
            found.append(ids)
        return found

    def conversation(self, request: ChatRequest) -> list[int]:
        """Return the ids of a conversation. Raises RefusedError when the template does not take it."""
        try:
            return self.engine.conversation([message.model_dump() for message in request.messages])
        except UserError as error:
            raise RefusedError(400, str(error), "messages") from error

    def options(self, request: Writing) -> DecodingOptions:
        """Return how the texts are written: as the request says, else as the checkpoint does."""
        default = plain_options(self.engine.model.head.decoding)
        limit = request.limit or min(default.max_new_tokens or self.limits.max_tokens, self.limits.max_tokens)
        if limit > self.limits.max_tokens:
            raise RefusedError(400, f"at most {self.limits.max_tokens} tokens are written for a text", "max_tokens")
        given: dict[str, Any] = {
            "temperature": request.temperature,
            "top_p": request.top_p,
            "stop_strings": request.stops or None,
        }
        given["seed"] = secrets.randbits(62) if request.seed is None else request.seed
        given = {key: value for key, value in given.items() if value is not None}
        least = min(default.min_new_tokens, limit)
        try:
            return dataclasses.replace(default, max_new_tokens=limit, min_new_tokens=least, **given)
        except ValueError as error:
            raise RefusedError(400, str(error)) from error

    async def answer(
        self,
        connection: Request,
        request: Writing,
        prompts: list[list[int]],
        *,
        chat: bool,
        echo: bool = False,
        best: int | None = None,
    ) -> Any:
        """Answer a request, at once or as a stream."""
        options = self.options(request)
        assert options.max_new_tokens is not None
        if len(prompts) * request.n > MOST_TEXTS:
            raise RefusedError(
                400, f"a request may ask for {MOST_TEXTS} texts, this one does for {len(prompts) * request.n}"
            )
        longest, context = max(map(len, prompts)), self.net.max_length
        if longest > context:
            message = f"the prompt has {longest} tokens, and the context is {context}"
            raise RefusedError(400, message, "prompt", "context_length_exceeded")
        if best is not None and longest + options.max_new_tokens > context:
            message = f"logprobs: prompt and text must fit into the context of {context} tokens"
            raise RefusedError(400, message, "logprobs", "context_length_exceeded")
        parts: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def sender(index: int) -> Callable[[Any], None]:
            def send(part: Any) -> None:
                try:
                    loop.call_soon_threadsafe(parts.put_nowait, (index, part))
                except RuntimeError:  # the loop is closed: the server has ended
                    return

            return send

        every = [prompt for prompt in prompts for _ in range(request.n)]
        jobs = [
            TextJob(sender(index), prompt=prompt, options=options, row=index, best=best)
            for index, prompt in enumerate(every)
        ]
        submit(self.engine, jobs)
        events = self._parts(parts, jobs)
        reply = Reply(self.name, chat)
        shown = [self.tokenizer.decode(prompt) if echo else "" for prompt in every]

        def logprobs(index: int, part: Part) -> dict[str, Any] | None:
            if part.scores is None:
                return None
            scores = part.scores if echo else part.scores[len(every[index]) :]
            return self._logprobs(scores, best or 0)

        if request.stream:
            with_usage = request.stream_options is not None and request.stream_options.include_usage
            stream = self._stream(events, reply, shown, prompts, logprobs, with_usage)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        ends: dict[int, Part] = {}
        async for index, part in _while_connected(events, connection):
            if part.finish is not None:
                ends[index] = part
        choices = [
            reply.choice(index, shown[index] + part.whole, part.finish, logprobs(index, part))
            for index, part in sorted(ends.items())
        ]
        return reply.whole(choices, usage(prompts, sum(len(part.ids) for part in ends.values())))

    async def _parts(
        self, parts: asyncio.Queue[tuple[int, Any]], jobs: list[TextJob]
    ) -> AsyncIterator[tuple[int, Part]]:
        """Yield the parts of all texts until each has ended; cancels them when nobody reads on."""
        left = len(jobs)
        try:
            while left:
                index, part = await parts.get()
                if isinstance(part, BaseException):
                    raise refused_by(part)
                left -= part.finish is not None
                yield index, part
        finally:
            for job in jobs:
                job.cancelled = True

    async def _stream(
        self,
        events: AsyncIterator[tuple[int, Part]],
        reply: Reply,
        shown: list[str],
        prompts: list[list[int]],
        logprobs: Callable[[int, Part], dict[str, Any] | None],
        with_usage: bool,
    ) -> AsyncIterator[str]:
        begun: set[int] = set()
        written = 0
        try:
            async for index, part in events:
                first = index not in begun
                begun.add(index)
                written += len(part.ids)
                if first and shown[index]:
                    part = dataclasses.replace(part, text=shown[index] + part.text)
                yield _event(reply.event(index, part, first, logprobs(index, part)))
            if with_usage:
                yield _event(reply.last(usage(prompts, written)))
            yield "data: [DONE]\n\n"
        except RefusedError as refused:  # the status is sent already
            yield _event(body(refused))

    def _logprobs(self, scores: list[TokenScore], best: int) -> dict[str, Any]:
        def text(token: int) -> str:
            return self.tokenizer.decode([token])

        tokens = [text(score.token) for score in scores]
        offsets = [sum(map(len, tokens[:place])) for place in range(len(tokens))]
        top: list[dict[str, float] | None] = []
        for score in scores:
            named: dict[str, float] = {}
            own = () if score.log_probability is None else ((score.token, score.log_probability),)
            for token, value in (*score.best[:best], *own):  # the token itself is listed though it is none of the best
                named.setdefault(text(token), value)
            top.append(named or None)
        found = [score.log_probability for score in scores]
        return {"tokens": tokens, "token_logprobs": found, "top_logprobs": top, "text_offset": offsets}


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _while_connected(
    events: AsyncIterator[tuple[int, Part]], connection: Request
) -> AsyncIterator[tuple[int, Part]]:
    """Yield the events, and stop when the client has gone: nobody else notices before the answer is whole."""
    iterator = aiter(events)
    waiting: asyncio.Future[Any] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(iterator))
            done, _ = await asyncio.wait([waiting], timeout=1.0)
            if done:
                try:
                    event = waiting.result()
                except StopAsyncIteration:
                    return
                waiting = None
                yield event
            elif await connection.is_disconnected():
                return
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.wait([waiting])
        await iterator.aclose()  # type: ignore[attr-defined]
