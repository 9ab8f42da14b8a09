"""The problems: a net drawn from a seed, a loss, and data. Everything is float64."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
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


def as_images(data: Data) -> Data:
    return Data(data.X.reshape(-1, 1, 8, 8), data.y)


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
    return as_images(labelled(128))


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


@cache
def fresh() -> Data:
    """Digits on which no map was made."""
    X, y = digits()
    return Data(X[600:1112], y[600:1112])


@cache
def unseen() -> Data:
    """Digits on which no net of this kind is trained."""
    X, y = digits()
    return Data(X[1112:], y[1112:])


def deeper_cnn(activation: type[nn.Module], seed: int) -> nn.Sequential:
    """Three convolutions, two with stride 2, and a linear layer: 8×8 → 8×8 → 4×4 → 2×2 → 10."""
    return drawn(
        nn.Conv2d(1, 6, 3, padding=1),
        activation(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        activation(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        activation(),
        nn.Flatten(),
        nn.Linear(48, 10),
        seed=seed,
    )


@dataclass(frozen=True)
class NewNet(Problem):
    """A net that was on no map, the number of its layers, and data to judge it by."""

    layers: int = 0
    judge: Callable[[], Data] = unseen


def new_mlp(name: str, hidden: int, activation: str) -> NewNet:
    widths = (64, *[32] * hidden, 10)
    return NewNet(
        name,
        lambda seed: mlp(*widths, activation=activation, seed=seed),
        fresh,
        layers=hidden + 1,
    )


def new_cnn(name: str, activation: type[nn.Module]) -> NewNet:
    return NewNet(
        name,
        partial(deeper_cnn, activation),
        lambda: as_images(Data(fresh().X[:128], fresh().y[:128])),
        layers=4,
        judge=lambda: as_images(unseen()),
    )


NEW_NETS = {
    net.name: net
    for net in (
        new_mlp("tanh, 2 layers", 1, "tanh"),
        new_mlp("tanh, 4 layers", 3, "tanh"),
        new_mlp("tanh, 8 layers", 7, "tanh"),
        new_cnn("tanh, CNN", nn.Tanh),
        new_mlp("ReLU, 2 layers", 1, "ReLU"),
        new_mlp("ReLU, 4 layers", 3, "ReLU"),
        new_mlp("ReLU, 8 layers", 7, "ReLU"),
        new_cnn("ReLU, CNN", nn.ReLU),
    )
}
"""Nets for which the advice that was read off the maps is put to the test."""

PROBLEMS = {p.name: p for p in (QUADRATIC, DEEP_LINEAR, MLP, CNN, MLP_BATCHES)}
