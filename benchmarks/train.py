"""Time of a training step: llmkit's Trainer path as users run it, beside other libraries' plain loops.

    python benchmarks/train.py                 two sizes on a CPU, vocabularies of 65 and 8,192
    python benchmarks/train.py --only small
    python benchmarks/train.py --compile 1     all of them compiled by torch.compile
    python benchmarks/train.py --device cuda   GPT-2 of 124M parameters in bf16, all compiled, on one GPU

llmkit runs ``llmkit fit`` with all its defaults (loader, logging, progress, checkpoints, clipping, the check for
steps that are not finite); peers get batches that lie ready and a loop of the bare necessities, with the same
optimizer in its fused form. All train a decoder of the same depth, width, heads and feedforward width in fp32. With
``--plain 1`` llmkit runs a second time, with nanoGPT's parts (learned positions, LayerNorm, GELU, no q/k norm).
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from kit import OURS, Gemm, Report, arguments
from peers import PEERS, Shape
from turns import Seat, fit, plain, step_of, take_turns, text_of

MEDIUM = {"litgpt": 1.25, "nn.TransformerEncoder": 1.25, "x-transformers": 1.15, "HF GPT-2": 1.45}
CASES: dict[str, tuple[Shape, int, dict[str, float]]] = {
    "medium65": (Shape(6, 384, 6, 256, 12, 65), 1, MEDIUM),
    "medium8192": (Shape(6, 384, 6, 256, 12, 8192), 1, MEDIUM),
    "small65": (Shape(4, 128, 4, 64, 12, 65), 15, {"litgpt": 1.25, "HF GPT-2": 1.35}),
}
"""For each case: the shape, steps a turn, the least ratio by peer."""
GPU = {"gpt2": (Shape(12, 768, 12, 1024, 16, 50304), 10, dict.fromkeys(PEERS, 1.0))}
ON_GPU = {"trainer.precision": "bf16-mixed", "trainer.accelerator": "gpu"}
COMPILED = {"model.compile": "true"}
NANOGPT = {
    "model.attention.qk_norm": "false",
    "model.position": "learned",
    "model.norm": "layer",
    "model.feedforward": "gelu",
}


def ours(seat: Seat, shape: Shape, block: int, changes: dict[str, str]) -> None:
    """Train llmkit's model of a shape by ``llmkit fit``."""
    with tempfile.TemporaryDirectory() as folder:
        special = 6  # tokens that stand for no text are part of the vocabulary
        text = text_of(shape.vocab - special, 200 * shape.batch * shape.context, Path(folder))
        settings = {
            "data.train": text,
            "data.validation_share": 0.05,
            "data.tokenizer": "char",
            "data.batch_size": shape.batch,
            "data.cache_dir": folder,
            "model.head": "generation",
            "model.attention": "multi_head",
            "model.attention.num_heads": shape.heads,
            "model.dim": shape.dim,
            "model.num_layers": shape.layers,
            "model.context": shape.context,
            "trainer.precision": "32-true",
            "trainer.accelerator": "cpu",
            "name": "bench",
            **changes,
        }
        fit(seat, [word for name, value in settings.items() for word in (f"--{name}", str(value))], block)


def theirs(seat: Seat, peer: str, shape: Shape, block: int, compiled: bool) -> None:
    """Train a peer's model of a shape by a plain loop."""
    model, loss = PEERS[peer](shape)
    model.to(seat.device)
    if compiled:
        model.compile()
    dtype = torch.bfloat16 if seat.device == "cuda" else torch.float32
    plain(seat, step_of(model, loss, batches(shape, device=seat.device), dtype=dtype), block)


def gemm(seat: Seat, block: int) -> None:
    """Multiply large matrices."""
    plain(seat, Gemm(seat.device, torch.bfloat16 if seat.device == "cuda" else torch.float32, repeats=1), block)


def batches(shape: Shape, number: int = 8, device: str = "cpu") -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return batches of random ids and targets, ready on the device."""
    generator = torch.Generator().manual_seed(0)
    size = (number, shape.batch, shape.context + 1)
    ids = torch.randint(shape.vocab, size, generator=generator).to(device)
    return [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in ids]


def main() -> None:
    """Measure every case."""
    args = arguments(__doc__, only="", plain=0, compile=0)
    report = Report("train", args.json)
    gpu = args.device == "cuda"
    compiled = gpu or bool(args.compile)
    settings = {**(ON_GPU if gpu else {}), **(COMPILED if compiled else {})}
    for name, (shape, block, goals) in (GPU if gpu else CASES).items():
        if args.only not in name:
            continue
        run = functools.partial(functools.partial, ours, shape=shape, block=block)
        contestants: dict[str, Callable[[Seat], None]] = {OURS: run(changes=settings)}
        if args.plain:
            contestants["plain GPT-2 shape"] = run(changes={**NANOGPT, **settings})
        for peer in PEERS:
            contestants[peer] = functools.partial(theirs, peer=peer, shape=shape, block=block, compiled=compiled)
        found = take_turns({**contestants, "GEMM": functools.partial(gemm, block=20)}, args.cycles, device=args.device)
        peak = Gemm(args.device, repeats=20).seconds(1.0, found.pop("GEMM").seconds)
        flops = found[OURS].facts["flops"] * shape.batch * shape.context
        report.compare(
            str(shape),
            {
                peer: [seconds / block for seconds in outcome.seconds]
                for peer, outcome in found.items()
                if outcome.seconds
            },
            "ms a step",
            1e3,
            goals,
            {OURS: flops * peak},
            {peer: outcome.missing for peer, outcome in found.items() if outcome.missing},
            note=f"limit: the product of {Gemm(args.device).size} x {Gemm(args.device).size} matrices in the same run",
        )
        for peer, outcome in found.items():
            if outcome.seconds and gpu:
                report.add(str(shape), f"{peer}: memory", round(outcome.facts["peak"] / 2**30, 2), "GiB")
    report.close()


if __name__ == "__main__":
    main()
