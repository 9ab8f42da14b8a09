"""The directive ``from-symbols`` prints the parts of ``book/symbols.yml``: tables and the glossary.

Reason: symbol, shape, name in code and first chapter are kept in one place, which a test can read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

BOOK = Path(__file__).resolve().parent.parent / "book"
SOURCE = BOOK / "symbols.yml"
LABEL = re.compile(r"^\(([\w-]+)\)=$", re.M)


def chapters() -> dict[str, int]:
    """The number of the chapter in which each label stands."""
    found = {}
    for path in sorted(BOOK.glob("[0-9][0-9]_*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            for label in LABEL.findall("".join(cell["source"])):
                found[label] = int(path.name[:2])
    return found


def math(tex: str) -> str:
    return f"${tex}$" if tex else ""


def first(entry: dict[str, Any], known: dict[str, int]) -> str:
    label = entry["first"]
    return f"{{ref}}`ch. {known[label]} <{label}>`"


def letters(source: dict[str, Any]) -> list[str]:
    rows = ["| letter | runs over | size |", "|---|---|---|"]
    for entry in source["letters"]:
        rows.append(f"| {math(entry['symbol'])} | {entry['meaning']} | {entry['size']} |")
    return rows


def symbols(source: dict[str, Any]) -> list[str]:
    known = chapters()
    rows = ["| symbol | meaning | shape | in code | where |", "|---|---|---|---|---|"]
    for entry in source["symbols"]:
        code = ", ".join(f"{{py:obj}}`~{name}`" for name in entry.get("code", []))
        if "shown" in entry:
            code = f"`{entry['shown']}`"
        rows.append(
            f"| {math(entry['symbol'])} | {entry['meaning']} | {entry.get('shape', '')} | {code} | "
            f"{first(entry, known)} |"
        )
    return rows


def terms(source: dict[str, Any]) -> list[str]:
    known = chapters()
    rows = ["```{glossary}"]
    for entry in sorted(source["terms"], key=lambda entry: entry["term"].lower()):
        text = " ".join(entry["text"].split())
        rows += [entry["term"], f"  {text} ({first(entry, known)})", ""]
    return [*rows[:-1], "```"]


class FromSymbols(SphinxDirective):
    """Print a part of the file: ``letters``, ``symbols`` or ``terms``."""

    required_arguments = 1
    parts = {"letters": letters, "symbols": symbols, "terms": terms}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        """Read the file, write its part as MyST, and parse that."""
        self.env.note_dependency(str(SOURCE))
        source = yaml.safe_load(SOURCE.read_text())
        lines = self.parts[self.arguments[0]](source)
        box = nodes.container()
        self.state.nested_parse(StringList(lines, str(SOURCE)), self.content_offset, box)
        for table in box.findall(nodes.table):
            table["classes"].append("symbols")
        return list(box.children)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("from-symbols", FromSymbols)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
