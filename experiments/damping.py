"""Damping over eight decades: the maps of the chapter on damping sensitivity."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import product
from typing import Any

import torch

from experiments.problems import (
    CNN,
    DEEP_LINEAR,
    HELD_OUT,
    MLP,
    MLP_BATCHES,
    NEW_NETS,
    PROBLEMS,
    QUADRATIC,
)
from experiments.stability import stable_rate
from experiments.store import Cell, Experiment
from experiments.training import GIVEN_UP, Run, loss_of, steps_of, train, train_adaptively
from kfac_lib import KFAC
from kfac_lib.damping import Exact, Factored, LevenbergMarquardt, Plain

FORMS = {form.__name__: form for form in (Exact, Factored, Plain)}
DELTAS = [10 ** (k / 2) for k in range(-14, 3)]  # 1e-7 … 1e1
RATES = [2.0**k for k in range(-4, 5)]  # 1/16 … 16
STEPS = 40
MOMENTS = (5, 10, 20, 40)
SEEDS = {QUADRATIC.name: 1, DEEP_LINEAR.name: 3, MLP.name: 3, CNN.name: 3}

BORDER_DELTAS = DELTAS[::2]
BORDER_RATE = 0.125
BORDER_MOMENTS = (0, 5, 20)

FIRST_DELTAS = [1e-6, 1e-2, 10.0]
FACTOR = 4.0
ADAPTED = (DEEP_LINEAR.name, MLP.name, CNN.name)

BATCHES = [16, 64, 256, 1024]
DECAYS = [0.0, 0.5, 0.9, 0.99]
BATCH_DELTAS = [10 ** (k / 2) for k in range(-10, 3)]
BATCH_RATES = [0.25, 1.0]
BATCH_STEPS = 60
BATCH_SEEDS = 2

NEW_FORMS = ("Exact", "Factored")
TIMES = [10 ** (k / 2) for k in range(-2, 7)]  # 0.1 … 1000 mean eigenvalues
SHARES = [0.25, 0.5, 1.0, 2.0]  # of 1/L
NEW_SEEDS = 3
CLIPS = [1e-3, 1e-2, 1e-1, 1.0]
CLIP_TIMES = {"Exact": [0.1, 10.0], "Factored": [0.01, 1.0]}


def map_key(problem: str, form: str, delta: float, rate: float, seed: int) -> str:
    return f"map/{problem}/{form}/{delta:.3g}/{rate:g}/{seed}"


def border_key(problem: str, form: str, delta: float) -> str:
    return f"border/{problem}/{form}/{delta:.3g}"


def held_out_key(delta: float, rate: float) -> str:
    return f"held out/{delta:.3g}/{rate:g}"


def adaptive_key(problem: str, form: str, first: float) -> str:
    return f"adaptive/{problem}/{form}/{first:g}"


def batch_key(batch: int, ema: float, delta: float, rate: float, seed: int) -> str:
    return f"batch/{batch}/{ema:g}/{delta:.3g}/{rate:g}/{seed}"


def new_key(net: str, form: str, times: float, share: float, seed: int) -> str:
    return f"new/{net}/{form}/{times:.3g}/{share:g}/{seed}"


def clip_key(net: str, form: str, times: float, kl_clip: float, seed: int) -> str:
    return f"clip/{net}/{form}/{times:g}/{kl_clip:g}/{seed}"


def on_map(problem: str, form: str, delta: float, rate: float, seed: int) -> list[Any]:
    """The loss at the start and after each moment, and the number of steps that raised it."""
    run = train(PROBLEMS[problem], seed, FORMS[form](delta), rate, STEPS)
    return [run.losses[0], *(run.at(moment) for moment in MOMENTS), run.rises]


def border(problem: str, form: str, delta: float) -> list[float]:
    """The stable rate by the curvature at hand, at moments of a run with a small rate."""
    made, damping = PROBLEMS[problem], FORMS[form](delta)
    run = steps_of(made, 0, damping, BORDER_RATE, max(BORDER_MOMENTS))
    return [
        stable_rate(net, made.loss_func, made.data(), damping)
        for step, net in enumerate(run)
        if step in BORDER_MOMENTS
    ]


def held_out(delta: float, rate: float) -> list[Any]:
    """Loss on the data, loss on digits that were held out, and the share of these right."""
    run = Run()
    for net in steps_of(MLP, 0, Exact(delta), rate, STEPS):
        run.losses.append(loss_of(net, MLP))
        if run.stopped:
            return [math.inf, math.inf, 0.0]
    X, y = HELD_OUT.data()
    with torch.no_grad():
        right = (net(X).argmax(dim=1) == y).double().mean().item()
    return [run.losses[-1], loss_of(net, HELD_OUT), right]


def adaptive(problem: str, form: str, first: float) -> dict[str, list[float]]:
    damping = LevenbergMarquardt(FORMS[form](first), factor=FACTOR)
    run = train_adaptively(PROBLEMS[problem], 0, damping, 1.0, STEPS)
    return {"losses": run.losses, "deltas": run.deltas}


def by_batches(batch: int, ema: float, delta: float, rate: float, seed: int) -> list[float]:
    """The loss on all data, at the start and after all steps."""
    run = train(MLP_BATCHES, seed, Exact(delta), rate, BATCH_STEPS, batch=batch, ema=ema, every=10)
    return [run.losses[0], run.at(BATCH_STEPS // 10)]


@cache
def mean_eigenvalue(net: str, seed: int) -> float:
    """Of KFAC over all layers, at the start."""
    made = NEW_NETS[net]
    factors = KFAC.compute(made.net(seed), made.loss_func, made.data()).values()
    return sum(float(K.trace()) for K in factors) / sum(len(K.A) * len(K.B) for K in factors)


def on_new_net(
    net: str, form: str, times: float, share: float, seed: int, kl_clip: float | None = None
) -> list[Any]:
    """First, highest and last loss, and the last one on new data; infinite if given up."""
    made, run = NEW_NETS[net], Run()
    damping, lr = FORMS[form](times * mean_eigenvalue(net, seed)), share / made.layers
    for trained in steps_of(made, seed, damping, lr, STEPS, kl_clip=kl_clip):
        run.losses.append(loss_of(trained, made))
        if run.stopped:
            return [run.losses[0], math.inf, math.inf, math.inf]
    judged = replace(made, data=made.judge)
    return [run.losses[0], max(run.losses), run.losses[-1], loss_of(trained, judged)]


def cells() -> Iterator[Cell]:
    for seed in range(max(SEEDS.values())):
        for problem, form in product(SEEDS, FORMS):
            for setting in product(DELTAS, RATES) if seed < SEEDS[problem] else ():
                where = (problem, form, *setting, seed)
                yield Cell(map_key(*where), partial(on_map, *where))
        if seed == 0:
            for where in product(ADAPTED, ("Exact", "Factored"), FIRST_DELTAS):
                yield Cell(adaptive_key(*where), partial(adaptive, *where))
    for where in product(SEEDS, FORMS, BORDER_DELTAS):
        yield Cell(border_key(*where), partial(border, *where))
    for where in product(DELTAS, RATES):
        yield Cell(held_out_key(*where), partial(held_out, *where))
    for seed in range(BATCH_SEEDS):
        for where in product(BATCHES, DECAYS, BATCH_DELTAS, BATCH_RATES):
            yield Cell(batch_key(*where, seed), partial(by_batches, *where, seed))
    for where in product(NEW_NETS, NEW_FORMS, TIMES, SHARES, range(NEW_SEEDS)):
        yield Cell(new_key(*where), partial(on_new_net, *where))
    for net, (form, many) in product(NEW_NETS, CLIP_TIMES.items()):
        for times, kl_clip, seed in product(many, CLIPS, range(NEW_SEEDS)):
            key = clip_key(net, form, times, kl_clip, seed)
            yield Cell(key, partial(on_new_net, net, form, times, 1.0, seed, kl_clip))


def settings() -> dict[str, Any]:
    of_batches = len(BATCHES) * len(DECAYS) * len(BATCH_DELTAS) * len(BATCH_RATES) * BATCH_SEEDS
    of_maps = sum(SEEDS.values()) * len(FORMS) * len(DELTAS) * len(RATES)
    of_borders = len(SEEDS) * len(FORMS) * len(BORDER_DELTAS)
    of_held_out = len(DELTAS) * len(RATES)
    of_new = len(NEW_NETS) * len(NEW_FORMS) * len(TIMES) * len(SHARES) * NEW_SEEDS
    of_clips = len(NEW_NETS) * sum(map(len, CLIP_TIMES.values())) * len(CLIPS) * NEW_SEEDS
    adapted = len(ADAPTED) * 2 * len(FIRST_DELTAS)
    return {
        "deltas": DELTAS,
        "rates": RATES,
        "forms": list(FORMS),
        "moments": list(MOMENTS),
        "seeds": SEEDS,
        "given up": GIVEN_UP,
        "border": {
            "deltas": BORDER_DELTAS,
            "rate": BORDER_RATE,
            "moments": list(BORDER_MOMENTS),
        },
        "adaptive": {"first": FIRST_DELTAS, "factor": FACTOR, "problems": list(ADAPTED)},
        "batches": {
            "sizes": BATCHES,
            "decays": DECAYS,
            "deltas": BATCH_DELTAS,
            "rates": BATCH_RATES,
            "steps": BATCH_STEPS,
            "seeds": BATCH_SEEDS,
        },
        "new": {
            "nets": {name: net.layers for name, net in NEW_NETS.items()},
            "forms": list(NEW_FORMS),
            "times": TIMES,
            "shares": SHARES,
            "seeds": NEW_SEEDS,
            "clips": CLIPS,
            "times where clipped": CLIP_TIMES,
        },
        "budget": {
            "runs": of_maps + of_held_out + of_borders + adapted + of_batches + of_new + of_clips,
            "steps": (of_maps + of_held_out + adapted + of_new + of_clips) * STEPS
            + of_borders * max(BORDER_MOMENTS)
            + of_batches * BATCH_STEPS,
        },
    }


EXPERIMENT = Experiment("damping", settings(), cells)
