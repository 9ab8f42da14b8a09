"""Inputs and pseudo-gradients of one layer as rows, and what can be made of them.

Fast paths live behind these names: the 1 that a joint bias appends to every input, and the one-hot
inputs of an Embedding, are never stored. Explained in the section :ref:`share-axis`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from kfac_lib.closed_form import OutputHessian
from kfac_lib.layers import (
    Operation,
    Patches,
    convolution_of,
    groups_of,
    input_rows,
    lookup_of,
)


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


def gram(rows: Tensor, out: Tensor | None = None) -> Tensor:
    """The Gram matrix rowsᵀ rows, the product that KFAC spends most of its time on.

    See :ref:`kfac-factors`. Of a wide matrix the block below the diagonal is not computed but
    copied, and so on within the two blocks on it, so that a quarter of the work or more is saved.

    Args:
        rows: Tensor of shape (rows, D).
        out: Tensor of shape (D, D) to write to, if given.

    Returns:
        Tensor of shape (D, D).

    Example:
        >>> gram(torch.tensor([[1.0, 2.0]])).tolist()
        [[1.0, 2.0], [2.0, 4.0]]
    """
    D = rows.shape[1]
    if D <= 64 or (D <= 128 and len(rows) < 2048):  # one product is faster than three
        return torch.mm(rows.T, rows, out=out)
    half = D // 2
    left, right = rows[:, :half], rows[:, half:]
    result = rows.new_empty(D, D) if out is None else out
    gram(left, out=result[:half, :half])
    gram(right, out=result[half:, half:])
    torch.mm(left.T, right, out=result[:half, half:])
    result[half:, :half] = result[:half, half:].T
    return result


class _Gradients:
    """What all rows with stored pseudo-gradients g have in common."""

    g: Tensor
    _input: ClassVar[str] = "x"
    """The field that holds the inputs, axis 0 the datum."""

    @property
    def V(self) -> int:
        """Number of vectors."""
        return len(self.g)

    @property
    def nbytes(self) -> int:
        """Bytes of the pseudo-gradients."""
        return self.g.nbytes

    def of_data(self, some: slice | Tensor) -> Self:
        """Return the rows of some of the data."""
        return self._with(getattr(self, self._input)[some], self.g[:, some])

    def double(self) -> Self:
        """Return the rows in double precision."""
        x = getattr(self, self._input)
        return self._with(x if self._input == "tokens" else x.double(), self.g.double())

    def joined(self, others: Sequence[Self]) -> Self:
        """Return the rows of these data, and of others of the same layer."""
        inputs = [getattr(rows, self._input) for rows in (self, *others)]
        x = Patches.joined(inputs) if self._input == "patches" else torch.cat(inputs)
        return self._with(x, torch.cat([rows.g for rows in (self, *others)], dim=1))

    def _with(self, x: Tensor | Patches, g: Tensor) -> Self:
        changed: Self = replace(self, **{self._input: x, "g": g})  # type: ignore[type-var]
        return changed


@dataclass(frozen=True)
class LayerRows(_Gradients):
    """One layer's rows for a batch and a chunk of vectors (:ref:`share-axis`).

    Args:
        x: Inputs, shape (N, S, D_in), without the appended 1; D_in counts the channels of all
            groups, those of group 0 first.
        g: Pseudo-gradients, shape (V, N, S, D_out), in the same order of groups.
        bias: What a joint bias appends to every row of x; 1 at first, S once the rows are
            summed. None when there is no bias.
        count: The batch's counts on its first chunk of vectors, zero on the others: what belongs
            to the data must enter once.
        groups: Number G of groups, each with a map of its own from its D_in/G inputs to its
            D_out/G outputs.

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
    groups: int = 1

    @property
    def S(self) -> int:
        """Number of positions that share the weight."""
        return self.x.shape[1]

    def reduced(self) -> "LayerRows":
        """Return the rows summed over the shared axis, with S = 1."""
        bias = None if self.bias is None else self.bias * self.S
        return replace(self, x=self.x.sum(1, True), g=self.g.sum(2, True), bias=bias)

    def input_gram(self) -> Tensor:
        """Return Σ_{n,s} x̃ x̃ᵀ, shape (D_in [+1], D_in [+1]); one for each of several groups."""
        if self.bias is None:
            return _gram_of_groups(self.x, self.groups)
        D = self.x.shape[-1] // self.groups
        groups = (self.groups,) if self.groups > 1 else ()
        joint = self.x.new_empty(*groups, D + 1, D + 1)
        _gram_of_groups(self.x, self.groups, out=joint[..., :D, :D])
        total = self.bias * self.x.sum((0, 1)).reshape(*groups, D)
        joint[..., D, :D] = joint[..., :D, D] = total
        joint[..., D, D] = self.bias**2 * self.x.shape[:2].numel()
        return joint

    def output_gram(self) -> Tensor:
        """Return Σ_{v,n,s} g gᵀ, shape (D_out, D_out); one for each of several groups."""
        return _gram_of_groups(self.g.flatten(0, 1), self.groups)

    def outer(self) -> Tensor:
        """Return P_{n,v} = Σ_s g x̃ᵀ, shape (V, N, D_out, D_in / G [+1])."""
        # Sizes in full: an empty batch leaves no room for −1.
        x = self.x.reshape(*self.x.shape[:-1], self.groups, self.x.shape[-1] // self.groups)
        g = self.g.reshape(*self.g.shape[:-1], self.groups, self.g.shape[-1] // self.groups)
        P = torch.einsum("vnsgo,nsgi->vngoi", g, x).flatten(2, 3)
        if self.bias is None:
            return P
        return torch.cat([P, self.bias * self.g.sum(2).unsqueeze(-1)], dim=-1)

    def split(self) -> list["LayerRows"]:
        """Return the rows of each group by itself."""
        if self.groups == 1:
            return [self]
        parts = zip(self.x.chunk(self.groups, -1), self.g.chunk(self.groups, -1), strict=True)
        return [replace(self, x=x, g=g, groups=1) for x, g in parts]

    def part(self, name: Literal["joint", "weight", "bias"]) -> "LayerRows":
        """Return the rows of [W b], of the weight alone, or of the bias alone.

        Raises:
            ValueError: If there is no bias to take.
        """
        if name == "joint":
            return self
        if name == "weight":
            return replace(self, bias=None)
        if self.bias is None:
            raise ValueError("The layer has no bias.")
        ones = self.x.new_full((*self.x.shape[:2], self.groups), self.bias)
        return replace(self, x=ones, bias=None)

    def squares(self, Q_A: Tensor | None, Q_B: Tensor) -> Tensor:
        """Return Σ_{n,v} [Q_Bᵀ P_{n,v} Q_A]² entry by entry, for a layer of one group.

        See :ref:`ekfac-correction`. The rows are rotated before they meet: for S = 1 the sum is one
        matrix product, else P is built for a few data at a time.

        Args:
            Q_A: Basis of the inputs, shape (D_in [+1], D_in [+1]); None for the identity.
            Q_B: Basis of the outputs, shape (D_out, D_out).

        Returns:
            Tensor of shape (D_out, D_in [+1]).
        """
        x = self.rotated(Q_A)
        if self.S == 1:
            return (self.g @ Q_B).square_().sum(0)[:, 0].T @ x.square()[:, 0]
        V, N, S, D_out = self.g.shape
        D_in = x.shape[-1]
        size = max(1, _ENTRIES // max(1, V * D_out * max(D_in, S)))
        total = x.new_zeros(D_out, D_in)
        for some in range(0, N, size):
            # (n, v o, s) (n, s i): one product for each datum, over all vectors.
            g = self.g[:, some : some + size].permute(1, 0, 3, 2)
            P = torch.bmm((Q_B.T @ g).flatten(1, 2), x[some : some + size])
            total += P.view(-1, D_out * D_in).square_().sum(0).view(D_out, D_in)
        return total

    def rotated(self, Q_A: Tensor | None) -> Tensor:
        """Return Q_Aᵀ x̃, shape (N, S, D_in [+1]); x̃ itself for None."""
        x = self.x if Q_A is None else self.x @ Q_A[: self.x.shape[-1]]
        return x if self.bias is None else _with_one(x, self.bias, Q_A)


@dataclass(frozen=True)
class TokenRows(_Gradients):
    """Rows of an Embedding, whose one-hot inputs are never stored (:ref:`share-embedding`).

    The methods are those of :class:`LayerRows`; under expand A is diagonal, and stays one.

    Args:
        tokens: Shape (N, S), with −1 where a token counts nothing.
        g: Pseudo-gradients, shape (V, N, S, D_out).
        count: As in :class:`LayerRows`.
        num_embeddings: D_in.

    Example:
        >>> rows = TokenRows(torch.tensor([[0, 2, 2]]), torch.ones(1, 1, 3, 4), Count(1, 1), 3)
        >>> rows.input_gram().tolist()
        [1.0, 0.0, 2.0]
        >>> rows.reduced().input_gram().tolist()
        [[1.0, 0.0, 2.0], [0.0, 0.0, 0.0], [2.0, 0.0, 4.0]]
    """

    _input: ClassVar[str] = "tokens"
    tokens: Tensor
    g: Tensor
    count: Count
    num_embeddings: int

    @property
    def S(self) -> int:
        """Number of positions that share the weight."""
        return self.tokens.shape[1]

    def reduced(self) -> LayerRows:
        """Return the rows summed over the shared axis, with S = 1: each datum's counts."""
        counts = self._zeros(len(self.tokens), self.num_embeddings + 1)
        counts.scatter_add_(1, self.tokens + 1, counts.new_ones(self.tokens.shape))
        return LayerRows(counts[:, None, 1:], self.g.sum(2, True), None, self.count)

    def input_gram(self) -> Tensor:
        """Return the diagonal of Σ_{n,s} x xᵀ, the counts, shape (D_in,)."""
        return torch.bincount(self.tokens.flatten() + 1, minlength=self.num_embeddings + 1)[1:].to(
            self.g.dtype
        )

    def output_gram(self) -> Tensor:
        """Return Σ_{v,n,s} g gᵀ, shape (D_out, D_out)."""
        return gram(self.g.flatten(0, 2))

    def outer(self) -> Tensor:
        """Return P_{n,v} = Σ_s g xᵀ, shape (V, N, D_out, D_in)."""
        V, N, _, D_out = self.g.shape
        P = self._zeros(V, N * (self.num_embeddings + 1), D_out)
        datum = torch.arange(N, device=self.g.device)[:, None] * (self.num_embeddings + 1)
        P.index_add_(1, (datum + self.tokens + 1).flatten(), self.g.flatten(1, 2))
        return P.view(V, N, self.num_embeddings + 1, D_out)[:, :, 1:].transpose(2, 3)

    def occurring(self) -> "TokenRows":
        """Return the same rows for the tokens that occur, numbered anew.

        What is left out are columns of P that are zero.
        """
        found, places = torch.unique(self.tokens, return_inverse=True)
        nothing = int((found < 0).sum())
        return replace(self, tokens=places - nothing, num_embeddings=max(1, len(found) - nothing))

    def split(self) -> list["TokenRows"]:
        """Return the rows as they are: an Embedding has one group."""
        return [self]

    def part(self, name: Literal["joint", "weight", "bias"]) -> "TokenRows":
        """Return the rows as they are: an Embedding has no bias.

        Raises:
            ValueError: If the bias is asked for.
        """
        if name == "bias":
            raise ValueError("An Embedding has no bias.")
        return self

    def squares(self, Q_A: Tensor | None, Q_B: Tensor) -> Tensor:
        """Return Σ_{n,v} [Q_Bᵀ P_{n,v} Q_A]², shape (D_out, D_in); see :meth:`LayerRows.squares`.

        In the basis of the tokens themselves only the columns of tokens that a datum holds are
        built.
        """
        if Q_A is not None:
            x = torch.cat([Q_A.new_zeros(1, Q_A.shape[1]), Q_A])[self.tokens + 1]
            return LayerRows(x, self.g, None, self.count).squares(None, Q_B)
        V, N, _, D_out = self.g.shape
        size = self.num_embeddings + 1
        datum = torch.arange(N, device=self.g.device)[:, None] * size
        held, place = torch.unique(datum + self.tokens + 1, return_inverse=True)
        P = self._zeros(V, len(held), D_out).index_add_(
            1, place.flatten(), (self.g @ Q_B).flatten(1, 2)
        )
        total = self._zeros(size, D_out).index_add_(0, held % size, P.square_().sum(0))
        return total[1:].T

    def _zeros(self, *shape: int) -> Tensor:
        return self.g.new_zeros(shape)


@dataclass(frozen=True)
class PatchRows(_Gradients):
    """Rows of a convolution, whose patches are cut only where they are needed.

    See :ref:`share-convolution`. The methods are those of :class:`LayerRows`. Sums over data cut
    the patches of a few at a time; under reduce nothing is cut.

    Args:
        patches: Where the rows x come from.
        g: Pseudo-gradients, shape (V, N, S, D_out).
        bias: As in :class:`LayerRows`.
        count: As in :class:`LayerRows`.

    Example:
        >>> convolution = convolution_of(nn.Conv2d(2, 4, 3))
        >>> patches = Patches(torch.ones(5, 2, 8, 8), convolution)
        >>> rows = PatchRows(patches, torch.ones(1, 5, 36, 4), 1.0, Count(5, 5))
        >>> rows.input_gram().shape, rows.reduced().x[0, 0, 0].item()
        (torch.Size([19, 19]), 36.0)
    """

    _input: ClassVar[str] = "patches"
    patches: Patches
    g: Tensor
    bias: float | None
    count: Count

    @property
    def x(self) -> Tensor:
        """The patches, shape (N, S, D_in)."""
        return self.patches.rows()

    @property
    def S(self) -> int:
        """Number of positions that share the weight."""
        return self.g.shape[2]

    def reduced(self) -> LayerRows:
        """Return the rows summed over the shared axis, with S = 1."""
        bias = None if self.bias is None else self.bias * self.S
        x, g = self.patches.total().unsqueeze(1), self.g.sum(2, True)
        return LayerRows(x, g, bias, self.count, self.patches.convolution.groups)

    def input_gram(self) -> Tensor:
        """Return Σ_{n,s} x̃ x̃ᵀ, as :meth:`LayerRows.input_gram`."""
        return _sum(replace(some, g=some.g[:0]).input_gram() for some in self._parts())

    def output_gram(self) -> Tensor:
        """Return Σ_{v,n,s} g gᵀ, as :meth:`LayerRows.output_gram`."""
        return _gram_of_groups(self.g.flatten(0, 1), self.patches.convolution.groups)

    def outer(self) -> Tensor:
        """Return P_{n,v} = Σ_s g x̃ᵀ, as :meth:`LayerRows.outer`."""
        return self._unfolded().outer()

    def split(self) -> list[LayerRows] | list["PatchRows"]:
        """Return the rows of each group by itself."""
        return [self] if self.patches.convolution.groups == 1 else self._unfolded().split()

    def part(self, name: Literal["joint", "weight", "bias"]) -> "PatchRows | LayerRows":
        """Return the rows of [W b], of the weight alone, or of the bias alone.

        Raises:
            ValueError: If there is no bias to take.
        """
        if name == "joint":
            return self
        return replace(self, bias=None) if name == "weight" else self._unfolded().part(name)

    def squares(self, Q_A: Tensor | None, Q_B: Tensor) -> Tensor:
        """Return Σ_{n,v} [Q_Bᵀ P_{n,v} Q_A]², as :meth:`LayerRows.squares`."""
        return _sum(some.squares(Q_A, Q_B) for some in self._parts())

    def _unfolded(self) -> LayerRows:
        return LayerRows(self.x, self.g, self.bias, self.count, self.patches.convolution.groups)

    def _parts(self) -> Iterator[LayerRows]:
        """The rows of a few data at a time."""
        D_in = self.patches.images.shape[1] * prod(self.patches.convolution.kernel_size)
        size = max(1, _ENTRIES // max(1, self.S * D_in))
        for start in range(0, max(1, len(self.patches)), size):
            some = slice(start, start + size)
            yield replace(self, patches=self.patches[some], g=self.g[:, some])._unfolded()


@dataclass(frozen=True)
class OutputRows:
    """Rows of the layer that gives the prediction, whose vectors have a closed form.

    See :ref:`speed-classes`. The methods are those of :class:`LayerRows`, for S = 1; the vectors
    themselves are made only where P_{n,v} is asked for.

    Args:
        x: Inputs, shape (N, 1, D_in).
        hessian: The Hessians of the loss at the prediction: Σ_v g gᵀ for each datum.
        vectors: Gives their columns, shape (V, N, C).
        bias: As in :class:`LayerRows`.
        count: As in :class:`LayerRows`.

    Example:
        >>> hessian = OutputHessian(torch.ones(5, 3))
        >>> rows = OutputRows(torch.ones(5, 1, 2), hessian, lambda: None, 1.0, Count(5, 5))
        >>> rows.output_gram().diagonal().tolist()
        [5.0, 5.0, 5.0]
    """

    x: Tensor
    hessian: OutputHessian
    vectors: Callable[[], Tensor]
    bias: float | None
    count: Count

    @property
    def g(self) -> Tensor:
        """The vectors, shape (V, N, 1, C); made anew each time."""
        return self.vectors().unsqueeze(2)

    @property
    def S(self) -> int:
        """Number of positions that share the weight, 1."""
        return 1

    @property
    def V(self) -> int:
        """Number of vectors."""
        return self.hessian.weights.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of what stands for the vectors."""
        return self.hessian.weights.nbytes

    def reduced(self) -> "OutputRows":
        """Return the rows as they are: there is one position."""
        return self

    def input_gram(self) -> Tensor:
        """Return Σ_n x̃ x̃ᵀ, as :meth:`LayerRows.input_gram`."""
        return self._inputs().input_gram()

    def output_gram(self) -> Tensor:
        """Return Σ_n H_n, shape (C, C)."""
        return self.hessian.total()

    def outer(self) -> Tensor:
        """Return P_{n,v} = g x̃ᵀ, as :meth:`LayerRows.outer`."""
        return self.formed().outer()

    def formed(self) -> LayerRows:
        """Return the rows with their vectors, which are made for it."""
        return replace(self._inputs(), g=self.g)

    def split(self) -> list["OutputRows"]:
        """Return the rows as they are: there is one group."""
        return [self]

    def part(self, name: Literal["joint", "weight", "bias"]) -> "OutputRows":
        """Return the rows of [W b], of the weight alone, or of the bias alone.

        Raises:
            ValueError: If there is no bias to take.
        """
        part = self._inputs().part(name)
        return replace(self, x=part.x, bias=part.bias)

    def squares(self, Q_A: Tensor | None, Q_B: Tensor) -> Tensor:
        """Return Σ_n diag(Q_Bᵀ H_n Q_B) [Q_Aᵀ x̃]²ᵀ, as :meth:`LayerRows.squares`."""
        return self.hessian.quadratic(Q_B).T @ self._inputs().rotated(Q_A).square()[:, 0]

    def _inputs(self) -> LayerRows:
        return LayerRows(self.x, self.x.new_empty(0, len(self.x), 1, 1), self.bias, self.count)


Rows = LayerRows | TokenRows | PatchRows | OutputRows
"""What a source yields of one layer."""


def make_rows(
    layer: nn.Module | Operation,
    x: Tensor | Patches,
    g: Tensor,
    bias: float | None,
    count: Count,
) -> Rows:
    """The rows of one layer, in the form that suits it (:ref:`share-axis`).

    Args:
        layer: A supported layer, or an operation.
        x: What :func:`stored_input` returned.
        g: Pseudo-gradients, shape (V, N, S, D_out).
        bias: 1 where a joint bias is covered, else None.
        count: The counts.

    Example:
        >>> x, g = torch.ones(5, 1, 2), torch.ones(1, 5, 1, 3)
        >>> make_rows(nn.Linear(2, 3), x, g, 1.0, Count(5, 5)).input_gram().shape
        torch.Size([3, 3])
    """
    if isinstance(x, Patches):
        return PatchRows(x, g, bias, count)
    lookup = lookup_of(layer)
    if lookup is not None:
        return TokenRows(x, g, count, lookup.num_embeddings)
    return LayerRows(x, g, bias, count, groups_of(layer))


def stored_input(layer: nn.Module | Operation, x: Tensor) -> Tensor | Patches:
    """What of a layer's input is kept for its rows (:ref:`share-axis`).

    Args:
        layer: A supported layer, or an operation.
        x: Its input; axis 0 is the datum.

    Returns:
        The rows, shape (N, S, D_in); for a convolution what cuts them, for an Embedding the
        tokens, shape (N, S).

    Example:
        >>> stored_input(nn.Embedding(9, 2, padding_idx=0), torch.tensor([[3, 0]])).tolist()
        [[3, -1]]
    """
    convolution, lookup = convolution_of(layer), lookup_of(layer)
    if convolution is not None:
        return Patches(x, convolution)
    return input_rows(layer, x) if lookup is None else lookup.tokens(x)


def _gram_of_groups(rows: Tensor, groups: int, out: Tensor | None = None) -> Tensor:
    """Σ rows rowsᵀ over the first two axes of (N, S, G · D): (D, D), or (G, D, D) for G > 1."""
    if groups > 1:
        D = rows.shape[-1] // groups
        parts = rows.reshape(rows.shape[:2].numel(), groups, D).transpose(0, 1)
        products = torch.bmm(parts.transpose(1, 2), parts)
    elif rows.is_contiguous() or not (transposed := rows.transpose(1, 2)).is_contiguous():
        return gram(rows.flatten(0, 1), out)
    else:  # without copying a transposed view
        products = torch.bmm(transposed, rows).sum(0)
    return products if out is None else out.copy_(products)


def _sum(terms: Iterator[Tensor]) -> Tensor:
    total = next(terms)
    for term in terms:
        total = total + term
    return total


def _with_one(x: Tensor, bias: float, Q_A: Tensor | None) -> Tensor:
    """Append the bias to rows that are in the basis Q_A already but for their last entry."""
    if Q_A is None:
        return torch.cat([x, x.new_full((*x.shape[:-1], 1), bias)], dim=-1)
    return x + bias * Q_A[-1]


_ENTRIES = 2**20
"""How many entries of P, or of patches, are held at a time."""
