"""The zoo of wrong KFACs: the right one is right, and the kit fails and names the wrong ones."""

import csv
from functools import cache

import pytest
import torch
from judge import LISTED, TABLE, is_right, rows, verdict
from torch import nn
from truth import To, fisher_blocks, ggn_blocks, mlp, per_datum_gradients, relative_error
from wrong_kfacs import ZOO, right_kfac

from kfac_lib import (
    Empirical,
    Expand,
    InputOnly,
    MonteCarlo,
    RandomSigns,
    Reduce,
    TypeI,
    TypeII,
)

pytestmark = pytest.mark.usefixtures("float64")

LOSSES = [nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss]
SHARINGS = [Expand(), Reduce()]


def targets(loss, N, K, shape):
    if isinstance(loss, nn.MSELoss):
        return torch.randn(N, K, *shape)
    if isinstance(loss, nn.CrossEntropyLoss):
        return torch.randint(K, (N, *shape))
    return torch.randint(2, (N, K, *shape)).to(torch.get_default_dtype())


def mixing(T):
    """Positions are mixed between the layers, unevenly; classes go to axis 1."""
    mix = torch.randn(4, T)
    mixed = To(lambda x: torch.einsum("nsd,st->ntd", x, mix))
    return nn.Sequential(
        nn.Linear(3, 3), nn.Tanh(), mixed, nn.Linear(3, 3), To(lambda x: x.transpose(1, 2))
    )


def pooled():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), To(lambda x: x.sum(1)), nn.Linear(4, 3))


def in_place():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))


@cache
def problems():
    """Name: (model, loss, data)."""
    torch.manual_seed(1)
    nets = {
        "mlp": (lambda: mlp(3, 4, 4, 3), (), ()),
        "in place": (in_place, (), ()),
        "no bias": (lambda: mlp(3, 4, 3, bias=False), (), ()),
        "mixing": (lambda: mixing(2), (4,), (2,)),
        "pooled": (pooled, (4,), ()),
    }
    found = {}
    for name, (net, shape_x, shape_y) in nets.items():
        for make in LOSSES:
            for reduction in ("mean", "sum"):
                N, loss = (3 if reduction == "mean" else 2), make(reduction=reduction)
                data = torch.randn(N, *shape_x, 3), targets(loss, N, 3, shape_y)
                found[f"{name}, {make.__name__}, {reduction}"] = net(), loss, data
    weight = torch.tensor([0.5, 2.0, 1.3])
    X = torch.randn(3, 4, 3)
    y = torch.tensor([[0, 1], [2, 1], [1, 0]])
    found["weights"] = mixing(2), nn.CrossEntropyLoss(weight=weight), (X, y)
    found["ignored"] = mixing(2), nn.CrossEntropyLoss(ignore_index=1), (X, y)
    return found


@pytest.mark.parametrize("sharing", SHARINGS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("make", LOSSES)
def test_right_one_datum(make, reduction, sharing):
    for T in ((), (2,)):
        loss = make(reduction=reduction)
        model = mlp(3, 4, 4, 3)
        X, y = torch.randn(1, 3), targets(loss, 1, 3, ())
        if T:
            # Rows without shared axes, prediction with positions.
            split = To(lambda f: f.reshape(len(f), 3, 2))
            model, y = nn.Sequential(mlp(3, 4, 6), split), targets(loss, 1, 3, T)
        vectors = per_datum_gradients(model, loss, (X, y))
        for fisher, expected in (
            (TypeII(), ggn_blocks(model, loss, (X, y), "cvec")),
            (TypeI(), ggn_blocks(model, loss, (X, y), "cvec")),
            (Empirical(), fisher_blocks(model, loss, (X, y), vectors, "cvec")),
        ):
            found = right_kfac(model, loss, (X, y), fisher, sharing)
            assert found.keys() == expected.keys()
            for name, (A, B) in found.items():
                assert A.dtype == B.dtype == torch.float64
                assert relative_error(torch.kron(A, B), expected[name]) < 1e-10


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_right_deep_linear_regression(reduction):
    loss, model = nn.MSELoss(reduction=reduction), mlp(3, 4, 2, activation="linear")
    data = torch.randn(5, 3), torch.randn(5, 2)
    expected = ggn_blocks(model, loss, data, "cvec")
    for fisher in (TypeII(), TypeI()):
        for name, (A, B) in right_kfac(model, loss, data, fisher, Expand()).items():
            assert relative_error(torch.kron(A, B), expected[name]) < 1e-10


def test_right_with_positions():
    """Orthogonal mixing for expand, pooling for reduce: exact for linear nets and MSE."""
    Q = torch.linalg.qr(torch.randn(4, 4))[0]
    mixed = To(lambda x: torch.einsum("nsd,st->ndt", x, Q))
    for head, sharing, shape in ((mixed, Expand(), (4,)), (To(lambda x: x.mean(1)), Reduce(), ())):
        for loss in (nn.MSELoss(), nn.MSELoss(reduction="sum")):
            model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), head)
            data = torch.randn(5, 4, 3), torch.randn(5, 2, *shape)
            expected = ggn_blocks(model, loss, data, "cvec")
            for name, (A, B) in right_kfac(model, loss, data, TypeII(), sharing).items():
                assert relative_error(torch.kron(A, B), expected[name]) < 1e-10


def test_right_options():
    """One datum: class weights, an ignored position, smoothing; weights of BCE."""
    X, split = torch.randn(1, 3), To(lambda f: f.reshape(len(f), 3, 2))
    weight = torch.tensor([0.5, 2.0, 1.3])
    model = nn.Sequential(mlp(3, 4, 6), split)
    bce = nn.BCEWithLogitsLoss(weight=torch.rand(3, 2) + 0.5, pos_weight=torch.tensor(3.0))
    y = torch.randint(2, (1, 3, 2)).to(X.dtype)
    cases = [(bce, y, y)]
    for smoothing in (0.0, 0.3):
        ce = nn.CrossEntropyLoss(weight=weight, ignore_index=1, label_smoothing=smoothing)
        cases.append((ce, torch.tensor([[1, 2]]), None))
    for loss, labels, _ in cases:
        expected = ggn_blocks(model, loss, (X, labels), "cvec")
        for fisher in (TypeII(), TypeI()):
            for name, (A, B) in right_kfac(model, loss, (X, labels), fisher, Expand()).items():
                assert relative_error(torch.kron(A, B), expected[name]) < 1e-10
        vectors = per_datum_gradients(model, loss, (X, labels))
        expected = fisher_blocks(model, loss, (X, labels), vectors, "cvec")
        for name, (A, B) in right_kfac(model, loss, (X, labels), Empirical(), Expand()).items():
            assert relative_error(torch.kron(A, B), expected[name]) < 1e-10


def test_right_ignored_datum():
    """A datum without a label left is as if it were not there."""
    model, loss, (X, y) = problems()["ignored"]
    y = y.clone()
    y[1] = 1
    some = [0, 2]
    for sharing in SHARINGS:
        for fisher in (TypeII(), Empirical()):
            found = right_kfac(model, loss, (X, y), fisher, sharing)
            for name, pair in right_kfac(model, loss, (X[some], y[some]), fisher, sharing).items():
                for a, b in zip(found[name], pair, strict=True):
                    assert relative_error(a, b) < 1e-12


def test_right_refuses():
    net, X, y = mlp(2, 2), torch.randn(2, 2), torch.randn(2, 2)
    twice = nn.Sequential(net[0], net[0])
    for arguments in (
        (net, nn.L1Loss(), (X, y), TypeII(), Expand()),
        (net, nn.MSELoss(reduction="none"), (X, y), TypeII(), Expand()),
        (net, nn.CrossEntropyLoss(), (X, y.softmax(1)), TypeII(), Expand()),
        (net, nn.MSELoss(), (X, y), InputOnly(), Expand()),
        (net, nn.MSELoss(), (X, y), RandomSigns(), Expand()),
        (twice, nn.MSELoss(), (X, y), TypeII(), Expand()),
    ):
        with pytest.raises(NotImplementedError):
            right_kfac(*arguments)
    assert not any(module._forward_hooks for module in net.modules())


MC_LOSSES = [
    "pooled, MSELoss, mean",
    "pooled, CrossEntropyLoss, mean",
    "pooled, BCEWithLogitsLoss, mean",
    "mixing, MSELoss, mean",
    "mixing, CrossEntropyLoss, mean",
    "weights",
]


def mc_z(fn, problem, repeats=600):
    """Largest |mean − type-II| in standard errors, over the entries of B, with M = 2.

    Every fault seen only here leaves A alone.
    """
    model, loss, data = problems()[problem]
    exact = right_kfac(model, loss, data, TypeII(), Expand())
    fisher = MonteCarlo(samples=2, generator=torch.Generator().manual_seed(5))
    draws = [fn(model, loss, data, fisher, Expand()) for _ in range(repeats)]
    worst = 0.0
    for name, (_, B) in exact.items():
        Bs = torch.stack([pairs[name][1] for pairs in draws])
        error = (Bs.std(0) / repeats**0.5).clamp(min=1e-12)
        worst = max(worst, float(((Bs.mean(0) - B).abs() / error).max()))
    return worst


@pytest.mark.parametrize("problem", MC_LOSSES)
def test_right_monte_carlo(problem):
    assert mc_z(right_kfac, problem) < 5


def test_zoo_is_large_and_named():
    assert len(ZOO) >= 100
    assert len({entry.name for entry in ZOO}) == len(ZOO)
    assert len({entry.fault for entry in ZOO}) == len(ZOO)
    assert len(LISTED.keys() & {entry.name for entry in ZOO}) == len(LISTED) >= 25
    assert all(entry.fault.endswith(".") for entry in ZOO)


@pytest.mark.parametrize("entry", ZOO, ids=lambda e: e.name)
def test_every_wrong_kfac_fails(entry):
    assert verdict(entry) is not None


def test_the_kit_names_nine_in_ten_of_the_listed_faults_and_explains_no_others():
    listed = [entry for entry in ZOO if entry.name in LISTED]
    named = [entry for entry in listed if is_right(entry)]
    assert len(named) >= 0.9 * len(listed)
    others = [entry for entry in ZOO if entry.name not in LISTED]
    unexplained = [entry for entry in others if is_right(entry)]
    assert len(unexplained) >= 0.9 * len(others)


def test_the_table_of_the_book_is_what_the_kit_says():
    with TABLE.open(newline="") as file:
        header, *stored = csv.reader(file)
    assert header == ["name", "fault", "listed", "verdict", "right"]
    assert stored == rows(), "run make verdicts"
