"""The work by kfac_lib: by hooks, by a trace, and in training."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.problems import Made
from benchmarks.rows import Prepared, Work
from kfac_lib import (
    EKFAC,
    KFAC,
    Diagnosis,
    Empirical,
    Exact,
    Expand,
    Factored,
    InputOnly,
    KFACPreconditioner,
    MonteCarlo,
    Reduce,
    TypeII,
    diagnose,
)
from kfac_lib.damping import layer_inverse
from kfac_lib.layers import as_matrix, from_matrix

FISHERS = {
    "type-II": TypeII(),
    "Monte Carlo": MonteCarlo(1),
    "empirical": Empirical(),
    "input-only": InputOnly(),
}
SHARINGS = {"expand": Expand(), "reduce": Reduce()}
LEARNING_RATE = 1e-4


def by_hooks(made: Made, work: Work, chunk_size: int | None = None) -> Prepared | None:
    if work.kind in ("KFAC", "EKFAC"):
        return _factors(made, work, chunk_size)
    if work.kind == "inverse":
        return _inverse(made, work)
    if work.kind == "precondition":
        return _precondition(made, work)
    if work.kind == "diagnose":
        return _diagnosis(made, work)
    return None


def chunked(made: Made, work: Work) -> Prepared | None:
    """One vector at a time, which needs the least memory."""
    return by_hooks(made, work, chunk_size=1) if work.kind in ("KFAC", "EKFAC") else None


def traced(made: Made, work: Work) -> Prepared | None:
    """From a traced graph; the first run traces, and is not timed."""
    if work.kind not in ("KFAC", "EKFAC") or work.layers != "all":
        return None
    return _factors(made, work, params=dict(made.model.named_parameters()))


def _factors(
    made: Made,
    work: Work,
    chunk_size: int | None = None,
    params: dict[str, Tensor] | None = None,
) -> Prepared:
    *hidden, last = made.layers()
    taken = {"all": None, "last": [last], "hidden": hidden}[work.layers]
    left = {"all": [], "last": hidden, "hidden": [last]}[work.layers]
    options: dict[str, Any] = {"params": params} if params else {"layers": taken, "ignore": left}
    kind = EKFAC if work.kind == "EKFAC" else KFAC

    def run() -> KFAC | EKFAC:
        return kind.compute(
            made.model,
            made.loss_func,
            (made.X, made.y),
            FISHERS[work.flavour],
            SHARINGS[work.sharing],
            chunk_size,
            **options,
        )

    def read(blocks: KFAC | EKFAC) -> list[Any]:
        if work.kind == "EKFAC":
            return [block.eigenvalues for block in blocks.values()]
        return [(block.A, block.B) for block in blocks.values()]

    return Prepared(run, read)


def _diagnosis(made: Made, work: Work) -> Prepared:
    def run() -> Diagnosis:
        return diagnose(made.model, made.loss_func, (made.X, made.y), fisher=FISHERS[work.flavour])

    return Prepared(run, lambda diagnosis: [one.kfac_error.value for one in diagnosis.values()])


def _inverse(made: Made, work: Work) -> Prepared:
    kfac, damping = _type_two(made), _damping(made, work)

    def run() -> dict[str, Any]:
        return {name: layer_inverse(name, block, damping) for name, block in kfac.items()}

    return Prepared(run, lambda inverse: list(_apply(made, inverse)().values()))


def _precondition(made: Made, work: Work) -> Prepared:
    inverse = {name: block.inverse(_damping(made, work)) for name, block in _type_two(made).items()}
    return Prepared(_apply(made, inverse), lambda matrices: list(matrices.values()))


def _apply(made: Made, inverse: dict[str, Any]) -> Callable[[], dict[str, Tensor]]:
    """From gradients shaped like parameters to such again, as an optimizer needs them."""
    gradients = dict(
        zip(dict(made.model.named_parameters()), made.gradient(), strict=True),
    )
    layers = made.layers()

    def run() -> dict[str, Tensor]:
        steps = {}
        for name, layer in layers.items():
            leaves = [gradients[f"{name}.weight"], gradients[f"{name}.bias"]]
            joint = torch.cat([as_matrix(layer, leaf) for leaf in leaves], dim=1)
            parts = torch.split(inverse[name] @ joint, [joint.shape[1] - 1, 1], dim=1)
            for leaf, part in zip(("weight", "bias"), parts, strict=True):
                steps[f"{name}.{leaf}"] = from_matrix(layer, part, getattr(layer, leaf).shape)
        return steps

    return run


def _type_two(made: Made) -> KFAC:
    return KFAC.compute(made.model, made.loss_func, (made.X, made.y))


def _damping(made: Made, work: Work) -> Exact | Factored:
    return {"Exact": Exact, "Factored": Factored}[work.damping](made.problem.delta)


def training(made: Made) -> dict[str, Prepared]:
    """Whole steps of SGD, of Adam, and of SGD behind a preconditioner with several periods."""
    labels: dict[str, Prepared] = {}
    for label, kind in (("SGD", torch.optim.SGD), ("Adam", torch.optim.Adam)):
        copy = made.problem.make()
        labels[label] = _steps(copy, kind(copy.model.parameters(), LEARNING_RATE), None, 10)
    for approximation, period in (("kfac", 1), ("kfac", 10), ("kfac", 100), ("ekfac", 10)):
        copy = made.problem.make()
        preconditioner = KFACPreconditioner(
            copy.model,
            copy.loss_func,
            approximation=approximation,
            damping=Exact(made.problem.delta),
            factor_every=period,
            inverse_every=period,
        )
        optimizer = torch.optim.SGD(copy.model.parameters(), LEARNING_RATE)
        labels[f"{approximation.upper()}, period {period}"] = _steps(
            copy, optimizer, preconditioner, period
        )
    return labels


def _steps(
    made: Made,
    optimizer: torch.optim.Optimizer,
    preconditioner: KFACPreconditioner | None,
    steps: int,
) -> Prepared:
    """A run is a whole period, so that each holds exactly one refresh."""

    def run() -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            made.loss_func(made.model(made.X), made.y).backward()
            if preconditioner is not None:
                preconditioner.update(made.X, made.y)
                preconditioner.precondition()
            optimizer.step()

    return Prepared(run, lambda _: [], steps)
