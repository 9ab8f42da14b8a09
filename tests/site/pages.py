"""The pages of the built site, as the table of contents names them."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import yaml
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "_build" / "html"


def _files(node):
    if isinstance(node, dict):
        if "file" in node:
            yield node["file"]
        for child in node.values():
            yield from _files(child)
    elif isinstance(node, list):
        for child in node:
            yield from _files(child)


TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [TOC["root"], *_files(TOC)]
CHAPTERS = [name for name in PAGES if re.match(r"\d\d_", name)]


@functools.cache
def soup(name: str) -> BeautifulSoup:
    """One page, parsed."""
    return BeautifulSoup((SITE / f"{name}.html").read_text(), "html.parser")
