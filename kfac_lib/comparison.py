"""The passes of :func:`~kfac_lib.diagnose`: what is kept, what is compared, what is summed.

Explained in the sections :ref:`diag-norms` and :ref:`diag-subsample`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_lib.accumulate import EigenSums, Expand, FactorSums, Reduce, Sharing, bases_of
from kfac_lib.capture import Source
from kfac_lib.ekfac import same_draws
from kfac_lib.fisher import Fisher
from kfac_lib.kfac import Accumulator, Both, accumulate, require_finite
from kfac_lib.kronecker import EigenKronecker, Kronecker, element
from kfac_lib.losses import Criterion
from kfac_lib.pairs import (
    PairSums,
    RowStore,
    Stored,
    best_product,
    contracted,
    diagonal_sums,
    is_factored,
    pair_sums,
)
from kfac_lib.rows import Count, Rows, TokenRows
from kfac_lib.spectra import Energies, Spectrum, spectrum_from, spectrum_of
from kfac_lib.stream import Data, repeated

PASSES = 20
"""Most passes over all data for the nearest product, once it is known for the sample."""

GAIN = 1e-3
"""They end when a pass adds less than this share to what the product explains."""


class Found(NamedTuple):
    """What the figures of a diagnosis are computed from (:ref:`diag-norms`).

    Args:
        N: Number of all data.
        R: Reduction factor over all data.
        pairs: Pairs of the data that were compared.
        spectra: For each layer what is linear in its block.
        energies: For each layer the lengths of its rows.
        others: The same under the other sharing, for layers with shared positions.
        diagonals: For each layer the part of its pairs that EKFAC explains; None if all data were
            compared, when it is known without them.
        best: For each layer ‖G‖² less the squared distance to the nearest Kronecker product.
        shapes: For each layer the shape of a weight-shaped matrix.
        positions: For each layer the number S of positions that share the weight.
    """

    N: int
    R: float
    pairs: PairSums
    spectra: dict[str, Spectrum]
    energies: dict[str, Energies]
    others: dict[str, Energies]
    diagonals: PairSums | None
    best: dict[str, Tensor]
    shapes: dict[str, tuple[int, int]]
    positions: dict[str, int]


@dataclass
class Comparison:
    """Runs a model for a diagnosis (:ref:`diag-norms`).

    Args:
        source: What runs the model.
        criterion: The criterion.
        data: One pair (X, y), or an iterable of them.
        fisher: The flavour.
        sharing: Each layer's sharing.
        chunk_size: How many vectors are backpropagated at once.
        limit: Bytes of rows that may be kept.

    Example:
        >>> from torch import nn
        >>> from kfac_lib import Expand, TypeII
        >>> from kfac_lib.capture import Hooks
        >>> from kfac_lib.losses import SquaredError
        >>> data, net = (torch.ones(5, 2), torch.zeros(5, 3)), Hooks(nn.Linear(2, 3))
        >>> run = Comparison(net, SquaredError("mean"), data, TypeII(), {"": Expand()}, None, 10**6)
        >>> run.of_all().N
        5
    """

    source: Source
    criterion: Criterion
    data: Data
    fisher: Fisher
    sharing: Mapping[str, Sharing]
    chunk_size: int | None
    limit: int

    def __post_init__(self) -> None:
        self._rewind = same_draws(self.fisher, self.data)
        self.data = repeated(self.data, in_order=hasattr(self.fisher, "generator"))

    def of_all(self) -> Found:
        """Keep the rows of all data in one pass, and compare them.

        Raises:
            ValueError: If they need more memory than allowed.
        """
        rows = self._kept(None)
        shapes = {name: _shape(of_layer) for name, of_layer in rows.items()}
        energies, others = self._energies()
        for name, of_layer in rows.items():
            energies[name].update(of_layer)
            if of_layer.S > 1:
                others[name].update(of_layer)
        rows = {name: _without_gaps(of_layer) for name, of_layer in rows.items()}
        self._check_squares(rows)
        count = next(iter(rows.values())).count
        R = self.criterion.reduction_factor(count.denominator)
        return Found(
            int(count.N),
            R,
            pair_sums(list(rows.values())),
            {
                name: spectrum_of(name, of_layer, self.sharing[name], self.criterion)
                for name, of_layer in rows.items()
            },
            energies,
            others,
            None,
            {name: R**2 * _squared(_nearest(of_layer)) for name, of_layer in rows.items()},
            shapes,
            {name: of_layer.S for name, of_layer in rows.items()},
        )

    def of_some(self, size: int, generator: torch.Generator | None) -> Found:
        """Compare a random sample of the data; what is linear comes from all, in passes.

        Raises:
            ValueError: If the sample needs more memory than allowed.
        """
        factors = {name: FactorSums(one) for name, one in self.sharing.items()}
        energies, others = self._energies()
        self._pass({name: Both((factors[name], energies[name], others[name])) for name in factors})
        count = next(iter(factors.values())).count
        chosen = torch.randperm(int(count.N), generator=generator)[:size].sort().values
        rows = self._kept(chosen)
        self._check_squares(rows)
        of_kfac, nearest = {}, {}
        for name, of_layer in factors.items():
            A, B = require_finite(name, *of_layer.finish(self.criterion))
            of_kfac[name] = EigenSums(bases_of(element(A, B)))
            nearest[name] = Nearer([_as(K, A) for K in _nearest(rows[name])])
        self._pass({name: Both((of_kfac[name], nearest[name])) for name in factors})
        for _ in range(PASSES):
            nearer = {name: Nearer(of_layer.nearer()) for name, of_layer in nearest.items()}
            self._pass(nearer)
            gains = [float(nearer[name].along() / nearest[name].along()) - 1 for name in nearer]
            nearest = nearer
            # A layer without curvature gains 0 / 0.
            if not any(gain > GAIN for gain in gains):
                break
        by_layer = [
            diagonal_sums(of_layer, [_wide(one) for one in of_kfac[name].basis])
            for name, of_layer in rows.items()
        ]
        diagonals = PairSums(
            torch.stack([one.rows for one in by_layer], dim=1),
            torch.stack([one.own for one in by_layer], dim=1),
        )
        R = self.criterion.reduction_factor(count.denominator)
        return Found(
            int(count.N),
            R,
            pair_sums(list(rows.values())),
            {name: spectrum_from(sums, self.criterion) for name, sums in of_kfac.items()},
            energies,
            others,
            diagonals,
            {name: R**2 * of_layer.along() for name, of_layer in nearest.items()},
            {name: _shape(of_layer) for name, of_layer in rows.items()},
            {name: of_layer.S for name, of_layer in rows.items()},
        )

    def _energies(self) -> tuple[dict[str, Energies], dict[str, Energies]]:
        """Accumulators of lengths, for each layer's sharing and for the other one."""
        return (
            {name: Energies(one) for name, one in self.sharing.items()},
            {
                name: Energies(Expand() if isinstance(one, Reduce) else Reduce())
                for name, one in self.sharing.items()
            },
        )

    def _check_squares(self, rows: Mapping[str, Stored]) -> None:
        """Refuse layers whose P of one datum, and factor of the nearest product, are too large."""
        for name, one in rows.items():
            D_out, D_in = _shape(one)
            taken = 8 * (max(1, one.V) * D_out * D_in + 2 * D_in**2)
            if not is_factored(one) and taken > self.limit:
                raise ValueError(
                    f"For layer {name!r} the matrices P of one datum and the factor of the nearest "
                    f"product, {D_in} × {D_in}, take {_size(taken)}, max_memory is "
                    f"{_size(self.limit)}. Leave the layer out with ignore={name!r}, or give more "
                    "memory."
                )

    def rewind(self) -> None:
        """Go back to where the random vectors of the first pass were drawn."""
        self._rewind()

    def _kept(self, chosen: Tensor | None) -> dict[str, Stored]:
        stores = {name: RowStore(chosen) for name in self.sharing}
        everyone = list(stores.values())
        watched = {name: _Watched(one, everyone, self.limit) for name, one in stores.items()}
        self._pass(watched, joint=True)
        _check_size(everyone, self.limit)
        return {name: store.rows() for name, store in stores.items()}

    def _pass(self, accumulators: Mapping[str, Accumulator], joint: bool = False) -> None:
        self._rewind()
        accumulate(
            accumulators,
            self.source,
            self.criterion,
            self.data,
            self.fisher,
            self.chunk_size,
            joint=joint,
        )


class Nearer:
    """One step of the power method over a pass of the data (:ref:`diag-subsample`).

    An accumulator: it adds up Σ P A Pᵀ and Σ Pᵀ B P, of which the next product is made.

    Args:
        products: The present product A ⊗ B of each group.

    Example:
        >>> from kfac_lib.rows import LayerRows
        >>> rows = LayerRows(torch.ones(5, 1, 2), torch.ones(4, 5, 1, 3), None, Count(5, 5))
        >>> step = Nearer([Kronecker(torch.eye(2), torch.eye(3))])
        >>> step.update(rows)
        >>> round(step.along().item()), step.nearer()[0].A.tolist()  # (5 · 4 · 2 · 3)² / (2 · 3)
        (2400, [[0.5, 0.5], [0.5, 0.5]])
    """

    def __init__(self, products: Sequence[Kronecker]) -> None:
        self.products = products
        self.count = Count(0, 0)
        self.sums: list[tuple[Tensor, Tensor]] = []

    def update(self, rows: Rows) -> None:
        """Add the rows of a batch, or of a further chunk of its vectors."""
        groups: Sequence[Rows] = rows.split()
        found = [contracted(one, K) for one, K in zip(groups, self.products, strict=True)]
        before = self.sums or [(torch.zeros_like(A), torch.zeros_like(B)) for A, B in found]
        self.sums = [(a + A, b + B) for (a, b), (A, B) in zip(before, found, strict=True)]
        self.count = self.count.plus(rows.count)

    def along(self) -> Tensor:
        """Return ⟨G, A ⊗ B⟩² / ‖A ⊗ B‖², without R, added up over the groups."""
        shares = [
            (K.B * B).sum().double().square() / K.norm().double().square()
            for K, (_, B) in zip(self.products, self.sums, strict=True)
        ]
        return torch.stack(shares).sum()

    def nearer(self) -> list[Kronecker]:
        """Return the next products, of norm 1."""
        return [Kronecker(A / A.norm(), B / B.norm()) for A, B in self.sums]


@dataclass
class _Watched:
    """One layer's store; when all of them take too much memory, they only count."""

    store: RowStore
    all_stores: Sequence[RowStore]
    limit: int

    @property
    def count(self) -> Count:
        return self.store.count

    def update(self, rows: Rows) -> None:
        self.store.update(rows)
        if sum(one.nbytes for one in self.all_stores) > self.limit:
            for one in self.all_stores:
                one.forget()


def _check_size(stores: Sequence[RowStore], limit: int) -> None:
    taken, kept = sum(one.nbytes for one in stores), stores[0].kept
    if taken > limit:
        fitting = int(kept * limit / taken)
        way = f"Compare fewer data: subsample={fitting}; or use" if fitting >= 3 else "Use"
        raise ValueError(
            f"The rows of {kept} data with {stores[0].vectors} vectors each take {_size(taken)}, "
            f"max_memory is {_size(limit)}. {way} a flavour with fewer vectors, such as "
            "MonteCarlo(), or more memory."
        )


def _without_gaps(rows: Stored) -> Stored:
    return rows.occurring() if isinstance(rows, TokenRows) else rows


def _nearest(rows: Stored) -> list[Kronecker]:
    """The nearest product of each group's block, without R."""
    return [Kronecker(*best_product(one)) for one in rows.split()]


def _wide(basis: EigenKronecker) -> EigenKronecker:
    Q_A = None if basis.Q_A is None else basis.Q_A.double()
    return EigenKronecker(Q_A, basis.Q_B.double(), basis.eigenvalues.double())


def _as(product: Kronecker, like: Tensor) -> Kronecker:
    return Kronecker(product.A.to(like), product.B.to(like))


def _squared(products: list[Kronecker]) -> Tensor:
    return torch.stack([K.norm() ** 2 for K in products]).sum()


def _shape(rows: Stored) -> tuple[int, int]:
    if isinstance(rows, TokenRows):
        return rows.g.shape[-1], rows.num_embeddings
    D_out, D_in = rows.of_data(slice(0, 1)).outer().shape[2:]
    return D_out, D_in


def _size(many: float) -> str:
    return f"{many / 2**30:.3g} GiB" if many >= 2**29 else f"{many / 2**20:.3g} MiB"
