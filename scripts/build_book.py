"""Build the site strictly, and only when something has changed since the last good build.

The stamp holds a hash of every input. It is removed before a build and written after a good one,
so a failed or interrupted build is never taken for a finished one.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import web_assets
import yaml

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build" / "html"
STAMP = ROOT / "_build" / "book.stamp"
INPUTS = [
    "_config.yml", "_toc.yml", "requirements.lock", "pyproject.toml", "book", "kfac_lib",
    "extensions", "scripts",
]  # fmt: skip
PASSING = {"__pycache__", ".ipynb_checkpoints", ".jupyter_cache"}


def fingerprint() -> str:
    """A hash of the names and the bytes of everything that the site is made from."""
    digest = hashlib.sha256()
    for name in INPUTS:
        top = ROOT / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and not PASSING & set(path.parts):
                digest.update(f"{path.relative_to(ROOT)}\0".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    digest.update(b"assets" if web_assets.present() else b"links")
    return digest.hexdigest()


def pages() -> list[Path]:
    """The HTML files that the table of contents promises."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    found = [toc["root"]]

    def walk(node: object) -> None:
        if isinstance(node, dict):
            if "file" in node:
                found.append(node["file"])
            for child in node.values():
                walk(child)
        elif isinstance(node, list):
            for child in node:
                walk(child)

    walk(toc)
    return [SITE / f"{name}.html" for name in found]


def run_aloud(command: list[str]) -> int:
    """Run a command, pass its output on without what every kernel says, return its status."""
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "Kernel is running over TCP without encryption" not in line:
                print(line, end="", flush=True)
    return process.returncode


def main() -> int:
    """Build if needed; return the exit status."""
    problem = web_assets.ensure()
    if problem:
        print(f"The site will load its scripts from CDN links, not from itself: {problem}")
    wanted = fingerprint()
    complete = all(page.is_file() for page in pages())
    if complete and STAMP.is_file() and STAMP.read_text() == wanted:
        print(f"Nothing has changed. The site: {SITE / 'index.html'}")
        return 0
    STAMP.unlink(missing_ok=True)
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    config = ["--config", str(ROOT / "_config.yml"), "--toc", str(ROOT / "_toc.yml")]
    strict = ["--all", "-n", "-W", "--keep-going", "--quiet"]
    status = run_aloud([str(jupyter_book), "build", "book", *config, "--path-output", ".", *strict])
    missing = [page.name for page in pages() if not page.is_file()]
    if status or missing:
        print("The book was not built" + (f"; missing pages: {missing}" if missing else "."))
        return status or 1
    STAMP.write_text(wanted)
    if problem:
        print(f"CDN links: this site is not complete without a network ({problem}).")
    print(f"The site: {SITE / 'index.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
