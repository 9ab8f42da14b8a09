"""Times the contenders of one row, interleaved, so that all of them see the same machine."""

import gc
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.agreement import check
from benchmarks.contenders import OURS, TIMED, prepare
from benchmarks.problems import CLASSES, with_classes
from benchmarks.rows import Prepared, Row

WARM_UPS = 3
SLOW, SLOW_REPEATS = 3.0, 3  # seconds, and how often what takes longer is repeated
TOO_SLOW = 30.0
UNITS = {"training step": "SGD"}  # elsewhere one gradient


@dataclass(frozen=True)
class Stats:
    """Seconds of one contender's work."""

    median: float
    quartiles: tuple[float, float]
    min: float
    repeats: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Stats":
        if len(seconds) == 1:
            return cls(seconds[0], (seconds[0], seconds[0]), seconds[0], 1)
        first, _, third = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(statistics.median(seconds), (first, third), min(seconds), len(seconds))


def measure(row: Row, repeats: int) -> dict[str, Any]:
    """Check that the contenders of a row agree, time them, and return the row of the JSON.

    They run in rounds, each round in another order: a neighbour leaves its traces in the caches, so
    each contender gets all neighbours. Garbage is collected between the rounds, never within.
    ``others`` is how many cores other processes kept busy meanwhile: near zero, or the row is
    disturbed and should be measured again.
    """
    made, unit = row.problem.make(), UNITS.get(row.work.kind, "gradient")
    left_out = {label: reason for label in TIMED if (reason := too_slow(row, label))}
    prepared = prepare(made, row.work, [label for label in TIMED if label not in left_out])
    if unit not in prepared:
        prepared[unit] = Prepared(made.gradient, list)
    first, results = {}, {}
    for label, one in prepared.items():
        try:
            first[label], result = with_result(one.run)
        except RuntimeError as error:
            if "allocate memory" not in str(error):
                raise
            left_out[label] = "it needs more memory than the machine has"
            continue
        if label != unit:
            results[label] = one.read(result)
    if OURS in results:
        check(row.work, results, prepared[OURS])
    del results
    start, busy_before = time.perf_counter(), busy_elsewhere()
    stats = in_rounds({label: prepared[label] for label in first}, first, repeats)
    others = (busy_elsewhere() - busy_before) / (time.perf_counter() - start)
    return {
        "problem": row.problem.name,
        "N": row.problem.N,
        "work": str(row.work),
        "date": now(),
        "others": round(others, 2),
        "unit": {"label": unit}
        | asdict(stats[unit] if row.work.kind in UNITS else stats.pop(unit)),
        "contenders": {label: asdict(one) for label, one in stats.items()},
        "left_out": left_out,
    }


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def busy_elsewhere() -> float:
    """CPU seconds that other processes, or other guests of the host, have used so far."""
    user, nice, system, _, _, irq, softirq, steal = map(int, _cpu_line().split()[1:9])
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def _cpu_line() -> str:
    return Path("/proc/stat").read_text().splitlines()[0]


def with_result(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came out."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def in_rounds(
    prepared: dict[str, Prepared], first: dict[str, float], repeats: int
) -> dict[str, Stats]:
    """Time all in rounds; what took long at first is warm after that, and is repeated less."""
    taken: dict[str, list[float]] = {label: [] for label in prepared}
    order, draw = list(prepared), random.Random(0)
    gc.disable()
    for number in range(1 - WARM_UPS, repeats):
        draw.shuffle(order)
        gc.collect()
        for label in order:
            if first[label] > SLOW and not 0 <= number < SLOW_REPEATS:
                continue
            seconds = with_result(prepared[label].run)[0] / prepared[label].steps
            if number >= 0:
                taken[label].append(seconds)
    gc.enable()
    return {label: Stats.of(seconds) for label, seconds in taken.items()}


@cache
def too_slow(row: Row, label: str) -> str | None:
    """Why a contender is left out: one run takes more than half a minute, known without running it.

    Ten times the classes are taken to need ten times as long, which is little: that of the last
    layer's Gram matrix grows a hundredfold. Other problems are run whatever they take.
    """
    C = row.problem.outputs
    fewer = C // 10
    if row.problem != with_classes(C) or fewer not in CLASSES:
        return None
    smaller = Row(with_classes(fewer), row.work)
    if reason := too_slow(smaller, label):
        return reason
    seconds = quickest(smaller, label)
    if seconds * C / fewer <= TOO_SLOW:
        return None
    return f"at C={fewer} a run takes {seconds:.1f} s, which makes {10 * seconds:.0f} s at C={C}"


@cache
def quickest(row: Row, label: str) -> float:
    """Seconds of the best of three runs, or of one that is slow; zero if the work is not known."""
    prepared = prepare(row.problem.make(), row.work, [label])
    seconds: list[float] = []
    while label in prepared and len(seconds) < 3 and max(seconds, default=0.0) < SLOW:
        seconds.append(with_result(prepared[label].run)[0])
    return min(seconds, default=0.0)
