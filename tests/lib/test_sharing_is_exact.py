"""Where KFAC with weight sharing is the block itself, layer by layer, each with its controls."""

from itertools import product

import pytest
import torch
from layer_cases import FLAVOURS, SHARINGS, classes_first, drawn, is_fisher_of_draws, labels
from torch import nn
from truth import ACTIVATIONS, To, relative_error
from truth_layers import blocks, dense, factors, in_order

from kfac_lib import KFAC, TypeII
from kfac_lib.losses import CrossEntropy, SquaredError

pytestmark = pytest.mark.usefixtures("float64")
MSE, CE, BCE = nn.MSELoss(), nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()
orders = pytest.mark.parametrize("order", ["cvec", "rvec"])
sharings = pytest.mark.parametrize("sharing", SHARINGS)
flavours = pytest.mark.parametrize("flavour", FLAVOURS)
losses = pytest.mark.parametrize("loss", [MSE, CE, BCE], ids=repr)


def own_group(block, layer, order):
    """The group-diagonal sub-blocks of a grouped convolution's block, zero elsewhere."""
    G = getattr(layer, "groups", 1)
    if G == 1:
        return block
    size, D = len(block) // G, len(block) // layer.out_channels
    return block * in_order(torch.block_diag(*[torch.ones(size, size)] * G), D, order)


def errors(model, data, sharing="expand", loss=MSE, flavour="type-II", order="cvec"):
    """Relative error of KFAC in every layer's own blocks, with the same draws on both sides."""
    fisher = FLAVOURS[flavour]
    (vectors,) = drawn(fisher, model, loss, data)
    given = vectors if is_fisher_of_draws(flavour) else None
    expected = blocks(model, loss, data, order, given)
    torch.manual_seed(1)
    kfac = KFAC.compute(model, loss, data, fisher, SHARINGS[sharing])
    assert list(kfac) == list(expected)
    result = []
    for name, block in expected.items():
        own = own_group(block, model.get_submodule(name), order)
        result.append(relative_error(kfac[name].to_dense(order), own))
    return result


# Case 7: positions mixed by F_n = T_mix Z_n

MIXED = {
    "Linear": (lambda: [nn.Linear(4, 2)], lambda: torch.randn(5, 4, 4)),
    "Conv1d": (
        lambda: [nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular"), tokens_last()],
        lambda: torch.randn(5, 2, 4),
    ),
    "Conv2d": (
        lambda: [nn.Conv2d(2, 2, 2), tokens_last()],
        lambda: torch.randn(5, 2, 3, 3),
    ),
    "Embedding": (lambda: [nn.Embedding(6, 2)], lambda: torch.randint(6, (5, 4))),
}
mixed = pytest.mark.parametrize("layer", MIXED)


def tokens_last():
    return To(lambda z: z.flatten(2).transpose(1, 2))


def mixing_error(layer, T_mix, sharing, loss=MSE):
    make, inputs = MIXED[layer]
    model = nn.Sequential(*make(), To(lambda z: torch.einsum("ts,nsk->nkt", T_mix, z)))
    X = inputs()
    (error,) = errors(model, (X, labels(loss, model(X).detach())), sharing, loss)
    return error


def orthogonal(T, S):
    return torch.linalg.qr(torch.randn(T, S))[0]


@mixed
def test_expand_is_exact_when_the_mixing_is_orthogonal_up_to_scale_and_only_then(layer):
    for T_mix in (torch.eye(4), 2.5 * orthogonal(4, 4), orthogonal(6, 4)):
        assert mixing_error(layer, T_mix, "expand") < 1e-10
        assert mixing_error(layer, T_mix, "reduce") > 0.1
    orthogonal_to_pool = orthogonal(4, 4), torch.randn(4, 1) * torch.ones(1, 4)
    for a in (1e-3, 0.1, 0.5, 1.0):  # however little is missing
        T_mix = (1 - a) * orthogonal_to_pool[0] + a * orthogonal_to_pool[1]
        assert mixing_error(layer, T_mix, "expand") > 0.05 * a


@mixed
def test_reduce_is_exact_when_all_positions_get_one_weight_and_only_then(layer):
    for u in (torch.full((1,), 1 / 4), torch.randn(3)):
        T_mix = u.unsqueeze(1) * torch.ones(1, 4)
        assert mixing_error(layer, T_mix, "reduce") < 1e-10
        assert mixing_error(layer, T_mix, "expand") > 0.1
    T_mix, other = torch.ones(3, 4), torch.randn(3, 4)
    for a in (1e-3, 0.1, 0.5, 1.0):
        assert mixing_error(layer, T_mix + a * other, "reduce") > 0.02 * a


@mixed
@sharings
def test_softmax_mixing_fails_both(layer, sharing):
    assert mixing_error(layer, torch.randn(4, 4).mul(2).softmax(1), sharing) > 0.1


@mixed
def test_the_exact_mixings_are_exact_for_no_other_loss(layer):
    assert mixing_error(layer, torch.ones(1, 4), "reduce", CE) > 0.001
    assert mixing_error(layer, orthogonal(4, 4), "expand", CE) > 0.001


# Case 8: a linear convolutional net with a global pool


KINDS = {
    "circular": {"padding": 1, "padding_mode": "circular"},
    "stride": {"padding": 1, "padding_mode": "circular", "stride": 2},
    "zeros": {"padding": 1},
}


def pool():
    return To(lambda z: z.flatten(2).mean(2))


@pytest.mark.parametrize("kinds", list(product(KINDS, repeat=3)), ids="-".join)
def test_reduce_is_exact_below_circular_convolutions_of_stride_one_and_only_there(kinds):
    channels = [2, 3, 2, 3]
    layers = [
        nn.Conv1d(c, d, 3, **KINDS[kind])
        for c, d, kind in zip(channels, channels[1:], kinds, strict=False)
    ]
    model, data = nn.Sequential(*layers, pool()), (torch.randn(4, 2, 8), torch.randn(4, 3))
    for i, error in enumerate(errors(model, data, "reduce")):
        # A layer's own options do not count: only what stands between it and the pool.
        if all(kind == "circular" for kind in kinds[i + 1 :]):
            assert error < 1e-10
        else:
            assert error > 0.005


@orders
def test_a_linear_convolutional_net_with_a_pool_is_exact_under_reduce(order):
    def net(activation="linear"):
        act = ACTIVATIONS[activation]
        circular = {"padding": "same", "padding_mode": "circular"}
        return nn.Sequential(
            nn.Conv2d(2, 3, 3, stride=(2, 1), padding=1, padding_mode="circular"), act(),
            nn.Conv2d(3, 4, (2, 3), dilation=(1, 2), **circular), act(),
            nn.Conv2d(4, 3, (3, 2), bias=False, **circular), act(),
            pool(), nn.Linear(3, 2),
        )  # fmt: skip

    data = torch.randn(3, 2, 6, 3), torch.randn(3, 2)
    assert max(errors(net(), data, "reduce", order=order)) < 1e-10
    assert min(errors(net(), data, "expand", order=order)[:-1]) > 0.1
    assert min(errors(net("tanh"), data, "reduce", order=order)[:-1]) > 0.01
    assert min(errors(net(), data, "reduce", flavour="empirical", order=order)) > 0.05
    confident, classes = net(), torch.tensor([0, 1, 1])
    confident[-1].weight.data *= 20
    assert min(errors(confident, (3 * data[0], classes), "reduce", CE, order=order)) > 0.005


def test_with_zero_padding_only_the_last_convolution_is_exact():
    layers = [nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)]
    model = nn.Sequential(*layers, nn.Conv2d(3, 2, 3, padding=1), pool())
    first, second, last = errors(model, (torch.randn(3, 2, 4, 4), torch.randn(3, 2)), "reduce")
    assert last < 1e-10
    assert min(first, second) > 0.005


def test_a_linear_net_behind_an_embedding_is_exact_under_reduce():
    circular = {"padding": "same", "padding_mode": "circular"}
    model = nn.Sequential(
        nn.Embedding(6, 2), To(lambda z: z.transpose(1, 2)), nn.Conv1d(2, 3, 3, **circular),
        pool(),
    )  # fmt: skip
    data = torch.randint(6, (5, 4)), torch.randn(5, 3)
    assert max(errors(model, data, "reduce")) < 1e-10
    assert min(errors(model, data, "expand")) > 0.1


# Case 9: grouped convolutions


@orders
@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_groups_are_exact_where_the_ungrouped_case_is_and_their_average_is_not(order, bias):
    circular = {"padding": 1, "padding_mode": "circular", "groups": 2}
    shuffle = To(lambda z: z.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2))
    model = nn.Sequential(
        nn.Conv1d(4, 6, 3, **circular), shuffle, nn.Conv1d(6, 4, 3, **circular), pool(),
        nn.Linear(4, 3),
    )  # fmt: skip
    data = torch.randn(4, 4, 5), torch.randn(4, 3)
    if bias == "joint":
        assert max(errors(model, data, "reduce", order=order)) < 1e-10
        assert min(errors(model, data, "expand", order=order)[:2]) > 0.1
    kfac = KFAC.compute(model, MSE, data, sharing=SHARINGS["reduce"], bias=bias)
    whole = blocks(model, MSE, data, "rvec", bias=bias)
    for key in kfac if bias == "joint" else ["0.weight", "2.weight"]:
        if key == "4":
            continue
        groups, size = kfac[key].blocks, len(whole[key]) // 2
        average = sum(K.A for K in groups) / 2, sum(K.B for K in groups) / 2
        for i, K in enumerate(groups):
            own = whole[key][i * size : (i + 1) * size, i * size : (i + 1) * size]
            own = in_order(own, K.shape[1], order)
            assert relative_error(K.to_dense(order), own) < 1e-10
            assert relative_error(dense([average], order), own) > 0.05
        assert whole[key][:size, size:].norm() > 0.01 * whole[key].norm()
    wrong = nn.Sequential(model[0], nn.Tanh(), *model[1:])
    assert errors(wrong, data, "reduce", order=order)[0] > 0.01


# Case 1: one datum and one output position


def one_position(activation):
    act = ACTIVATIONS[activation]
    return {
        "Conv1d": lambda: (
            nn.Sequential(nn.Conv1d(2, 3, 4), act(), nn.Conv1d(3, 3, 1), nn.Flatten()),
            lambda N: torch.randn(N, 2, 4),
        ),
        "Conv2d, padded": lambda: (
            nn.Sequential(
                nn.Conv2d(2, 4, 3, padding=1, padding_mode="replicate", stride=3, groups=2), act(),
                nn.Flatten(), nn.Linear(4, 3),
            ),
            lambda N: torch.randn(N, 2, 2, 3),
        ),
        "Conv3d": lambda: (
            nn.Sequential(nn.Conv3d(1, 3, (1, 2, 2)), act(), nn.Flatten(), nn.Linear(3, 3)),
            lambda N: torch.randn(N, 1, 1, 2, 2),
        ),
        "Embedding": lambda: (
            nn.Sequential(nn.Embedding(4, 3), act(), nn.Linear(3, 3)),
            lambda N: torch.arange(N) % 4,
        ),
    }  # fmt: skip


@flavours
@losses
@sharings
@pytest.mark.parametrize("layer", one_position("tanh"))
def test_one_datum_with_one_output_position_is_exact(layer, sharing, loss, flavour):
    for activation, order, bias in (
        ("tanh", "cvec", "joint"), ("relu", "rvec", "joint"),
        ("sigmoid", "rvec", "separate"),
    ):  # fmt: skip
        model, inputs = one_position(activation)[layer]()
        with torch.no_grad():  # so that no layer is all dead under ReLU
            model[0].weight.abs_()
        X = inputs(1).abs()
        data = X, labels(loss, model(X).detach())
        options = {"flavour": flavour, "order": order}
        if bias == "joint":
            found = errors(model, data, sharing, loss, **options)
        else:
            found = separate_errors(model, data, sharing, loss, **options)
        assert max(found) < 1e-10
    X = inputs(5)
    data = X, labels(loss, model(X).detach())
    assert errors(model, data, sharing, loss, **options)[0] > 0.02


def separate_errors(model, data, sharing, loss, flavour, order):
    """The errors of weight and bias, each in its own blocks, group by group."""
    fisher = FLAVOURS[flavour]
    (vectors,) = drawn(fisher, model, loss, data)
    given = vectors if is_fisher_of_draws(flavour) else None
    expected = blocks(model, loss, data, "rvec", given, "separate")
    torch.manual_seed(1)
    kfac = KFAC.compute(model, loss, data, fisher, SHARINGS[sharing], bias="separate")
    assert list(kfac) == list(expected)
    result = []
    for key, whole in expected.items():
        groups = getattr(kfac[key], "blocks", [kfac[key]])
        size = len(whole) // len(groups)
        for i, K in enumerate(groups):
            own = whole[i * size : (i + 1) * size, i * size : (i + 1) * size]
            own = in_order(own, K.shape[1], order)
            result.append(relative_error(K.to_dense(order), own))
    return result


# Case 4 and the bias under reduce


@sharings
def test_the_last_layer_is_exact_for_regression_when_it_has_one_position(sharing):
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Conv1d(3, 2, 3), nn.Flatten())
    data = torch.randn(5, 2, 4), torch.randn(5, 2)
    body, last = errors(model, data, sharing)
    assert last < 1e-10
    assert body > 0.02


@losses
def test_the_bias_block_of_a_convolution_is_always_exact_under_reduce(loss):
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2, padding=1, groups=2), nn.Tanh(), nn.Conv2d(4, 3, 2, bias=False)
    )
    X = torch.randn(3, 2, 2, 2)
    data = X, labels(loss, model(X).detach())
    whole = blocks(model, loss, data, "rvec", bias="separate")["0.bias"]
    for sharing, is_exact in (("reduce", True), ("expand", False)):
        found = KFAC.compute(model, loss, data, sharing=SHARINGS[sharing], bias="separate")
        for i, K in enumerate(found["0.bias"].blocks):
            own = whole[2 * i : 2 * i + 2, 2 * i : 2 * i + 2]
            assert (relative_error(K.to_dense("rvec"), own) < 1e-10) == is_exact


# Case 15: embeddings


@flavours
def test_an_embedding_of_one_layer_is_exact_under_expand_and_A_is_diagonal(flavour):
    X = torch.randint(6, (5, 4))
    model = nn.Sequential(nn.Embedding(6, 2), classes_first)
    data = X, torch.randn(5, 2, 4)
    for loss in (MSE, CE):
        K = KFAC.compute(model, loss, (X, labels(loss, data[1])), FLAVOURS[flavour])["0"]
        A = torch.block_diag(*K.A) if K.A.ndim == 1 else K.A
        R = 2 / 40 if loss is MSE else 1 / 20
        assert torch.allclose(A, R * torch.diag(torch.bincount(X.flatten(), minlength=6).double()))
    (error,) = errors(model, data, flavour=flavour)
    if flavour in ("type-II", "minimal", "type-I"):
        assert error < 1e-10  # with MSE every gradient has the same covariance
    if flavour == "empirical":
        assert error > 0.05


# Case 12: scale, repetition, batches


def conv_net():
    conv = nn.Conv1d(2, 4, 2, padding=1, padding_mode="circular", groups=2)
    return nn.Sequential(conv, nn.Tanh(), nn.Conv1d(4, 3, 2)), torch.randn(5, 2, 3)


def embedding_net():
    model = nn.Sequential(
        nn.Embedding(5, 2, padding_idx=0),
        To(lambda z: z.tanh() + z.mean(1, True)),
        nn.Linear(2, 3),
        classes_first,
    )
    return model, torch.randint(5, (5, 3))


deep = pytest.mark.parametrize("net", [conv_net, embedding_net])


@deep
@sharings
@pytest.mark.parametrize("base", [SquaredError, CrossEntropy])
def test_a_weight_of_the_loss_multiplies_kfac(net, sharing, base):
    class Weighted(base):
        def reduction_factor(self, denominator):
            return 0.3 * super().reduction_factor(denominator)

    loss = MSE if base is SquaredError else CE
    model, X = net()
    data = X, labels(loss, model(X).detach())
    weighted, plain = (
        KFAC.compute(model, c, data, sharing=SHARINGS[sharing]) for c in (Weighted("mean"), loss)
    )
    for name, K in plain.items():
        expected = 0.3 * K.to_dense("rvec")
        assert relative_error(weighted[name].to_dense("rvec"), expected) < 1e-10


@deep
@sharings
@pytest.mark.parametrize("kind", [nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss])
def test_the_data_twice_are_the_same_under_mean_and_doubled_under_sum(net, sharing, kind):
    model, X = net()
    y = labels(kind(), model(X).detach())
    for reduction, factor in (("mean", 1), ("sum", 2)):
        loss = kind(reduction=reduction)
        once = KFAC.compute(model, loss, (X, y), sharing=SHARINGS[sharing])
        for data in ([(X, y), (X, y)], (torch.cat([X, X]), torch.cat([y, y]))):
            twice = KFAC.compute(model, loss, data, sharing=SHARINGS[sharing])
            for name, K in once.items():
                expected = factor * K.to_dense("rvec")
                assert relative_error(twice[name].to_dense("rvec"), expected) < 1e-10


@deep
@sharings
@pytest.mark.parametrize("loss", [MSE, CE], ids=repr)
def test_batches_of_unequal_size_are_one_big_batch(net, sharing, loss):
    model, X = net()
    y = labels(loss, model(X).detach())
    (vectors,) = drawn(TypeII(), model, loss, (X, y))
    expected = factors(model, loss, (X, y), vectors, sharing)
    batches = [(X[:1], y[:1]), (X[1:3], y[1:3]), (X[3:], y[3:])]
    found = KFAC.compute(model, loss, iter(batches), sharing=SHARINGS[sharing])
    for name, pairs in expected.items():
        assert relative_error(found[name].to_dense("rvec"), dense(pairs, "rvec")) < 1e-10
    each = [KFAC.compute(model, loss, batch, sharing=SHARINGS[sharing]) for batch in batches]
    averaged = sum(kfac["0"].to_dense("rvec") for kfac in each) / 3
    assert relative_error(averaged, dense(expected["0"], "rvec")) > 0.01


@sharings
def test_ignored_labels_count_as_absent_data_and_as_zero_vectors(sharing):
    loss = nn.CrossEntropyLoss(ignore_index=1)
    model, X = embedding_net()
    y = torch.randint(2, (5, 3)) * 2
    y[0, 1] = 1
    expected = KFAC.compute(model, loss, (X, y), sharing=SHARINGS[sharing])
    padded = torch.cat([X, torch.randint(5, (2, 3))]), torch.cat([y, torch.ones(2, 3).long()])
    found = KFAC.compute(model, loss, padded, sharing=SHARINGS[sharing])
    (vectors,) = drawn(TypeII(), model, loss, (X, y))
    assert vectors[:, 0, :, 1].norm() == 0
    for name, pairs in factors(model, loss, (X, y), vectors, sharing).items():
        for kfac in (expected, found):
            assert relative_error(kfac[name].to_dense("cvec"), dense(pairs, "cvec")) < 1e-10
