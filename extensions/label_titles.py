"""Let a label stand before a paragraph, a list or a formula, not only before a heading.

Reason: ``:ref:`` takes its text from the heading after the label and warns where there is none.
Such a reference reads as the title of the section that the label stands in.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx


def title_labels(app: Sphinx, doctree: nodes.document) -> None:
    std = app.env.get_domain("std")
    labels, anonymous = std.data["labels"], std.data["anonlabels"]
    for name, (docname, target) in anonymous.items():
        if docname != app.env.docname or name in labels:
            continue
        node = doctree.ids.get(target)
        while node is not None and not isinstance(node, nodes.section):
            node = node.parent
        if node is not None and isinstance(node[0], nodes.title):
            labels[name] = (docname, target, node[0].astext())


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("doctree-read", title_labels)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
