"""Initial weights: each a function of the seed, its name and its shape, and scores that start near uniform."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmkit.contracts import Position

STD = 0.02
"""Standard deviation of the initial embeddings and matrices (GPT-2: Radford et al. 2019)."""


def seed_device(seed: int, device: torch.device) -> None:
    """Seed the random numbers of a device and of the CPU.

    ``torch.manual_seed`` seeds devices that do not exist too, and formats the stack for each, which costs more than a
    small step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(seed)


@contextmanager
def restarted() -> Iterator[None]:
    """Begin torch's random stream again at the seed that was set last; afterwards it is where it was before.

    What was drawn in between, by data preparation or by other plugins, has no influence on the block.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(torch.initial_seed())
        yield


class Draws:
    """Random numbers by name, on torch's default device: they do not depend on what else is drawn, or in which order.

    Two networks that differ in one part therefore begin with the same values everywhere else, which makes a comparison
    at equal seeds a paired one. The seed is the next number of torch's random stream: a second network differs.
    """

    def __init__(self) -> None:
        self.device = torch.get_default_device()
        # Without memory there is nothing to draw, and the stream must stay as it is.
        self.seed = 0 if self.device.type == "meta" else int(torch.randint(2**62, (), device="cpu"))

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        """Draw from a stream of this name in the block; torch's own is left as it was."""
        if self.device.type == "meta":
            yield
            return
        digest = hashlib.blake2b(f"{self.seed} {name}".encode(), digest_size=7).digest()
        devices = [] if self.device.type == "cpu" else [torch.accelerator.current_device_index()]
        with torch.random.fork_rng(devices=devices, device_type="cuda" if not devices else self.device.type):
            seed_device(int.from_bytes(digest), self.device)
            yield


def draw_weights(net: nn.Module, residual_parts: int, draws: Draws) -> None:
    """Set linear maps and tables to N(0, 0.02), residual outputs (``out``) scaled down by the root of their number.

    Weights of other modules keep what their constructors drew.
    """
    if draws.device.type == "meta":
        return
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            residual = isinstance(module, nn.Linear) and name.rpartition(".")[2] == "out"
            with draws.named(f"{name}.weight {tuple(module.weight.shape)}"):
                nn.init.normal_(module.weight, std=STD / math.sqrt(residual_parts) if residual else STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


def quieten(
    norm: nn.Module, position: Position, vocab_size: int, norm_first: bool, scales: tuple[float, float] = (1.0, 1.0)
) -> None:
    """Scale the last norm down where the loss of a new network would start far above ln V.

    With the embedding as the output matrix, a position scores its own token by the norm of the embedding times that of
    the hidden state times their cosine. Usually the layers' outputs outweigh the embedding and the cosine is small. It
    is not after a post-norm, which makes the embedding as large as they are, nor below positions that scale it up: at
    width 768 the own token leads by 0.02 * 768 = 15 nats. The scale leaves it ln V - 1, which costs 0.3 nats at most.
    A norm without a learned scale (``weight``) stays as it is. ``scales`` are those of the embeddings and of the last
    hidden states.
    """
    factor, offset = _effect(position)
    factor *= scales[0]
    weight = getattr(norm, "weight", None)
    if isinstance(weight, nn.Parameter) and (factor > 2 or not norm_first):
        cosine = factor * STD / math.hypot(factor * STD, offset)
        with torch.no_grad():
            weight.mul_(min(1.0, max(math.log(vocab_size) - 1, 0.5) / (STD * weight.numel() * cosine * scales[1])))


def _effect(position: Position) -> tuple[float, float]:
    """Return by what a position encoding multiplies embeddings, and the root mean square of what it adds to them."""
    first_BT = torch.zeros(1, 1, dtype=torch.long)
    zeros_BTD = torch.zeros(1, 1, position.dim)
    with torch.no_grad():
        added_BTD: Tensor = position.add(zeros_BTD, first_BT)
        product_BTD = position.add(zeros_BTD + 1, first_BT) - added_BTD
    return product_BTD.mean().item(), added_BTD.square().mean().sqrt().item()
