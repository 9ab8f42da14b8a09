"""From a layer's tensors to rows: weight sharing is one more axis.

Every layer is a linear map applied to rows, z_{n,s} = W x_{n,s} + b, and it only has to say how its
tensors become rows of shape (N, S, D). Explained in the section :ref:`share-axis`. A new layer is
two short functions, registered for its type; everything else then works.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, singledispatch
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import _global_forward_hooks


@dataclass(frozen=True)
class Affine:
    """z = x Wᵀ + b over the last axis, as of :class:`torch.nn.Linear` (:ref:`share-axis`).

    Example:
        >>> input_rows(Affine(), torch.ones(5, 7, 2)).shape
        torch.Size([5, 7, 2])
    """


@dataclass(frozen=True)
class Convolution:
    """What a convolution does beside its weight, one entry an axis (:ref:`share-convolution`).

    Args:
        kernel_size: Sizes k of the kernel.
        stride: Steps of the window.
        padding: Pairs of what is padded before and after.
        dilation: Steps within the window.
        groups: Number of groups of channels, each with a map of its own.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.

    Example:
        >>> Convolution.of(nn.Conv1d(2, 4, 3, padding="same")).padding
        ((1, 1),)
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, layer: _ConvNd) -> "Convolution":
        """Read a module's options.

        Args:
            layer: :class:`torch.nn.Conv1d`, :class:`torch.nn.Conv2d` or :class:`torch.nn.Conv3d`.
        """
        kernel_size = tuple(layer.weight.shape[2:])
        stride, dilation = (_per_axis(v, kernel_size) for v in (layer.stride, layer.dilation))
        if layer.padding_mode == "zeros":
            padding = both_sides(layer.padding, kernel_size, dilation)
        else:  # what torch's forward reads then
            sides = layer._reversed_padding_repeated_twice
            padding = tuple(zip(sides[::2], sides[1::2], strict=True))[::-1]
        return cls(
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=layer.groups,
            padding_mode=layer.padding_mode,
        )

    def patches(self, x: Tensor) -> Tensor:
        """Cut the padded input into the windows that the kernel sees.

        Args:
            x: Tensor of shape (N, C_in, ...), with the axes of the kernel at the end.

        Returns:
            Tensor of shape (N, S, C_in · k₁ · k₂ ···), s row-major over the output's pixels, the
            columns in the order of ``weight.flatten(1)``; a view of (N, D, S).

        Raises:
            ValueError: If the input has no axis for the data.
        """
        axes = len(self.kernel_size)
        x = self._padded(x)
        for axis, (k, stride, step) in enumerate(
            zip(self.kernel_size, self.stride, self.dilation, strict=True), start=2
        ):
            x = x.unfold(axis, step * (k - 1) + 1, stride)[..., ::step]
        N, C, S = *x.shape[:2], prod(x.shape[2 : 2 + axes])
        pixels, window = range(2, 2 + axes), range(2 + axes, 2 + 2 * axes)
        D = C * prod(self.kernel_size)
        return x.permute(0, 1, *window, *pixels).reshape(N, D, S).transpose(1, 2)

    def patch_sums(self, x: Tensor) -> Tensor:
        """Sum :meth:`patches` over s without cutting them: sums over boxes, axis by axis.

        Args:
            x: As for :meth:`patches`.

        Returns:
            Tensor of shape (N, C_in · k₁ · k₂ ···).

        Raises:
            ValueError: If the input has no axis for the data.
        """
        x = self._padded(x)
        for k, stride, step in zip(self.kernel_size, self.stride, self.dilation, strict=True):
            # Axis 2 is the next to sum; the k places in its window go to the end.
            last = (x.shape[2] - step * (k - 1) - 1) // stride * stride
            places = [x[:, :, i : i + last + 1 : stride].sum(2) for i in range(0, step * k, step)]
            x = torch.stack(places, dim=-1)
        return x.flatten(1)

    def check(self, x: Tensor) -> None:
        """Refuse an input without an axis for the data.

        Raises:
            ValueError: If its number of axes is another than that of the kernel and two.
        """
        axes = len(self.kernel_size)
        if x.ndim != axes + 2:
            raise ValueError(
                f"A {axes}-d convolution got an input of shape {tuple(x.shape)}. Axis 0 must be "
                f"the datum: give (N, C_in, ...) with {axes + 2} axes, as x.unsqueeze(0) does for "
                "one datum."
            )

    def _padded(self, x: Tensor) -> Tensor:
        self.check(x)
        if not any(side for pair in self.padding for side in pair):
            return x
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        # torch names the last axis first.
        sides = [side for pair in reversed(self.padding) for side in pair]
        return nn.functional.pad(x, sides, mode=mode)


@dataclass(frozen=True)
class Patches:
    """The windows of a convolution's input, cut only where they are needed.

    See :ref:`share-convolution`.

    Args:
        images: The input, shape (N, C_in, ...).
        convolution: What cuts them.

    Raises:
        ValueError: If the input has no axis for the data.

    Example:
        >>> patches = Patches(torch.ones(5, 2, 8, 8), Convolution.of(nn.Conv2d(2, 4, 3)))
        >>> patches.rows().shape, patches.total().shape
        (torch.Size([5, 36, 18]), torch.Size([5, 18]))
    """

    images: Tensor
    convolution: Convolution

    def __post_init__(self) -> None:
        self.convolution.check(self.images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, keep: Tensor | slice) -> "Patches":
        """Return the patches of some of the data."""
        return Patches(self.images[keep], self.convolution)

    def rows(self) -> Tensor:
        """Return the patches, shape (N, S, D_in)."""
        return self.convolution.patches(self.images)

    def total(self) -> Tensor:
        """Return their sum over s, shape (N, D_in)."""
        return self.convolution.patch_sums(self.images)

    def double(self) -> "Patches":
        """Return the patches in double precision."""
        return Patches(self.images.double(), self.convolution)

    @staticmethod
    def joined(parts: Sequence["Patches"]) -> "Patches":
        """Return the patches of the data of several."""
        images = torch.cat([part.images for part in parts])
        return Patches(images, parts[0].convolution)


@dataclass(frozen=True)
class Lookup:
    """z = W one-hot(token), as of :class:`torch.nn.Embedding` (:ref:`share-embedding`).

    Args:
        num_embeddings: Number of tokens, D_in.
        padding_idx: Token whose one-hot vector is zero, if any.

    Example:
        >>> input_rows(Lookup(3, padding_idx=0), torch.tensor([[0, 2]])).tolist()
        [[[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]]
    """

    num_embeddings: int
    padding_idx: int | None = None

    def tokens(self, x: Tensor) -> Tensor:
        """Return the tokens as (N, S), with −1 where they count nothing.

        Raises:
            ValueError: If the input has no axis for the data.
        """
        if x.ndim < 1:
            raise ValueError("An Embedding got a single index. Axis 0 must be the datum: (N, ...).")
        rows = x.reshape(len(x), -1).long()
        return rows if self.padding_idx is None else rows.where(rows != self.padding_idx, -1)


Operation = Affine | Convolution | Lookup


@singledispatch
def input_rows(layer: nn.Module | Operation, x: Tensor) -> Tensor:
    """Rows of a layer's input (:ref:`share-axis`).

    Args:
        layer: A supported layer, or an operation.
        x: Its input; axis 0 is the datum n.

    Returns:
        Tensor of shape (N, S, D_in), where S counts the positions that share the weight; without
        the 1 that a joint bias appends. D_in counts the channels of all groups, those of group 0
        first. Of an Embedding the rows are one-hot vectors.

    Raises:
        NotImplementedError: If the layer is not supported.
        ValueError: If the input has no axis for the data.

    Example:
        >>> input_rows(nn.Linear(2, 3), torch.ones(5, 7, 2)).shape
        torch.Size([5, 7, 2])
        >>> input_rows(nn.Conv2d(2, 4, 3), torch.ones(5, 2, 8, 8)).shape
        torch.Size([5, 36, 18])
    """
    raise NotImplementedError(f"{type(layer).__name__} is not supported. Supported: {supported()}.")


@singledispatch
def output_rows(layer: nn.Module | Operation, g: Tensor) -> Tensor:
    """Rows of vectors in the shape of a layer's output (:ref:`share-axis`).

    Args:
        layer: A supported layer, or an operation.
        g: Tensor of shape (V, N, ...), V vectors in the shape of the layer's output.

    Returns:
        Tensor of shape (V, N, S, D_out).

    Raises:
        NotImplementedError: If the layer is not supported.

    Example:
        >>> output_rows(nn.Linear(2, 3), torch.ones(4, 5, 7, 3)).shape
        torch.Size([4, 5, 7, 3])
        >>> output_rows(nn.Conv1d(2, 3, 1), torch.ones(4, 5, 3, 7)).shape
        torch.Size([4, 5, 7, 3])
    """
    raise NotImplementedError(f"{type(layer).__name__} is not supported. Supported: {supported()}.")


@input_rows.register(nn.Linear)
@input_rows.register(Affine)
def _(layer: nn.Linear | Affine, x: Tensor) -> Tensor:
    if x.ndim < 2:
        raise ValueError(
            f"{type(layer).__name__} got an input of shape {tuple(x.shape)}. Axis 0 must be the "
            "datum: give (N, ..., D_in)."
        )
    return x.reshape(x.shape[0], -1, x.shape[-1])


@output_rows.register(nn.Linear)
@output_rows.register(nn.Embedding)
@output_rows.register(Affine)
@output_rows.register(Lookup)
def _(layer: nn.Module | Operation, g: Tensor) -> Tensor:
    return g.reshape(*g.shape[:2], prod(g.shape[2:-1]), g.shape[-1])


@input_rows.register(nn.Conv1d)
@input_rows.register(nn.Conv2d)
@input_rows.register(nn.Conv3d)
def _(layer: _ConvNd, x: Tensor) -> Tensor:
    return Convolution.of(layer).patches(x)


@input_rows.register
def _(layer: Convolution, x: Tensor) -> Tensor:
    return layer.patches(x)


@output_rows.register(nn.Conv1d)
@output_rows.register(nn.Conv2d)
@output_rows.register(nn.Conv3d)
@output_rows.register(Convolution)
def _(layer: _ConvNd | Convolution, g: Tensor) -> Tensor:
    return g.flatten(3).transpose(2, 3)


@input_rows.register
def _(layer: nn.Embedding, x: Tensor) -> Tensor:
    lookup = Lookup(layer.num_embeddings, layer.padding_idx)
    return input_rows(lookup, x).to(layer.weight.dtype)


@input_rows.register
def _(layer: Lookup, x: Tensor) -> Tensor:
    tokens = layer.tokens(x).unsqueeze(-1)
    every = torch.arange(layer.num_embeddings, device=x.device)
    return (tokens == every).to(torch.get_default_dtype())


def lookup_of(layer: nn.Module | Operation) -> Lookup | None:
    """The lookup that an Embedding does; None for any other layer (:ref:`share-embedding`).

    Example:
        >>> lookup_of(nn.Embedding(4, 2)), lookup_of(nn.Linear(4, 2))
        (Lookup(num_embeddings=4, padding_idx=None), None)
    """
    if isinstance(layer, nn.Embedding):
        return Lookup(layer.num_embeddings, layer.padding_idx)
    return layer if isinstance(layer, Lookup) else None


def convolution_of(layer: nn.Module | Operation) -> Convolution | None:
    """What a convolution does; None for any other layer (:ref:`share-convolution`).

    Example:
        >>> convolution_of(nn.Conv1d(4, 6, 3)).kernel_size, convolution_of(nn.Linear(4, 6))
        ((3,), None)
    """
    if isinstance(layer, _ConvNd):
        return Convolution.of(layer)
    return layer if isinstance(layer, Convolution) else None


def groups_of(layer: nn.Module | Operation) -> int:
    """Number of groups of channels, each with a map of its own (:ref:`share-groups`).

    Example:
        >>> groups_of(nn.Conv1d(4, 6, 3, groups=2)), groups_of(nn.Linear(4, 6))
        (2, 1)
    """
    return layer.groups if isinstance(layer, _ConvNd | Convolution) else 1


def both_sides(
    padding: str | int | tuple[int, ...], kernel_size: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """What a convolution pads before and after, axis by axis (:ref:`share-convolution`).

    Args:
        padding: As torch takes it: one number an axis, ``"same"`` or ``"valid"``.
        kernel_size: Sizes of the kernel.
        dilation: Steps within the window.

    Returns:
        Pairs; ``"same"`` pads the odd one after.

    Example:
        >>> both_sides("same", (4,), (1,)), both_sides((2,), (4,), (1,))
        (((1, 2),), ((2, 2),))
    """
    if isinstance(padding, str):
        same = int(padding == "same")
        both = [same * d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in both)
    return tuple((side, side) for side in _per_axis(padding, kernel_size))


def as_matrix(layer: nn.Module, parameter: Tensor) -> Tensor:
    """A layer's parameter, or its gradient, as a weight-shaped matrix (:ref:`share-axis`).

    Args:
        layer: A supported layer.
        parameter: Tensor in the shape of the layer's weight or bias.

    Returns:
        Matrix of shape (D_out, D_in): ``flatten(1)`` for a convolution, ``weight.T`` for an
        Embedding, one column for a bias.

    Example:
        >>> as_matrix(nn.Conv2d(2, 4, 3), torch.ones(4, 2, 3, 3)).shape
        torch.Size([4, 18])
        >>> as_matrix(nn.Embedding(7, 2), torch.ones(7, 2)).shape
        torch.Size([2, 7])
    """
    if parameter.ndim == 1:
        return parameter.unsqueeze(1)
    return parameter.T if lookup_of(layer) else parameter.flatten(1)


def from_matrix(layer: nn.Module, matrix: Tensor, shape: torch.Size) -> Tensor:
    """The way back from :func:`as_matrix` (:ref:`share-axis`).

    Args:
        layer: A supported layer.
        matrix: Weight-shaped matrix (D_out, D_in).
        shape: Shape of the parameter.

    Returns:
        Tensor of that shape.

    Example:
        >>> from_matrix(nn.Embedding(7, 2), torch.ones(2, 7), torch.Size([7, 2])).shape
        torch.Size([7, 2])
    """
    return (matrix.T if lookup_of(layer) else matrix).reshape(shape)


def is_supported(layer: nn.Module) -> bool:
    """Whether the layer, or a class that it derives from, has rows (:ref:`share-axis`).

    Example:
        >>> is_supported(nn.Linear(2, 3)), is_supported(nn.LayerNorm(2))
        (True, False)
    """
    return input_rows.dispatch(type(layer)) is not input_rows.dispatch(object)


def supported() -> str:
    """The names of the supported layers, for messages (:ref:`share-axis`).

    Example:
        >>> supported()
        'Linear, Conv1d, Conv2d, Conv3d, Embedding'
    """
    return ", ".join(kind.__name__ for kind in _kinds())


def kind_of(layer: nn.Module) -> type[nn.Module]:
    """The supported class that a layer is of, or derives from (:ref:`share-axis`).

    Example:
        >>> kind_of(nn.Linear(2, 3)).__name__
        'Linear'
    """
    return next(kind for kind in _kinds() if isinstance(layer, kind))


def check_options(name: str, layer: nn.Module) -> None:
    """Refuse options with which a layer is not a linear map (:ref:`share-embedding`).

    Raises:
        NotImplementedError: For an Embedding that renormalizes its weight (``max_norm``) or
            rescales its gradients (``scale_grad_by_freq``).

    Example:
        >>> check_options("fc", nn.Linear(2, 3))
    """
    if not isinstance(layer, nn.Embedding):
        return
    for option, what in (
        ("max_norm", "rewrites the weight in every forward pass"),
        ("scale_grad_by_freq", "rescales gradients by the counts in the batch"),
    ):
        if getattr(layer, option) not in (None, False):
            raise NotImplementedError(
                f"Layer {name!r} (Embedding) has {option}={getattr(layer, option)!r}, which "
                f"{what}: its curvature is not that of a linear map. Switch the option off, or "
                f"pass ignore=[{name!r}] to leave it out."
            )


def check_linear(name: str, layer: nn.Module, x: Tensor, z: Tensor) -> None:
    """Refuse a layer whose ``forward`` is not the map of its weight and bias.

    Of interest are subclasses with a forward pass of their own, a forward pass replaced on the
    instance, and module hooks that apply to all modules; otherwise nothing is computed
    (:ref:`share-axis`). Both the output and its derivatives are compared: a masked weight can have
    the right output and the wrong derivative.

    Args:
        name: The layer's name in the model, for the message.
        layer: A supported layer.
        x: Its input.
        z: Its output, attached to its graph.

    Raises:
        NotImplementedError: If output or derivatives differ from those of x Wᵀ + b on the rows.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> check_linear("fc", layer, x := torch.ones(5, 2), layer(x))
    """
    own = _has_the_forward_of_its_kind(type(layer))  # type: ignore[arg-type]
    if own and not any(name in vars(layer) for name in _FORWARD) and not _global_forward_hooks:
        return
    G = groups_of(layer)
    rows = input_rows(layer, x.detach())
    rows = rows.reshape(*rows.shape[:2], G, -1)
    weight = as_matrix(layer, _parameter(layer, "weight")).reshape(G, -1, rows.shape[-1])
    expected = torch.einsum("nsgi,goi->nsgo", rows, weight).flatten(2)
    if getattr(layer, "bias", None) is not None:
        expected = expected + _parameter(layer, "bias")
    found = output_rows(layer, z.unsqueeze(0))[0] if z.ndim > 1 else z
    if found.shape == expected.shape and _close(found, expected):
        parameters = [p for p in layer.parameters(recurse=False) if p.requires_grad]
        v = torch.linspace(-1, 1, z.numel(), dtype=z.dtype, device=z.device).reshape(found.shape)
        pairs = zip(
            *(
                torch.autograd.grad(out, parameters, v, retain_graph=True, allow_unused=True)
                for out in (found, expected)
            ),
            strict=True,
        )
        if all(a is not None and b is not None and _close(a, b) for a, b in pairs):
            return
    raise NotImplementedError(
        f"KFAC does not support layer {name!r} ({type(layer).__name__}): its output is not "
        f"x Wᵀ + b with its own weight and bias, or does not depend on them so. Put what it adds "
        f"into a module of its own, or pass ignore=[{name!r}] to leave it out."
    )


_FORWARD = ("forward", "_conv_forward")


@cache
def _has_the_forward_of_its_kind(of: type[nn.Module]) -> bool:
    kind = next(kind for kind in _kinds() if issubclass(of, kind))
    return all(getattr(of, name, None) is getattr(kind, name, None) for name in _FORWARD)


def _per_axis(option: int | tuple[int, ...], kernel_size: tuple[int, ...]) -> tuple[int, ...]:
    return (option,) * len(kernel_size) if isinstance(option, int) else tuple(option)


def _kinds() -> list[type[Any]]:
    classes = [kind for kind in input_rows.registry if isinstance(kind, type)]
    layers = [kind for kind in classes if issubclass(kind, nn.Module)]
    order = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return sorted(layers, key=lambda kind: order.index(kind) if kind in order else len(order))


def _parameter(layer: nn.Module, name: str) -> Tensor:
    parameter = getattr(layer, name)
    assert isinstance(parameter, Tensor)
    return parameter


def _close(found: Tensor, wanted: Tensor) -> bool:
    tolerance = torch.finfo(wanted.dtype).eps ** 0.5
    scale = float(wanted.detach().abs().max()) if wanted.numel() else 0.0
    return torch.allclose(found, wanted, rtol=tolerance, atol=tolerance * scale)
