"""The pages of the documentation site that are made from the code whenever it is built: a hook of mkdocs.

    make docs

``keys`` is the schema of configs as tables, ``commands`` what each command prints for ``--help``, ``python`` the list
of public names, whose docstrings mkdocstrings shows.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import llmkit
from llmkit import main
from llmkit.commands import VERBS
from llmkit.commands.config.schema import Schema, schema
from llmkit.run.cli import GROUPS, TOP, TRAINER_DEFAULTS

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROLE = re.compile(r":\w+:`~?([^`]+)`")  # Lightning's docstrings are reStructuredText
CONFIGURED = re.compile(rf"--(?:(?:{'|'.join(GROUPS)})[.+ \n]|(?:{'|'.join(TOP)})\b)")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages to those of the folder."""
    from mkdocs.structure.files import File

    for path, write in PAGES.items():
        files.append(File.generated(config, path, content=write()))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Name what lies outside of the site, instead of linking it."""
    if page.file.src_uri in PAGES:
        return markdown
    return re.sub(r"\[([^]]*)\]\(\.\./([^)#]+)[^)]*\)", r"\1 (`\2`)", markdown)


def keys() -> str:
    """Return the tables of all keys: those of the top level, of each group, and of each plugin."""
    found = schema()
    plain = {key: each for key, each in found["properties"].items() if key not in GROUPS}
    page = [
        "# Every key",
        "Written from the code, as `llmkit config schema` is: names, types, defaults and docstrings. Which value wins, "
        "short names and the run folder are explained in [Configuration](../configuration.md).",
        "## Top level",
        table(plain),
    ]
    for group in GROUPS:
        values = found["properties"][group]["properties"]
        if group == "trainer":
            page += ["## `trainer`", "All arguments of Lightning's Trainer; these have a default of llmkit's.", ""]
            values = {key: value for key, value in values.items() if key in TRAINER_DEFAULTS} | values
        else:
            page += [f"## `{group}`"]
        page.append(table(values))
        for key, value in values.items():
            for form in value.get("anyOf", [value]):
                if form.get("properties") and "$ref" not in value:
                    page += [f"### `{group}.{key}`", table(form["properties"])]
    for family in found["$defs"]:
        forms = found["$defs"][family]["anyOf"]
        page.append(f"## Family `{family}`")
        for form in forms:
            name = form.get("properties", {}).get("name", {}).get("enum", [""])[-1]
            if name:
                own = {key: value for key, value in form["properties"].items() if key != "name"}
                page += [f"### `{family}/{name}`", prose(form.get("description", ""))]
                page += [table(own, form["required"])] if own else []
    return "\n\n".join(page) + "\n"


def table(values: dict[str, Schema], required: list[str] | None = None) -> str:
    """Return keys with type, default and meaning."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, value in values.items():
        default = f"`{json.dumps(value['default'], ensure_ascii=False)}`" if "default" in value else ""
        default = "required" if key in (required or []) else default
        rows.append(f"| `{key}` | {kind(value)} | {default} | {prose(value.get('description', ''))} |")
    return "\n".join(rows)


def kind(value: Schema) -> str:
    """Return the type of a key in words."""
    if "$ref" in value:
        family = value["$ref"].rpartition("/")[2]
        return f"[{family}](#family-{family})"
    if "enum" in value:
        return ", ".join(f"`{each}`" for each in value["enum"])
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(filter(None, map(kind, value["anyOf"]))))
    names = value.get("type", [])
    names = [names] if isinstance(names, str) else names
    return " or ".join(WORDS[name] for name in names if name != "null")


WORDS = {
    "array": "list",
    "boolean": "true or false",
    "integer": "whole number",
    "number": "number",
    "object": "mapping",
    "string": "text",
}


def prose(text: str) -> str:
    """Return a docstring's text as one line of a table."""
    text = ROLE.sub(r"`\1`", " ".join(text.split())).replace("``", "`")
    text = "`".join(part if at % 2 else part.replace("<", "&lt;") for at, part in enumerate(text.split("`")))
    return (text[:1].upper() + text[1:]).replace("|", r"\|")


def commands() -> str:
    """Return what each command prints for ``--help``; of those with a config only what is no key of it."""
    page = ["# Every command", "Written by the commands themselves: `llmkit COMMAND --help`."]
    for command, (_, text) in main.COMMANDS.items():
        verbs = VERBS.get(command, {})
        page += [f"## `llmkit {command}`", f"{text[0].upper()}{text[1:]}."]
        page += [] if command in ("config", "scale", "verify") else [options(command)]
        for verb in verbs:
            page += [f"### `llmkit {command} {verb}`", options(command, verb)]
    return "\n\n".join(page) + "\n"


def options(*words: str) -> str:
    """Return the help of one command."""
    out = io.StringIO()
    with environment(COLUMNS="100"), contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main.main([*words, "--help"])
    text = "".join(sign for sign in out.getvalue() if sign == "\n" or sign.isprintable())
    if "--model.dim" not in text:
        return f"```text\n{text.strip()}\n```"
    kept = [
        entry.rstrip()
        for entry in re.findall(r"^  -.*\n(?:    .*\n)*", text, re.M)
        if not CONFIGURED.match(entry.strip())
    ]
    return "Every [key](keys.md) is an option, such as `--model.dim 384`. The others:\n\n```text\n{}\n```".format(
        "\n".join(kept)
    )


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables for a while."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def python() -> str:
    """Return the page of the Python interface: the public names, then the modules that plugins are written with."""
    page = [
        "# Python",
        "`import llmkit` offers the names of the first part. Plugins import those of the others: "
        "[how to write one](../plugins.md).",
        "## `llmkit`",
    ]
    for name in llmkit.__all__:
        home = llmkit._HOMES.get(name, "")
        if home and home.removeprefix("llmkit.") not in MODULES:
            page.append(shown(f"{home}.{name}", members=LIGHTNING.get(name), inherited_members=name in LIGHTNING))
    for module, members in MODULES.items():
        page += [f"## `llmkit.{module}`", shown(f"llmkit.{module}", **HIDDEN, members=members)]
    return "\n\n".join(page) + "\n"


LIGHTNING = {"LanguageModel": ["load", "published", "predict"], "DataModule": [], "Checkpoints": []}
"""Of classes of Lightning these members are for users; the others are called by the Trainer."""
MODULES = {
    "contracts": None,
    "sequence": None,
    "compression": None,
    "registry": ["register", "plugin"],
    "testing": None,
}
"""What plugins import; of the registry they need two names."""
HIDDEN = {"show_root_heading": False, "show_root_toc_entry": False}  # the page's own heading is there


def shown(path: str, **options: Any) -> str:
    """Return what makes mkdocstrings show an object."""
    given = {key: value for key, value in options.items() if value is not None}
    return "\n".join([f"::: {path}", "    options:", *(f"      {key}: {json.dumps(given[key])}" for key in given)])


PAGES: dict[str, Callable[[], str]] = {
    "reference/keys.md": keys,
    "reference/commands.md": commands,
    "reference/python.md": python,
}
