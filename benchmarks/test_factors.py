"""KFAC factors of two networks, three flavours: ours, curvlinops, nngeometry, one gradient.

pytest-benchmark times ours. Before each of its rounds all others run once and are timed, so the
contenders are interleaved and see the same machine.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.contenders import CONTENDERS, Problem, same_products

ROUNDS, WARMUP = 41, 5
PROBLEMS = {
    "MLP 64-128-64-10": (64, 128, 64, 10),
    "MLP 784-512-256-128-10": (784, 512, 256, 128, 10),
}
FLAVOURS = ("type-II", "Monte Carlo", "empirical")


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_factors(benchmark: Any, name: str, flavour: str) -> None:
    torch.set_num_threads(2)
    problem = Problem(name, PROBLEMS[name])
    run = {label: make(problem, flavour) for label, make in CONTENDERS.items()}
    if flavour != "Monte Carlo":  # random labels differ between libraries
        for label, other in run.items():
            assert same_products(run["kfac_lib"](), other()) < 1e-3, f"{label} computes another"
    ours = run.pop("kfac_lib")
    others: dict[str, Callable[[], Any]] = {"gradient": problem.gradient, **run}
    times: dict[str, list[float]] = {label: [] for label in others}

    def time_the_others() -> None:
        for label, other in others.items():
            start = time.perf_counter()
            other()
            times[label].append(time.perf_counter() - start)

    for _ in range(WARMUP):
        ours()
        time_the_others()
    for measured in times.values():
        measured.clear()
    benchmark.pedantic(ours, setup=time_the_others, rounds=ROUNDS)
    medians = {label: statistics.median(measured) for label, measured in times.items()}
    medians["kfac_lib"] = benchmark.stats.stats.median
    quartiles = {
        label: statistics.quantiles(measured, n=4)[::2] for label, measured in times.items()
    }
    quartiles["kfac_lib"] = [benchmark.stats.stats.q1, benchmark.stats.stats.q3]
    benchmark.extra_info |= {
        "problem": name,
        "flavour": flavour,
        "median_seconds": medians,
        "quartiles_seconds": quartiles,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
