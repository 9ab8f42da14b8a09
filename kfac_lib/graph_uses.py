"""Where a traced graph uses its parameters: the operations that KFAC understands.

Every parameter is followed through the graph. What only moves its entries (transposes, slices,
chunks) is followed on an empty tensor, whose strides say which entries are where; what reads it is
brought to one form, z = x Wᵀ + b with the features as last axis. Anything else is noted, to be
refused. Explained in the section :ref:`func-operations`.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from kfac_lib.graph import options_of
from kfac_lib.layers import Affine, Convolution, Lookup, Operation, both_sides

aten = torch.ops.aten
_MOVES = {
    *(aten.t.default, aten.numpy_T.default, aten.mT.default, aten.transpose.int),
    *(aten.permute.default, aten.view.default, aten.reshape.default, aten.flatten.using_ints),
    *(aten.unflatten.int, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
    *(aten.unsqueeze.default, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default),
    *(aten.tensor_split.sections, aten.tensor_split.indices, aten.unbind.int, aten.select.int),
    *(aten.slice.Tensor, aten.narrow.default, operator.getitem),
}
_COPIES = {aten.contiguous.default, aten.clone.default, aten.alias.default}
_CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default}
_MATMULS = {aten.matmul.default, aten.mm.default}
_ADDS = {aten.add.Tensor, aten.add_.Tensor}
_CONVOLUTIONS = {
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
}
UNDERSTOOD = "linear, addmm, mm, matmul, einsum, conv1d, conv2d, conv3d, embedding"


@dataclass(frozen=True)
class Use:
    """One place of a graph that reads a weight, z = x Wᵀ + b (:ref:`func-operations`).

    Args:
        weight: The weight's name.
        bias: Name of the bias that the operation, or the addition after it, adds; if any.
        layer: The operation, which makes rows of x and z.
        node: The node of z.
        x: The node of the input.
        x_axes: Permutation that brings the features of x to the end; empty if they are there.
        z_axes: The same for z.
        rows: First and last (exclusive) row of the weight-shaped matrix that is read.
        width: D_out, the number of its rows.
        transposed: Whether the parameter is stored as (D_in, D_out).
    """

    weight: str
    bias: str | None
    layer: Operation
    node: fx.Node
    x: fx.Node
    x_axes: tuple[int, ...]
    z_axes: tuple[int, ...]
    rows: tuple[int, int]
    width: int
    transposed: bool


@dataclass(frozen=True)
class Obstacle:
    """A use of a parameter that is not understood (:ref:`func-refusals`).

    Args:
        parameter: Its name.
        node: What uses it.
        reason: Why it is not understood.
    """

    parameter: str
    node: fx.Node
    reason: str


@dataclass(frozen=True)
class _View:
    """A parameter, or a part of it: an empty tensor whose strides say which entries it has."""

    name: str
    shape: torch.Size  # of the whole parameter
    entries: Any  # a tensor on the meta device, or a list of such


@dataclass(frozen=True)
class _Reading:
    """What an operation takes as x, W and b, before the parameters behind W and b are known."""

    layer: Operation
    x: Any
    weight: Any
    bias: Any = None
    flip: bool = False  # whether the operand is (D_in, D_out)
    x_axes: tuple[int, ...] = ()
    z_axes: tuple[int, ...] = ()


class _UnclearError(Exception):
    """Why an operation is not understood, and which of its arguments is to blame, if not all."""

    def __init__(self, reason: str, culprit: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.culprit = culprit


def find_uses(
    graph: fx.Graph, parameters: Mapping[fx.Node, str]
) -> tuple[list[Use], list[Obstacle]]:
    """Follow parameters through a graph to all that reads them (:ref:`func-operations`).

    Args:
        graph: Graph of core operations, whose nodes know the shapes of their values.
        parameters: Names of the parameters of interest, by their nodes.

    Returns:
        The uses that are understood, in the order of the graph, and those that are not.

    Example:
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> f = lambda W, b, X: X @ W.T + b
        >>> inputs = torch.ones(3, 2), torch.ones(3), torch.ones(5, 2)
        >>> graph = make_fx(f, pre_dispatch=True)(*inputs).graph
        >>> W, b, X = graph.find_nodes(op="placeholder")
        >>> (use,), _ = find_uses(graph, {W: "W", b: "b"})
        >>> use.weight, use.bias, use.layer
        ('W', 'b', Affine())
    """
    views = {
        node: _View(name, value.shape, torch.empty(value.shape, device="meta"))
        for node, name in parameters.items()
        for value in (node.meta["val"],)
    }
    uses: dict[fx.Node, Use] = {}
    obstacles: list[Obstacle] = []
    for node in graph.nodes:
        read = [n for n in node.all_input_nodes if n in views]
        if not read or node.target is aten.detach.default:
            continue
        moved = _move(node, views) if len(read) == 1 else None
        if moved is not None:
            views[node] = moved
            continue
        try:
            if node.target in _ADDS and (of := _addition(node, views, uses)) is not None:
                uses[of.node] = of
            else:
                uses[node] = _use(node, views, read)
        except _UnclearError as error:
            blamed = read if error.culprit is None else [error.culprit]
            obstacles += [Obstacle(views[n].name, node, str(error)) for n in blamed]
    return list(uses.values()), obstacles


def _move(node: fx.Node, views: Mapping[fx.Node, _View]) -> _View | None:
    """The part of a parameter that a node is, if all it does is to move entries."""
    source = node.all_input_nodes[0]
    if len(node.all_input_nodes) != 1 or node.op != "call_function":
        return None
    view = views[source]
    if node.target in _COPIES:
        return view
    if node.target in _CASTS:
        old, new = source.meta["val"], node.meta["val"]
        return view if (old.dtype, old.device) == (new.dtype, new.device) else None
    if node.target not in _MOVES:
        return None
    args = [view.entries if arg is source else arg for arg in node.args]
    try:
        # A reshape that has to copy would not do so silently: it is a view, or it is not followed.
        target = aten.view.default if node.target is aten.reshape.default else node.target
        return replace(view, entries=target(*args, **node.kwargs))  # type: ignore[operator]
    except RuntimeError:
        return None


def _use(node: fx.Node, views: Mapping[fx.Node, _View], read: list[fx.Node]) -> Use:
    """The use that a node is."""
    reading = _read(node, views)
    weight = views.get(reading.weight)
    if weight is None or reading.x in views:
        if read == [reading.bias]:
            raise _UnclearError("it is added to the output of a weight that is frozen or left out")
        raise _UnclearError("it is not used as a weight")
    if len(read) > 1 + (reading.bias in views):
        raise _UnclearError("several parameters meet in it")
    rows, transposed = _orientation(weight, reading)
    width = weight.shape[1 if transposed else 0]
    use = Use(
        weight=weight.name,
        bias=None,
        layer=reading.layer,
        node=node,
        x=reading.x,
        x_axes=reading.x_axes,
        z_axes=reading.z_axes,
        rows=rows,
        width=width,
        transposed=transposed,
    )
    return _with_bias(use, reading.bias, views) if reading.bias in views else use


def _addition(
    node: fx.Node, views: Mapping[fx.Node, _View], uses: Mapping[fx.Node, Use]
) -> Use | None:
    """The use whose bias a node adds, if it does that."""
    operands: list[Any] = list(node.args[:2])
    if node.kwargs.get("alpha", 1) != 1:
        return None
    for z, b in (operands, operands[::-1]):
        if z in uses and b in views:
            use = uses[z]
            if len(use.node.users) > 1:
                raise _UnclearError("it is added to an output that is used elsewhere without it")
            if use.z_axes or not isinstance(use.layer, Affine) or use.bias is not None:
                raise _UnclearError("it is no bias of the operation before it")
            return _with_bias(use, b, views)
    return None


def _with_bias(use: Use, node: fx.Node, views: Mapping[fx.Node, _View]) -> Use:
    """The use with a bias whose entries are those of the weight's rows."""
    bias, entries = views[node], views[node].entries
    start, stop = use.rows
    fits = (
        entries.ndim > 0 < len(bias.shape)
        and prod(bias.shape) == bias.shape[-1] == use.width
        and entries.numel() == entries.shape[-1] == stop - start
        and entries.ndim <= use.node.meta["val"].ndim
        and entries.storage_offset() == start
        and _has_strides(entries[(0,) * (entries.ndim - 1)], (1,))
    )
    if not fits:
        raise _UnclearError(f"it is no bias of all rows of {use.weight!r}", node)
    return replace(use, bias=bias.name)


def _orientation(weight: _View, reading: _Reading) -> tuple[tuple[int, int], bool]:
    """Which rows of the weight-shaped matrix are read, and whether it is stored transposed."""
    entries, shape = weight.entries, weight.shape
    if not isinstance(reading.layer, Affine):
        strides = torch.empty(shape, device="meta").stride()
        if entries.shape != shape or not _has_strides(entries, strides):
            raise _UnclearError("it is changed before it is used")
        transposed = isinstance(reading.layer, Lookup)
        return (0, shape[1 if transposed else 0]), transposed
    if entries.ndim != 2 or len(shape) != 2:
        raise _UnclearError("it is no matrix there")
    matrix = entries.mT if reading.flip else entries
    offset, height = matrix.storage_offset(), len(matrix)
    if matrix.shape[1] == shape[1] and _has_strides(matrix, (shape[1], 1)):
        start, rest = divmod(offset, shape[1])
        if rest == 0:
            return (start, start + height), False
    if matrix.shape[1] == shape[0] and _has_strides(matrix, (1, shape[1])):
        return (offset, offset + height), True
    raise _UnclearError("only a part of its inputs is used, or not in order")


def _has_strides(tensor: Tensor, strides: tuple[int, ...]) -> bool:
    each = zip(tensor.shape, tensor.stride(), strides, strict=True)
    return all(size == 1 or stride == wanted for size, stride, wanted in each)


def _read(node: fx.Node, views: Mapping[fx.Node, _View]) -> _Reading:
    """What an operation takes as input, weight and bias."""
    target = node.target
    args: list[Any] = list(node.args)
    options = options_of(node)
    if target is aten.linear.default:
        return _Reading(Affine(), options["input"], options["weight"], options["bias"])
    if target in _MATMULS:
        return _matmul(args[0], args[1], None, views)
    if target is aten.addmm.default and options["beta"] == options["alpha"] == 1:
        return _matmul(args[1], args[2], args[0], views)
    if target is aten.einsum.default:
        return _einsum(args[0], list(args[1]), views)
    if target in _CONVOLUTIONS:
        return _convolution(options)
    if target is aten.embedding.default:
        if options["scale_grad_by_freq"]:
            raise _UnclearError("scale_grad_by_freq=True rescales gradients by counts in the batch")
        padding = options["padding_idx"]
        weight = options["weight"]
        size = int(weight.meta["val"].shape[0])
        lookup = Lookup(size, None if padding < 0 else padding)
        return _Reading(lookup, options["indices"], weight)
    raise _UnclearError(f"the operation is none of {UNDERSTOOD}")


def _matmul(left: fx.Node, right: fx.Node, bias: Any, views: Mapping[fx.Node, _View]) -> _Reading:
    """X W, or W X, whose features are the last axis but one."""
    if right in views:
        return _Reading(Affine(), left, right, bias, flip=True)
    axes = tuple(range(right.meta["val"].ndim))
    if len(axes) < 2 or bias is not None:
        raise _UnclearError("as the left operand it needs a matrix on the right, and no bias")
    swapped = (*axes[:-2], axes[-1], axes[-2])
    return _Reading(Affine(), right, left, x_axes=swapped, z_axes=swapped)


def _einsum(equation: str, operands: list[fx.Node], views: Mapping[fx.Node, _View]) -> _Reading:
    """A contraction of x and W in which W has one letter of the input and one of the output."""
    terms, arrow, z = equation.replace(" ", "").partition("->")
    letters = terms.split(",")
    if len(operands) != 2 or not arrow:
        raise _UnclearError("an einsum is understood with two operands and an explicit output")
    x, weight = operands if operands[1] in views else operands[::-1]
    of_x, of_w = letters if operands[1] in views else letters[::-1]
    spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    more = x.meta["val"].ndim - len(of_x.replace("...", ""))
    of_x, z = (term.replace("...", "".join(spare[:more])) for term in (of_x, z))
    i, o = (set(of_w) & set(of_x)) - set(z), (set(of_w) & set(z)) - set(of_x)
    if not (
        len(of_w) == 2
        and len(i) == len(o) == 1
        and len(set(of_x)) == len(of_x)
        and set(of_x) - i == set(z) - o
    ):
        raise _UnclearError(f"einsum {equation!r} is not x Wᵀ with one letter of x summed")
    (i_letter,), (o_letter,) = i, o
    sizes = dict(zip(of_x, x.meta["val"].shape, strict=True))
    if sizes[i_letter] != weight.meta["val"].shape[of_w.index(i_letter)]:
        raise _UnclearError(f"einsum {equation!r} repeats an axis of size one")
    shared = [c for c in of_x if c not in i]
    x_axes = tuple(map(of_x.index, (*shared, i_letter)))
    z_axes = tuple(map(z.index, (*shared, o_letter)))
    return _Reading(
        layer=Affine(),
        x=x,
        weight=weight,
        flip=of_w == i_letter + o_letter,
        x_axes=() if x_axes == tuple(range(len(of_x))) else x_axes,
        z_axes=() if z_axes == tuple(range(len(z))) else z_axes,
    )


def _convolution(options: Mapping[str, Any]) -> _Reading:
    x, weight = options["input"], options["weight"]
    kernel_size = tuple(int(k) for k in weight.meta["val"].shape[2:])

    def each(option: str) -> tuple[int, ...]:
        given = tuple(options[option])
        return given * len(kernel_size) if len(given) == 1 else given

    if options.get("transposed"):
        raise _UnclearError("transposed convolutions are not supported")
    if x.meta["val"].ndim != len(kernel_size) + 2:
        raise _UnclearError("the convolution's input has no axis for the data")
    padding, dilation = options["padding"], each("dilation")
    layer = Convolution(
        kernel_size=kernel_size,
        stride=each("stride"),
        padding=both_sides(
            padding if isinstance(padding, str) else each("padding"), kernel_size, dilation
        ),
        dilation=dilation,
        groups=options["groups"],
    )
    return _Reading(layer, x, weight, options["bias"])
