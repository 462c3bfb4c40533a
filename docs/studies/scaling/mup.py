"""Whether the best learning rate stays where it is over widths, with muP and with the standard parametrization.

    LLMKIT_DATA=../shared/data python docs/studies/scaling/mup.py

A decoder of two layers on characters of Shakespeare (``$LLMKIT_DATA/tinyshakespeare/input.txt``), 150 steps of 8 rows
of 64, warmup of 15 and cosine, for learning rates a factor of 2 apart, at several widths. Printed is the validation
loss, a mean over seeds, and the best rate of each width. Takes some five minutes on one core. docs/scaling.md has what
it printed, and with ``--base 32``.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import math
import os
import tempfile

import torch

from llmkit import DataModule, LanguageModel, plugin
from llmkit.contracts import Batch
from llmkit.model.optim import WarmupCosine

FILE = "tinyshakespeare/input.txt"


def final_loss(dim: int, base: int | None, lr: float, seed: int, steps: int, train: list[Batch], val: list[Batch],
               data: DataModule) -> float:  # fmt: skip
    """Return the validation loss in nats after training."""
    torch.manual_seed(seed)
    schedule = functools.partial(WarmupCosine, warmup_steps=steps // 10)
    optimizer = plugin("optimizer", "adamw", lr=lr)
    model = LanguageModel(dim=dim, num_layers=2, context=64, mup_base_dim=base, optimizer=optimizer, scheduler=schedule)
    model.tokenizer = data.tokenizer
    model.configure_model()
    steps_of = model.parts.optimizer(model.groups())
    rates = model.parts.schedule(steps_of, steps)
    for batch in itertools.islice(itertools.cycle(train), seed * steps, (seed + 1) * steps):
        loss = model.head.loss(model.network, batch)
        steps_of.zero_grad()
        (loss.total / loss.count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        steps_of.step()
        rates.step()
    with torch.no_grad():
        losses = [model.head.loss(model.network, batch) for batch in val]
    return float(sum(loss.total for loss in losses) / sum(loss.count for loss in losses))


def main() -> None:
    """Sweep, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--base", type=int, default=128)
    parser.add_argument("--powers", type=int, nargs=2, default=[-11, -6], help="of 2: the lowest and highest rate")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    powers = range(options.powers[0], options.powers[1] + 1)
    with tempfile.TemporaryDirectory() as cache:
        path = os.path.join(os.environ.get("LLMKIT_DATA", "../shared/data"), FILE)
        data = DataModule(train=path, tokenizer=plugin("tokenizer", "char"), batch_size=8, cache_dir=cache)
        probe = LanguageModel(context=64)
        data.bind(probe.head, 64, None, False)
        data.setup("fit")
        train = list(itertools.islice(data.train_dataloader(), options.steps * options.seeds))
        val = list(itertools.islice(data.val_dataloader(), 20))
        for base in (None, options.base):
            print("\n" + ("standard parametrization" if base is None else f"muP, base width {base}"))
            print("width " + "".join(f"   2^{power:<4}" for power in powers) + "  best")
            for dim in options.widths:
                if base == dim:
                    print(f"{dim:5}  as above")
                    continue
                losses = []
                for power in powers:
                    runs = [
                        final_loss(dim, base, 2.0**power, seed, options.steps, train, val, copy.copy(data))
                        for seed in range(options.seeds)
                    ]
                    losses.append(sum(runs) / len(runs))
                finite = [loss if math.isfinite(loss) else math.inf for loss in losses]
                best = powers[finite.index(min(finite))]
                print(f"{dim:5} " + "".join(f"  {loss:7.4f}" for loss in losses) + f"  2^{best}", flush=True)


if __name__ == "__main__":
    main()
