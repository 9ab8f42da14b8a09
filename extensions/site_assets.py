"""Serve MathJax and the widget manager from the site itself.

Reason: by default the pages fetch both from other hosts. They lie in ``.web_assets/`` (see
``scripts/web_assets.py``), outside the static folder of the book, because Jupyter Book loads every
script it finds there on every page. Without them the site falls back to CDN links at the same
pinned versions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".web_assets"
LOCK = ROOT / "scripts" / "web_assets.json"
CDN = "https://cdn.jsdelivr.net/npm/"


def point_to_assets(app: Sphinx, config: Config) -> None:
    packages = {p["folder"]: p for p in json.loads(LOCK.read_text()) if not p.get("tests_only")}
    local = all((FOLDER / folder).is_dir() for folder in packages)

    def url(folder: str, path: str) -> str:
        package = packages[folder]
        if local:
            return f"{folder}/{path}"
        return f"{CDN}{package['name']}@{package['version']}/{path}"

    config["mathjax_path"] = url("mathjax", "es5/tex-mml-chtml.js")
    config["nb_ipywidgets_js"] = {url("html-manager", "dist/embed.js"): {"defer": "defer"}}


def add_assets(app: Sphinx) -> None:
    if (FOLDER / "mathjax").is_dir():
        app.config.html_static_path.append(str(FOLDER))


def drop_test_tools(app: Sphinx, error: Exception | None) -> None:
    """The accessibility checker is for the tests; the site does not carry it."""
    import shutil

    shutil.rmtree(Path(app.outdir) / "_static" / "axe-core", ignore_errors=True)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("config-inited", point_to_assets)
    app.connect("builder-inited", add_assets)
    app.connect("build-finished", drop_test_tools)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
