"""A browser, a server and a copy of the site in a folder with a space, each made once."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from pathlib import Path

import pytest
from pages import ROOT, SITE
from playwright.sync_api import sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def browser():
    """The system's Chromium; names of other hosts do not resolve in it."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.fail(
            "no Chromium found: install it (Debian, Ubuntu: apt install chromium) and run again",
            pytrace=False,
        )
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=path,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            ],
        )
        yield chromium
        chromium.close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def server():
    """The address of the site over http."""
    assert (SITE / "index.html").is_file(), "no site: run make book"
    handler = functools.partial(Quiet, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


@pytest.fixture(scope="session")
def unzipped(tmp_path_factory) -> Path:
    """The site as a reader gets it: zipped, and unpacked in a folder with a space."""
    folder = tmp_path_factory.mktemp("zip")
    archive = shutil.make_archive(str(folder / "site"), "zip", SITE)
    target = folder / "my downloads"
    shutil.unpack_archive(archive, target)
    return target


@pytest.fixture(scope="session")
def axe() -> str:
    """The accessibility checker, as a script."""
    path = ROOT / ".web_assets" / "axe-core" / "axe.min.js"
    if not path.is_file():
        pytest.fail("axe-core is missing: run make book with the npm registry", pytrace=False)
    return path.read_text()


class Visit:
    """One page in the browser, with what it asked for and what it complained about."""

    def __init__(self, page, url: str) -> None:
        self.page, self.url = page, url
        self.requests: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda r: self.requests.append(r.url))
        page.on("requestfailed", lambda r: self.errors.append(f"failed: {r.url}"))
        page.on(
            "response",
            lambda r: self.errors.append(f"{r.status}: {r.url}") if r.status >= 400 else None,
        )
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on(
            "console",
            lambda m: self.errors.append(m.text) if m.type == "error" else None,
        )
        page.goto(url)
        page.evaluate(
            """async () => {
              await document.fonts.ready;
              if (window.MathJax) await window.MathJax.startup.promise;
            }"""
        )
        if page.query_selector('script[type="application/vnd.jupyter.widget-state+json"]'):
            page.wait_for_function(
                """() => document.querySelectorAll('.explore-frame img').length ===
                  document.querySelectorAll('script[type$="widget-view+json"]').length""",
                polling=50,
            )
        page.wait_for_timeout(50)

    def strangers(self) -> list[str]:
        """What was asked from anywhere but the site itself."""
        own = self.url.split("/", 3)[:3] if self.url.startswith("http") else ["file:", "", ""]
        return [
            url
            for url in self.requests
            if not url.startswith(("data:", "blob:")) and url.split("/", 3)[:3] != own
        ]


@pytest.fixture(scope="session")
def visit(browser):
    """Open a page, and close the one before: ``visit(url)``."""
    context = browser.new_context(viewport={"width": 1300, "height": 900}, reduced_motion="reduce")
    context.set_default_timeout(20_000)

    def open_page(url: str) -> Visit:
        for page in context.pages:
            page.close()
        return Visit(context.new_page(), url)

    return open_page
