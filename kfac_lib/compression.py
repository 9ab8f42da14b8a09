"""Fewer vectors behind a narrow place: each datum's vectors, compressed to its width.

Where V vectors of a datum pass a place with D < V numbers, only Σ_v g gᵀ matters behind it, and D
vectors have the same sum. So the cost of the layers behind it stops growing with the number of
classes. Explained in the section :ref:`speed-classes`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kfac_lib.capture import Call
from kfac_lib.closed_form import OutputHessian

WORTHWHILE = 32
"""Below so many vectors a batched backward pass is too short to gain from fewer of them."""


@dataclass(frozen=True)
class Cut:
    """A place that all ways from the prediction to the layers behind it lead through.

    See :ref:`speed-classes`.

    Args:
        edge: The place in the graph.
        shape: Shape of the tensor there, (N, ...).
    """

    edge: GradientEdge
    shape: torch.Size

    @property
    def width(self) -> int:
        """How many numbers a datum has there."""
        return self.shape[1:].numel()


@dataclass(frozen=True)
class Section:
    """The layers between two cuts, or the prediction and the first (:ref:`speed-classes`).

    Args:
        calls: The calls whose gradients are found in this section, by the layer's name.
        cut: Where the vectors are compressed for the sections behind; None in the last.
    """

    calls: dict[str, list[Call]]
    cut: Cut | None


def sections(
    source: GradientEdge, calls: Mapping[str, list[Call]], V: int, N: int
) -> list[Section]:
    """Divide the net at places that are narrower than the number of vectors.

    See :ref:`speed-classes`. A place is taken where it halves the number of vectors at least, and
    where it divides no layer's calls: they share one set of vectors.

    Args:
        source: Where the vectors enter: the place of the prediction, or of a cut.
        calls: The calls behind it.
        V: Number of vectors.
        N: Number of data.

    Example:
        >>> from kfac_lib.capture import Hooks
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 100))
        >>> f, calls = Hooks(net).run(torch.ones(5, 2))
        >>> [list(section.calls) for section in sections(get_gradient_edge(f), calls, V=100, N=5)]
        [['1'], ['0']]
    """
    result, todo = [], dict(calls)
    while V >= WORTHWHILE:
        found = [
            (len(near), cut.width, cut, near)
            for cut in _candidates(todo, N)
            if 2 * cut.width <= V and (near := _near(source, cut, todo)) is not None
        ]
        if not found:
            break
        _, V, cut, near = min(found, key=lambda one: one[:2])
        result.append(Section({name: todo.pop(name) for name in near}, cut))
        source = cut.edge
    return [*result, Section(todo, None)]


@dataclass(frozen=True)
class Head:
    """A last affine map that has a closed form, and what is behind it (:ref:`speed-classes`).

    Args:
        call: The call of the layer that it is; None where that is not covered.
        weight: Its matrix W, shape (C, D_in).
        behind: The calls of the other layers.
        cut: Its input, from where they are reached; None if there are no others.
    """

    call: Call | None
    weight: Tensor
    behind: dict[str, list[Call]]
    cut: Cut | None

    @property
    def is_narrow(self) -> bool:
        """Whether its input is narrower than the prediction, which has many entries."""
        C, D_in = self.weight.shape
        return D_in < C and C >= WORTHWHILE

    def vectors(self, hessian: OutputHessian) -> Tensor:
        """Return vectors at its input with the sum that the Hessians have there.

        Args:
            hessian: The Hessians of the loss at the prediction.

        Returns:
            Tensor of shape (V, N, D_in), with V the rank of one Hessian, or D_in if that is less.
        """
        if not self.is_narrow:
            return hessian.columns(self.weight)
        return root_of(hessian.pulled_back(self.weight)).permute(2, 0, 1)


def closed_head(f: Tensor, calls: Mapping[str, list[Call]]) -> Head | None:
    """Find the affine map whose vectors need not be formed (:ref:`speed-classes`).

    Args:
        f: The prediction, attached to its graph.
        calls: What a source noted.

    Returns:
        The last layer, covered or not, if the prediction (N, C) is what it gives, as an affine map
        of one input (N, D_in), and all other layers are reached through this input; else None.

    Example:
        >>> from kfac_lib.capture import Hooks
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 100))
        >>> head = closed_head(*Hooks(net).run(torch.ones(5, 2)))
        >>> head.call.name, head.cut.width
        ('1', 3)
    """
    if f.ndim != 2:
        return None
    source = get_gradient_edge(f)
    covered = [name for name, of in calls.items() if _same_place(of[0].edge, source)]
    head = _covered_head(f, calls, covered[0]) if covered else _uncovered_head(f, calls)
    if head is None or (head.cut is None and head.behind):
        return None
    through = head.cut is None or _near(source, head.cut, calls) == covered
    return head if through else None


def _covered_head(f: Tensor, calls: Mapping[str, list[Call]], name: str) -> Head | None:
    call = calls[name][0]
    shape, weight = torch.Size((f.shape[0], call.x.shape[-1])), call.weight
    if weight is None or len(calls[name]) > 1 or call.before > 1 or call.x.shape != shape:
        return None
    if weight.shape != (f.shape[1], shape[1]):
        return None
    behind = {other: of_other for other, of_other in calls.items() if other != name}
    cut = None if call.input_edge is None or not behind else Cut(call.input_edge, shape)
    return Head(call, weight, behind, cut)


def _uncovered_head(f: Tensor, calls: Mapping[str, list[Call]]) -> Head | None:
    """The product x Wᵀ (+ b) that gives f, of a layer that is frozen or ignored."""
    node = f.grad_fn
    name = None if node is None else node.name()
    if name not in ("AddmmBackward0", "MmBackward0"):
        return None
    assert node is not None
    if getattr(node, "_saved_alpha", 1) != 1:
        return None
    x, number = node.next_functions[-2]  # (b, x, W) or (x, W)
    if x is None:
        return None
    weight = node._saved_mat2.T.detach()  # type: ignore[attr-defined]
    cut = Cut(GradientEdge(x, number), torch.Size((f.shape[0], weight.shape[1])))
    return Head(None, weight, dict(calls), cut)


class GramSums:
    """Each datum's Σ_v g gᵀ at a cut, and vectors with the same sum (:ref:`speed-classes`).

    Args:
        cut: The place.

    Example:
        >>> from torch.autograd.graph import get_gradient_edge
        >>> x = torch.ones(1, 2, requires_grad=True)
        >>> sums = GramSums(Cut(get_gradient_edge(x), x.shape))
        >>> sums.update(torch.tensor([[[3.0, 0.0]], [[4.0, 0.0]], [[0.0, 2.0]]]))
        >>> sums.root().abs().tolist()
        [[[5.0, 0.0]], [[0.0, 2.0]]]
    """

    def __init__(self, cut: Cut) -> None:
        self.cut = cut
        self.sums: Tensor | None = None

    def update(self, g: Tensor) -> None:
        """Add a chunk of vectors at the cut, shape (V, N, ...)."""
        rows = g.flatten(2).transpose(0, 1)
        sums = rows.mT @ rows
        self.sums = sums if self.sums is None else self.sums.add_(sums)

    def root(self) -> Tensor:
        """Return the vectors, shape (D, N, ...).

        Raises:
            ValueError: If there were none.
        """
        if self.sums is None:
            raise ValueError("No vectors were accumulated at the cut.")
        return root_of(self.sums).permute(2, 0, 1).reshape(-1, *self.cut.shape)


def root_of(M: Tensor) -> Tensor:
    """A root R of each symmetric positive semi-definite matrix M = R Rᵀ (:ref:`speed-classes`).

    Cholesky's where it exists to rounding; else, as for singular matrices, from the eigenvalues.

    Args:
        M: Shape (N, D, D); where it is one matrix, expanded, it is decomposed once.

    Returns:
        Tensor of shape (N, D, D).

    Example:
        >>> root_of(torch.tensor([[[4.0, 2.0], [2.0, 5.0]]])).tolist()
        [[[2.0, 0.0], [1.0, 2.0]]]
    """
    if len(M) > 1 and M.stride(0) == 0:
        return root_of(M[:1]).expand_as(M)
    wide = M.to(torch.promote_types(M.dtype, torch.float32))
    root, failed = torch.linalg.cholesky_ex(wide)
    bad = failed > 0
    if bool(bad.any()):
        # Each unit in its own scale, as Cholesky has it: eigenvalues see the largest alone.
        scale = wide[bad].diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
        one = torch.where(scale > 0, 1 / scale, 0)
        eigenvalues, Q = torch.linalg.eigh(one.unsqueeze(2) * wide[bad] * one.unsqueeze(1))
        root[bad] = scale.unsqueeze(2) * Q * eigenvalues.clamp(min=0).sqrt().unsqueeze(1)
    result: Tensor = root.to(M.dtype)
    return result


def _candidates(calls: Mapping[str, list[Call]], N: int) -> list[Cut]:
    """Inputs and outputs of all calls; inputs first, they have no units that are switched off.

    Only tensors whose axis 0 is the datum, not rows in which other axes are merged into it.
    """
    alone = [call for of_layer in calls.values() for call in of_layer if call.before == 1]
    inputs = [Cut(call.input_edge, call.x.shape) for call in alone if call.input_edge is not None]
    outputs = [Cut(call.edge, call.shape) for call in alone if len(call.shape) == 2]
    return [cut for cut in (*inputs, *outputs) if cut.shape[0] == N]


def _near(source: GradientEdge, cut: Cut, calls: Mapping[str, list[Call]]) -> list[str] | None:
    """The layers in front of a cut; None if it is no cut, or nothing is behind it."""
    if _same_place(source, cut.edge):
        return None
    seen, todo, reached = {source.node}, [source.node], False
    while todo:
        for child, number in todo.pop().next_functions:
            if child is cut.edge.node:
                if number != cut.edge.output_nr:
                    return None
                reached = True
            elif child is not None and child not in seen:
                seen.add(child)
                todo.append(child)
    in_front = {
        name: {call.edge.node in seen for call in of_layer} for name, of_layer in calls.items()
    }
    near = [name for name, places in in_front.items() if True in places]
    divided = any(len(places) > 1 for places in in_front.values())
    return near if reached and not divided and len(near) < len(calls) else None


def _same_place(one: GradientEdge, other: GradientEdge) -> bool:
    return one.node is other.node and one.output_nr == other.output_nr
