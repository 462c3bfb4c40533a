"""Writing with a network: prompts in, texts out, whole or piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmkit.contracts import Network, Tokenizer
from llmkit.ops.decoding import beam_search, generate
from llmkit.ops.sampling import Rules
from llmkit.sequence import DecodingOptions, Memory

OnText = Callable[[int, str], None]
"""Called with (row, piece of text): the prompt, and then what is written as soon as later tokens cannot change it."""

CUT = "\ufffd"
"""What decoding shows for bytes that are not a whole character."""

LAG = 3
"""A token may change the text of this many tokens before it: a character has up to four bytes, and WordPiece's decoder
joins ``'``, ``r`` and ``##e`` to the word before only when it sees the last one."""


@dataclass(frozen=True)
class Written:
    """A text that was written: ``prompt + text`` is what all its tokens are decoded to."""

    prompt: str
    text: str
    score: float | None = None
    """Of a beam search: the log probability over the length penalty."""


def special_ids(tokenizer: Tokenizer) -> set[int]:
    """Return the ids that stand for no text."""
    names = ("pad_id", "bos_id", "eos_id", "unk_id", "mask_id", "sep_id")
    return {getattr(tokenizer, name) for name in names}


def write(
    net: Network,
    prompts: list[list[int]],
    tokenizer: Tokenizer,
    options: DecodingOptions,
    *,
    memory: Memory | None = None,
    rows: Tensor | None = None,
    device: torch.device | str = "cpu",
    on_text: OnText | None = None,
) -> list[list[Written]]:
    """Continue each prompt; return ``num_return_sequences`` texts for each, best first.

    A text ends before a stop string, and without the bytes of a character that is not complete.

    Args:
        net: the network, in eval mode.
        prompts: ids of each prompt, at least one each; with a memory, the start of each target, all of one length.
        tokenizer: turns ids into text.
        options: see DecodingOptions; ``max_new_tokens`` must be set.
        memory: the encoder's output, for an encoder-decoder.
        rows: the number of each row in the data, (B,), which its draws depend on; None: its place in the batch.
        device: where the network is.
        on_text: called with pieces of each text while it is written; sampling only.
    """
    stops = options.stop_strings or []
    banned = sorted(special_ids(tokenizer) - {tokenizer.eos_id})
    found: list[Rows[tuple[float | None, list[int]]]]
    if options.num_beams > 1:
        rules = Rules(options, banned, tokenizer.eos_id, torch.device(device))
        # Prompts of different lengths cannot share a beam search.
        groups = [range(len(prompts))] if memory is not None else [[row] for row in range(len(prompts))]
        found = []
        for group in groups:
            own = [prompts[row] for row in group]
            found += beam_search(net, own, rules, memory, Ends(tokenizer, own, stops) if stops else None)
    else:
        streams = [] if on_text is None else [Stream(tokenizer, prompt, stops) for prompt in prompts]

        def on_token(row: int, token: int) -> None:
            if on_text is not None:
                on_text(row, streams[row].add(token))

        ends = Ends(tokenizer, prompts, stops) if stops else None
        new = generate(
            net, prompts, options, eos_id=tokenizer.eos_id, banned=banned, memory=memory, rows=rows, device=device,
            on_token=on_token if on_text is not None else None, ends=ends,
        )  # fmt: skip
        found = [[(None, ids)] for ids in new]
    written = [
        [Written(*split(tokenizer, prompt, ids, stops), score) for score, ids in each[: options.num_return_sequences]]
        for prompt, each in zip(prompts, found, strict=True)
    ]
    if on_text is not None:
        for row, (first, *_) in enumerate(written):
            on_text(row, streams[row].rest(first.prompt + first.text))
    return written


def split(tokenizer: Tokenizer, prompt: list[int], new: list[int], stops: Rows[str] = ()) -> tuple[str, str]:
    """Return a prompt as it stands in the whole text, and what follows it up to a stop string.

    Decoded on its own, a continuation would lack the space before its first word.
    """
    start, whole = tokenizer.decode_batch([prompt, prompt + new])
    start = common_start([start, whole])
    text = whole[len(start) :]
    end = min([text.find(stop) for stop in stops if stop in text], default=len(text))
    return start, text[:end].rstrip(CUT)


def common_start(texts: list[str]) -> str:
    """Return what all the texts begin with."""
    first, last = min(texts), max(texts)
    if last.startswith(first):
        return first
    return first[: next(at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)]


def answer(written: list[Written], options: DecodingOptions) -> dict[str, Any]:
    """Return texts as a head answers with them: ``text`` and, if several are asked for, ``candidates`` with scores."""
    if options.num_return_sequences == 1:
        return {"text": written[0].text}
    return {"text": written[0].text, "candidates": [{"text": one.text, "score": one.score} for one in written]}


def shown(answer: dict[str, Any], prompt: str = "") -> str:
    """Return such an answer as a person reads it: one text, or a line with score and text for each candidate."""
    if "candidates" not in answer:
        return f"{prompt}{answer['text']}"
    return "\n".join(f"{one['score']:.4f}\t{prompt}{one['text']}" for one in answer["candidates"])


def scored(total: float, tokens: int) -> dict[str, Any]:
    """Return the answer to a text that was scored, from its summed loss in nats and the number of tokens in it."""
    perplexity = float(torch.tensor(total / tokens).exp()) if tokens else None
    return {"log_probability": -total, "tokens": tokens, "perplexity": perplexity}


class Ends:
    """Says whether a continuation holds one of the stop strings: see ``Ends`` in ``llmkit.ops.decoding``."""

    def __init__(self, tokenizer: Tokenizer, prompts: list[list[int]], stops: list[str]) -> None:
        self.tokenizer, self.prompts, self.stops = tokenizer, prompts, stops
        self.tail = 8 + 4 * max(map(len, stops))  # tokens that hold every string: a character has up to four bytes

    def __call__(self, row: int, new: list[int]) -> bool:
        tail = self.tokenizer.decode([*self.prompts[row], *new][-self.tail :])
        if not any(stop in tail for stop in self.stops):
            return False
        _, text = split(self.tokenizer, self.prompts[row], new)
        return any(stop in text for stop in self.stops)


class Stream:
    """The text of one row, piece by piece: each piece is text that later tokens leave as it is.

    That is what the last decodings agree on, without characters that are not complete or may begin a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stops: list[str]) -> None:
        self.tokenizer, self.prompt, self.stops = tokenizer, prompt, stops
        self.held = max(map(len, stops), default=1) - 1
        self.new: list[int] = []
        self.shown = ""
        self.recent = tokenizer.decode_batch([prompt[: len(prompt) - lag] for lag in range(LAG, 0, -1)] + [prompt])

    def add(self, token: int) -> str:
        """Return what can be shown, after a further token, that was not shown yet."""
        self.new.append(token)
        start, text = split(self.tokenizer, self.prompt, self.new, self.stops)
        self.recent = [*self.recent[-LAG:], start + text]
        sure = common_start(self.recent)
        sure = sure[: min(len(sure), len(start) + len(text) - self.held)].rstrip(CUT)
        return self._show(sure) if sure.startswith(self.shown) else ""

    def rest(self, whole: str) -> str:
        """Return what was not shown yet of the final text; all of it, on a line of its own, if that is not its end."""
        return self._show(whole) if whole.startswith(self.shown) else f"\n{whole}"

    def _show(self, text: str) -> str:
        piece, self.shown = text[len(self.shown) :], text
        return piece
