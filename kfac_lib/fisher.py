"""The flavours of the Fisher: which vectors are backpropagated.

Every curvature matrix of the book is R Σ_n J_nᵀ (Σ_v Δ_{n,v} Δ_{n,v}ᵀ) J_n. The flavours differ in
the vectors Δ and in nothing else. Explained in the section :ref:`kfac-flavours`.
"""

from dataclasses import dataclass, field
from math import sqrt
from typing import Protocol

import torch
from torch import Tensor

from kfac_lib.losses import Columns, Criterion


class Fisher(Protocol):
    """A flavour: a way of choosing the vectors to backpropagate (:ref:`kfac-flavours`)."""

    def vectors(self, criterion: Criterion, f: Tensor, y: Tensor) -> Tensor:
        """Return the vectors Δ of shape (V, *f.shape), detached."""


@dataclass(frozen=True)
class TypeII:
    """Columns of the Hessian's root: the Fisher by second derivatives, which is the GGN.

    See :ref:`kfac-flavours`. Deterministic; V is the size of one datum's prediction.

    Args:
        columns: ``"full"``, or ``"minimal"`` for as many columns as the Hessian has rank (K−1
            instead of K for cross-entropy).

    Raises:
        ValueError: If ``columns`` is anything else.

    Example:
        >>> from kfac_lib.losses import CrossEntropy
        >>> f, y = torch.zeros(5, 3), torch.zeros(5, dtype=torch.long)
        >>> TypeII().vectors(CrossEntropy("mean"), f, y).shape
        torch.Size([3, 5, 3])
    """

    columns: Columns = "full"

    def __post_init__(self) -> None:
        if self.columns not in ("full", "minimal"):
            raise ValueError(f"columns={self.columns!r}: use 'full' or 'minimal'.")

    def vectors(self, criterion: Criterion, f: Tensor, y: Tensor) -> Tensor:
        """Return the columns of L_n, shape (V, *f.shape)."""
        return criterion.hessian_root(f.detach(), y, self.columns)


@dataclass(frozen=True)
class MonteCarlo:
    """Gradients for labels drawn from the model: type-I by sampling (:ref:`kfac-flavours`).

    In expectation the type-II Fisher. All positions of a prediction are filled at once, with
    independent labels; V = M.

    Args:
        samples: Number M of labels drawn per datum.
        generator: Source of randomness on the device of the prediction; torch's default generator
            when not given.

    Raises:
        ValueError: If ``samples`` is not a positive integer, or the generator's device is another.

    Example:
        >>> from kfac_lib.losses import SquaredError
        >>> f = torch.zeros(5, 3)
        >>> MonteCarlo(samples=2).vectors(SquaredError("mean"), f, f).shape
        torch.Size([2, 5, 3])
    """

    samples: int = 1
    generator: torch.Generator | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            raise ValueError(f"samples={self.samples!r}: use a positive integer, such as 1.")

    def vectors(self, criterion: Criterion, f: Tensor, y: Tensor) -> Tensor:
        """Return −∇_f log r(ỹ given f_n) / √M for sampled labels ỹ, shape (M, *f.shape)."""
        if self.generator is not None and self.generator.device.type != f.device.type:
            raise ValueError(
                f"The generator lives on {self.generator.device}, the prediction on {f.device}. "
                f"Use torch.Generator(device={f.device.type!r})."
            )
        f = f.detach()
        labels = criterion.sample(f, self.samples, self.generator)
        return -criterion.log_likelihood_gradient(f, labels) / sqrt(self.samples)


@dataclass(frozen=True)
class Empirical:
    """Gradients for the labels of the data set: the empirical Fisher (:ref:`kfac-flavours`).

    Cheap, and *not* the Fisher: the labels are not drawn from the model. V = 1.

    Example:
        >>> from kfac_lib.losses import SquaredError
        >>> f, y = torch.ones(5, 3), torch.zeros(5, 3)
        >>> Empirical().vectors(SquaredError("mean"), f, y).shape
        torch.Size([1, 5, 3])
    """

    def vectors(self, criterion: Criterion, f: Tensor, y: Tensor) -> Tensor:
        """Return ∇_f c(f_n, y_n), shape (1, *f.shape)."""
        return criterion.gradient(f.detach(), y).unsqueeze(0)
