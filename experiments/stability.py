"""Up to which learning rate a preconditioned step is stable, by the curvature at one point."""

import torch
from torch import Tensor, nn

from experiments.problems import Data
from kfac_lib import KFAC
from kfac_lib.autodiff import ggnvp
from kfac_lib.kronecker import Damping

ROUNDS, TOLERANCE = 200, 1e-5


def stable_rate(net: nn.Module, loss_func: nn.Module, data: Data, damping: Damping) -> float:
    """2 / λ_max((K + δI)⁻¹ G), with the exact GGN in place of G, by power iteration."""
    factors = KFAC.compute(net, loss_func, data)
    inverses = {name: K.inverse(damping) for name, K in factors.items()}
    parameters = dict(net.named_parameters())
    f = net(data.X)
    loss = loss_func(f, data.y)

    def preconditioned(gradient: dict[str, Tensor]) -> dict[str, Tensor]:
        steps = {}
        for layer, inverse in inverses.items():
            weight, bias = (f"{layer}.{kind}" for kind in ("weight", "bias"))
            joint = gradient[weight].flatten(1)
            if bias in gradient:
                joint = torch.cat([joint, gradient[bias][:, None]], dim=1)
            step = inverse @ joint
            if bias in gradient:
                step, steps[bias] = step[:, :-1], step[:, -1]
            steps[weight] = step.reshape(gradient[weight].shape)
        return steps

    def curvature(v: dict[str, Tensor]) -> dict[str, Tensor]:
        products = ggnvp(loss, f, list(parameters.values()), [v[name] for name in parameters])
        return dict(zip(parameters, products, strict=True))

    def inner(v: dict[str, Tensor], w: dict[str, Tensor]) -> float:
        return sum(float((v[name] * w[name]).sum()) for name in v)

    source = torch.Generator().manual_seed(0)
    v = {
        name: torch.randn(p.shape, generator=source, dtype=p.dtype)
        for name, p in parameters.items()
    }
    Gv, before = curvature(v), 0.0
    for _ in range(ROUNDS):
        w = preconditioned(Gv)
        scale = inner(w, Gv) ** 0.5  # length in the metric K + δI, since (K + δI) w = Gv
        w = {name: part / scale for name, part in w.items()}
        Gv = curvature(w)
        largest = inner(w, Gv)
        if abs(largest - before) < TOLERANCE * largest:
            break
        before = largest
    return 2 / largest
