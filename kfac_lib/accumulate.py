"""Accumulators: consumers of the stream that hold raw sums and counts.

Sums of batches, or of processes, merge; constants are applied once, at the end, by one function.
Explained in the section :ref:`kfac-batches`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from kfac_lib.flattening import Order, flatten
from kfac_lib.kronecker import BlockDiagonal, EigenKronecker, Kronecker
from kfac_lib.losses import Criterion
from kfac_lib.rows import Count, Rows


class Sharing(Protocol):
    """A way to treat the positions that share a weight (:ref:`share-axis`)."""

    def rows(self, rows: Rows) -> Rows:
        """Return the rows whose outer products are summed."""

    def divisor(self, S: int) -> int:
        """Return the constant by which B is divided, next to N."""


@dataclass(frozen=True)
class Expand:
    """Treat every position like a datum of its own (:ref:`share-expand`).

    Exact where positions do not meet again behind the layer, each with a loss of its own.

    Example:
        >>> Expand().divisor(S=7)
        7
    """

    def rows(self, rows: Rows) -> Rows:
        """Return the rows as they are."""
        return rows

    def divisor(self, S: int) -> int:
        """Return S."""
        return S


@dataclass(frozen=True)
class Reduce:
    """Sum a datum's positions before the outer product (:ref:`share-reduce`).

    Exact where positions are summed, or averaged, behind the layer before anything else happens.

    Example:
        >>> Reduce().divisor(S=7)
        49
    """

    def rows(self, rows: Rows) -> Rows:
        """Return the rows summed over the shared axis."""
        return rows.reduced()

    def divisor(self, S: int) -> int:
        """Return S²."""
        return S**2


Choice = Sharing | Mapping[str, Sharing] | Callable[[str], Sharing]
"""One sharing for all layers, one for each pattern of names, or a function of the name."""


def sharing_of(sharing: Choice, names: Sequence[str]) -> dict[str, Sharing]:
    """Decide each layer's sharing (:ref:`share-choice`).

    Args:
        sharing: :class:`Expand` or :class:`Reduce` for all; or a mapping from names or
            :mod:`fnmatch` patterns to one of them, of which the first that matches decides, and
            expand where none does; or a function of the layer's name.
        names: Names of the layers.

    Returns:
        The sharing of each layer.

    Raises:
        TypeError: If it is something else, or the mapping or function gives something else.
        ValueError: If a pattern matches no layer.

    Example:
        >>> sharing_of({"conv*": Reduce()}, ["conv1", "head"])
        {'conv1': Reduce(), 'head': Expand()}
    """
    if isinstance(sharing, Mapping):
        patterns = {pattern: _checked(one) for pattern, one in sharing.items()}
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(
                    f"sharing: the key {pattern!r} is no string. Give names or patterns, such as "
                    f'{{"conv*": Reduce()}}. The layers are {", ".join(names)}.'
                )
            if not any(_fits(name, pattern) for name in names):
                raise ValueError(
                    f"sharing: {pattern!r} matches no layer. The layers are {', '.join(names)}."
                )
        return {
            name: next((one for pattern, one in patterns.items() if _fits(name, pattern)), Expand())
            for name in names
        }
    if not _is_sharing(sharing) and not isinstance(sharing, type) and callable(sharing):
        return {name: _checked(sharing(name)) for name in names}
    return dict.fromkeys(names, _checked(sharing))


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
        >>> from kfac_lib.rows import LayerRows
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

    def update(self, rows: Rows) -> None:
        """Add the rows of a batch, or of a further chunk of its vectors.

        Raises:
            ValueError: If S differs from that of the rows before.
        """
        self.S = _same_S(self.S, rows.S)
        shared = self.sharing.rows(rows)
        if rows.count.N:
            self.xx = _add_to(self.xx, shared.input_gram())
        self.gg = _add_to(self.gg, shared.output_gram())
        self.vectors += rows.V
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
        zero = torch.zeros_like
        self.xx = _add(zero(other.xx) if self.xx is None else self.xx, other.xx)
        self.gg = _add(zero(other.gg) if self.gg is None else self.gg, other.gg)
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

        Returns:
            A of shape (D_in [+1], D_in [+1]), or (D_in,) if it is diagonal, and B of shape
            (D_out, D_out); of a grouped convolution one of each for every group, stacked.

        Raises:
            ValueError: If there were no rows.
        """
        if self.S is None or self.xx is None or self.gg is None:
            raise ValueError("No rows were accumulated, so there are no factors.")
        scale_A, scale_B = constants(criterion, self.count, self.sharing, self.S)
        if self.vectors == 0:
            one = torch.eye(self.gg.shape[-1], dtype=self.gg.dtype, device=self.gg.device)
            return scale_A * self.xx, one.expand_as(self.gg).clone()
        return scale_A * self.xx, scale_B * self.gg


class ExactBlocks:
    """The exact block of one layer, R Σ_{n,v} vec(P_{n,v}) vec(P_{n,v})ᵀ (:ref:`kfac-sum`).

    Args:
        order: Flattening of the weight-shaped P.

    Example:
        >>> from kfac_lib.losses import SquaredError
        >>> from kfac_lib.rows import LayerRows
        >>> block = ExactBlocks("cvec")
        >>> block.update(LayerRows(torch.ones(5, 1, 2), torch.ones(3, 5, 1, 4), None, Count(5, 20)))
        >>> block.finish(SquaredError("mean")).shape
        torch.Size([8, 8])
    """

    def __init__(self, order: Order) -> None:
        self.order = order
        self.count = Count(0, 0)
        self.sum: Tensor | None = None

    def update(self, rows: Rows) -> None:
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

    def scaled(self, weight: float) -> "ExactBlocks":
        """Return sum and counts times a weight, for a weighted average over batches."""
        result = ExactBlocks(self.order)
        result.count = self.count.scaled(weight)
        result.sum = None if self.sum is None else weight * self.sum
        return result

    def finish(self, criterion: Criterion) -> Tensor:
        """Return the block, of shape (D, D), D = D_out · D_in.

        Raises:
            ValueError: If there were no rows.
        """
        if self.sum is None:
            raise ValueError("No rows were accumulated, so there is no block.")
        return criterion.reduction_factor(self.count.denominator) * self.sum


class EigenSums:
    """Raw sums of the corrected eigenvalues of one layer (:ref:`ekfac-correction`).

    Σ_{n,v} [Q_Bᵀ P_{n,v} Q_A]², entry by entry, in the eigenbasis of given factors.

    Args:
        basis: The decomposed factors, one for each group of the layer.
        part: What of [W b] the factors belong to.

    Example:
        >>> from kfac_lib.losses import SquaredError
        >>> from kfac_lib.rows import LayerRows
        >>> basis = EigenKronecker(torch.eye(2), torch.eye(4), torch.zeros(4, 2))
        >>> sums = EigenSums([basis])
        >>> sums.update(LayerRows(torch.ones(5, 1, 2), torch.ones(3, 5, 1, 4), None, Count(5, 20)))
        >>> sums.finish(SquaredError("mean")).eigenvalues[0, 0].item()
        1.5
    """

    def __init__(
        self,
        basis: Sequence[EigenKronecker],
        part: Literal["joint", "weight", "bias"] = "joint",
    ) -> None:
        self.basis, self.part = tuple(basis), part
        self.count = Count(0, 0)
        self.sums: list[Tensor] | None = None

    def update(self, rows: Rows) -> None:
        """Add the rows of a batch, or of a further chunk of its vectors."""
        groups: Sequence[Rows] = rows.part(self.part).split()
        squares = [
            of_group.squares(basis.Q_A, basis.Q_B)
            for basis, of_group in zip(self.basis, groups, strict=True)
        ]
        mine: Sequence[Tensor | None] = self.sums or [None] * len(squares)
        self.sums = [_add(total, term) for total, term in zip(mine, squares, strict=True)]
        self.count = self.count.plus(rows.count)

    def merge(self, other: "EigenSums") -> None:
        """Add the sums of another accumulator of the same layer and basis, over other data.

        Raises:
            ValueError: If the bases differ.
        """
        if self.part != other.part or not _same_bases(self.basis, other.basis):
            raise ValueError("Corrected eigenvalues in different bases do not add up.")
        if other.sums is not None:
            mine: Sequence[Tensor | None] = self.sums or [None] * len(other.sums)
            self.sums = [_add(total, term) for total, term in zip(mine, other.sums, strict=True)]
            self.count = self.count.plus(other.count)

    def scaled(self, weight: float) -> "EigenSums":
        """Return sums and counts times a weight, for a weighted average over batches."""
        result = EigenSums(self.basis, self.part)
        result.count = self.count.scaled(weight)
        result.sums = None if self.sums is None else [weight * total for total in self.sums]
        return result

    def turned(self, basis: Sequence[EigenKronecker]) -> "EigenSums":
        """Return the sums in another basis: the diagonal there of what they are a diagonal of here.

        (Q_B′ᵀ Q_B)² S (Q_Aᵀ Q_A′)² with entrywise squares; the total of all entries stays.
        """
        result = EigenSums(basis, self.part)
        result.count = self.count
        if self.sums is not None:
            triples = zip(self.basis, result.basis, self.sums, strict=True)
            result.sums = [_turned(total, old, new) for old, new, total in triples]
        return result

    def finish(self, criterion: Criterion) -> EigenKronecker | BlockDiagonal:
        """Return the element with the corrected eigenvalues, R times the sums.

        Raises:
            ValueError: If there were no rows.
        """
        if self.sums is None:
            raise ValueError("No rows were accumulated, so there are no eigenvalues.")
        R = criterion.reduction_factor(self.count.denominator)
        blocks = [
            EigenKronecker(basis.Q_A, basis.Q_B, R * total)
            for basis, total in zip(self.basis, self.sums, strict=True)
        ]
        return blocks[0] if len(blocks) == 1 else BlockDiagonal(blocks)


def bases_of(element: Kronecker | BlockDiagonal) -> list[EigenKronecker]:
    """The eigenbases of an element's factors, one for each group (:ref:`ekfac-basis`).

    Factors in half precision are decomposed in single precision.

    Example:
        >>> len(bases_of(Kronecker(torch.eye(2), torch.eye(3))))
        1
    """
    blocks = element.blocks if isinstance(element, BlockDiagonal) else (element,)
    return [_eigh(block) for block in blocks]


def _eigh(block: Kronecker | EigenKronecker) -> EigenKronecker:
    if isinstance(block, EigenKronecker):
        return block
    dtype = block.B.dtype
    wide = torch.promote_types(dtype, torch.float32)
    eigen = Kronecker(block.A.to(wide), block.B.to(wide)).eigh()
    Q_A = None if eigen.Q_A is None else eigen.Q_A.to(dtype)
    return EigenKronecker(Q_A, eigen.Q_B.to(dtype), eigen.eigenvalues.to(dtype))


def _turned(total: Tensor, old: EigenKronecker, new: EigenKronecker) -> Tensor:
    total = (new.Q_B.T @ old.Q_B).square() @ total
    if old.Q_A is None or new.Q_A is None:
        return total
    return total @ (old.Q_A.T @ new.Q_A).square()


def _same_bases(these: Sequence[EigenKronecker], those: Sequence[EigenKronecker]) -> bool:
    def same(a: Tensor | None, b: Tensor | None) -> bool:
        return a is b or (a is not None and b is not None and torch.equal(a, b))

    return len(these) == len(those) and all(
        same(a.Q_A, b.Q_A) and same(a.Q_B, b.Q_B) for a, b in zip(these, those, strict=True)
    )


def _is_sharing(given: Any) -> bool:
    return not isinstance(given, type) and hasattr(given, "rows") and hasattr(given, "divisor")


def _checked(given: Any) -> Sharing:
    if not _is_sharing(given):
        raise TypeError(
            f"sharing={given!r} is not usable. Give an object: Expand() or Reduce(), a mapping "
            'such as {"conv*": Reduce()}, or a function from a layer\'s name to one of them.'
        )
    sharing: Sharing = given
    return sharing


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)


def _add(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term


def _add_to(total: Tensor | None, term: Tensor) -> Tensor:
    """As :func:`_add`, in place: for a sum and a term that nobody else holds."""
    return term if total is None else total.add_(term)


def _same_S(known: int | None, S: int) -> int:
    if known not in (None, S):
        raise ValueError(
            f"A layer's weight is shared over {known} positions in one batch and over {S} in "
            "another. KFAC needs one S for all data: pad, or group the data by length."
        )
    return S
