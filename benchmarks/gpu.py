"""All that only a machine with a GPU can show, in the order of its worth, within five minutes.

    python benchmarks/gpu.py               everything
    python benchmarks/gpu.py --only loss   the checks whose name holds this
    python benchmarks/gpu.py --dry 1       every line of it at tiny sizes on the CPU

It needs a GPU and llmkit's own dependencies; peers that are not installed, tests without pytest and text that is not
there are passed over with the reason. Each check has a time limit and cannot stop the others. What they print as they
go is printed again as a table at the end; nothing is written to docs/performance.md.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import generation
import torch
from kit import DATA, OURS, ROOT, Report, arguments, find, interleave, quiet, silent
from peers import PEERS, Shape
from torch import Tensor
from train import COMPILED, ON_GPU, gemm, ours, theirs
from turns import CONTEXT, take_turns

from llmkit import DataModule, LanguageModel, main, plugin, registry
from llmkit.contracts import Head
from llmkit.ops import graphs
from llmkit.ops.losses import linear_cross_entropy, plain_linear_cross_entropy
from llmkit.sequence import on_device
from llmkit.testing.head.examples import FIELDS
from llmkit.testing.invariance import build

BUDGET = 300.0  # seconds, of all checks together
VARIANTS = 50.0  # seconds, of the pairs of attention and head
TINY = Shape(1, 16, 2, 8, 2, 65)
GPT2, SMALL = Shape(12, 768, 12, 1024, 16, 50304), Shape(6, 384, 6, 256, 64, 65)
TOLERANCE = 1e-3
"""Most relative difference of a GPU's losses in single precision from a CPU's, over a few steps."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where the checks run.

    Attributes:
        device: ``cuda``, or ``cpu`` of a dry run.
        dry: whether sizes are tiny and nothing is compiled, because no figure counts.
    """

    device: str
    dry: bool

    @property
    def dtype(self) -> torch.dtype:
        """What products are computed in."""
        return torch.float32 if self.dry else torch.bfloat16

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a compiled function, or, of a dry run, one that is only traced."""
        return torch.compile(function, backend="eager" if self.dry else "inductor")

    def options(self) -> dict[str, str]:
        """Return the options of a fit."""
        return {} if self.dry else {**ON_GPU, **COMPILED}


Row = tuple[str, str, float | None, str, dict[str, Any]]
"""Case, name, value, unit and further arguments of ``Report.add``."""
Check = Callable[[Setting], Iterable[Row]]


def goal(value: float, least: float = -math.inf, most: float = math.inf) -> dict[str, Any]:
    """Return a goal and whether it is met."""
    words = f"at least {least:g}" if least > -math.inf else f"at most {most:g}"
    return {"goal": words, "met": least <= value <= most}


def loss(at: Setting) -> Iterator[Row]:
    """The loss alone, forward and both gradients, next to whole scores compiled and to the three products alone."""
    rows, dim, vocabularies = (32, 16, (64, 60)) if at.dry else (16384, 768, (50304, 50260))
    for vocab in vocabularies:
        hidden = torch.randn(rows, dim, device=at.device, requires_grad=True)
        weight = (torch.randn(vocab, dim, device=at.device) * 0.02).requires_grad_()
        targets = torch.randint(vocab, (rows,), device=at.device)
        whole = at.compiled(plain_linear_cross_entropy)

        def run(function: Callable[..., Any], given: tuple[Tensor, ...] = (hidden, weight, targets)) -> None:
            with torch.autocast(at.device, at.dtype, enabled=not at.dry):
                found = function(*given)
            (found.total / found.count).backward()
            for tensor in given[:2]:
                tensor.grad = None

        def products(given: tuple[Tensor, ...] = (hidden, weight)) -> None:
            low_hidden, low_weight = (tensor.detach().to(at.dtype) for tensor in given)
            scores = low_hidden @ low_weight.T
            scores @ low_weight, scores.T @ low_hidden

        ways: dict[str, Callable[[], None]] = {
            OURS: functools.partial(run, linear_cross_entropy),
            "whole scores, compiled": functools.partial(run, whole),
            "the three products": products,
        }
        case = f"loss alone, {rows} x {dim}, vocabulary {vocab}"
        found = interleave(ways, 2 if at.dry else 20, warm=2, device=at.device)
        for name, way in ways.items():
            ms = statistics.median(found[name]) * 1e3
            yield case, name, round(ms, 3), "ms", goal(ms, most=8.0) if name == OURS else {}
            if at.device == "cuda":
                gib = peak_of(way)
                yield case, name, round(gib, 3), "GiB", goal(gib, most=0.9) if name == OURS else {}


def peak_of(run: Callable[[], Any]) -> float:
    """Return the GiB that a call needs more than what was allocated before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return float(torch.cuda.max_memory_allocated() - before) / 2**30


def step(at: Setting, shape: Shape, least: float, other_vocab: int = 0, graphs: bool = False) -> Iterator[Row]:
    """A training step of all peers by turns, its memory, and its share of the rate of products.

    Args:
        at: where.
        shape: the model.
        least: the least ratio to every peer.
        other_vocab: a second vocabulary for llmkit's model alone; 0: none.
        graphs: whether llmkit's model is also trained with CUDA graphs.
    """
    shape, block = (TINY, 2) if at.dry else (shape, 10)
    run = functools.partial(functools.partial, ours, block=block, changes=at.options())
    contestants: dict[str, Any] = {OURS: run(shape=shape)}
    if graphs and not at.dry:
        contestants[f"{OURS}, CUDA graphs"] = run(shape=shape, changes={**ON_GPU, "model.compile": "reduce-overhead"})
    if other_vocab:
        other = dataclasses.replace(shape, vocab=shape.vocab - 1 if at.dry else other_vocab)
        contestants[f"{OURS}, vocabulary {other.vocab}"] = run(shape=other)
    for peer in PEERS:
        contestants[peer] = functools.partial(theirs, peer=peer, shape=shape, block=block, compiled=not at.dry)
    contestants["product"] = functools.partial(gemm, block=20)
    outcomes = take_turns(contestants, 1 if at.dry else 3, device=at.device)
    own, rate = outcomes[OURS], min(outcomes.pop("product").seconds)
    for name, outcome in outcomes.items():
        if outcome.missing:
            yield str(shape), name, None, "ms a step", {"note": f"missing: {outcome.missing}"}
            continue
        rest: dict[str, Any] = {}
        if name in PEERS:
            ratio = statistics.median(a / b for a, b in zip(outcome.seconds, own.seconds, strict=True))
            rest = {"ratio": round(ratio, 3), **goal(ratio, least=least)}
        yield str(shape), name, round(statistics.median(outcome.seconds) / block * 1e3, 2), "ms a step", rest
        yield str(shape), name, round(outcome.facts["peak"] / 2**30, 2), "GiB", {}
    flops = own.facts["flops"] * shape.batch * shape.context * block
    size = 1024 if at.device == "cpu" else 8192  # of the matrices of ``gemm``, 20 products a turn
    share = flops / statistics.median(own.seconds) / (2.0 * size**3 * 20 / rate)
    yield str(shape), "share of the rate of products", round(share, 3), "", goal(share, least=0.5)


def gpt2(at: Setting) -> Iterator[Row]:
    """GPT-2 of 124M parameters, also with the vocabulary of its own tokenizer."""
    return step(at, GPT2, 1.15, other_vocab=50260)


def small(at: Setting) -> Iterator[Row]:
    """A model of 10M parameters: bound by the launches of its kernels."""
    return step(at, SMALL, 1.15, graphs=True)


def without_graphs(run: generation.Generate) -> generation.Generate:
    """Return what generates step by step."""

    def plain(prompts: Tensor, new: int) -> list[list[int]]:
        with mock.patch.object(graphs, "CAPTURE", {}):
            return run(prompts, new)

    return plain


def tokens(at: Setting) -> Iterator[Row]:
    """Generation for one prompt by several variants, next to other libraries."""
    new = 3 if at.dry else 64
    prompts = torch.randint(generation.VOCAB, (1, generation.PROMPT), device=at.device)
    runs = {}
    for name in ("multi_head", "linear", "retention", "min_gru", "lstm"):
        net = generation.network(name, None, None, None).to(at.device)
        runs[f"{OURS}, {name}"] = run = generation.ours(net, at.device)
        plain = without_graphs(run)
        same = run(prompts, new) == plain(prompts, new)
        yield "generation, one prompt", f"{name}, changed by the graph", int(not same), "texts", goal(not same, most=0)
        if name == "multi_head":
            runs[f"{OURS}, {name}, no CUDA graph"] = plain
    found, missing = find(
        {"HF GPT-2": lambda: generation.gpt2(at.device), "litgpt": lambda: generation.litgpt(at.device)}
    )
    runs |= {peer: theirs for peer, (_, theirs) in found.items()}
    turns = {name: functools.partial(run, prompts, new) for name, run in runs.items()}
    times = interleave(turns, 1 if at.dry else 5, device=at.device)
    softmax = statistics.median(times[f"{OURS}, multi_head"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        peer = {"ratio": round(median / softmax, 2), **goal(median / softmax, least=4.0)}
        rest = peer if name in found else goal(median / new * 1e3, most=round(softmax / new * 1e3, 3))
        rest = {} if "multi_head" in name else rest
        yield "generation, one prompt", name, round(median / new * 1e3, 3), "ms a token", rest
    for absent, why in missing.items():
        yield "generation, one prompt", absent, None, "ms a token", {"note": f"missing: {why}"}


def losses(
    attention: str, head: str, folder: Path, device: str, compiled: Callable[..., Any] | None = None
) -> list[float]:
    """Return the losses of three steps of a tiny model."""
    plain: Head = plugin("head", head)()
    names = {*plain.inputs, *plain.targets}
    columns = {name: values * 8 for name, values in FIELDS.items() if name in names}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    file = folder / f"{head}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataModule(train=str(file), tokenizer=plugin("tokenizer", "byte"), batch_size=4, cache_dir=str(folder))
    torch.manual_seed(0)
    parts: dict[str, Any] = {"head": plugin("head", head), "attention": plugin("attention", attention)}
    model = LanguageModel(**parts, dim=32, num_layers=2, context=64)
    build(model, data)
    model.to(device).train()
    network = model.network
    if compiled is not None:
        torch.compiler.reset()
        network._compiled_call_impl = compiled(network.forward)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for batch, _ in zip(data.train_dataloader(), range(3), strict=False):
        torch.manual_seed(1)
        value = model.head.loss(network, on_device(batch, torch.device(device)))
        mean = value.total / value.count
        mean.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(mean))
    return found


def variants(at: Setting) -> Iterator[Row]:
    """Every attention variant with each head: a few steps on the device, next to the same ones on the CPU.

    Compiled ones come last, as many as there is time for: each takes seconds.
    """
    attentions, heads = sorted(registry.entries("attention")), sorted(registry.entries("head"))
    pairs = [("multi_head", head) for head in heads] + [(name, "generation") for name in attentions]
    rest = [(name, head) for name in attentions for head in heads if (name, head) not in pairs]
    end = time.monotonic() + VARIANTS
    with tempfile.TemporaryDirectory() as folder:
        for way, chosen in (("eager", pairs if at.dry else pairs + rest), ("compiled", pairs[:1] if at.dry else pairs)):
            worst = 0.0
            compared = failed = 0
            for name, head in chosen:
                if time.monotonic() > end and not at.dry:
                    break
                try:
                    own = losses(name, head, Path(folder), at.device, at.compiled if way == "compiled" else None)
                    plain = losses(name, head, Path(folder), "cpu")
                except Exception as error:
                    if "cannot be built as" not in str(error):
                        failed += 1
                        yield (
                            f"{way}: {name} x {head}",
                            "failed",
                            None,
                            "",
                            {"note": " ".join(str(error).split())[:200]},
                        )
                    continue
                off = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(own, plain, strict=True))
                compared += 1
                if head == "masked_lm":  # whose masks are drawn on the device
                    continue
                worst = max(worst, off)
                if not off <= TOLERANCE:
                    failed += 1
                    yield f"{way}: {name} x {head}", "losses differ by", off, "", {}
            yield f"{way}: variants x heads", "compared", compared, f"pairs, {worst:.1g} off at most", {}
            yield f"{way}: variants x heads", "fail or differ", failed, "pairs", goal(failed, most=0)


def verify(at: Setting) -> Iterator[Row]:
    """``llmkit verify resume`` and ``verify metrics`` on the device."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("".join(f"word {i} of line {i * 7 % 13}\n" for i in range(400)))
        words = ["--data.train", str(text), "--data.cache_dir", folder, "--data.tokenizer", "char"]
        words += ["--model.dim", "32", "--model.num_layers", "2", "--model.context", "32", "--model.dropout", "0.1"]
        words += ["--trainer.accelerator", "cpu" if at.dry else "gpu"]
        checks = {"metrics": ["--rows", "4" if at.dry else "16"]}
        if not at.dry:  # several processes, which the tests start too
            checks["resume"] = ["--steps", "20", "--kills", "2"]
        for name, own in checks.items():
            with silent():
                code = main.main(["verify", name, *own, *words])
            yield f"verify {name}", "exit code", code, "", goal(code, most=0)


def tests(at: Setting) -> Iterator[Row]:
    """Those of the project's tests that touch a device, with ``LLMKIT_TEST_GPU``: ``accelerator: auto`` picks it."""
    if importlib.util.find_spec("pytest") is None or not (ROOT / "tests").is_dir():
        yield "tests", "failed", None, "", {"note": "missing: pytest and the folder tests"}
        return
    touching = "losses waiting graphs precision decoding decoding_speed layers optim step swap saving throughput"
    chosen = ["test_positions"] if at.dry else [f"test_{name}" for name in [*touching.split(), "invariance"]]
    files = [file for name in chosen if (ROOT / (file := f"tests/{name}.py")).is_file()]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider", *files]
    command += ["--collect-only"] if at.dry else []
    environment = {**os.environ, "LLMKIT_TEST_GPU": "1"}
    printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stdout
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", printed, re.M)
    yield "tests", "failed", len(failed), "", {**goal(len(failed), most=0), "note": " ".join(failed)[:1000]}


def shakespeare(at: Setting) -> Iterator[Row]:
    """The config of configs/generation/tinyshakespeare_gpu.yaml, to its end."""
    config = ROOT / "configs" / "generation" / "tinyshakespeare_gpu.yaml"
    if not (DATA / "tinyshakespeare").is_dir():
        yield "shakespeare", "val_loss", None, "nats", {"note": f"missing: {DATA}/tinyshakespeare (LLMKIT_DATA)"}
        return
    os.environ["LLMKIT_DATA"] = str(DATA)
    with tempfile.TemporaryDirectory() as folder:
        words = ["--config", str(config), "--output", folder, "--data.cache_dir", folder]
        if at.dry:
            words += ["--model.dim", "12", "--model.num_layers", "1", "--model.context", "16", "--data.batch_size", "2"]
            words += ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu"]
        start = time.monotonic()
        with silent():
            code = main.main(["fit", *words])
        if code:
            raise RuntimeError(f"llmkit fit: exit code {code}")
        (file,) = Path(folder).rglob("results.json")
        best = json.loads(file.read_text())["val_loss"]
    yield "shakespeare", "best val_loss", round(best, 4), "nats", goal(best, most=1.45)
    yield "shakespeare", "whole run", round(time.monotonic() - start, 1), "s", {}


CHECKS: dict[str, tuple[Check, float, bool]] = {
    "loss": (loss, 40, True),
    "gpt2": (gpt2, 120, False),
    "tokens": (tokens, 40, True),
    "variants": (variants, 60, True),
    "small": (small, 90, False),
    "verify": (verify, 60, True),
    "tests": (tests, 60, True),
    "shakespeare": (shakespeare, 120, True),
}
"""By name, in the order of their worth: the check, its limit in seconds, and whether it runs in a process of its own.

The others start processes themselves.
"""


def apart(check: Check, at: Setting, seconds: float) -> Iterator[Row]:
    """Run a check in a process of its own; yields its rows as they come. Raises what it raises, and TimeoutError."""
    pipe, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_run, args=(theirs, check, at))
    process.start()
    theirs.close()
    end = time.monotonic() + seconds
    try:
        while pipe.poll(max(0.0, end - time.monotonic())):
            said = pipe.recv()
            if said is None:
                return
            if isinstance(said, str):
                raise RuntimeError(said)
            yield said
        raise TimeoutError
    finally:
        process.kill()
        process.join()


def _run(pipe: Connection, check: Check, at: Setting) -> None:
    quiet()
    torch.set_num_threads(1)
    try:
        for row in check(at):
            pipe.send(row)
        pipe.send(None)
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}")


def limited(check: Check, at: Setting, seconds: float) -> Iterator[Row]:
    """Run a check in this process; yields its rows. Raises TimeoutError after its time."""

    def over(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield from check(at)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run() -> int:
    """Run the checks; returns how many failed or came to no end."""
    args = arguments(__doc__, only="", dry=0)
    if not args.dry and not torch.cuda.is_available():
        print("no GPU is visible to torch; --dry 1 runs every line at tiny sizes on the CPU", file=sys.stderr)
        return 2
    at = Setting("cpu" if args.dry else "cuda", bool(args.dry))
    report, begin, failed = Report("gpu", args.json), time.monotonic(), 0
    for name, (check, limit, own) in CHECKS.items():
        if args.only not in name:
            continue
        left = BUDGET - (time.monotonic() - begin)
        if left < 5 and not at.dry:
            report.add(name, "", None, "", note="left out: no time left")
            continue
        start = time.monotonic()
        limit = 10 * limit if at.dry else min(limit, left)  # a dry run measures nothing: slow machines may take longer
        try:
            for case, what, value, unit, rest in (apart if own else limited)(check, at, limit):
                report.add(case, what, value, unit, **rest)
        except Exception as error:
            failed += 1
            why = f"stopped after {limit:.0f} s" if isinstance(error, TimeoutError) else f"failed: {error}"
            report.add(name, "", None, "", note=why)
        report.add(name, "time of the check", round(time.monotonic() - start, 1), "s")
    report.close()
    return failed


if __name__ == "__main__":
    sys.exit(run())
