"""A source of rows by hooks: what every call of every layer reads, and where it writes.

A forward hook notes the layer's input and the *place in the graph* of its output. The place, not
the output tensor: an activation that works in place overwrites the tensor, but not the graph behind
it. Explained in the section :ref:`kfac-rows`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kfac_lib.coverage import Coverage, check_per_datum, cover
from kfac_lib.layers import Operation, check_linear


@dataclass(frozen=True)
class Call:
    """One call of a layer: its input, detached, and the place of its output in the graph.

    See :ref:`kfac-rows`.

    Args:
        name: The layer's name in the model.
        layer: The layer, or the operation of a traced function.
        x: Its input, of any shape with the datum as axis 0 (but see ``before``).
        version: The input's version counter when the layer read it.
        shape: The shape of its output.
        edge: Where the output enters the graph; usable as input of :func:`torch.autograd.grad`,
            whose result is to be reshaped to ``shape``.
        before: Product of the sizes of the axes in front of the datum's, in row-major order: 1
            where the datum is axis 0, S for inputs (S, N, D_in), or those merged as (S·N, D_in).
        input_edge: Where the input comes from in the graph; None where nothing is behind it, or its
            axes are not those of ``x``.
        weight: The matrix W (D_out, D_in) of z = x Wᵀ + b over the last axis; None for other
            operations.
    """

    name: str
    layer: nn.Module | Operation
    x: Tensor
    version: int
    shape: torch.Size
    edge: GradientEdge
    before: int = 1
    input_edge: GradientEdge | None = None
    weight: Tensor | None = None


class Source(Protocol):
    """Runs a model and tells what its layers read and where they write (:ref:`kfac-rows`)."""

    @property
    def coverage(self) -> Coverage:
        """What is covered; of a traced function it is known from the first batch on."""

    def run(self, X: Any) -> tuple[Tensor, dict[str, list[Call]]]:
        """Return the prediction, attached to its graph, and the calls of every layer."""


class Hooks:
    """The source for modules: hooks on the layers to take (:ref:`kfac-rows`).

    Args:
        model: Network; called in the mode that it is in.
        coverage: The layers to take; all when not given.

    Raises:
        ValueError: For a model whose factors are not defined: active dropout, batch normalization
            in training mode.
        NotImplementedError: For a layer that is not supported.

    Example:
        >>> f, calls = Hooks(nn.Linear(2, 3)).run(torch.ones(5, 2))
        >>> f.shape, len(calls[""])
        (torch.Size([5, 3]), 1)
    """

    def __init__(self, model: nn.Module, coverage: Coverage | None = None) -> None:
        self.model = model
        self.coverage = cover(model) if coverage is None else coverage
        self._devices = {p.device.type for p in model.parameters()}

    def run(self, X: Any) -> tuple[Tensor, dict[str, list[Call]]]:
        """Return the prediction, attached to its graph, and the calls of every layer.

        Raises:
            ValueError: If a layer did not run, or what it read was overwritten, or under autocast.
            NotImplementedError: If a weight is used outside of its layer.
        """
        if any(torch.is_autocast_enabled(kind) for kind in self._devices):
            raise ValueError(
                "Under autocast a layer's inputs and gradients have different dtypes. Leave "
                "torch.autocast() first, or convert the model, as in model.bfloat16()."
            )
        check_per_datum(self.model)
        layers: dict[str, Sequence[nn.Module]] = {
            name: [layer, *self.coverage.twins.get(name, ())]
            for name, layer in self.coverage.layers.items()
            if isinstance(layer, nn.Module)
        }
        with torch.enable_grad(), capture(layers) as calls:
            f = require_graph(self.model(X))
        check_calls(calls, f)
        return f, calls


@contextmanager
def capture(
    layers: Mapping[str, nn.Module | Sequence[nn.Module]],
) -> Iterator[dict[str, list[Call]]]:
    """Record every call of the layers while the context is open (:ref:`kfac-rows`).

    All hooks are gone when the context is left, whatever the reason.

    Args:
        layers: The layers by name; several under one name where they hold the same weight.

    Yields:
        For each layer the list of its calls, filled as the model runs.

    Raises:
        ValueError: If a layer runs without recording a graph.
        NotImplementedError: If a subclass does not compute the map of its weight and bias.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with capture({"0": net[0]}) as calls:
        ...     f = net(torch.ones(5, 2))
        >>> calls["0"][0].x.shape
        torch.Size([5, 2])
    """
    calls: dict[str, list[Call]] = {name: [] for name in layers}

    def record(name: str, layer: nn.Module, args: Any, kwargs: Any, z: Any) -> Tensor:
        x = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
        if not isinstance(x, Tensor) or not isinstance(z, Tensor):
            raise NotImplementedError(
                f"Layer {name!r} ({type(layer).__name__}) does not take and return one tensor. "
                f"Pass ignore=[{name!r}] to leave it out."
            )
        if not z.requires_grad:
            raise ValueError(
                f"Layer {name!r} ran without a graph (torch.no_grad, or activation checkpointing), "
                "so nothing can be backpropagated to it. Run the model with grad."
            )
        check_linear(name, layer, x, z)
        edge, handed_on = place_of(z)
        call = Call(
            name,
            layer,
            x.detach(),
            x._version,
            z.shape,
            edge,
            input_edge=get_gradient_edge(x) if x.requires_grad else None,
            weight=layer.weight.detach() if isinstance(layer, nn.Linear) else None,
        )
        calls[name].append(call)
        return handed_on

    handles = []
    try:
        for name, given in layers.items():
            for layer in [given] if isinstance(given, nn.Module) else given:
                hook = partial(record, name)
                # Before the caller's own hooks, which may replace the output.
                handle = layer.register_forward_hook(hook, prepend=True, with_kwargs=True)
                handles.append(handle)
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def place_of(z: Tensor) -> tuple[GradientEdge, Tensor]:
    """Where an output enters the graph, safe from later changes in place (:ref:`kfac-rows`).

    A change in place of a view takes the view's own place out of the graph, but not that of the
    tensor which it is a view of. A Linear with bias on shared axes returns such a view.

    Args:
        z: The output, attached to its graph.

    Returns:
        The place, with the entries of z in the same order, and the tensor to hand on: z, or a copy.

    Example:
        >>> edge, z = place_of(nn.Linear(2, 3)(torch.ones(5, 7, 2)))
        >>> edge.node.name(), z.shape
        ('AddmmBackward0', torch.Size([5, 7, 3]))
    """
    if not z._is_view():
        return get_gradient_edge(z), z
    base = z._base
    same = base is not None and base.numel() == z.numel() and base.requires_grad
    if base is not None and same and base.is_contiguous() and z.is_contiguous():
        return get_gradient_edge(base), z
    return get_gradient_edge(z), z.clone()


def check_calls(calls: Mapping[str, list[Call]], f: Tensor) -> None:
    """Refuse what would give silently wrong factors (:ref:`kfac-rows`).

    Args:
        calls: What :func:`capture` recorded.
        f: The prediction, attached to its graph.

    Raises:
        ValueError: If a layer did not run, if what it read was overwritten, or if its axis 0 is
            not that of the prediction.
        NotImplementedError: If a layer's weight is used outside of it.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
        >>> with capture({"0": net[0]}) as calls:
        ...     f = net(torch.ones(5, 2))
        >>> check_calls(calls, f)
    """
    uses = _uses_in_graph(f)
    for name, of_layer in calls.items():
        drop = f"Pass ignore=[{name!r}] to leave it out."
        if not of_layer:
            raise ValueError(
                f"Layer {name!r} did not run in the forward pass, so it has no factors (modules "
                f"that use a layer's weight without calling it look like this). {drop}"
            )
        for layer in {id(call.layer): call.layer for call in of_layer}.values():
            assert isinstance(layer, nn.Module)
            for leaf, parameter in layer.named_parameters(recurse=False):
                if parameter.requires_grad and uses.get(id(parameter), 0) > len(of_layer):
                    times = "once" if len(of_layer) == 1 else f"{len(of_layer)} times"
                    raise NotImplementedError(
                        f"The {leaf} of layer {name!r} is used {uses[id(parameter)]} times on the "
                        f"way to the prediction, but its layer ran {times}. {drop}"
                    )
        for call in of_layer:
            if call.x._version != call.version:
                raise ValueError(
                    f"The input of layer {name!r} was overwritten in place after the layer had "
                    "read it (as in x += layer(x)), so its factors would be wrong. Write "
                    "x = x + layer(x)."
                )
            if call.x.shape[:1] != f.shape[:1]:
                raise ValueError(
                    f"Layer {name!r} got an input of shape {tuple(call.x.shape)}, but the "
                    f"prediction has {f.shape[0]} data (shape {tuple(f.shape)}). Axis 0 must be "
                    "the datum in both: keep shared axes apart, as (N, S, D), instead of merging "
                    "them into N."
                )
            if call.x.ndim == 1 and _reaching_other_data([call], f):
                raise ValueError(
                    f"Layer {name!r} got indices of shape {tuple(call.x.shape)} that are "
                    "positions, not data: each of its outputs reaches the predictions of all. "
                    "Look them up for every datum, as in layer(positions.expand(N, -1))."
                )


def _reaching_other_data(calls: Iterable[Call], f: Tensor) -> Call | None:
    """A call at which the prediction for the first datum depends on rows of another, if any."""
    calls = list(calls)
    v = torch.zeros_like(f)
    v[0] = torch.linspace(1, 2, f[0].numel(), dtype=f.dtype, device=f.device).reshape(f[0].shape)
    edges = [call.edge for call in calls]
    found = torch.autograd.grad(f, edges, v, retain_graph=True, allow_unused=True)
    for call, g in zip(calls, found, strict=True):
        if g is not None:
            of_data = g.reshape(call.before, len(f), -1).abs().amax((0, 2))
            if bool((of_data[1:] > torch.finfo(g.dtype).eps ** 0.5 * of_data.max()).any()):
                return call
    return None


def _uses_in_graph(f: Tensor) -> dict[int, int]:
    """How many nodes of f's graph use each leaf, by the leaf's id."""
    uses: dict[int, int] = {}
    todo, seen = [f.grad_fn], {f.grad_fn}
    while todo:
        node = todo.pop()
        for child, _ in node.next_functions if node is not None else ():
            if child is None:
                continue
            leaf = getattr(child, "variable", None)
            if isinstance(leaf, Tensor):
                uses[id(leaf)] = uses.get(id(leaf), 0) + 1
            elif child not in seen:
                seen.add(child)
                todo.append(child)
    return uses


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or inf (:ref:`kfac-rows`).

    Example:
        >>> is_finite(torch.ones(3)), is_finite(torch.tensor([1.0, torch.inf]))
        (True, False)
    """
    # A finite sum needs one pass and has no hidden NaN or inf; a sum may overflow, entries decide.
    return isfinite(tensor.detach().sum().item()) or bool(torch.isfinite(tensor).all())


def require_graph(f: Any) -> Tensor:
    """Return the prediction, or refuse one that nothing can be backpropagated from.

    See :ref:`kfac-rows`.

    Raises:
        TypeError: If it is no tensor of real floating-point numbers.
        ValueError: If it has no axis for the data, no graph, or entries that are not finite.

    Example:
        >>> require_graph(nn.Linear(2, 3)(torch.ones(5, 2))).shape
        torch.Size([5, 3])
    """
    if not isinstance(f, Tensor):
        raise TypeError(
            f"The model returned a {type(f).__name__}. Wrap it so that it returns one tensor, the "
            "prediction that the loss takes."
        )
    if not f.is_floating_point():
        raise TypeError(
            f"The prediction has dtype {f.dtype}. Give real floating-point numbers, for example "
            "the real and imaginary parts with torch.view_as_real."
        )
    if f.ndim < 2:
        raise ValueError(
            f"The prediction has shape {tuple(f.shape)}. Give (N, ...): axis 0 is the datum, and "
            "at least one more axis follows, for example f.unsqueeze(1)."
        )
    if f.numel() == 0:
        raise ValueError(f"The prediction is empty: its shape is {tuple(f.shape)}.")
    if not f.requires_grad:
        raise ValueError(
            "The prediction has no graph: the model ran without grad (torch.no_grad, .detach() or "
            ".data inside its forward). Nothing can be backpropagated from it."
        )
    if not is_finite(f):
        raise ValueError("The prediction holds NaN or inf. Look at the data and the parameters.")
    return f
