"""The flavours of the Fisher: which vectors are backpropagated.

Every curvature matrix of the book is R Σ_n J_nᵀ (Σ_v Δ_{n,v} Δ_{n,v}ᵀ) J_n. The flavours differ in
the vectors Δ and in nothing else. Explained in the chapter :ref:`fisher`.
"""

from dataclasses import dataclass, field
from math import sqrt
from typing import Protocol

import torch
from torch import Tensor

from kfac_lib.losses import Columns, Criterion


class Fisher(Protocol):
    """A flavour: a way of choosing the vectors to backpropagate (:ref:`fish-equal`)."""

    def vectors(self, criterion: Criterion, f: Tensor, y: Tensor) -> Tensor:
        """Return the vectors Δ of shape (V, *f.shape), detached."""


@dataclass(frozen=True)
class TypeII:
    """Columns of the Hessian's root: the Fisher by second derivatives, which is the GGN.

    See :ref:`fish-type-two`. Deterministic; V is the size of one datum's prediction.

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
        """Return the columns of √κ_n L_n, shape (V, *f.shape)."""
        return criterion.hessian_root(f.detach(), y, self.columns)


@dataclass(frozen=True)
class TypeI:
    """Gradients for *every* label, weighted by its probability: type-I without sampling.

    See :ref:`fish-type-one`. Equal to type-II to machine precision, by another way. V is the
    number of labels of all positions: K·T for cross-entropy, twice the size of one datum's
    prediction for binary cross-entropy and, with sigma points, for squared error.

    Example:
        >>> from kfac_lib.losses import SquaredError
        >>> f = torch.zeros(5, 3)
        >>> TypeI().vectors(SquaredError("mean"), f, f).shape
        torch.Size([6, 5, 3])
    """

    def vectors(self, criterion: Criterion, f: Tensor, y: Tensor) -> Tensor:
        """Return −√(κ_n r) ∇_f log r for all labels, shape (V, *f.shape)."""
        f = f.detach()
        return criterion.kappa(f, y).sqrt() * criterion.enumerated_gradients(f)


@dataclass(frozen=True)
class _Drawn:
    """What the flavours that draw have in common: how many samples, and from where."""

    samples: int = 1
    generator: torch.Generator | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            raise ValueError(f"samples={self.samples!r}: use a positive integer, such as 1.")

    def _check_device(self, f: Tensor) -> None:
        if self.generator is not None and self.generator.device.type != f.device.type:
            raise ValueError(
                f"The generator lives on {self.generator.device}, the prediction on {f.device}. "
                f"Use torch.Generator(device={f.device.type!r})."
            )


@dataclass(frozen=True)
class MonteCarlo(_Drawn):
    """Gradients for labels drawn from the model: type-I by sampling (:ref:`fish-monte-carlo`).

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

    def vectors(self, criterion: Criterion, f: Tensor, y: Tensor) -> Tensor:
        """Return −√(κ_n/M) ∇_f log r(ỹ given f_n) for sampled labels ỹ, shape (M, *f.shape)."""
        self._check_device(f)
        f = f.detach()
        labels = criterion.sample(f, self.samples, self.generator)
        scale = (criterion.kappa(f, y) / self.samples).sqrt()
        return -scale * criterion.log_likelihood_gradient(f, labels)


@dataclass(frozen=True)
class Empirical:
    """Gradients for the labels of the data set: the empirical Fisher (:ref:`fish-empirical`).

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


@dataclass(frozen=True)
class RandomSigns(_Drawn):
    """Random mixtures of all columns of the Hessian's root (:ref:`fish-signs`).

    √κ_n L_n ρ / √M with ρ uniform in {−1, +1}, independent for each datum, position and sample. In
    expectation the type-II Fisher, as Monte Carlo, but no label is drawn; V = M.

    Args:
        samples: Number M of sign vectors drawn per datum.
        generator: Source of randomness on the device of the prediction; torch's default generator
            when not given.

    Raises:
        ValueError: If ``samples`` is not a positive integer, or the generator's device is another.

    Example:
        >>> from kfac_lib.losses import SquaredError
        >>> f = torch.zeros(5, 3)
        >>> RandomSigns(samples=2).vectors(SquaredError("mean"), f, f).shape
        torch.Size([2, 5, 3])
    """

    def vectors(self, criterion: Criterion, f: Tensor, y: Tensor) -> Tensor:
        """Return √κ_n L_n ρ / √M, shape (M, *f.shape)."""
        self._check_device(f)
        f = f.detach()
        coins = torch.randint(
            2, (self.samples, *f.shape), generator=self.generator, dtype=f.dtype, device=f.device
        )
        return criterion.hessian_root_product(f, y, 2 * coins - 1) / sqrt(self.samples)


@dataclass(frozen=True)
class InputOnly:
    """No vectors at all: B is the identity by definition (:ref:`fish-input-only`).

    KFAC by its input-based factor alone, without any backward pass (FOOF, ISAAC). Not a curvature
    matrix: there is no dense matrix to compare with. V = 0.

    Example:
        >>> from kfac_lib.losses import SquaredError
        >>> f = torch.zeros(5, 3)
        >>> InputOnly().vectors(SquaredError("mean"), f, f).shape
        torch.Size([0, 5, 3])
    """

    def vectors(self, criterion: Criterion, f: Tensor, y: Tensor) -> Tensor:
        """Return an empty tensor of shape (0, *f.shape)."""
        return f.new_empty(0, *f.shape)


def flavours() -> str:
    """The names of the flavours, for messages (:ref:`fish-equal`).

    Example:
        >>> flavours()
        'TypeII(), TypeI(), MonteCarlo(), Empirical(), RandomSigns() or InputOnly()'
    """
    *first, last = (
        f"{kind.__name__}()"
        for kind in (TypeII, TypeI, MonteCarlo, Empirical, RandomSigns, InputOnly)
    )
    return f"{', '.join(first)} or {last}"


def require_vectors(fisher: Fisher) -> None:
    """Refuse :class:`InputOnly` where a matrix is asked for (:ref:`fish-input-only`).

    Raises:
        ValueError: If the flavour has no vectors.

    Example:
        >>> require_vectors(TypeII())
    """
    if isinstance(fisher, InputOnly):
        raise ValueError(
            "InputOnly() backpropagates nothing and sets B = I; it approximates no curvature "
            "matrix, so there is no exact one. Use another flavour, such as TypeII()."
        )
