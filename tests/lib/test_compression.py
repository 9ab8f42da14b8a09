"""Fewer vectors behind narrow places, against loops over all vectors by plain autograd.

The nets have 34 outputs and more, so that their vectors are compressed; each is a case that the
division of the net could get wrong.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layer_cases import all_vectors
from torch import nn
from torch.autograd.graph import get_gradient_edge
from truth import Net, To, labels, mlp, reduction_factor, relative_error
from truth_layers import blocks, factors, keys, layers_of, rows

from kfac_lib import (
    EKFAC,
    KFAC,
    MonteCarlo,
    RandomSigns,
    Reduce,
    TypeI,
    TypeII,
    exact_blocks,
    losses,
)
from kfac_lib import compression as under_test
from kfac_lib.capture import Hooks
from kfac_lib.compression import closed_head, root_of, sections
from kfac_lib.coverage import cover
from kfac_lib.curvature import ggn_blocks
from kfac_lib.losses import criterion_of

pytestmark = pytest.mark.usefixtures("float64")
some = settings(
    max_examples=20,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
MSE, CE, BCE = nn.MSELoss(), nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()
C = 34

# ------------------------------------------------------------------------------------------ roots


@st.composite
def matrices(draw):
    """A batch of positive semi-definite matrices of any rank, some of them zero."""
    N, D = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    torch.manual_seed(draw(st.integers(0, 999)))
    ranks = [draw(st.integers(0, D)) for _ in range(N)]
    each = [factor @ factor.T for factor in (torch.randn(D, rank) for rank in ranks)]
    return torch.stack(each) * 10.0 ** draw(st.integers(-6, 6))


def is_root(M, tolerance=1e-12):
    root = root_of(M)
    assert root.shape == M.shape
    assert root.dtype == M.dtype
    for R, one in zip(root, M, strict=True):
        assert (R @ R.T - one).norm() <= tolerance * one.norm()
    return True


@some
@given(M=matrices())
def test_a_root_is_one_whatever_the_ranks_of_the_batch(M):
    before = M.clone()
    is_root(M)
    is_root(M.float(), 1e-5)
    assert torch.equal(M, before)


@some
@given(M=matrices(), N=st.integers(2, 6))
def test_of_one_matrix_for_all_there_is_one_root(M, N):
    expanded = M[:1].expand(N, -1, -1)
    assert is_root(expanded)
    assert root_of(expanded).stride(0) == 0


def test_zero_matrices_have_roots_of_zero_alone_and_among_others():
    M = torch.stack([torch.zeros(4, 4), torch.eye(4), torch.zeros(4, 4), torch.ones(4, 4)])
    assert is_root(M)
    assert root_of(M)[0].norm() == 0
    assert root_of(M[:1]).norm() == 0


def test_a_root_of_low_precision_has_its_type_and_is_found_in_float32():
    M = torch.stack([torch.eye(3), torch.ones(3, 3)]).bfloat16()
    root = root_of(M)
    assert root.dtype == torch.bfloat16
    assert relative_error((root @ root.mT).float(), M.float()) < 1e-2


# ------------------------------------------------------------------------------------------- nets


def lin(*sizes):
    return nn.Linear(*sizes)


def dead_units():
    """Units of ReLU that are off for all data, some in each layer."""
    net = mlp(4, 6, 5, C, activation="relu")
    with torch.no_grad():
        net[0].bias[:2] = -100
        net[2].bias[0] = -100
        net[2].bias[1] += 2
    return net


def residual():
    """No place inside of the branch divides the net."""
    return Net(
        lambda m, x: m.head((z := m.a(x)) + m.c(m.b(z).tanh())),
        a=lin(4, 7), b=lin(7, 2), c=lin(2, 7), head=lin(7, C),
    )  # fmt: skip


def around_the_heads_input():
    """What the head reads is narrow, but there is another way to the prediction."""
    return Net(
        lambda m, x: m.head(m.b(z := m.a(x).tanh()).tanh()) + m.skip(z),
        a=lin(4, 6), b=lin(6, 3), head=lin(3, C), skip=lin(6, C),
    )  # fmt: skip


def around_two_layers():
    """A wide layer that lies in front of a narrow place on one way, and behind it on another."""
    return Net(
        lambda m, x: m.head(m.c(m.b(z := m.a(x).tanh()).tanh()).tanh()) + m.skip(z),
        a=lin(4, 20), b=lin(20, 3), c=lin(3, 5), head=lin(5, C), skip=lin(20, C),
    )  # fmt: skip


def plain_skip():
    """A way around the head without any layer on it."""
    return Net(
        lambda m, x: torch.cat([m.head(z := m.body(x).tanh()), z, z.sin()], 1),
        body=lin(4, 3), head=lin(3, C - 6),
    )  # fmt: skip


def input_skips_all():
    return Net(
        lambda m, x: m.head(m.body(x).tanh()) + m.x(x), body=lin(4, 3), head=lin(3, C), x=lin(4, C)
    )


def two_halves():
    """Each layer reads one half of what another gives: one place in the graph, two outputs."""

    def run(m, x):
        one, other = m.a(x).tanh().chunk(2, 1)
        return m.b(one).sin() + m.c(other) ** 2

    return Net(run, a=lin(4, 6), b=lin(3, C), c=lin(3, C))


def half_alone():
    """The head reads half of what another layer gives; the other half goes around it."""

    def run(m, x):
        one, other = m.a(x).tanh().chunk(2, 1)
        return m.head(one) + other.sum(1, keepdim=True)

    return Net(run, a=lin(4, 6), head=lin(3, C))


def head_twice():
    return Net(
        lambda m, x: m.head(m.head(m.body(x).tanh())[:, :5].sin()), body=lin(4, 5), head=lin(5, C)
    )


def only_the_head_twice():
    return Net(lambda m, x: m.head(m.head(x)[:, :4].sin()), head=lin(4, C))


def on_both_sides_of_a_narrow_place():
    """A layer that is called in front of the only narrow place and behind it."""
    return Net(
        lambda m, x: m.body(m.up(m.down(m.body(x).tanh()).sin()).tanh()),
        body=lin(C, C), down=lin(C, 3), up=lin(3, C),
    )  # fmt: skip


def body_twice():
    return Net(
        lambda m, x: m.head(m.body(m.between(m.body(x).tanh()).sin()).tanh()),
        body=lin(4, 4), between=lin(4, 4), head=lin(4, C),
    )  # fmt: skip


def tied():
    """Two modules with the head's weight."""
    net = Net(
        lambda m, x: m.head(m.body(m.early(x)[:, :9].sin()).tanh()),
        early=nn.Linear(4, C, bias=False), body=lin(9, 4), head=nn.Linear(4, C, bias=False),
    )  # fmt: skip
    net.head.weight = net.early.weight
    return net


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(2, 4, 2), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, C),
    )  # fmt: skip


def frozen_head():
    net = mlp(4, 7, 5, C)
    net[4].requires_grad_(False)
    return net


def frozen_before_the_head():
    net = mlp(4, 7, 5, C)
    net[2].requires_grad_(False)
    return net


def only_the_head_is_trainable():
    net = mlp(4, 7, 5, C)
    net[0].requires_grad_(False)
    net[2].requires_grad_(False)
    return net


def then(function, *sizes):
    return lambda: nn.Sequential(*mlp(*sizes), To(function))


def positions():
    """Predictions (N, 12, 3): 36 vectors; the last layer is narrow for each datum as a whole."""
    return nn.Sequential(
        lin(4, 6), nn.Tanh(), To(lambda z: z.reshape(len(z), 3, 2)), lin(2, 12),
        To(lambda z: z.movedim(-1, 1)),
    )  # fmt: skip


def mixed_positions():
    return nn.Sequential(
        lin(4, 2), To(lambda z: z + z.roll(1, 1).sin() + z.mean(1, keepdim=True) ** 2), lin(2, 12),
        To(lambda z: z.movedim(-1, 1)),
    )  # fmt: skip


def merged_tokens():
    """A layer that reads the tokens of all data as one long batch."""

    def run(m, x):
        z = m.a(x).tanh()
        z = z + z.roll(1, 1).sin()
        return m.c(m.b(z.flatten(0, 1)).tanh()).reshape(len(x), -1)

    return Net(run, a=lin(4, 3), b=lin(3, 3), c=lin(3, 12))


def views(m, x):
    """The prediction of the head in another order of its entries."""
    return m.head(m.body(x).tanh()).reshape(len(x), 2, -1).transpose(1, 2).reshape(len(x), -1)


def vector(N):
    return torch.randn(N, 4)


NETS = {
    "narrow head": (lambda: mlp(4, 9, 6, C), vector),
    "narrow head without bias": (lambda: mlp(4, 6, C, bias=False), vector),
    "narrow in the middle": (lambda: mlp(4, 20, 3, 20, C), vector),
    "bottleneck autoencoder": (lambda: mlp(C, 12, 3, 12, C), lambda N: torch.randn(N, C)),
    "narrow nowhere": (lambda: mlp(C + 1, C + 2, C + 1, C), lambda N: torch.randn(N, C + 1)),
    "as wide as the prediction": (lambda: mlp(4, C, C), vector),
    "one unit": (lambda: mlp(4, 1, 5, C), vector),
    "one layer": (lambda: lin(4, C), vector),
    "one layer in a sequence": (lambda: mlp(4, C), vector),
    "dead units": (dead_units, vector),
    "residual": (residual, vector),
    "around the head's input": (around_the_heads_input, vector),
    "around two layers": (around_two_layers, vector),
    "plain skip": (plain_skip, vector),
    "input skips all": (input_skips_all, vector),
    "two halves": (two_halves, vector),
    "half alone": (half_alone, vector),
    "head twice": (head_twice, vector),
    "only the head, twice": (only_the_head_twice, vector),
    "on both sides": (on_both_sides_of_a_narrow_place, lambda N: torch.randn(N, C)),
    "body twice": (body_twice, vector),
    "convolutional": (convolutional, lambda N: torch.randn(N, 1, 4, 4)),
    "scaled": (then(lambda f: 3 * f, 4, 6, 5, C), vector),
    "shifted": (then(lambda f: f + 1, 4, 6, 5, C), vector),
    "shifted by its mean": (then(lambda f: f - f.mean(1, keepdim=True), 4, 6, 5, C), vector),
    "activated": (then(torch.tanh, 4, 6, 5, C), vector),
    "part of what the head gives": (then(lambda f: f[:, :C], 4, 6, 5, C + 4), vector),
    "in another order": (lambda: Net(views, body=lin(4, 5), head=lin(5, C)), vector),
    "positions": (positions, vector),
    "mixed positions": (mixed_positions, lambda N: torch.randn(N, 3, 4)),
    "tokens": (
        lambda: nn.Sequential(
            nn.Embedding(6, 5, padding_idx=1), To(lambda z: z.mean(1).tanh()), lin(5, C)
        ),
        lambda N: torch.randint(6, (N, 3)),
    ),
}
FROZEN = {
    "frozen head": frozen_head,
    "frozen before the head": frozen_before_the_head,
    "only the head is trainable": only_the_head_is_trainable,
}
nets = pytest.mark.parametrize("net", NETS)


def example(net, loss, N=4):
    make, inputs = NETS[net]
    model, X = make(), inputs(N)
    return model, (X, labels(loss, model(X).detach()))


def same_factors(found, expected, tolerance=1e-12, names=None):
    """A and B are those of the loops; of the layers found, if names says so."""
    assert set(found) == set(expected if names is None else names)
    for key in found:
        (pair,) = expected[key]
        for one, other in zip((found[key].A, found[key].B), pair, strict=True):
            one = one.diag() if one.ndim == 1 else one  # of an Embedding
            if other.norm() == 0:
                assert one.norm() == 0
            else:
                assert relative_error(one, other) < tolerance, key
    return True


def same_eigenvalues(found, model, loss, data, vectors, sharing="expand", bias="joint", names=None):
    """Of a basis that makes the table's factors diagonal, E is what the sum over rows gives."""
    X, y = data
    R = reduction_factor(loss, model(X).detach(), y)
    pairs = factors(model, loss, data, vectors, sharing, bias)
    assert set(found) == set(pairs if names is None else names)
    for name, groups in rows(model, X, vectors).items():
        for key, columns in keys(name, layers_of(model)[name], bias).items():
            if key not in found:
                continue
            ((x, g),), ((A, B),), E = groups, pairs[key], found[key]
            Q_A = torch.eye(len(A)) if E.Q_A is None else E.Q_A
            for factor, Q in ((A, Q_A), (B, E.Q_B)):
                assert torch.allclose(Q.T @ Q, torch.eye(len(Q)), atol=1e-10)
                rotated = Q.T @ factor @ Q
                off = rotated - torch.diag(rotated.diagonal())
                assert off.norm() <= 1e-10 * factor.norm()
            P = torch.einsum("vnso,nsi->vnoi", g, x[..., columns])
            values = R * torch.einsum("op,vnoi,ij->vnpj", E.Q_B, P, Q_A).square().sum((0, 1))
            Q = torch.kron(E.Q_B, Q_A)
            expected = Q @ torch.diag(values.flatten()) @ Q.T
            if expected.norm() > 0:
                assert relative_error(E.to_dense("rvec"), expected) < 1e-12, key
    return True


# --------------------------------------------------------------------------- all results, all nets


@nets
@pytest.mark.parametrize("loss", [MSE, CE, BCE], ids=["MSE", "CE", "BCE"])
def test_factors_are_those_of_all_vectors(net, loss):
    model, data = example(net, loss)
    vectors = all_vectors(TypeII(), model, loss, data)
    for bias in ("joint", "separate"):
        expected = factors(model, loss, data, vectors, "expand", bias)
        same_factors(KFAC.compute(model, loss, data, bias=bias), expected)


@nets
def test_reduced_factors_are_those_of_all_vectors(net):
    model, data = example(net, CE)
    vectors = all_vectors(TypeII(), model, CE, data)
    expected = factors(model, CE, data, vectors, "reduce")
    same_factors(KFAC.compute(model, CE, data, sharing=Reduce()), expected)


@nets
def test_traced_factors_are_those_of_all_vectors(net):
    model, data = example(net, CE)
    params = dict(model.named_parameters())
    expected = factors(model, CE, data, all_vectors(TypeII(), model, CE, data), "expand")
    same_factors(KFAC.compute(model, CE, data, params=params), expected)


def test_a_traced_function_of_merged_tokens_has_the_factors_of_all_vectors():
    model, X = merged_tokens(), torch.randn(4, 3, 4)
    data = X, torch.randint(36, (4,))
    params = dict(model.named_parameters())
    vectors, f, taken = all_vectors(TypeII(), model, CE, data), None, {}
    for name in ("a", "b", "c"):
        layer = getattr(model, name)
        layer.register_forward_hook(lambda m, args, z, name=name: taken.update({name: z}))
    f = model(X)
    outputs = [taken[name] for name in ("a", "b", "c")]
    g = [torch.autograd.grad(f, outputs, v, retain_graph=True) for v in vectors]
    traced = merged_tokens()
    for sharing in ("expand", "reduce"):
        kwargs = {"sharing": Reduce()} if sharing == "reduce" else {}
        found = KFAC.compute(traced, CE, data, params=params, **kwargs)
        for name, of_layer in zip(("a", "b", "c"), zip(*g, strict=True), strict=True):
            tokens = torch.stack(of_layer).reshape(len(vectors), 4, 3, -1)
            if sharing == "reduce":
                tokens = tokens.sum(2, keepdim=True)
            divisor = 4 * (9 if sharing == "reduce" else 3)
            B = torch.einsum("vnso,vnsp->op", tokens, tokens) / divisor
            assert relative_error(found[name].B, B) < 1e-12, (name, sharing)


@nets
@pytest.mark.parametrize("loss", [MSE, CE], ids=["MSE", "CE"])
def test_eigenvalues_are_those_of_all_vectors(net, loss):
    model, data = example(net, loss, N=3)
    vectors = all_vectors(TypeII(), model, loss, data)
    for bias in ("joint", "separate"):
        found = EKFAC.compute(model, loss, data, bias=bias)
        same_eigenvalues(found, model, loss, data, vectors, bias=bias)


@nets
@pytest.mark.parametrize("loss", [MSE, CE], ids=["MSE", "CE"])
def test_exact_blocks_are_the_dense_gauss_newton_blocks(net, loss):
    wide = "narrow nowhere", "as wide as the prediction", "bottleneck autoencoder", "on both sides"
    if net in wide:
        pytest.skip("the dense blocks are large")
    model, data = example(net, loss, N=2)
    # An Embedding's weight is transposed in the library.
    expected = (blocks if net == "tokens" else ggn_blocks)(model, loss, data, order="rvec")
    found = exact_blocks(model, loss, data, order="rvec")
    assert set(found) == set(expected)
    for name in expected:
        assert relative_error(found[name], expected[name]) < 1e-12, name


@pytest.mark.parametrize("loss", [MSE, CE, BCE], ids=["MSE", "CE", "BCE"])
def test_exact_blocks_of_a_bottleneck_are_the_dense_ones(loss):
    model, X = mlp(33, 4, 2, 4, 33), torch.randn(2, 33)
    data = X, labels(loss, model(X).detach())
    expected = ggn_blocks(model, loss, data, order="cvec")
    found = exact_blocks(model, loss, data, order="cvec")
    for name in expected:
        assert relative_error(found[name], expected[name]) < 1e-12


def test_a_prediction_that_is_scaled_in_place_is_one_that_is_scaled():
    model, X = mlp(4, 6, 5, C), torch.randn(3, 4)
    data = X, torch.randint(C, (3,))
    scaled = nn.Sequential(*model, To(lambda f: 2 * f))
    in_place = nn.Sequential(*model, To(lambda f: f.mul_(2)))
    expected = factors(scaled, CE, data, all_vectors(TypeII(), scaled, CE, data), "expand")
    same_factors(KFAC.compute(in_place, CE, data), expected)
    same_factors(
        KFAC.compute(in_place, CE, data, params=dict(in_place.named_parameters())), expected
    )
    assert closed_head(*run(in_place, X)) is None


@pytest.mark.parametrize("classes", [31, 40])
def test_a_criterion_with_a_root_of_its_own_keeps_it(classes):
    class Tripled(losses.SquaredError):
        def hessian_root(self, f, y, columns="full"):
            return 3 * super().hessian_root(f, y, columns)

        def hessian_root_product(self, f, y, u):
            return 3 * super().hessian_root_product(f, y, u)

    model, X = lin(4, classes), torch.randn(3, 4)
    B = KFAC.compute(model, Tripled("mean"), (X, torch.randn(3, classes)))[""].B
    assert relative_error(B, 9 * torch.eye(classes)) < 1e-12


def test_a_weight_that_two_modules_hold_is_one_layer():
    model, X = tied(), torch.randn(3, 4)
    data = X, torch.randint(C, (3,))
    expected = factors(model, CE, data, all_vectors(TypeII(), model, CE, data), "expand")
    same_factors(KFAC.compute(model, CE, data), expected)
    same_factors(KFAC.compute(model, CE, data, params=dict(model.named_parameters())), expected)


@pytest.mark.parametrize("net", FROZEN)
@pytest.mark.parametrize("traced", [False, True], ids=["hooks", "traced"])
def test_frozen_layers_are_passed_through(net, traced):
    model, X = FROZEN[net](), torch.randn(4, 4)
    data = X, torch.randint(C, (4,))
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    names = {name.rpartition(".")[0] for name in trainable}
    options = {"params": dict(model.named_parameters())} if traced else {}
    found = KFAC.compute(model, CE, data, **options)
    eigen = EKFAC.compute(model, CE, data, **options)
    model.requires_grad_(True)
    vectors = all_vectors(TypeII(), model, CE, data)
    same_factors(found, factors(model, CE, data, vectors, "expand"), names=names)
    same_eigenvalues(eigen, model, CE, data, vectors, names=names)


@pytest.mark.parametrize(
    "selection",
    [
        {"ignore": "4"}, {"ignore": "2"}, {"layers": "4"}, {"layers": ["0", "4"]}, {"layers": "0"},
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("traced", [False, True], ids=["hooks", "traced"])
def test_layers_that_are_not_taken_are_passed_through(selection, traced):
    model, X = mlp(4, 7, 5, C), torch.randn(4, 4)
    data = X, torch.randint(C, (4,))
    options = {"params": dict(model.named_parameters())} if traced else {}
    vectors = all_vectors(TypeII(), model, CE, data)
    found = KFAC.compute(model, CE, data, **selection, **options)
    names = set(cover(model, **selection).layers)
    assert names
    same_factors(found, factors(model, CE, data, vectors, "expand"), names=names)
    found = EKFAC.compute(model, CE, data, **selection, **options)
    same_eigenvalues(found, model, CE, data, vectors, names=names)


@pytest.mark.parametrize("net", ["narrow head", "narrow in the middle", "positions", "one layer"])
@pytest.mark.parametrize("compute", [KFAC.compute, EKFAC.compute], ids=["KFAC", "EKFAC"])
def test_several_batches_are_one(net, compute):
    model, (X, y) = example(net, CE, N=6)
    several = [(X[:1], y[:1]), (X[1:4], y[1:4]), (X[4:], y[4:])]
    vectors = all_vectors(TypeII(), model, CE, (X, y))
    found = compute(model, CE, several)
    if compute == KFAC.compute:
        same_factors(found, factors(model, CE, (X, y), vectors, "expand"))
    else:
        same_eigenvalues(found, model, CE, (X, y), vectors)


@pytest.mark.parametrize(
    "net", ["narrow head", "narrow in the middle", "one layer", "dead units", "scaled", "positions"]
)
@pytest.mark.parametrize("traced", [False, True], ids=["hooks", "traced"])
def test_data_whose_labels_are_ignored_might_as_well_not_be_there(net, traced):
    model, (X, y) = example(net, CE, N=6)
    ignored = torch.tensor([True, False, False, True, False, True])
    y = torch.where(ignored.reshape(-1, *[1] * (y.ndim - 1)), -100, y)
    options = {"params": dict(model.named_parameters())} if traced else {}
    rest = X[~ignored], y[~ignored]
    vectors = all_vectors(TypeII(), model, CE, rest)
    same_factors(
        KFAC.compute(model, CE, (X, y), **options), factors(model, CE, rest, vectors, "expand")
    )
    same_eigenvalues(EKFAC.compute(model, CE, (X, y), **options), model, CE, rest, vectors)


@pytest.mark.parametrize("net", ["narrow head", "narrow in the middle", "scaled"])
def test_weights_of_classes_that_are_zero_and_smoothing_stay_in_the_vectors(net):
    weight = torch.rand(C).where(torch.arange(C) % 3 != 1, 0.0)
    for smoothing in (0.0, 0.2):
        loss = nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing)
        model, data = example(net, loss, N=7)
        vectors = all_vectors(TypeII(), model, loss, data)
        expected = factors(model, loss, data, vectors, "expand")
        same_factors(KFAC.compute(model, loss, data), expected)


DRAWN = {
    "Monte Carlo": lambda: MonteCarlo(64, torch.Generator().manual_seed(3)),
    "signs": lambda: RandomSigns(64, torch.Generator().manual_seed(3)),
    "type-I": TypeI,
}


@pytest.mark.parametrize("flavour", DRAWN)
@pytest.mark.parametrize(
    "net",
    [
        "narrow head", "narrow in the middle", "positions", "residual", "around two layers",
        "convolutional", "one layer", "body twice",
    ],
)  # fmt: skip
def test_other_flavours_are_compressed_to_the_same_factors(net, flavour, monkeypatch):
    model, data = example(net, CE)
    vectors = all_vectors(DRAWN[flavour](), model, CE, data)
    found = KFAC.compute(model, CE, data, DRAWN[flavour]())
    same_factors(found, factors(model, CE, data, vectors, "expand"))
    same_eigenvalues(EKFAC.compute(model, CE, data, DRAWN[flavour]()), model, CE, data, vectors)
    monkeypatch.setattr(under_test, "WORTHWHILE", 10**9)
    plain = KFAC.compute(model, CE, data, DRAWN[flavour]())
    for name in plain:
        assert relative_error(found[name].B, plain[name].B) < 1e-12


@st.composite
def graphs(draw):
    """A net of layers that read sums, products or pieces of any earlier results."""
    torch.manual_seed(draw(st.integers(0, 9999)))
    number = draw(st.integers(1, 5))
    widths, reads, layers = [4], [], {}
    for i in range(number + 1):
        last = i == number
        earlier = draw(st.lists(st.integers(0, i), min_size=1, max_size=2, unique=True))
        earlier = sorted({*earlier, *([i] if i else [])}) if last else earlier
        size = C if last else draw(st.sampled_from([1, 2, 3, 5, 18]))
        layers[f"l{i}"] = nn.Linear(sum(widths[j] for j in earlier), size)
        widths.append(size)
        reads.append(earlier)
    used = {j for earlier in reads for j in earlier}
    around = [j for j in range(1, number + 1) if j not in used] + draw(
        st.lists(st.integers(1, number), max_size=1)
    )
    extra = draw(st.sampled_from(["nothing", "scaled", "tanh"]))

    def run(m, x):
        results = [x]
        for i, earlier in enumerate(reads):
            z = getattr(m, f"l{i}")(torch.cat([results[j] for j in earlier], 1))
            results.append(z if i == number else z.tanh())
        f = results[-1]
        for j in around:
            f = f + results[j].sum(1, keepdim=True).sin() * torch.linspace(-1, 1, C)
        return {"nothing": f, "scaled": 2 * f, "tanh": f.tanh()}[extra]

    return Net(run, **layers)


@some
@given(model=graphs(), chunk_size=st.sampled_from([None, None, 1, 5, 11, 33]))
def test_nets_of_any_graph_have_the_factors_of_all_vectors(model, chunk_size):
    X = torch.randn(3, 4)
    data = X, torch.randint(C, (3,))
    vectors = all_vectors(TypeII(), model, CE, data)
    expected = factors(model, CE, data, vectors, "expand")
    same_factors(KFAC.compute(model, CE, data, chunk_size=chunk_size), expected)


class NoBatchingRule(torch.autograd.Function):
    """sin, with a backward pass that looks at a value, which vmap cannot."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return x.cos() * g if g.abs().sum().item() >= 0 else g


@pytest.mark.parametrize("chunk_size", [1, 5, 11, 33, 34])
@pytest.mark.parametrize("net", [name for name in NETS if name not in ("narrow nowhere",)])
def test_chunks_of_any_size_give_the_factors_of_all_vectors(net, chunk_size):
    model, data = example(net, CE, N=3)
    vectors = all_vectors(TypeII(), model, CE, data)
    expected = factors(model, CE, data, vectors, "expand")
    same_factors(KFAC.compute(model, CE, data, chunk_size=chunk_size), expected)


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_a_net_whose_backward_pass_has_no_batching_rule_is_compressed_as_well(chunk_size):
    def run(m, x):
        z = m.a(x).tanh()
        return m.head(m.c(NoBatchingRule.apply(m.b(z))).tanh()) + m.skip(z)

    chain = nn.Sequential(lin(4, 5), To(NoBatchingRule.apply), lin(5, 4), nn.Tanh(), lin(4, C))
    skip = Net(run, a=lin(4, 20), b=lin(20, 3), c=lin(3, 5), head=lin(5, C), skip=lin(20, C))
    for model in (chain, skip):
        X = torch.randn(3, 4)
        data = X, torch.randint(C, (3,))
        vectors = all_vectors(TypeII(), model, CE, data)
        expected = factors(model, CE, data, vectors, "expand")
        same_factors(KFAC.compute(model, CE, data, chunk_size=chunk_size), expected)


# --------------------------------------------------------------------------------------- float32


@pytest.mark.parametrize("loss", [MSE, CE], ids=["MSE", "CE"])
@pytest.mark.parametrize(
    "net",
    [
        "narrow head", "narrow in the middle", "bottleneck autoencoder", "dead units", "one unit",
        "convolutional", "positions", "scaled", "residual", "tokens",
    ],
)  # fmt: skip
def test_float32_is_float64_to_its_precision(net, loss):
    model, (X, y) = example(net, loss)
    model, X = model.float(), X.float() if X.is_floating_point() else X
    low = KFAC.compute(model, loss, (X, y.float() if y.is_floating_point() else y))
    model, X = model.double(), X.double() if X.is_floating_point() else X
    high = KFAC.compute(model, loss, (X, y))
    for name in high:
        assert low[name].B.dtype == torch.float32
        for one, other in ((low[name].A, high[name].A), (low[name].B, high[name].B)):
            assert relative_error(one.double(), other) < FLOAT32, name


def test_units_of_different_scales_beside_a_pruned_one_keep_their_precision():
    """ReLU nets that are one function: a unit's weights times s in front of it, over s behind."""
    model, X = mlp(4, 6, 5, C, activation="relu"), torch.randn(4, 4)
    data = X, torch.randint(C, (4,))
    scale = torch.tensor([1e2, 1.0, 1e-2, 1.0, 1.0])
    with torch.no_grad():
        model[2].bias += 1
        model[4].weight[:, 3] = 0  # pruned: what is backpropagated to the cut is singular
        expected = KFAC.compute(model, CE, data)["0"].B
        model[2].weight *= scale[:, None]
        model[2].bias *= scale
        model[4].weight /= scale
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, FLOAT32)):
        model, X = model.to(dtype), X.to(dtype)
        B = KFAC.compute(model, CE, (X, data[1]))["0"].B
        assert relative_error(B.double(), expected) < tolerance, dtype


FLOAT32 = 2e-6
"""Relative error of a factor in float32; measured on these nets."""


# -------------------------------------------------------------------------------- how many vectors


@pytest.mark.parametrize("loss", [MSE, CE, BCE], ids=["MSE", "CE", "BCE"])
@pytest.mark.parametrize("traced", [False, True], ids=["hooks", "traced"])
def test_behind_a_head_of_width_6_six_vectors_go_back(calls, loss, traced):
    model, X = mlp(4, 9, 6, 40), torch.randn(5, 4)
    data = X, labels(loss, model(X).detach())
    options = {"params": dict(model.named_parameters())} if traced else {}
    KFAC.compute(model, loss, data, **options)
    assert [number for number in calls if number > 1] == [6]


def test_a_single_layer_needs_no_vector(calls):
    model, X = lin(4, 40), torch.randn(5, 4)
    for compute in (KFAC.compute, EKFAC.compute):
        compute(model, CE, (X, torch.randint(40, (5,))))
    assert calls == []


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: mlp(4, 9, 41, 40), [39, 9]),
        (lambda: mlp(4, 34, 3, 34, 70), [34, 3]),
        (lambda: mlp(4, 9, 31, 40), [31]),
        (lambda: mlp(4, 50, 41, 40), [39]),
        (then(torch.tanh, 4, 9, 6, 40), [39, 6]),
        (then(torch.tanh, 4, 9, 6, 31), [30]),
    ],
    ids=["body", "head and body", "head alone", "nowhere", "no closed head", "few classes"],
)
def test_each_section_has_the_vectors_of_its_width(calls, make, expected):
    model, X = make(), torch.randn(5, 4)
    KFAC.compute(model, CE, (X, torch.randint(model(X).shape[1], (5,))))
    assert calls == expected


def test_monte_carlo_of_64_samples_is_compressed_to_the_width(calls):
    model, X = mlp(4, 9, 6, 40), torch.randn(5, 4)
    KFAC.compute(model, CE, (X, torch.randint(40, (5,))), MonteCarlo(64))
    assert calls == [64, 6]
    calls.clear()
    KFAC.compute(model, CE, (X, torch.randint(40, (5,))), MonteCarlo(31))
    assert calls == [31]


# ------------------------------------------------------------------------- what must not be divided


def run(model, X):
    return Hooks(model).run(X)


def parts(model, X, V=40):
    f, calls = run(model, X)
    return [set(section.calls) for section in sections(get_gradient_edge(f), calls, V, len(f))]


def test_a_chain_is_divided_at_its_narrow_places_only():
    assert parts(mlp(4, 9, 6, 40), torch.randn(3, 4)) == [{"4"}, {"0", "2"}]
    assert parts(mlp(4, 3, 30, 40), torch.randn(3, 4)) == [{"4", "2"}, {"0"}]
    assert parts(mlp(4, 30, 30, 40), torch.randn(3, 4)) == [{"0", "2", "4"}]
    assert parts(mlp(4, 9, 6, 40), torch.randn(3, 4), V=31) == [{"0", "2", "4"}]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (residual, [{"head"}, {"a", "b", "c"}]),
        (around_the_heads_input, None),
        (two_halves, [{"b", "c"}, {"a"}]),
        (body_twice, [{"head"}, {"between", "body"}]),
        (on_both_sides_of_a_narrow_place, [{"body", "up", "down"}]),
        (input_skips_all, None),
    ],
)
def test_every_way_leads_through_a_cut(make, expected):
    model = make()
    f, calls = run(model, torch.randn(3, next(model.children()).in_features))
    found = sections(get_gradient_edge(f), calls, 40, len(f))
    if expected is not None:
        assert [set(section.calls) for section in found] == expected
    assert sorted(name for section in found for name in section.calls) == sorted(calls)
    assert found[-1].cut is None
    assert all(section.cut is not None for section in found[:-1])


def is_reached_around(source, cut, call):
    """Whether the call's place is found from the source with the cut taken out, by a search."""
    todo, seen = [source.node], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node is call.edge.node:
            return True
        todo += [
            child
            for child, number in node.next_functions
            if (child, number) != (cut.edge.node, cut.edge.output_nr)
        ]
    return False


@some
@given(model=graphs())
def test_no_layer_behind_a_cut_is_reached_around_it(model):
    f, calls = run(model, torch.randn(3, 4))
    source = get_gradient_edge(f)
    found = sections(source, calls, C, len(f))
    for i, section in enumerate(found[:-1]):
        for later in found[i + 1 :]:
            for of_layer in later.calls.values():
                assert not any(is_reached_around(source, section.cut, call) for call in of_layer)
        source = section.cut.edge


@pytest.mark.parametrize(
    ("net", "name"),
    [
        ("narrow head", "4"), ("narrow head without bias", "2"), ("one layer", ""),
        ("residual", "head"), ("convolutional", "7"), ("dead units", "4"), ("tokens", "2"),
    ],
)  # fmt: skip
def test_a_head_that_gives_the_prediction_is_found(net, name):
    model, (X, _) = example(net, CE)
    head = closed_head(*run(model, X))
    assert head.call.name == name
    assert set(head.behind) == set(cover(model).layers) - {name}
    assert (head.cut is None) == (not head.behind)
    assert torch.equal(head.weight, model.get_submodule(name).weight)


@pytest.mark.parametrize(
    "net",
    [
        "around the head's input", "around two layers", "plain skip", "input skips all",
        "half alone", "two halves", "head twice", "only the head, twice",
        "scaled", "shifted", "shifted by its mean",
        "activated", "part of what the head gives", "in another order",
        "positions", "mixed positions",
    ],
)  # fmt: skip
def test_a_layer_that_is_no_head_is_not_taken_for_one(net):
    model, (X, _) = example(net, CE)
    assert closed_head(*run(model, X)) is None


@pytest.mark.parametrize("left_out", ["frozen", "ignored"])
@pytest.mark.parametrize(
    ("net", "name"),
    [
        ("narrow head", "4"), ("narrow head without bias", "2"), ("residual", "head"),
        ("convolutional", "7"), ("dead units", "4"), ("tokens", "2"),
    ],
)  # fmt: skip
def test_a_head_that_is_not_covered_is_found_and_changes_no_other_factor(net, name, left_out):
    model, (X, y) = example(net, CE)
    expected = KFAC.compute(model, CE, (X, y))
    model.get_submodule(name).requires_grad_(left_out == "ignored")
    ignore = [name] if left_out == "ignored" else []
    head = closed_head(*Hooks(model, cover(model, ignore=ignore)).run(X))
    assert head.call is None
    assert set(head.behind) == set(expected) - {name}
    assert torch.equal(head.weight, model.get_submodule(name).weight)
    for chunk_size in (None, 1):
        kfac = KFAC.compute(model, CE, (X, y), chunk_size=chunk_size, ignore=ignore)
        assert set(kfac) == set(expected) - {name}
        for other, K in kfac.items():
            assert relative_error(K.A, expected[other].A) < 1e-12
            assert relative_error(K.B, expected[other].B) < 1e-12


class LastProduct(nn.Module):
    """A net whose prediction is some product of what its layers give and other matrices."""

    def __init__(self, product):
        super().__init__()
        self.first, self.second = lin(3, 5), lin(3, 5)
        self.product, self.V = product, nn.Parameter(torch.randn(5, C), requires_grad=False)

    def forward(self, X):
        return self.product(self.first(X).tanh(), self.second(X).tanh(), self.V)


@pytest.mark.parametrize(
    "product",
    [
        lambda h, k, V: torch.addmm(V[0], h + k, V, alpha=2.0),
        lambda h, k, V: (torch.eye(len(h)) @ (h + k)) @ V + h @ V,
        lambda h, k, V: torch.eye(len(h)) @ torch.cat([h, k] * 4, dim=1)[:, :C],
    ],
    ids=["scaled", "a sum of two", "of the data from the left"],
)
def test_a_product_that_is_no_head_is_not_taken_for_one(product):
    model, X = LastProduct(product), torch.randn(4, 3)
    assert closed_head(*run(model, X)) is None
    y = torch.randint(C, (4,))
    kfac, plain = (KFAC.compute(model, CE, (X, y), fisher) for fisher in (TypeII(), TypeI()))
    for name, K in kfac.items():
        assert relative_error(K.B, plain[name].B) < 1e-12


def test_a_product_with_a_matrix_that_a_layer_gives_is_no_head():
    model = LastProduct(lambda h, k, V: h @ (V * k.mean()))
    assert closed_head(*run(model, torch.randn(4, 3))) is None


def test_a_product_with_a_matrix_that_no_layer_gives_is_a_head():
    model, X = LastProduct(lambda h, k, V: torch.addmm(V[0], h * k, V, beta=3.0)), torch.randn(4, 3)
    head = closed_head(*run(model, X))
    assert head.call is None
    assert torch.equal(head.weight, model.V.T)
    y = torch.randint(C, (4,))
    kfac, plain = (KFAC.compute(model, CE, (X, y), fisher) for fisher in (TypeII(), TypeI()))
    for name, K in kfac.items():
        assert relative_error(K.B, plain[name].B) < 1e-12


@pytest.mark.parametrize(
    ("width", "classes", "narrow"), [(6, 31, False), (6, 32, True), (40, 32, False)]
)
def test_a_head_is_narrow_if_it_has_many_classes_and_fewer_inputs(width, classes, narrow):
    head = closed_head(*run(mlp(4, width, classes), torch.randn(3, 4)))
    assert head.call.name == "2"
    assert head.is_narrow is narrow


@pytest.mark.parametrize("loss", ["MSE", "BCE", "CE"])
@pytest.mark.parametrize("classes", [1, 2, 5, 40])
def test_a_heads_vectors_have_the_sum_of_the_hessians(loss, classes):
    model = mlp(4, 6, classes)
    X, kind = torch.randn(3, 4), {"MSE": nn.MSELoss, "BCE": nn.BCEWithLogitsLoss}.get(loss)
    weighted = nn.CrossEntropyLoss(weight=torch.linspace(0.5, 2, classes))
    criterion = criterion_of(kind() if kind else weighted)
    y = torch.rand(3, classes) if kind else torch.randint(classes, (3,))
    f, calls = run(model, X)
    head, hessian = closed_head(f, calls), criterion.output_hessian(f.detach(), y)
    g = head.vectors(hessian)
    wanted = torch.zeros(3, 6, 6)
    for n in range(3):
        H = torch.autograd.functional.hessian(
            lambda z, n=n: criterion.value(z, y[n : n + 1]), f[n : n + 1].detach()
        )[0, :, 0]
        wanted[n] = head.weight.T @ H @ head.weight
    torch.testing.assert_close(torch.einsum("vnd,vne->nde", g, g), wanted, rtol=0, atol=1e-12)
    assert len(g) == (6 if classes == 40 else max(1, classes - (loss == "CE")))
