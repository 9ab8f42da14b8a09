"""Results in one JSON file that grows cell by cell, and goes on where it was stopped."""

import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import kfac_lib

DIGITS = 6


@dataclass(frozen=True)
class Cell:
    """One piece of an experiment.

    Args:
        key: Its name in the file, unique, with all that it depends on.
        compute: Computes it; what it returns is rounded and stored.
        digits: To so many significant digits.
    """

    key: str
    compute: Callable[[], Any]
    digits: int = DIGITS


@dataclass(frozen=True)
class Experiment:
    """Cells, and what they all depend on.

    Args:
        name: Of the command, and of the file ``book/NAME.json``.
        settings: Seeds, grids and budgets, as JSON knows them. Cells that were computed with other
            settings are not mixed with new ones.
        cells: All of them, in the order in which they are computed.
    """

    name: str
    settings: Mapping[str, Any]
    cells: Callable[[], Iterable[Cell]]


def rounded(value: Any, digits: int = DIGITS) -> Any:
    """The value with floats to so many significant digits; NaN and infinity become None."""
    if isinstance(value, Mapping):
        return {key: rounded(part, digits) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part, digits) for part in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if abs(value) < float("inf") else None
    return value


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "scikit-learn": version("scikit-learn"),
        "pytorch_optimizer": version("pytorch_optimizer"),
        "kfac_lib": kfac_lib.__version__,
    }


class Store:
    """Cells by key, in a file that is whole at any moment.

    Args:
        path: The file; what it holds is read.
        settings: Of the experiment.

    Raises:
        ValueError: If the file was made with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, rounded(settings)
        self._lines: dict[str, str] = {}
        if not path.exists():
            return
        found = json.loads(path.read_text())
        if found["settings"] != self.settings:
            raise ValueError(
                f"{path.name} was made with other settings. Delete it to compute all of it anew, "
                "or take the code back to where it was."
            )
        self._lines = {key: json.dumps(value) for key, value in found["cells"].items()}

    def __contains__(self, key: str) -> bool:
        return key in self._lines

    def __getitem__(self, key: str) -> Any:
        return json.loads(self._lines[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def put(self, key: str, value: Any, digits: int = DIGITS) -> None:
        """Round and keep one cell, and write the file."""
        self._lines[key] = json.dumps(rounded(value, digits))
        self.write()

    def keep(self, keys: Iterable[str]) -> None:
        """Bring the cells into this order, and drop those that no longer exist."""
        self._lines = {key: self._lines[key] for key in keys if key in self._lines}
        self.write()

    def write(self) -> None:
        """Replace the file in one go: a reader sees the old one or the new one."""
        cells = ",\n".join(f"{json.dumps(key)}: {line}" for key, line in self._lines.items())
        head = json.dumps({"settings": self.settings, "versions": versions()})
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(f'{head[:-1]}, "cells": {{\n{cells}\n}}}}\n')
        os.replace(unfinished, self.path)


def run(experiment: Experiment, folder: Path, most: int | None = None, jobs: int = 1) -> Store:
    """Compute the cells that the file lacks, at most so many, and show how far it is.

    With several jobs cells are computed in processes of their own, each with one thread.
    """
    store = Store(folder / f"{experiment.name}.json", experiment.settings)
    cells = list(experiment.cells())
    missing = [cell for cell in cells if cell.key not in store][:most]
    with tqdm(total=len(missing), desc=experiment.name, disable=not missing) as bar:
        for cell, value in computed(missing, jobs):
            store.put(cell.key, value, cell.digits)
            bar.update()
    store.keep(cell.key for cell in cells)
    return store


def computed(cells: list[Cell], jobs: int) -> Iterator[tuple[Cell, Any]]:
    """Cells and values, as they are ready."""
    if jobs == 1:
        yield from ((cell, cell.compute()) for cell in cells)
        return
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,))
    try:
        submitted = {pool.submit(cell.compute): cell for cell in cells}
        for future in as_completed(submitted):
            yield submitted[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)
