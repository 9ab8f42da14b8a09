"""The tasks of the chapter on training: a net, a loss, data to train on and data held out.

Everything is float64, so that a curve can be computed again to many digits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from sklearn import datasets
from torch import Tensor, nn

from experiments.problems import Data
from kfac_lib import MonteCarlo, TypeII
from kfac_lib.examples import digits, mlp
from kfac_lib.fisher import Fisher

LENGTH = 32
"""Characters in a window of text."""

WIDTH, HEADS, BLOCKS = 32, 4, 2


@dataclass(frozen=True)
class Task:
    """What is trained, and how long.

    Args:
        name: As readers see it.
        net: Draws the net from a seed.
        data: Data to train on, and data held out.
        loss_func: Loss; the held-out loss is of the same kind.
        fisher: Flavour for KFAC and EKFAC, given a seed for what it draws.
        batches: Batch sizes to choose from.
        passes: The horizon in passes over the data.
        seconds: The horizon in seconds of processor time, and the end of every run.
        labels: Whether the share of wrong answers is recorded too.
    """

    name: str
    net: Callable[[int], nn.Module]
    data: Callable[[], tuple[Data, Data]]
    loss_func: nn.Module
    fisher: Callable[[int], Fisher]
    batches: tuple[int, ...]
    passes: int
    seconds: float
    labels: bool = False


class CharacterTransformer(nn.Module):
    """Next characters of windows (N, T), as logits of shape (N, C, T).

    All parameters belong to linear layers and embeddings: normalization has none, positions are
    looked up. So KFAC covers every one of them.
    """

    def __init__(self, characters: int, seed: int) -> None:
        super().__init__()
        self.letters = nn.Embedding(characters, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.readout = nn.Linear(WIDTH, characters)
        self.double()
        source = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                draw = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
                if name.endswith("bias"):
                    draw = torch.zeros_like(draw)
                parameter.copy_(draw / WIDTH**0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        N, T = tokens.shape
        z = self.letters(tokens) + self.positions(torch.arange(T).expand(N, T))
        for block in self.blocks:
            z = block(z)
        logits: Tensor = self.readout(self.norm(z)).movedim(-1, 1)
        return logits


class Block(nn.Module):
    """Causal attention and a small MLP, each behind a normalization and beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.queries = nn.Linear(WIDTH, WIDTH)
        self.keys = nn.Linear(WIDTH, WIDTH)
        self.values = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, z: Tensor) -> Tensor:
        z = z + self.attention(self.norm(z))
        made: Tensor = z + self.mlp(self.norm(z))
        return made

    def attention(self, z: Tensor) -> Tensor:
        N, T, _ = z.shape
        q, k, v = (
            layer(z).reshape(N, T, HEADS, -1).transpose(1, 2)
            for layer in (self.queries, self.keys, self.values)
        )
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        made: Tensor = self.out(mixed.transpose(1, 2).reshape(N, T, -1))
        return made


def split(X: Tensor, y: Tensor, held_out: int) -> tuple[Data, Data]:
    """The last so many data are held out."""
    return Data(X[:-held_out], y[:-held_out]), Data(X[-held_out:], y[-held_out:])


@cache
def diabetes() -> tuple[Data, Data]:
    """442 patients, 10 features of unit mean square, and the progress of the disease."""
    X, y = (torch.tensor(a) for a in datasets.load_diabetes(return_X_y=True))
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
    y = (y - y.mean()) / y.std(unbiased=False)
    return split(X[order] * len(X) ** 0.5, y[order, None], held_out=88)


@cache
def labelled() -> tuple[Data, Data]:
    return split(*digits(), held_out=360)


@cache
def unlabelled() -> tuple[Data, Data]:
    X, _ = digits()
    return split(X, X, held_out=360)


@cache
def text() -> str:
    """The descriptions of six data sets that come with scikit-learn, in lower case."""
    names = ("iris", "diabetes", "digits", "linnerud", "wine", "breast_cancer")
    return "".join(getattr(datasets, f"load_{name}")().DESCR for name in names).lower()


@cache
def windows() -> tuple[Data, Data]:
    """Windows of the text side by side; each tenth is held out. Targets are the next characters."""
    characters = sorted(set(text()))
    tokens = torch.tensor([characters.index(c) for c in text()])
    whole = (len(tokens) - 1) // LENGTH * LENGTH
    X, y = tokens[:whole].reshape(-1, LENGTH), tokens[1 : whole + 1].reshape(-1, LENGTH)
    tenth = torch.arange(len(X)) % 10 == 9
    return Data(X[~tenth], y[~tenth]), Data(X[tenth], y[tenth])


def one_draw(seed: int) -> MonteCarlo:
    return MonteCarlo(1, torch.Generator().manual_seed(seed))


TASKS = {
    task.name: task
    for task in (
        Task(
            "regression",
            lambda seed: mlp(10, 12, 12, 1, seed=seed),
            diabetes,
            nn.MSELoss(),
            lambda seed: TypeII(),
            batches=(32, 128, 354),
            passes=50,
            seconds=3.0,
        ),
        Task(
            "classifier",
            lambda seed: mlp(64, 64, 64, 10, activation="ReLU", seed=seed),
            labelled,
            # Without smoothing the least loss is zero, at infinite weights, and a run gets there.
            nn.CrossEntropyLoss(label_smoothing=0.1),
            one_draw,
            batches=(32, 128, 512),
            passes=20,
            seconds=5.0,
            labels=True,
        ),
        Task(
            "autoencoder",
            lambda seed: mlp(64, 64, 32, 8, 32, 64, 64, seed=seed),
            unlabelled,
            nn.BCEWithLogitsLoss(),
            one_draw,
            batches=(32, 128, 512),
            passes=20,
            seconds=8.0,
        ),
        Task(
            "transformer",
            lambda seed: CharacterTransformer(len(set(text())), seed),
            windows,
            nn.CrossEntropyLoss(),
            one_draw,
            batches=(4, 16, 64),
            passes=10,
            seconds=12.0,
        ),
    )
}
