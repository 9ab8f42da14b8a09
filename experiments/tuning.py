"""Random search: the same number of settings for each method on each task, and which is best."""

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product
from typing import Any

from experiments.methods import METHODS, TRIALS, Setting
from experiments.race import run_of
from experiments.store import Cell, Experiment
from experiments.tasks import TASKS, Task
from experiments.training import GIVEN_UP

SEED = 0
STEPS = 200
AXES = ("steps", "passes", "seconds")


def trial_key(task: str, method: str, trial: int) -> str:
    return f"trial/{task}/{method}/{trial}"


def tried(task: str, method: str, trial: int) -> dict[str, Any]:
    setting = METHODS[method].drawn(TASKS[task], trial)
    found = run_of(task, method, trial, SEED, seconds=TASKS[task].seconds)
    return {"setting": setting, **found}


def horizon(task: Task, axis: str) -> float:
    return {"steps": STEPS, "passes": task.passes, "seconds": task.seconds}[axis]


def positions(task: Task, setting: Setting, record: Mapping[str, Any], axis: str) -> list[float]:
    """Where on the axis each recorded loss stands."""
    if axis == "passes":
        data = len(task.data()[0].X)
        return [step * setting["batch"] / data for step in record["steps"]]
    found: list[float] = record[axis]
    return found


def loss_at(task: Task, setting: Setting, record: Mapping[str, Any], axis: str) -> float:
    """The last recorded loss up to the horizon; infinity if the run was given up by then."""
    within = [
        loss
        for at, loss in zip(positions(task, setting, record, axis), record["train"], strict=True)
        if at <= horizon(task, axis) or axis == "seconds"
    ]
    return float("inf") if within[-1] is None else within[-1]


def best_trials(store: Mapping[str, Any]) -> dict[str, dict[str, dict[str, int]]]:
    """For each task, method and axis the trial with the lowest loss on the data trained on."""
    losses = {
        (task, method, axis, trial): loss_at(TASKS[task], record["setting"], record, axis)
        for task, method, trial in product(TASKS, METHODS, range(TRIALS))
        for record in [store[trial_key(task, method, trial)]]
        for axis in AXES
    }
    return {
        task: {
            method: {
                axis: min(range(TRIALS), key=lambda trial: losses[task, method, axis, trial])
                for axis in AXES
            }
            for method in METHODS
        }
        for task in TASKS
    }


def cells() -> Iterator[Cell]:
    for where in product(range(TRIALS), TASKS, METHODS):
        trial, task, method = where
        yield Cell(trial_key(task, method, trial), partial(tried, task, method, trial))


def settings() -> dict[str, Any]:
    return {
        "seed": SEED,
        "trials": TRIALS,
        "given up": GIVEN_UP,
        "search": {name: method.settings() for name, method in METHODS.items()},
        "batches": {name: list(task.batches) for name, task in TASKS.items()},
        "horizons": {
            name: {axis: horizon(task, axis) for axis in AXES} for name, task in TASKS.items()
        },
        "budget": {
            "runs": TRIALS * len(TASKS) * len(METHODS),
            "seconds": TRIALS * len(METHODS) * sum(task.seconds for task in TASKS.values()),
        },
    }


EXPERIMENT = Experiment("tuning", settings(), cells)
