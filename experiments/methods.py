"""The optimizers that are compared, what is tuned of each, and one step of each."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

import torch
from pytorch_optimizer import SOAP, ScalableShampoo
from torch import nn

from experiments.problems import Data
from experiments.tasks import Task
from kfac_lib import KFACPreconditioner
from kfac_lib.coverage import cover
from kfac_lib.damping import Exact
from kfac_lib.losses import criterion_of
from kfac_lib.steps import QuadraticModel, added, conjugate_gradients, dot

Setting = dict[str, float]
Step = Callable[[Data], None]


@dataclass(frozen=True)
class LogUniform:
    """Numbers whose logarithm is uniform."""

    low: float
    high: float

    def at(self, u: float) -> float:
        return float(f"{self.low * (self.high / self.low) ** u:.3g}")


@dataclass(frozen=True)
class Decay(LogUniform):
    """Decays of averages: the logarithm of 1 − β is uniform."""

    def at(self, u: float) -> float:
        return round(1 - super().at(u), 6)


@dataclass(frozen=True)
class OneOf:
    values: tuple[float, ...]

    def at(self, u: float) -> float:
        return self.values[min(int(u * len(self.values)), len(self.values) - 1)]


Space = Mapping[str, LogUniform | Decay | OneOf]


@dataclass(frozen=True)
class Method:
    """How to make its step for a net, and what is searched; the batch size is searched for all."""

    name: str
    step: Callable[[Task, nn.Module, Setting, int], Step]
    space: Space

    def settings(self) -> dict[str, Any]:
        return {name: asdict(values) for name, values in self.space.items()}

    def drawn(self, task: Task, trial: int) -> Setting:
        """The setting of one trial.

        What two methods both have is drawn alike in both: they are compared with the same luck.
        """
        space = {**self.space, "batch": OneOf(task.batches)}
        return {
            name: values.at(Random(f"{task.name}/{trial}/{name}").random())
            for name, values in space.items()
        }


def plain(net: nn.Module, loss_func: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(data: Data) -> None:
        optimizer.zero_grad()
        loss_func(net(data.X), data.y).backward()
        optimizer.step()

    return step


def sgd(task: Task, net: nn.Module, setting: Setting, seed: int) -> Step:
    return plain(net, task.loss_func, with_momentum(net, setting))


def with_momentum(net: nn.Module, setting: Setting) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=setting["lr"], momentum=setting["momentum"])


def betas(setting: Setting) -> tuple[float, float]:
    return setting["beta1"], setting["beta2"]


def adam(task: Task, net: nn.Module, setting: Setting, seed: int) -> Step:
    optimizer = torch.optim.Adam(net.parameters(), setting["lr"], betas(setting))
    return plain(net, task.loss_func, optimizer)


def shampoo(task: Task, net: nn.Module, setting: Setting, seed: int) -> Step:
    optimizer = ScalableShampoo(
        net.parameters(),
        lr=setting["lr"],
        betas=betas(setting),
        start_preconditioning_step=1,
        preconditioning_compute_steps=int(setting["period"]),
        shape_interpretation=False,  # else weights of up to 512 entries have no preconditioner
    )
    return plain(net, task.loss_func, optimizer)


def soap(task: Task, net: nn.Module, setting: Setting, seed: int) -> Step:
    optimizer = SOAP(
        net.parameters(),
        lr=setting["lr"],
        betas=betas(setting),
        weight_decay=0.0,
        precondition_frequency=int(setting["period"]),
    )
    return plain(net, task.loss_func, optimizer)


def preconditioned(approximation: Any) -> Callable[[Task, nn.Module, Setting, int], Step]:
    """KFAC or EKFAC in front of SGD with momentum."""

    def make(task: Task, net: nn.Module, setting: Setting, seed: int) -> Step:
        optimizer = with_momentum(net, setting)
        pre = KFACPreconditioner(
            net,
            task.loss_func,
            fisher=task.fisher(seed),
            approximation=approximation,
            damping=Exact(setting["delta"]),
            kl_clip=setting["clip"],
            lr=setting["lr"],
            factor_every=int(setting["period"]),
            inverse_every=int(setting["period"]),
        )

        def step(data: Data) -> None:
            optimizer.zero_grad()
            task.loss_func(net(data.X), data.y).backward()
            pre.update(data.X, data.y)
            pre.precondition()
            optimizer.step()

        return step

    return make


def gauss_newton(task: Task, net: nn.Module, setting: Setting, seed: int) -> Step:
    """(G + δI)⁻¹ g by so many products of conjugate gradients, clipped as KFAC's step is."""
    optimizer = with_momentum(net, setting)
    criterion, coverage, delta = criterion_of(task.loss_func), cover(net), setting["delta"]

    def step(data: Data) -> None:
        quadratic = QuadraticModel(net, criterion, data, coverage)
        gradient = quadratic.gradient()
        found = conjugate_gradients(
            lambda v: added(quadratic.product(v), v, delta),
            gradient,
            tolerance=1e-2,
            most=int(setting["products"]),
            truncate=True,
        )
        length = setting["lr"] ** 2 * dot(gradient, found)
        scale = min(1.0, (setting["clip"] / length) ** 0.5) if length > 0 else 1.0
        for parameter, direction in zip(quadratic.parameters, found, strict=True):
            parameter.grad = scale * direction
        optimizer.step()

    return step


TRIALS = 20
"""How many settings of each method are tried on each task."""

MOMENTUM = Decay(0.02, 0.5)
CURVATURE = {
    "lr": LogUniform(1e-2, 1.0),
    "momentum": MOMENTUM,
    "delta": LogUniform(1e-4, 1.0),
    "clip": LogUniform(1e-4, 1e-1),
}
PERIODS = OneOf((1, 5, 20))
ADAPTIVE = {"lr": LogUniform(1e-4, 1e-1), "beta1": MOMENTUM, "beta2": Decay(1e-3, 1e-1)}

METHODS = {
    method.name: method
    for method in (
        Method("SGD", sgd, {"lr": LogUniform(1e-3, 3.0), "momentum": MOMENTUM}),
        Method("Adam", adam, ADAPTIVE),
        Method("Shampoo", shampoo, {**ADAPTIVE, "lr": LogUniform(1e-3, 3.0), "period": PERIODS}),
        Method("SOAP", soap, {**ADAPTIVE, "period": PERIODS}),
        Method("KFAC", preconditioned("kfac"), {**CURVATURE, "period": PERIODS}),
        Method("EKFAC", preconditioned("ekfac"), {**CURVATURE, "period": PERIODS}),
        Method("GGN", gauss_newton, {**CURVATURE, "products": OneOf((5, 10, 20, 40))}),
    )
}
