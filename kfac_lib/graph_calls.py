"""Graphs with recorders: they run in place of a function and note what its operations read.

Every graph is verified on the batch that it was traced for: permuted data permute the prediction
and all inputs, and the calls add up to the derivatives of autograd. Explained in the section
:ref:`func-trace`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, fx, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

from kfac_lib.capture import Call, _reaching_other_data, place_of
from kfac_lib.coverage import _paste
from kfac_lib.graph import Batch, describe
from kfac_lib.graph_uses import Use
from kfac_lib.layers import Lookup, _close, groups_of, input_rows, output_rows

_HOLE = object()


@dataclass(frozen=True)
class Form:
    """What the inputs X are beside their tensors (:ref:`func-trace`).

    Args:
        spec: How lists, tuples and dicts are nested.
        rest: The constants with their types; a mark where a tensor stands.

    Example:
        >>> form, tensors = Form.of([torch.ones(5, 2), {"scale": 2.0}])
        >>> len(tensors), form.build(["another tensor"])
        (1, ['another tensor', {'scale': 2.0}])
    """

    spec: pytree.TreeSpec
    rest: tuple[tuple[type, Any], ...]

    @classmethod
    def of(cls, X: Any) -> tuple["Form", list[Tensor]]:
        """Take X apart, into its form and its tensors, detached and contiguous.

        Raises:
            TypeError: If X holds what is neither a tensor nor a constant.
        """
        leaves, spec = pytree.tree_flatten(X)
        for leaf in leaves:
            if not isinstance(leaf, Tensor | bool | int | float | complex | str | None):
                raise TypeError(
                    f"X holds a {type(leaf).__name__}. Give tensors, or lists, tuples and dicts of "
                    "tensors."
                )
        # A graph depends on strides, so they are always the same.
        tensors = [x.detach().contiguous() for x in leaves if isinstance(x, Tensor)]
        rest = [_HOLE if isinstance(x, Tensor) else x for x in leaves]
        return cls(spec, tuple((type(x), x) for x in rest)), tensors

    def build(self, tensors: Sequence[Any]) -> Any:
        """Put X together."""
        given = iter(tensors)
        leaves = [next(given) if leaf is _HOLE else leaf for _, leaf in self.rest]
        return pytree.tree_unflatten(leaves, self.spec)


@dataclass
class RecordedGraph:
    """A traced function with recorders, and for which inputs it holds (:ref:`func-trace`).

    Args:
        graph: Graph of the function; recorders are put into it.
        uses: The uses of its parameters.
        keys: For each use the key of the weight.
        before: For each use the number of rows of x in front of the datum's.
        form: The form of X.
        like: For each tensor of X its dtype, device and shape.
        has_data: For each of them whether axis 0 is the datum.
        batch: The batch size.

    Example:
        >>> from kfac_lib.graph import symbolic
        >>> from kfac_lib.graph_uses import find_uses
        >>> W, X = torch.ones(3, 2, requires_grad=True), torch.ones(5, 2)
        >>> graph, batch = symbolic(lambda W, X: X @ W.T, [W, X], [False, True], N=5)
        >>> uses, _ = find_uses(graph, {graph.find_nodes(op="placeholder")[0]: "W"})
        >>> form, _ = Form.of(X)
        >>> like = [(X.dtype, X.device, X.shape)]
        >>> recorded = RecordedGraph(graph, uses, ["W"], [1], form, like, [True], batch)
        >>> f, calls = recorded.run([W], [torch.ones(7, 2)])
        >>> f.shape, calls[0].x.shape
        (torch.Size([7, 3]), torch.Size([7, 2]))
    """

    graph: fx.Graph
    uses: list[Use]
    keys: list[str]
    before: list[int]
    form: Form
    like: list[tuple[torch.dtype, torch.device, torch.Size]]
    has_data: list[bool]
    batch: Batch
    verified: bool = field(default=False, init=False)
    unreached: set[int] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        nodes = list(self.graph.nodes)
        with self.graph.inserting_before(nodes[0]):
            recorder = self.graph.placeholder("recorder")
        for i, use in enumerate(self.uses):
            users = list(use.node.users)
            with self.graph.inserting_after(use.node):
                recorded = self.graph.call_function(_record, (recorder, i, use.x, use.node))
            for user in users:
                user.replace_input_with(use.node, recorded)
        self.graph.set_codegen(fx.graph.CodeGen())
        self._module = fx.GraphModule(self.graph.owning_module or {}, self.graph)

    def fits(self, form: Form, X: list[Tensor]) -> bool:
        """Whether the trace holds for such inputs."""
        if form != self.form:
            return False
        sizes = set()
        for x, (dtype, device, shape), data in zip(X, self.like, self.has_data, strict=True):
            if (x.dtype, x.device, x.ndim) != (dtype, device, len(shape)):
                return False
            if x.shape[data:] != shape[data:]:
                return False
            sizes |= {len(x)} if data else set()
        return len(sizes) == 1 and self.batch.may_be(sizes.pop())

    def run(self, leaves: list[Tensor], X: list[Tensor]) -> tuple[Tensor, dict[int, Call]]:
        """Return the prediction, and the calls by the number of the use."""
        recorder = _Recorder(self)
        with torch.enable_grad():
            f: Tensor = self._module(recorder, *leaves, *X)
        return f, recorder.calls

    def verify_data(
        self, leaves: list[Tensor], X: list[Tensor], f: Tensor, calls: Mapping[int, Call]
    ) -> None:
        """Ask in two ways, which see different things, whether data depend on each other.

        The first half of the data must get the same predictions by itself; and what is
        backpropagated from the first datum alone must reach no other.

        Raises:
            ValueError: If it depends on them.
        """
        k = (len(f) + 1) // 2
        if k < len(f) and self.batch.may_be(k):
            pairs = zip(X, self.has_data, strict=True)
            f_half, _ = self.run(leaves, [x[:k] if data else x for x, data in pairs])
            if not _same(f_half.detach(), f.detach()[:k]):
                raise ValueError(
                    "The prediction of a datum depends on the other data of the batch: the first "
                    f"{k} data by themselves get another one. So its factors are not defined "
                    "datum by datum. Take statistics that are fixed."
                )
        reaching = _reaching_other_data(calls.values(), f)
        if reaching is not None:
            raise ValueError(
                "The prediction of a datum depends on the other data of the batch (as with batch "
                f"statistics), behind the operation with {reaching.name!r}. So its factors are not "
                "defined datum by datum. Take statistics that are fixed."
            )

    def verify_order(
        self, leaves: list[Tensor], X: list[Tensor], f: Tensor, calls: Mapping[int, Call]
    ) -> None:
        """Run permuted data, which must permute the prediction and all inputs.

        Raises:
            ValueError: If they do not permute the prediction.
            NotImplementedError: If they do not permute an input.
        """
        N = len(f)
        order = torch.arange(N).roll(1)
        pairs = zip(X, self.has_data, strict=True)
        permuted = [x[order.to(x.device)] if data else x for x, data in pairs]
        f_permuted, calls_permuted = self.run(leaves, permuted)
        if not _same(f_permuted.detach(), f.detach()[order.to(f.device)]):
            raise ValueError(
                "The prediction of a datum depends on the other data of the batch, or on random "
                "numbers, so its factors are not defined. (Tensors of X whose axis 0 is as long as "
                f"the batch, {N}, are taken for data: use another batch size if one of them is "
                "not.)"
            )
        for i, call in calls.items():
            x, x_permuted = (c.x.reshape(c.before, N, -1) for c in (call, calls_permuted[i]))
            if not _same(x_permuted, x[:, order.to(x.device)]):
                use = self.uses[i]
                raise NotImplementedError(
                    f"Which rows of the input of {describe(use.node)}, where {use.weight!r} is "
                    "used, belong to which datum is not clear. Keep the datum on an axis of its "
                    "own, as (N, S, D); and take X.shape[0], not len(X), for the batch size."
                )
        self.verified = N > 1  # with one datum any order is right

    def verify_sums(
        self, leaves: Mapping[str, Tensor], f: Tensor, calls: Mapping[int, Call], expected: Tensor
    ) -> None:
        """Compare Σ g x̃ᵀ over all calls with autograd, and note the calls that do not reach f.

        The derivative is that of the prediction which the function itself gave: a backward pass of
        its own is no part of a graph.

        Raises:
            NotImplementedError: If they differ.
        """
        v = torch.arange(f.numel(), device=f.device).cos().to(f.dtype).reshape(f.shape)
        edges = [call.edge for call in calls.values()]
        found = torch.autograd.grad(f, edges, v, retain_graph=True, allow_unused=True)
        gradients = dict(zip(calls, found, strict=True))
        own = torch.autograd.grad(expected, [*leaves.values()], v, allow_unused=True)
        derivatives = dict(zip(leaves, own, strict=True))
        self.unreached = {i for i, g in gradients.items() if g is None}
        sums: dict[str, Tensor] = {}
        for i, g in gradients.items():
            if i in self.unreached:
                continue
            use, call = self.uses[i], calls[i]
            g = g.reshape(call.shape)
            parts = {use.weight: _weight_sum(call, g, use.transposed)}
            if use.bias is not None:
                parts[use.bias] = output_rows(call.layer, g.unsqueeze(0)).flatten(0, 2).sum(0)
            for name, part in parts.items():
                sums[name] = sums[name] + part if name in sums else part
        for name, total in sums.items():
            derivative = derivatives[name]
            if derivative is None or not _same(total, derivative.reshape(total.shape)):
                raise NotImplementedError(
                    f"The derivative by {name!r} is not the sum over its uses in the graph: it is "
                    "changed in place, used in a way that is not seen, or a custom backward "
                    "(torch.autograd.Function), which a graph does not know, stands behind it. "
                    f"Pass ignore={_paste([name])} to leave it out."
                )
        hidden = [name for name in leaves if name not in sums and derivatives[name] is not None]
        if hidden:
            raise NotImplementedError(
                f"The prediction depends on {', '.join(map(repr, hidden))}, but no use of it was "
                "found in the graph: a custom forward or backward hides it. Pass "
                f"ignore={_paste(hidden)} to leave it out."
            )


class _Recorder:
    """Notes the calls of one run."""

    def __init__(self, graph: RecordedGraph) -> None:
        self.graph = graph
        self.calls: dict[int, Call] = {}


def _record(recorder: _Recorder, i: int, x: Tensor, z: Tensor) -> Tensor:
    """Note what an operation read and where its output enters the graph; hand on the output.

    The place is that of the output with its features as last axis, and with all rows of the
    weight-shaped matrix: its gradient is zero in those that the operation did not read.
    """
    if not z.requires_grad:  # under no_grad
        return z
    graph = recorder.graph
    use = graph.uses[i]
    start, stop = use.rows
    whole = (start, stop) == (0, use.width)
    input_edge = get_gradient_edge(x) if x.requires_grad and not use.x_axes else None
    x = x.detach()
    noted = z.permute(use.z_axes) if use.z_axes else z
    noted = noted if whole else nn.functional.pad(noted, (start, use.width - stop))
    edge, noted = place_of(noted)
    recorder.calls[i] = Call(
        name=graph.keys[i],
        layer=use.layer,
        x=x.permute(use.x_axes) if use.x_axes else x,
        version=x._version,
        shape=noted.shape,
        edge=edge,
        before=graph.before[i],
        input_edge=input_edge,
    )
    noted = noted if whole else noted.narrow(-1, start, stop - start).contiguous()
    if use.z_axes:
        noted = noted.permute([use.z_axes.index(axis) for axis in range(noted.ndim)])
    return noted


def _weight_sum(call: Call, g: Tensor, transposed: bool) -> Tensor:
    """Σ g xᵀ over all rows, as a matrix in the orientation of the parameter."""
    layer = call.layer
    if isinstance(layer, Lookup):
        rows, tokens = g.reshape(-1, g.shape[-1]), layer.tokens(call.x).flatten()
        zeros = g.new_zeros(layer.num_embeddings, g.shape[-1])
        return zeros.index_add(0, tokens.clamp(min=0), rows * (tokens >= 0).unsqueeze(1))
    G = groups_of(layer)
    x = rearrange(input_rows(layer, call.x), "n s (g i) -> (n s) g i", g=G)
    rows = rearrange(output_rows(layer, g.unsqueeze(0)), "v n s (g o) -> (v n s) g o", g=G)
    total = torch.einsum("rgo,rgi->goi", rows, x).flatten(0, 1)
    return total.T if transposed else total


def _same(found: Tensor, wanted: Tensor) -> bool:
    return _close(found, wanted) if wanted.is_floating_point() else found.equal(wanted)
