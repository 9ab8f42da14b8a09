"""The best settings of the random search run from other seeds, and what they cost in memory."""

import math
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch.profiler import profile

from experiments.methods import METHODS, PERIODS, TRIALS
from experiments.race import EVERY_STEP, run_of
from experiments.store import Cell, Experiment, Store
from experiments.tasks import TASKS
from experiments.training import minibatches
from experiments.tuning import AXES, EXPERIMENT, STEPS, best_trials, trial_key

SEEDS = (1, 2, 3, 4, 5)
WEIGHED_STEPS = 3
FIRST_DIGITS = 10


def final_key(task: str, method: str, trial: int, seed: int) -> str:
    return f"final/{task}/{method}/{trial}/{seed}"


def first_key(task: str, method: str) -> str:
    return f"first/{task}/{method}"


def period_key(task: str, period: int, seed: int) -> str:
    return f"period/{task}/{period}/{seed}"


def memory_key(task: str, method: str) -> str:
    return f"memory/{task}/{method}"


def steps_key(task: str, method: str, seed: int) -> str:
    return f"steps/{task}/{method}/{seed}"


def final(
    task: str, method: str, trial: int, seed: int, axes: tuple[str, ...]
) -> dict[str, list[float]]:
    """A run as far as the horizons ask for; time ends it at the latest."""
    of = TASKS[task]
    per_pass = len(of.data()[0].X) / METHODS[method].drawn(of, trial)["batch"]
    needed = {"steps": STEPS, "passes": math.ceil(of.passes * per_pass), "seconds": math.inf}
    steps = max(needed[axis] for axis in axes)
    return run_of(task, method, trial, seed, seconds=of.seconds, steps=steps)


def first(task: str, method: str, trial: int) -> dict[str, list[float]]:
    """Losses of the first steps from the first seed, which can be computed again in no time."""
    found = run_of(task, method, trial, SEEDS[0], steps=EVERY_STEP)
    return {column: found[column] for column in ("train", "held_out")}


def weighed(task: str, method: str, trial: int) -> dict[str, int]:
    """Bytes that torch holds for a net and its training.

    Returns:
        ``parameters``; ``kept`` after three steps, beyond the parameters and their gradients;
        and ``peak``, the most at any moment, beyond the parameters alone.
    """
    of, setting = TASKS[task], METHODS[method].drawn(TASKS[task], trial)
    net = of.net(0)
    on, _ = of.data()
    source = minibatches(on, int(setting["batch"]), 0)
    batches = [next(source) for _ in range(WEIGHED_STEPS)]
    with profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        step = METHODS[method].step(of, net, setting, 0)
        for batch in batches:
            step(batch)
    assert profiled.profiler is not None
    assert profiled.profiler.kineto_results is not None
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    parameters = sum(p.nbytes for p in net.parameters())
    gradients = sum(0 if p.grad is None else p.grad.nbytes for p in net.parameters())
    return {"parameters": parameters, "kept": held - gradients, "peak": most}


def with_middle_batch(task: str) -> int:
    """The first trial with the middle batch size, which is the same for all methods."""
    of, any_method = TASKS[task], METHODS["SGD"]
    middle = sorted(of.batches)[len(of.batches) // 2]
    return next(t for t in range(TRIALS) if any_method.drawn(of, t)["batch"] == middle)


def experiment(folder: Path) -> Experiment:
    """The experiment that follows from a finished random search.

    Raises:
        ValueError: If the search is not finished.
    """
    tuning = Store(folder / "tuning.json", EXPERIMENT.settings)
    lacking = sum(cell.key not in tuning for cell in EXPERIMENT.cells())
    if lacking:
        raise ValueError(
            f"tuning.json lacks {lacking} trials. Run python -m experiments tuning first."
        )
    best = best_trials(tuning)

    def cells() -> Iterator[Cell]:
        for seed, task, method in product(SEEDS, TASKS, METHODS):
            chosen = best[task][method]
            for trial in dict.fromkeys(chosen.values()):
                axes = tuple(axis for axis in AXES if chosen[axis] == trial)
                where = (task, method, trial, seed)
                yield Cell(final_key(*where), partial(final, *where, axes))
        for task, method in product(TASKS, METHODS):
            fastest, same = best[task][method]["seconds"], with_middle_batch(task)
            again = partial(first, task, method, fastest)
            yield Cell(first_key(task, method), again, FIRST_DIGITS)
            yield Cell(memory_key(task, method), partial(weighed, task, method, same))
        for seed, task, method in product(SEEDS, TASKS, METHODS):
            trial = best[task][method]["steps"]
            if tuning[trial_key(task, method, trial)]["steps"][-1] < STEPS:
                # Too slow for the task's time: the horizon in steps, whatever the time.
                again = partial(run_of, task, method, trial, seed, steps=STEPS)
                yield Cell(steps_key(task, method, seed), again)
        for seed, task, period in product(SEEDS, TASKS, PERIODS.values):
            trial = best[task]["KFAC"]["steps"]
            where, k = (task, "KFAC", trial, seed), int(period)
            again = partial(run_of, *where, period=k, seconds=TASKS[task].seconds)
            yield Cell(period_key(task, k, seed), again)

    settings = {"seeds": list(SEEDS), "periods": list(PERIODS.values), "best": best}
    return Experiment("training", settings, cells)
