"""What the benchmark is to show, as data, and whether a run shows it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.contenders import CHUNKED, OURS, PEERS
from benchmarks.problems import CNN, LARGE, REGRESSION, SMALL, TOKENS, with_classes
from benchmarks.rows import Work

Json = dict[str, Any]
LAST_LAYER = str(Work(layers="last"))
PEER, REFERENCE, GRADIENT, FEWER_CLASSES = (
    "fastest peer",
    "reference",
    "a gradient",
    "a tenth of the classes",
)


@dataclass(frozen=True)
class Goal:
    """Ours is to be so many times faster than something.

    Args:
        number: The goal's number in the project's list.
        against: The fastest peer, the reference, a gradient, or ours with a tenth of the classes.
        ratio: Its time over ours is to be at least this.
        problems: Names of the problems; all if empty.
        works: How the names of the works begin; all if empty.
        but: Works to which it does not apply.
        N: Batch size; any if None.
        stretch: A ratio that would be better still.
    """

    number: int
    against: str
    ratio: float
    problems: tuple[str, ...] = ()
    works: tuple[str, ...] = ()
    but: tuple[str, ...] = ()
    N: int | None = None
    stretch: float | None = None

    def applies(self, row: Json) -> bool:
        of_problem = not self.problems or row["problem"] in self.problems
        of_problem &= self.N in (None, row["N"])
        of_work = not self.works or row["work"].startswith(self.works)
        return of_problem and of_work and row["work"] not in self.but


TUTORIAL = (SMALL.name, REGRESSION.name)
LARGER = (LARGE.name, CNN.name, TOKENS.name)
GOALS = (
    Goal(1, PEER, 1.0),
    Goal(1, PEER, 1.4, TUTORIAL, ("type-II",), stretch=2.0),
    Goal(1, PEER, 1.1, LARGER, ("type-II",), stretch=1.3),
    Goal(1, PEER, 1.1, (*TUTORIAL, *LARGER), ("Monte Carlo", "empirical")),
    Goal(2, REFERENCE, 1 / 1.15),
    Goal(3, PEER, 10.0, (with_classes(1000).name,)),
    # The last layer's own cost is shown beside it: its B alone has C² entries.
    Goal(3, FEWER_CLASSES, 1 / 10, (with_classes(10000).name,), but=(LAST_LAYER,)),
    Goal(4, PEER, 1.3, works=("EKFAC",)),
    Goal(7, GRADIENT, 1 / 40, (LARGE.name,), ("diagnosis, Monte Carlo",), N=256),
)
MEMORY_GOALS = {OURS: 1.5, CHUNKED: 1.0}
"""Goal 5: peak of the process over that of the most frugal library from PyPI, at most this."""


class Verdict(NamedTuple):
    """A goal that applies to a row, with the ratio that was found; None if there is none."""

    goal: Goal
    ratio: float | None

    @property
    def met(self) -> bool | None:
        """Whether it is met; None if nothing was there to compare with."""
        return None if self.ratio is None else self.ratio >= self.goal.ratio


def fastest_peer(row: Json) -> str | None:
    """The label of the fastest peer; None if no peer does the work."""
    peers = [label for label in PEERS if label in row["contenders"]]
    return min(peers, key=lambda label: row["contenders"][label]["median"], default=None)


def ratio_to(row: Json, label: str | None) -> float | None:
    """Time of a contender over ours."""
    contenders = row["contenders"]
    if label not in contenders or OURS not in contenders:
        return None
    return contenders[label]["median"] / contenders[OURS]["median"]


def verdicts(row: Json, all_rows: Iterable[Json] = ()) -> list[Verdict]:
    """The goals of a row; of several against the same, only the strictest.

    Args:
        row: A row of the JSON.
        all_rows: Where a row with fewer classes is found.
    """
    strictest: dict[str, Goal] = {}
    for goal in sorted(GOALS, key=lambda goal: goal.ratio):
        if goal.applies(row):
            strictest[goal.against] = goal
    if OURS not in row["contenders"]:
        return []
    ratios = {
        PEER: ratio_to(row, fastest_peer(row)),
        REFERENCE: ratio_to(row, "reference"),
        GRADIENT: _of_gradient(row),
        FEWER_CLASSES: _fewer_classes(row, all_rows),
    }
    return [Verdict(goal, ratios[against]) for against, goal in strictest.items()]


def _of_gradient(row: Json) -> float | None:
    """Time of one gradient over ours."""
    return row["unit"]["median"] / row["contenders"][OURS]["median"] if "unit" in row else None


def _fewer_classes(row: Json, all_rows: Iterable[Json]) -> float | None:
    """Ours with a tenth of the classes over ours, for the same work."""
    fewer = row["problem"].removesuffix("0")
    for other in all_rows:
        same = other["problem"] == fewer and other["N"] == row["N"]
        if same and other["work"] == row["work"] and OURS in other["contenders"]:
            return other["contenders"][OURS]["median"] / row["contenders"][OURS]["median"]
    return None


class MemoryVerdict(NamedTuple):
    """Peak of ours over that of the most frugal library from PyPI."""

    label: str
    ratio: float
    met: bool


def memory_verdicts(row: Json) -> list[MemoryVerdict]:
    """Goal 5 for a row of the memory table.

    The loop holds one datum at a time, whatever the method: it is measured and not compared with.
    """
    peak = {label: found["peak"] for label, found in row["contenders"].items()}
    frugal = min((peak[label] for label in PEERS[:-1] if label in peak), default=None)
    if frugal is None:
        return []
    ratios = {label: peak[label] / frugal for label in MEMORY_GOALS if label in peak}
    return [MemoryVerdict(k, ratio, ratio <= MEMORY_GOALS[k]) for k, ratio in ratios.items()]
