import pytest
import torch
from torch import nn
from truth import To, data_for, jacobians, mlp, relative_error, truth

from kfac_lib import Empirical, MonteCarlo, TypeII
from kfac_lib.curvature import fisher_blocks, ggn, ggn_blocks, parameter_jacobians
from kfac_lib.losses import criterion_of

pytestmark = pytest.mark.usefixtures("float64")
orders = pytest.mark.parametrize("order", ["cvec", "rvec"])
losses = pytest.mark.parametrize(
    "loss",
    [kind(reduction=r) for kind in (nn.MSELoss, nn.CrossEntropyLoss) for r in ("mean", "sum")],
    ids=["MSE mean", "MSE sum", "CE mean", "CE sum"],
)


def example(loss, shape):
    net = nn.Sequential(mlp(4, 2, 3), To(lambda z: z.movedim(-1, 1)))
    return net, data_for(loss, 5, *shape)


@orders
@losses
@pytest.mark.parametrize("shape", [(), (2,)], ids=["2d", "positions"])
def test_ggn_blocks_are_those_of_torch_func(order, loss, shape):
    net, data = example(loss, shape)
    expected = truth(net, loss, data, "type-II", order)
    for found in (
        ggn_blocks(net, loss, data, order=order),
        ggn_blocks(net, criterion_of(loss), data, order=order),
        fisher_blocks(net, loss, data, TypeII(), order=order),
    ):
        assert list(found) == list(expected)
        for name, block in expected.items():
            assert relative_error(found[name], block) < 1e-10


@orders
@losses
def test_empirical_and_monte_carlo_blocks_are_sums_of_outer_products(order, loss):
    net, data = example(loss, (2,))
    ii = truth(net, loss, data, "type-II", order)
    flavour = MonteCarlo(2)
    torch.manual_seed(1)
    vectors = flavour.vectors(criterion_of(loss), net(data[0]), data[1])
    for fisher, name in ((Empirical(), "empirical"), (flavour, "draws")):
        expected = truth(net, loss, data, name, order, vectors)
        torch.manual_seed(1)
        found = fisher_blocks(net, loss, data, fisher, order=order)
        for layer, block in expected.items():
            assert relative_error(found[layer], block) < 1e-10
            assert relative_error(found[layer], ii[layer]) > 0.05


@orders
def test_blocks_are_the_diagonal_blocks_of_the_whole(order):
    loss = nn.CrossEntropyLoss()
    net, data = example(loss, ())
    whole, start = ggn(net, loss, data, order=order), 0
    J = torch.cat(list(jacobians(net, data[0], order).values()), 1)
    f = net(data[0]).detach()
    H = torch.func.hessian(lambda f: loss(f, data[1]))(f).reshape(f.numel(), -1)
    assert relative_error(whole, J.T @ H @ J) < 1e-10
    for block in ggn_blocks(net, loss, data, order=order).values():
        end = start + len(block)
        assert relative_error(whole[start:end, start:end], block) < 1e-12
        start = end
    assert start == len(whole) == sum(p.numel() for p in net.parameters())


def test_the_bias_stands_at_the_end_of_every_row_in_rvec_and_last_in_cvec():
    layer, X = nn.Linear(2, 3), torch.randn(5, 2)
    for order, positions in (("rvec", [2, 5, 8]), ("cvec", [6, 7, 8])):
        _, J = parameter_jacobians(layer, X, order)
        assert torch.equal(J[""][:, :, positions], torch.eye(3).expand(5, 3, 3))


def test_frozen_parameters_do_not_count():
    net = mlp(4, 2, 3)
    net[0].requires_grad_(False)
    net[2].bias.requires_grad_(False)
    found = ggn_blocks(net, nn.MSELoss(), data_for(nn.MSELoss(), 5), order="cvec")
    assert {name: len(block) for name, block in found.items()} == {"2": 6}
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        ggn(net, nn.MSELoss(), data_for(nn.MSELoss(), 5), order="cvec")


def test_dtype_is_kept_and_the_model_is_not_touched():
    net = mlp(4, 2, 3).float()
    X, y = torch.randn(5, 4).float(), torch.randint(3, (5,))
    blocks = ggn_blocks(net, nn.CrossEntropyLoss(), (X, y), order="rvec")
    assert {block.dtype for block in blocks.values()} == {torch.float32}
    assert all(p.grad is None for p in net.parameters())
