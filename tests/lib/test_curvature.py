import pytest
import torch
from torch import nn
from truth import (
    LOSSES,
    To,
    data_for,
    jacobians,
    mlp,
    relative_error,
    stack_entries,
    targets,
    truth,
)

from kfac_lib import Empirical, InputOnly, MonteCarlo, TypeI, TypeII
from kfac_lib.curvature import (
    fisher_blocks,
    fisher_matrix,
    ggn,
    ggn_blocks,
    hessian,
    hessian_blocks,
    layer_sizes,
    parameter_jacobians,
)
from kfac_lib.losses import criterion_of

pytestmark = pytest.mark.usefixtures("float64")
orders = pytest.mark.parametrize("order", ["cvec", "rvec"])
losses = pytest.mark.parametrize(
    "loss",
    [
        kind(reduction=r)
        for kind in (nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss)
        for r in ("mean", "sum")
    ],
    ids=["MSE mean", "MSE sum", "CE mean", "CE sum", "BCE mean", "BCE sum"],
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


def whole_hessian(model, loss, data, order):
    """The Hessian of torch's loss by torch.func, with rows and columns put in place by loops."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def value(params):
        return loss(torch.func.functional_call(model, params, (data[0],)), data[1])

    H = torch.func.hessian(value)(params)
    sizes = {name: p.numel() for name, p in params.items()}
    whole = torch.cat(
        [torch.cat([H[a][b].reshape(sizes[a], sizes[b]) for b in params], 1) for a in params]
    )
    places, start = [], 0
    for name, p in params.items():
        if name.endswith("weight"):
            D_out, D_in = p.shape
            index = start + torch.arange(p.numel()).reshape(D_out, D_in)
            bias = name.removesuffix("weight") + "bias"
            if bias in params:
                last = start + p.numel() + torch.arange(D_out)
                index = torch.cat([index, last.unsqueeze(1)], 1)
            places.append(stack_entries(index, order))
        start += p.numel()
    places = torch.cat(places)
    return whole[places][:, places]


@orders
@losses
@pytest.mark.parametrize("shape", [(), (2,)], ids=["2d", "positions"])
def test_hessian_is_that_of_torch_func(order, loss, shape):
    net, data = example(loss, shape)
    expected = whole_hessian(net, loss, data, order)
    found = hessian(net, loss, data, order=order)
    assert relative_error(found, expected) < 1e-10
    assert relative_error(hessian(net, criterion_of(loss), data, order=order), expected) < 1e-10
    assert relative_error(ggn(net, loss, data, order=order), expected) > 0.01


@pytest.mark.parametrize("option", LOSSES)
def test_every_option_of_every_loss(option):
    factory, kind = LOSSES[option]
    loss, net, X = factory(3), mlp(4, 2, 3), torch.randn(5, 4)
    data = X, targets(kind, 5, 3)
    expected = whole_hessian(net, loss, data, "rvec")
    assert relative_error(hessian(net, loss, data, order="rvec"), expected) < 1e-10
    expected = truth(net, loss, data, "type-II", "rvec")
    for found in (
        ggn_blocks(net, loss, data, order="rvec"),
        fisher_blocks(net, loss, data, TypeI(), order="rvec"),
    ):
        for name, block in expected.items():
            assert relative_error(found[name], block) < 1e-10


@orders
@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
def test_blocks_and_mixed_blocks_are_cut_from_the_whole(order, kind):
    loss = nn.CrossEntropyLoss()
    net, data = mlp(4, 2, 5, 3), data_for(loss, 5)
    one, blocks = {
        "hessian": (hessian, hessian_blocks),
        "ggn": (ggn, ggn_blocks),
        "fisher": (
            lambda *args, **o: fisher_matrix(*args, Empirical(), **o),
            lambda *args, **o: fisher_blocks(*args, Empirical(), **o),
        ),
    }[kind]
    whole = one(net, loss, data, order=order)
    sizes = layer_sizes(net)
    assert list(sizes.values()) == [10, 15, 18]
    starts = dict(zip(sizes, [0, 10, 25], strict=True))
    place = {name: slice(starts[name], starts[name] + size) for name, size in sizes.items()}
    for name, block in blocks(net, loss, data, order=order).items():
        assert relative_error(block, whole[place[name], place[name]]) < 1e-12
        row = one(net, loss, data, order=order, rows=name)
        assert relative_error(row, whole[place[name]]) < 1e-12
        for other in sizes:
            mixed = one(net, loss, data, order=order, rows=name, columns=other)
            assert relative_error(mixed, whole[place[name], place[other]]) < 1e-12
    with pytest.raises(ValueError, match=r"no layer '1'.*'0', '2', '4'"):
        one(net, loss, data, order=order, rows="1")
    with pytest.raises(ValueError, match=r"no layer '1'.*'0', '2', '4'"):
        one(net, loss, data, order=order, columns="1")


def test_a_linear_loss_has_no_curvature():
    class Total(type(criterion_of(nn.MSELoss()))):
        def value(self, f, y):
            return f.sum()

    net, data = nn.Linear(4, 3), data_for(nn.MSELoss(), 5)
    assert not hessian(net, Total("sum"), data, order="cvec").any()


def test_a_bias_that_is_registered_first_still_stands_last():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.randn(3))
            self.weight = nn.Parameter(torch.randn(3, 2))

        def forward(self, x):
            return x @ self.weight.T + self.bias

    X = torch.randn(5, 2)
    _, found = parameter_jacobians(Reversed(), X, "cvec")
    _, expected = parameter_jacobians(nn.Linear(2, 3), X, "cvec")
    assert relative_error(found[""], expected[""]) < 1e-12


def test_a_parameter_of_another_name_stands_alone_and_an_unused_one_is_zero():
    net, data = nn.Sequential(mlp(4, 3)), data_for(nn.MSELoss(), 5)
    net.scale = nn.Parameter(torch.ones(2, 2))
    assert layer_sizes(net) == {"scale": 4, "0.0": 15}
    for matrix in (hessian, ggn):
        whole = matrix(net, nn.MSELoss(), data, order="cvec")
        assert not whole[:4].any()
        assert not whole[:, :4].any()
        assert whole[4:, 4:].diagonal().all()


def test_data_that_do_not_fit_and_a_flavour_without_a_matrix():
    net, (X, y) = mlp(4, 3), data_for(nn.MSELoss(), 5)
    for matrix in (hessian, hessian_blocks, ggn, ggn_blocks):
        with pytest.raises(ValueError, match=r"\(5, 3\).*\(5, 1\).*broadcast"):
            matrix(net, nn.MSELoss(), (X, y[:, :1]), order="cvec")
        with pytest.raises(ValueError, match=r"cvec.*rvec"):
            matrix(net, nn.MSELoss(), (X, y), order="vec")
    for matrix in (fisher_matrix, fisher_blocks):
        with pytest.raises(ValueError, match=r"InputOnly.*Use another flavour"):
            matrix(net, nn.MSELoss(), (X, y), InputOnly(), order="cvec")
