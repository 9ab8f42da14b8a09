"""Inner products between the rows of different data: norms of matrices that are never formed.

A layer's block is G = R Σ_{n,v} vec(P_{n,v}) vec(P_{n,v})ᵀ. Its norm, and that of a block between
two layers, need the inner products ⟨P_{n,v}, P_{m,w}⟩ alone; for a layer without shared positions
these are (x̃_n · x̃_m)(g_{n,v} · g_{m,w}). Explained in the section :ref:`diag-norms`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfac_lib.kronecker import EigenKronecker, Kronecker
from kfac_lib.rows import Count, LayerRows, OutputRows, PatchRows, Rows, TokenRows

Stored = LayerRows | TokenRows | PatchRows
"""Rows whose vectors are there, one by one."""

WORKSPACE = 2**26
"""Bytes of inner products, and of explicit P, that are held at a time."""

ITERATIONS = 1000
"""Most iterations of the power method."""


class RowStore:
    """Keeps the rows of one layer, of all data or of some (:ref:`diag-norms`).

    An accumulator. What it keeps is in double precision, whatever the model's; ``kept`` is the
    number of data, ``vectors`` that of vectors, ``nbytes`` what they take.

    Args:
        chosen: Which data to keep, as ascending indices in the order in which they come, not
            counting those whose labels are all ignored; all when not given.

    Example:
        >>> store = RowStore(torch.tensor([1, 4]))
        >>> x, g = torch.ones(3, 1, 2), torch.ones(4, 3, 1, 2)
        >>> for _ in range(2):
        ...     store.update(LayerRows(x, g, None, Count(3, 3)))
        >>> store.rows().g.shape
        torch.Size([4, 2, 1, 2])
    """

    def __init__(self, chosen: Tensor | None = None) -> None:
        self.count = Count(0, 0)
        self.kept = 0
        self.vectors = 0
        self.nbytes = 0
        self._chosen = chosen
        self._some: slice | Tensor = slice(None)
        self._batches: list[Stored] = []
        self._g: list[list[Tensor]] = []
        self._forgotten = False

    def update(self, rows: Rows) -> None:
        """Keep the rows of a batch, or of a further chunk of its vectors.

        Raises:
            TypeError: For rows in closed form.
            ValueError: If S differs from that of the rows before.
        """
        if isinstance(rows, OutputRows):
            raise TypeError("Rows in closed form have no vectors. Stream with joint=True.")
        if rows.g.shape[1] == 0:
            return  # a batch whose labels are all ignored
        first = bool(rows.count.N) or not self._g
        if first:
            if self._chosen is not None:
                places = self._chosen - int(self.count.N)
                self._some = places[(places >= 0) & (places < rows.count.N)].to(rows.g.device)
            self.count = self.count.plus(rows.count)
            self.vectors = 0
        some = rows.of_data(self._some).double()
        self.kept += some.g.shape[1] * first
        self.vectors += rows.V
        self.nbytes += bytes_of(some, inputs=first)
        if self._forgotten:
            return
        if self._batches and self._batches[0].S != rows.S:
            raise ValueError(
                f"One batch has {self._batches[0].S} positions that share the weight, another "
                f"{rows.S}. Give batches of one length, for example padded."
            )
        if first:
            self._batches.append(some)
            self._g.append([])
        self._g[-1].append(some.g)

    def forget(self) -> None:
        """Let the rows go, and go on counting what they would take."""
        self._forgotten = True
        self._batches, self._g = [], [[]]

    def rows(self) -> Stored:
        """Return what was kept, as the rows of one batch with all its vectors."""
        first, *others = (
            batch if len(g) == 1 else replace(batch, g=torch.cat(g))
            for batch, g in zip(self._batches, self._g, strict=True)
        )
        whole = first.joined(others) if others else first  # type: ignore[arg-type]
        return replace(whole, count=self.count)


def bytes_of(rows: Stored, inputs: bool = True) -> int:
    """Bytes that stored rows take (:ref:`diag-norms`).

    Args:
        rows: The rows.
        inputs: Whether the inputs count too, which all chunks of vectors have in common.

    Example:
        >>> rows = LayerRows(torch.ones(5, 1, 2), torch.ones(4, 5, 1, 3), None, Count(5, 5))
        >>> bytes_of(rows)
        280
    """
    x = rows.tokens if isinstance(rows, TokenRows) else None
    x = rows.patches.images if isinstance(rows, PatchRows) else x
    x = rows.x if isinstance(rows, LayerRows) else x
    assert x is not None
    return rows.g.nbytes + (x.nbytes if inputs else 0)


@dataclass(frozen=True)
class PairSums:
    """Products of inner products, summed datum by datum (:ref:`diag-norms`).

    With q_{nm} = Σ_{v,w} ⟨P_{n,v}, P_{m,w}⟩_i ⟨P_{n,v}, P_{m,w}⟩_j for two layers i and j,
    ‖G_ij‖² = R² Σ_{n,m} q_{nm}.

    Args:
        rows: Σ_m q_{nm}, shape (N, L, L) for L layers, or of any shape (N, ...).
        own: q_{nn}, of the same shape.

    Example:
        >>> sums = PairSums(rows=torch.tensor([[[3.0]], [[5.0]]]), own=torch.ones(2, 1, 1))
        >>> sums.total().item(), sums.total(N=3).item()
        (8.0, 21.0)
    """

    rows: Tensor
    own: Tensor

    def total(self, N: float | None = None) -> Tensor:
        """Return Σ_{n,m} q_{nm}.

        Args:
            N: Number of data of which these are a random sample; the sum over all pairs of them
                is estimated then, without bias.
        """
        return _of_population(self.own.sum(0), self.rows.sum(0), len(self.rows), N)

    def without_each(self, N: float | None = None) -> Tensor:
        """Return what :meth:`total` is without each of the data in turn, shape (N, ...)."""
        own = self.own.sum(0) - self.own
        rows = self.rows.sum(0) - 2 * self.rows + self.own
        return _of_population(own, rows, len(self.rows) - 1, N)


def diagonal_sums(rows: Stored, basis: Sequence[EigenKronecker]) -> PairSums:
    """The part of :func:`pair_sums` that a diagonal matrix in a given basis explains.

    See :ref:`diag-subsample`. With λ_n = Σ_v [Q_Bᵀ P_{n,v} Q_A]² it is q_{nm} = λ_n · λ_m.

    Args:
        rows: Rows of one layer.
        basis: A basis for each of its groups.

    Returns:
        Sums of shape (N,).

    Example:
        >>> rows = LayerRows(torch.ones(5, 1, 2), torch.ones(4, 5, 1, 3), None, Count(5, 5))
        >>> basis = EigenKronecker(torch.eye(2), torch.eye(3), torch.zeros(3, 2))
        >>> diagonal_sums(rows, [basis]).total().item()  # (5 · 4)² · 2 · 3
        2400.0
    """
    N = rows.g.shape[1]
    parts = _slices(N, _data_at_once(rows))

    def squares(some: slice) -> Iterator[Tensor]:
        for of_group, one in zip(rows.of_data(some).split(), basis, strict=True):
            P: Tensor = one.Q_B.T @ of_group.outer()  # type: ignore[attr-defined]
            P = P if one.Q_A is None else P @ one.Q_A
            yield P.square_().sum(0).flatten(1)

    total = [torch.zeros(()).to(rows.g) for _ in basis]
    for some in parts:
        total = [so_far + lam.sum(0) for so_far, lam in zip(total, squares(some), strict=True)]
    result = PairSums(*rows.g.new_zeros(2, N))
    for some in parts:
        for lam, of_all in zip(squares(some), total, strict=True):
            result.rows[some] += lam @ of_all
            result.own[some] += lam.square().sum(1)
    return result


def pair_sums(layers: Sequence[Stored]) -> PairSums:
    """Compare all pairs of data, for every pair of layers (:ref:`diag-norms`).

    Args:
        layers: Rows of L layers, for the same data and the same V vectors.

    Returns:
        The sums. Memory grows with N · L², not with the number of parameters; time with (N · V)².

    Example:
        >>> rows = LayerRows(torch.ones(5, 1, 2), torch.ones(4, 5, 1, 3), None, Count(5, 5))
        >>> pair_sums([rows]).total().item()  # (5 · 4)² · (2 · 3)²
        14400.0
    """
    N, L = layers[0].g.shape[1], len(layers)
    sums = PairSums(*layers[0].g.new_zeros(2, N, L, L))
    blocks = _slices(N, min(_data_at_once(rows, L) for rows in layers))
    for place, some in enumerate(blocks):
        left = [_Side(rows.of_data(some)) for rows in layers]
        for others in blocks[place:]:
            right = left if others == some else [_Side(rows.of_data(others)) for rows in layers]
            # (L, n, v, m, w)
            k = torch.stack([a.products(b) for a, b in zip(left, right, strict=True)])
            sums.rows[some] += _grams(k.movedim(1, 0))
            if others == some:
                sums.own[some] = _grams(k.diagonal(dim1=1, dim2=3).movedim(-1, 0))
            else:
                sums.rows[others] += _grams(k.movedim(3, 0))
    return sums


def best_product(rows: Stored) -> tuple[Tensor, Tensor]:
    """Find the Kronecker product that is nearest to a layer's block (:ref:`diag-best`).

    The rearranged block takes vec(A) to vec(Σ P A Pᵀ), and its largest singular value belongs to
    the nearest product. It is found by power iteration, which starts from A = I. Without
    shared positions it runs in the space of the data, on matrices of shape (N, N).

    Args:
        rows: Rows of one layer of one group.

    Returns:
        A (D_in [+1], D_in [+1]) of norm 1, and B (D_out, D_out): A ⊗ B is nearest to
        Σ vec(P) vec(P)ᵀ, without R. The singular value is the norm of B.

    Example:
        >>> rows = LayerRows(torch.ones(5, 1, 2), torch.ones(4, 5, 1, 3), None, Count(5, 5))
        >>> round(best_product(rows.double())[1].norm().item(), 6)  # one product: 5 · 4 · 2 · 3
        120.0
    """
    return _best_of_data(rows) if is_factored(rows) else _best_of_parameters(rows)


def _best_of_data(rows: Stored) -> tuple[Tensor, Tensor]:
    assert isinstance(rows, LayerRows)
    x, g = rows.rotated(None)[:, 0], rows.g[:, :, 0]
    V, N, _ = g.shape
    X, T = (x @ x.T).square_(), x.new_empty(N, N)
    for some in _slices(N, WORKSPACE // (8 * V * V * N)):
        k = torch.einsum("vno,wmo->nmvw", g[:, some], g)
        T[some] = k.square_().sum((2, 3))

    # A = Σ w_n x̃ x̃ᵀ and B = Σ u_n Σ_v g gᵀ, with u = X w; the next w is T u.
    def step(w: Tensor) -> tuple[Tensor, Tensor]:
        u = X @ w
        new = T @ u
        return new / new.norm(), (u @ new) / (w @ u)

    w = _iterate(step, x.new_ones(N))
    A = (x * w.unsqueeze(1)).T @ x
    B = torch.einsum("vno,vnp->op", g * (X @ w).unsqueeze(1), g)
    return A / A.norm(), B / A.norm()


def _best_of_parameters(rows: Stored) -> tuple[Tensor, Tensor]:
    N = rows.g.shape[1]
    parts = [rows.of_data(some) for some in _slices(N, _data_at_once(rows))]
    kept = [parts[0].outer()] if len(parts) == 1 else None

    def step(A: Tensor) -> tuple[Tensor, Tensor]:
        B = _sum(_to_outputs(P, A) for P in kept or (part.outer() for part in parts))
        new = _sum(_to_inputs(P, B) for P in kept or (part.outer() for part in parts))
        return new / new.norm(), B.square().sum()

    D_in = parts[0].of_data(slice(0, 1)).outer().shape[-1]
    A = _iterate(step, torch.eye(D_in).to(rows.g) / D_in**0.5)
    return A, _sum(_to_outputs(P, A) for P in kept or (part.outer() for part in parts))


def contracted(rows: Rows, product: Kronecker) -> tuple[Tensor, Tensor]:
    """Σ Pᵀ B P and Σ P A Pᵀ: where a layer's rearranged block takes B, and A (:ref:`diag-best`).

    Args:
        rows: Rows of one group.
        product: A and B.

    Example:
        >>> rows = LayerRows(torch.ones(5, 1, 2), torch.ones(4, 5, 1, 3), None, Count(5, 5))
        >>> A, B = contracted(rows, Kronecker(torch.eye(2), torch.eye(3)))
        >>> A[0, 0].item(), B[0, 0].item()  # 5 · 4 · 3 and 5 · 4 · 2
        (60.0, 40.0)
    """
    rows = rows.formed() if isinstance(rows, OutputRows) else rows
    A = torch.diag(product.A) if product.A.ndim == 1 else product.A
    if is_factored(rows):
        assert isinstance(rows, LayerRows)
        x, g = rows.rotated(None)[:, 0], rows.g[:, :, 0]
        u = ((g @ product.B) * g).sum((0, 2))
        w = ((x @ A) * x).sum(1)
        return (x * u.unsqueeze(1)).T @ x, torch.einsum("vno,vnp->op", g * w.unsqueeze(1), g)
    found = [torch.zeros_like(A), torch.zeros_like(product.B)]
    for some in _slices(rows.g.shape[1], _data_at_once(rows)):
        P = rows.of_data(some).outer()
        found[0] += _to_inputs(P, product.B)
        found[1] += _to_outputs(P, A)
    return found[0], found[1]


def _to_outputs(P: Tensor, A: Tensor) -> Tensor:
    return torch.einsum("vnoi,vnpi->op", P @ A, P)


def _to_inputs(P: Tensor, B: Tensor) -> Tensor:
    return torch.einsum("vnoi,vnoj->ij", B @ P, P)


def _iterate(step: Callable[[Tensor], tuple[Tensor, Tensor]], vector: Tensor) -> Tensor:
    """The power method; its squared singular value grows until rounding stops it."""
    before = 0.0
    for _ in range(ITERATIONS):
        vector, squared = step(vector)
        now = float(squared)
        if not now > before * (1 + 8 * torch.finfo(vector.dtype).eps):
            break
        before = now
    return vector


class _Side:
    """What some of the data need for their inner products with others."""

    def __init__(self, rows: Stored) -> None:
        self.x: Tensor | None = None
        if is_factored(rows):
            assert isinstance(rows, LayerRows)
            self.x, P = rows.rotated(None)[:, 0], rows.g[:, :, 0]
        else:
            P = rows.outer().flatten(2)
        self.P = P.transpose(0, 1)  # (n, v, features)

    def products(self, other: "_Side") -> Tensor:
        """⟨P_{n,v}, P_{m,w}⟩, shape (n, v, m, w)."""
        n, v, m, w = *self.P.shape[:2], *other.P.shape[:2]
        k = (self.P.flatten(0, 1) @ other.P.flatten(0, 1).T).view(n, v, m, w)
        if self.x is not None and other.x is not None:
            k *= (self.x @ other.x.T).view(n, 1, m, 1)
        return k


def is_factored(rows: Rows) -> bool:
    """Whether every P is one product g x̃ᵀ (:ref:`diag-norms`).

    Example:
        >>> is_factored(LayerRows(torch.ones(5, 1, 2), torch.ones(4, 5, 1, 3), None, Count(5, 5)))
        True
    """
    return isinstance(rows, LayerRows) and rows.S == 1 and rows.groups == 1


def _data_at_once(rows: Stored, layers: int = 1) -> int:
    """How many data's inner products among each other, or P, fit into the workspace."""
    V = max(1, rows.V)
    among = int((WORKSPACE / 8 / layers) ** 0.5) // V
    if is_factored(rows):
        return among
    one = rows.of_data(slice(0, 1)).outer()
    return min(among, WORKSPACE // (8 * max(1, one.numel())))


def _sum(terms: Iterable[Tensor]) -> Tensor:
    first, *others = terms
    return sum(others, first)


def _slices(N: int, size: int) -> list[slice]:
    size = max(1, size)
    return [slice(start, min(start + size, N)) for start in range(0, N, size)]


def _grams(k: Tensor) -> Tensor:
    """Gram matrices of k (n, L, ...) over all further axes, shape (n, L, L)."""
    flat = k.flatten(2)
    return flat @ flat.mT


def _of_population(own: Tensor, rows: Tensor, m: int, N: float | None) -> Tensor:
    if N is None or m == N:
        return rows
    return N / m * own + N * (N - 1) / (m * (m - 1)) * (rows - own)
