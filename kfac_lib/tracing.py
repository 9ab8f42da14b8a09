"""A source of rows by tracing: for functions f(params, X), and modules that hooks cannot follow.

The function is traced once, which gives a graph of core operations. Those that read a parameter get
a recorder behind them; then the graph runs in place of the function. Explained in the section
:ref:`func-trace`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from kfac_lib.capture import Call, require_graph
from kfac_lib.coverage import Coverage, _owner, _paste, check_per_datum, select
from kfac_lib.graph import check_operations, datum_axis, describe, in_front, inner_rows, symbolic
from kfac_lib.graph_calls import Form, RecordedGraph
from kfac_lib.graph_uses import Obstacle, Use, find_uses
from kfac_lib.layers import Affine, Convolution, Lookup, _close

Function = Callable[[dict[str, Tensor], Any], Tensor]
"""f(params, X): the prediction for the data X, with the parameters by name."""


class Traced:
    """The source for functions of parameters and data, by tracing (:ref:`func-source`).

    Traced on the first batch, and again only for inputs of other shapes or dtypes apart from the
    batch size, or if the function's own code treats the batch size as special (``len(X)`` does,
    ``X.shape[0]`` does not). Traces are kept as long as f lives, and serve every further source of
    f with parameters of the same shapes; such a source compares its first predictions with those
    of f, and traces anew if they differ. Every trace is verified on its batch: its prediction is
    that of the function, permuting the data permutes the prediction and every recorded input, and
    the calls add up to the derivatives of autograd.

    Args:
        f: Function f(params, X) of one tensor, the prediction; or a module, which then runs with
            the given parameters (:func:`torch.func.functional_call`).
        params: The parameters by name. A :class:`torch.nn.Parameter` that does not require grad is
            frozen; tensors of integers or booleans are constants.
        layers: Names or patterns of the parameters to take; all when not given.
        ignore: Names or patterns to leave out.

    Raises:
        ValueError: For patterns or names that do not fit.
        TypeError: If f or params are of the wrong kind.
        NotImplementedError: For complex parameters.

    Example:
        >>> f = lambda params, X: (X @ params["W"] + params["b"]).tanh()
        >>> source = Traced(f, {"W": torch.ones(2, 3), "b": torch.ones(3)})
        >>> prediction, calls = source.run(torch.ones(5, 2))
        >>> [(key, call.layer, tuple(call.shape)) for key, (call,) in calls.items()]
        [('W', Affine(), (5, 3))]
        >>> source.coverage.parameters
        {'W': ('W', 'b')}
    """

    def __init__(
        self,
        f: Function | nn.Module,
        params: Mapping[str, Tensor],
        layers: Sequence[str] | str | None = None,
        ignore: Sequence[str] | str = (),
    ) -> None:
        if not callable(f):
            raise TypeError(f"The function is a {type(f).__name__}; give f(params, X) or a module.")
        _check_params(params)
        state = _state(f, params) if isinstance(f, nn.Module) else dict(params)
        buffers = dict(f.named_buffers(remove_duplicate=False)) if isinstance(f, nn.Module) else {}
        variables = {n: p for n, p in params.items() if n not in buffers and _varies(n, p)}
        wanted, frozen = select(variables, layers, ignore)
        # One leaf for every tensor, however many names it has. A function may write to buffers.
        tensors = {id(p): p for p in (*params.values(), *state.values())}
        copied, own = {id(b) for b in buffers.values()}, {id(params[name]) for name in wanted}
        self._leaves = [
            (p.clone() if key in copied else p).detach().requires_grad_(key in own)
            for key, p in tensors.items()
        ]
        index = {key: i for i, key in enumerate(tensors)}
        self._state = {name: index[id(p)] for name, p in state.items()}
        names = {index[id(params[name])]: name for name in reversed(wanted)}
        self._wanted = {name: i for i, name in reversed(names.items())}  # by their first names
        self._frozen = tuple(frozen)
        left_out = [n for n in variables if n not in wanted and n not in frozen]
        if isinstance(f, nn.Module):
            given = {id(p) for p in params.values()}
            left_out += [
                name
                for name, p in f.named_parameters()
                if p.requires_grad and name not in params and id(p) not in given
            ]
        self._ignored = tuple(left_out)
        self._f = f
        signature = (
            tuple(self._state.items()),
            tuple(self._wanted.items()),
            (self._frozen, self._ignored),
            tuple((p.dtype, p.device, p.shape) for p in self._leaves),
        )
        self._traces = _traces_of(f, signature)
        self._compared = not self._traces.graphs
        self._ready: tuple[Any, tuple[Tensor, dict[str, list[Call]]]] | None = None

    @property
    def coverage(self) -> Coverage:
        """What is covered (:ref:`func-parameters`); known from the first batch on.

        Raises:
            ValueError: If no batch was run.
        """
        if self._traces.coverage is None:
            raise ValueError("What a function covers is known once it ran: call run(X) first.")
        return self._traces.coverage

    @property
    def traces(self) -> int:
        """How many traces of the function there are, for inputs of different shapes."""
        return len(self._traces.graphs)

    def run(self, X: Any) -> tuple[Tensor, dict[str, list[Call]]]:
        """Run a batch.

        Args:
            X: What the function takes: a tensor, or lists, tuples and dicts of tensors. Tensors
                with as many entries along axis 0 as the prediction hold data.

        Returns:
            The prediction, attached to its graph, and the calls for each key.

        Raises:
            ValueError: If a parameter does not reach the prediction, what an operation read was
                overwritten, the function is random, or a datum's prediction depends on other data;
                or under autocast.
            NotImplementedError: If the function cannot be traced, or uses a parameter in a way
                that is not understood; the message names it, and what to ignore.
            TypeError: If X or the prediction are of the wrong kind.
        """
        if isinstance(self._f, nn.Module):
            check_per_datum(self._f)
        if any(torch.is_autocast_enabled(kind) for kind in {p.device.type for p in self._leaves}):
            raise ValueError(
                "Under autocast an operation's inputs and gradients have different dtypes. Leave "
                "torch.autocast() first, or convert the parameters to the lower precision."
            )
        if self._ready is not None and self._ready[0] is X:
            result, self._ready = self._ready[1], None
            return result
        form, tensors = Form.of(X)
        graph = next((g for g in self._traces.graphs if g.fits(form, tensors)), None)
        graph = graph or self._trace(form, tensors)
        f, noted = graph.run(self._leaves, tensors)
        known = self._compared or not graph.verified
        if not known and not self._agrees(graph, form, tensors, f):
            self._traces.graphs, self._traces.coverage = [], None
            graph = self._trace(form, tensors)
            f, noted = graph.run(self._leaves, tensors)
        self._compared = True
        require_graph(f)
        for call in noted.values():
            _check_unchanged(call)
        if not graph.verified:
            with torch.enable_grad():
                expected = self._flat(form)(*self._leaves, *tensors)
            leaves = {name: self._leaves[i] for name, i in self._wanted.items()}
            graph.verify_sums(leaves, f, noted, expected)
            graph.verify_order(self._leaves, tensors, f, noted)
            graph.verify_data(self._leaves, tensors, f, noted)
        calls: dict[str, list[Call]] = {key: [] for key in self.coverage.layers}
        for i, call in noted.items():
            if i not in graph.unreached:
                weight = self._matrix(graph.uses[i])
                calls[call.name].append(replace(call, weight=weight))
        silent = [key for key, of_key in calls.items() if not of_key]
        if silent:
            raise ValueError(
                f"The prediction does not depend on {', '.join(map(repr, silent))}: what it gives "
                f"is discarded or detached. Pass ignore={_paste(silent)} to leave it out."
            )
        return f, calls

    def _agrees(self, graph: RecordedGraph, form: Form, X: list[Tensor], f: Tensor) -> bool:
        """Whether the function is still what it was when it was traced.

        Asked on two of the data; if they differ, on all: code may treat their number as special.
        """
        flat = self._flat(form)
        some = [x[:2] if data else x for x, data in zip(X, graph.has_data, strict=True)]
        with torch.no_grad():
            try:
                if _same(f[:2], flat(*self._leaves, *some)):
                    return True
            except Exception:  # whatever code raises that takes no two data
                pass
            return _same(f, flat(*self._leaves, *X))

    def prepare(self, X: Any) -> None:
        """Trace the function for a batch, so that its coverage is known (:ref:`func-trace`).

        The batch is run, and the next :meth:`run` with it returns what this one gave.

        Args:
            X: What the function takes.

        Raises:
            ValueError, NotImplementedError, TypeError: As :meth:`run`.
        """
        result = self.run(X)
        self._ready = X, result

    def _flat(self, form: Form) -> Callable[..., Any]:
        """The function, of its leaves and the tensors of its data in a row."""

        def flat(*tensors: Tensor) -> Any:
            params = {name: tensors[i] for name, i in self._state.items()}
            given = form.build(tensors[len(self._leaves) :])
            if isinstance(self._f, nn.Module):
                return torch.func.functional_call(self._f, params, (given,), tie_weights=False)
            return self._f(params, given)

        return flat

    def _trace(self, form: Form, X: list[Tensor]) -> RecordedGraph:
        """Trace the function for such inputs, after it ran on them as it is."""
        flat = self._flat(form)
        with torch.enable_grad():
            expected = require_graph(self._first_prediction(flat, X))
        N = len(expected)
        has_data = [x.ndim > 0 and len(x) == N for x in X]
        if not any(has_data):
            raise ValueError(
                f"The prediction has {N} data, but no tensor of X has {N} entries along axis 0. "
                "Axis 0 must be the datum in both."
            )
        every = [False] * len(self._leaves) + has_data
        graph, batch = symbolic(flat, [*self._leaves, *X], every, N)
        check_operations(graph)
        placeholders = graph.find_nodes(op="placeholder")
        parameters = {placeholders[i]: name for name, i in self._wanted.items()}
        unread = [name for node, name in parameters.items() if not node.users]
        _check_unread({name: self._leaves[self._wanted[name]] for name in unread}, expected)
        _check_closure(graph)
        uses, obstacles = find_uses(graph, parameters)
        coverage = self._cover(uses, obstacles)
        if self._traces.coverage not in (None, coverage):
            raise ValueError("The function uses its parameters differently in another batch.")
        inner = inner_rows(graph, batch.size)
        result = RecordedGraph(
            graph=graph,
            uses=uses,
            keys=[self._key(use.weight) for use in uses],
            before=[_before(use, inner, batch.size) for use in uses],
            form=form,
            like=[(x.dtype, x.device, x.shape) for x in X],
            has_data=has_data,
            batch=batch,
        )
        f, _ = result.run(self._leaves, X)
        if not _same(f, expected):
            raise NotImplementedError(
                "The traced function gives another prediction than the function itself: it changes "
                "from call to call, or keeps something outside of params. Write it without state."
            )
        self._traces.coverage = coverage
        self._traces.graphs.append(result)
        return result

    def _first_prediction(self, flat: Callable[..., Any], X: list[Tensor]) -> Any:
        try:
            return flat(*self._leaves, *X)
        except RuntimeError as error:
            if "not differentiable" not in str(error):
                raise
            raise ValueError(
                f"The function does not take all of params as parameters: {error}. Buffers, such "
                "as running statistics, are none: name them in ignore."
            ) from error

    def _cover(self, uses: list[Use], obstacles: list[Obstacle]) -> Coverage:
        """Decide by the uses of all parameters, or refuse what is not understood."""
        biases: dict[str, set[str | None]] = {}
        roles: dict[str, set[tuple[type, bool]]] = {}
        weights: dict[str | None, set[str]] = {}
        for use in uses:
            biases.setdefault(use.weight, set()).add(use.bias)
            roles.setdefault(use.weight, set()).add((type(use.layer), use.transposed))
            weights.setdefault(use.bias, set()).add(use.weight)

        def drop(names: Iterable[str | None]) -> str:
            return f"Pass ignore={_paste(name for name in self._wanted if name in {*names})}"

        if obstacles:
            first, names = obstacles[0], [o.parameter for o in obstacles]
            theirs = [bias for name in names for bias in biases.get(name, ())]
            raise NotImplementedError(
                f"The parameter {first.parameter!r} is used by {describe(first.node)}, which KFAC "
                f"does not understand: {first.reason}. {drop([*names, *theirs])} to leave out what "
                "is not understood."
            )
        for weight, of_weight in biases.items():
            if len(roles[weight]) > 1:
                raise NotImplementedError(
                    f"The parameter {weight!r} is used in different roles, as x W and as x Wᵀ, or "
                    "to look up rows and to multiply. Inputs of one are not inputs of the other. "
                    f"{drop([weight, *of_weight])} to leave it out."
                )
            if len(of_weight) > 1:
                raise NotImplementedError(
                    f"The parameter {weight!r} is used in several places with different biases, or "
                    f"with and without one, so [W b] is not one matrix. {drop(of_weight)} to "
                    "leave the biases out."
                )
        for bias, of_bias in weights.items():
            if bias is not None and (len(of_bias) > 1 or bias in biases):
                raise NotImplementedError(
                    f"The parameter {bias!r} is used as the bias of {', '.join(sorted(of_bias))}"
                    f"{', and as a weight' * (bias in biases)}. A bias is covered with one weight "
                    f"only. {drop([bias])} to leave it out."
                )
        lost = [name for name in self._wanted if name not in biases and name not in weights]
        if lost:
            raise ValueError(
                f"The prediction does not depend on {', '.join(lost)}. {drop(lost)} to leave it "
                "out."
            )
        layers = {use.weight: use.layer for use in reversed(uses)}
        names_of = {
            self._key(weight): (weight, next(iter(biases[weight])))
            for weight in self._wanted
            if weight in layers
        }
        return Coverage(
            layers={key: layers[weight] for key, (weight, _) in names_of.items()},
            biases=frozenset(key for key, (_, bias) in names_of.items() if bias is not None),
            frozen=self._frozen,
            ignored=self._ignored,
            parameters=names_of,
        )

    def _matrix(self, use: Use) -> Tensor | None:
        """The matrix that an affine operation multiplies with, if it is a parameter as it is."""
        if not isinstance(use.layer, Affine) or use.rows != (0, use.width):
            return None
        weight = self._leaves[self._wanted[use.weight]].detach()
        return weight.T if use.transposed else weight

    def _key(self, weight: str) -> str:
        """The key of a weight: a module's name as with hooks, else the parameter's own."""
        of_module = isinstance(self._f, nn.Module) and weight.rpartition(".")[2] == "weight"
        return _owner(weight) if of_module else weight


@dataclass
class _Traces:
    """What is known of a function with parameters of certain shapes."""

    graphs: list[RecordedGraph] = field(default_factory=list)
    coverage: Coverage | None = None


_KNOWN: WeakKeyDictionary[Any, dict[Any, _Traces]] = WeakKeyDictionary()


def _traces_of(f: Any, signature: Any) -> _Traces:
    try:
        return _KNOWN.setdefault(f, {}).setdefault(signature, _Traces())
    except TypeError:  # f cannot be a key
        return _Traces()


def _same(found: Tensor, wanted: Any) -> bool:
    same_kind = isinstance(wanted, Tensor) and found.shape == wanted.shape
    return same_kind and _close(found.detach(), wanted.detach())


def _before(use: Use, inner: Mapping[fx.Node, int], batch: Any) -> int:
    """Number of rows of x in front of the datum's; or refuse a layout that is not known."""
    if isinstance(batch, int) and batch == 1:
        return 1
    shape = use.x.meta["val"].shape
    sizes = [shape[axis] for axis in use.x_axes or range(len(shape))]
    place = datum_axis(sizes, batch)
    where = f"The input of {describe(use.node)}, where {use.weight!r} is used,"
    drop = f"pass ignore={_paste(filter(None, [use.weight, use.bias]))} to leave it out"
    if place is None:
        raise NotImplementedError(
            f"{where} has no axis for the data, as if it were the same for all: it has shape "
            f"{tuple(shape)}. Expand it first, as in x.expand(N, *x.shape), or {drop}."
        )
    axis, front = place[0], in_front(sizes, place[0])
    features = {Affine: [len(sizes) - 1], Convolution: range(1, len(sizes)), Lookup: []}
    if axis in features[type(use.layer)]:
        raise NotImplementedError(
            f"{where} has the data along the axis of the features: it has shape {tuple(shape)}. "
            f"Give (N, ..., D), or {drop}."
        )
    if use.x not in inner or front is None:
        raise NotImplementedError(
            f"{where} has the data and other axes merged into one, of size {sizes[axis]}, and "
            f"their order is not known. Keep the datum on an axis of its own, as (N, S, D), or "
            f"{drop}."
        )
    return front * inner[use.x]


def _check_unchanged(call: Call) -> None:
    """Refuse an input that is no longer what the operation read."""
    if call.x._version != call.version:
        raise ValueError(
            f"The input of an operation with {call.name!r} was overwritten in place after it was "
            "read (as in x += f(x)), so the factors would be wrong. Write x = x + f(x)."
        )


def _check_closure(graph: fx.Graph) -> None:
    """Refuse what requires grad and is no parameter: it would be left out without a word."""
    for node in graph.find_nodes(op="get_attr"):
        held = getattr(graph.owning_module, str(node.target), None)
        if isinstance(held, Tensor) and held.requires_grad:
            raise ValueError(
                f"The function uses a tensor of shape {tuple(held.shape)} that requires grad and "
                f"is not in params, in {describe(next(iter(node.users)))}. Put it into params, and "
                "name it in ignore to leave it out; or detach it."
            )


def _check_unread(leaves: dict[str, Tensor], f: Tensor) -> None:
    """Refuse a graph without parameters that the prediction f of the function depends on."""
    found = torch.autograd.grad(f.sum(), [*leaves.values()], allow_unused=True) if leaves else ()
    hidden = [name for name, g in zip(leaves, found, strict=True) if g is not None]
    if hidden:
        raise NotImplementedError(
            f"The function cannot be traced: what it does with {', '.join(hidden)} leaves no "
            "operation in the graph, as with torch.func.vmap and other transforms. Write it for a "
            "batch, without them."
        )


def _state(model: nn.Module, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a module, by one name each: those given, else its own."""
    own = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    unknown = [name for name in params if name not in own]
    if unknown:
        raise ValueError(
            f"params: the model has no {', '.join(map(repr, unknown))}. It has "
            f"{', '.join(own) or 'none'}."
        )
    for name, p in params.items():
        if own[name].is_floating_point() and not p.is_floating_point():
            raise TypeError(
                f"params: {name!r} has dtype {p.dtype}, the model's {own[name].dtype}. Give "
                "floating-point numbers."
            )
    given = {id(own[name]): p for name, p in params.items()}
    return {
        name: given.get(id(tensor), tensor)
        for prefix, module in model.named_modules()  # each once, or a reused one is swapped twice
        for name, tensor in (
            *module.named_parameters(prefix, recurse=False, remove_duplicate=False),
            *module.named_buffers(prefix, recurse=False, remove_duplicate=False),
        )
    }


def _check_params(params: Any) -> None:
    if not isinstance(params, Mapping):
        raise TypeError(
            f"params is a {type(params).__name__}; give a dict from name to tensor, such as "
            "dict(model.named_parameters())."
        )
    for name, p in params.items():
        if not isinstance(name, str):
            raise TypeError(f"params: the name {name!r} is a {type(name).__name__}, no str.")
        if not isinstance(p, Tensor):
            raise TypeError(f"params: {name!r} is a {type(p).__name__}; give a tensor.")
    if not params:
        raise ValueError("params is empty; give the parameters that the model has, by name.")


def _varies(name: str, parameter: Tensor) -> bool:
    """Whether one can differentiate by a tensor; by integers and booleans one cannot."""
    if parameter.is_complex():
        raise NotImplementedError(
            f"The parameter {name!r} has dtype {parameter.dtype}. Give its real and imaginary "
            "parts as parameters, and join them with torch.complex."
        )
    return parameter.is_floating_point()
