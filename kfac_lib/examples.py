"""The running example of the book: one small network and one batch of real digits.

Met first in the section :ref:`jac-network`. Needs the ``book`` extra (scikit-learn).
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "identity": nn.Identity,
    "ReLU": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
"""Activations by the name that figures show."""


class Example(NamedTuple):
    """A network, its loss and one batch (:ref:`jac-network`)."""

    model: nn.Sequential
    loss_func: nn.Module
    X: Tensor
    y: Tensor


def digits(N: int | None = None, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Handwritten digits from scikit-learn, shuffled once with a fixed seed.

    See :ref:`jac-network`. 1797 images of 8×8 pixels; Alpaydin and Kaynak, UCI Machine
    Learning Repository, 1998.

    Args:
        N: How many; all when not given.
        dtype: Of the pixels.

    Returns:
        Pixels of shape (N, 64) between 0 and 1, and labels 0 to 9 of shape (N,).

    Raises:
        ValueError: If N is not between 1 and 1797.

    Example:
        >>> X, y = digits(3)
        >>> X.shape, y.tolist()
        (torch.Size([3, 64]), [6, 5, 5])
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    N = len(labels) if N is None else N
    if not 1 <= N <= len(labels):
        raise ValueError(f"N={N}: there are {len(labels)} digits; take between 1 and all of them.")
    shuffle = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:N]
    return torch.tensor(images[shuffle] / 16, dtype=dtype), torch.tensor(labels[shuffle])


def mlp(
    *widths: int, activation: str = "tanh", seed: int = 0, dtype: torch.dtype = torch.float64
) -> nn.Sequential:
    """A multilayer perceptron with weights from its own generator (:ref:`jac-network`).

    Weights and biases are normal with standard deviation 1/√D_in; torch's global generator is
    not touched.

    Args:
        widths: Features of the input, of every hidden layer, and of the output.
        activation: A key of :data:`ACTIVATIONS`, after every layer but the last.
        seed: Of the weights.
        dtype: Of the weights.

    Returns:
        The network.

    Raises:
        ValueError: If there are fewer than two widths, or the activation is unknown.

    Example:
        >>> mlp(5, 4, 3)
        Sequential(
          (0): Linear(in_features=5, out_features=4, bias=True)
          (1): Tanh()
          (2): Linear(in_features=4, out_features=3, bias=True)
        )
    """
    if len(widths) < 2 or activation not in ACTIVATIONS:
        raise ValueError(
            f"mlp{widths} with activation {activation!r}: give at least two widths and one of "
            f"{', '.join(ACTIVATIONS)}."
        )
    generator = torch.Generator().manual_seed(seed)
    modules: list[nn.Module] = []
    for D_in, D_out in pairwise(widths):
        layer = nn.Linear(D_in, D_out, device="meta", dtype=dtype).to_empty(device="cpu")
        with torch.no_grad():
            for parameter in layer.parameters():
                draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(draw / D_in**0.5)
        modules += [layer, ACTIVATIONS[activation]()]
    return nn.Sequential(*modules[:-1])


def running_example(N: int = 64, steps: int = 30) -> Example:
    """The running example: a 64-16-10 tanh network on N digits, cross-entropy.

    See :ref:`jac-network`. The net is a little trained, so that its curvature is neither that
    of noise nor that of a finished net.

    Args:
        N: Number of digits in the batch.
        steps: Steps of Adam (learning rate 0.01, full batch) on the first 512 digits.

    Returns:
        Network, loss and batch, in float64.

    Raises:
        ValueError: If N is out of range.

    Example:
        >>> model, loss_func, X, y = running_example()
        >>> model(X).shape
        torch.Size([64, 10])
    """
    model, loss_func = mlp(64, 16, 10), nn.CrossEntropyLoss()
    X, y = digits(512)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_func(model(X), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return Example(model, loss_func, *digits(N))


def little_sister(
    N: int = 8, activation: str = "tanh", loss: str = "MSE", seed: int = 0
) -> Example:
    """A net small enough to draw whole: 5-4-4-3 on standard normal inputs.

    See :ref:`jac-network`. Its three layers have blocks of 24, 20 and 15 rows.

    Args:
        N: Number of data.
        activation: A key of :data:`ACTIVATIONS`.
        loss: ``"MSE"`` (normal targets), ``"CE"`` (uniform labels) or ``"BCE"`` (zeros and ones).
        seed: Of weights and data.

    Returns:
        Network, loss and batch, in float64. The first data of two batches agree.

    Raises:
        ValueError: If the loss or the activation is unknown.

    Example:
        >>> little_sister(N=2).X.shape
        torch.Size([2, 5])
    """
    if loss not in ("MSE", "CE", "BCE"):
        raise ValueError(f"loss={loss!r}: use 'MSE', 'CE' or 'BCE'.")
    generator = torch.Generator().manual_seed(seed + 1)
    draws = torch.randn(N, 9, generator=generator, dtype=torch.float64)
    X, y, labels = draws[:, :5], draws[:, 5:8], (draws[:, 8].abs() * 100).long() % 3
    model = mlp(5, 4, 4, 3, activation=activation, seed=seed)
    if loss == "MSE":
        return Example(model, nn.MSELoss(), X, y)
    if loss == "BCE":
        return Example(model, nn.BCEWithLogitsLoss(), X, (y > 0).to(y.dtype))
    return Example(model, nn.CrossEntropyLoss(), X, labels)
