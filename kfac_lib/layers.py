"""From a layer's tensors to rows: weight sharing is one more axis.

Every layer is a linear map applied to rows, z_{n,s} = W x_{n,s} + b, and it only has to say how its
tensors become rows of shape (N, S, D). Explained in the section :ref:`kfac-rows`. A new layer is
two short functions, registered for its type; everything else then works.
"""

from functools import singledispatch
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks


@singledispatch
def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """Rows of a layer's input (:ref:`kfac-rows`).

    Args:
        layer: A supported layer.
        x: Its input; axis 0 is the datum n.

    Returns:
        Tensor of shape (N, S, D_in), where S counts the positions that share the weight; without
        the 1 that a joint bias appends.

    Raises:
        NotImplementedError: If the layer is not supported.
        ValueError: If the input has no axis for the data.

    Example:
        >>> input_rows(nn.Linear(2, 3), torch.ones(5, 7, 2)).shape
        torch.Size([5, 7, 2])
    """
    raise NotImplementedError(f"{type(layer).__name__} is not supported. Supported: {supported()}.")


@singledispatch
def output_rows(layer: nn.Module, g: Tensor) -> Tensor:
    """Rows of vectors in the shape of a layer's output (:ref:`kfac-rows`).

    Args:
        layer: A supported layer.
        g: Tensor of shape (V, N, ...), V vectors in the shape of the layer's output.

    Returns:
        Tensor of shape (V, N, S, D_out).

    Raises:
        NotImplementedError: If the layer is not supported.

    Example:
        >>> output_rows(nn.Linear(2, 3), torch.ones(4, 5, 7, 3)).shape
        torch.Size([4, 5, 7, 3])
    """
    raise NotImplementedError(f"{type(layer).__name__} is not supported. Supported: {supported()}.")


@input_rows.register
def _(layer: nn.Linear, x: Tensor) -> Tensor:
    if x.ndim < 2:
        raise ValueError(
            f"{type(layer).__name__} got an input of shape {tuple(x.shape)}. Axis 0 must be the "
            "datum: give (N, ..., D_in)."
        )
    return x.reshape(x.shape[0], -1, x.shape[-1])


@output_rows.register
def _(layer: nn.Linear, g: Tensor) -> Tensor:
    return g.reshape(*g.shape[:2], prod(g.shape[2:-1]), g.shape[-1])


def is_supported(layer: nn.Module) -> bool:
    """Whether the layer, or a class that it derives from, has rows (:ref:`kfac-rows`).

    Example:
        >>> is_supported(nn.Linear(2, 3)), is_supported(nn.LayerNorm(2))
        (True, False)
    """
    return input_rows.dispatch(type(layer)) is not input_rows.dispatch(object)


def supported() -> str:
    """The names of the supported layers, for messages (:ref:`kfac-rows`).

    Example:
        >>> supported()
        'Linear'
    """
    return ", ".join(kind.__name__ for kind in input_rows.registry if kind is not object)


def check_linear(name: str, layer: nn.Module, x: Tensor, z: Tensor) -> None:
    """Refuse a layer whose ``forward`` is not the map of its weight and bias.

    Of interest are subclasses with a forward pass of their own, a forward pass replaced on the
    instance, and module hooks that apply to all modules; otherwise nothing is computed
    (:ref:`kfac-rows`). Both the output and its derivatives are compared: a masked weight can have
    the right output and the wrong derivative.

    Args:
        name: The layer's name in the model, for the message.
        layer: A supported layer.
        x: Its input.
        z: Its output, attached to its graph.

    Raises:
        NotImplementedError: If output or derivatives differ from those of x Wᵀ + b.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> check_linear("fc", layer, x := torch.ones(5, 2), layer(x))
    """
    own = getattr(layer.forward, "__func__", None) is nn.Linear.forward
    if not isinstance(layer, nn.Linear) or (own and not _global_forward_hooks):
        return
    expected = nn.functional.linear(x.detach(), layer.weight, layer.bias)
    if z.shape == expected.shape and _close(z, expected):
        parameters = [p for p in layer.parameters(recurse=False) if p.requires_grad]
        v = torch.linspace(-1, 1, z.numel(), dtype=z.dtype, device=z.device).reshape(z.shape)
        found, wanted = (
            torch.autograd.grad(out, parameters, v, retain_graph=True, allow_unused=True)
            for out in (z, expected)
        )
        pairs = zip(found, wanted, strict=True)
        if all(a is not None and b is not None and _close(a, b) for a, b in pairs):
            return
    raise NotImplementedError(
        f"KFAC does not support layer {name!r} ({type(layer).__name__}): its output is not "
        f"x Wᵀ + b with its own weight and bias, or does not depend on them so. Put what it adds "
        f"into a module of its own, or pass ignore=[{name!r}] to leave it out."
    )


def _close(found: Tensor, wanted: Tensor) -> bool:
    tolerance = torch.finfo(wanted.dtype).eps ** 0.5
    scale = float(wanted.detach().abs().max()) if wanted.numel() else 0.0
    return torch.allclose(found, wanted, rtol=tolerance, atol=tolerance * scale)
