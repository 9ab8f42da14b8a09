"""Closed forms at the prediction: what the Hessian of the loss lets one skip.

For every supported loss H_n = ∇²_f c(f_n, y_n) is diagonal, or diagonal minus a matrix of rank one.
Sums over its columns need no columns then, however many classes there are. Explained in the section
:ref:`speed-classes`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OutputHessian:
    """The Hessians H_n of N predictions with C entries each (:ref:`speed-classes`).

    H_n = diag(a_n), or κ_n (diag(p_n) − p_n p_nᵀ) for cross-entropy. In the second form every
    quadratic form is κ_n times a variance under p_n; it is computed from differences, so that
    nothing cancels where p_n is close to a unit vector.

    Args:
        weights: a_n ≥ 0, or p_n, shape (N, C).
        kappa: κ_n, shape (N, 1), in the second form; else None.

    Example:
        >>> H = OutputHessian(torch.tensor([[0.5, 0.5]]), torch.ones(1, 1))
        >>> H.total().tolist()
        [[0.25, -0.25], [-0.25, 0.25]]
    """

    weights: Tensor
    kappa: Tensor | None = None

    def __getitem__(self, keep: Tensor | slice) -> "OutputHessian":
        """Return the Hessians of some of the data."""
        return OutputHessian(self.weights[keep], None if self.kappa is None else self.kappa[keep])

    def total(self) -> Tensor:
        """Return Σ_n H_n, shape (C, C)."""
        if self.kappa is None:
            return torch.diag(self.weights.sum(0))
        # Each row of H_n sums to zero: on the diagonal stands what the others add up to.
        total = (-self.kappa * self.weights).T @ self.weights
        diagonal = total.diagonal()
        diagonal.zero_()
        diagonal.copy_(-total.sum(1))
        return total

    def pulled_back(self, W: Tensor) -> Tensor:
        """Return Wᵀ H_n W for each datum.

        Args:
            W: Shape (C, D).

        Returns:
            Tensor of shape (N, D, D).
        """
        if self.kappa is None and self.weights.stride(0) == 0:  # one Hessian for all
            rows = W * self.weights[0].sqrt().unsqueeze(1)
            return (rows.T @ rows).expand(len(self.weights), -1, -1)
        size = max(1, _ENTRIES // W.numel())
        starts = range(0, len(self.weights), size)
        return torch.cat([_grams(self[start : start + size]._rows(W)) for start in starts])

    def columns(self, W: Tensor) -> Tensor:
        """Return Wᵀ times the columns of a root of H_n, as many as its rank.

        In the second form these are √(κ_n p_k) (w_k − (Wᵀp_n + √p_K w_K) / (1 + √p_K)) for k < K,
        with the rows w_k of W and K = C.

        Args:
            W: Shape (C, D).

        Returns:
            Tensor of shape (V, N, D), with V = C, or C−1 in the second form (but 1 for C = 1).
        """
        if self.kappa is None and self.weights.stride(0) == 0:  # one Hessian for all
            rows = W * self.weights[0].sqrt().unsqueeze(1)
            return rows.unsqueeze(1).expand(-1, len(self.weights), -1)
        if self.kappa is None or W.shape[0] == 1:
            return self._rows(W).transpose(0, 1)
        root = self.weights.sqrt()
        shift = (self.weights @ W + root[:, -1:] * W[-1]) / (1 + root[:, -1:])
        scale = (self.kappa.sqrt() * root[:, :-1]).T
        return (W[:-1].unsqueeze(1) - shift).mul_(scale.unsqueeze(2))

    def quadratic(self, Q: Tensor) -> Tensor:
        """Return qᵀ H_n q for each datum and each column q of Q.

        Args:
            Q: Shape (C, J).

        Returns:
            Tensor of shape (N, J).
        """
        if self.kappa is None:
            return self.weights @ Q.square()
        # The variance of q around its value at the likeliest class, not around zero.
        first = self.weights.argmax(1, keepdim=True)
        others = self.weights.scatter(1, first, 0)
        rest, at_first, mean = others.sum(1, keepdim=True), Q[first[:, 0]], others @ Q
        shift = mean - rest * at_first
        second = others @ Q.square() - 2 * at_first * mean + rest * at_first.square()
        return self.kappa * (second - shift.square()).clamp(min=0)

    def _rows(self, W: Tensor) -> Tensor:
        """Rows (N, C, D) whose Gram matrices are Wᵀ H_n W."""
        if self.kappa is None:
            return self.weights.sqrt().unsqueeze(2) * W
        centred = W - (self.weights @ W).unsqueeze(1)
        return (self.kappa * self.weights).sqrt().unsqueeze(2) * centred


def _grams(rows: Tensor) -> Tensor:
    return rows.mT @ rows


_ENTRIES = 2**20
"""How many entries of the pulled-back columns are held at a time."""
