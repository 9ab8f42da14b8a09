"""KFAC and EKFAC of four networks: ours, curvlinops, nngeometry, one gradient.

pytest-benchmark times ours. Before each of its rounds all others run once and are timed, so the
contenders are interleaved and see the same machine.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.contenders import CONTENDERS, Problem, Work, cnn, mlp, same_products, tokens

ROUNDS, WARMUP = 41, 5
PROBLEMS = {
    "MLP 64-128-64-10": lambda: mlp(64, 128, 64, 10),
    "MLP 784-512-256-128-10": lambda: mlp(784, 512, 256, 128, 10),
    "CNN 1-16-32, 28×28": cnn,
    "64 tokens of width 64": tokens,
}
SHAPES = {
    "MLP 64-128-64-10": ((64,), 512),
    "MLP 784-512-256-128-10": ((784,), 512),
    "CNN 1-16-32, 28×28": ((1, 28, 28), 128),
    "64 tokens of width 64": ((64, 64), 64),
}
FLAVOURS = ("type-II", "Monte Carlo", "empirical")
WORKS = [
    *((name, Work(flavour)) for flavour in FLAVOURS for name in PROBLEMS),
    *((name, Work(flavour, "reduce")) for flavour in FLAVOURS for name in list(PROBLEMS)[2:]),
    *((name, Work(ekfac=True)) for name in PROBLEMS),
]


def contenders_for(name: str, work: Work) -> list[str]:
    """nngeometry knows neither reduce nor a Linear with shared axes."""
    known = work.sharing == "expand" and "tokens" not in name
    return [label for label in CONTENDERS if known or label != "nngeometry"]


@pytest.mark.parametrize(("name", "work"), WORKS, ids=str)
def test_factors(benchmark: Any, name: str, work: Work) -> None:
    torch.set_num_threads(2)
    shape, N = SHAPES[name]
    problem = Problem(name, PROBLEMS[name], shape, N)
    run = {label: CONTENDERS[label](problem, work) for label in contenders_for(name, work)}
    # Random labels differ between libraries, and so do the bases of EKFAC.
    if work.flavour != "Monte Carlo" and not work.ekfac:
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
        "work": str(work),
        "median_seconds": medians,
        "quartiles_seconds": quartiles,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
