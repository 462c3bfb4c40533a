"""The plugins that a model is built from: factories, their plain description, and a trial without memory."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.optimizer import Optimizer
from torchmetrics import Metric

from llmkit import registry
from llmkit.contracts import Head, Stage, Tokenizer, Topology
from llmkit.errors import Problem, UserError, blame, returned
from llmkit.model import mup
from llmkit.model.backbone import Backbone
from llmkit.ops.distillation import Distillation
from llmkit.ops.lora import LoRA
from llmkit.ops.metrics import Metrics
from llmkit.sequence import Sequence

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]

SHAPE = (
    *("dropout", "norm_first", "tie_embeddings", "embedding_norm", "token_types", "output_bias", "decoder_layers"),
    *("separate_positions", "embedding_scale", "output_scale", "gradient_checkpointing"),
)
"""The plain arguments of a model that its network takes under the same name."""
SIZES = (
    *("dim", "num_layers", "context", *SHAPE, "vocab_size", "compile", "freeze", "lora", "distill"),
    *("layer_decay", "ema", "max_bad_steps", "mup_base_dim"),
)
"""The plain arguments of a model that its checkpoints describe."""

_agreed: set[Any] = set()
"""Parts, by topology, settings and classes, that this process has tried out together with success."""


class Parts:
    """A model's plugins as factories, and its sizes.

    Args:
        given: the arguments of ``LanguageModel``; a plugin is a factory, a plain spec, or None for the default.

    Attributes:
        factories: a factory for each plugin, optimizer and scheduler.
        spec: everything as plain data: what a checkpoint carries.

    Raises:
        UserError: a size out of range, an unknown plugin, or plugins that cannot work together.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        sizes = {name: given[name] for name in SIZES}
        for name, least in {"dim": 1, "num_layers": 1, "context": 2, "max_bad_steps": 1}.items():
            if sizes[name] < least:
                raise UserError(Problem(f"model.{name}", f"must be at least {least}, got {sizes[name]}"))
        if sizes["decoder_layers"] is not None and sizes["decoder_layers"] < 1:
            raise UserError(Problem("model.decoder_layers", f"must be at least 1, got {sizes['decoder_layers']}"))
        for name in ("embedding_scale", "output_scale"):
            if not 0 < sizes[name] < math.inf:
                raise UserError(Problem(f"model.{name}", f"must be above 0, got {sizes[name]}"))
        if sizes["token_types"] < 0:
            raise UserError(Problem("model.token_types", f"must be 0 or more, got {sizes['token_types']}"))
        if not 0 < sizes["layer_decay"] <= 1:
            raise UserError(Problem("model.layer_decay", f"must be above 0 and at most 1, got {sizes['layer_decay']}"))
        if sizes["ema"] is not None and not 0 < sizes["ema"] < 1:
            raise UserError(Problem("model.ema", f"must be above 0 and below 1, got {sizes['ema']}"))
        if not 0 <= sizes["dropout"] < 1:
            raise UserError(Problem("model.dropout", f"must be at least 0 and below 1, got {sizes['dropout']}"))
        if sizes["lora"] is not None:  # a checkpoint has plain data
            lora = LoRA(**sizes["lora"]) if isinstance(sizes["lora"], Mapping) else sizes["lora"]
            lora.check()
            sizes["lora"] = dataclasses.asdict(lora)
        if sizes["distill"] is not None:
            given_distill = sizes["distill"]
            distill = Distillation(**given_distill) if isinstance(given_distill, Mapping) else given_distill
            distill.check()
            sizes["distill"] = dataclasses.asdict(distill)
        keys = {key.partition(".")[2]: family for key, family in registry.FAMILY_OF.items() if key.startswith("model.")}
        self.factories: dict[str, Any] = {
            name: registry.resolve(family, given[name]) for name, family in keys.items() if name != "cross_attention"
        }
        cross = given["cross_attention"]
        if cross is None and "cross" in getattr(registry.target_of(self.factories["attention"]), "roles", ()):
            cross = self.factories["attention"]
        self.factories["cross_attention"] = registry.resolve("attention", cross)
        if sizes["mup_base_dim"] is not None:
            mup.check(sizes["mup_base_dim"], registry.target_of(self.factories["optimizer"]))
        self.spec = {**{name: registry.spec_of(factory) for name, factory in self.factories.items()}, **sizes}

    def build(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call the factory of a part; a mistake in its arguments is reported with its key."""
        with blame(f"model.{name}"):
            return self.factories[name](*args, **kwargs)

    def backbone(self, topology: Topology, vocab_size: int, num_layers: int | None = None) -> Backbone:
        """Return the network; ``num_layers`` in the place of what is configured, of each side."""
        net = self._network(self.spec["dim"], topology, vocab_size, num_layers)
        base = self.spec["mup_base_dim"]
        if base is not None and base != self.spec["dim"]:
            mup.parametrize(net, self.base_backbone(topology, vocab_size, num_layers))
        return net

    def base_backbone(self, topology: Topology, vocab_size: int, num_layers: int | None = None) -> Backbone:
        """Return the network at the base width of muP, without memory. Raises UserError when there is none."""
        try:
            with torch.device("meta"):
                return self._network(self.spec["mup_base_dim"], topology, vocab_size, num_layers)
        except UserError as error:
            raise UserError(Problem("model.mup_base_dim", f"no such model: {error.problems[0].text}")) from error

    def _network(self, dim: int, topology: Topology, vocab_size: int, num_layers: int | None) -> Backbone:
        depth = {} if num_layers is None else {"num_layers": num_layers, "decoder_layers": None}
        names = ("attention", "cross_attention", "position", "feedforward", "norm")
        return Backbone(
            vocab_size=vocab_size,
            dim=dim,
            topology=topology,
            max_length=self.spec["context"],
            **{**{name: self.spec[name] for name in ("num_layers", *SHAPE)}, **depth},
            **{name: self.factories[name] for name in names},
        )

    def vocab_size(self, tokenizer: Tokenizer) -> int:
        """Return the rows of the embedding. Raises UserError when the tokenizer has more ids."""
        rows = self.spec["vocab_size"]
        if rows is not None and rows < tokenizer.vocab_size:
            text = f"must be at least {tokenizer.vocab_size}, the ids of the tokenizer, got {rows}"
            raise UserError(Problem("model.vocab_size", text))
        return tokenizer.vocab_size if rows is None else int(rows)

    def optimizer(self, groups: Iterable[Any]) -> Optimizer:
        """Return the optimizer; learning rate and weight decay times ``lr_scale`` and ``decay_scale`` of a group."""
        optimizer: Optimizer = self.build("optimizer", groups)
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
            if "decay_scale" in group:
                group["weight_decay"] *= group["decay_scale"]
        return optimizer

    def schedule(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """Return the schedule; an argument called ``total_steps`` that was left open is filled in."""
        parameters = inspect.signature(registry.target_of(self.factories["scheduler"])).parameters
        is_open = "total_steps" in parameters and self.spec["scheduler"]["init_args"].get("total_steps") is None
        schedule: LRScheduler = self.build("scheduler", optimizer, **({"total_steps": total_steps} if is_open else {}))
        if isinstance(schedule, ReduceLROnPlateau):
            text = "ReduceLROnPlateau waits for a metric, but schedules here are functions of the step: use cosine, say"
            raise UserError(Problem("model.scheduler", text))
        return schedule

    @staticmethod
    def metrics(head: Head, stage: Stage) -> Metrics:
        """Return a head's new metrics. Raises UserError for anything that is not a torchmetrics metric by name."""

        def make() -> dict[str, nn.Module]:
            found = head.metrics(stage)
            if not (isinstance(found, dict) and all(isinstance(metric, Metric) for metric in found.values())):
                raise returned(head, "metrics", found, "a mapping of names to torchmetrics metrics")
            return found

        return Metrics(make)

    def try_out(self, topology: Topology) -> None:
        """Report parts that cannot work together before any data is prepared. Raises UserError.

        Those that do are tried once a process. No random number is drawn, or the second model would get others.
        """
        classes = (registry.target_of(factory) for factory in self.factories.values())
        choice = (topology, repr(self.spec), *classes)
        if choice not in _agreed:
            with torch.random.fork_rng(devices=[]):
                self._try_out(topology)
            _agreed.add(choice)

    def _try_out(self, topology: Topology) -> None:
        with torch.device("meta"):
            net = self.backbone(topology, vocab_size=1, num_layers=1)
        weights = [nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]
        groups = [{"params": [w], "kind": kind} for w, kind in zip(weights, ("matrix", "embedding"), strict=True)]
        name = "optimizer"
        try:
            optimizer = self.build(name, groups)
            for weight in weights:
                weight.grad = torch.zeros_like(weight)
            optimizer.step(lambda: 0.0)  # refused by one for sparse gradients
            name = "scheduler"
            self.schedule(optimizer, 1000)
        except (TypeError, RuntimeError) as error:
            raise UserError(Problem(f"model.{name}", str(error))) from error
        ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
        try:
            with blame("model.attention"):
                memory = net.encode(ids, Sequence.of(ids)) if topology != "decoder" else None
                if topology != "encoder":
                    net.decode(ids, Sequence.of(ids), memory=memory)
        except NotImplementedError:
            pass  # an operation that cannot be tried without memory
