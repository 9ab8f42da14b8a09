"""Inputs and pseudo-gradients of one layer as rows, and what can be made of them.

Fast paths live behind these names: the 1 that a joint bias appends to every input is never stored.
Explained in the section :ref:`kfac-rows`.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Count(NamedTuple):
    """What the constants need to know of the data (:ref:`const-counts`).

    Example:
        >>> Count(N=3, denominator=30).plus(Count(N=1, denominator=10))
        Count(N=4, denominator=40)
    """

    N: float
    """Number of data; a fraction only where sums are weighted."""
    denominator: float
    """Denominator of the reduction factor R under ``"mean"``."""

    def plus(self, other: "Count") -> "Count":
        """Return the counts of both, taken together."""
        return Count(self.N + other.N, self.denominator + other.denominator)

    def scaled(self, weight: float) -> "Count":
        """Return the counts times a weight."""
        return Count(weight * self.N, weight * self.denominator)


def gram(rows: Tensor) -> Tensor:
    """The Gram matrix rowsᵀ rows, the product that KFAC spends most of its time on.

    See :ref:`kfac-factors`. Of a wide matrix the block below the diagonal is not computed but
    copied, and so on within the two blocks on it, so that a quarter of the work or more is saved.

    Args:
        rows: Tensor of shape (rows, D).

    Returns:
        Tensor of shape (D, D).

    Example:
        >>> gram(torch.tensor([[1.0, 2.0]])).tolist()
        [[1.0, 2.0], [2.0, 4.0]]
    """
    D = rows.shape[1]
    if D <= 128:  # below, one product is faster than three
        return rows.T @ rows
    half = D // 2
    left, right = rows[:, :half], rows[:, half:]
    result = rows.new_empty(D, D)
    result[:half, :half] = gram(left)
    result[half:, half:] = gram(right)
    result[:half, half:] = left.T @ right
    result[half:, :half] = result[:half, half:].T
    return result


@dataclass(frozen=True)
class LayerRows:
    """One layer's rows for a batch and a chunk of vectors (:ref:`kfac-rows`).

    Args:
        x: Inputs, shape (N, S, D_in), without the appended 1.
        g: Pseudo-gradients, shape (V, N, S, D_out).
        bias: What a joint bias appends to every row of x; 1 at first, S once the rows are
            summed. None when there is no bias.
        count: The batch's counts on its first chunk of vectors, zero on the others: what belongs
            to the data must enter once.

    Example:
        >>> rows = LayerRows(torch.ones(5, 7, 2), torch.ones(4, 5, 7, 3), 1.0, Count(5, 5))
        >>> rows.outer().shape
        torch.Size([4, 5, 3, 3])
        >>> rows.reduced().bias
        7.0
    """

    x: Tensor
    g: Tensor
    bias: float | None
    count: Count

    @property
    def S(self) -> int:
        """Number of positions that share the weight."""
        return self.x.shape[1]

    def reduced(self) -> "LayerRows":
        """Return the rows summed over the shared axis, with S = 1."""
        bias = None if self.bias is None else self.bias * self.S
        return replace(self, x=self.x.sum(1, True), g=self.g.sum(2, True), bias=bias)

    def input_gram(self) -> Tensor:
        """Return Σ_{n,s} x̃ x̃ᵀ, shape (D_in [+1], D_in [+1])."""
        x = self.x.flatten(0, 1)
        if self.bias is None:
            return gram(x)
        D = x.shape[1]
        joint = x.new_empty(D + 1, D + 1)
        joint[:D, :D] = gram(x)
        joint[D, :D] = joint[:D, D] = self.bias * x.sum(0)
        joint[D, D] = self.bias**2 * len(x)
        return joint

    def output_gram(self) -> Tensor:
        """Return Σ_{v,n,s} g gᵀ, shape (D_out, D_out)."""
        return gram(self.g.flatten(0, 2))

    def outer(self) -> Tensor:
        """Return P_{n,v} = Σ_s g x̃ᵀ, shape (V, N, D_out, D_in [+1])."""
        P = torch.einsum("vnso,nsi->vnoi", self.g, self.x)
        if self.bias is None:
            return P
        return torch.cat([P, self.bias * self.g.sum(2).unsqueeze(-1)], dim=-1)
