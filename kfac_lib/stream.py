"""The stream of rows: the one place that calls autograd.

For every batch, layer by layer and chunk by chunk of the flavour's vectors, it yields inputs x and
pseudo-gradients g. Whoever consumes them, factors, exact blocks or whatever comes, never sees a
graph. Explained in the section :ref:`kfac-pseudo-gradients`.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from kfac_lib.capture import Call, Source, is_finite
from kfac_lib.fisher import Fisher
from kfac_lib.layers import Convolution, lookup_of, output_rows
from kfac_lib.losses import Criterion
from kfac_lib.rows import Count, Rows, make_rows, stored_input

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
) -> Iterator[tuple[str, Rows]]:
    """Run a source over the data and yield the rows of every layer.

    See :ref:`kfac-pseudo-gradients`. One forward pass and ⌈V / chunk_size⌉ calls of
    :func:`torch.autograd.grad` a batch; V calls if an operation of the model cannot be batched.
    Several calls of a layer are joined along S.

    Args:
        source: What runs the model: :class:`~kfac_lib.capture.Hooks`, or
            :class:`~kfac_lib.tracing.Traced`.
        criterion: The criterion.
        fisher: The flavour.
        data: One pair (X, y), or an iterable of them.
        chunk_size: How many vectors are backpropagated at once; all when not given.

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
        x = {name: _joined_inputs(of_layer, len(f))[keep] for name, of_layer in calls.items()}
        for gradients in _pseudo_gradients(f, calls, fisher.vectors(criterion, f, y), chunk_size):
            for name, of_layer in gradients.items():
                bias = 1.0 if name in biases else None
                g = _joined_outputs(calls[name], of_layer, len(f))[:, keep]
                yield name, make_rows(calls[name][0].layer, x[name], g, bias, count)
            count = Count(0, 0)


def _joined_inputs(calls: list[Call], N: int) -> Tensor:
    parts = [
        _unmerged(stored_input(call.layer, _datum_first(call, call.x, N, 0)), N, 0)
        for call in calls
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _joined_outputs(calls: list[Call], gradients: list[Tensor], N: int) -> Tensor:
    parts = [
        _unmerged(output_rows(call.layer, _datum_first(call, g, N, 1)), N, 1)
        for call, g in zip(calls, gradients, strict=True)
    ]
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


def _pseudo_gradients(
    f: Tensor, calls: Mapping[str, list[Call]], vectors: Tensor, chunk_size: int | None
) -> Iterator[dict[str, list[Tensor]]]:
    """For each chunk of vectors, layer and call the gradients, in the shape of the output."""
    if len(vectors) == 0:
        yield {
            name: [f.new_empty(0, *call.shape) for call in of_layer]
            for name, of_layer in calls.items()
        }
    size = chunk_size or max(len(vectors), 1)
    edges = [call.edge for of_layer in calls.values() for call in of_layer]
    for start in range(0, len(vectors), size):
        chunk = vectors[start : start + size]
        found = iter(_batched_vjp(f, edges, chunk, keep=start + size < len(vectors)))
        gradients = {
            name: [g for _, g in zip(of_layer, found, strict=False) if g is not None]
            for name, of_layer in calls.items()
        }
        unreached = [name for name in calls if len(gradients[name]) < len(calls[name])]
        if unreached:
            raise ValueError(
                f"The prediction does not depend on layer {unreached[0]!r}: its output is "
                f"discarded or detached. Pass ignore={unreached} to leave it out."
            )
        yield gradients


def _batched_vjp(
    f: Tensor, edges: list[GradientEdge], vectors: Tensor, keep: bool
) -> list[Tensor | None]:
    """Backpropagate V vectors in one call, or one by one where batching has no rule."""

    def one_by_one() -> list[Tensor | None]:
        last = len(vectors) - 1
        each = [
            torch.autograd.grad(f, edges, v, retain_graph=keep or i < last, allow_unused=True)
            for i, v in enumerate(vectors)
        ]
        if last == 0:
            return [None if g is None else g.unsqueeze(0) for g in each[0]]
        return [None if g[0] is None else torch.stack(g) for g in zip(*each, strict=True)]

    if len(vectors) == 1:
        return one_by_one()
    with warnings.catch_warnings():
        # What has no rule of its own, as attention, is slower; nothing that one could mend.
        warnings.filterwarnings("ignore", "There is a performance drop")
        return _all_at_once(f, edges, vectors) or one_by_one()


def _all_at_once(
    f: Tensor, edges: list[GradientEdge], vectors: Tensor
) -> list[Tensor | None] | None:
    try:
        # The graph must outlive a failed attempt.
        return list(
            torch.autograd.grad(
                f,
                edges,
                vectors,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=True,
            )
        )
    except RuntimeError:
        return None


def _is_numbers(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or is_finite(tensor)


def _is_usable(tensor: Tensor) -> bool:
    # −inf is what the masks of attention hold, and may stand among the inputs.
    return _is_numbers(tensor) or is_finite(tensor.masked_fill(tensor == -torch.inf, 0))


def _tensors(X: Any) -> Iterator[Tensor]:
    if isinstance(X, Tensor):
        yield X
    elif isinstance(X, Mapping):
        yield from _tensors(list(X.values()))
    elif isinstance(X, tuple | list):
        for part in X:
            yield from _tensors(part)
