"""One run of one method: losses at given steps, and the processor time up to each of them."""

import math
import time
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor, nn

from experiments.methods import METHODS, Setting
from experiments.problems import Data
from experiments.tasks import TASKS, Task
from experiments.training import GIVEN_UP, minibatches

EVERY_STEP, GROWTH = 20, 10**0.1
"""The loss is recorded after each of the first steps, then after steps that grow by this factor."""


def moments() -> list[int]:
    """Steps after which losses are recorded, up to twenty million."""
    grown = (round(EVERY_STEP * GROWTH**k) for k in count(1))
    return [*range(EVERY_STEP + 1), *islice(grown, 60)]


def run_of(
    task: str, method: str, trial: int, seed: int, *, period: int | None = None, **limits: float
) -> dict[str, Any]:
    """A race with the setting of a trial, its period changed if one is given."""
    setting = METHODS[method].drawn(TASKS[task], trial)
    changed = setting if period is None else {**setting, "period": period}
    return race(TASKS[task], method, changed, seed, **limits)


@torch.no_grad()
def evaluated(task: Task, net: nn.Module, data: Data) -> tuple[float, float]:
    """The loss, and the share of wrong answers where there are labels."""
    f: Tensor = net(data.X)
    wrong = (f.argmax(dim=1) != data.y).double().mean().item() if task.labels else math.nan
    return task.loss_func(f, data.y).item(), wrong


def race(
    task: Task,
    method: str,
    setting: Setting,
    seed: int,
    *,
    seconds: float = math.inf,
    steps: float = math.inf,
) -> dict[str, Any]:
    """Train until the time or the steps are over, or the run is given up.

    Time is that of the processor for steps alone, not for recording. The batch size is that of the
    setting; a run is given up when its loss is no longer finite, or 100 times the first.

    Returns:
        ``steps``, ``train`` (the loss on the data trained on), ``held_out``, and ``seconds`` at
        each moment; with labels ``wrong``, the share of wrong answers on data held out.
        If the run was given up, ``train`` ends with infinity.
    """
    net = task.net(seed)
    on, off = task.data()
    step = METHODS[method].step(task, net, setting, seed)
    batches = minibatches(on, min(int(setting["batch"]), len(on.X)), seed)
    columns = ("steps", "train", "held_out", "seconds", *(["wrong"] if task.labels else []))
    recorded: dict[str, list[float]] = {column: [] for column in columns}
    upcoming, spent = iter(moments()), 0.0

    def record(number: int) -> bool:
        """Whether the run goes on."""
        train, _ = evaluated(task, net, on)
        held_out, wrong = evaluated(task, net, off)
        first = recorded["train"][0] if number else train
        given_up = not train <= GIVEN_UP * first
        train = math.inf if given_up else train
        for column, value in zip(
            ("steps", "train", "held_out", "seconds", "wrong"),
            (number, train, held_out, spent, wrong),
            strict=True,
        ):
            if column in recorded:
                recorded[column].append(value)
        return not given_up

    moment = next(upcoming)
    for number, batch in enumerate(batches):
        over = spent >= seconds or number >= steps
        if number == moment or over:
            if not record(number) or over:
                break
            moment = next(upcoming)
        begun = time.process_time()
        try:
            step(batch)
        except ValueError:  # curvature that is not finite
            if record(number + 1):
                raise
            break
        spent += time.process_time() - begun
    return recorded
