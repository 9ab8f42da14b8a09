"""The problems: a network, its loss and one batch, drawn from a seed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Problem:
    """How to build a network and one batch; :meth:`make` does it.

    Args:
        name: What the tables call it.
        build: Builds the network.
        shape: Shape of one input.
        N: Batch size.
        outputs: Number of classes, or of entries of a regression target.
        regression: Squared error in place of cross-entropy.
        net: Which reference, written by hand, fits the network.
        delta: Damping; the CNN's last layer has eigenvalues of 20 beside many that are zero, and
            what is below 0.1 is rounding when they are inverted in float32.
    """

    name: str
    build: Callable[[], nn.Sequential]
    shape: tuple[int, ...]
    N: int
    outputs: int = 10
    regression: bool = False
    net: str = "mlp"
    delta: float = 1e-3

    def make(self, dtype: torch.dtype = torch.float32) -> "Made":
        """Build the network and draw the batch; the same ones each time."""
        torch.manual_seed(0)
        model = self.build().to(dtype)
        X = torch.randn(self.N, *self.shape, dtype=dtype)
        if self.regression:
            y, loss_func = torch.randn(self.N, self.outputs, dtype=dtype), nn.MSELoss()
        else:
            y, loss_func = torch.randint(self.outputs, (self.N,)), nn.CrossEntropyLoss()
        return Made(self, model, loss_func, X, y)


@dataclass(frozen=True)
class Made:
    """A problem that is there: what every contender gets."""

    problem: Problem
    model: nn.Sequential
    loss_func: nn.Module
    X: Tensor
    y: Tensor

    def gradient(self) -> tuple[Tensor, ...]:
        """One gradient of the loss: the unit in which everything is measured."""
        loss = self.loss_func(self.model(self.X), self.y)
        return torch.autograd.grad(loss, list(self.model.parameters()))

    def layers(self) -> dict[str, nn.Module]:
        """The layers with a weight, by name, in the model's order."""
        return {name: m for name, m in self.model.named_modules() if hasattr(m, "weight")}


class MeanOverTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


@cache  # so that equal problems are equal
def mlp(*widths: int) -> Callable[[], nn.Sequential]:
    def build() -> nn.Sequential:
        modules: list[nn.Module] = []
        for D_in, D_out in pairwise(widths):
            modules += [nn.Linear(D_in, D_out), nn.ReLU()]
        return nn.Sequential(*modules[:-1])

    return build


def cnn() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 10)),
    )


def tokens() -> nn.Sequential:
    body = (nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    return nn.Sequential(*body, MeanOverTokens(), nn.Linear(64, 10))


SMALL = Problem("MLP 64-128-64-10", mlp(64, 128, 64, 10), (64,), 512)
LARGE = Problem("MLP 784-512-256-128-10", mlp(784, 512, 256, 128, 10), (784,), 512)
CNN = Problem("CNN 1-16-32, 28×28", cnn, (1, 28, 28), 128, net="cnn", delta=0.1)
TOKENS = Problem("64 tokens of width 64", tokens, (64, 64), 64, net="tokens")
REGRESSION = Problem(
    "regression MLP 20-64-64-3", mlp(20, 64, 64, 3), (20,), 512, outputs=3, regression=True
)
MAIN = (SMALL, LARGE, CNN, TOKENS, REGRESSION)
BATCH_SIZES = (32, 128, 512, 2048, 4096)
CLASSES = (10, 100, 1000, 10000)


def with_classes(C: int) -> Problem:
    """The large MLP with C classes, at N = 128."""
    build = mlp(784, 512, 256, 128, C)
    return Problem(f"MLP 784-512-256-128-{C}", build, (784,), 128, outputs=C)


def with_batch_size(problem: Problem, N: int) -> Problem:
    """The same problem with another batch size."""
    return replace(problem, N=N)
