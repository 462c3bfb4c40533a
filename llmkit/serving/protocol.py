"""What clients send and get, in the shape of OpenAI's API (platform.openai.com/docs/api-reference)."""

from __future__ import annotations

import dataclasses
import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from llmkit.serving.engine import Part

MOST_TEXTS = 128
"""Texts that one request may ask for."""


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        raise ValueError("is not valid Unicode: it has half of a surrogate pair") from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_encodable)]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server accepts.

    Attributes:
        max_batch: texts or rows that the network works on together.
        max_waiting: texts or rows that wait; beyond them a client gets 429.
        max_tokens: most tokens that are written for a text.
    """

    max_batch: int = 32
    max_waiting: int = 256
    max_tokens: int = 1024


class StreamOptions(BaseModel):
    """What a stream has besides its text."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = Field(False, description="Whether the last event has the number of tokens.")


class Writing(BaseModel):
    """How text is written, for both kinds of completions. What is left out is as the checkpoint says."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    model: Text | None = Field(None, description="The name of the model, as /v1/models lists it.")
    temperature: float | None = Field(None, ge=0, le=100, description="0: always the most probable token.")
    top_p: float | None = Field(None, gt=0, le=1)
    n: int = Field(1, ge=1, le=MOST_TEXTS, description="Texts for each prompt.")
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = Field(None, description="A text ends before it.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="The same seed gives the same text.")
    stream: bool = Field(False, description="Whether the text is sent piece by piece, as server-sent events.")
    stream_options: StreamOptions | None = None
    user: Text | None = Field(None, description="Accepted, and not used.")
    max_tokens: int | None = Field(None, ge=1, description="Most tokens to write.")

    @property
    def limit(self) -> int | None:
        """Most tokens to write."""
        return self.max_tokens

    @property
    def stops(self) -> list[str]:
        """The strings that end a text."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class CompletionRequest(Writing):
    """A prompt to be continued, or several: texts, or lists of ids."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_TEXTS)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MOST_TEXTS)]
    )
    echo: bool = Field(False, description="Whether the answer begins with the prompt.")
    logprobs: int | None = Field(None, ge=0, le=20, description="Of each token, and of so many best ones.")

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or a list of ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class Message(BaseModel):
    """What somebody said."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "user", "assistant", "tool"]
    content: Text


class ChatRequest(Writing):
    """A conversation; the answer is the assistant's next turn."""

    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1, description="Another name of max_tokens.")

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class RowsRequest(BaseModel):
    """Rows for a head that answers each as a whole: texts, or objects with the fields that it reads."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: Text | None = Field(None, description="The name of the model, as /v1/models lists it.")
    inputs: Annotated[list[Text | dict[Text, Text]], Field(min_length=1, max_length=MOST_TEXTS)]


class Error(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """An answer to a request that could not be served."""

    error: Error


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


def usage(prompts: list[list[int]], written: int) -> Usage:
    """Return the numbers of tokens that were read, and written."""
    read = sum(map(len, prompts))
    return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


class Reply:
    """The shape of one answer: completions and chats differ in where the text is.

    Args:
        model: the served name.
        chat: whether it is a chat.
    """

    def __init__(self, model: str, chat: bool) -> None:
        kind = "chat.completion" if chat else "text_completion"
        self.chat = chat
        self.about = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self.kind, self.kind_of_events = kind, f"{kind}.chunk" if chat else kind

    def whole(self, choices: list[dict[str, Any]], used: Usage) -> dict[str, Any]:
        """Return the answer that is not streamed."""
        return {**self.about, "object": self.kind, "choices": choices, "usage": used.model_dump()}

    def choice(self, index: int, text: str, finish: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """Return one finished text."""
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}

    def event(self, index: int, part: Part, first: bool, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """Return one event of a stream."""
        if self.chat:
            role = {"role": "assistant"} if first else {}
            said: dict[str, Any] = {"delta": {**role, "content": part.text}}
        else:
            said = {"text": part.text}
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": part.finish}
        return {**self.about, "object": self.kind_of_events, "choices": [choice]}

    def last(self, used: Usage) -> dict[str, Any]:
        """Return the event with the numbers of tokens."""
        return {
            **self.about,
            "object": self.kind_of_events,
            "choices": [],
            "usage": used.model_dump(),
        }
