"""Case 0 for every layer and option: rows and autograd give the same blocks, and the loops too."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from layer_cases import (
    FLAVOURS,
    LOSSES,
    NETS,
    SHARINGS,
    drawn,
    example,
    is_fisher_of_draws,
    labels,
)
from torch import nn
from truth import To, relative_error
from truth_layers import (
    blocks,
    dense,
    factors,
    in_order,
    layers_of,
    matrix,
    padding_of,
    patches,
)
from truth_layers import input_rows as naive_input_rows
from truth_layers import output_rows as naive_output_rows

from kfac_lib import KFAC, InputOnly, exact_blocks
from kfac_lib.layers import input_rows, output_rows

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]
few = settings(
    max_examples=25,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
orders = pytest.mark.parametrize("order", ["cvec", "rvec"])
nets = pytest.mark.parametrize("net", NETS)
flavours = pytest.mark.parametrize("flavour", FLAVOURS)
losses = pytest.mark.parametrize("loss", ["MSE", "CE sum", "BCE"])
sharings = pytest.mark.parametrize("sharing", SHARINGS)
MODES = ["zeros", "reflect", "replicate", "circular"]
CONVOLUTIONS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]


@st.composite
def convolutions(draw, axes, modes=tuple(MODES)):
    """A convolution of any options and a small input that it can take."""

    def per_axis(strategy):
        return tuple(draw(strategy) for _ in range(axes))

    torch.manual_seed(0)
    largest = 3 if axes == 1 else 2
    G, mode = draw(st.integers(1, 3 if axes == 1 else 2)), draw(st.sampled_from(modes))
    padding = draw(st.sampled_from(["int", "same", "valid"]))
    kernel, dilation = per_axis(st.integers(1, 3)), per_axis(st.integers(1, largest))
    layer = CONVOLUTIONS[axes - 1](
        G * draw(st.integers(1, 2)),
        G * draw(st.integers(1, 2)),
        kernel,
        1 if padding == "same" else per_axis(st.integers(1, largest)),
        per_axis(st.integers(0, 2)) if padding == "int" else padding,
        dilation,
        G,
        draw(st.booleans()),
        mode,
    )
    sizes = []
    for axis, (before, behind) in enumerate(padding_of(layer)):
        needed = dilation[axis] * (kernel[axis] - 1) + 1 - before - behind
        most = max(before, behind)  # torch pads by no more than the axis holds
        least = {"reflect": most + 1, "circular": most}.get(mode, 1)
        sizes.append(max(1, needed, least) + draw(st.integers(0, 1)))
    x = torch.randn(draw(st.integers(1, 3)), layer.in_channels, *sizes)
    assume(layer(x)[0, 0].numel() <= 40)
    return layer, x


def behind(layer, X):
    """A net that mixes all that the layer gives, with two entries a datum."""
    z = layer(X)
    M = torch.randn(z[0].numel(), 2)
    return nn.Sequential(layer, To(lambda z: z.flatten(1).sin() @ M))


def both_orders_are_right(layer, X):
    loss, model = nn.MSELoss(), behind(layer, X)
    data = X, torch.randn(len(X), 2)
    for order in ("cvec", "rvec"):
        expected = blocks(model, loss, data, order)
        found = exact_blocks(model, loss, data, order=order)
        assert list(found) == ["0"]
        assert relative_error(found["0"], expected["0"]) < 1e-10
    # A control: the same block with the columns of one row moved on by one.
    wrong = matrix(layer, layer.weight)
    if wrong.shape[1] > 1:
        moved = expected["0"].roll(1, 0).roll(1, 1)
        assert relative_error(found["0"], moved) > 1e-3


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_blocks_of_a_convolution_with_any_options_are_those_of_autograd(axes):
    @few
    @given(convolutions(axes))
    def check(case):
        both_orders_are_right(*case)

    check()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_rows_of_a_convolution_are_the_patches_of_the_loops(axes, mode):
    @few
    @given(convolutions(axes, [mode]))
    def check(case):
        layer, x = case
        expected, z = patches(layer, x), layer(x).detach()
        assert torch.equal(input_rows(layer, x), expected)
        groups = expected.chunk(layer.groups, -1), layer.weight.flatten(1).chunk(layer.groups)
        again = torch.cat([rows @ W.T for rows, W in zip(*groups, strict=True)], -1)
        again = again + (0 if layer.bias is None else layer.bias)
        assert torch.allclose(again, naive_output_rows(layer, z), atol=1e-12)
        g = torch.randn(2, *z.shape)
        assert torch.equal(
            output_rows(layer, g), torch.stack([naive_output_rows(layer, v) for v in g])
        )

    check()


def test_every_padding_mode_has_rows_of_its_own():
    x, found = torch.randn(2, 2, 4, 4), []
    for mode in MODES:
        layer = nn.Conv2d(2, 1, 3, padding=1, padding_mode=mode)
        found.append(input_rows(layer, x))
        assert torch.equal(found[-1], patches(layer, x))
    for i, first in enumerate(found):
        for second in found[:i]:
            assert relative_error(first, second) > 0.1


@st.composite
def embeddings(draw):
    torch.manual_seed(draw(st.integers(0, 9)))
    tokens = draw(st.integers(1, 5))
    padding_idx = draw(st.sampled_from([None, 0, -1]))
    layer = nn.Embedding(tokens, draw(st.integers(1, 3)), padding_idx)
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    x = torch.randint(tokens, shape)
    assume(padding_idx is None or bool((x != layer.padding_idx).any()))
    return layer, x


@few
@given(embeddings())
def test_blocks_of_an_embedding_are_those_of_autograd(case):
    layer, X = case
    loss, model = nn.MSELoss(), behind(layer, X)
    for order in ("cvec", "rvec"):
        data = X, torch.zeros(len(X), 2)
        expected, found = (
            blocks(model, loss, data, order)["0"],
            exact_blocks(model, loss, data, order=order)["0"],
        )
        assert relative_error(found, expected) < 1e-10


@st.composite
def shared_linears(draw):
    torch.manual_seed(0)
    layer = nn.Linear(draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.booleans()))
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    return layer, torch.randn(*shape, layer.in_features)


@few
@given(shared_linears())
def test_blocks_of_a_linear_layer_on_any_shared_axes_are_those_of_autograd(case):
    both_orders_are_right(*case)


def expected_blocks(model, loss, data, flavour, order):
    (vectors,) = drawn(FLAVOURS[flavour], model, loss, data)
    return blocks(model, loss, data, order, vectors if is_fisher_of_draws(flavour) else None)


@nets
@flavours
@pytest.mark.parametrize("loss", LOSSES)
def test_blocks_of_every_layer_flavour_and_loss_are_those_of_autograd(net, flavour, loss):
    loss = LOSSES[loss]
    for N, order in ((1, "rvec"), (3, "cvec")):
        model, data = example(net, loss, N)
        expected = expected_blocks(model, loss, data, flavour, order)
        found = exact_blocks(model, loss, data, FLAVOURS[flavour], order=order)
        assert list(found) == list(expected)
        for name in expected:
            assert relative_error(found[name], expected[name]) < 1e-10
    kfac = KFAC.compute(model, loss, data, FLAVOURS[flavour])
    assert relative_error(kfac["0"].to_dense(order), expected["0"]) > 0.02


@nets
@flavours
@losses
@sharings
def test_kfac_of_every_layer_is_that_of_the_table(net, flavour, loss, sharing):
    loss, fisher = LOSSES[loss], FLAVOURS[flavour]
    model, data = example(net, loss, 3)
    (vectors,) = drawn(fisher, model, loss, data)
    expected = factors(model, loss, data, vectors, sharing)
    found = KFAC.compute(model, loss, data, fisher, SHARINGS[sharing])
    assert list(found) == list(expected)
    for name, pairs in expected.items():
        assert relative_error(found[name].to_dense("rvec"), dense(pairs, "rvec")) < 1e-10
    other = "reduce" if sharing == "expand" else "expand"
    other = factors(model, loss, data, vectors, other)["0"]
    assert relative_error(found["0"].to_dense("rvec"), dense(other, "rvec")) > 0.05


@nets
@orders
@sharings
def test_kfac_with_separate_bias_is_that_of_the_table(net, order, sharing):
    loss = nn.CrossEntropyLoss()
    model, data = example(net, loss, 3)
    (vectors,) = drawn(FLAVOURS["type-II"], model, loss, data)
    expected = factors(model, loss, data, vectors, sharing, "separate")
    found = KFAC.compute(model, loss, data, sharing=SHARINGS[sharing], bias="separate")
    assert list(found) == list(expected)
    for name, pairs in expected.items():
        assert relative_error(found[name].to_dense(order), dense(pairs, order)) < 1e-10


@nets
@sharings
def test_input_only_has_the_A_of_the_table_and_the_identity_as_B(net, sharing):
    loss = nn.MSELoss()
    model, data = example(net, loss, 3)
    (vectors,) = drawn(FLAVOURS["empirical"], model, loss, data)
    found = KFAC.compute(model, loss, data, InputOnly(), SHARINGS[sharing])
    for name, pairs in factors(model, loss, data, vectors, sharing).items():
        expected = dense([(A, torch.eye(len(B))) for A, B in pairs], "cvec")
        assert relative_error(found[name].to_dense("cvec"), expected) < 1e-10


@nets
@sharings
def test_batches_and_chunks_change_nothing(net, sharing):
    loss = nn.CrossEntropyLoss()
    model, (X, y) = example(net, loss, 4)
    (vectors,) = drawn(FLAVOURS["type-II"], model, loss, (X, y))
    expected = factors(model, loss, (X, y), vectors, sharing)
    whole = blocks(model, loss, (X, y), "rvec")
    batches = [(X[:1], y[:1]), (X[1:], y[1:])]
    for chunk_size in (None, 1, 2):
        found = KFAC.compute(model, loss, batches, sharing=SHARINGS[sharing], chunk_size=chunk_size)
        exact = exact_blocks(model, loss, batches, order="rvec", chunk_size=chunk_size)
        for name, pairs in expected.items():
            assert relative_error(found[name].to_dense("rvec"), dense(pairs, "rvec")) < 1e-10
            assert relative_error(exact[name], whole[name]) < 1e-10


@pytest.mark.parametrize("changed", ["memory format", "int options", "options", "circular", "view"])
def test_what_counts_is_what_the_forward_does(changed):
    mode = "circular" if changed == "circular" else "zeros"
    layer, X = nn.Conv2d(2, 2, 2, padding=1, padding_mode=mode), torch.randn(2, 2, 3, 4)
    if changed == "memory format":
        X = X.to(memory_format=torch.channels_last)
        layer = layer.to(memory_format=torch.channels_last)
    elif changed == "int options":
        layer.stride, layer.padding, layer.dilation = 2, 2, 1
    elif changed == "view":
        X = torch.randn(4, 3, 2, 4).permute(0, 2, 1, 3)[::2]
    else:
        layer.stride, layer.padding, layer.dilation = (2, 1), (2, 0), (1, 2)
    both_orders_are_right(layer, X)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tokens_of_any_integer_dtype(dtype):
    loss = nn.MSELoss()
    model, (X, y) = example("embedding", loss, 3)
    expected = blocks(model, loss, (X, y), "cvec")
    found = exact_blocks(model, loss, (X.to(dtype), y), order="cvec")
    for name in expected:
        assert relative_error(found[name], expected[name]) < 1e-10


# Grouped convolutions


@sharings
@pytest.mark.parametrize("G", [2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_a_grouped_convolution_has_one_pair_for_each_group(sharing, G, bias):
    loss = nn.MSELoss()
    model = nn.Sequential(nn.Conv2d(2 * G, 2 * G, (1, 2), groups=G, bias=bias), mixed_channels())
    X = torch.randn(3, 2 * G, 2, 3)
    data = X, torch.randn(3, 2)
    (vectors,) = drawn(FLAVOURS["type-II"], model, loss, data)
    expected = factors(model, loss, data, vectors, sharing)["0"]
    found = KFAC.compute(model, loss, data, sharing=SHARINGS[sharing])
    assert list(found) == ["0"]
    assert len(found["0"].blocks) == G == len(expected)
    for K, (A, B) in zip(found["0"].blocks, expected, strict=True):
        assert K.shape == (2, 4 + bias)
        assert relative_error(K.A, A) < 1e-10
        assert relative_error(K.B, B) < 1e-10
    # rvec: the blocks one after another; cvec: the same with all rows of a column together.
    rvec, cvec = (found["0"].to_dense(order) for order in ("rvec", "cvec"))
    assert relative_error(rvec, dense(expected, "rvec")) < 1e-10
    D = 4 + bias
    for o, i, p, j in [(0, 0, 1, 2), (1, 3, 0, 0), (2, 1, 3, 2), (0, 1, 2, 1)]:
        assert torch.equal(cvec[i * 2 * G + o, j * 2 * G + p], rvec[o * D + i, p * D + j])
        if o // 2 != p // 2:
            assert rvec[o * D + i, p * D + j] == 0


def mixed_channels():
    return To(lambda z: z.flatten(2).sin().mean(2).cumsum(1)[:, -2:])


@orders
@sharings
def test_a_grouped_convolution_acts_on_the_whole_weight(order, sharing):
    loss = nn.MSELoss()
    model = nn.Sequential(nn.Conv1d(4, 6, 2, groups=2), mixed_channels())
    data = torch.randn(5, 4, 3), torch.randn(5, 2)
    K = KFAC.compute(model, loss, data, sharing=SHARINGS[sharing])["0"]
    matrix, U = K.to_dense(order), torch.randn(6, 5)
    assert tuple(K.shape) == (6, 5)
    flat = U.T.flatten() if order == "cvec" else U.flatten()
    expected = matrix @ flat
    found = (K @ U).T.flatten() if order == "cvec" else (K @ U).flatten()
    assert relative_error(found, expected) < 1e-12
    assert relative_error(K.trace(), matrix.trace()) < 1e-12
    assert relative_error(K.norm(), torch.linalg.matrix_norm(matrix)) < 1e-12


@orders
def test_a_depthwise_convolution_has_a_factor_for_each_channel(order):
    loss = nn.MSELoss()
    model = nn.Sequential(nn.Conv1d(3, 3, 2, groups=3, bias=False), mixed_channels())
    data = torch.randn(4, 3, 4), torch.randn(4, 2)
    found = KFAC.compute(model, loss, data)["0"]
    assert [K.shape for K in found.blocks] == [(1, 2)] * 3
    (vectors,) = drawn(FLAVOURS["type-II"], model, loss, data)
    expected = dense(factors(model, loss, data, vectors, "expand")["0"], order)
    assert relative_error(found.to_dense(order), expected) < 1e-10
    whole = exact_blocks(model, loss, data, order=order)["0"]
    assert relative_error(whole, blocks(model, loss, data, order)["0"]) < 1e-10
    off_diagonal = in_order(torch.block_diag(*[torch.ones(2, 2)] * 3), 2, order) == 0
    assert found.to_dense(order)[off_diagonal].norm() == 0
    assert whole[off_diagonal].norm() > 0.01 * whole.norm()


# Embeddings


def counts(X, tokens, padding_idx=None):
    """How often each token stands in each datum."""
    result = torch.zeros(len(X), tokens)
    for n, datum in enumerate(X):
        for token in datum.flatten().tolist():
            if token != padding_idx:
                result[n, token] += 1
    return result


@pytest.mark.parametrize("padding_idx", [None, 1])
def test_A_of_an_embedding_counts_tokens_and_is_diagonal_under_expand(padding_idx):
    loss = nn.MSELoss()
    model = nn.Sequential(nn.Embedding(5, 2, padding_idx), nn.Flatten(), nn.Linear(6, 3))
    X = torch.tensor([[1, 1, 3], [0, 3, 3], [1, 2, 0]])
    data, R = (X, torch.randn(3, 3)), 2 / 9
    n = counts(X, 5, padding_idx)
    expand = KFAC.compute(model, loss, data)["0"]
    assert expand.A.shape == (5,)  # kept as its diagonal
    assert torch.allclose(expand.A, R * n.sum(0))
    assert expand.shape == (2, 5)
    reduce = KFAC.compute(model, loss, data, sharing=SHARINGS["reduce"])["0"]
    assert torch.allclose(reduce.A, R * n.T @ n)
    assert reduce.A[0, 3] > 0
    # B and its counts are over every position, padding too.
    (vectors,) = drawn(FLAVOURS["type-II"], model, loss, data)
    for K, sharing in ((expand, "expand"), (reduce, "reduce")):
        (pair,) = factors(model, loss, data, vectors, sharing)["0"]
        assert relative_error(K.B, pair[1]) < 1e-10


def test_a_diagonal_A_gives_the_same_algebra_as_the_full_matrix():
    loss = nn.CrossEntropyLoss()
    model, data = example("embedding", loss, 6)
    model[0].padding_idx = None
    K = KFAC.compute(model, loss, data)["0"]
    D = K.to_dense("rvec")
    U = torch.randn(K.shape)
    assert relative_error(D, torch.kron(K.B, torch.diag(K.A))) < 1e-14
    assert relative_error((K @ U).flatten(), D @ U.flatten()) < 1e-12
    assert relative_error(K.trace(), D.trace()) < 1e-12
    assert relative_error(K.norm(), torch.linalg.matrix_norm(D)) < 1e-12
    assert relative_error(K.eigh().to_dense("rvec"), D) < 1e-12
    assert relative_error((K * 2.5).to_dense("rvec"), 2.5 * D) < 1e-12
    if (K.A > 0).all():
        assert relative_error(K.logdet(), torch.linalg.slogdet(D)[1]) < 1e-10
        assert relative_error(K.inverse().to_dense("rvec"), torch.linalg.inv(D)) < 1e-8


def test_a_token_in_the_padding_place_is_as_if_it_were_not_there():
    loss, net = nn.MSELoss(), nn.Embedding(5, 2, padding_idx=2)
    model = nn.Sequential(net, To(lambda z: z.sin().sum(1)))
    X, y = torch.tensor([[0, 2, 4], [2, 2, 1]]), torch.randn(2, 2)
    block = exact_blocks(model, loss, (X, y), order="cvec")["0"]
    assert block[4:6].norm() == 0
    assert block[:, 4:6].norm() == 0
    net.padding_idx = None
    assert exact_blocks(model, loss, (X, y), order="cvec")["0"][4:6].norm() > 0.1


@pytest.mark.parametrize("shape", [(), (2,), (2, 2)], ids=["S=1", "S=2", "S=2x2"])
def test_rows_of_an_embedding_are_one_hot_in_any_number_of_axes(shape):
    loss, model = nn.MSELoss(), nn.Sequential(nn.Embedding(4, 2), To(lambda z: z.flatten(1)))
    X = torch.randint(4, (3, *shape))
    y = labels(loss, model(X).detach())
    rows = naive_input_rows(model[0], X)
    assert rows.sum(-1).eq(1).all()
    K = KFAC.compute(model, loss, (X, y), sharing=SHARINGS["reduce"])["0"]
    A = torch.einsum("ni,nj->ij", rows.sum(1), rows.sum(1)) * 2 / y.numel()
    assert relative_error(K.A if K.A.ndim == 2 else K.A.diag(), A) < 1e-12


def test_layers_keep_the_models_order_and_their_names():
    loss = nn.MSELoss()
    model, data = example("embedding and conv", loss, 2)
    assert list(KFAC.compute(model, loss, data)) == list(layers_of(model)) == ["0", "2"]
    assert list(KFAC.compute(model, loss, data, bias="separate")) == [
        "0.weight",
        "2.weight",
        "2.bias",
    ]
    root = nn.Conv1d(2, 3, 2)
    data = torch.randn(2, 2, 3), torch.randn(2, 3, 2)
    assert list(KFAC.compute(root, loss, data)) == [""]
    assert list(KFAC.compute(root, loss, data, bias="separate")) == ["weight", "bias"]
