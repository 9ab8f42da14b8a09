"""The problems: a net drawn from a seed, a loss, and data. Everything is float64."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from kfac_lib.examples import digits, mlp


class Data(NamedTuple):
    X: Tensor
    y: Tensor


@dataclass(frozen=True)
class Problem:
    """How to draw a net from a seed, its loss, and the data that it is trained on."""

    name: str
    net: Callable[[int], nn.Sequential]
    data: Callable[[], Data]
    loss_func: nn.Module = field(default_factory=nn.CrossEntropyLoss)


def drawn(*modules: nn.Module, seed: int) -> nn.Sequential:
    """A net whose weights and biases are normal with standard deviation 1/√(fan-in)."""
    source = torch.Generator().manual_seed(seed)
    net = nn.Sequential(*modules).double()
    with torch.no_grad():
        for layer in net:
            for parameter in layer.parameters():
                draw = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
                parameter.copy_(draw / layer.weight[0].numel() ** 0.5)
    return net


def linear(seed: int) -> nn.Sequential:
    return drawn(nn.Linear(12, 3, bias=False), seed=seed)


def cnn(seed: int) -> nn.Sequential:
    """Two convolutions with stride 2 and a linear layer: 8×8 → 4×4 → 2×2 → 10."""
    return drawn(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 8, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(32, 10),
        seed=seed,
    )


@cache
def regression() -> Data:
    """64 inputs with 12 features whose second moments fall from 1 to 1e-5; 3 linear targets."""
    source = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64)

    Q, V = (torch.linalg.qr(normal(rows, 12))[0] for rows in (64, 12))
    moments = torch.logspace(0, -5, 12, dtype=torch.float64)
    X = 8 * Q * moments.sqrt() @ V.T  # XᵀX / 64 = V diag(moments) Vᵀ
    return Data(X, X @ normal(12, 3))


@cache
def labelled(N: int) -> Data:
    return Data(*digits(N))


@cache
def held_out() -> Data:
    X, y = digits()
    return Data(X[256:], y[256:])


@cache
def one_hot_targets() -> Data:
    X, y = digits(256)
    return Data(X, one_hot(y, 10).double())


@cache
def images() -> Data:
    X, y = digits(128)
    return Data(X.reshape(-1, 1, 8, 8), y)


QUADRATIC = Problem("quadratic", linear, regression, nn.MSELoss())
DEEP_LINEAR = Problem(
    "deep linear",
    lambda seed: mlp(64, 16, 16, 10, activation="identity", seed=seed),
    one_hot_targets,
    nn.MSELoss(),
)
MLP = Problem("MLP", lambda seed: mlp(64, 16, 10, seed=seed), lambda: labelled(256))
HELD_OUT = Problem("MLP, held out", MLP.net, held_out)
CNN = Problem("CNN", cnn, images)
MLP_BATCHES = Problem("MLP, batches", MLP.net, lambda: labelled(1024))

PROBLEMS = {p.name: p for p in (QUADRATIC, DEEP_LINEAR, MLP, CNN, MLP_BATCHES)}
