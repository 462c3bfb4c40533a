"""Many clients of ``llmkit serve`` at once: is each stream whole and its own, does memory stay, what does it cost?

    python docs/reliability/serve.py CHECKPOINT [--clients 64] [--minutes 5] [--tokens 64]

Each client streams texts by seed and prompt, one after the other, without a pause; every fourth goes away in the middle
of a text now and then. Each text is compared with what ``predict`` wrote for that seed and prompt alone. The sums of a
batch are rounded in another order than those of one row, and a draw that falls within that rounding of the border
between two tokens (1e-8 of the probability, say) may take the other one: a text that ``predict`` writes in a batch is
whole too, and counted as ``rounded``. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from llmkit import load
from llmkit.sequence import DecodingOptions

PROMPTS = ("def main(", "import os", "class ", "    return ", "# A", "for i in range(", "x = ", "try:\n")
SEEDS = 8
Expected = dict[tuple[str, int], tuple[str, str]]
"""What ``predict`` writes for a prompt and a seed, alone and as a row of a batch."""


@dataclass
class Seen:
    """What the clients saw."""

    whole: int = 0
    rounded: int = 0
    """Texts that ``predict`` writes for a batch, and others for one row alone."""
    wrong: list[dict[str, Any]] = field(default_factory=list)
    left: int = 0
    first: list[float] = field(default_factory=list)
    """Seconds from a request to its first piece of text."""
    tokens: int = 0


def options(seed: int, tokens: int) -> DecodingOptions:
    """How all texts are written."""
    return DecodingOptions(max_new_tokens=tokens, min_new_tokens=0, temperature=0.8, seed=seed)


async def client(number: int, address: str, expected: Expected, args: Any, until: float) -> Seen:
    """Ask for one text after the other until the time is over."""
    seen, draw = Seen(), random.Random(number)
    async with httpx.AsyncClient(timeout=600) as http:
        while time.monotonic() < until:
            prompt, seed = draw.choice(PROMPTS), draw.randrange(SEEDS)
            body = {"prompt": prompt, "seed": seed, "max_tokens": args.tokens, "temperature": 0.8, "stream": True}
            leave = number % 4 == 0 and draw.random() < 0.2
            begun, text, done = time.monotonic(), "", False
            async with http.stream("POST", f"{address}/v1/completions", json=body) as response:
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        done = True
                    elif line:
                        event = json.loads(line.removeprefix("data: "))
                        if not text:
                            seen.first.append(time.monotonic() - begun)
                        text += event["choices"][0]["text"] if "choices" in event else f"<{event}>"
                    if leave and len(text) > 10:
                        seen.left += 1
                        break
            if leave and not done:
                continue
            alone, batched = expected[prompt, seed]
            if done and text in (alone, batched):
                seen.whole += 1
                seen.rounded += text != alone
            else:
                seen.wrong.append({"prompt": prompt, "seed": seed, "text": text, "done": done})
    return seen


def memory_mib(pid: int) -> float:
    """Return the resident memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


async def watch(pid: int, until: float) -> list[float]:
    """Return the resident memory of a process every ten seconds."""
    found = []
    while time.monotonic() < until:
        await asyncio.sleep(10)
        found.append(round(memory_mib(pid), 1))
    return found


async def run(args: argparse.Namespace, address: str, expected: Expected, pid: int) -> dict[str, Any]:
    """Let all clients ask at once."""
    begun = time.monotonic()
    until = begun + 60 * args.minutes
    clients = [client(number, address, expected, args, until) for number in range(args.clients)]
    memory = asyncio.create_task(watch(pid, until))
    seen = await asyncio.gather(*clients)
    seconds = time.monotonic() - begun
    whole = sum(one.whole for one in seen)
    first = [value for one in seen for value in one.first]
    lengths = [len(alone) for alone, _ in expected.values()]
    return {
        "clients": args.clients,
        "minutes": round(seconds / 60, 2),
        "whole": whole,
        "rounded": sum(one.rounded for one in seen),
        "texts_that_rounding_decides": sum(alone != batched for alone, batched in expected.values()),
        "left": sum(one.left for one in seen),
        "wrong": [wrong for one in seen for wrong in one.wrong][:5],
        "wrong_count": sum(len(one.wrong) for one in seen),
        "texts_per_second": round(whole / seconds, 2),
        "characters_per_second": round(whole / seconds * statistics.mean(lengths)),
        "first_piece_seconds": {
            "median": round(statistics.median(first), 3),
            "p99": round(statistics.quantiles(first, n=100)[98], 3),
        },
        "memory_mib": await memory,
    }


def written(model: Any, prompt: str, seed: int, tokens: int, batch: int) -> str:
    """Return what a model writes in the first row of a batch."""
    text: str = model.predict([prompt] * batch, options(seed, tokens))[0]["text"]
    return text


def bare(model: Any, tokens: int, batch: int) -> float:
    """Return how many texts a second the model alone writes in batches."""
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(batch)]
    model.predict(prompts, options(0, tokens))
    begun, count = time.monotonic(), 0
    while time.monotonic() - begun < 20:
        count += len(model.predict(prompts, options(count, tokens)))
    return round(count / (time.monotonic() - begun), 2)


def main() -> None:
    """Start a server, and print what its clients saw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    model = load(args.checkpoint)
    expected = {
        (prompt, seed): (written(model, prompt, seed, args.tokens, 1), written(model, prompt, seed, args.tokens, 8))
        for prompt in PROMPTS
        for seed in range(SEEDS)
    }
    alone = bare(model, args.tokens, 32)
    command = [sys.executable, "-u", "-m", "llmkit", "serve", args.checkpoint, "--port", "0", "--name", "served"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = ""
        while "served at" not in address:
            address = server.stdout.readline()
        address = address.split("served at ")[1].split(": ")[0]
        found = asyncio.run(run(args, address, expected, server.pid))
        server.terminate()
        found["exit_code"] = server.wait(60)
    print(json.dumps({**found, "texts_per_second_without_server": alone}, indent=1))


if __name__ == "__main__":
    main()
