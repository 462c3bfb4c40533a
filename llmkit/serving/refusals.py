"""Requests that are not served: what clients get instead, always in one shape."""

from __future__ import annotations

import hmac
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmkit.errors import UserError
from llmkit.model.language_model import LanguageModel
from llmkit.serving.engine import BusyError, ClosedError, Rows, Texts

BODY_LIMIT = 2**20
"""Bytes that a request may have."""


class RefusedError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def submit(engine: Texts | Rows, jobs: list[Any]) -> None:
    try:
        engine.submit(jobs)
    except BusyError:
        raise RefusedError(429, "too many requests are waiting: try again in a moment", code="busy") from None
    except ClosedError as error:
        raise refused_by(error) from error


def refused_by(error: BaseException) -> RefusedError:
    """Return what a client is told of an exception in the engine."""
    if isinstance(error, UserError):
        return RefusedError(400, str(error))
    if isinstance(error, ClosedError):
        return RefusedError(503, str(error))
    return RefusedError(500, f"{type(error).__name__}: {error}")


def body(refused: RefusedError) -> dict[str, Any]:
    kind = "server_error" if refused.status >= 500 else "invalid_request_error"
    return {
        "error": {"message": refused.message, "type": kind, "param": refused.param, "code": refused.code},
    }


def response(refused: RefusedError) -> JSONResponse:
    headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(refused.status)
    return JSONResponse(body(refused), refused.status, headers)


def add_handlers(app: FastAPI, model: LanguageModel) -> None:
    """Let every error have the same shape."""

    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> JSONResponse:
        return response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        # A part in brackets names a branch of a union, not a place in the request.
        parts = [str(part) for part in first["loc"] if part != "body" and "[" not in str(part)]
        where = ".".join(part for part in parts if part not in ("str", "int"))
        message = f"{where}: {first['msg']}" if where else str(first["msg"])
        return response(RefusedError(400, _printable(message), _printable(where) or None))

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code == 404:
            served = sorted(route.path for route in app.routes if str(getattr(route, "path", "")).startswith("/v1/"))  # type: ignore[attr-defined]
            message = f"there is no such path; this model ({type(model.head).__name__}) serves {', '.join(served)}"
        found = response(RefusedError(error.status_code, message))
        found.headers.update(error.headers or {})
        return found


def _printable(text: str) -> str:
    """Return a text that can be encoded, whatever it quotes of the request."""
    return text.encode(errors="backslashreplace").decode()


class TokenMiddleware:
    """Refuses requests without the token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                refused = RefusedError(401, "the token is missing or wrong: Authorization: Bearer TOKEN")
                await response(refused)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class LimitMiddleware:
    """Refuses bodies that are too long, before they are in memory."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refused = RefusedError(413, f"a request may have {BODY_LIMIT:,} bytes")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > BODY_LIMIT:
            await response(refused)(scope, receive, send)
            return
        messages: list[Message] = []
        size = 0
        while True:  # whole, so that a body without a length is refused like any other
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            if size > BODY_LIMIT:
                await response(refused)(scope, receive, send)
                return
            if message["type"] != "http.request" or not message.get("more_body", False):
                break

        async def again() -> Message:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, again, send)
