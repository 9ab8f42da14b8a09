"""Backpropagate a batch's vectors to the layers: in chunks, and fewer of them behind narrow places.

Explained in the sections :ref:`kfac-pseudo-gradients` and :ref:`speed-classes`.
"""

import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kfac_lib.capture import Call
from kfac_lib.compression import GramSums, Section, sections
from kfac_lib.fisher import Fisher, TypeII
from kfac_lib.losses import Criterion

MEMORY = 2**26
"""Bytes of pseudo-gradients that are held at a time, unless a chunk_size is given."""


@dataclass(frozen=True)
class RootColumns:
    """Columns of √κ_n L_n that are made when they are needed, a few at a time.

    See :ref:`speed-classes`.

    Args:
        criterion: The criterion.
        f: The prediction, detached.
        y: The targets.

    Example:
        >>> from kfac_lib.losses import SquaredError
        >>> f = torch.zeros(5, 3)
        >>> columns = RootColumns(SquaredError("mean"), f, f)
        >>> len(columns), columns[1:].shape
        (3, torch.Size([2, 5, 3]))
    """

    criterion: Criterion
    f: Tensor
    y: Tensor

    def __len__(self) -> int:
        return self.f.shape[1:].numel()

    def __getitem__(self, some: slice) -> Tensor:
        places = torch.arange(len(self), device=self.f.device)
        units = (places[some, None] == places).to(self.f.dtype)
        units = units.reshape(-1, 1, *self.f.shape[1:]).expand(-1, *self.f.shape)
        return self.criterion.hessian_root_product(self.f, self.y, units)


Vectors = Tensor | RootColumns
"""What is backpropagated: (V, *f.shape), or columns that are made when they are needed."""


def vectors_of(
    fisher: Fisher, criterion: Criterion, f: Tensor, y: Tensor, chunk_size: int | None = None
) -> Vectors:
    """A flavour's vectors; of a large root, or for small chunks, made chunk by chunk.

    See :ref:`speed-classes`.

    Example:
        >>> from kfac_lib.losses import SquaredError
        >>> f = torch.zeros(5, 3)
        >>> vectors_of(TypeII(), SquaredError("mean"), f, f).shape
        torch.Size([3, 5, 3])
    """
    columns = f.nbytes * f.shape[1:].numel()
    few = chunk_size is not None and chunk_size < f.shape[1:].numel()
    made_of_columns = isinstance(fisher, TypeII) and criterion.agrees("hessian_root_product")
    if made_of_columns and (columns > MEMORY or (few and fisher == TypeII())):
        return RootColumns(criterion, f.detach(), y)
    return fisher.vectors(criterion, f, y)


def backpropagate(
    source: Tensor | GradientEdge,
    calls: Mapping[str, list[Call]],
    vectors: Vectors,
    chunk_size: int | None = None,
    joint: bool = False,
) -> Iterator[dict[str, list[Tensor]]]:
    """Find the pseudo-gradients of every call, chunk by chunk (:ref:`kfac-pseudo-gradients`).

    Behind a place that is narrower than the vectors are many, they are replaced by fewer.

    Args:
        source: Where the vectors enter the graph: the prediction, or a cut's edge.
        calls: The calls behind it, by the layer's name.
        vectors: The vectors, in the shape that the tensor has there.
        chunk_size: How many are backpropagated at once; as many as fit into :data:`MEMORY` when
            not given.
        joint: Whether all layers are to get the same vectors, in full number.

    Yields:
        For some of the layers, or all, one gradient (V, *shape) a call; V differs between layers.

    Raises:
        ValueError: If a layer is not reached.

    Example:
        >>> from kfac_lib.capture import Hooks
        >>> f, calls = Hooks(torch.nn.Linear(2, 3)).run(torch.ones(5, 2))
        >>> chunks = backpropagate(f, calls, torch.ones(7, 5, 3), chunk_size=4)
        >>> [chunk[""][0].shape for chunk in chunks]
        [torch.Size([4, 5, 3]), torch.Size([3, 5, 3])]
    """
    if len(vectors) == 0:
        empty = vectors[:0]
        yield {name: [empty.new_empty(0, *c.shape) for c in of] for name, of in calls.items()}
        return
    place = get_gradient_edge(source) if isinstance(source, Tensor) else source
    whole = [Section(dict(calls), None)]
    N = vectors[:1].shape[1]
    for section in whole if joint else sections(place, calls, len(vectors), N):
        edges = [call.edge for of_layer in section.calls.values() for call in of_layer]
        sums = None
        if section.cut is not None:
            sums = GramSums(section.cut)
            edges.append(section.cut.edge)
        V = len(vectors)
        size = chunk_size or _fitting(section, V)
        for start in range(0, V, size):
            chunk = vectors[start : start + size]
            # The way to a layer in front of a cut may lead past layers behind it.
            keep = section.cut is not None or start + size < V
            found = _batched_vjp(source, edges, chunk, keep)
            if sums is not None:
                at_cut = found.pop()
                assert at_cut is not None  # a cut lies on a way to the layers behind it
                sums.update(at_cut)
            if section.calls:
                gradients = _by_layer(section.calls, found)
                del found  # who takes them out of the dict can free them
                yield gradients
        if sums is not None:
            source, vectors = sums.cut.edge, sums.root()


def _fitting(section: Section, V: int) -> int:
    """How many vectors' pseudo-gradients fit into the memory, in chunks of about one size."""
    calls = [call for of_layer in section.calls.values() for call in of_layer]
    bytes_each = sum(call.shape.numel() * call.x.element_size() for call in calls)
    size = min(V, max(1, MEMORY // max(1, bytes_each)))
    return ceil(V / ceil(V / size))


def _by_layer(
    calls: Mapping[str, list[Call]], found: list[Tensor | None]
) -> dict[str, list[Tensor]]:
    given = iter(found)
    gradients = {
        name: [g for _, g in zip(of_layer, given, strict=False) if g is not None]
        for name, of_layer in calls.items()
    }
    unreached = [name for name in calls if len(gradients[name]) < len(calls[name])]
    if unreached:
        raise ValueError(
            f"The prediction does not depend on layer {unreached[0]!r}: its output is "
            f"discarded or detached. Pass ignore={unreached} to leave it out."
        )
    return gradients


def _batched_vjp(
    source: Tensor | GradientEdge, edges: list[GradientEdge], vectors: Tensor, keep: bool
) -> list[Tensor | None]:
    """Backpropagate V vectors in one call, or one by one where batching has no rule."""

    def one_by_one() -> list[Tensor | None]:
        last = len(vectors) - 1
        each = [_vjp(source, edges, v, keep or i < last) for i, v in enumerate(vectors)]
        if last == 0:
            return [None if g is None else g.unsqueeze(0) for g in each[0]]
        return [None if g[0] is None else torch.stack(g) for g in zip(*each, strict=True)]

    if len(vectors) == 1:
        return one_by_one()
    with warnings.catch_warnings():
        # What has no rule of its own, as attention, is slower; nothing that one could mend.
        warnings.filterwarnings("ignore", "There is a performance drop")
        return _all_at_once(source, edges, vectors) or one_by_one()


def _vjp(
    source: Tensor | GradientEdge, edges: list[GradientEdge], v: Tensor, keep: bool
) -> tuple[Tensor | None, ...]:
    if not isinstance(source, Tensor) or "sympy" in sys.modules:
        return torch.autograd.grad(source, edges, v, retain_graph=keep, allow_unused=True)
    # Of a scalar: to check vectors that it is given, torch imports sympy, 35 MB.
    with torch.enable_grad():
        product = (source * v).sum()
    return torch.autograd.grad(product, edges, retain_graph=keep, allow_unused=True)


def _all_at_once(
    source: Tensor | GradientEdge, edges: list[GradientEdge], vectors: Tensor
) -> list[Tensor | None] | None:
    try:
        # The graph must outlive a failed attempt.
        return list(
            torch.autograd.grad(
                source,
                edges,
                vectors,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=True,
            )
        )
    except RuntimeError:
        return None
