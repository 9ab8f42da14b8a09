"""What a layer's block is in the eigenbasis of KFAC's factors: everything that is linear in it.

With K = Q Λ Qᵀ and the corrected eigenvalues λ* = diag(Qᵀ G Q), the products ⟨G, K⟩ = ⟨λ*, λ⟩ and
tr G = Σ λ* follow, and G − Q diag(λ*) Qᵀ is orthogonal to every matrix that is diagonal in Q.
Explained in the section :ref:`diag-errors`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_lib.accumulate import EigenSums, Sharing, bases_of, constants
from kfac_lib.kfac import require_finite
from kfac_lib.kronecker import BlockDiagonal, EigenKronecker, element
from kfac_lib.losses import Criterion
from kfac_lib.pairs import Stored, is_factored
from kfac_lib.rows import Count, LayerRows, OutputRows, PatchRows, Rows, TokenRows


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of KFAC, and the corrected ones beside them, of one layer.

    See :ref:`diag-errors`. Directions in which both are zero may be left out.

    Args:
        kfac: λ, shape (E,), all groups together.
        corrected: λ* = diag(Qᵀ G Q), shape (E,).

    Example:
        >>> spectrum = Spectrum(torch.tensor([1.0, 2.0]), torch.tensor([1.5, 1.5]))
        >>> spectrum.inner.item(), spectrum.trace_ratio.item()
        (4.5, 1.0)
    """

    kfac: Tensor
    corrected: Tensor

    @property
    def inner(self) -> Tensor:
        """⟨G, K⟩."""
        return self.kfac @ self.corrected

    @property
    def trace_ratio(self) -> Tensor:
        """Tr K / tr G."""
        return self.kfac.sum() / self.corrected.sum()


def spectrum_of(name: str, rows: Stored, sharing: Sharing, criterion: Criterion) -> Spectrum:
    """The spectrum of a layer whose rows are there (:ref:`diag-errors`).

    Where a factor has fewer rows than columns, the eigenvalues of their inner products are taken:
    the others are zero.

    Args:
        name: The layer's name, for messages.
        rows: Its rows.
        sharing: Its sharing.
        criterion: The criterion.

    Raises:
        ValueError: If a factor overflows.

    Example:
        >>> from kfac_lib import Expand
        >>> from kfac_lib.losses import SquaredError
        >>> rows = LayerRows(torch.ones(5, 1, 2), torch.ones(3, 5, 1, 4), None, Count(5, 20))
        >>> spectrum = spectrum_of("fc", rows.double(), Expand(), SquaredError("mean"))
        >>> round(spectrum.trace_ratio.item(), 10)
        1.0
    """
    shared = sharing.rows(rows)
    scale_A, scale_B = constants(criterion, rows.count, sharing, rows.S)
    R = criterion.reduction_factor(rows.count.denominator)
    if is_factored(rows):
        assert isinstance(shared, LayerRows)
        a, x = _rotated(shared.rotated(None)[:, 0])
        b, g = _rotated(shared.g.flatten(0, 2))
        require_finite(name, scale_A * a, scale_B * b)
        of_datum = g.square().reshape(rows.V, len(x), len(b)).sum(0)
        corrected = R * of_datum.T @ x.square()
        return Spectrum(scale_A * scale_B * torch.outer(b, a).flatten(), corrected.flatten())
    A, B = require_finite(name, scale_A * shared.input_gram(), scale_B * shared.output_gram())
    sums = EigenSums(bases_of(element(A, B)))
    sums.update(rows)
    return spectrum_from(sums, criterion)


def spectrum_from(sums: EigenSums, criterion: Criterion) -> Spectrum:
    """The spectrum from the sums of EKFAC, in double precision (:ref:`diag-errors`).

    Example:
        >>> from kfac_lib import Kronecker
        >>> from kfac_lib.losses import SquaredError
        >>> sums = EigenSums(bases_of(Kronecker(torch.eye(2), torch.eye(4))))
        >>> sums.update(LayerRows(torch.ones(5, 1, 2), torch.ones(3, 5, 1, 4), None, Count(5, 20)))
        >>> spectrum_from(sums, SquaredError("mean")).corrected.shape
        torch.Size([8])
    """
    corrected = sums.finish(criterion)
    blocks = corrected.blocks if isinstance(corrected, BlockDiagonal) else [corrected]
    kfac = [basis.eigenvalues for basis in sums.basis]
    lam = [block.eigenvalues for block in blocks if isinstance(block, EigenKronecker)]
    return Spectrum(*(torch.cat([p.double().flatten() for p in parts]) for parts in (kfac, lam)))


class Energies:
    """Squared lengths of inputs and pseudo-gradients, row by row (:ref:`diag-energy`).

    An accumulator. a = ‖x̃‖² and b = Σ_v ‖g‖² for every datum and shared position. KFAC takes the
    mean of products for the product of means; the covariance of a and b is the trace of what it
    leaves out.

    Args:
        sharing: Expand or reduce; the rows are those that KFAC sees.

    Example:
        >>> from kfac_lib import Expand
        >>> x, g = torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[[[3.0]], [[6.0]]]])
        >>> energies = Energies(Expand())
        >>> energies.update(LayerRows(x, g, None, Count(2, 2)))
        >>> round(energies.correlation(), 6), round(energies.excess(), 6)
        (1.0, 0.36)
    """

    def __init__(self, sharing: Sharing) -> None:
        self.sharing = sharing
        self.count = Count(0, 0)
        self._a: list[Tensor] = []
        self._b: list[Tensor] = []
        self._of_groups: list[list[float]] = []

    def update(self, rows: Rows) -> None:
        """Add the rows of a batch, or of a further chunk of its vectors."""
        if rows.g.shape[1] == 0:
            return  # a batch whose labels are all ignored
        rows = rows.occurring() if isinstance(rows, TokenRows) else rows
        shared = self.sharing.rows(rows)
        first = bool(rows.count.N) or not self._a
        a, b = _input_energies(shared), shared.g.double().square().sum((0, 3))
        if first:
            self._a.append(a)
            self._b.append(b)
        else:
            self._b[-1] += b
        groups: Sequence[Rows] = shared.split()
        pairs = [(a, b)]
        if len(groups) > 1:
            pairs = [(_input_energies(one), one.g.double().square()) for one in groups]
        self._of_groups = self._of_groups or [[0.0, 0.0] for _ in groups]
        for sums, (of_inputs, of_outputs) in zip(self._of_groups, pairs, strict=True):
            sums[0] += float(of_inputs.sum()) if first else 0.0
            sums[1] += float(of_outputs.sum())
        self.count = self.count.plus(rows.count)

    def correlation(self) -> float:
        """Correlation of a and b; NaN where one of them does not vary."""
        a, b = self._centred()
        return float((a @ b) / (a.norm() * b.norm()))

    def excess(self) -> float:
        """Covariance of a and b over the product of their means.

        For S = 1 and one group it is tr G / tr K − 1.
        """
        a, b = self._flat()
        return float((a * b).mean() / (a.mean() * b.mean()) - 1)

    def trace(self, criterion: Criterion, S: int) -> float:
        """Return tr K for this sharing, of a layer with S shared positions."""
        scale_A, scale_B = constants(criterion, self.count, self.sharing, S)
        return scale_A * scale_B * sum(a * b for a, b in self._of_groups)

    def half(self) -> int:
        """Return the smallest number of data that hold half of Σ_n (Σ_s a b)²."""
        of_data = [(a * b).sum(1).square() for a, b in zip(self._a, self._b, strict=True)]
        shares = torch.cat(of_data).sort(descending=True).values.cumsum(0)
        return int((shares < shares[-1] / 2).sum()) + 1

    def _flat(self) -> tuple[Tensor, Tensor]:
        a, b = (torch.cat([part.flatten() for part in parts]) for parts in (self._a, self._b))
        return a, b

    def _centred(self) -> tuple[Tensor, Tensor]:
        # What varies by rounding alone does not vary.
        a, b = self._flat()
        eps = 1e-12
        return tuple(  # type: ignore[return-value]
            (one - one.mean()) * float(one.std(correction=0) > eps * one.abs().mean())
            for one in (a, b)
        )


def _input_energies(rows: Rows) -> Tensor:
    if isinstance(rows, TokenRows):
        return (rows.tokens >= 0).double()
    assert isinstance(rows, LayerRows | PatchRows | OutputRows)
    bias = 0.0 if rows.bias is None else rows.bias
    return rows.x.double().square().sum(2) + bias**2


def _rotated(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of rowsᵀ rows, without some that are zero, and the rows in its eigenbasis."""
    many, D = rows.shape
    if many >= D:
        eigenvalues, Q = torch.linalg.eigh(rows.T @ rows)
        return eigenvalues.clamp(min=0), rows @ Q
    # With rows = U √Λ Qᵀ the rotated rows are U √Λ.
    eigenvalues, U = torch.linalg.eigh(rows @ rows.T)
    eigenvalues = eigenvalues.clamp(min=0)
    return eigenvalues, U * eigenvalues.sqrt()
