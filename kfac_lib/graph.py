"""A function as a graph of core operations, for any batch size.

The function runs on tensors without entries, the batch size being a symbol; so the graph shows, for
every value, along which axis the data run. Explained in the section :ref:`func-trace`.
"""

import linecache
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten
_VIEWS = {
    *(aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int),
    *(aten._unsafe_view.default, aten.squeeze.default, aten.squeeze.dim, aten.unsqueeze.default),
}


@dataclass(frozen=True)
class Batch:
    """The batch size of a graph (:ref:`func-trace`).

    Args:
        size: A symbol, or a number where the function's code insists on it.
        symbol: The symbol of the trace, None if there is none.
        guards: What the function's code has asked of the symbol.
    """

    size: Any
    symbol: Any
    guards: tuple[Any, ...] = ()

    def may_be(self, N: int) -> bool:
        """Whether the graph holds for N data."""
        if self.symbol is None:
            return bool(self.size == N)
        return _hold(self.guards, self.symbol, N)


def symbolic(
    f: Callable[..., Any], tensors: list[Tensor], has_data: list[bool], N: int
) -> tuple[fx.Graph, Batch]:
    """Trace a function of tensors for any batch size (:ref:`func-trace`).

    Args:
        f: Function that takes the tensors and returns one.
        tensors: Its arguments.
        has_data: For each of them, whether axis 0 is the datum; the other sizes are fixed.
        N: The batch size, tried where the function's code insists on it.

    Returns:
        The graph, whose placeholders are the arguments, and its batch size.

    Raises:
        NotImplementedError: If the function cannot be traced.

    Example:
        >>> W, X = torch.ones(3, 2), torch.ones(5, 2)
        >>> graph, batch = symbolic(lambda W, X: X @ W.T, [W, X], [False, True], N=5)
        >>> [node.name for node in graph.nodes if node.op == "call_function"], batch.may_be(7)
        (['numpy_t', 'matmul'], True)
    """
    # Half a second, which only those who trace should wait.
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    def with_lines(*arguments: Tensor) -> Any:
        with _SourceLines():
            return f(*arguments)

    taken = {size for tensor in tensors for size in tensor.shape}
    failure: Exception | None = None
    # A size that no other axis has: whatever is compared with it is compared with the batch size.
    for hint in (next(prime for prime in _primes() if prime not in taken), N):
        shapes = ShapeEnv()
        mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
        pairs = zip(tensors, has_data, strict=True)
        empty = [_without_entries(mode, t, hint if data else None) for t, data in pairs]
        size = empty[has_data.index(True)].shape[0]
        symbol = None if isinstance(size, int) else size.node.expr
        try:
            with torch.enable_grad(), fx.traceback.preserve_node_meta():
                trace = make_fx(with_lines, tracing_mode="symbolic", pre_dispatch=True)
                graph = trace(*empty).graph
        except Exception as error:  # of many kinds, and none is the function's own: it ran before
            failure = failure or error
            continue
        expression = _expression(size)  # a number, if the code insists on it
        batch = Batch(
            size=int(expression) if expression.is_Integer else size,
            symbol=symbol,
            guards=tuple(guard.expr for guard in shapes.guards),
        )
        if batch.may_be(N):
            output = graph.output_node()
            if isinstance(output.args[0], list | tuple):
                output.args = (output.args[0][0],)
            graph.eliminate_dead_code()
            return graph, batch
    what = "" if failure is None else f" ({type(failure).__name__}: {str(failure).splitlines()[0]})"
    raise NotImplementedError(
        f"The function cannot be traced{what}. Which operations run must not depend on values of "
        "data or parameters (if x.sum() > 0, .item(), numpy): use torch.where and the like. Or "
        "give a module without params; then hooks follow its layers."
    ) from failure


def datum_axis(sizes: Iterable[Any], batch: Any) -> tuple[int, int] | None:
    """Find the axis that the data run along, alone or merged with others (:ref:`func-trace`).

    Args:
        sizes: Sizes of the axes, numbers or symbols.
        batch: The batch size, the same.

    Returns:
        The axis, and the number k of rows a datum has along it; None if there is none.

    Example:
        >>> datum_axis((3, 5, 2), 5), datum_axis((35, 2), 5), datum_axis((3, 2), 5)
        ((1, 1), (0, 7), None)
    """
    ratios = [_expression(size) / _expression(batch) for size in sizes]
    places = [(axis, int(k)) for axis, k in enumerate(ratios) if k.is_Integer and k > 0]
    alone = [place for place in places if place[1] == 1]
    return next(iter(alone or places), None)


def in_front(sizes: Sequence[Any], axis: int) -> int | None:
    """Product of the sizes in front of an axis; None if it is not a number (:ref:`func-trace`).

    Example:
        >>> in_front((3, 5, 2), 2)
        15
    """
    product = _expression(prod(sizes[:axis]))
    return int(product) if product.is_Integer else None


def inner_rows(graph: fx.Graph, batch: Any) -> dict[fx.Node, int]:
    """For every value, how many rows stand before the datum's along its axis (:ref:`func-trace`).

    One where the data have an axis of their own. An axis (S·N) in row-major order has S. A view
    keeps the number of entries in front of the datum; operations on rows keep the order of rows.

    Args:
        graph: Graph whose nodes know the shapes of their values.
        batch: The batch size, a number or a symbol.

    Returns:
        The number for each node for which it is known.

    Example:
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> f = lambda X: (2 * X.transpose(0, 1)).reshape(-1, 2)
        >>> graph = make_fx(f, pre_dispatch=True)(torch.ones(5, 7, 2)).graph
        >>> {node.name: inner for node, inner in inner_rows(graph, 5).items()}
        {'x_1': 1, 'transpose': 1, 'mul': 1, 'reshape': 7}
    """
    known: dict[fx.Node, int] = {}
    places: dict[fx.Node, tuple[int, int]] = {}
    for node in graph.nodes:
        value, inputs = node.meta.get("val"), [n for n in node.all_input_nodes if n in known]
        if isinstance(value, list | tuple) and inputs:  # chunks and the like: the items inherit
            known[node], places[node] = known[inputs[0]], places[inputs[0]]
        place = datum_axis(value.shape, batch) if isinstance(value, Tensor) else None
        if place is None:
            continue
        axis, k = places[node] = place
        if k == 1:
            known[node] = 1
        elif node.target in _VIEWS and inputs:
            old = in_front(inputs[0].meta["val"].shape, places[inputs[0]][0])
            new = in_front(value.shape, axis)
            if old and new and old * known[inputs[0]] % new == 0:
                known[node] = old * known[inputs[0]] // new
        elif node.target is aten.cat.default:
            if all(places[n] == (axis, 1) for n in inputs):
                known[node] = len(node.args[0])
        else:
            same = {known[n] for n in inputs if places[n][1] == k}
            if len(same) == 1:
                known[node] = same.pop()
    return known


def options_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of a core operation by name, with defaults; else none (:ref:`func-trace`).

    Example:
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> graph = make_fx(torch.sum)(torch.ones(2)).graph
        >>> options_of(list(graph.nodes)[1])
        {'dtype': None, 'self': arg0_1}
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    arguments = node.target._schema.arguments
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    given = dict(zip((a.name for a in arguments), node.args, strict=False))
    return {**defaults, **given, **node.kwargs}


def check_operations(graph: fx.Graph) -> None:
    """Refuse operations with which a datum's prediction is random or depends on other data.

    See :ref:`func-refusals`.

    Raises:
        ValueError: For active dropout, other random numbers, batch normalization over the batch,
            and running statistics that would change.

    Example:
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> check_operations(make_fx(torch.sin)(torch.ones(2)).graph)
    """
    for node in graph.nodes:
        options = options_of(node)
        if not options:
            continue
        active = options.get("train", options.get("training", True))
        p = next((options[name] for name in ("p", "dropout_p", "dropout") if name in options), 1)
        kind = node.target._overloadpacket.__name__
        why = ""
        if "batch_norm" in kind and active:
            why = "normalizes over the batch"
        elif kind == "instance_norm" and options["running_mean"] and options["use_input_stats"]:
            why = "updates its running statistics"
        elif torch.Tag.nondeterministic_seeded in node.target.tags and active and p:
            why = "draws random numbers"
        if why:
            raise ValueError(
                f"{describe(node)} {why}, so the factors of a datum are not defined. Use "
                "evaluation mode: model.eval(), or training=False."
            )


def describe(node: fx.Node) -> str:
    """Name a node by its operation and the line of source it comes from (:ref:`func-refusals`).

    Example:
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> graph = make_fx(torch.sin)(torch.ones(2)).graph
        >>> describe(list(graph.nodes)[1])
        "aten.sin ('sin' in the graph)"
    """
    name = str(node.target).removesuffix(".default")
    return f"{name} ({node.stack_trace or f'{node.name!r} in the graph'})"


class _SourceLines(TorchFunctionMode):
    """Notes for every node of a trace its line of source, the innermost outside of torch if any."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        line = ""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__package__") != __package__:
            own = not str(frame.f_globals.get("__name__")).startswith("torch")
            if own or not line:
                file, number = frame.f_code.co_filename, frame.f_lineno
                line = f"{file}:{number}: {linecache.getline(file, number).strip()}"
            if own:
                break
            frame = frame.f_back
        fx.traceback.set_stack_trace([line])
        return func(*args, **(kwargs or {}))


def _without_entries(mode: Any, tensor: Tensor, batch: int | None) -> Tensor:
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    sizes = [DimDynamic.STATIC] * tensor.ndim
    if batch is not None:
        tensor = tensor.new_empty(batch, *tensor.shape[1:])
        sizes[0] = DimDynamic.DUCK  # the same symbol in all
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    empty: Tensor = mode.from_tensor(tensor, symbolic_context=context)
    return empty


@cache
def _hold(guards: tuple[Any, ...], symbol: Any, N: int) -> bool:
    from sympy import true  # type: ignore[import-untyped]

    return all(guard.subs(symbol, N) == true for guard in guards)


def _expression(size: Any) -> Any:
    from sympy import sympify

    return sympify(size if isinstance(size, int) else size.node.expr)


def _primes() -> Iterator[int]:
    return (n for n in range(53, 10**9) if all(n % k for k in range(2, n)))
