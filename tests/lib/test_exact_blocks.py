"""Case 0 of the mathematics page: rows and autograd give the same block, always."""

import pytest
import torch
from torch import nn
from truth import LOSSES as OPTIONS
from truth import To, data_for, mlp, relative_error, targets, truth

from kfac_lib import (
    KFAC,
    Empirical,
    InputOnly,
    MonteCarlo,
    RandomSigns,
    TypeI,
    TypeII,
    exact_blocks,
)
from kfac_lib.losses import criterion_of

pytestmark = pytest.mark.usefixtures("float64")
orders = pytest.mark.parametrize("order", ["cvec", "rvec"])
FLAVOURS = {
    "type-II": TypeII(),
    "minimal": TypeII("minimal"),
    "type-I": TypeI(),
    "Monte Carlo": MonteCarlo(3),
    "empirical": Empirical(),
    "signs": RandomSigns(3),
}
KINDS = {"minimal": "type-II", "type-I": "type-II"}  # what they equal, by another way
flavours = pytest.mark.parametrize("flavour", FLAVOURS)
LOSSES = {
    f"{kind.__name__} {reduction}": kind(reduction=reduction)
    for kind in (nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss)
    for reduction in ("mean", "sum")
}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def positions_mix(z):
    """Let every position depend on all others, so that blocks of positions couple."""
    return z + z.roll(1, dims=1).sin() * 0.5 + z.mean(1, keepdim=True) ** 2


NETS = {
    "one layer": ((), lambda: mlp(4, 3)),
    "three layers": ((), lambda: mlp(4, 3, 2, 3, activation="sigmoid")),
    "no bias": ((), lambda: mlp(4, 3, 3, activation="relu", bias=False)),
    "shared, separate positions": (
        (2,),
        lambda: nn.Sequential(mlp(4, 2, 3), To(lambda z: z.movedim(-1, 1))),
    ),
    "shared, mixing positions": (
        (3,),
        lambda: nn.Sequential(
            nn.Linear(4, 2), To(positions_mix), nn.Linear(2, 3), To(lambda z: z.movedim(-1, 1))
        ),
    ),
    "two shared axes": (
        (2, 2),
        lambda: nn.Sequential(
            nn.Linear(4, 2), To(positions_mix), nn.Linear(2, 3), To(lambda z: z.movedim(-1, 1))
        ),
    ),
    "pooled positions": (
        (3,),
        lambda: nn.Sequential(nn.Linear(4, 2), nn.Tanh(), To(lambda z: z.mean(1)), nn.Linear(2, 3)),
    ),
}


def example(name, loss, N):
    shape, net = NETS[name]
    X, y = data_for(loss, N, *shape)
    return net(), (X, y[..., 0] if name == "pooled positions" else y)


def expected_and_found(net, loss, data, flavour, order, compute):
    fisher = FLAVOURS[flavour]
    torch.manual_seed(1)
    vectors = fisher.vectors(criterion_of(loss), net(data[0]), data[1])
    kind = KINDS.get(flavour, flavour)
    torch.manual_seed(1)
    return truth(net, loss, data, kind, order, vectors), compute(fisher)


@flavours
@losses
@pytest.mark.parametrize("net", NETS)
def test_exact_blocks_are_those_of_autograd(flavour, loss, net):
    for N, order in ((1, "rvec"), (3, "cvec")):
        model, data = example(net, loss, N)
        expected, found = expected_and_found(
            model, loss, data, flavour, order,
            lambda fisher, m=model, d=data, o=order: exact_blocks(m, loss, d, fisher, order=o),
        )  # fmt: skip
        assert list(found) == list(expected)
        for name in expected:
            assert relative_error(found[name], expected[name]) < 1e-10


@flavours
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_every_loss(flavour, reduction, option):
    factory, kind = OPTIONS[option]
    loss, (_, net) = factory(3, reduction=reduction), NETS["shared, mixing positions"]
    model, data = net(), (torch.randn(4, 3, 4), targets(kind, 4, 3, (3,)))
    expected, found = expected_and_found(
        model, loss, data, flavour, "cvec",
        lambda fisher: exact_blocks(model, loss, data, fisher, order="cvec"),
    )  # fmt: skip
    for name in expected:
        assert relative_error(found[name], expected[name]) < 1e-10


@flavours
@losses
def test_with_several_data_kfac_is_not_the_block(flavour, loss):
    model, data = example("shared, mixing positions", loss, 3)
    expected, found = expected_and_found(
        model, loss, data, flavour, "rvec", lambda fisher: KFAC.compute(model, loss, data, fisher)
    )
    # Not in the last layer: with MSE it is exact.
    assert relative_error(found["0"].to_dense("rvec"), expected["0"]) > 0.02


@orders
def test_the_other_order_is_clearly_off(order):
    loss = nn.CrossEntropyLoss()
    model, data = example("three layers", loss, 3)
    other = "rvec" if order == "cvec" else "cvec"
    found = exact_blocks(model, loss, data, order=order)
    for name, block in truth(model, loss, data, "type-II", other).items():
        assert relative_error(found[name], block) > 0.1


@losses
def test_batches_of_unequal_size_and_chunks_change_nothing(loss):
    model, (X, y) = example("pooled positions", loss, 5)
    expected = truth(model, loss, (X, y), "type-II", "cvec")
    batches = [(X[:1], y[:1]), (X[1:], y[1:])]
    for chunk_size in (None, 1, 2):
        found = exact_blocks(model, loss, batches, order="cvec", chunk_size=chunk_size)
        for name in expected:
            assert relative_error(found[name], expected[name]) < 1e-10


def test_a_frozen_bias_gives_the_block_of_the_weight():
    loss = nn.MSELoss()
    model, data = example("three layers", loss, 3)
    whole = truth(model, loss, data, "type-II", "cvec")["2"]
    model[2].bias.requires_grad_(False)
    found = exact_blocks(model, loss, data, order="cvec")["2"]
    assert relative_error(found, whole[:-2, :-2]) < 1e-10


def test_selected_layers_only():
    loss = nn.MSELoss()
    model, data = example("three layers", loss, 3)
    assert list(exact_blocks(model, loss, data, order="cvec", layers=["2", "4"])) == ["2", "4"]
    assert list(exact_blocks(model, loss, data, order="cvec", ignore="2")) == ["0", "4"]


def test_a_flavour_without_vectors_has_no_block():
    model, data = example("one layer", nn.MSELoss(), 3)
    with pytest.raises(ValueError, match=r"InputOnly\(\).*no exact one.*TypeII\(\)"):
        exact_blocks(model, nn.MSELoss(), data, InputOnly(), order="cvec")


def test_an_unknown_order_is_refused():
    model, data = example("one layer", nn.MSELoss(), 3)
    with pytest.raises(ValueError, match=r"cvec.*rvec"):
        exact_blocks(model, nn.MSELoss(), data, order="vec")
