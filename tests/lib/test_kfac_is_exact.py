"""The cases in which KFAC is the curvature block itself, each with a control that is off."""

import pytest
import torch
from torch import nn
from truth import LOSSES, To, data_for, mlp, relative_error, targets, truth

from kfac_lib import KFAC, Empirical, MonteCarlo, RandomSigns, Reduce, TypeI, TypeII
from kfac_lib.losses import criterion_of

pytestmark = pytest.mark.usefixtures("float64")
orders = pytest.mark.parametrize("order", ["cvec", "rvec"])
losses = pytest.mark.parametrize(
    "loss", [nn.MSELoss(), nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()], ids=repr
)
options = pytest.mark.parametrize("option", LOSSES)
FLAVOURS = {
    "type-II": TypeII(),
    "type-I": TypeI(),
    "Monte Carlo": MonteCarlo(2),
    "empirical": Empirical(),
    "signs": RandomSigns(2),
}
flavours = pytest.mark.parametrize("flavour", FLAVOURS)


def errors(model, loss, data, flavour="type-II", order="cvec", **options):
    """Relative error of KFAC in every layer, with the same draws on both sides."""
    fisher = options.pop("fisher", FLAVOURS[flavour])
    torch.manual_seed(1)
    vectors = fisher.vectors(criterion_of(loss), model(data[0]), data[1])
    kind = "type-II" if flavour == "type-I" else flavour
    expected = truth(model, loss, data, kind, order, vectors)
    torch.manual_seed(1)
    kfac = KFAC.compute(model, loss, data, fisher, **options)
    assert list(kfac) == list(expected)
    return [relative_error(kfac[name].to_dense(order), expected[name]) for name in expected]


@orders
@flavours
@losses
@pytest.mark.parametrize("activation", ["tanh", "relu", "sigmoid"])
def test_one_datum_is_exact_for_every_net_loss_and_flavour(order, flavour, loss, activation):
    model = mlp(4, 6, 5, 3, activation=activation)
    X, y = data_for(loss, 4)
    assert max(errors(model, loss, (3 * X[:1], y[:1]), flavour, order)) < 1e-10
    assert errors(model, loss, (3 * X, y), flavour, order)[0] > 0.05


@options
@flavours
def test_one_datum_is_exact_for_every_option_of_a_loss(option, flavour):
    factory, kind = LOSSES[option]
    loss, model = factory(3), mlp(4, 6, 5, 3)
    X, y = torch.randn(4, 4), targets(kind, 4, 3)
    one = next(n for n in range(4) if criterion_of(loss).counted(model(X), y)[n])
    assert max(errors(model, loss, (X[one : one + 1], y[one : one + 1]), flavour)) < 1e-10


@options
def test_one_input_with_many_labels_is_exact_for_every_option_of_a_loss(option):
    factory, kind = LOSSES[option]
    loss, model, y = factory(3), mlp(4, 6, 3), targets(kind, 6, 3)
    X = torch.randn(6, 4)
    assert max(errors(model, loss, (X[:1].expand(6, 4), y), "empirical")) < 1e-10
    assert min(errors(model, loss, (X, y), "empirical")) > 0.02


@orders
@losses
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_datum_with_separate_bias_is_exact_in_each_own_block(order, loss, reduction):
    loss = type(loss)(reduction=reduction)
    model, data = mlp(4, 2, 3), data_for(loss, 1)
    kfac = KFAC.compute(model, loss, data, bias="separate")
    assert list(kfac) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    for name, block in truth(model, loss, data, "type-II", order).items():
        D_out, D_in = model[int(name)].weight.shape
        bias = torch.zeros(D_out, D_in + 1, dtype=torch.bool)
        bias[:, -1] = True
        is_bias = bias.T.flatten() if order == "cvec" else bias.flatten()
        weight_block = block[~is_bias][:, ~is_bias]
        assert relative_error(kfac[f"{name}.weight"].to_dense(order), weight_block) < 1e-10
        bias_block = block[is_bias][:, is_bias]
        assert relative_error(kfac[f"{name}.bias"].to_dense(order), bias_block) < 1e-10
        assert block[is_bias][:, ~is_bias].norm() > 0.1 * block.norm()


@orders
@pytest.mark.parametrize("N", [2, 7])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_deep_linear_regression_is_exact_for_every_order(order, N, reduction):
    loss = nn.MSELoss(reduction=reduction)
    model, data = mlp(4, 3, 5, 3, activation="linear"), data_for(loss, N)
    assert max(errors(model, loss, data, order=order)) < 1e-10
    assert min(errors(model, loss, data, "empirical", order)) > 0.05
    ce = nn.CrossEntropyLoss(reduction=reduction)
    assert min(errors(model, ce, data_for(ce, N), order=order)) > 0.005
    nonlinear = mlp(4, 3, 5, 3, activation="tanh")
    assert min(errors(nonlinear, loss, data, order=order)[:2]) > 0.005


def test_deep_linear_regression_is_exact_for_monte_carlo_in_expectation():
    loss = nn.MSELoss()
    model, data = mlp(4, 3, 3, activation="linear"), data_for(loss, 3)
    assert min(errors(model, loss, data, "Monte Carlo")) > 0.05
    expected = truth(model, loss, data, "type-II", "cvec")
    kfac = KFAC.compute(model, loss, data, MonteCarlo(40_000))
    for name, block in expected.items():
        assert relative_error(kfac[name].to_dense("cvec"), block) < 0.03


@orders
def test_bias_free_relu_net_on_one_ray_is_exact(order):
    loss, model = nn.MSELoss(), mlp(4, 6, 5, 3, activation="relu", bias=False)
    _, y = data_for(loss, 5)
    scale, x = torch.tensor([[0.3], [1.0], [2.0], [0.7], [5.0]]), torch.randn(4)
    assert max(errors(model, loss, (scale * x, y), order=order)) < 1e-10
    negative = scale.clone()
    negative[2] *= -1
    assert max(errors(model, loss, (negative * x, y), order=order)) > 0.1
    assert max(errors(model, loss, (torch.randn(5, 4), y), order=order)) > 0.1
    with_bias = mlp(4, 6, 5, 3, activation="relu")
    assert max(errors(with_bias, loss, (scale * x, y), order=order)[:2]) > 0.02


@orders
def test_last_layer_of_a_regression_is_exact_behind_any_body(order):
    loss = nn.MSELoss()
    model, data = mlp(4, 6, 5, 3), data_for(loss, 7)
    *body, last = errors(model, loss, data, order=order)
    assert last < 1e-10
    assert min(body) > 0.01
    assert errors(model, loss, data, "empirical", order)[-1] > 0.05


@orders
def test_last_layer_of_a_classifier_is_exact_when_its_weight_is_zero(order):
    loss = nn.CrossEntropyLoss()
    model, data = mlp(4, 6, 3), data_for(loss, 7)
    assert errors(model, loss, data, order=order)[-1] > 0.005
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.copy_(torch.tensor([1.0, -2.0, 0.5]))
    # The body receives no gradient now, so only the last layer has a block.
    kfac = KFAC.compute(model, loss, data)
    block = truth(model, loss, data, "type-II", order)["2"]
    assert relative_error(kfac["2"].to_dense(order), block) < 1e-10


@orders
@losses
def test_one_input_with_many_labels_is_exact_for_the_empirical_fisher(order, loss):
    model, (X, y) = mlp(4, 6, 3), data_for(loss, 6)
    same = X[:1].expand(6, 4)
    assert max(errors(model, loss, (same, y), "empirical", order)) < 1e-10
    assert min(errors(model, loss, (X, y), "empirical", order)) > 0.02


def mixing_errors(T_mix, sharing):
    model = nn.Sequential(nn.Linear(4, 3), To(lambda z: torch.einsum("ts,nsk->nkt", T_mix, z)))
    data = torch.randn(5, T_mix.shape[1], 4), torch.randn(5, 3, len(T_mix))
    return errors(model, nn.MSELoss(), data, **({"sharing": sharing} if sharing else {}))


def test_expand_is_exact_for_token_mixing_when_the_mixing_is_orthogonal_up_to_scale():
    Q, _ = torch.linalg.qr(torch.randn(4, 4))
    tall, _ = torch.linalg.qr(torch.randn(5, 3))
    for T_mix in (torch.eye(3), 2.5 * Q, tall):
        assert max(mixing_errors(T_mix, None)) < 1e-10
        assert min(mixing_errors(T_mix, Reduce())) > 0.1


def test_reduce_is_exact_for_token_mixing_when_all_tokens_get_the_same_weight():
    for u in (torch.full((1,), 1 / 4), torch.randn(3)):
        T_mix = u.unsqueeze(1) * torch.ones(1, 4)
        assert max(mixing_errors(T_mix, Reduce())) < 1e-10
        assert min(mixing_errors(T_mix, None)) > 0.1


def test_softmax_mixing_fails_both():
    T_mix = torch.randn(4, 4).mul(2).softmax(1)
    assert min(mixing_errors(T_mix, None)) > 0.1
    assert min(mixing_errors(T_mix, Reduce())) > 0.1


@orders
@flavours
@losses
def test_the_bias_block_of_reduce_is_always_exact(order, flavour, loss):
    model = nn.Sequential(
        nn.Linear(4, 2),
        To(lambda z: z.tanh() + z.roll(1, 1) ** 2),
        nn.Linear(2, 3),
        To(lambda z: z.movedim(-1, 1)),
    )
    data = data_for(loss, 3, 3)
    fisher = FLAVOURS[flavour]
    torch.manual_seed(1)
    vectors = fisher.vectors(criterion_of(loss), model(data[0]), data[1])
    kind = "type-II" if flavour == "type-I" else flavour
    expected = truth(model, loss, data, kind, "cvec", vectors)
    torch.manual_seed(1)
    reduced = KFAC.compute(model, loss, data, fisher, Reduce(), bias="separate")
    torch.manual_seed(1)
    expanded = KFAC.compute(model, loss, data, fisher, bias="separate")
    for name, block in expected.items():
        D_out = model[int(name)].out_features
        bias_block = block[-D_out:, -D_out:]
        assert relative_error(reduced[f"{name}.bias"].to_dense(order), bias_block) < 1e-10
        # Nothing mixes the positions after the last layer, so expand is exact there too.
        is_off = relative_error(expanded[f"{name}.bias"].to_dense(order), bias_block) > 0.01
        assert is_off or name == "2"
