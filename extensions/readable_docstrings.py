"""Read docstrings and signatures as they read in Python.

Reasons:

- outside literals, reStructuredText takes the star of ``(V, *f.shape)`` for the start of an
  emphasis and warns;
- a dataclass shows a class as default value as ``<class 'str'>``, which Sphinx cannot parse, so the
  whole signature loses its form.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx


def escape_stars(text: str) -> str:
    """Escape the star of every ``*name.shape`` and ``*name)`` that stands outside literals."""
    parts = re.split(r"(``.*?``)", text)
    parts[::2] = [re.sub(r"(?<=[(, ])\*(?=[\w.]+[),])", r"\\*", part) for part in parts[::2]]
    return "".join(parts)


def process(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    lines[:] = [line if line.lstrip().startswith(">>>") else escape_stars(line) for line in lines]


def name_classes(
    app: Sphinx, what: str, name: str, thing: object, options: object, args: str, result: str
) -> tuple[str, str] | None:
    if not args or "<class '" not in args:
        return None
    return re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", args), result


def setup(app: Sphinx) -> dict[str, Any]:
    # after napoleon, which has escaped the stars of argument names itself
    app.connect("autodoc-process-docstring", process, priority=900)
    app.connect("autodoc-process-signature", name_classes)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
