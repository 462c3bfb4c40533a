"""Whether the best learning rate stays where it is over widths, with muP and with the standard parametrization.

    LLMKIT_DATA=../shared/data python docs/studies/scaling/mup.py

A decoder of one layer on characters of Shakespeare (``$LLMKIT_DATA/tinyshakespeare/input.txt``), 120 steps of 8 rows of
64, warmup of 12 and cosine, for learning rates a factor of 2 apart, at several widths. Recorded is the validation loss
of one seed for every rate and of two around the best one, and where the parabola through the three best rates has its
vertex. The folder of ``--output`` gets ``mup.json``, which is written after each run and from which the same command
resumes, and ``mup.png``: without other options it draws what is there already. docs/scaling.md has what it found.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import os
import tempfile
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

from llmkit import DataModule, LanguageModel, plugin
from llmkit.contracts import Batch
from llmkit.model.optim import WarmupCosine, fast_bf16

FILE = "tinyshakespeare/input.txt"
NAMES = ("standard", "muP")
SEEDS = 2


def final_loss(dim: int, base: int | None, lr: float, seed: int, steps: int, train: list[Batch], val: list[Batch],
               data: DataModule) -> float:  # fmt: skip
    """Return the validation loss in nats after training."""
    torch.manual_seed(seed)
    schedule = functools.partial(WarmupCosine, warmup_steps=steps // 10)
    optimizer = plugin("optimizer", "adamw", lr=lr)
    model = LanguageModel(dim=dim, num_layers=1, context=64, mup_base_dim=base, optimizer=optimizer, scheduler=schedule)
    model.tokenizer = data.tokenizer
    model.configure_model()
    steps_of = model.parts.optimizer(model.groups())
    rates = model.parts.schedule(steps_of, steps)
    precision = torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16(torch.device("cpu")), cache_enabled=False)
    for batch in itertools.islice(itertools.cycle(train), seed * steps, (seed + 1) * steps):
        with precision:
            loss = model.head.loss(model.network, batch)
        steps_of.zero_grad()
        (loss.total / loss.count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        steps_of.step()
        rates.step()
    with torch.no_grad(), precision:
        losses = [model.head.loss(model.network, batch) for batch in val]
    return float(sum(loss.total for loss in losses) / sum(loss.count for loss in losses))


def mean(runs: list[float]) -> float:
    """Return the mean loss; infinity for a run that diverged."""
    return sum(runs) / len(runs) if all(map(math.isfinite, runs)) else math.inf


def best(losses: dict[int, list[float]]) -> tuple[int, float]:
    """Return the power of 2 with the least loss, and the vertex of the parabola through it and its neighbours."""
    values = {power: mean(runs) for power, runs in losses.items()}
    power = min(values, key=values.__getitem__)
    low, middle, high = (values.get(power + offset, math.inf) for offset in (-1, 0, 1))
    bend = low + high - 2 * middle
    return power, power + (low - high) / bend / 2 if math.isfinite(bend) else math.nan


def draw(found: dict[str, dict[int, dict[int, list[float]]]], png_file: Path) -> None:
    """Draw the loss against the learning rate, a curve for each width, a panel for each parametrization."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    everything = [mean(runs) for widths in found.values() for losses in widths.values() for runs in losses.values()]
    least = min(everything)
    for axes, (name, widths) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
        for dim, losses in sorted(widths.items()):
            powers = sorted(losses)
            values = [mean(losses[power]) for power in powers]
            (line,) = axes.plot([2.0**power for power in powers], values, "o-", markersize=3, label=f"width {dim}")
            at = best(losses)[0]
            axes.plot([2.0**at], [mean(losses[at])], "o", markersize=8, color=line.get_color())
        axes.set(title=name, xlabel="learning rate", ylim=(least - 0.05, least + 1.2))
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("validation loss (nats)")
    figure.axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(png_file, dpi=150, bbox_inches="tight")


def main() -> None:
    """Sweep, print two tables, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--base", type=int, default=128)
    parser.add_argument("--powers", type=int, nargs=2, default=[-11, -5], help="of 2: the lowest and highest rate")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = options.output / "mup.json"
    runs: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    with tempfile.TemporaryDirectory() as cache:
        path = os.path.join(os.environ.get("LLMKIT_DATA", "../shared/data"), FILE)
        data = DataModule(train=path, tokenizer=plugin("tokenizer", "char"), batch_size=8, cache_dir=cache)
        probe = LanguageModel(context=64)
        data.bind(probe.head, 64, None, False)
        data.setup("fit")
        train = list(itertools.islice(data.train_dataloader(), options.steps * SEEDS))
        val = list(itertools.islice(data.val_dataloader(), 20))

        def loss_of(name: str, dim: int, power: int, seed: int) -> float:
            base = options.base if name == "muP" and dim != options.base else None
            key = f"{'muP' if base else 'standard'} width {dim} rate 2^{power} seed {seed}"
            if key not in runs:
                start = time.process_time()
                runs[key] = final_loss(dim, base, 2.0**power, seed, options.steps, train, val, copy.copy(data))
                kept.write_text(json.dumps(runs, indent=1) + "\n")
                print(f"{time.process_time() - start:5.1f} s  {key}: {runs[key]:.4f}", flush=True)
            return runs[key]

        found: dict[str, dict[int, dict[int, list[float]]]] = {name: {} for name in NAMES}
        for dim, name in itertools.product(options.widths, NAMES):
            powers = range(options.powers[0], options.powers[1] + 1)
            losses = found[name][dim] = {power: [loss_of(name, dim, power, 0)] for power in powers}
            at = best(losses)[0]
            for power, seed in itertools.product(range(at - 1, at + 2), range(1, SEEDS)):
                if power in losses:
                    losses[power].append(loss_of(name, dim, power, seed))
    for name, widths in found.items():
        print(f"\n{name}" + (f", base width {options.base}" if name == "muP" else ""))
        print("width " + "".join(f"   2^{power:<4}" for power in powers) + "  best  vertex")
        for dim, losses in widths.items():
            at, vertex = best(losses)
            cells = "".join(f"  {mean(losses[power]):7.4f}" for power in powers)
            print(f"{dim:5} {cells}  2^{at}  {vertex:.2f}")
    draw(found, options.output / "mup.png")


if __name__ == "__main__":
    main()
