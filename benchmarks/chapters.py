"""What the book's own pages cost: each notebook executed once, in a kernel of its own."""

import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from benchmarks.timing import now

BOOK = Path(__file__).parent.parent / "book"


def notebooks() -> list[Path]:
    return sorted(BOOK.glob("*.ipynb"))


def measure(path: Path) -> dict[str, Any]:
    """Execute a notebook without storing anything; the time counts from the start of its kernel."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources)
    start = time.perf_counter()
    client.execute()
    seconds = round(time.perf_counter() - start, 1)
    return {"name": path.stem, "date": now(), "seconds": seconds}
