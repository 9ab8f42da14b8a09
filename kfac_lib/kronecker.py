"""One algebra for curvature blocks that are Kronecker products.

Explained in the chapter :ref:`kronecker`. The elements act on *weight-shaped* matrices of shape
(D_out, D_in), which needs no flattening order at all:
(A ⊗ B) cvec(U) = cvec(B U Aᵀ) and (B ⊗ A) rvec(U) = rvec(B U Aᵀ).
"""

from collections.abc import Sequence
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

    def inverse(
        self, kronecker: Union["Kronecker", "EigenKronecker"]
    ) -> Union["Kronecker", "EigenKronecker"]:
        """Return the damped inverse."""


@dataclass(frozen=True)
class Kronecker:
    """A ⊗ B for a weight of shape (D_out, D_in), with symmetric factors (:ref:`kron-algebra`).

    Args:
        A: Input-based factor, shape (D_in, D_in); or its diagonal, shape (D_in,), if it is a
            diagonal matrix, as that of an Embedding (:ref:`share-embedding`).
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
            diagonal = factor.ndim == 1 and name == "A"
            if not diagonal and (factor.ndim != 2 or factor.shape[0] != factor.shape[1]):
                raise ValueError(
                    f"{name} has shape {tuple(factor.shape)}: a factor is a square matrix (A may "
                    "also be given as the diagonal of a diagonal one)."
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
        return self.B @ (U * self.A if self.A.ndim == 1 else U @ self.A.T)

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
            return torch.kron(_dense(self.A), self.B.contiguous())
        return torch.kron(self.B.contiguous(), _dense(self.A))

    def inverse(self, damping: Damping | None = None) -> Union["Kronecker", "EigenKronecker"]:
        """Return (A ⊗ B)⁻¹, or the damped inverse that ``damping`` defines.

        Args:
            damping: For example ``Exact(1e-3)``; none for the plain inverse A⁻¹ ⊗ B⁻¹.

        Raises:
            ValueError: If a factor is not positive definite and no damping is given.
        """
        if damping is not None:
            return check_damping(damping).inverse(self)
        return Kronecker(_spd_inverse(self.A, "A"), _spd_inverse(self.B, "B"))

    def eigh(self) -> "EigenKronecker":
        """Return the eigendecomposition, from those of the two factors."""
        # Columns lie together in what eigh returns; beside a matrix of rows torch.kron refuses it.
        B, Q_B = _eigh(self.B)
        if self.A.ndim == 1:
            return EigenKronecker(None, Q_B.contiguous(), torch.outer(B, self.A))
        A, Q_A = _eigh(self.A)
        return EigenKronecker(Q_A.contiguous(), Q_B.contiguous(), torch.outer(B, A))

    def power(self, exponent: float) -> "EigenKronecker":
        """Return the matrix power, for example ``-0.5``; eigenvalues below zero count as zero."""
        return self.eigh().power(exponent)

    def trace(self) -> Tensor:
        """Return tr(A) tr(B), a tensor with one entry."""
        return _diagonal(self.A).sum() * self.B.trace()

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
        Q_A: Orthogonal matrix of shape (D_in, D_in); None for the identity.
        Q_B: Orthogonal matrix of shape (D_out, D_out).
        eigenvalues: Weight-shaped tensor (D_out, D_in).

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> E = EigenKronecker(torch.eye(2), torch.eye(1), torch.tensor([[1.0, 4.0]]))
        >>> E.inverse().eigenvalues.tolist()
        [[1.0, 0.25]]
    """

    Q_A: Tensor | None
    Q_B: Tensor
    eigenvalues: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.eigenvalues.shape)
        D_in = shape[-1:] if self.Q_A is None else self.Q_A.shape[:1]
        if len(shape) != 2 or shape != (len(self.Q_B), *D_in):
            raise ValueError(
                f"eigenvalues have shape {shape}; Q_B and Q_A need {(len(self.Q_B), *D_in)}."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (D_out, D_in) of the matrices that this acts on."""
        D_out, D_in = self.eigenvalues.shape
        return D_out, D_in

    def __matmul__(self, U: Tensor) -> Tensor:
        """Return Q_B (λ ⊙ (Q_Bᵀ U Q_A)) Q_Aᵀ for U of shape (..., D_out, D_in)."""
        _check_weight_shaped(U, self.shape)
        if self.Q_A is None:
            return self.Q_B @ (self.eigenvalues * (self.Q_B.T @ U))
        return self.Q_B @ (self.eigenvalues * (self.Q_B.T @ U @ self.Q_A)) @ self.Q_A.T

    def to_dense(self, order: Order) -> Tensor:
        """Return the matrix on the flattened weight, of shape (D_out · D_in, D_out · D_in)."""
        eye = torch.eye(self.shape[1], dtype=self.Q_B.dtype, device=self.Q_B.device)
        Q_A = eye if self.Q_A is None else self.Q_A.contiguous()
        Q_B = self.Q_B.contiguous()
        if check_order(order) == "cvec":
            Q, eigenvalues = torch.kron(Q_A, Q_B), cvec(self.eigenvalues)
        else:
            Q, eigenvalues = torch.kron(Q_B, Q_A), rvec(self.eigenvalues)
        return Q * eigenvalues @ Q.T

    def __mul__(self, scalar: float) -> "EigenKronecker":
        """Return the element times a number."""
        return EigenKronecker(self.Q_A, self.Q_B, scalar * self.eigenvalues)

    __rmul__ = __mul__

    def eigh(self) -> "EigenKronecker":
        """Return the element, which is decomposed already."""
        return self

    def inverse(self, damping: Damping | None = None) -> "EigenKronecker":
        """Return the inverse, or the damped inverse.

        Args:
            damping: ``Exact(δ)``, which adds δ to every eigenvalue; none for the plain inverse.

        Raises:
            ValueError: If an eigenvalue is not positive and no damping is given.
            TypeError: For a damping that needs the two factors, as ``Factored`` does.
        """
        if damping is not None:
            return check_damping(damping).inverse(self)  # type: ignore[return-value]
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


@dataclass(frozen=True)
class BlockDiagonal:
    """One element for each group of rows of a weight, as of a grouped convolution.

    See :ref:`share-groups`. Group g maps its own inputs to the g-th part of the outputs, so on
    rvec([W b]) the matrix is blockdiag(B_g ⊗ A_g); on cvec([W b]) it is that, permuted.

    Args:
        blocks: The elements of the groups, in their order; all with the same D_in.

    Raises:
        ValueError: If there is no block, or their D_in differ.

    Example:
        >>> K = Kronecker(torch.eye(2), torch.tensor([[3.0]]))
        >>> both = BlockDiagonal((K, 2.0 * K))
        >>> (both @ torch.ones(2, 2)).tolist()
        [[3.0, 3.0], [6.0, 6.0]]
        >>> both.to_dense("cvec").diagonal().tolist()
        [3.0, 6.0, 3.0, 6.0]
    """

    blocks: tuple[Kronecker | EigenKronecker, ...]

    def __init__(self, blocks: Sequence[Kronecker | EigenKronecker]) -> None:
        object.__setattr__(self, "blocks", tuple(blocks))
        if len({block.shape[1] for block in self.blocks}) != 1:
            raise ValueError(
                f"The blocks act on matrices of shapes {[block.shape for block in self.blocks]}. "
                "Give at least one, all with the same number of columns."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (D_out, D_in) of the matrices that this acts on; D_in of one group."""
        return sum(block.shape[0] for block in self.blocks), self.blocks[0].shape[1]

    def __matmul__(self, U: Tensor) -> Tensor:
        """Apply each block to its rows of U, of shape (..., D_out, D_in)."""
        _check_weight_shaped(U, self.shape)
        parts = torch.split(U, [block.shape[0] for block in self.blocks], dim=-2)
        return torch.cat(
            [block @ part for block, part in zip(self.blocks, parts, strict=True)], dim=-2
        )

    def __mul__(self, scalar: float) -> "BlockDiagonal":
        """Return the element times a number."""
        return BlockDiagonal([scalar * block for block in self.blocks])

    __rmul__ = __mul__

    def to_dense(self, order: Order) -> Tensor:
        """Return the matrix on the flattened weight, of shape (D_out · D_in, D_out · D_in).

        Raises:
            ValueError: If the order is unknown.
        """
        check_order(order)
        rows: Tensor = torch.block_diag(*[block.to_dense("rvec") for block in self.blocks])  # type: ignore[no-untyped-call]
        if order == "rvec":
            return rows
        o, i = self.shape
        return einops.rearrange(rows, "(o i) (p j) -> (i o) (j p)", o=o, i=i, p=o, j=i)

    def inverse(self, damping: Damping | None = None) -> "BlockDiagonal":
        """Return the (damped) inverse, block by block.

        Raises:
            ValueError: If a block has none; the message names the group.
        """
        inverses = []
        for group, block in enumerate(self.blocks):
            try:
                inverses.append(block.inverse(damping))
            except ValueError as error:
                raise ValueError(f"Group {group}: {error}") from error
        return BlockDiagonal(inverses)

    def eigh(self) -> "BlockDiagonal":
        """Return the eigendecompositions of the blocks."""
        return BlockDiagonal([block.eigh() for block in self.blocks])

    def power(self, exponent: float) -> "BlockDiagonal":
        """Return the matrix power, block by block; see :meth:`EigenKronecker.power`."""
        return BlockDiagonal([block.power(exponent) for block in self.blocks])

    def trace(self) -> Tensor:
        """Return the sum of the blocks' traces."""
        return torch.stack([block.trace() for block in self.blocks]).sum()

    def logdet(self) -> Tensor:
        """Return the sum of the blocks' log-determinants; −inf where one is singular."""
        return torch.stack([block.logdet() for block in self.blocks]).sum()

    def norm(self) -> Tensor:
        """Return the Frobenius norm."""
        norm: Tensor = torch.linalg.norm(torch.stack([block.norm() for block in self.blocks]))
        return norm


Element = Kronecker | EigenKronecker | BlockDiagonal
"""An element of the algebra."""


def check_damping(damping: Damping) -> Damping:
    """Refuse what is no damping, such as a bare number (:ref:`damping`).

    Raises:
        TypeError: If it has no method ``inverse``.

    Example:
        >>> from kfac_lib import Exact
        >>> check_damping(Exact(0.1))
        Exact(delta=0.1)
    """
    if isinstance(damping, type) or not hasattr(damping, "inverse"):
        raise TypeError(
            f"damping={damping!r} is not usable. Give an object: Exact(delta), Factored(delta) or "
            "Plain(delta)."
        )
    return damping


def element(A: Tensor, B: Tensor) -> Kronecker | BlockDiagonal:
    """The element of a pair of factors, or of one pair for each group (:ref:`share-groups`).

    Args:
        A: Shape (D_in, D_in), or (D_in,) if diagonal; (G, D_in, D_in) for G groups.
        B: Shape (D_out, D_out); (G, D_out, D_out) for G groups.

    Example:
        >>> element(torch.ones(2, 3, 3), torch.ones(2, 4, 4)).shape
        (8, 3)
    """
    if B.ndim == 2:
        return Kronecker(A, B)
    return BlockDiagonal([Kronecker(*pair) for pair in zip(A, B, strict=True)])


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


def _dense(factor: Tensor) -> Tensor:
    return torch.diag(factor) if factor.ndim == 1 else factor.contiguous()


def _diagonal(factor: Tensor) -> Tensor:
    return factor if factor.ndim == 1 else factor.diagonal()


def _logdet(factor: Tensor) -> Tensor:
    if factor.ndim == 1:
        return factor.clamp(min=0).log().sum()
    sign, value = torch.linalg.slogdet(factor)
    return torch.where(sign > 0, value, -torch.inf)


def _eigh(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors; in double precision where single precision fails."""
    try:
        eigenvalues, Q = torch.linalg.eigh(factor)
    # As happens to large factors of low rank.
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        eigenvalues, Q = torch.linalg.eigh(factor.double())
    return eigenvalues.to(factor.dtype), Q.to(factor.dtype)


def _spd_inverse(factor: Tensor, name: str) -> Tensor:
    if factor.ndim == 1:
        root, info = factor.clamp(min=0).sqrt(), (factor <= 0).sum()
    else:
        root, info = torch.linalg.cholesky_ex(factor)
    # The squared pivots of a singular matrix end at the rounding of the largest, not at zero.
    smallest, largest = (float(pivot) for pivot in torch.aminmax(_diagonal(root)))
    bound = largest * (len(factor) * torch.finfo(factor.dtype).eps) ** 0.5
    if int(info) != 0 or smallest <= bound:
        raise ValueError(
            f"Factor {name} of shape {tuple(factor.shape)} is singular to machine precision, as "
            "factors of real data often are. Damp, or damp more: inverse(Exact(1e-3))."
        )
    return 1 / factor if factor.ndim == 1 else torch.cholesky_inverse(root)


def _check_weight_shaped(U: Tensor, shape: tuple[int, int]) -> None:
    if tuple(U.shape[-2:]) != shape:
        raise ValueError(
            f"The matrix has shape {tuple(U.shape)}, weight-shaped here is (..., {shape[0]}, "
            f"{shape[1]}). With a joint bias append it as the last column: [W b]."
        )
