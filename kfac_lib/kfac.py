"""KFAC: for every layer a Kronecker product A ⊗ B in place of its curvature block.

Derived in the chapter :ref:`kfac`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from kfac_lib.accumulate import (
    Choice,
    ExactBlocks,
    Expand,
    FactorSums,
    Sharing,
    sharing_of,
)
from kfac_lib.backward import MEMORY
from kfac_lib.capture import Hooks, Source, is_finite
from kfac_lib.coverage import Coverage, cover
from kfac_lib.damping import layer_inverse
from kfac_lib.fisher import Fisher, TypeII, flavours, require_vectors
from kfac_lib.flattening import Order, check_order
from kfac_lib.kronecker import BlockDiagonal, Damping, EigenKronecker, Kronecker, element
from kfac_lib.losses import Criterion, criterion_of
from kfac_lib.rows import Count, Rows
from kfac_lib.stream import Data, first_inputs, stream
from kfac_lib.tracing import Traced

Block = TypeVar("Block", bound=Kronecker | EigenKronecker | BlockDiagonal)
Bias = Literal["joint", "separate"]
Part = Literal["joint", "weight", "bias"]


class Accumulator(Protocol):
    """A consumer of one layer's rows (:ref:`kfac-batches`)."""

    @property
    def count(self) -> Count:
        """The counts of the data so far."""

    def update(self, rows: Rows) -> None:
        """Add the rows of a batch, or of a further chunk of its vectors."""


@dataclass
class Both:
    """Gives the rows of one pass to several accumulators (:ref:`diag-subsample`).

    Args:
        accumulators: They see the same rows.

    Example:
        >>> Both((FactorSums(Expand()), ExactBlocks("cvec"))).count
        Count(N=0, denominator=0)
    """

    accumulators: tuple[Accumulator, ...]

    @property
    def count(self) -> Count:
        """The counts of the data so far."""
        return self.accumulators[0].count

    def update(self, rows: Rows) -> None:
        """Add the rows of a batch, or of a further chunk of its vectors."""
        for accumulator in self.accumulators:
            accumulator.update(rows)


class Held:
    """Rows that are kept for a second use, as long as they are few (:ref:`ekfac-cost`).

    Args:
        limit: Bytes of pseudo-gradients above which all are dropped.

    Example:
        >>> from kfac_lib.rows import LayerRows
        >>> rows = LayerRows(torch.ones(5, 1, 2), torch.ones(3, 5, 1, 1), None, Count(5, 5))
        >>> held = Held(limit=100)
        >>> held.add("fc", rows)
        >>> len(held.rows)
        1
        >>> held.add("fc", rows)
        >>> print(held.rows)
        None
    """

    def __init__(self, limit: int = MEMORY) -> None:
        self.rows: list[tuple[str, Rows]] | None = []
        self._left = limit

    def add(self, name: str, rows: Rows) -> None:
        """Keep a layer's rows, or drop all."""
        self._left -= rows.nbytes
        if self._left < 0:
            self.rows = None
        if self.rows is not None:
            self.rows.append((name, rows))


class Blocks(Mapping[str, Block], Generic[Block]):
    """An element of the Kronecker algebra for every layer, by its name (:ref:`kfac-factors`).

    What :class:`KFAC` and :class:`~kfac_lib.EKFAC` have in common.

    Args:
        blocks: The elements, in the model's order.
        fisher: The flavour that they were computed with.
        sharing: How positions that share a weight were treated: one for all layers, or one for
            each name.
        frozen: Names of the parameters that do not require grad.
        ignored: Names of the trainable parameters that were left out.

    Example:
        >>> blocks = Blocks({"fc": Kronecker(torch.eye(3), torch.eye(2))}, fisher=TypeII())
        >>> blocks.trace().item()
        6.0
    """

    def __init__(
        self,
        blocks: Mapping[str, Block],
        *,
        fisher: Fisher,
        sharing: Choice = Expand(),
        frozen: Sequence[str] = (),
        ignored: Sequence[str] = (),
    ) -> None:
        self._blocks = dict(blocks)
        self.fisher = fisher
        self.sharing = sharing
        self.frozen = tuple(frozen)
        self.ignored = tuple(ignored)

    def __getitem__(self, name: str) -> Block:
        return self._blocks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def __repr__(self) -> str:
        mixed = isinstance(self.sharing, Mapping)
        lines = [f"{type(self).__name__}({self.fisher}, {'mixed' if mixed else self.sharing})"]
        for name, block in self.items():
            how = f", {self.sharing[name]}" if isinstance(self.sharing, Mapping) else ""
            lines.append(f"  {name or '(root)'}: {_shapes(block)}{how}")
        lines.append(f"  frozen: {', '.join(self.frozen) or 'none'}")
        lines.append(f"  ignored: {', '.join(self.ignored) or 'none'}")
        return "\n".join(lines)

    def to_dense(self, order: Order) -> Tensor:
        """Return the block-diagonal matrix of all layers, in the given order within each.

        Raises:
            ValueError: If the order is unknown.
        """
        dense: Tensor = torch.block_diag(*[K.to_dense(order) for K in self.values()])  # type: ignore[no-untyped-call]
        return dense

    def trace(self) -> Tensor:
        """Return the trace over all layers, a tensor with one entry."""
        return torch.stack([K.trace() for K in self.values()]).sum()

    def logdet(self) -> Tensor:
        """Return the log-determinant over all layers; −inf where a block is singular."""
        return torch.stack([K.logdet() for K in self.values()]).sum()

    def precondition(self, gradients: Mapping[str, Tensor], damping: Damping) -> dict[str, Tensor]:
        """Apply the damped inverse of every layer to its gradient (:ref:`damp-gradient`).

        Args:
            gradients: For each name a weight-shaped matrix (D_out, D_in [+1]), [W b] where the
                bias is joint; :func:`~kfac_lib.layers.as_matrix` makes one.
            damping: :class:`~kfac_lib.Exact`, :class:`~kfac_lib.Factored` or
                :class:`~kfac_lib.Plain`.

        Returns:
            For each name a matrix of the same shape.

        Raises:
            ValueError: If the names or a shape do not fit, or a block has no inverse; the message
                names the layer.
            TypeError: If the damping needs two factors, and a block has none.
        """
        if set(gradients) != set(self):
            raise ValueError(
                f"Gradients are given for {sorted(gradients)}, factors are there for "
                f"{sorted(self)}. Give one matrix (D_out, D_in) for each, [W b] where the bias is "
                "joint; kfac_lib.layers.as_matrix makes one of a parameter's gradient."
            )
        return {name: layer_inverse(name, K, damping) @ gradients[name] for name, K in self.items()}


class KFAC(Blocks[Kronecker | BlockDiagonal]):
    """Kronecker-factored curvature of a network: layer name → :class:`~kfac_lib.Kronecker`.

    Derived in the chapter :ref:`kfac`. Made by :meth:`compute`; the layers stand in the model's
    order. A grouped convolution has a :class:`~kfac_lib.kronecker.BlockDiagonal`.

    Example:
        >>> torch.manual_seed(0)
        <...>
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> X, y = torch.randn(8, 4), torch.randint(2, (8,))
        >>> kfac = KFAC.compute(net, nn.CrossEntropyLoss(), (X, y))
        >>> kfac["0"].shape, kfac["2"].shape
        ((3, 5), (2, 4))
    """

    @classmethod
    def compute(
        cls,
        model: nn.Module | Callable[..., Tensor],
        loss_func: nn.Module | Criterion,
        data: Data,
        fisher: Fisher = TypeII(),
        sharing: Choice = Expand(),
        chunk_size: int | None = None,
        layers: Sequence[str] | str | None = None,
        ignore: Sequence[str] | str = (),
        *,
        bias: Bias = "joint",
        params: Mapping[str, Tensor] | None = None,
    ) -> "KFAC":
        """Compute the factors of every layer, over all data (:ref:`kfac-factors`).

        A is Σ x̃x̃ᵀ times the loss's reduction factor R, B is the mean of Σ_v g gᵀ over data and
        shared positions; :func:`kfac_lib.accumulate.constants` holds the table. The model, its
        gradients, hooks and mode stay as they are.

        Assumed without ``params``, since hooks cannot see it: axis 0 of every covered layer's input
        is the datum, and one datum's prediction depends on no other datum and on no random number.
        Modules that break this are refused; code inside a ``forward`` that does is not noticed.
        With ``params`` the trace is verified on its batch.

        Args:
            model: Network of supported layers; with ``params`` a function f(params, X), or a
                network that is traced.
            loss_func: :class:`torch.nn.MSELoss`, :class:`torch.nn.CrossEntropyLoss` or
                :class:`torch.nn.BCEWithLogitsLoss`, with any of their options, or a criterion.
            data: One pair (X, y), or an iterable of them; axis 0 is the datum.
            fisher: Flavour: :class:`~kfac_lib.TypeII`, :class:`~kfac_lib.TypeI`,
                :class:`~kfac_lib.MonteCarlo`, :class:`~kfac_lib.Empirical`,
                :class:`~kfac_lib.RandomSigns` or :class:`~kfac_lib.InputOnly`.
            sharing: :class:`~kfac_lib.Expand` or :class:`~kfac_lib.Reduce`; or a mapping from names
                or patterns to one of them, or a function of the layer's name
                (:func:`~kfac_lib.accumulate.sharing_of`).
            chunk_size: How many vectors are backpropagated at once; what fits into 64 MiB when
                not given (:ref:`speed-memory`).
            layers: Names or patterns of the layers or parameters to take; all when not given.
            ignore: Names or patterns to leave out.
            bias: ``"joint"``: one factor pair for [W b], under the layer's name. ``"separate"``:
                one for the weight and one for the bias, under the parameters' names.
            params: The parameters by name, for a function or a network that hooks cannot follow
                (:class:`~kfac_lib.tracing.Traced`); without them the model's own, by hooks.

        Returns:
            A mapping from layer name to factors, in the dtype and on the device of the model.

        Raises:
            ValueError: For bad data, options or patterns.
            TypeError: If model, loss or data are of the wrong kind.
            NotImplementedError: For a layer or a loss that is not supported; the message says
                what to do.
        """
        source, data = source_of(model, data, params, layers, ignore)
        criterion = criterion_of(loss_func)
        choice = sharing_of(sharing, list(source.coverage.layers))
        parts = {name: parts_of(source.coverage, name, bias) for name in choice}
        sums = factor_sums(source, criterion, data, fisher, choice, chunk_size)
        factors: dict[str, Kronecker | BlockDiagonal] = {}
        of_part: dict[str, Sharing] = {}
        for name in list(sums):
            A, B = require_finite(name, *sums.pop(name).finish(criterion))
            for key, part in parts[name].items():
                factors[key] = element(of_part_of(A, part), B)
                of_part[key] = choice[name]
        return cls(
            factors,
            fisher=fisher,
            sharing=described(sharing, of_part),
            frozen=source.coverage.frozen,
            ignored=source.coverage.ignored,
        )


def exact_blocks(
    model: nn.Module | Callable[..., Tensor],
    loss_func: nn.Module | Criterion,
    data: Data,
    fisher: Fisher = TypeII(),
    *,
    order: Order,
    layers: Sequence[str] | str | None = None,
    ignore: Sequence[str] | str = (),
    chunk_size: int | None = None,
    params: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The dense block of every layer, from the same rows that KFAC sees (:ref:`kfac-sum`).

    No approximation: R Σ_{n,v} vec(P_{n,v}) vec(P_{n,v})ᵀ with P_{n,v} = Σ_s g x̃ᵀ. Memory grows
    with the square of a layer's number of parameters.

    Args:
        model: Network of supported layers; with ``params`` a function f(params, X), or a network
            that is traced.
        loss_func: A supported loss, or a criterion.
        data: One pair (X, y), or an iterable of them.
        fisher: Flavour: any but :class:`~kfac_lib.InputOnly`, which has no matrix.
        order: Flattening of [W b].
        layers: Names or patterns of the layers or parameters to take; all when not given.
        ignore: Names or patterns to leave out.
        chunk_size: How many vectors are backpropagated at once; what fits into 64 MiB when
            not given (:ref:`speed-memory`).
        params: As in :meth:`KFAC.compute`.

    Returns:
        For each layer a matrix of shape (D, D), D the size of [W b]; a grouped convolution whole,
        with the blocks between its groups.

    Raises:
        ValueError: For bad data, options or patterns.
        TypeError: If model, loss or data are of the wrong kind.
        NotImplementedError: For a layer or a loss that is not supported.

    Example:
        >>> X, y = torch.ones(5, 2), torch.zeros(5, 3)
        >>> exact_blocks(nn.Linear(2, 3), nn.MSELoss(), (X, y), order="cvec")[""].shape
        torch.Size([9, 9])
    """
    check_order(order)
    require_vectors(fisher)
    source, data = source_of(model, data, params, layers, ignore)
    criterion = criterion_of(loss_func)
    blocks = {name: ExactBlocks(order) for name in source.coverage.layers}
    accumulate(blocks, source, criterion, data, fisher, chunk_size)
    return {
        name: require_finite(name, block.finish(criterion))[0] for name, block in blocks.items()
    }


def check_kind(argument: str, given: object, method: str, possible: str) -> None:
    """Refuse what is not an object with the method that an option needs (:ref:`kfac-factors`).

    Raises:
        TypeError: If it is a class, or has no such method.

    Example:
        >>> check_kind("sharing", Expand(), "rows", "Expand() or Reduce()")
    """
    if isinstance(given, type) or not hasattr(given, method):
        raise TypeError(f"{argument}={given!r} is not usable. Give an object: {possible}.")


def source_of(
    model: nn.Module | Callable[..., Tensor],
    data: Data,
    params: Mapping[str, Tensor] | None = None,
    layers: Sequence[str] | str | None = None,
    ignore: Sequence[str] | str = (),
) -> tuple[Source, Data]:
    """The source of rows: hooks on a module, or a traced graph if parameters are given.

    See :ref:`func-source`. A function is traced on the first batch, since what it covers is not
    known before; if it was traced already, the trace is used again.

    Args:
        model: Network, or with ``params`` a function f(params, X).
        data: One pair (X, y), or an iterable of them.
        params: The parameters by name, or None.
        layers: Names or patterns of the layers or parameters to take; all when not given.
        ignore: Names or patterns to leave out.

    Raises:
        TypeError: If the model is neither a module, nor a function with its parameters.
        ValueError: If a name or pattern does not fit.
        NotImplementedError: For a layer that is not supported.

    Example:
        >>> source, data = source_of(nn.Linear(2, 3), (torch.ones(5, 2), torch.zeros(5, 3)))
        >>> type(source).__name__
        'Hooks'
    """
    if params is not None:
        source = Traced(model, params, layers, ignore)
        X, data = first_inputs(data)
        source.prepare(X)
        return source, data
    if not isinstance(model, nn.Module) and callable(model):
        raise TypeError(
            f"The model is a {type(model).__name__}, which has no parameters of its own. Give "
            "params, a dict from name to tensor, and a function f(params, X); or a "
            "torch.nn.Module."
        )
    return Hooks(model, cover(model, layers, ignore)), data


def factor_sums(
    source: Source,
    criterion: Criterion,
    data: Data,
    fisher: Fisher,
    sharing: Mapping[str, Sharing],
    chunk_size: int | None = None,
    held: Held | None = None,
) -> dict[str, FactorSums]:
    """The raw sums of every layer's factors, over all data (:ref:`kfac-batches`).

    Args:
        source: What runs the model.
        criterion: The criterion.
        data: One pair (X, y), or an iterable of them.
        fisher: The flavour.
        sharing: Each layer's sharing.
        chunk_size: How many vectors are backpropagated at once; what fits into 64 MiB when
            not given (:ref:`speed-memory`).
        held: Where the rows are kept, if they are needed once more.

    Example:
        >>> source, data = Hooks(nn.Linear(2, 3)), (torch.ones(5, 2), torch.zeros(5, 3))
        >>> criterion = criterion_of(nn.MSELoss())
        >>> factor_sums(source, criterion, data, TypeII(), {"": Expand()})[""].count
        Count(N=5, denominator=15)
    """
    sums = {name: FactorSums(one) for name, one in sharing.items()}
    accumulate(sums, source, criterion, data, fisher, chunk_size, held)
    return sums


def accumulate(
    accumulators: Mapping[str, Accumulator],
    source: Source,
    criterion: Criterion,
    data: Data,
    fisher: Fisher,
    chunk_size: int | None = None,
    held: Held | None = None,
    *,
    joint: bool = False,
) -> None:
    """Feed the rows of all data to one accumulator a layer (:ref:`kfac-batches`).

    Args:
        accumulators: One for each layer.
        source: What runs the model.
        criterion: The criterion.
        data: One pair (X, y), or an iterable of them.
        fisher: The flavour.
        chunk_size: How many vectors are backpropagated at once; what fits into 64 MiB when
            not given (:ref:`speed-memory`).
        held: Where the rows are kept, if they are needed once more.
        joint: Whether all layers are to see the same vectors, in full number.

    Raises:
        ValueError: If no datum counts, or the data are bad.
        TypeError: If the flavour is none.

    Example:
        >>> source, data = Hooks(nn.Linear(2, 3)), (torch.ones(5, 2), torch.zeros(5, 3))
        >>> blocks = {"": ExactBlocks("cvec")}
        >>> accumulate(blocks, source, criterion_of(nn.MSELoss()), data, TypeII())
        >>> blocks[""].count.N
        5
    """
    check_kind("fisher", fisher, "vectors", flavours())
    if chunk_size is None and isinstance(fisher, TypeII):
        fisher = TypeII("minimal")  # the same matrix, in one vector less
    for name, rows in stream(source, criterion, fisher, data, chunk_size=chunk_size, joint=joint):
        accumulators[name].update(rows)
        if held is not None:
            held.add(name, rows)
    if all(accumulator.count.N == 0 for accumulator in accumulators.values()):
        raise ValueError(
            "No datum counts: the labels of all data are ignored (ignore_index). Give data with "
            "labels."
        )


def parts_of(coverage: Coverage, layer: str, bias: Bias) -> dict[str, Part]:
    """The keys of one layer, and what of [W b] each stands for (:ref:`kfac-factors`).

    Args:
        coverage: What is covered.
        layer: The layer's name.
        bias: ``"joint"`` or ``"separate"``.

    Raises:
        ValueError: If ``bias`` is neither.

    Example:
        >>> parts_of(cover(nn.Sequential(nn.Linear(2, 3))), "0", "separate")
        {'0.weight': 'weight', '0.bias': 'bias'}
    """
    if bias not in ("joint", "separate"):
        raise ValueError(f"bias={bias!r}: use 'joint' or 'separate'.")
    if bias == "joint":
        return {layer: "joint"}
    weight, name = coverage.names(layer)
    return {weight: "joint"} if name is None else {weight: "weight", name: "bias"}


def of_part_of(A: Tensor, part: Part) -> Tensor:
    """What of a joint input-based factor belongs to the weight, or to the bias.

    See :ref:`kfac-factors`: A without its last row and column, or its last entry.

    Example:
        >>> of_part_of(torch.eye(3), "weight").shape, of_part_of(torch.eye(3), "bias").shape
        (torch.Size([2, 2]), torch.Size([1, 1]))
    """
    return A if part == "joint" else A[..., :-1, :-1] if part == "weight" else A[..., -1:, -1:]


def require_finite(name: str, *results: Tensor) -> tuple[Tensor, ...]:
    """Return the factors or blocks of a layer, or refuse such that overflow.

    See :ref:`kfac-factors`.

    Raises:
        ValueError: If one holds NaN or inf.

    Example:
        >>> (A,) = require_finite("fc", torch.eye(2))
    """
    # In a positive semi-definite matrix no entry exceeds the largest on the diagonal.
    traces = [r.trace() if r.ndim == 2 else _diagonal_of(r).sum() for r in results]
    if not is_finite(sum(traces[1:], traces[0])) and not all(map(is_finite, results)):
        raise ValueError(
            f"The factors of layer {name!r} hold NaN or inf: its inputs or gradients overflow in "
            f"{results[0].dtype}. Look at the scale of the data and of the parameters."
        )
    return results


def described(sharing: Choice, of_part: Mapping[str, Sharing]) -> Choice:
    """What a result says of its sharing: one for all, or one for each of its keys.

    See :ref:`share-choice`.

    Example:
        >>> described({"a": Expand()}, {"a": Expand()})
        {'a': Expand()}
    """
    return (
        dict(of_part) if isinstance(sharing, Mapping) or not hasattr(sharing, "rows") else sharing
    )


def _diagonal_of(result: Tensor) -> Tensor:
    return result if result.ndim == 1 else result.diagonal(dim1=-2, dim2=-1)


def _shapes(block: Kronecker | EigenKronecker | BlockDiagonal) -> str:
    if isinstance(block, BlockDiagonal):
        return f"{len(block.blocks)} groups, each {_shapes(block.blocks[0])}"
    if isinstance(block, EigenKronecker):
        return f"eigenvalues {tuple(block.eigenvalues.shape)}"
    return f"A {tuple(block.A.shape)}, B {tuple(block.B.shape)}"
