"""The adapters of other libraries: the code cells tagged ``adapter`` of chapter 10, executed.

They stand there in full, for readers; here they are held against the kit.
"""

import json
import warnings
from pathlib import Path

CHAPTER = Path(__file__).resolve().parents[2] / "book" / "10_constants.ipynb"


def _load():
    cells = json.loads(CHAPTER.read_text())["cells"]
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for cell in cells:
            if "adapter" in cell["metadata"].get("tags", []):
                exec("".join(cell["source"]), names)
    return names


NAMES = _load()
ADAPTERS = {
    "curvlinops": (NAMES["curvlinops_kfac"], "joint"),
    "nngeometry": (NAMES["nngeometry_kfac"], "joint"),
    "BackPACK": (NAMES["backpack_kfac"], "separate"),
}
"""Each with the way in which it returns the bias."""
