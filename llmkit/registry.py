"""Plugins by family and short name. Discovery reads entry points only: no plugin is imported before it is used."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, TypeVar

from llmkit.errors import UserError, nearest, place, unknown

DEFAULTS: dict[str, str] = {
    "tokenizer": "bpe",
    "attention": "multi_head",
    "position": "rotary",
    "feedforward": "squared_relu",
    "norm": "rms",
    "head": "generation",
    **dict.fromkeys(("dataset", "compression"), ""),
}
"""The families of plugins, with the name that is used when a config says nothing; the last two have none."""

TORCH: dict[str, tuple[str, str, dict[str, str]]] = {
    "optimizer": ("torch.optim", "adamw", {"adamw": "AdamW", "muon": "Muon"}),
    "scheduler": ("torch.optim.lr_scheduler", "cosine", {"cosine": "WarmupCosine", "wsd": "WarmupStableDecay"}),
}
"""What else a config picks by name: torch's module, the default, and our own classes in ``model.optim``."""

FAMILY_OF: dict[str, str] = {
    "model.head": "head",
    "model.attention": "attention",
    "model.cross_attention": "attention",
    "model.position": "position",
    "model.feedforward": "feedforward",
    "model.norm": "norm",
    "model.optimizer": "optimizer",
    "model.scheduler": "scheduler",
    "data.tokenizer": "tokenizer",
}
"""Every config key whose value is a class with arguments, and the family it takes."""

DATASETS = tuple(f"data.{split}" for split in ("train", "validation", "test", "predict"))
"""The keys that take files or a plugin of the family dataset."""

LISTS: dict[str, tuple[str, str]] = {"attention": ("pattern", "variants")}
"""Families whose keys may hold a list, and the plugin, with its argument, that such a list stands for."""

CONTRACTS: dict[str, str] = {
    **{family: f"llmkit.contracts:{family.capitalize()}" for family in DEFAULTS},
    "compression": "llmkit.compression:Compression",
    "optimizer": "torch.optim:Optimizer",
    "scheduler": "torch.optim.lr_scheduler:LRScheduler",
}
"""The class that every plugin of a family, every optimizer and every scheduler derives from."""

_signature = functools.cache(inspect.signature)  # of a class: inspecting it takes as long as building a small layer

T = TypeVar("T", bound=type)
Spec = dict[str, Any]
Factory = Callable[..., Any]


@dataclass(frozen=True)
class Entry:
    """One registered plugin: where its class is, and which distribution brought it."""

    family: str
    name: str
    target: str  # module:Class
    distribution: str

    @property
    def class_path(self) -> str:
        """The dotted path, ``module.Class``."""
        return self.target.replace(":", ".")

    def load(self) -> type:
        """Import the class. Raises UserError, with the cause, when that fails or the class breaks its contract."""
        found = self.find()
        check_contract(self.family, self.name, found)
        if self.family in DEFAULTS:
            check_signatures(self.family, self.name, found)
        return found

    def find(self) -> type:
        """Import the class, whatever its contract. Raises UserError, with the cause, when that fails."""
        module, _, qualname = self.target.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in qualname.split("."):
                found = getattr(found, part)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            if isinstance(error, AttributeError) and module in sys.modules:
                classes = [name for name, value in vars(sys.modules[module]).items() if isinstance(value, type)]
                text = f"{text}.{nearest(qualname, classes)}"
            if isinstance(error, ModuleNotFoundError) and error.name == module:
                text += ". A local file has to be named: --imports FILE.py, or 'imports:' in the config"
            raise UserError(f"{self.family} '{self.name}' ({self.target}) cannot be imported: {text}") from error
        return found  # type: ignore[no-any-return]


_local: dict[str, dict[str, Entry]] = {family: {} for family in DEFAULTS}


@functools.cache
def _installed() -> dict[str, list[Entry]]:
    """Return the entry points of every family: all by one scan, and each distribution's name read once."""
    points = entry_points()
    name = functools.cache(lambda distribution: distribution.name if distribution else "?")
    return {
        family: [Entry(family, one.name, one.value, name(one.dist)) for one in points.select(group=f"llmkit.{family}")]
        for family in DEFAULTS
    }


def _by_name(family: str) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for entry in _installed()[family]:
        other = found.setdefault(entry.name, entry)
        if other.target != entry.target:
            raise UserError(
                f"two installed plugins are called {family} '{entry.name}': {other.target} of {other.distribution} "
                f"and {entry.target} of {entry.distribution}. Uninstall one of them."
            )
    return found


@functools.cache
def _of_torch(family: str) -> dict[str, Entry]:
    """Return the optimizers or schedulers by their name in lower case: every class of torch, and ours above them."""
    module, _, own = TORCH[family]
    base = contract(family)
    found = {
        name.lower(): Entry(family, name.lower(), f"{module}:{name}", "torch")
        for name, cls in vars(importlib.import_module(module)).items()
        if isinstance(cls, type) and issubclass(cls, base) and cls is not base and not name.startswith("_")
    }
    ours = {name: Entry(family, name, f"llmkit.model.optim:{cls}", "llmkit") for name, cls in own.items()}
    return {**found, **ours}


def check_family(family: str) -> None:
    """Raise UserError unless ``family`` is one of the families."""
    if family not in DEFAULTS:
        raise UserError(unknown("family", family, DEFAULTS))


def entries(family: str) -> dict[str, Entry]:
    """Return every registered plugin of a family by name; optimizers and schedulers are families here too."""
    if family in TORCH:
        return _of_torch(family)
    check_family(family)
    return dict(sorted({**_by_name(family), **_local[family]}.items()))


def find(family: str, name: str) -> Entry:
    """Return the plugin called ``name``. Raises UserError naming the nearest one when there is none."""
    known, key = entries(family), name.lower() if family in TORCH else name
    if key not in known:
        unnamed = _unnamed(family, name, known)
        raise UserError((unnamed and f"unknown {family} '{name}'. {unnamed}") or unknown(family, name, known))
    return known[key]


def _unnamed(family: str, name: str, known: Mapping[str, Entry]) -> str:
    """Return how to use a class that is imported but has no name, if there is one: the nearest to ``name``."""
    if family in TORCH or "llmkit.contracts" not in sys.modules:
        return ""
    named = {entry.target for entry in known.values()}
    packages = {target.partition(":")[0].partition(".")[0] for target in named if "." in target} | {"llmkit"}
    left, found = [contract(family)], []
    while left:
        cls = left.pop()
        left += cls.__subclasses__()
        module = cls.__module__
        here = getattr(sys.modules.get(module), cls.__name__, None) is cls and module.partition(".")[0] not in packages
        if here and f"{module}:{cls.__qualname__}" not in named and not inspect.isabstract(cls):
            found.append(cls)
    by_name = {cls.__name__.lower(): cls for cls in found}
    spelled, cutoff = name.replace("_", "").lower(), 0.8 if nearest(name, known) else 0.0
    near = difflib.get_close_matches(spelled, by_name, n=1, cutoff=cutoff)
    if not near:
        return ""
    cls = by_name[near[0]]
    return (
        f"{place(cls)} is not registered: put @register('{family}', '{name}') above it, or give its path, "
        f"{cls.__module__}.{cls.__qualname__}. Allowed: {', '.join(known)}."
    )


def family_at(key: str, value: Any) -> str | None:
    """Return the family of the plugin that a value of a config describes; None: none. Data without a name are files."""
    if key in DATASETS:
        return "dataset" if isinstance(value, Mapping) and {"name", "class_path"} & value.keys() else None
    return FAMILY_OF.get(key)


def plugins_in(tree: Mapping[str, Any]) -> dict[str, str]:
    """Return the family of each plugin that a config may have, by its key; of data sets those that it has."""
    data = tree["data"] if isinstance(tree.get("data"), Mapping) else {}
    return FAMILY_OF | {key: "dataset" for key in DATASETS if family_at(key, data.get(key.partition(".")[2]))}


def default(family: str) -> str:
    """Return the name that is used when a config says nothing."""
    return TORCH[family][1] if family in TORCH else DEFAULTS[family]


def contract(family: str) -> type:
    """Return the class that plugins of the family derive from."""
    module, _, name = CONTRACTS[family].partition(":")
    found: type = getattr(importlib.import_module(module), name)
    return found


def check_contract(family: str, name: str, cls: Any) -> None:
    """Raise UserError unless ``cls`` is a concrete class of the family's contract."""
    base = contract(family)
    if not (isinstance(cls, type) and issubclass(cls, base)):
        found = f"{cls.__module__}.{cls.__qualname__}" if isinstance(cls, type) else repr(cls)
        raise UserError(f"{family} '{name}': {found} does not derive from {base.__module__}.{base.__name__}")
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(getattr(cls, "__abstractmethods__", ())))
        raise UserError(f"{family} '{name}': {cls.__name__} is abstract, it still has to define {missing}")


@functools.cache
def check_signatures(family: str, name: str, cls: type) -> None:
    """Raise UserError unless each method of a class takes what the contract calls it with."""
    for how in vars(contract(family)).values():
        own = getattr(cls, getattr(how, "__name__", ""), how)
        if not inspect.isfunction(how) or not inspect.isfunction(own) or own is how:
            continue
        parameters = inspect.signature(how).parameters.values()
        by_name = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        if "cross" not in getattr(cls, "roles", ("cross",)):
            by_name = [item for item in by_name if item != "memory"]  # which is passed to cross-attention only
        builds = own.__name__ == "__init__"  # it may need arguments of its own
        takes = [p.name for p in parameters if p.name in PASSED or (not builds and p.kind is p.POSITIONAL_OR_KEYWORD)]
        given = ["self", *takes] if builds else takes
        bind = inspect.signature(own).bind_partial if builds else inspect.signature(own).bind
        try:
            bind(*given, **dict.fromkeys(by_name))
        except TypeError as error:
            called = ", ".join([*given, *(["*"] if by_name else []), *by_name])
            text = f"{place(own)}: {error}; the contract calls it as {own.__name__}({called})"
            raise UserError(f"{family} '{name}': {text}") from error


def forget(module: str) -> None:
    """Remove the local plugins of a top-level module."""
    for known in _local.values():
        for name in [name for name, entry in known.items() if re.split("[.:]", entry.target)[0] == module]:
            del known[name]


def register(family: str, name: str) -> Callable[[T], T]:
    """Class decorator: make a local class available as ``family: name``.

    Raises:
        UserError: unknown family, a class that breaks the contract, or a name that another class holds.
    """
    check_family(family)

    def decorate(cls: T) -> T:
        check_contract(family, name, cls)
        entry = Entry(family, name, f"{cls.__module__}:{cls.__qualname__}", "(local)")
        holder = entries(family).get(name)
        if holder is not None and holder.target != entry.target:
            raise UserError(f"{family} '{name}' is taken by {holder.target} of {holder.distribution}")
        _local[family][name] = entry
        return cls

    return decorate


def plugin(family: str, name: str, **init_args: Any) -> Factory:
    """Return a factory of a registered plugin with some arguments set: ``plugin("attention", "lstm")``."""
    return resolve(family, {"name": name, **init_args})


def expand(family: str, value: Any) -> Spec:
    """Return ``{class_path, init_args}`` for every form a config may give a plugin in.

    Args:
        family: what it is looked up in.
        value: a name, a class path, ``{name, arguments}`` or ``{class_path, init_args}``; or a list, see ``LISTS``.

    Raises:
        UserError: a name that is not registered, or a value of no such form.
    """
    if isinstance(value, str):
        return {"class_path": value if "." in value else find(family, value).class_path}
    if isinstance(value, list) and family in LISTS:
        name, argument = LISTS[family]
        return {"class_path": find(family, name).class_path, "init_args": {argument: value}}
    if isinstance(value, Mapping) and "name" in value:
        given = {key: item for key, item in value.items() if key != "name"}
        if "class_path" in given or "init_args" in given:
            raise UserError("'name' takes its arguments next to it, 'class_path' takes 'init_args'. Use one form.")
        return {**expand(family, str(value["name"])), **({"init_args": given} if given else {})}
    if not isinstance(value, Mapping) or not isinstance(value.get("class_path"), str):
        raise UserError(f"expected a name, or {{name: ..., arguments}}, got {value!r}")
    if "." not in value["class_path"]:
        raise UserError(f"class_path: expected a dotted path, got '{value['class_path']}'; a short name is a 'name:'")
    stray = [str(name) for name in value if name not in ("class_path", "init_args")]
    if stray:
        raise UserError(
            f"next to class_path only init_args is allowed, with the arguments below it: {', '.join(stray)}"
        )
    if not isinstance(value.get("init_args") or {}, Mapping):
        raise UserError(f"init_args: expected a mapping, got {value['init_args']!r}")
    return dict(value)


def resolve(family: str, value: Any) -> Factory:
    """Return a factory from a short name, a spec, a class or a factory; None gives the family's default.

    Raises UserError when the name is unknown, the class cannot be imported or an argument does not exist.
    """
    value = default(family) if value is None else value
    return factory_of(expand(family, value), family) if isinstance(value, str | Mapping | list) else value


def factory_of(spec: Mapping[str, Any], family: str) -> functools.partial[Any]:
    """Return the factory of a plain ``{class_path, init_args}``: the inverse of ``spec_of``.

    Raises UserError when the class cannot be imported, breaks its family's contract or lacks an argument.
    """
    cls = class_of(str(spec["class_path"]), family)
    init_args = dict(spec.get("init_args") or {})
    wrong = unknown_arguments(cls, init_args)
    if wrong:
        raise UserError(*wrong.values())
    return functools.partial(cls, **init_args)


def class_of(class_path: str, family: str) -> type:
    """Return the class at a dotted path. Raises UserError when it cannot be imported or breaks its contract."""
    module, _, qualname = class_path.rpartition(".")
    return Entry(family, qualname, f"{module}:{qualname}", "?").load()


def unknown_arguments(cls: type, given: Iterable[str]) -> dict[str, str]:
    """Return one sentence for each given argument that a class does not take."""
    parameters = _signature(cls).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return {}
    takes = ", ".join(name for name in parameters if name not in PASSED) or "(no arguments)"
    return {
        str(name): f"{cls.__name__} has no argument '{name}'.{nearest(str(name), parameters)} It takes: {takes}."
        for name in given
        if name not in parameters
    }


PASSED = {"dim", "role", "max_length", "layer", "bias_heads", "params", "optimizer"}
"""Arguments that the framework passes by itself."""


def missing_arguments(factory: functools.partial[Any]) -> list[str]:
    """Return the arguments that must be given and are not."""
    parameters = _signature(factory.func).parameters.values()
    needed = (p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD)
    return [name for name in needed if name not in PASSED and name not in factory.keywords]


def target_of(factory: Factory) -> Any:
    """Return the class behind a class or a partial of one."""
    if not isinstance(factory, functools.partial):
        return factory
    # jsonargparse hands out partial(instantiate, Class, ...).
    return next((item for item in (factory.func, *factory.args) if isinstance(item, type)), factory.func)


def spec_of(factory: Factory) -> Spec:
    """Return the plain ``{class_path, init_args}`` of a class or a partial of one.

    Raises UserError for anything else, because it could not be written into a checkpoint.
    """
    target = target_of(factory)
    if not isinstance(target, type):
        raise UserError(f"expected a class or functools.partial of a class, got {factory!r}")
    given = factory.keywords if isinstance(factory, functools.partial) else {}
    init_args = {name: value for name, value in given.items() if name not in PASSED}
    return {"class_path": f"{target.__module__}.{target.__qualname__}", "init_args": init_args}


def spec_of_instance(instance: Any) -> Spec:
    """Return the plain spec that builds a like instance: its class and the attributes named as its arguments."""
    cls: type = type(instance)
    given = {name: getattr(instance, name) for name in _signature(cls).parameters if hasattr(instance, name)}
    return {**spec_of(cls), "init_args": given}
