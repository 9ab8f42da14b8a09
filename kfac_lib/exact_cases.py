"""The zoo: situations in which KFAC *is* the curvature block, so that any KFAC can be tested.

Each is a small net in float64 with a loss and a batch, built so that the expectation approximation
makes no error; the truth comes from autograd alone. Beside them stand nets on which KFAC is only an
approximation, and where its definition is compared. Explained in the section :ref:`test-zoo`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from kfac_lib.accumulate import Expand, Reduce, Sharing
from kfac_lib.fisher import Empirical, Fisher, InputOnly, MonteCarlo, RandomSigns, TypeI, TypeII
from kfac_lib.layers import is_supported, kind_of


@dataclass(frozen=True, eq=False)
class ExactCase:
    """A net, a loss and a batch for which it is known what KFAC must give (:ref:`test-zoo`).

    Args:
        family: What makes it exact, such as ``"one datum"``.
        model: The network, in float64.
        loss_func: The loss.
        data: One pair (X, y).
        fisher: The flavour. With random vectors the claim holds in expectation.
        sharing: How positions that share a weight are treated.
        layers: Names of the layers for which it is known.
        is_exact: Whether KFAC is the curvature block there; else only its definition is compared.
        option: The option of the loss that is at work, if any.
    """

    family: str
    model: nn.Module
    loss_func: nn.Module
    data: tuple[Tensor, Tensor]
    fisher: Fisher
    sharing: Sharing
    layers: tuple[str, ...]
    is_exact: bool = True
    option: str = ""

    @property
    def is_random(self) -> bool:
        """Whether the flavour draws its vectors."""
        return isinstance(self.fisher, MonteCarlo | RandomSigns)

    @property
    def kind(self) -> str:
        """The kind of layer that it takes to run it, ``"Linear"`` if nothing else is in it."""
        kinds = [kind_of(m).__name__ for m in self.model.modules() if is_supported(m)]
        return next((kind for kind in kinds if kind != "Linear"), "Linear")

    def __repr__(self) -> str:
        loss = type(self.loss_func).__name__
        detail = f"{self.loss_func.reduction}, {self.option}" if self.option else None
        shape = tuple(self.data[0].shape)
        return (
            f"{self.family}: {loss}({detail or self.loss_func.reduction}), {self.fisher}, "
            f"{self.sharing}, X {shape}"
        )


def exact_cases() -> tuple[ExactCase, ...]:
    """All cases, always the same ones (:ref:`test-zoo`).

    Returns:
        Some hundred and fifty cases, those of weights that are shared by convolutions, embeddings
        and reused layers (:mod:`kfac_lib.sharing_cases`) at the
        end. Do not change their nets; take a ``copy.deepcopy``.

    Example:
        >>> cases = exact_cases()
        >>> cases[0]
        one datum: MSELoss(mean), TypeII(columns='full'), Expand(), X (1, 3)
        >>> len({case.family for case in cases})
        26
    """
    return _all_cases()


@lru_cache(maxsize=1)
def _all_cases() -> tuple[ExactCase, ...]:
    from kfac_lib.sharing_cases import SHARING_FAMILIES  # they build on this module

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tuple(
            case
            for family in (
                _one_datum,
                _options_of_the_losses,
                _deep_linear,
                _one_ray,
                _last_layer,
                _same_input,
                _shared,
                _called_twice,
                _definition,
                *SHARING_FAMILIES,
            )
            for case in family()
        )


class _Mix(nn.Module):
    """_Mix the positions: F = T_mix Z along axis 1."""

    def __init__(self, mixing: Tensor) -> None:
        super().__init__()
        self.mixing = mixing

    def forward(self, z: Tensor) -> Tensor:
        return torch.einsum("ts,ns...->nt...", self.mixing, z)


class _ClassesFirst(nn.Module):
    """Predictions (N, T, K) as torch wants them, (N, K, T)."""

    def forward(self, z: Tensor) -> Tensor:
        return z.transpose(1, 2)


class _OnEachPart(nn.Module):
    """Call one module on parts of the input, one after the other, and join the results."""

    def __init__(
        self, twice: nn.Module, join: Callable[..., Any], parts: int = 2, axis: int = 1
    ) -> None:
        super().__init__()
        self.twice, self.join = twice, join
        self.parts, self.axis = parts, axis

    def forward(self, x: Tensor) -> Tensor:
        joined: Tensor = self.join([self.twice(part) for part in x.chunk(self.parts, self.axis)])
        return joined


def _linear(D_in: int, D_out: int, bias: bool = True) -> nn.Linear:
    return nn.Linear(D_in, D_out, bias=bias, dtype=torch.float64)


def _net(
    *sizes: int, activation: Callable[[], nn.Module] = nn.Tanh, bias: bool = True
) -> nn.Module:
    layers: list[nn.Module] = []
    for D_in, D_out in pairwise(sizes):
        layers += [_linear(D_in, D_out, bias), activation()]
    return nn.Sequential(*layers[:-1])


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _target(loss: nn.Module, N: int, K: int, *positions: int) -> Tensor:
    if isinstance(loss, nn.CrossEntropyLoss):
        return torch.randint(K, (N, *positions))
    real = _randn(N, K, *positions)
    return real if isinstance(loss, nn.MSELoss) else (real > 0).to(real.dtype)


def _losses() -> Iterator[nn.Module]:
    for kind in (nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss):
        for reduction in ("mean", "sum"):
            yield kind(reduction=reduction)


def _layers(model: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, m in model.named_modules() if is_supported(m))


def _case(
    family: str,
    model: nn.Module,
    loss: nn.Module,
    data: tuple[Tensor, Tensor],
    fisher: Fisher = TypeII(),
    sharing: Sharing = Expand(),
    layers: tuple[str, ...] | None = None,
    option: str = "",
) -> ExactCase:
    known = _layers(model) if layers is None else layers
    exact = not family.startswith("definition")
    return ExactCase(family, model, loss, data, fisher, sharing, known, exact, option)


def _one_datum() -> Iterator[ExactCase]:
    for loss in _losses():
        for fisher in (TypeII(), Empirical(), TypeI()):
            yield _case(
                "one datum", _net(3, 4, 5), loss, (_randn(1, 3), _target(loss, 1, 5)), fisher
            )
    loss = nn.CrossEntropyLoss()
    without_bias = _net(4, 6, 5, 3, activation=nn.Sigmoid, bias=False)
    yield _case("one datum", without_bias, loss, (_randn(1, 4), _target(loss, 1, 3)))
    in_place = nn.Sequential(_linear(4, 6), nn.ReLU(inplace=True), _linear(6, 3))
    data = _randn(1, 4), _target(loss, 1, 3)
    yield _case("one datum, activation in place", in_place, loss, data)
    yield _case(
        "one datum, pooled", _pooled_net(5), loss, (_randn(1, 3, 4), _target(loss, 1, 5)),
        sharing=Reduce(),
    )  # fmt: skip


def _pooled_net(K: int, activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Module:
    average = _Mix(torch.full((1, 3), 1 / 3, dtype=torch.float64))
    return nn.Sequential(_linear(4, 6), average, nn.Flatten(), activation(), _linear(6, K))


def _options_of_the_losses() -> Iterator[ExactCase]:
    weight = torch.tensor([0.5, 1.7, 1.3], dtype=torch.float64)
    X, y = _randn(1, 4), torch.tensor([1])

    def case(option: str, loss: nn.Module, X: Tensor, y: Tensor, fisher: Fisher) -> ExactCase:
        return _case("one datum", _net(4, 5, 3), loss, (X, y), fisher, option=option)

    for fisher in (TypeII(), Empirical()):
        yield case("weight", nn.CrossEntropyLoss(weight=weight, reduction="sum"), X, y, fisher)
        one_counts = _randn(3, 4), torch.tensor([2, 0, 2])
        yield case("ignore_index", nn.CrossEntropyLoss(ignore_index=2), *one_counts, fisher)
        half = 0.5 * torch.ones(1, 3, dtype=torch.float64)
        yield case("pos_weight", nn.BCEWithLogitsLoss(pos_weight=weight), X, half, fisher)
    weighted = nn.CrossEntropyLoss(weight=weight, reduction="sum")
    yield case("weight", weighted, X, y, MonteCarlo(17))
    yield case("label_smoothing", nn.CrossEntropyLoss(label_smoothing=0.3), X, y, Empirical())


def _deep_linear() -> Iterator[ExactCase]:
    for N, reduction in ((5, "mean"), (7, "sum")):
        loss = nn.MSELoss(reduction=reduction)
        for fisher in (TypeII(), TypeI()):
            model = _net(4, 5, 3, activation=nn.Identity)
            data = _randn(N, 4), _target(loss, N, 3)
            yield _case("deep linear regression", model, loss, data, fisher)
    for random in (MonteCarlo(3), RandomSigns(2)):
        loss = nn.MSELoss()
        model = _net(3, 4, 5, activation=nn.Identity)
        data = _randn(23, 3), _target(loss, 23, 5)
        yield _case("deep linear regression", model, loss, data, random)


def _one_ray() -> Iterator[ExactCase]:
    scale = torch.tensor([[0.3], [1.0], [2.0], [0.7], [5.0]], dtype=torch.float64)
    model = _net(4, 6, 5, 3, activation=nn.ReLU, bias=False)
    loss = nn.MSELoss()
    yield _case("inputs on one ray", model, loss, (scale * _randn(4), _target(loss, 5, 3)))


def _last_layer() -> Iterator[ExactCase]:
    for N, loss in zip((7, 4, 5, 6, 11, 13), _losses(), strict=True):
        model = _net(4, 6, 3)
        family = "last layer"
        if not isinstance(loss, nn.MSELoss):
            family = "last layer, weight zero"
            _zero(model[-1])  # type: ignore[index]
        data = _randn(N, 4), _target(loss, N, 3)
        yield _case(family, model, loss, data, layers=("2",))
    for samples, reduction in ((2, "mean"), (5, "sum")):
        loss = nn.CrossEntropyLoss(reduction=reduction)
        model = _net(4, 3, 5)
        _zero(model[-1])  # type: ignore[index]
        data = _randn(30, 4), _target(loss, 30, 5)
        yield _case(
            "last layer, weight zero", model, loss, data, MonteCarlo(samples), layers=("2",)
        )


def _zero(layer: nn.Module) -> None:
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.linspace(-1, 1.5, len(layer.bias)))


def _same_input() -> Iterator[ExactCase]:
    for N, loss in zip((6, 7, 5, 8, 4, 9), _losses(), strict=True):
        data = _randn(1, 4).expand(N, 4).clone(), _target(loss, N, 3)
        yield _case("one input, many labels", _net(4, 5, 3), loss, data, Empirical())
    some_count = nn.CrossEntropyLoss(ignore_index=2)
    data = _randn(1, 4).expand(5, 4).clone(), torch.tensor([2, 0, 1, 0, 2])
    net, option = _net(4, 5, 3), "ignore_index"
    yield _case("one input, many labels", net, some_count, data, Empirical(), option=option)


def _shared() -> Iterator[ExactCase]:
    S = 3
    orthogonal = torch.linalg.qr(_randn(S, S)).Q
    same_for_all = _randn(4, 1).expand(4, S).clone()  # u 1ᵀ: every position enters alike
    for N, reduction in ((4, "mean"), (5, "sum")):
        loss = nn.MSELoss(reduction=reduction)
        for name, mixing, sharing in (
            ("positions do not mix", torch.eye(S, dtype=torch.float64), Expand()),
            ("positions mix orthogonally", orthogonal, Expand()),
            ("positions are pooled", same_for_all, Reduce()),
        ):
            model = nn.Sequential(_linear(4, 5), _Mix(mixing), nn.Identity(), _linear(5, 2))
            data = _randn(N, S, 4), _randn(N, len(mixing), 2)
            layers = ("0",) if isinstance(sharing, Reduce) else None
            yield _case(name, model, loss, data, sharing=sharing, layers=layers)
        yield _case(name, model, loss, data, MonteCarlo(N + 7), sharing, layers)
        ce = nn.CrossEntropyLoss(reduction=reduction)
        model = nn.Sequential(_linear(4, 5), nn.Tanh(), _linear(5, 3), _ClassesFirst())
        _zero(model[2])
        data = _randn(N, S, 4), _target(ce, N, 3, S)
        yield _case("last layer, weight zero", model, ce, data, layers=("2",))
    yield _case("last layer, weight zero", model, ce, data, MonteCarlo(4), layers=("2",))


def _called_twice() -> Iterator[ExactCase]:
    loss, name = nn.MSELoss(), "module called twice"
    halves = _OnEachPart(_net(3, 5, 2, activation=nn.Identity), torch.hstack)
    yield _case(name, halves, loss, (_randn(4, 6), _target(loss, 4, 4)))
    added = _OnEachPart(_linear(3, 2), sum)
    yield _case(name, added, loss, (_randn(1, 6), _target(loss, 1, 2)), sharing=Reduce())


def _definition() -> Iterator[ExactCase]:
    for N, loss in zip((6, 7, 5, 8, 6, 9), _losses(), strict=True):
        for fisher in (TypeII(), Empirical()):
            data = _randn(N, 4), _target(loss, N, 3)
            yield _case("definition", _net(4, 5, 5, 3), loss, data, fisher)
    yield _case("definition", _net(4, 5, 3), loss, data, TypeI())
    yield _case("definition", _net(4, 5, 3), loss, data, InputOnly())
    yield _case("definition", _net(4, 5, 3), loss, data, MonteCarlo(10))
    for sharing in (Expand(), Reduce()):
        for kind in (nn.MSELoss, nn.CrossEntropyLoss):
            for fisher in (TypeII(), Empirical()):
                loss = kind()
                data = _randn(5, 3, 4), _target(loss, 5, 5)
                yield _case("definition", _pooled_net(5), loss, data, fisher, sharing)
        loss = nn.CrossEntropyLoss()
        mixing = _Mix(_randn(3, 3))
        model = nn.Sequential(_linear(4, 5), nn.Tanh(), mixing, _linear(5, 3), _ClassesFirst())
        data = _randn(5, 3, 4), _target(loss, 5, 3, 3)
        for fisher in (TypeII(), Empirical()):
            yield _case("definition", model, loss, data, fisher, sharing)
    yield _case("definition", model, loss, data, MonteCarlo(14), Expand())
