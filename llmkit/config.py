"""From YAML files and command-line words to what the typed parser reads: short names, variables, local imports."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from llmkit import registry
from llmkit.errors import UserError, unknown

PLUGIN_KEYS = {
    "model.head": "head",
    "model.attention": "attention",
    "model.cross_attention": "attention",
    "model.position": "position",
    "model.feedforward": "feedforward",
    "model.norm": "norm",
    "data.tokenizer": "tokenizer",
}
"""Config keys whose value may be a short name, and the family it is of."""

SPEC_KEYS = (*PLUGIN_KEYS, "model.optimizer", "model.scheduler")
"""Every config key whose value is a class with arguments."""

DEFAULT_VARIABLES: dict[str, Callable[[], str]] = {
    "LLMKIT_DATA": lambda: "../shared/data",
    "STDLIB": lambda: sysconfig.get_path("stdlib"),
}
"""``${NAME}`` in a config is the environment variable; these have a value even when it is not set."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return a config file as a mapping. Raises UserError with file and line when it is missing or no valid YAML."""
    file = Path(path)
    if not file.is_file():
        where = "is a folder" if file.is_dir() else "does not exist"
        raise UserError(f"--config {file} {where}")
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{file}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not valid UTF-8: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected keys with values at the top, got {type(content).__name__}")
    return content


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-3 is a number, and a key given twice is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in keys:
            raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
        keys.add(key)
    return dict(loader.construct_mapping(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def prepare(tree: dict[str, Any], where: str, problems: list[str]) -> dict[str, Any]:
    """Return a config tree with its variables filled in and every short name written out.

    What is wrong with a plugin is added to ``problems``. Raises UserError for an unknown variable.
    """
    tree = _fill_variables(tree, where)
    for key in SPEC_KEYS:
        group, _, leaf = key.partition(".")
        part = tree.get(group)
        if isinstance(part, dict) and part.get(leaf) is not None:
            try:
                part[leaf] = expand_value(key, part[leaf], where)
                check_plugin(key, part[leaf], where)
            except UserError as error:
                problems.append(str(error))
    return tree


def check_plugin(key: str, value: Any, where: str, complete: bool = True) -> None:
    """Raise UserError when a written-out plugin cannot be imported, breaks its contract or has a wrong argument.

    Args:
        key: the config key.
        value: a class path, or ``{class_path, init_args}``.
        where: the file, or the command line, for the message.
        complete: whether every argument that must be given has to be there.
    """
    spec = {"class_path": value} if isinstance(value, str) else value
    if not isinstance(spec, dict) or "class_path" not in spec:
        raise UserError(f"{where}: {key}: expected a name, or {{name: ..., arguments}}, got {value!r}")
    try:
        factory = registry.factory_of(spec, PLUGIN_KEYS.get(key, key.rpartition(".")[2]))
        missing = registry.missing_arguments(factory) if complete else []
        if missing:
            raise UserError(f"{registry.target_of(factory).__name__} needs {', '.join(missing)}")
    except UserError as error:
        raise UserError(f"{where}: {key}: {error}") from error


def expand_value(key: str, value: Any, where: str) -> Any:
    """Return the ``{class_path, init_args}`` of a short form. Raises UserError naming ``where`` and ``key``."""
    try:
        family = PLUGIN_KEYS.get(key)
        return registry.expand(family, value) if family else _expand_torch(key.rpartition(".")[2], value)
    except UserError as error:
        raise UserError(f"{where}: {key}: {error}") from error


def _expand_torch(kind: str, value: Any) -> Any:
    """Expand the short name of an optimizer or scheduler: one of ours, or any class of torch.optim."""
    names = _torch_names(kind)
    if isinstance(value, str) and "." not in value:
        if value.lower() not in names:
            raise UserError(unknown(kind, value, names))
        return {"class_path": names[value.lower()]}
    if isinstance(value, dict) and "name" in value:
        rest = {key: item for key, item in value.items() if key != "name"}
        spec = _expand_torch(kind, str(value["name"]))
        return {**(spec if isinstance(spec, dict) else {"class_path": spec}), "init_args": rest}
    return value


def _torch_names(kind: str) -> dict[str, str]:
    import torch

    module, base, own = (
        (torch.optim, torch.optim.Optimizer, {"adamw": "llmkit.optim.AdamW", "muon": "llmkit.optim.Muon"})
        if kind == "optimizer"
        else (
            torch.optim.lr_scheduler,
            torch.optim.lr_scheduler.LRScheduler,
            {"cosine": "llmkit.optim.WarmupCosine"},
        )
    )
    found = {
        name.lower(): f"{module.__name__}.{name}"
        for name, cls in vars(module).items()
        if isinstance(cls, type) and issubclass(cls, base) and cls is not base and not name.startswith("_")
    }
    return {**found, **own}


def _fill_variables(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {key: _fill_variables(item, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill_variables(item, where) for item in value]
    if isinstance(value, str) and "${" in value:
        return re.sub(r"\$\{(\w+)\}", lambda match: _variable(match.group(1), where), value)
    return value


def _variable(name: str, where: str) -> str:
    if name in os.environ:
        return os.environ[name]
    if name in DEFAULT_VARIABLES:
        return DEFAULT_VARIABLES[name]()
    raise UserError(f"{where}: ${{{name}}}: the environment variable {name} is not set")


imported: set[str] = set()
"""Names of the local modules that the user asked for."""


def import_modules(names: str | list[str] | None, folder: str | Path = ".", where: str = "") -> list[str]:
    """Import local plugin modules and return their names with file paths made absolute.

    Args:
        names: module names, or paths of ``.py`` files (relative to ``folder``).
        folder: where relative paths and top-level modules are looked for.
        where: begins the message of an error.

    Raises:
        UserError: no such file or module, or an import that fails.
    """
    absolute = []
    if not isinstance(names, str | list | None):
        raise UserError(f"{where}imports: expected a module or a list of modules, got {names!r}")
    for name in [names] if isinstance(names, str) else names or []:
        folder_of, module = Path(folder).resolve(), str(name)
        if module.endswith(".py"):
            file = (folder_of / module).resolve()
            if not file.is_file():
                raise UserError(f"imports: {file} does not exist")
            folder_of, module = file.parent, file.stem
            absolute.append(str(file))
        else:
            absolute.append(module)
        # A real importable name, so that worker processes and pickles find the module again.
        if str(folder_of) not in sys.path:
            sys.path.insert(0, str(folder_of))
        try:
            loaded = importlib.import_module(module)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"imports: {name} cannot be imported: {type(error).__name__}: {error}") from error
        imported.add(module)
        found = getattr(loaded, "__file__", None)
        if str(name).endswith(".py") and (found is None or Path(found).resolve() != Path(absolute[-1])):
            raise UserError(f"imports: {name}: another module is called '{module}' already ({found}); rename the file")
    return absolute


def parameters_of(key: str, class_path: str) -> list[str]:
    """Return the argument names of the class that a config key names."""
    factory = registry.factory_of({"class_path": class_path}, PLUGIN_KEYS.get(key, key.rpartition(".")[2]))
    return list(inspect.signature(registry.target_of(factory)).parameters)


def expand_argument(key: str, text: str) -> tuple[str, str]:
    """Return a command-line value with its short name written out, and the class it names."""
    try:
        value = yaml.load(text, Loader=_Loader) if text.lstrip().startswith("{") else text
    except yaml.YAMLError as error:
        raise UserError(f"command line: {key}: not valid YAML: {text}") from error
    if text in ("null", "None"):
        return "null", ""
    expanded = expand_value(key, value, "command line")
    # Arguments that are missing may come as options of their own.
    check_plugin(key, expanded, "command line", complete=False)
    if isinstance(expanded, str):
        return expanded, expanded
    path = str(expanded["class_path"])
    return path if set(expanded) == {"class_path"} else json.dumps(expanded), path


def defaults() -> dict[str, Any]:
    """Return a tree with the default plugin of every key that must have one."""
    tree: dict[str, Any] = {}
    for key, family in PLUGIN_KEYS.items():
        if key != "model.cross_attention":
            group, _, leaf = key.partition(".")
            tree.setdefault(group, {})[leaf] = registry.expand(family, registry.DEFAULTS[family])
    for leaf, name in {"optimizer": "adamw", "scheduler": "cosine"}.items():
        tree["model"][leaf] = _expand_torch(leaf, name)
    return tree


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return ``below`` with the values of ``above`` on top; a plugin of another class replaces its whole spec."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and old.get("class_path") == value.get("class_path"):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged
