"""What several kinds of tests share: where things are."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With ``--dist loadgroup`` a notebook, a test file, a page of the site stays in one worker."""
    for item in items:
        page = getattr(getattr(item, "callspec", None), "params", {}).get("opened", "")
        item.add_marker(pytest.mark.xdist_group(f"{item.path.name}-{page}"))
