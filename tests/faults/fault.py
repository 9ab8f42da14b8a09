"""What a fault is: a change to a copied tree, and the tests that must notice it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Put = Callable[[Path], None]


class StaleFaultError(Exception):
    """A fault that no longer changes anything: the text it replaces is gone."""


@dataclass(frozen=True)
class Fault:
    """Something wrong on purpose.

    ``put`` changes the tree at a path; ``tests`` are pytest's arguments; ``site`` says whether the
    tests need the built site in the copy.
    """

    name: str
    put: Put
    tests: tuple[str, ...]
    site: bool = False


def replace(file: str, old: str, new: str) -> Put:
    """Replace a text that occurs exactly once in a file of the tree."""

    def put(root: Path) -> None:
        path = root / file
        text = path.read_text()
        if text.count(old) != 1 or old == new:
            raise StaleFaultError(f"{file} holds {old!r} {text.count(old)} times instead of once")
        path.write_text(text.replace(old, new))

    return put
