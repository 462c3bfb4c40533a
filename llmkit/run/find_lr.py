"""The learning rate range test (Smith 2017, arXiv:1506.01186): a short run whose learning rate rises at every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.tuner.tuning import Tuner
from lightning.pytorch.utilities.seed import isolate_rng

from llmkit.errors import Problem, UserError
from llmkit.run.cli import CLI
from llmkit.run.figures import learning_rates
from llmkit.run.folder import run_folder

LOWEST, HIGHEST, STEPS = 1e-6, 1.0, 100
SKIPPED = 10
"""First steps that are left out: Lightning's average of the losses begins at half of their size."""
OPTIONS = (f"--trainer.max_steps={STEPS}", "--trainer.max_epochs=-1", "--trainer.max_time=null")
"""What the test changes in a config."""
PICTURE = "find_lr.png"


def find_lr(cli: CLI) -> str:
    """Run the test by Lightning's Tuner, draw the curve into the run's folder, and return a suggestion as text.

    The model and the state of random number generators are afterwards what they were.

    Raises:
        UserError: the parameters do not share one learning rate, several processes would run, a checkpoint is resumed,
            or the loss does not fall.
    """
    _check(cli)
    with isolate_rng(include_cuda=True):
        found: Any = Tuner(cli.trainer).lr_find(
            cli.model, datamodule=cli.datamodule, min_lr=LOWEST, max_lr=HIGHEST, num_training=STEPS, update_attr=False
        )
    rates, losses = found.results["lr"], found.results["loss"]
    at = steepest(rates, losses)
    picture = run_folder(cli.trainer) / PICTURE
    picture.parent.mkdir(parents=True, exist_ok=True)
    learning_rates(rates[SKIPPED:], losses[SKIPPED:], None if at is None else at - SKIPPED, picture)
    if at is None:
        raise UserError(f"the loss does not fall at any learning rate from {LOWEST:g} to {HIGHEST:g}: see {picture}")
    return (
        f"suggested: --model.optimizer.lr {rates[at]:.2g}\n"
        f"the loss, averaged over steps, falls fastest there, in {len(rates)} steps from {LOWEST:g} to {HIGHEST:g}\n"
        f"picture: {picture}"
    )


def _check(cli: CLI) -> None:
    model, trainer = cli.model, cli.trainer
    name = str(model.spec["optimizer"]["class_path"]).rpartition(".")[2]
    own = {"mup_base_dim": model.spec["mup_base_dim"] not in (None, model.spec["dim"])}
    own["layer_decay"] = model.spec["layer_decay"] != 1.0
    if name == "Muon":
        text = "muon has two learning rates, lr and adam_lr, and the test varies one: use llmkit tune"
        raise UserError(Problem("model.optimizer", text))
    for key in (key for key, differs in own.items() if differs):
        text = "gives weights different learning rates, and the test has one for all: leave it out, or use llmkit tune"
        raise UserError(Problem(f"model.{key}", text))
    if cli.stored is not None:
        raise UserError(Problem("ckpt_path", "--find_lr trains a new model: a resumed run keeps its learning rate"))
    if trainer.world_size > 1:
        text = f"--find_lr runs in one process, not in {trainer.world_size}: add --trainer.devices 1"
        raise UserError(Problem("trainer.devices", text))
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise UserError(Problem("trainer.fast_dev_run", f"--find_lr needs {STEPS} steps: leave it out"))


def steepest(rates: Sequence[float], losses: Sequence[float]) -> int | None:
    """Return where the loss falls fastest against the logarithm of the rate; None: it never falls."""
    usable = [n for n in range(SKIPPED, len(losses) - 1) if math.isfinite(losses[n])]
    if len(usable) < 3:
        return None
    x, y = (torch.tensor([values[n] for n in usable], dtype=torch.float64) for values in (rates, losses))
    (slopes,) = torch.gradient(y, spacing=[x.log()])
    best = int(slopes.argmin())
    return usable[best] if slopes[best] < 0 else None
