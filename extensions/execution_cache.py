"""Execute the chapters again when the library changes.

Reason: the key of the notebook cache is the code of the cells; it does not see ``kfac_lib``. So the
cache lies in a folder named after a hash of the library, of the locked packages, and of the files
that notebooks read. Folders of former states are removed.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config

ROOT = Path(__file__).resolve().parent.parent
CACHES = ROOT / "_build" / ".jupyter_cache"


def state() -> str:
    """A hash of the library, the lock files, and what notebooks read from beside them."""
    digest = hashlib.sha256()
    beside = [*(ROOT / "book").glob("*.py"), *(ROOT / "book").glob("*.csv")]
    locks = ROOT.glob("requirements*.lock")
    for path in sorted([*locks, *beside, *(ROOT / "kfac_lib").rglob("*.py")]):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def place_cache(app: Sphinx, config: Config) -> None:
    folder = CACHES / state()
    for former in CACHES.glob("*"):
        if former != folder:
            shutil.rmtree(former, ignore_errors=True) if former.is_dir() else former.unlink()
    config["nb_execution_cache_path"] = str(folder)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("config-inited", place_cache)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
