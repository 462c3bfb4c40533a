"""From YAML files and command-line words to what the typed parser reads: short names, variables, local imports."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import pkgutil
import re
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from llmkit import registry
from llmkit.config.messages import null
from llmkit.config.origins import COMMAND_LINE, Origins, Problem
from llmkit.errors import UserError, nearest, unknown

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


def read_yaml(path: str | Path) -> tuple[dict[str, Any], Origins]:
    """Return a config file as a mapping, and on which line each key is.

    Raises UserError with file and line when it is missing or no valid YAML.
    """
    file = Path(path)
    if not file.is_file():
        where = "is a folder" if file.is_dir() else "does not exist"
        hint = "" if file.is_dir() else nearest(file.name, [path.name for path in file.parent.glob("*.yaml")])
        raise UserError(f"--config {file} {where}.{hint}")
    origins = Origins(str(file))
    try:
        loader = _Loader(file.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        content = loader.construct_document(node) if node else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{file}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not valid UTF-8: {error}") from error
    except RecursionError as error:
        raise UserError(f"{file}: nested too deeply") from error
    except OSError as error:
        raise UserError(f"--config {file} cannot be read: {error.strerror}") from error
    if content is None:
        return {}, origins
    if not isinstance(node, yaml.MappingNode):
        found = "a list" if isinstance(content, list) else repr(content)
        raise UserError(f"{file}: expected keys with values at the top, got {found}")
    _record(node, "", file, origins)
    return content, origins


def _record(node: yaml.MappingNode, prefix: str, file: Path, origins: Origins) -> None:
    """Record the line of every key below a node."""
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        # A plugin written out over several lines is chosen on the line of its name.
        chosen = prefix.rstrip(".") if key_node.value == "name" and prefix.rstrip(".") in SPEC_KEYS else key
        origins.put(chosen, None, f"{file}:{key_node.start_mark.line + 1}")
        if isinstance(value_node, yaml.MappingNode):
            _record(value_node, f"{key}.", file, origins)


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-3 is a number, a date is a text, and a key given twice is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys: set[str] = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key_node.start_mark)
        key = key_node.value
        if key in keys:
            raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
        keys.add(key)
    return dict(loader.construct_mapping(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def prepare(tree: dict[str, Any], origins: Origins, problems: list[Problem]) -> dict[str, Any]:
    """Return a config tree with its variables filled in and every short name written out.

    Args:
        tree: the config.
        origins: where its values came from.
        problems: what is wrong with a variable or a plugin is added to it.
    """
    tree = {key: _fill_variables(value, str(key), origins, problems) for key, value in tree.items()}
    for key in SPEC_KEYS:
        group, _, leaf = key.partition(".")
        part = tree.get(group)
        if isinstance(part, dict) and part.get(leaf) is not None:
            part[leaf] = expand_value(key, part[leaf], origins, problems)
    return tree


def expand_value(
    key: str, value: Any, origins: Origins, problems: list[Problem], complete: bool = True
) -> dict[str, Any] | None:
    """Return the ``{class_path, init_args}`` that a plugin's key means; None, with the problem added, if it is wrong.

    Args:
        key: the config key.
        value: a short name, a class path, ``{name, arguments}`` or ``{class_path, init_args}``.
        origins: where the value came from.
        problems: gets what is wrong: an unknown name, a class that breaks its contract, a wrong argument.
        complete: whether every argument that must be given has to be there.
    """
    try:
        family = PLUGIN_KEYS.get(key)
        spec = registry.expand(family, value) if family else _expand_torch(key.rpartition(".")[2], value)
        spec = {"class_path": spec} if isinstance(spec, str) else spec
        if not isinstance(spec, dict) or not isinstance(spec.get("class_path"), str):
            raise UserError(f"expected a name, or {{name: ..., arguments}}, got {value!r}")
        given = spec.get("init_args")
        if given is not None and not isinstance(given, dict):
            raise UserError(f"init_args: expected keys with values, got {given!r}")
        stray = [str(name) for name in spec if name not in ("class_path", "init_args")]
        if stray:
            raise UserError(f"beside class_path stands only init_args, and the arguments below it: {', '.join(stray)}")
        cls = class_of(key, spec["class_path"])
    except UserError as error:
        problems.append(Problem(key, f"{origins.at(key)}: {key}: {error}"))
        return None
    given = given or {}
    wrong = registry.unknown_arguments(cls, given)
    told = [Problem(f"{key}.{name}", f"{origins.at(f'{key}.{name}')}: {key}: {text}") for name, text in wrong.items()]
    for name, parameter in inspect.signature(cls).parameters.items():
        if given.get(name, "") is None and null(parameter):
            inner = f"{key}.{name}"
            told.append(Problem(inner, f"{origins.at(inner)}: {inner}: {null(parameter)}"))
    factory = functools.partial(cls, **{str(name): item for name, item in given.items()})
    missing = registry.missing_arguments(factory) if complete and not wrong else []
    if missing:
        told.append(Problem(key, f"{origins.at(key)}: {key}: {cls.__name__} needs {', '.join(missing)}"))
    problems += told
    return spec


def class_of(key: str, class_path: str) -> type:
    """Return the class that the value of a plugin's key names. Raises UserError as ``registry.class_of`` does."""
    return registry.class_of(class_path, PLUGIN_KEYS.get(key, key.rpartition(".")[2]))


def _expand_torch(kind: str, value: Any) -> Any:
    """Expand the short name of an optimizer or scheduler: one of ours, or any class of torch.optim."""
    names = torch_names(kind)
    if isinstance(value, str) and "." not in value:
        if value.lower() not in names:
            raise UserError(unknown(kind, value, names))
        return {"class_path": names[value.lower()]}
    if isinstance(value, dict) and "name" in value:
        rest = {key: item for key, item in value.items() if key != "name"}
        spec = _expand_torch(kind, str(value["name"]))
        return {**(spec if isinstance(spec, dict) else {"class_path": spec}), "init_args": rest}
    return value


def torch_names(kind: str) -> dict[str, str]:
    """Return every short name of an ``optimizer`` or a ``scheduler`` with its class path."""
    import torch

    module, base, own = (
        (torch.optim, torch.optim.Optimizer, {"adamw": "llmkit.model.optim.AdamW", "muon": "llmkit.model.optim.Muon"})
        if kind == "optimizer"
        else (
            torch.optim.lr_scheduler,
            torch.optim.lr_scheduler.LRScheduler,
            {"cosine": "llmkit.model.optim.WarmupCosine"},
        )
    )
    found = {
        name.lower(): f"{module.__name__}.{name}"
        for name, cls in vars(module).items()
        if isinstance(cls, type) and issubclass(cls, base) and cls is not base and not name.startswith("_")
    }
    return {**found, **own}


def _fill_variables(value: Any, key: str, origins: Origins, problems: list[Problem]) -> Any:
    if isinstance(value, dict):
        return {name: _fill_variables(item, f"{key}.{name}", origins, problems) for name, item in value.items()}
    if isinstance(value, list):
        return [_fill_variables(item, key, origins, problems) for item in value]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        name = match.group(1)
        if name in os.environ:
            return os.environ[name]
        if name in DEFAULT_VARIABLES:
            return DEFAULT_VARIABLES[name]()
        text = f"${{{name}}}: the environment variable {name} is not set.{nearest(name, DEFAULT_VARIABLES)}"
        problems.append(Problem(key, f"{origins.at(key)}: {key}: {text}"))
        return ""

    return re.sub(r"\$\{(\w+)\}", fill, value)


imported: set[str] = set()
"""Names of the local modules that the user asked for."""


def import_modules(names: Any, folder: str | Path = ".", where: str = COMMAND_LINE) -> list[str]:
    """Import local plugin modules and return their names with file paths made absolute.

    Args:
        names: module names, or paths of ``.py`` files (relative to ``folder``); one, a list of them, or None.
        folder: where relative paths and top-level modules are looked for.
        where: the place that names them, for the message of an error.

    Raises:
        UserError: no such file or module, or an import that fails.
    """
    absolute = []
    if not isinstance(names, str | list | None):
        raise UserError(f"{where}: imports: expected a module or a list of modules, got {names!r}")
    for name in [names] if isinstance(names, str) else names or []:
        folder_of, module = Path(folder).resolve(), str(name)
        if module.endswith(".py"):
            file = (folder_of / module).resolve()
            if not file.is_file():
                hint = nearest(file.name, [path.name for path in file.parent.glob("*.py")])
                raise UserError(f"{where}: imports: {file} does not exist.{hint}")
            folder_of, module = file.parent, file.stem
            absolute.append(str(file))
        else:
            absolute.append(module)
        # A real importable name, so that worker processes and pickles find the module again.
        if str(folder_of) not in sys.path:
            sys.path.insert(0, str(folder_of))
        try:
            loaded = importlib.import_module(module)
        except Exception as error:
            cause = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            hint = ""
            if isinstance(error, ModuleNotFoundError) and error.name == module:
                hint = "." + nearest(module, [found.name for found in pkgutil.iter_modules()])
            raise UserError(f"{where}: imports: {name} cannot be imported: {cause}{hint}") from error
        imported.add(module)
        found = getattr(loaded, "__file__", None)
        if str(name).endswith(".py") and (found is None or Path(found).resolve() != Path(absolute[-1])):
            raise UserError(
                f"{where}: imports: {name}: another module is called '{module}' already ({found}); rename the file"
            )
    return absolute


def argument(key: str, text: str, problems: list[Problem]) -> tuple[str, str]:
    """Return a plugin's command-line value with its short name written out, and the class it names.

    The class is empty when the value is null or wrong; what is wrong is added to ``problems``.
    """
    if text in ("null", "None"):
        return "null", ""
    try:
        value = yaml.load(text, Loader=_Loader) if text.lstrip().startswith("{") else text
    except yaml.YAMLError:
        problems.append(Problem(key, f"{COMMAND_LINE}: {key}: not valid YAML: {text}"))
        return "null", ""
    # Arguments that are missing may come as options of their own.
    spec = expand_value(key, value, Origins(COMMAND_LINE), problems, complete=False)
    if spec is None:
        return "null", ""
    path = str(spec["class_path"])
    return path if not spec.get("init_args") else json.dumps(spec), path


def default(key: str) -> str:
    """Return the short name of the plugin that a key has when a config says nothing."""
    return {"model.optimizer": "adamw", "model.scheduler": "cosine"}.get(key) or registry.DEFAULTS[PLUGIN_KEYS[key]]


def defaults() -> dict[str, Any]:
    """Return a tree with the default plugin of every key that must have one."""
    tree: dict[str, Any] = {}
    for key in SPEC_KEYS:
        if key != "model.cross_attention":
            group, _, leaf = key.partition(".")
            tree.setdefault(group, {})[leaf] = expand_value(key, default(key), Origins(), [])
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
