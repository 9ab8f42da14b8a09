"""Small nets of every layer, data for them, and the flavours with what they are compared with."""

import torch
from torch import nn
from truth import To

from kfac_lib import Empirical, Expand, MonteCarlo, RandomSigns, Reduce, TypeI, TypeII
from kfac_lib.losses import criterion_of

FLAVOURS = {
    "type-II": TypeII(),
    "minimal": TypeII("minimal"),
    "type-I": TypeI(),
    "Monte Carlo": MonteCarlo(2),
    "empirical": Empirical(),
    "signs": RandomSigns(2),
}
SHARINGS = {"expand": Expand(), "reduce": Reduce()}
LOSSES = {
    "MSE": nn.MSELoss(),
    "CE": nn.CrossEntropyLoss(),
    "CE sum": nn.CrossEntropyLoss(reduction="sum"),
    "BCE": nn.BCEWithLogitsLoss(),
}


def mix(axis):
    """Let every position depend on all others, along one axis."""
    return To(lambda z: z + 0.5 * z.roll(1, axis).sin() + z.mean(axis, keepdim=True) ** 2)


classes_first = To(lambda z: z.movedim(-1, 1))


def conv1d():
    return nn.Sequential(
        nn.Conv1d(2, 2, 3, stride=2, padding=2, padding_mode="circular"),
        nn.Tanh(),
        nn.Conv1d(2, 3, 2, dilation=2),
    )


def conv2d_in_groups():
    return nn.Sequential(
        nn.Conv2d(4, 2, (2, 3), padding=(1, 0), padding_mode="reflect", groups=2),
        nn.Tanh(),
        nn.Conv2d(2, 3, (2, 1), stride=(1, 2), bias=False),
    )


def conv3d_pooled():
    return nn.Sequential(
        nn.Conv3d(1, 2, 2, padding="same", padding_mode="replicate"),
        mix(2),
        To(lambda z: z.mean((2, 3, 4))),
        nn.Linear(2, 3),
    )


def embedding():
    return nn.Sequential(nn.Embedding(5, 2, padding_idx=1), mix(1), nn.Linear(2, 3), classes_first)


def embedding_and_conv():
    return nn.Sequential(
        nn.Embedding(5, 4), To(lambda z: z.transpose(1, 2).sin()), nn.Conv1d(4, 6, 2, groups=2),
        To(lambda z: z[:, :3] + z[:, 3:] ** 2),
    )  # fmt: skip


def linear_on_two_axes():
    return nn.Sequential(nn.Linear(4, 2), mix(1), nn.Linear(2, 3), classes_first)


def tokens(*shape):
    X = torch.randint(5, shape)
    X[0].flatten()[:2] = torch.tensor([1, 3])
    return X


NETS = {
    "conv1d": (conv1d, lambda N: torch.randn(N, 2, 5)),
    "conv2d in groups": (conv2d_in_groups, lambda N: torch.randn(N, 4, 2, 4)),
    "conv3d, pooled": (conv3d_pooled, lambda N: torch.randn(N, 1, 2, 1, 2)),
    "embedding": (embedding, lambda N: tokens(N, 3)),
    "embedding and conv": (embedding_and_conv, lambda N: tokens(N, 3)),
    "linear on two axes": (linear_on_two_axes, lambda N: torch.randn(N, 2, 2, 4)),
}
"""A net whose prediction has three classes on axis 1, and a function N -> X."""


def labels(loss, f):
    """Targets for a prediction."""
    if isinstance(loss, nn.MSELoss):
        return torch.randn_like(f)
    if isinstance(loss, nn.BCEWithLogitsLoss):
        return (torch.randn_like(f) > 0).to(f.dtype)
    return torch.randint(f.shape[1], (len(f), *f.shape[2:]))


def example(net, loss, N):
    """A net of the table with data (X, y)."""
    make, inputs = NETS[net]
    model, X = make(), inputs(N)
    return model, (X, labels(loss, model(X).detach()))


def drawn(fisher, model, loss, *batches, seed=1):
    """The vectors of each batch, drawn one after another after torch's seed is set."""
    torch.manual_seed(seed)
    criterion = criterion_of(loss)
    vectors = [fisher.vectors(criterion, model(X).detach(), y) for X, y in batches]
    torch.manual_seed(seed)
    return vectors


def is_fisher_of_draws(flavour):
    """Whether the matrix is that of given vectors; otherwise it is the Gauss-Newton matrix."""
    return flavour in ("Monte Carlo", "empirical", "signs")


def all_vectors(fisher, model, loss, data):
    """The vectors that a flavour backpropagates."""
    X, y = data
    return fisher.vectors(criterion_of(loss), model(X).detach(), y)
