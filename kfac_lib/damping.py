"""Inverting A ⊗ B + δ I: the three ways that are in use.

δ is stated for the mean loss; a sum loss takes N·δ. Explained in the section :ref:`kfac-inverse`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_lib.kronecker import EigenKronecker, Kronecker


@dataclass(frozen=True)
class _Delta:
    delta: float

    def __post_init__(self) -> None:
        if not 0 < self.delta < float("inf"):
            raise ValueError(f"delta={self.delta!r}: damping is a positive, finite number.")


class Exact(_Delta):
    """(A ⊗ B + δ I)⁻¹ itself, by eigenvalues 1/(λ_A λ_B + δ) (:ref:`kfac-inverse`).

    Args:
        delta: δ > 0.

    Raises:
        ValueError: If δ is not positive and finite.

    Example:
        >>> K = Kronecker(torch.eye(2), torch.eye(3))
        >>> K.inverse(Exact(1.0)).eigenvalues[0].tolist()
        [0.5, 0.5]
    """

    def inverse(self, kronecker: Kronecker) -> EigenKronecker:
        """Return the damped inverse, in the eigenbasis of the factors."""
        eigen = kronecker.eigh()
        damped = eigen.eigenvalues.clamp(min=0) + self.delta
        return EigenKronecker(eigen.Q_A, eigen.Q_B, 1 / damped)


class Factored(_Delta):
    """(A + π√δ I)⁻¹ ⊗ (B + (√δ/π) I)⁻¹ with π² = mean eigenvalue of A over that of B.

    See :ref:`kfac-inverse`. What is inverted exceeds A ⊗ B + δI in the Loewner order, and does
    not depend on whether the reduction factor R sits in A or in B.

    Args:
        delta: δ > 0.

    Raises:
        ValueError: If δ is not positive and finite.

    Example:
        >>> K = Kronecker(4 * torch.eye(2), torch.eye(3))
        >>> inverse = K.inverse(Factored(1.0))
        >>> round(inverse.A[0, 0].item(), 4), round(inverse.B[0, 0].item(), 4)
        (0.1667, 0.6667)
    """

    def inverse(self, kronecker: Kronecker) -> Kronecker:
        """Return the damped inverse, a Kronecker product."""
        A, B = kronecker.A, kronecker.B
        mean_A, mean_B = A.trace() / len(A), B.trace() / len(B)
        usable = (mean_A > 0) & (mean_B > 0)
        pi = torch.where(usable, mean_A / mean_B.where(usable, 1), 1.0).sqrt()
        root = self.delta**0.5
        return Kronecker(_shift(A, pi * root), _shift(B, root / pi)).inverse()  # type: ignore[return-value]


class Plain(_Delta):
    """(A + δ I)⁻¹ ⊗ (B + δ I)⁻¹: the same δ on both factors (:ref:`kfac-inverse`).

    Depends on where the reduction factor sits, and under-damps where λ_A + λ_B < 1 − δ. Here to
    be compared with, not recommended.

    Args:
        delta: δ > 0.

    Raises:
        ValueError: If δ is not positive and finite.

    Example:
        >>> inverse = Kronecker(torch.eye(2), torch.eye(3)).inverse(Plain(1.0))
        >>> round(inverse.A[0, 0].item(), 4), round(inverse.B[0, 0].item(), 4)
        (0.5, 0.5)
    """

    def inverse(self, kronecker: Kronecker) -> Kronecker:
        """Return the damped inverse, a Kronecker product."""
        A, B = _shift(kronecker.A, self.delta), _shift(kronecker.B, self.delta)
        return Kronecker(A, B).inverse()  # type: ignore[return-value]


def _shift(factor: Tensor, delta: Tensor | float) -> Tensor:
    return factor + delta * torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
