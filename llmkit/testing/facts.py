"""The facts about one plugin: arguments, abilities, limits, cost. They are measured, not declared."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import re
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import docstring_parser
import torch
from torch import Tensor

from llmkit import registry
from llmkit.contracts import Attention, Head, Position, Role, Tokenizer
from llmkit.errors import UserError
from llmkit.model.groups import fused_maps
from llmkit.registry import Entry, Factory
from llmkit.sequence import Sequence, State

Facts = dict[str, Any]
Build = Callable[[int, int], Any]  # (dim, length) -> module
Measure = Callable[[Any, int], Any]  # (module, length) -> what is measured

ROLES: tuple[Role, ...] = ("causal", "bidirectional", "cross")
WAYS = ("add", "rotate", "bias")


def describe(entry: Entry, arguments: Facts, dim: int, length: int) -> Facts:
    """Return the facts about a plugin as JSON-able data.

    Args:
        entry: the plugin.
        arguments: its init arguments.
        dim: the width at which it is measured; sizes and costs also at twice this width.
        length: the sequence length at which it is measured.

    Raises:
        UserError: it cannot be imported, or does not take one of the arguments.
    """
    cls = entry.load()
    factory = registry.factory_of({"class_path": entry.class_path, "init_args": arguments}, entry.family)
    doc = docstring_parser.parse(inspect.cleandoc(cls.__doc__ or ""), docstring_parser.DocstringStyle.GOOGLE)
    facts: Facts = {
        "details": doc.long_description or "",
        "class": entry.class_path,
        "version": _version(entry.distribution),
        "papers": papers(cls.__doc__ or ""),
        "arguments": _arguments(cls, {found.arg_name: found.description or "" for found in doc.params}),
        "dim": dim,
        "length": length,
        "supports": {},
        "limits": [f"the argument {name} must be given" for name in registry.missing_arguments(factory)],
        "cost": [],
        "differences": [] if registry.missing_arguments(factory) else differences(entry.family, factory, dim, length),
    }
    if not facts["limits"]:
        with _refusals(facts):
            if entry.family == "tokenizer":
                facts["supports"] = _tokenizer(factory())
            elif entry.family == "head":
                facts["supports"] = _head(factory())
            elif entry.family == "dataset":
                facts["supports"] = {name: str(value) for name, value in next(iter(factory().rows("train"))).items()}
            elif entry.family == "compression":
                method = factory()
                facts["supports"] = {name: getattr(method, name) for name in ("trains", "expands", "reads")}
            else:
                _module(factory, entry.family, dim, length, facts)
    return facts


def papers(text: str) -> list[str]:
    """Return links to the arXiv numbers and DOIs in a text, in order of appearance."""
    found = re.findall(r"\barXiv:\s?(\d{4}\.\d{4,5}|[\w.-]+/\d{7})|\bdoi:\s?(10\.\d+/\S+)", text, re.IGNORECASE)
    links = [f"https://arxiv.org/abs/{a}" if a else f"https://doi.org/{b.rstrip('.,;:)')}" for a, b in found]
    return list(dict.fromkeys(links))


def differences(family: str, factory: functools.partial[Any], dim: int, length: int) -> list[str]:
    """Return what sets a plugin apart from its family's default, other than what it computes.

    In a comparison with the default these are confounds unless they are the point: arguments that it lacks or whose
    values differ, and weights by shape. A weight counts as the maps that are marked in it by ``llmkit.ops.fused``,
    because Muon treats each by itself. Tokenizers, heads and data are not compared: another task is not a variant.

    Args:
        family: of the plugin.
        factory: builds it from what the framework passes.
        dim: the width at which weights are compared; a plugin that refuses it is compared by its arguments alone.
        length: the context at which weights of positions are compared.
    """
    if family in ("tokenizer", "head", "dataset", "compression"):
        return []
    default = registry.resolve(family, None)
    cls, usual = registry.target_of(factory), registry.target_of(default)
    found, missing = [], []
    parameters = inspect.signature(cls).parameters
    passed_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, parameter in inspect.signature(usual).parameters.items():
        if name in registry.PASSED:
            continue
        usual_value = f"({json.dumps(parameter.default, default=str)} there)"
        if name in parameters or name in factory.keywords:
            value = factory.keywords[name] if name in factory.keywords else parameters[name].default
            if value != parameter.default:
                found.append(f"{name} is {json.dumps(value, default=str)} {usual_value}")
        elif not passed_on:
            missing.append(f"{name} {usual_value}")
    if missing:
        found.append(f"no argument {', '.join(missing)}")

    def build(factory: Factory) -> Build:
        role = [role for role in ROLES if role in cls.roles][:1] if family == "attention" else []
        return lambda dim, length: factory(dim, *([length] if family == "position" else role))

    with contextlib.suppress(UserError):
        here, there = (_measured(build(part), _maps, dim, length) for part in (factory, default))
        for verb, more, less in (("lacks", there, here), ("has further", here, there)):
            extra = {shape: len(names) - len(less.get(shape, ())) for shape, names in more.items()}
            shapes = [
                (f"{number} of " if number > 1 else "")
                + (" x ".join(map(str, shape)) or "a number")
                + ("" if shape in less else f" ({', '.join(dict.fromkeys(more[shape]))})")
                for shape, number in extra.items()
                if number > 0
            ]
            if shapes:
                found.append(f"{verb} weights {', '.join(shapes)}")
    return found


def _maps(module: Any, length: int) -> dict[tuple[int, ...], list[str]]:
    """Return, by shape, the names of the weights that hold the module's maps; several times if it holds several."""
    fused = fused_maps(module)
    found: dict[tuple[int, ...], list[str]] = {}
    for name, parameter in module.named_parameters():
        shape = tuple(parameter.shape)
        for part in [(rows, *shape[1:]) for rows in fused[name]] if name in fused else [shape]:
            found.setdefault(part, []).append(name)
    return found


def _version(distribution: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(distribution)
    return None


def _arguments(cls: type, described: dict[str, str]) -> list[Facts]:
    """Return the arguments that a config may set."""
    found = []
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.name in registry.PASSED or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        required = parameter.default is parameter.empty
        annotation = "" if parameter.annotation is parameter.empty else parameter.annotation
        found.append(
            {
                "name": parameter.name,
                "type": annotation if isinstance(annotation, str) else inspect.formatannotation(annotation),
                "required": required,
                "default": None if required else json.loads(json.dumps(parameter.default, default=str)),
                "description": " ".join(described.get(parameter.name, "").split()),
            }
        )
    return found


def _tokenizer(tokenizer: Tokenizer) -> Facts:
    ids = {name: getattr(tokenizer, f"{name}_id", None) for name in ("pad", "bos", "eos", "unk", "mask", "sep")}
    return {
        "trained": tokenizer.trained,
        "vocab_size": tokenizer.vocab_size if tokenizer.trained else None,
        "lossless": tokenizer.lossless,
        "special_ids": {name: number for name, number in ids.items() if number is not None},
    }


def _head(head: Head) -> Facts:
    return {
        **{name: getattr(head, name) for name in ("topology", "layout")},
        **{name: list(getattr(head, name)) for name in ("inputs", "targets", "texts", "monitor")},
        "metrics": _metrics(head),
    }


def _metrics(head: Head) -> list[str] | None:
    """Return the names of the metrics on test data, or None if they depend on more of the data."""
    for columns in ({}, {field: ["a", "b"] for field in head.targets}):
        with contextlib.suppress(Exception):  # the head may need other labels than these
            if columns:
                head.learn(columns)
            return list(head.metrics("test"))
    return None


def _module(factory: Factory, family: str, dim: int, length: int, facts: Facts) -> None:
    """Add what a module supports, the widths that it refuses, and its cost; an attention variant's by role."""

    def in_role(role: Role) -> Build:
        return lambda dim, length: factory(dim, role)

    cls: Any = registry.target_of(factory)
    builds: dict[str, Build] = {"": lambda dim, length: factory(dim)}
    if family == "attention":
        builds = {role: in_role(role) for role in ROLES if role in cls.roles}
        facts["supports"]["roles"] = list(builds)
    elif family == "position":
        builds = {"": factory}
        facts["supports"]["positions"] = [way for way in WAYS if getattr(cls, way) is not getattr(Position, way)]
    # The next odd width is tried too: many plugins refuse it, and say so.
    for width in (dim, dim + 1 + dim % 2):
        for build in builds.values():
            with _refusals(facts):
                module = build(width, length)
                if isinstance(module, Position):
                    seq = Sequence.dense(1)
                    module.add(torch.zeros(1, 1, width), seq.positions_BT)
                    module.rotate(torch.zeros(1, 1, 1, width), seq)
    for role, build in builds.items():
        with _refusals(facts):
            cost: Facts = {"role": role} if role else {}
            cost["parameters"] = _quantity(build, _parameters, dim, length)
            if family in ("attention", "feedforward"):
                cost["flops_per_token"] = _quantity(build, _flops, dim, length)
            facts["cost"].append(cost)
            if role in ("causal", "bidirectional") and "positions" not in facts["supports"]:
                facts["supports"]["positions"] = _measured(build, _positions, dim, 2)
            if role == "causal":
                facts["supports"]["decoding_state"] = _state(build, dim, length)


# Measuring


def _parameters(module: Any, length: int) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _flops(module: Any, length: int) -> float:
    """Return forward FLOPs per position: two per weight of each matrix, plus the mixing."""
    weights: int = sum(parameter.numel() for parameter in module.parameters() if parameter.dim() >= 2)
    mixing = (part.mixing_flops(length) for part in module.modules() if isinstance(part, Attention))
    return 2.0 * weights + sum(mixing)


def _positions(module: Any, length: int) -> list[str]:
    """Return the methods of position plugins that have an effect on this attention variant."""
    listener = _Listener(module.dim, length)
    _feed(module, length, None, listener)
    return ["add", *(way for way in WAYS if way in listener.called)]


class _Listener(Position):
    """Adds no positions; records which methods are called."""

    def __init__(self, dim: int, max_length: int) -> None:
        super().__init__(dim, max_length)
        self.called: set[str] = set()

    def rotate(self, x_BHTE: Tensor, seq: Sequence) -> Tensor:
        self.called.add("rotate")
        return x_BHTE

    def bias(self, query_BT: Tensor, key_BS: Tensor, num_heads: int) -> Tensor | None:
        self.called.add("bias")
        return None


def _state(build: Build, dim: int, length: int) -> Facts | None:
    """Return the size of one row's decoding state and whether it grows with the length; None if there is no state."""
    if _measured(build, lambda module, length: module.init_state(1, length, torch.empty(1, dim)), dim, length) is None:
        return None
    size = _quantity(build, _state_size, dim, length)
    return {**size, "grows": _measured(build, _state_size, dim, 2 * length) > size["at_dim"]}


def _state_size(module: Any, length: int) -> int:
    """Return how many numbers the decoding state of one row holds after ``length`` columns."""

    def after(columns: int) -> int:
        state = module.init_state(1, length, torch.empty(1, module.dim))
        if columns:
            _feed(module, columns, state)
        return sum(value.numel() for value in state.values())

    # A preallocated state has its full size at once; only one that grows has to be filled.
    empty = after(0)
    return empty if after(1) == empty else after(length)


def _feed(module: Any, length: int, state: State | None, position: Position | None = None) -> None:
    x_BTD = torch.empty(1, length, module.dim)
    seq = Sequence.dense(length, x_BTD.device)
    seq.position = position
    with torch.no_grad():
        module(x_BTD, seq, state=state)


def _quantity(build: Build, measure: Measure, dim: int, length: int) -> Facts:
    """Measure at a width and at twice that width, which shows the growth; None if the plugin refuses the latter."""
    quantity: Facts = {"at_dim": _number(_measured(build, measure, dim, length)), "at_twice_dim": None}
    with contextlib.suppress(UserError):
        quantity["at_twice_dim"] = _number(_measured(build, measure, 2 * dim, length))
    return quantity


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _measured(build: Build, measure: Measure, dim: int, length: int) -> Any:
    """Measure a module on the meta device, which allocates nothing, or on the CPU if it needs real numbers.

    Raises UserError if the plugin cannot be run.
    """
    for device in ("meta", "cpu"):
        try:
            with torch.device(device):
                return measure(build(dim, length), length)
        except UserError:
            raise
        except Exception as error:
            failure = error
    cause = " ".join(str(failure).split())[:200]
    raise UserError(f"it raises {type(failure).__name__}: {cause}; see 'llmkit plugins check'") from failure


@contextlib.contextmanager
def _refusals(facts: Facts) -> Iterator[None]:
    """Add the message of a UserError raised in the block to the plugin's limits."""
    try:
        yield
    except UserError as error:
        line = " ".join(str(error).split())
        if line not in facts["limits"]:
            facts["limits"].append(line)
