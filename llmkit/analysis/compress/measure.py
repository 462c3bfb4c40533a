"""What a model costs and how good it is: bytes, memory, time and losses, of several models on the same rows."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmkit.contracts import Batch
from llmkit.data.examples import Examples
from llmkit.data.tokens import Blocks
from llmkit.errors import UserError
from llmkit.model.language_model import LanguageModel
from llmkit.model.use import Scores, evaluating
from llmkit.sequence import DecodingOptions

Floats = NDArray[np.float64]
SIZES = (1, 8)
"""Rows that are answered at a time."""
TOKENS = 32
"""Tokens that are generated where the time of one is measured."""
PROMPT = 8
"""Tokens that a generated text continues."""


def chosen(split: Blocks | Examples, count: int) -> list[NDArray[np.int64]]:
    """Return the numbers of at most ``count`` rows of a split, spread over all of it, a batch for each."""
    every = np.sort(np.concatenate([np.asarray(batch) for batch in split.evaluation_order()]))
    places = np.linspace(0, len(every) - 1, min(count, len(every))).round().astype(int)
    return [every[place : place + 1] for place in np.unique(places)]


@torch.no_grad()
def losses(model: LanguageModel, batches: Sequence[Batch]) -> Floats:
    """Return the mean loss of each batch; rows without a target are NaN."""
    found = []
    with evaluating(model):
        for batch in batches:
            loss = model.head.loss(model.network, batch)
            found.append(float(loss.total) / float(loss.count) if float(loss.count) else np.nan)
    return np.array(found)


def writes(model: LanguageModel) -> bool:
    """Return whether a model writes text, so that its time is counted by the token; else by the row."""
    return isinstance(model.head, Scores)


def answering(model: LanguageModel, split: Blocks | Examples, row: NDArray[np.int64], size: int) -> Callable[[], int]:
    """Return what answers one row ``size`` times at once, and says how many tokens, or rows, came of it."""
    assert model.tokenizer is not None
    tokenizer, head, options = model.tokenizer, model.head, model.head.decoding
    if writes(model):
        tokens = max(1, min(TOKENS, model.context // 2))
        options = DecodingOptions(max_new_tokens=tokens, min_new_tokens=tokens, temperature=0.0)
    if isinstance(split, Blocks) and writes(model):
        text = tokenizer.decode(split[row]["ids"][0, : min(PROMPT, model.context // 2)].tolist()) or "a"
        return lambda: len(model.predict([text] * size, options)) * tokens
    batch = split[np.repeat(row, size)]

    @torch.no_grad()
    def run() -> int:
        with evaluating(model):
            head.predict(model.network, batch, tokenizer, options)
        return size * (tokens if writes(model) else 1)

    return run


def times(runs: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, Floats]:
    """Return the milliseconds for a token, or a row, of each in every round; in a round one comes after the other.

    Every second round goes backwards, and a first one is not counted. With one thread they are of CPU time, which other
    processes of the machine do not lengthen.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in [*runs] if number % 2 else reversed([*runs]):
            start = clock()
            made = runs[name]()
            if number:
                found[name].append(1000 * (clock() - start) / made)
    return {name: np.array(values) for name, values in found.items()}


def memory(path: Path, imports: Sequence[str]) -> dict[str, int]:
    """Return what a fresh process needs to load a checkpoint and compute one loss, in bytes: ``peak``, and ``held``.

    Both are above what the process held with llmkit imported.

    Raises UserError when the process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "memory.json"
        code = f"from llmkit.analysis.compress.measure import alone; alone(*{[str(path), str(out), [*imports]]!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        if done.returncode or not out.is_file():
            last = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
            raise UserError(f"{path}: memory cannot be measured in a process of its own: {last[:200]}")
        found: dict[str, int] = json.loads(out.read_text(encoding="utf-8"))
    return found


def alone(path: str, out: str, imports: list[str]) -> None:
    """Measure the memory of this process, a fresh one, and write it to a file."""
    from llmkit.imports import import_modules
    from llmkit.run.memory import _trim, resident

    import_modules(imports)
    torch.set_num_threads(1)
    torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2))  # what a first product takes
    before, top = resident(), highest()
    model = LanguageModel.load(path)
    ids = torch.zeros(1, 2, dtype=torch.long)
    with torch.no_grad():
        try:
            from llmkit.sequence import Sequence as Tokens

            read = None if model.head.topology == "decoder" else model.network.encode(ids, Tokens.of(ids))
            if model.head.topology != "encoder":
                model.network.decode(ids, Tokens.of(ids), memory=read)
        finally:
            peak = highest()
    gc.collect()
    if _trim is not None:
        _trim(0)
    held = resident() - before
    found = {"peak": max(peak - before, held) if peak > top else max(held, 0), "held": max(held, 0)}
    Path(out).write_text(json.dumps(found), encoding="utf-8")


def highest() -> int:
    """Return the most bytes of memory that this process has ever held."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def paired(values: Floats, others: Floats) -> tuple[float, float]:
    """Return the mean of ``values - others`` and half the width of its 95 % t interval; NaN pairs are left out."""
    from llmkit.study.statistics import half_width

    difference = (values - others)[np.isfinite(values - others)]
    if len(difference) < 2:
        return float(difference.mean()) if len(difference) else float("nan"), float("nan")
    return float(difference.mean()), float(half_width(difference.std(ddof=1), len(difference)))


def facts(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures as JSON-able data: numbers that are not finite are None."""
    plain = {key: None if isinstance(one, float) and not np.isfinite(one) else one for key, one in values.items()}
    return {"name": name, **plain}
