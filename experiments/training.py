"""One training run: what is recorded, and when it is given up."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice, repeat
from typing import Any

import torch
from torch import nn

from experiments.problems import Data, Problem
from kfac_lib import KFACPreconditioner
from kfac_lib.damping import LevenbergMarquardt
from kfac_lib.kronecker import Damping
from kfac_lib.quadratic import predicted_decrease

GIVEN_UP = 100.0
"""A run is stopped when its loss exceeds this multiple of the first loss."""


@dataclass
class Run:
    """The loss before each step and after the last, and the damping that adapts."""

    losses: list[float] = field(default_factory=list)
    deltas: list[float] = field(default_factory=list)

    @property
    def stopped(self) -> bool:
        last, first = self.losses[-1], self.losses[0]
        return not math.isfinite(last) or last > GIVEN_UP * first

    def at(self, step: int) -> float:
        """The loss after so many steps; infinite if the run was given up by then."""
        return self.losses[step] if step < len(self.losses) else math.inf

    @property
    def rises(self) -> int:
        """How many steps have raised the loss."""
        pairs = zip(self.losses, self.losses[1:], strict=False)
        return sum(not after <= before for before, after in pairs)


def minibatches(data: Data, size: int, seed: int) -> Iterator[Data]:
    """Batches without end, in epochs: each a new order, a rest that is too small left out."""
    source = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(data.X), generator=source)
        for part in order[: len(order) - len(order) % size].split(size):
            yield Data(data.X[part], data.y[part])


@torch.no_grad()
def loss_of(net: nn.Module, problem: Problem) -> float:
    return problem.loss_func(net(problem.data().X), problem.data().y).item()


def steps_of(
    problem: Problem,
    seed: int,
    damping: Damping,
    lr: float,
    steps: int,
    *,
    batch: int | None = None,
    ema: float = 0.0,
    kl_clip: float | None = None,
) -> Iterator[nn.Module]:
    """The net before each step of KFAC and after the last; all data are one batch if not given."""
    net, data = problem.net(seed), problem.data()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    pre = KFACPreconditioner(
        net, problem.loss_func, damping=damping, ema=ema, kl_clip=kl_clip, lr=lr
    )
    parts = repeat(data) if batch is None else minibatches(data, batch, seed)
    for X, y in islice(parts, steps):
        yield net
        optimizer.zero_grad()
        problem.loss_func(net(X), y).backward()
        pre.update(X, y)
        pre.precondition()
        optimizer.step()
    yield net


def train(problem: Problem, *setting: Any, every: int = 1, **options: Any) -> Run:
    """The loss on all data along :func:`steps_of`, at every so many steps, until it is given up."""
    run = Run()
    for step, net in enumerate(steps_of(problem, *setting, **options)):
        if step % every == 0:
            run.losses.append(loss_of(net, problem))
            if run.stopped:
                break
    return run


def train_adaptively(
    problem: Problem, seed: int, damping: LevenbergMarquardt, lr: float, steps: int
) -> Run:
    """The same with a damping that adapts; a step that raises the loss is taken back."""
    net, (X, y) = problem.net(seed), problem.data()
    pre = KFACPreconditioner(net, problem.loss_func, damping=damping, ema=0.0)
    run = Run(losses=[loss_of(net, problem)])
    for _ in range(steps):
        net.zero_grad()
        problem.loss_func(net(X), y).backward()
        pre.update(X, y)
        pre.precondition()
        h = {name: -lr * p.grad for name, p in net.named_parameters() if p.grad is not None}
        promised = predicted_decrease(net, problem.loss_func, (X, y), h, damping.delta)
        run.deltas.append(damping.delta)
        add(net, h, 1)
        loss = loss_of(net, problem)
        actual = run.losses[-1] - loss
        if not actual > 0:
            add(net, h, -1)
        run.losses.append(loss if actual > 0 else run.losses[-1])
        damping.update(actual, promised)
    return run


@torch.no_grad()
def add(net: nn.Module, h: dict[str, Any], sign: int) -> None:
    for name, parameter in net.named_parameters():
        parameter.add_(sign * h[name])
