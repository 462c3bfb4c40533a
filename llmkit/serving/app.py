"""The HTTP interface, in the shape of OpenAI's API."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from starlette.middleware.trustedhost import TrustedHostMiddleware

import llmkit
from llmkit.model.language_model import LanguageModel
from llmkit.serving.completions import Completions
from llmkit.serving.engine import RowJob, Rows, Texts, chats, writes_text
from llmkit.serving.protocol import ChatRequest, CompletionRequest, ErrorResponse, Limits, RowsRequest
from llmkit.serving.refusals import (
    LimitMiddleware,
    RefusedError,
    TokenMiddleware,
    add_handlers,
    refused_by,
    submit,
)

ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorResponse, "description": HTTPStatus(code).phrase}
    for code in (400, 401, 404, 405, 413, 422, 429, 500, 503)
}


def create_app(
    model: LanguageModel, name: str, limits: Limits, token: str | None = None, hosts: list[str] | None = None
) -> FastAPI:
    """Return the application that serves a model.

    Args:
        model: a model that is built.
        name: what clients call it.
        limits: what is accepted.
        token: what clients must send as ``Authorization: Bearer``; None: nothing.
        hosts: names of this machine that a request may be for; None: any. On a loopback address the names of that
            address keep web pages from reaching the server by a name of their own.
    """
    texts = writes_text(model)
    engine = (Texts if texts else Rows)(model, limits.max_batch, limits.max_waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="llmkit", version=llmkit.__version__, lifespan=lifespan, responses=ERRORS)
    started = int(time.time())

    def check_name(given: str | None) -> None:
        if given is not None and given != name:
            raise RefusedError(404, f"the model is '{name}'", "model", "model_not_found")

    @app.get("/v1/models", tags=["models"])
    async def models() -> dict[str, Any]:
        """Return the model that is served."""
        about = {"id": name, "object": "model", "created": started, "owned_by": "llmkit"}
        return {"object": "list", "data": [about]}

    @app.get("/health", tags=["models"])
    async def health() -> dict[str, str]:
        """Return whether requests are answered."""
        return {"status": "ok"}

    if isinstance(engine, Texts):
        service = Completions(engine, name, limits)

        @app.post("/v1/completions", tags=["text"], response_model=None)
        async def completions(request: CompletionRequest, connection: Request) -> Any:
            """Continue a prompt, or several."""
            check_name(request.model)
            return await service.answer(
                connection, request, service.prompts(request), chat=False, echo=request.echo, best=request.logprobs
            )

        if chats(model):

            @app.post("/v1/chat/completions", tags=["text"], response_model=None)
            async def chat(request: ChatRequest, connection: Request) -> Any:
                """Write the next turn of a conversation."""
                check_name(request.model)
                return await service.answer(connection, request, [service.conversation(request)], chat=True)

    else:
        paths = ["predict"]
        if hasattr(model.head, "labels"):
            paths.append("classify")
        if model.head.inputs == ("source",):
            paths.append("translate")

        async def predict(request: RowsRequest) -> dict[str, Any]:
            """Return the answer of the model to each input."""
            check_name(request.model)
            jobs = _jobs_of(request, model, engine)
            return {"object": "list", "model": name, "data": await _gathered(jobs)}

        for path in paths:
            app.post(f"/v1/{path}", tags=["rows"], name=path)(predict)

    add_handlers(app, model)
    if token is not None:
        app.add_middleware(TokenMiddleware, token=token)
    app.add_middleware(LimitMiddleware)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    return app


def _jobs_of(request: RowsRequest, model: LanguageModel, engine: Rows) -> list[tuple[RowJob, asyncio.Future[Any]]]:
    """Queue the rows of a request. Raises RefusedError for rows that lack a field, and empty texts."""
    fields = model.head.inputs
    loop = asyncio.get_running_loop()
    found: list[tuple[RowJob, asyncio.Future[Any]]] = []
    for number, row in enumerate(request.inputs):
        if isinstance(row, str) and len(fields) > 1:
            raise RefusedError(400, f"inputs[{number}]: expected an object with {', '.join(fields)}", "inputs")
        given = {fields[0]: row} if isinstance(row, str) else row
        for name in fields:
            if not given.get(name):
                raise RefusedError(400, f"inputs[{number}]: {name} is missing or empty", "inputs")
        for name in given:
            if name not in fields:
                raise RefusedError(
                    400, f"inputs[{number}]: there is no field '{name[:60]}', only {', '.join(fields)}", "inputs"
                )
        future: asyncio.Future[Any] = loop.create_future()

        def send(answer: Any, future: asyncio.Future[Any] = future) -> None:
            def settle() -> None:
                if not future.done():
                    future.set_result(answer)

            try:
                loop.call_soon_threadsafe(settle)
            except RuntimeError:  # the loop is closed: the server has ended
                return

        found.append((RowJob(send, row=given), future))
    submit(engine, [job for job, _ in found])
    return found


async def _gathered(jobs: list[tuple[RowJob, asyncio.Future[Any]]]) -> list[Any]:
    """Return the answers in their order. Raises RefusedError when there is an exception among them."""
    try:
        answers = await asyncio.gather(*(future for _, future in jobs))
    finally:
        for job, _ in jobs:
            job.cancelled = True
    for answer in answers:
        if isinstance(answer, BaseException):
            raise refused_by(answer)
    return answers
