"""The pieces of a report's page, which opens in any browser without a network."""

from __future__ import annotations

import html
import string
from collections.abc import Iterable
from pathlib import Path


def page(title: str, body: str) -> str:
    """Return a page. ``body``: its elements."""
    template = string.Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.substitute(title=html.escape(title), body=body)


def paragraph(text: str) -> str:
    """Return plain text as a paragraph."""
    return f"<p>{html.escape(text)}</p>"


def bullets(lines: Iterable[str]) -> str:
    """Return lines of plain text as a list; empty without lines."""
    items = "\n".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<ul>\n{items}\n</ul>" if items else ""


def figure(name: str, title: str, caption: str, picture: str) -> str:
    """Return a drawn figure with its title, caption and files."""
    links = ", ".join(f'<a href="figures/{name}.{kind}">{kind.upper()}</a>' for kind in ("png", "pdf"))
    text = f"<figcaption>{html.escape(caption)} {links}</figcaption>"
    return f"<h2>{html.escape(title)}</h2>\n<figure>\n<div>{picture}</div>\n{text}\n</figure>"


def table(head: list[str], rows: Iterable[list[str]], text_columns: int) -> str:
    """Return a table from escaped cells, the first of each row a heading; after ``text_columns`` come numbers."""
    kinds = ["" if index < text_columns else ' class="n"' for index in range(len(head))]
    lines = ['<div class="table"><table>', "<thead><tr>"]
    lines += [f'<th scope="col"{kind}>{cell}</th>' for kind, cell in zip(kinds, head, strict=True)]
    lines += ["</tr></thead>", "<tbody>"]
    for first, *rest in rows:
        cells = [
            f'<td{kind} data-label="{label}">{cell}</td>'
            for kind, label, cell in zip(kinds[1:], head[1:], rest, strict=True)
        ]
        lines.append(f'<tr><th scope="row">{first}</th>{"".join(cells)}</tr>')
    return "\n".join([*lines, "</tbody>", "</table></div>"])
