"""Up to which learning rate a preconditioned step is stable, by the curvature at one point."""

import torch
from torch import nn

from experiments.problems import Data
from kfac_lib import KFAC
from kfac_lib.coverage import cover
from kfac_lib.kronecker import Damping
from kfac_lib.losses import criterion_of
from kfac_lib.steps import QuadraticModel, dot

ROUNDS, TOLERANCE = 200, 1e-5


def stable_rate(net: nn.Module, loss_func: nn.Module, data: Data, damping: Damping) -> float:
    """2 / λ_max((K + δI)⁻¹ G), with the exact GGN in place of G, by power iteration."""
    factors = KFAC.compute(net, loss_func, data)
    inverses = {name: K.inverse(damping) for name, K in factors.items()}
    quadratic = QuadraticModel(net, criterion_of(loss_func), data, cover(net))
    source = torch.Generator().manual_seed(0)
    v = tuple(torch.randn(p.shape, generator=source, dtype=p.dtype) for p in quadratic.parameters)
    Gv, before = quadratic.product(v), 0.0
    for _ in range(ROUNDS):
        w = quadratic.applied(inverses, Gv)
        scale = dot(w, Gv) ** 0.5  # length in the metric K + δI, since (K + δI) w = Gv
        w = tuple(part / scale for part in w)
        Gv = quadratic.product(w)
        largest = dot(w, Gv)
        if abs(largest - before) < TOLERANCE * largest:
            break
        before = largest
    return 2 / largest
