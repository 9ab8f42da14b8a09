"""Accumulators: consumers of the stream that hold raw sums and counts.

Sums of batches, or of processes, merge; constants are applied once, at the end, by one function.
Explained in the section :ref:`kfac-batches`.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kfac_lib.flattening import Order, flatten
from kfac_lib.losses import Criterion
from kfac_lib.rows import Count, LayerRows


class Sharing(Protocol):
    """A way to treat the positions that share a weight (:ref:`kfac-rows`)."""

    def rows(self, rows: LayerRows) -> LayerRows:
        """Return the rows whose outer products are summed."""

    def divisor(self, S: int) -> int:
        """Return the constant by which B is divided, next to N."""


@dataclass(frozen=True)
class Expand:
    """Treat every position like a datum of its own (:ref:`const-shared`).

    Example:
        >>> Expand().divisor(S=7)
        7
    """

    def rows(self, rows: LayerRows) -> LayerRows:
        """Return the rows as they are."""
        return rows

    def divisor(self, S: int) -> int:
        """Return S."""
        return S


@dataclass(frozen=True)
class Reduce:
    """Sum a datum's positions before the outer product (:ref:`const-shared`).

    Example:
        >>> Reduce().divisor(S=7)
        49
    """

    def rows(self, rows: LayerRows) -> LayerRows:
        """Return the rows summed over the shared axis."""
        return rows.reduced()

    def divisor(self, S: int) -> int:
        """Return S²."""
        return S**2


def constants(criterion: Criterion, count: Count, sharing: Sharing, S: int) -> tuple[float, float]:
    """The numbers that turn raw sums into the factors A and B (:ref:`const-table`).

    Every constant of KFAC is in this table:

    ========  ===============================  ==========================================
    sharing   A (input-based)                  B (grad-output-based)
    ========  ===============================  ==========================================
    expand    R Σ_n Σ_s x̃ x̃ᵀ                   1/(N S) Σ_n Σ_s Σ_v g gᵀ
    reduce    R Σ_n (Σ_s x̃)(Σ_s x̃)ᵀ            1/(N S²) Σ_n Σ_v (Σ_s g)(Σ_s g)ᵀ
    ========  ===============================  ==========================================

    N counts data, but not those whose labels are all ignored. The 1/√M of Monte Carlo and the √κ of
    weights are in the vectors that are backpropagated. A flavour without vectors has B = I.

    Args:
        criterion: Holds the rule for R.
        count: Counts over all data.
        sharing: Expand or reduce.
        S: Number of positions that share the weight.

    Returns:
        The multiples of the raw sums in A and in B.

    Example:
        >>> from kfac_lib.losses import CrossEntropy
        >>> constants(CrossEntropy("mean"), Count(N=4, denominator=4), Expand(), S=1)
        (0.25, 0.25)
    """
    return criterion.reduction_factor(count.denominator), 1 / (count.N * sharing.divisor(S))


class FactorSums:
    """Raw sums for the Kronecker factors of one layer (:ref:`kfac-batches`).

    Args:
        sharing: Expand or reduce.

    Example:
        >>> from kfac_lib.losses import SquaredError
        >>> sums = FactorSums(Expand())
        >>> sums.update(LayerRows(torch.ones(5, 1, 2), torch.ones(3, 5, 1, 4), None, Count(5, 20)))
        >>> A, B = sums.finish(SquaredError("mean"))
        >>> A[0, 0].item(), B[0, 0].item()
        (0.5, 3.0)
    """

    def __init__(self, sharing: Sharing) -> None:
        self.sharing = sharing
        self.count = Count(0, 0)
        self.S: int | None = None
        self.vectors = 0
        self.xx: Tensor | None = None
        self.gg: Tensor | None = None

    def update(self, rows: LayerRows) -> None:
        """Add the rows of a batch, or of a further chunk of its vectors.

        Raises:
            ValueError: If S differs from that of the rows before.
        """
        self.S = _same_S(self.S, rows.S)
        shared = self.sharing.rows(rows)
        if rows.count.N:
            self.xx = _add(self.xx, shared.input_gram())
        self.gg = _add(self.gg, shared.output_gram())
        self.vectors += len(rows.g)
        self.count = self.count.plus(rows.count)

    def merge(self, other: "FactorSums") -> None:
        """Add the sums of another accumulator of the same layer, over other data.

        Raises:
            ValueError: If S or the sharing differs.
        """
        if self.sharing != other.sharing:
            raise ValueError(f"{self.sharing} and {other.sharing} do not add up.")
        if other.S is None or other.xx is None or other.gg is None:
            return
        self.S = _same_S(self.S, other.S)
        self.xx, self.gg = _add(self.xx, other.xx), _add(self.gg, other.gg)
        self.vectors += other.vectors
        self.count = self.count.plus(other.count)

    def scaled(self, weight: float) -> "FactorSums":
        """Return sums and counts times a weight, for a weighted average over batches."""
        result = FactorSums(self.sharing)
        result.S, result.vectors, result.count = self.S, self.vectors, self.count.scaled(weight)
        result.xx = None if self.xx is None else weight * self.xx
        result.gg = None if self.gg is None else weight * self.gg
        return result

    def finish(self, criterion: Criterion) -> tuple[Tensor, Tensor]:
        """Return the factors A and B, with their constants (see :func:`constants`).

        Raises:
            ValueError: If there were no rows.
        """
        if self.S is None or self.xx is None or self.gg is None:
            raise ValueError("No rows were accumulated, so there are no factors.")
        scale_A, scale_B = constants(criterion, self.count, self.sharing, self.S)
        if self.vectors == 0:
            return scale_A * self.xx, torch.eye(
                len(self.gg), dtype=self.gg.dtype, device=self.gg.device
            )
        return scale_A * self.xx, scale_B * self.gg


class ExactBlocks:
    """The exact block of one layer, R Σ_{n,v} vec(P_{n,v}) vec(P_{n,v})ᵀ (:ref:`kfac-sum`).

    Args:
        order: Flattening of the weight-shaped P.

    Example:
        >>> from kfac_lib.losses import SquaredError
        >>> block = ExactBlocks("cvec")
        >>> block.update(LayerRows(torch.ones(5, 1, 2), torch.ones(3, 5, 1, 4), None, Count(5, 20)))
        >>> block.finish(SquaredError("mean")).shape
        torch.Size([8, 8])
    """

    def __init__(self, order: Order) -> None:
        self.order = order
        self.count = Count(0, 0)
        self.sum: Tensor | None = None

    def update(self, rows: LayerRows) -> None:
        """Add the rows of a batch, or of a further chunk of its vectors."""
        P = flatten(rows.outer().flatten(0, 1), self.order, start=1)
        self.sum = _add(self.sum, P.T @ P)
        self.count = self.count.plus(rows.count)

    def merge(self, other: "ExactBlocks") -> None:
        """Add the sum of another accumulator of the same layer, over other data.

        Raises:
            ValueError: If the order differs.
        """
        if self.order != other.order:
            raise ValueError(f"Blocks in the orders {self.order} and {other.order} do not add up.")
        if other.sum is not None:
            self.sum = _add(self.sum, other.sum)
            self.count = self.count.plus(other.count)

    def finish(self, criterion: Criterion) -> Tensor:
        """Return the block, of shape (D, D), D = D_out · D_in.

        Raises:
            ValueError: If there were no rows.
        """
        if self.sum is None:
            raise ValueError("No rows were accumulated, so there is no block.")
        return criterion.reduction_factor(self.count.denominator) * self.sum


def _add(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term


def _same_S(known: int | None, S: int) -> int:
    if known not in (None, S):
        raise ValueError(
            f"A layer's weight is shared over {known} positions in one batch and over {S} in "
            "another. KFAC needs one S for all data: pad, or group the data by length."
        )
    return S
