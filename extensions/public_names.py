"""Let text say ``kfac_lib.KFAC`` where the API pages document ``kfac_lib.kfac.KFAC``.

Reason: readers import the short name, autodoc documents the name where it is defined, and a strict
build refuses a reference to the former.
"""

from __future__ import annotations

import importlib
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment


def full_name(target: str) -> str | None:
    """``kfac_lib.KFAC.compute`` to ``kfac_lib.kfac.KFAC.compute``, if there is such a thing."""
    top, _, rest = target.partition(".")
    if top != "kfac_lib" or not rest:
        return None
    name, *members = rest.split(".")
    home = getattr(getattr(importlib.import_module(top), name, None), "__module__", None)
    return ".".join([home, name, *members]) if home else None


def resolve(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, contnode: nodes.TextElement
) -> nodes.reference | None:
    if node.get("refdomain") != "py":
        return None
    full = full_name(node["reftarget"])
    if full is None or full == node["reftarget"]:
        return None
    domain = env.get_domain("py")
    return domain.resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], full, node, contnode
    )


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
