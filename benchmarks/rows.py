"""The rows of the tables: a problem, and the work to be done on it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from benchmarks.problems import (
    BATCH_SIZES,
    CLASSES,
    CNN,
    LARGE,
    MAIN,
    SMALL,
    TOKENS,
    Made,
    Problem,
    with_batch_size,
    with_classes,
)

FLAVOURS = ("type-II", "Monte Carlo", "empirical", "input-only")
DAMPINGS = ("Exact", "Factored")
DIAGNOSES = (
    (SMALL, 256, "Monte Carlo"),
    (LARGE, 64, "Monte Carlo"),
    (LARGE, 256, "Monte Carlo"),
    (LARGE, 1024, "Monte Carlo"),
    (LARGE, 256, "type-II"),
)
"""Width, number of data and number of vectors, to see how the time of a diagnosis grows."""


@dataclass(frozen=True)
class Work:
    """What is computed.

    Args:
        kind: ``"KFAC"`` and ``"EKFAC"`` compute the factors, ``"inverse"`` damps and inverts
            factors that are there, ``"precondition"`` applies an inverse that is there,
            ``"training step"`` is a whole step of an optimizer, and ``"diagnose"`` measures how
            wrong KFAC is.
        flavour: Flavour of the Fisher.
        sharing: ``"expand"`` or ``"reduce"``.
        damping: ``"Exact"`` or ``"Factored"``, for the inverses.
        layers: ``"all"``; or ``"last"`` or ``"hidden"``, to see what the last layer costs.
    """

    kind: str = "KFAC"
    flavour: str = "type-II"
    sharing: str = "expand"
    damping: str = "Exact"
    layers: str = "all"

    def __str__(self) -> str:
        names = {
            "KFAC": self.flavour,
            "EKFAC": f"EKFAC, {self.flavour}",
            "inverse": f"damped inverse, {self.damping}",
            "precondition": f"one preconditioned gradient, {self.damping}",
            "training step": "training step",
            "diagnose": f"diagnosis, {self.flavour}",
        }
        reduce = ", reduce" if self.sharing == "reduce" else ""
        parts = {"all": "", "last": ", last layer only", "hidden": ", hidden layers only"}
        return names[self.kind] + reduce + parts[self.layers]


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    problem: Problem
    work: Work

    @property
    def key(self) -> str:
        """What names the row on the command line and when results are merged."""
        return f"{self.problem.name}, N={self.problem.N}, {self.work}"


class Prepared(NamedTuple):
    """A contender that is ready to run.

    Args:
        run: What is timed.
        read: Turns what ``run`` returns into what is compared, by layer: factors (A, B), the
            eigenvalues of EKFAC, or the preconditioned gradient [W b]. Not timed.
        steps: How often ``run`` does the work; its time is divided by it.
    """

    run: Callable[[], Any]
    read: Callable[[Any], list[Any]]
    steps: int = 1


Contender = Callable[[Made, Work], Prepared | None]
"""Prepares the work on a problem; None if it does not know that work."""

Factors = list[tuple[Tensor, Tensor]]


def rows() -> list[Row]:
    """All rows, those of one problem together."""
    works = [
        *(Work(flavour=flavour) for flavour in FLAVOURS),
        *(Work("EKFAC", flavour) for flavour in ("type-II", "Monte Carlo")),
        *(Work("inverse", damping=damping) for damping in DAMPINGS),
        *(Work("precondition", damping=damping) for damping in DAMPINGS),
    ]
    reduce = [Work(flavour=flavour, sharing="reduce") for flavour in FLAVOURS]
    listed = []
    for problem in MAIN:
        listed += [Row(problem, work) for work in works]
        listed += [Row(problem, work) for work in reduce if problem in (CNN, TOKENS)]
        listed += [Row(problem, Work("training step"))] * (problem in (SMALL, LARGE, CNN))
    for N in BATCH_SIZES:
        sized = with_batch_size(SMALL, N)
        listed += [Row(sized, Work(flavour=flavour)) for flavour in FLAVOURS[:2] if sized != SMALL]
    for problem, N, flavour in DIAGNOSES:
        listed.append(Row(with_batch_size(problem, N), Work("diagnose", flavour)))
    for C in CLASSES:
        parts = [Work(layers=layers) for layers in ("all", "last", "hidden")]
        listed += [Row(with_classes(C), work) for work in parts]
    return listed


def memory_rows() -> list[Row]:
    """The rows whose memory is measured: factors and EKFAC, of main problems and of classes."""
    main = (SMALL, LARGE, CNN, TOKENS)
    classes = [with_classes(C) for C in CLASSES]
    return [
        row
        for row in rows()
        if row.work.kind in ("KFAC", "EKFAC")
        and row.work.flavour != "input-only"
        and row.work.layers == "all"
        and row.problem in (*main, *classes)
    ]
