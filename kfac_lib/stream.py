"""The stream of rows: the one place that calls autograd.

For every batch, layer by layer and chunk by chunk of the flavour's vectors, it yields inputs x and
pseudo-gradients g. Whoever consumes them, factors, exact blocks or whatever comes, never sees a
graph. Explained in the section :ref:`kfac-pseudo-gradients`.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from kfac_lib.backward import Vectors, backpropagate, vectors_of
from kfac_lib.capture import Call, Source, is_finite
from kfac_lib.compression import closed_head
from kfac_lib.fisher import Fisher, TypeII
from kfac_lib.layers import Convolution, Patches, lookup_of, output_rows
from kfac_lib.losses import Criterion
from kfac_lib.rows import Count, OutputRows, Rows, make_rows, stored_input

Data = Any
"""One pair (X, y), or an iterable of them. X may be whatever the model takes."""


def is_pair(data: Any) -> bool:
    """Whether the data are one pair (X, y), not an iterable of pairs (:ref:`kfac-batches`).

    Example:
        >>> is_pair((torch.ones(5, 2), torch.zeros(5, 3)))
        True
    """
    return isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor)


def batches(data: Data) -> Iterator[tuple[Any, Tensor]]:
    """Iterate over pairs (X, y), whether one or many were given (:ref:`kfac-batches`).

    Args:
        data: One pair (X, y) whose y is a tensor, or an iterable of such pairs.

    Yields:
        Pairs (X, y).

    Raises:
        TypeError: If it is something else.
        ValueError: If there is no batch, a batch has no datum, or holds NaN or inf.
        NotImplementedError: For sparse inputs.

    Example:
        >>> X, y = torch.ones(5, 2), torch.zeros(5, 3)
        >>> len(list(batches((X, y)))), len(list(batches([(X, y), (X, y)])))
        (1, 2)
    """
    hint = "Give one pair (X, y) of inputs and a target tensor, or an iterable of such pairs"
    if is_pair(data):
        data = [data]
    elif not isinstance(data, Iterable) or isinstance(data, Tensor | Mapping | str):
        raise TypeError(f"The data are a {type(data).__name__}. {hint}.")
    number = 0
    for number, pair in enumerate(data, start=1):
        if not is_pair(pair):
            raise TypeError(f"Batch {number} is a {type(pair).__name__}. {hint}.")
        X, y = pair
        if y.ndim == 0:
            raise ValueError(
                f"The targets of batch {number} have no axis for the data. Give shape (N, ...), "
                "for example y.unsqueeze(0)."
            )
        if len(y) == 0:
            raise ValueError(f"Batch {number} is empty: its targets have shape {tuple(y.shape)}.")
        for tensor in _tensors(X):
            if tensor.layout != torch.strided:
                raise NotImplementedError(
                    f"The inputs X of batch {number} are sparse ({tensor.layout}), which is not "
                    "supported. Use X.to_dense()."
                )
        usable = {"inputs X": all(map(_is_usable, _tensors(X))), "targets y": _is_numbers(y)}
        for name, good in usable.items():
            if not good:
                raise ValueError(
                    f"The {name} of batch {number} hold NaN or inf. Clean the data first: one such "
                    "entry would spoil every factor."
                )
        yield X, y
    if number == 0:
        raise ValueError(f"The data hold no batch. {hint}; an iterator can be used only once.")


def first_inputs(data: Data) -> tuple[Any, Data]:
    """The inputs of the first batch, and data that still hold it (:ref:`func-source`).

    Args:
        data: One pair (X, y), or an iterable of them; of an iterator the first is put back.

    Raises:
        ValueError: If there is no batch, or it is bad.
        TypeError: If the data are of the wrong kind.

    Example:
        >>> X, data = first_inputs(iter([(torch.ones(5, 2), torch.zeros(5, 3))]))
        >>> X.shape, len(list(data))
        (torch.Size([5, 2]), 1)
    """
    if isinstance(data, Iterator):
        head = list(islice(data, 1))
        return next(batches(head))[0], chain(head, data)
    return next(batches(data))[0], data


def stream(
    source: Source,
    criterion: Criterion,
    fisher: Fisher,
    data: Data,
    *,
    chunk_size: int | None = None,
    joint: bool = False,
) -> Iterator[tuple[str, Rows]]:
    """Run a source over the data and yield the rows of every layer.

    See :ref:`kfac-pseudo-gradients`. One forward pass and ⌈V / chunk_size⌉ calls of
    :func:`torch.autograd.grad` a batch; V calls if an operation of the model cannot be batched.
    Several calls of a layer are joined along S. Where a place in the net is narrower than the
    vectors are many, fewer with the same Σ_v g gᵀ go on from there, and type-II vectors of a last
    affine layer may have a closed form (:ref:`speed-classes`): V differs between layers then,
    unless they are streamed jointly.

    Args:
        source: What runs the model: :class:`~kfac_lib.capture.Hooks`, or
            :class:`~kfac_lib.tracing.Traced`.
        criterion: The criterion.
        fisher: The flavour.
        data: One pair (X, y), or an iterable of them.
        chunk_size: How many vectors are backpropagated at once; what fits into 64 MiB when
            not given (:ref:`speed-memory`).
        joint: Whether vector v is to be the same for all layers, so that their rows can be
            compared; nothing is compressed then.

    Yields:
        Pairs of a layer's name and its rows.

    Raises:
        ValueError: For bad data, or a model whose factors are not defined.
        NotImplementedError: For a model that is not supported.

    Example:
        >>> from kfac_lib.capture import Hooks
        >>> from kfac_lib.fisher import TypeII
        >>> from kfac_lib.losses import SquaredError
        >>> net, data = torch.nn.Linear(2, 3), (torch.ones(5, 2), torch.zeros(5, 3))
        >>> for name, rows in stream(Hooks(net), SquaredError("mean"), TypeII(), data):
        ...     print(repr(name), tuple(rows.x.shape), tuple(rows.g.shape))
        '' (5, 1, 2) (3, 5, 1, 3)
    """
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size={chunk_size!r}: use a positive integer, or None for all.")
    if torch.is_inference_mode_enabled():
        raise ValueError("Inference mode records no graph. Leave torch.inference_mode() first.")
    biases = source.coverage.biases
    for X, y in batches(data):
        y = y.detach()
        f, calls = source.run(X)
        if len(f) != len(y):
            raise ValueError(
                f"The prediction has {len(f)} data, the targets {len(y)}. Axis 0 must be the datum."
            )
        criterion.check(f, y)
        # A datum whose labels are all ignored belongs to no sum; most batches have none.
        counted = criterion.counted(f, y)
        N = int(counted.sum())
        keep = slice(None) if len(f) == N else counted
        count = Count(N, criterion.denominator(f, y))
        closed = isinstance(fisher, TypeII) and not joint and criterion.agrees("output_hessian")
        head = closed_head(f, calls) if closed else None
        if head is not None and chunk_size is not None and not head.is_narrow:
            head = None  # the columns are made chunk by chunk instead
        hessian = None if head is None else criterion.output_hessian(f.detach(), y)
        place: Tensor | GradientEdge
        vectors: Vectors
        if head is None or hessian is None:
            place, behind = f, calls
            vectors = vectors_of(fisher, criterion, f, y, chunk_size)
        else:
            if head.call is not None:
                yield (
                    head.call.name,
                    OutputRows(
                        x=head.call.x[keep].unsqueeze(1),
                        hessian=hessian[keep],
                        vectors=partial(_kept_vectors, fisher, criterion, f, y, keep),
                        bias=1.0 if head.call.name in biases else None,
                        count=count,
                    ),
                )
            if head.cut is None:
                continue
            place, behind = head.cut.edge, head.behind
            vectors = head.vectors(hessian)
        x = {name: _joined_inputs(of_layer, len(f))[keep] for name, of_layer in behind.items()}
        new = set(behind)
        for gradients in backpropagate(place, behind, vectors, chunk_size, joint):
            for name in list(gradients):
                g = _joined_outputs(behind[name], gradients.pop(name), len(f))[:, keep]
                of_chunk = count if name in new else Count(0, 0)
                new.discard(name)
                bias = 1.0 if name in biases else None
                yield name, make_rows(behind[name][0].layer, x[name], g, bias, of_chunk)


def _kept_vectors(
    fisher: Fisher, criterion: Criterion, f: Tensor, y: Tensor, keep: Tensor | slice
) -> Tensor:
    return fisher.vectors(criterion, f, y)[:, keep]


def _joined_inputs(calls: list[Call], N: int) -> Tensor | Patches:
    if len(calls) == 1 and calls[0].before == 1:
        x = stored_input(calls[0].layer, calls[0].x)
        if len(x) == N:
            return x
    parts = [_unmerged(_rows_of(call, N), N, 0) for call in calls]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _rows_of(call: Call, N: int) -> Tensor:
    x = stored_input(call.layer, _datum_first(call, call.x, N, 0))
    return x.rows() if isinstance(x, Patches) else x


def _joined_outputs(calls: list[Call], gradients: list[Tensor], N: int) -> Tensor:
    parts = []
    for call, g in zip(calls, gradients, strict=True):
        datum_first = _datum_first(call, g.reshape(len(g), *call.shape), N, 1)
        parts.append(_unmerged(output_rows(call.layer, datum_first), N, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _datum_first(call: Call, tensor: Tensor, N: int, axis: int) -> Tensor:
    """Move the datum to the given axis, from between others or out of merged rows.

    The other axes in front of the features follow it, merged: (N·before·after, features).
    """
    if call.before == 1 and tensor.shape[axis] == N:
        return tensor
    features = len(call.layer.kernel_size) + 1 if isinstance(call.layer, Convolution) else 1
    end = tensor.ndim - (0 if lookup_of(call.layer) and axis == 0 else features)
    after = tensor.shape[axis:end].numel() // (call.before * N)
    rows = tensor.reshape(*tensor.shape[:axis], call.before, N, after, *tensor.shape[end:])
    return rows.movedim(axis + 1, axis).flatten(axis, axis + 2)


def _unmerged(rows: Tensor, N: int, axis: int) -> Tensor:
    """Rows (N·before·after, S, ...) as (N, before·after·S, ...)."""
    if rows.shape[axis] == N:
        return rows
    S = rows.shape[axis] * rows.shape[axis + 1] // N
    return rows.reshape(*rows.shape[:axis], N, S, *rows.shape[axis + 2 :])


def _is_numbers(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or is_finite(tensor)


def _is_usable(tensor: Tensor) -> bool:
    # −inf is what the masks of attention hold, and may stand among the inputs.
    return _is_numbers(tensor) or is_finite(tensor.masked_fill(tensor == -torch.inf, 0))


def repeated(data: Data, in_order: bool) -> Data:
    """Data that refuse to differ in a later pass (:ref:`diag-subsample`).

    Args:
        data: One pair (X, y), or an iterable of them that can be passed many times.
        in_order: Whether the order of the batches counts. A random flavour draws its vectors anew
            in each pass, and the same draws belong to the same data only in the same order.

    Returns:
        The data. A pass that ends with other data than the first, or with ``in_order`` has others
        at one place, raises a ValueError.

    Example:
        >>> pair = torch.ones(5, 2), torch.zeros(5, 3)
        >>> repeated(pair, True) is pair, len(list(repeated([pair, pair], True)))
        (True, 2)
    """
    return data if is_pair(data) or not isinstance(data, Iterable) else _Repeated(data, in_order)


class _Repeated:
    """Batches whose sums must be the same in each pass: one by one, or all together."""

    def __init__(self, data: Iterable[Any], in_order: bool) -> None:
        self.data, self.in_order = data, in_order
        self.first: list[_Totals] | None = None

    def __iter__(self) -> Iterator[Any]:
        seen: list[_Totals] = []
        for pair in self.data:
            yield pair
            seen.append(_totals(pair))
            if self.in_order and self.first is not None and self.first[: len(seen)] != seen:
                raise ValueError(
                    "The data come in another order in the second pass, or are others, and a "
                    "random flavour would draw other vectors for them. Give a list of batches, or "
                    "a loader without shuffling and augmentation."
                )
        if self.first is None:
            self.first = seen
            return
        before, now = (_Totals(*map(sum, zip(*one, strict=True))) for one in (self.first, seen))
        if not before.agrees_with(now):
            raise ValueError(
                f"The data differ between two passes: {before} at first, {now} then. Give data "
                "that are the same each time, without augmentation; a loader that shuffles must "
                "not drop its last batch."
            )


class _Totals(NamedTuple):
    """What does not depend on the order of the data, but for rounding."""

    N: float = 0.0
    inputs: float = 0.0
    input_size: float = 0.0
    targets: float = 0.0
    target_size: float = 0.0

    def agrees_with(self, other: "_Totals") -> bool:
        slack = [
            1e-9 * size
            for size in (self.input_size, self.input_size, self.target_size, self.target_size)
        ]
        return self.N == other.N and all(
            abs(a - b) <= most for a, b, most in zip(self[1:], other[1:], slack, strict=True)
        )

    def __str__(self) -> str:
        return f"{self.N:.0f} targets with ΣX = {self.inputs:.10g} and Σy = {self.targets:.10g}"


def _totals(pair: Any) -> _Totals:
    X, y = pair
    inputs = [part.double() for part in _tensors(X)]
    return _Totals(
        len(y),
        sum(float(part.sum()) for part in inputs),
        sum(float(part.abs().sum()) for part in inputs),
        float(y.double().sum()),
        float(y.double().abs().sum()),
    )


def _tensors(X: Any) -> Iterator[Tensor]:
    if isinstance(X, Tensor):
        yield X
    elif isinstance(X, Mapping):
        yield from _tensors(list(X.values()))
    elif isinstance(X, tuple | list):
        for part in X:
            yield from _tensors(part)
