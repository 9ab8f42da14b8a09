"""Every notebook is stored as executed: nbval alone passes a cell that has never run."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

BOOK = Path(__file__).resolve().parents[2] / "book"
NOTEBOOKS = sorted(BOOK.rglob("*.ipynb"), key=lambda path: path.name)
NOTEBOOKS = [path for path in NOTEBOOKS if ".ipynb_checkpoints" not in path.parts]
VIEW = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def test_the_book_has_notebooks():
    assert NOTEBOOKS


def test_every_code_cell_has_run_in_order(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_no_cell_failed_or_wrote_to_stderr(notebook):
    for number, cell in enumerate(code_cells(notebook), 1):
        for output in cell.outputs:
            assert output.output_type != "error", f"code cell {number} holds an error"
            assert output.get("name") != "stderr", f"code cell {number} wrote to stderr"


def test_no_cell_is_skipped_or_may_fail(notebook):
    for number, cell in enumerate(code_cells(notebook), 1):
        tags = set(cell.metadata.get("tags", []))
        unwanted = tags & {"raises-exception", "skip-execution", "nbval-skip"}
        assert not unwanted, f"code cell {number} is tagged {unwanted}"


def test_no_widget_state_or_view_is_stored(notebook):
    assert "widgets" not in notebook.metadata
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert VIEW not in output.get("data", {}), "run: make notebooks"


def test_no_times_or_versions_are_stored(notebook):
    assert "version" not in notebook.metadata.get("language_info", {})
    assert all("execution" not in cell.metadata for cell in notebook.cells)


def test_every_figure_has_an_alt_text(notebook):
    for number, cell in enumerate(code_cells(notebook), 1):
        for output in cell.outputs:
            data = output.get("data", {})
            # also the still picture of an interactive figure, which GitHub and print show
            if any(mime.startswith("image/") for mime in data):
                alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
                assert len(alt) > 20, f"code cell {number}: set mystnb.image.alt in its metadata"


def test_no_cell_holds_a_machine_path(notebook):
    text = str([[cell.source, cell.get("outputs", [])] for cell in notebook.cells])
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|Users)/|site-packages", text)
