"""Mend the pages that the theme and its companions get slightly wrong.

Reasons, one by one:

- ``sphinx-thebe`` is always loaded by Jupyter Book; its inline ``const`` is written twice and
  throws on every page. The book does not use it: its scripts are dropped.
- The bibliography carries ``role`` attributes that accessibility checkers refuse.
- The summary of a hidden cell is named "Toggle hidden content", which is not what it shows.
- A table's empty corner is a header of nothing.
- The number of a chapter stands in the name of its file, and nowhere on its page.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx


def is_thebe(script: Any) -> bool:
    body = str(getattr(script, "attributes", {}).get("body", ""))
    return "thebe" in str(getattr(script, "filename", script)) or "THEBE_JS_URL" in body


def mend(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: nodes.document
) -> None:
    context["script_files"] = [s for s in context.get("script_files", []) if not is_thebe(s)]
    context["css_files"] = [s for s in context.get("css_files", []) if not is_thebe(s)]
    body = context.get("body", "")
    body = re.sub(r' role="(list|listitem|doc-biblioentry)"', "", body)
    body = body.replace('<summary aria-label="Toggle hidden content">', "<summary>")
    body = re.sub(r'<th class="([^"]*)">\s*(<p></p>)?\s*</th>', r'<td class="\1"></td>', body)
    if number := re.match(r"(\d\d)_", pagename):
        chapter = f'<p class="chapter-number">Chapter {int(number[1])}</p>'
        body = re.sub(r"(?=<h1>)", chapter, body, count=1)
    context["body"] = body


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("html-page-context", mend, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
