"""The second use of the book: a chapter in JupyterLab, cell by cell, with its slider."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest
from pages import CHAPTERS, ROOT

TOKEN = "only-for-this-test"
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none", "autoStartDefaultKernel": True},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a copy of the first chapter; its address."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "book").mkdir()
    shutil.copy(ROOT / "book" / f"{CHAPTERS[0]}.ipynb", folder / "book")
    for name, settings in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    env = os.environ | {
        "JUPYTER_PREFER_ENV_PATH": "1",
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
    }
    port = free_port()
    with (folder / "lab.log").open("w") as log:
        process = subprocess.Popen(
            [
                Path(sys.executable).with_name("jupyter-lab"), "--no-browser", "--allow-root",
                "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
                f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={folder / 'book'}",
            ],
            env=env, stdout=log, stderr=log,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                with urllib.request.urlopen(f"{address}/api?token={TOKEN}", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, (folder / "lab.log").read_text()[-2000:]
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(20)


def test_a_chapter_runs_cell_by_cell_and_its_slider_moves_the_picture(lab, browser):
    name = f"{CHAPTERS[0]}.ipynb"
    cells = nbformat.read(ROOT / "book" / name, as_version=4).cells
    context = browser.new_context(viewport={"width": 1300, "height": 900})
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(f"{lab}/lab/tree/{name}?token={TOKEN}&reset")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']")
    page.wait_for_function(
        "n => document.querySelectorAll('.jp-Notebook .jp-Cell').length === n", arg=len(cells)
    )
    shown = page.query_selector_all(".jp-Notebook .jp-Cell")
    page.keyboard.press("Escape")
    shown[0].click(position={"x": 5, "y": 5})
    page.keyboard.press("Escape")
    for cell, box in zip(cells, shown, strict=True):
        assert "jp-mod-active" in box.get_attribute("class")
        page.keyboard.press("Shift+Enter")
        if cell.cell_type == "code":
            prompt = box.wait_for_selector(".jp-InputPrompt")
            page.wait_for_function("prompt => /\\[\\d+\\]/.test(prompt.textContent)", arg=prompt)
            page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']")
    kinds = ["application/vnd.jupyter.error", "application/vnd.jupyter.stderr"]
    for kind in kinds:
        assert page.query_selector_all(f'.jp-OutputArea [data-mime-type="{kind}"]') == []
    assert "Error displaying widget" not in page.inner_text(".jp-Notebook")

    figure = page.wait_for_selector(".explore:has([role='slider'])")
    figure.scroll_into_view_if_needed()
    image = figure.wait_for_selector(".explore-frame img")
    before = image.get_attribute("src"), image.get_attribute("alt")
    handle = figure.query_selector("[role='slider']")
    handle.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "([figure, before]) => !!figure.querySelector('.explore-frame img')"
        " && figure.querySelector('.explore-frame img').src !== before",
        arg=[figure, before[0]],
    )
    after = figure.query_selector(".explore-frame img").get_attribute("alt")
    assert after != before[1]
    assert re.search(r"\w", after)
    context.close()
