"""The zoo's cases with shared weights: convolutions, embeddings, and layers called several times.

Explained in the section :ref:`test-zoo`; why KFAC is exact in them, in the chapter
:ref:`weight-sharing`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kfac_lib.accumulate import Expand, Reduce, Sharing
from kfac_lib.exact_cases import (
    ExactCase,
    _case,
    _ClassesFirst,
    _linear,
    _Mix,
    _OnEachPart,
    _randn,
    _target,
)
from kfac_lib.fisher import Empirical, Fisher, MonteCarlo, TypeII


class _Pool(nn.Module):
    """The mean over all pixels: (N, C, ...) to (N, C)."""

    def forward(self, z: Tensor) -> Tensor:
        return z.flatten(2).mean(2)


class _SumOfPositions(nn.Module):
    """The sum over the positions of (N, S, D)."""

    def forward(self, z: Tensor) -> Tensor:
        return z.sum(1)


def _conv(C_in: int, C_out: int, *kernel_size: int, **options: Any) -> nn.Module:
    kinds: tuple[Callable[..., nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layer = kinds[len(kernel_size) - 1]
    return layer(C_in, C_out, kernel_size, dtype=torch.float64, **options)


def _embedding(tokens: int, D_out: int, padding_idx: int | None = None) -> nn.Module:
    layer = nn.Embedding(tokens, D_out, padding_idx, dtype=torch.float64)
    with torch.no_grad():  # the padding has no zero vector, so that it must not be told by that
        layer.weight.normal_()
    return layer


def _one_position() -> Iterator[ExactCase]:
    """One datum, one pixel of every output: nothing is averaged, and expand is reduce."""
    mse, ce = nn.MSELoss(), nn.CrossEntropyLoss()
    for layer, pixels, loss, fisher, sharing in (
        (_conv(2, 3, 3), (3,), mse, TypeII(), Expand()),
        (_conv(2, 3, 4), (4,), ce, Empirical(), Reduce()),
        (_conv(3, 2, 2, 3), (2, 3), ce, TypeII(), Expand()),
        (_conv(2, 4, 2, 2, bias=False), (2, 2), mse, Empirical(), Reduce()),
        (_conv(2, 3, 2, 1, 2), (2, 1, 2), nn.BCEWithLogitsLoss(), TypeII(), Reduce()),
        (_conv(2, 3, 2, 2), (2, 2), ce, MonteCarlo(3), Expand()),
    ):
        yield _read_once("convolution at one position", layer, pixels, loss, fisher, sharing)


def _padded() -> Iterator[ExactCase]:
    """One pixel of the output sees the padding, or is cut by stride or dilation."""
    name = "convolution at one position, padded"
    for mode in ("zeros", "reflect", "replicate", "circular"):
        layer = _conv(2, 3, 5, padding=1, padding_mode=mode)
        yield _read_once(name, layer, (3,), nn.CrossEntropyLoss())
    for layer, pixels, sharing in (
        (_conv(2, 3, 3, 2, stride=(3, 4), padding=(1, 0)), (3, 4), Expand()),
        (
            _conv(1, 3, 2, 2, dilation=(1, 2), padding=(0, 1), padding_mode="circular"),
            (2, 1),
            Reduce(),
        ),
        (_conv(2, 3, 2, 3, dilation=(3, 1)), (4, 3), Reduce()),
        (_conv(2, 4, 3, padding="same"), (1,), Expand()),
    ):
        loss = nn.CrossEntropyLoss(reduction="sum")
        yield _read_once(name, layer, pixels, loss, sharing=sharing)


def _read_once(
    family: str,
    layer: nn.Module,
    pixels: tuple[int, ...],
    loss: nn.Module,
    fisher: Fisher = TypeII(),
    sharing: Sharing = Expand(),
) -> ExactCase:
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), _linear(layer.out_channels, 5))
    data = _randn(1, layer.in_channels, *pixels), _target(loss, 1, 5)
    return _case(family, model, loss, data, fisher, sharing)


def _apart() -> Iterator[ExactCase]:
    """Kernels that do not overlap, nor does what comes behind: every position by itself."""
    for first, then, pixels in (
        (_conv(3, 4, 1), _conv(4, 2, 1), (5,)),
        (_conv(2, 3, 1, 1, stride=2), _conv(3, 2, 1, 1, bias=False), (3, 3)),
        (_conv(2, 3, 2, 2, stride=2), _conv(3, 2, 1, 1), (4, 6)),
        (_conv(2, 3, 2, stride=3, dilation=2), _conv(3, 4, 1), (6,)),
        (_conv(1, 3, 1, 1, 1), _conv(3, 2, 1, 1, 1), (1, 2, 2)),
    ):
        yield _regression("kernels do not overlap", first, then, pixels=pixels)


def _pooled() -> Iterator[ExactCase]:
    """Linear, and the same to every pixel: all sums over pixels agree."""
    circular = {"padding_mode": "circular", "padding": "same"}
    name = "circular padding, pooled"
    for first, then, pixels in (
        (_conv(2, 3, 3, **circular), _conv(3, 4, 2, **circular), (5,)),
        (_conv(1, 3, 3, 3, **circular), _conv(3, 2, 3, 1, bias=False, **circular), (3, 4)),
        # stride in a layer makes a difference between the pixels of those in front of it
        (
            _conv(2, 3, 3, padding_mode="circular", padding=2, dilation=2, stride=2),
            _conv(3, 2, 2, **circular),
            (6,),
        ),
        (_conv(2, 2, 1, 2, 1, **circular), _conv(2, 3, 2, 1, 1, **circular), (2, 2, 1)),
    ):
        yield _regression(name, first, then, _Pool(), _linear(_out(then), 2), pixels=pixels)
    for first, then, pixels in (
        (_conv(2, 3, 3, padding=1), _conv(3, 2, 3, padding=1), (5,)),
        (_conv(1, 3, 2, 3, padding=(1, 2)), _conv(3, 2, 2, 2, padding=1, stride=2), (2, 3)),
    ):
        layers = (first, nn.Tanh(), then, _Pool())
        yield _regression("last convolution, pooled", *layers, pixels=pixels, known=("2",))


def _grouped() -> Iterator[ExactCase]:
    """Group by group the block is what it would be without groups."""
    name, ce = "grouped convolution", nn.CrossEntropyLoss()
    for fisher, sharing in ((TypeII(), Expand()), (Empirical(), Reduce())):
        yield _read_once(name, _conv(4, 6, 2, groups=2), (2,), ce, fisher, sharing)
    depthwise = _conv(3, 6, 2, 2, groups=3, padding=1, stride=3, bias=False)
    yield _read_once(name, depthwise, (1, 1), ce)
    layers = _conv(4, 6, 1, groups=2), _conv(6, 4, 1, groups=2)
    yield _regression(name, *layers, pixels=(3,))
    layers = _conv(4, 2, 2, stride=2, groups=2), _conv(2, 3, 1)
    yield _regression(name, *layers, pixels=(6,))
    circular = {"padding": "same", "padding_mode": "circular"}
    layers = _conv(2, 4, 3, groups=2, **circular), _conv(4, 2, 2, groups=2, bias=False, **circular)
    yield _regression(name, *layers, _Pool(), pixels=(4,))


def _regression(
    family: str, *layers: nn.Module, pixels: tuple[int, ...], known: tuple[str, ...] | None = None
) -> ExactCase:
    """Squared error; reduce where the net pools, expand elsewhere."""
    model, N = nn.Sequential(*layers), 4 + len(pixels)
    X = _randn(N, _in(layers[0]), *pixels)
    with torch.no_grad():
        y = torch.randn_like(model(X))
    pools = any(isinstance(layer, _Pool) for layer in layers)
    loss = nn.MSELoss(reduction="sum" if len(pixels) > 1 else "mean")
    sharing = Reduce() if pools else Expand()
    return _case(family, model, loss, (X, y), sharing=sharing, layers=known)


def _in(layer: nn.Module) -> int:
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return layer.in_channels


def _out(layer: nn.Module) -> int:
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return layer.out_channels


def _tokens(N: int, S: int, tokens: int) -> Tensor:
    drawn = torch.randint(tokens, (N, S))
    drawn[0, :2] = 1  # a token twice in one datum
    return drawn


def _embedded() -> Iterator[ExactCase]:
    for padding_idx, reduction in ((None, "mean"), (1, "sum")):
        loss = nn.MSELoss(reduction=reduction)
        model = nn.Sequential(_embedding(5, 3, padding_idx), _linear(3, 2))
        data = _tokens(6, 4, 5), _randn(6, 4, 2)
        yield _case("tokens do not mix", model, loss, data)
        model = nn.Sequential(_embedding(5, 3, padding_idx), _SumOfPositions(), _linear(3, 2))
        data = _tokens(7, 4, 5), _randn(7, 2)
        yield _case("tokens are pooled", model, loss, data, sharing=Reduce())
    one_token: tuple[tuple[nn.Module, Fisher, Sharing], ...] = (
        (nn.CrossEntropyLoss(), TypeII(), Expand()),
        (nn.BCEWithLogitsLoss(), Empirical(), Reduce()),
        (nn.CrossEntropyLoss(), MonteCarlo(3), Expand()),
    )
    for one_loss, fisher, sharing in one_token:
        model = nn.Sequential(_embedding(4, 3), nn.Flatten(), nn.Tanh(), _linear(3, 5))
        data = torch.tensor([[2]]), _target(one_loss, 1, 5)
        yield _case("one token", model, one_loss, data, fisher, sharing)


def _called_often() -> Iterator[ExactCase]:
    name, loss = "layer called several times", nn.MSELoss()

    def join(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, 1)

    # five positions in calls of two, two and one
    model: nn.Module = _OnEachPart(_linear(3, 2), join, parts=3)
    yield _case(name, model, loss, (_randn(4, 5, 3), _randn(4, 5, 2)))
    model = _OnEachPart(_conv(2, 3, 1), torch.hstack)
    yield _case(name, model, loss, (_randn(5, 4, 3), _randn(5, 6, 3)))
    model = _OnEachPart(_embedding(4, 3, padding_idx=0), join)
    yield _case(name, model, loss, (_tokens(6, 5, 4), _randn(6, 5, 3)))
    model = nn.Sequential(_OnEachPart(_embedding(4, 3), join, parts=3), _SumOfPositions())
    yield _case(name, model, loss, (_tokens(5, 5, 4), _randn(5, 3)), sharing=Reduce())


def _defined() -> Iterator[ExactCase]:
    """Nets on which KFAC is an approximation: its definition is compared."""
    circular = {"padding": "same", "padding_mode": "circular"}
    nets: tuple[tuple[str, Callable[[], nn.Module], Tensor], ...] = (
        (
            "definition, convolutions",
            lambda: nn.Sequential(
                _conv(2, 3, 3, padding=1, padding_mode="replicate"),
                nn.Tanh(),
                _conv(3, 4, 2, stride=2, dilation=2),
                nn.Flatten(),
                _linear(8, 3),
            ),
            _randn(5, 2, 5),
        ),
        (
            "definition, convolutions",
            lambda: nn.Sequential(
                _conv(2, 4, 2, 3, groups=2, **circular), nn.Tanh(), _conv(4, 3, 2, 1), _Pool()
            ),
            _randn(6, 2, 2, 2),
        ),
        (
            "definition, embedding",
            lambda: nn.Sequential(
                _embedding(5, 2, padding_idx=1),
                nn.Tanh(),
                _Mix(_randn(4, 4)),
                _linear(2, 3),
                _ClassesFirst(),
                nn.Flatten(),
                _linear(12, 3),
            ),
            _tokens(6, 4, 5),
        ),
    )
    for family, net, X in nets:
        for sharing in (Expand(), Reduce()):
            for loss, fisher in (
                (nn.CrossEntropyLoss(), TypeII()),
                (nn.MSELoss(reduction="sum"), Empirical()),
            ):
                data = X.clone(), _target(loss, len(X), 3)
                yield _case(family, net(), loss, data, fisher, sharing)
    for sharing in (Expand(), Reduce()):
        parts = _OnEachPart(nn.Sequential(_linear(3, 4), nn.Tanh()), torch.hstack)
        model = nn.Sequential(parts, nn.Flatten(), _linear(20, 3))
        ce = nn.CrossEntropyLoss()
        data = _randn(7, 5, 3), _target(ce, 7, 3)
        yield _case("definition, layer called twice", model, ce, data, sharing=sharing)


SHARING_FAMILIES = (
    _one_position,
    _padded,
    _apart,
    _pooled,
    _grouped,
    _embedded,
    _called_often,
    _defined,
)
"""All of them, in the order in which they are run."""
