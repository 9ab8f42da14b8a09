"""One algebra for curvature blocks that are Kronecker products.

Explained in the chapter :ref:`kronecker`. The elements act on *weight-shaped* matrices of shape
(D_out, D_in), which needs no flattening order at all:
(A ⊗ B) cvec(U) = cvec(B U Aᵀ) and (B ⊗ A) rvec(U) = rvec(B U Aᵀ).
"""

from dataclasses import dataclass
from typing import Protocol, Union

import einops
import torch
from torch import Tensor

from kfac_lib.flattening import Order, check_order, cvec, rvec


class Damping(Protocol):
    """A way to invert a Kronecker product plus a multiple of the identity (:ref:`damping`)."""

    @property
    def delta(self) -> float:
        """The multiple of the identity, δ."""

    def inverse(self, kronecker: "Kronecker") -> Union["Kronecker", "EigenKronecker"]:
        """Return the damped inverse."""


@dataclass(frozen=True)
class Kronecker:
    """A ⊗ B for a weight of shape (D_out, D_in), with symmetric factors (:ref:`kron-algebra`).

    Args:
        A: Input-based factor, shape (D_in, D_in).
        B: Grad-output-based factor, shape (D_out, D_out).

    Raises:
        ValueError: If a factor is not a square matrix, or dtype or device of the two differ.

    Example:
        >>> K = Kronecker(A=torch.diag(torch.tensor([1.0, 2.0])), B=torch.tensor([[3.0]]))
        >>> (K @ torch.tensor([[1.0, 1.0]])).tolist()
        [[3.0, 6.0]]
        >>> K.to_dense("cvec").diagonal().tolist()
        [3.0, 6.0]
    """

    A: Tensor
    B: Tensor

    def __post_init__(self) -> None:
        for name, factor in (("A", self.A), ("B", self.B)):
            if factor.ndim != 2 or factor.shape[0] != factor.shape[1]:
                raise ValueError(
                    f"{name} has shape {tuple(factor.shape)}: a factor is a square matrix."
                )
        if self.A.dtype != self.B.dtype or self.A.device != self.B.device:
            raise ValueError(
                f"A is {self.A.dtype} on {self.A.device}, B is {self.B.dtype} on {self.B.device}. "
                "Give both one dtype and one device."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (D_out, D_in) of the matrices that this acts on."""
        return self.B.shape[0], self.A.shape[0]

    def __matmul__(self, U: Tensor) -> Tensor:
        """Return B U Aᵀ for U of shape (..., D_out, D_in)."""
        _check_weight_shaped(U, self.shape)
        return self.B @ U @ self.A.T

    def __mul__(self, scalar: float) -> "Kronecker":
        """Return the element times a number (which goes into A)."""
        return Kronecker(scalar * self.A, self.B)

    __rmul__ = __mul__

    def to_dense(self, order: Order) -> Tensor:
        """Return the matrix on the flattened weight: A ⊗ B for cvec, B ⊗ A for rvec.

        Args:
            order: Flattening of the weight.

        Returns:
            Matrix of shape (D_out · D_in, D_out · D_in).

        Raises:
            ValueError: If the order is unknown.
        """
        if check_order(order) == "cvec":
            return torch.kron(self.A.contiguous(), self.B.contiguous())
        return torch.kron(self.B.contiguous(), self.A.contiguous())

    def inverse(self, damping: Damping | None = None) -> Union["Kronecker", "EigenKronecker"]:
        """Return (A ⊗ B)⁻¹, or the damped inverse that ``damping`` defines.

        Args:
            damping: For example ``Exact(1e-3)``; none for the plain inverse A⁻¹ ⊗ B⁻¹.

        Raises:
            ValueError: If a factor is not positive definite and no damping is given.
        """
        if damping is not None:
            return damping.inverse(self)
        return Kronecker(_spd_inverse(self.A, "A"), _spd_inverse(self.B, "B"))

    def eigh(self) -> "EigenKronecker":
        """Return the eigendecomposition, from those of the two factors."""
        A, Q_A = torch.linalg.eigh(self.A)
        B, Q_B = torch.linalg.eigh(self.B)
        return EigenKronecker(Q_A, Q_B, torch.outer(B, A))

    def power(self, exponent: float) -> "EigenKronecker":
        """Return the matrix power, for example ``-0.5``; eigenvalues below zero count as zero."""
        return self.eigh().power(exponent)

    def trace(self) -> Tensor:
        """Return tr(A) tr(B), a tensor with one entry."""
        return self.A.trace() * self.B.trace()

    def logdet(self) -> Tensor:
        """Return log det(A ⊗ B) = D_out log det A + D_in log det B; −inf where singular."""
        D_out, D_in = self.shape
        return D_out * _logdet(self.A) + D_in * _logdet(self.B)

    def norm(self) -> Tensor:
        """Return the Frobenius norm ‖A‖ ‖B‖."""
        norm: Tensor = torch.linalg.norm(self.A) * torch.linalg.norm(self.B)
        return norm


@dataclass(frozen=True)
class EigenKronecker:
    """(Q_A ⊗ Q_B) diag(λ) (Q_A ⊗ Q_B)ᵀ with free eigenvalues (:ref:`kron-eigen`).

    Not a Kronecker product unless the eigenvalues are an outer product: an exactly damped inverse
    is the usual example.

    Args:
        Q_A: Orthogonal matrix of shape (D_in, D_in).
        Q_B: Orthogonal matrix of shape (D_out, D_out).
        eigenvalues: Weight-shaped tensor (D_out, D_in).

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> E = EigenKronecker(torch.eye(2), torch.eye(1), torch.tensor([[1.0, 4.0]]))
        >>> E.inverse().eigenvalues.tolist()
        [[1.0, 0.25]]
    """

    Q_A: Tensor
    Q_B: Tensor
    eigenvalues: Tensor

    def __post_init__(self) -> None:
        if tuple(self.eigenvalues.shape) != (self.Q_B.shape[0], self.Q_A.shape[0]):
            raise ValueError(
                f"eigenvalues have shape {tuple(self.eigenvalues.shape)}; Q_B and Q_A need "
                f"{(self.Q_B.shape[0], self.Q_A.shape[0])}."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (D_out, D_in) of the matrices that this acts on."""
        return self.Q_B.shape[0], self.Q_A.shape[0]

    def __matmul__(self, U: Tensor) -> Tensor:
        """Return Q_B (λ ⊙ (Q_Bᵀ U Q_A)) Q_Aᵀ for U of shape (..., D_out, D_in)."""
        _check_weight_shaped(U, self.shape)
        return self.Q_B @ (self.eigenvalues * (self.Q_B.T @ U @ self.Q_A)) @ self.Q_A.T

    def to_dense(self, order: Order) -> Tensor:
        """Return the matrix on the flattened weight, of shape (D_out · D_in, D_out · D_in)."""
        if check_order(order) == "cvec":
            Q, eigenvalues = torch.kron(self.Q_A, self.Q_B), cvec(self.eigenvalues)
        else:
            Q, eigenvalues = torch.kron(self.Q_B, self.Q_A), rvec(self.eigenvalues)
        return Q * eigenvalues @ Q.T

    def inverse(self) -> "EigenKronecker":
        """Return the inverse.

        Raises:
            ValueError: If an eigenvalue is not positive.
        """
        if not bool((self.eigenvalues > 0).all()):
            raise ValueError(
                "An eigenvalue is not positive, so there is no inverse. Damp: "
                "Kronecker.inverse(Exact(1e-3))."
            )
        return EigenKronecker(self.Q_A, self.Q_B, 1 / self.eigenvalues)

    def power(self, exponent: float) -> "EigenKronecker":
        """Return the matrix power; eigenvalues below zero, which are rounding, count as zero.

        Raises:
            ValueError: For a negative exponent, if an eigenvalue is not positive.
        """
        if exponent < 0 and not bool((self.eigenvalues > 0).all()):
            raise ValueError(
                f"An eigenvalue is not positive, so there is no power {exponent}. Damp first: "
                "Kronecker.inverse(Exact(1e-3)).power(0.5) for an inverse square root."
            )
        return EigenKronecker(self.Q_A, self.Q_B, self.eigenvalues.clamp(min=0) ** exponent)

    def trace(self) -> Tensor:
        """Return the sum of the eigenvalues."""
        return self.eigenvalues.sum()

    def logdet(self) -> Tensor:
        """Return the sum of the logarithms of the eigenvalues; −inf where singular."""
        return self.eigenvalues.clamp(min=0).log().sum()

    def norm(self) -> Tensor:
        """Return the Frobenius norm."""
        norm: Tensor = torch.linalg.norm(self.eigenvalues)
        return norm


def rearrange(dense: Tensor, shape: tuple[int, int], order: Order) -> Tensor:
    """Rearrange a matrix so that Kronecker products become matrices of rank one.

    See :ref:`kron-nearest`. A ⊗ B (B ⊗ A for rvec) becomes rvec(A) rvec(B)ᵀ; a sum of Kronecker
    products becomes a sum of such matrices, and norms stay what they are.

    Args:
        dense: Matrix on the flattened weight, shape (D_out · D_in, D_out · D_in).
        shape: Shape (D_out, D_in) of the weight.
        order: Flattening of the weight.

    Returns:
        Matrix of shape (D_in², D_out²).

    Raises:
        ValueError: If the order is unknown or the shapes do not fit.

    Source: Van Loan and Pitsianis, *Approximation with Kronecker products*, 1993.

    Example:
        >>> K = Kronecker(A=torch.diag(torch.tensor([1.0, 2.0])), B=torch.tensor([[3.0]]))
        >>> rearrange(K.to_dense("rvec"), K.shape, "rvec").T.tolist()
        [[3.0, 0.0, 0.0, 6.0]]
    """
    D_out, D_in = shape
    if tuple(dense.shape) != (D_out * D_in, D_out * D_in):
        raise ValueError(
            f"The matrix has shape {tuple(dense.shape)}; a weight of shape ({D_out}, {D_in}) needs "
            f"{(D_out * D_in, D_out * D_in)}. With a joint bias D_in counts the appended 1."
        )
    given = "(i o) (j p)" if check_order(order) == "cvec" else "(o i) (p j)"
    return einops.rearrange(dense, f"{given} -> (i j) (o p)", o=D_out, p=D_out)


def nearest_kronecker(dense: Tensor, shape: tuple[int, int], order: Order) -> Kronecker:
    """The Kronecker product that is nearest to a curvature matrix in the Frobenius norm.

    See :ref:`kron-nearest`. Of a positive semi-definite matrix it is the leading singular triple of
    :func:`rearrange`, with positive semi-definite factors, and the squared error that remains is
    the sum of the other squared singular values. Of any other symmetric matrix it is the nearest
    product with symmetric factors. Both factors get the same norm.

    Args:
        dense: Symmetric matrix on the flattened weight, shape (D_out · D_in, D_out · D_in).
        shape: Shape (D_out, D_in) of the weight.
        order: Flattening of the weight.

    Raises:
        ValueError: If the order is unknown, the shapes do not fit, or the matrix is not symmetric
            or not finite.

    Source: Van Loan and Pitsianis, *Approximation with Kronecker products*, 1993.

    Example:
        >>> K = Kronecker(torch.eye(2), torch.tensor([[4.0]]))
        >>> nearest = nearest_kronecker(K.to_dense("cvec"), K.shape, "cvec")
        >>> torch.allclose(nearest.to_dense("cvec"), K.to_dense("cvec"))
        True
    """
    rearranged = rearrange(dense, shape, order)
    tolerance = torch.finfo(dense.dtype).eps ** 0.5 * dense.abs().max()
    if not bool(((dense - dense.T).abs() <= tolerance).all()):
        raise ValueError(
            "The matrix is not symmetric, or holds NaN or inf. Curvature is symmetric: give "
            "(G + G.T) / 2 if the difference is rounding."
        )
    D_out, D_in = shape
    pairs = rearranged.reshape(D_in, D_in, D_out * D_out)
    symmetric = ((pairs + pairs.transpose(0, 1)) / 2).reshape(rearranged.shape)
    left, singular_values, right = torch.linalg.svd(symmetric, full_matrices=False)
    root = singular_values[0].sqrt()
    A, B = root * left[:, 0].reshape(D_in, D_in), root * right[0].reshape(D_out, D_out)
    sign = torch.where(A.trace() < 0, -1, 1)
    return Kronecker(sign * A, sign * B)


def _logdet(factor: Tensor) -> Tensor:
    sign, value = torch.linalg.slogdet(factor)
    return torch.where(sign > 0, value, -torch.inf)


def _spd_inverse(factor: Tensor, name: str) -> Tensor:
    root, info = torch.linalg.cholesky_ex(factor)
    # The squared pivots of a singular matrix end at the rounding of the largest, not at zero.
    pivots = root.diagonal()
    tiny = pivots.min() <= pivots.max() * (len(pivots) * torch.finfo(factor.dtype).eps) ** 0.5
    if int(info) or bool(tiny):
        raise ValueError(
            f"Factor {name} of shape {tuple(factor.shape)} is singular to machine precision, as "
            "factors of real data often are. Damp, or damp more: inverse(Exact(1e-3))."
        )
    return torch.cholesky_inverse(root)


def _check_weight_shaped(U: Tensor, shape: tuple[int, int]) -> None:
    if tuple(U.shape[-2:]) != shape:
        raise ValueError(
            f"The matrix has shape {tuple(U.shape)}, weight-shaped here is (..., {shape[0]}, "
            f"{shape[1]}). With a joint bias append it as the last column: [W b]."
        )
