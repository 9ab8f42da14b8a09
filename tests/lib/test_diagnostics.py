"""Every figure of a diagnosis against dense matrices, which plain autograd makes."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from layer_cases import FLAVOURS, NETS, SHARINGS, all_vectors, drawn, example
from torch import nn
from truth import Net, labels, mlp, reduction_factor
from truth_layers import dense, factors, flatten, jacobians, layers_of, rows

from kfac_lib import (
    EKFAC,
    KFAC,
    Diagnosis,
    Empirical,
    Exact,
    Expand,
    InputOnly,
    MonteCarlo,
    Reduce,
    TypeI,
    TypeII,
    diagnose,
)
from kfac_lib import pairs as pairs_module
from kfac_lib.curvature import ggn, hessian
from kfac_lib.pairs import PairSums
from kfac_lib.quadratic import predicted_decrease
from kfac_lib.steps import StepComparison

pytestmark = pytest.mark.usefixtures("float64")
MSE, CE, BCE = nn.MSELoss(), nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()


def gradient_rows(model, data, vectors):
    """For each layer vec(P_{n,v}) as rows, rvec, (V·N, D)."""
    X, _ = data
    f = model(X).detach()
    each = {}
    for name, J in jacobians(model, X).items():
        J = flatten(J, "rvec").reshape(len(f), f[0].numel(), -1)
        P = torch.einsum("vnk,nkd->vnd", vectors.reshape(len(vectors), len(f), -1), J)
        each[name] = P.flatten(0, 1)
    return each


def norms_of_nearest(G, name, model):
    """Squared largest singular values of the rearranged diagonal blocks of groups, added up."""
    layer = layers_of(model)[name]
    groups, D_out = getattr(layer, "groups", 1), layer.weight.shape[0]
    if isinstance(layer, nn.Embedding):
        D_out = layer.embedding_dim
    D_in = len(G) // D_out
    whole = G.reshape(groups, D_out // groups, D_in, groups, D_out // groups, D_in)
    total = 0.0
    for k in range(groups):
        of_group = whole[k, :, :, k].permute(0, 2, 1, 3).flatten(0, 1).flatten(1)
        total += float(torch.linalg.svdvals(of_group)[0]) ** 2
    return total


def ekfac_dense(pairs):
    """The eigenbasis of blockdiag(B_g ⊗ A_g), rvec."""
    bases = [
        torch.kron(torch.linalg.eigh(B).eigenvectors, torch.linalg.eigh(A).eigenvectors)
        for A, B in pairs
    ]
    return torch.block_diag(*bases)


def check(model, loss, data, flavour, sharing, found, *, basis=True, tolerance=1e-10):
    fisher = FLAVOURS[flavour]
    vectors = drawn(fisher, model, loss, data)[0]
    P = gradient_rows(model, data, vectors)
    R = reduction_factor(loss, model(data[0]).detach(), data[1])
    pairs = factors(model, loss, data, vectors, sharing)
    names = list(layers_of(model))
    assert list(found) == names
    G = {name: R * P[name].T @ P[name] for name in names}
    for name, one in found.items():
        K = dense(pairs[name], "rvec")
        norm = float(G[name].norm())
        close = pytest.approx
        assert one.norm.value == close(norm, rel=tolerance)
        assert one.norm.standard_error == 0
        assert one.kfac_norm == close(float(K.norm()), rel=tolerance)
        assert one.inner == close(float((G[name] * K).sum()), rel=tolerance)
        assert one.trace_ratio == close(float(K.trace() / G[name].trace()), rel=tolerance)
        # Of errors the squares are as exact as the norms.
        square = float((G[name] - K).norm() / norm) ** 2
        assert one.kfac_error.value**2 == close(square, abs=tolerance)
        if basis:
            Q = ekfac_dense(pairs[name])
            off = Q.T @ G[name] @ Q
            off.diagonal().zero_()
            assert one.ekfac_error.value**2 == close(float(off.norm() / norm) ** 2, abs=tolerance)
        share = norms_of_nearest(G[name], name, model) / norm**2
        assert one.best_share == close(share, abs=tolerance)
        assert one.best_error.value <= one.kfac_error.value + 1e-7
        assert one.ekfac_error.value <= one.kfac_error.value + 1e-7
    squares = torch.stack(
        [torch.stack([(R * P[i].T @ P[j]).norm() ** 2 for j in names]) for i in names]
    )
    own = squares.diagonal()
    expected = squares.sqrt() / (own.unsqueeze(0) * own.unsqueeze(1)).pow(0.25)
    torch.testing.assert_close(found.coupling, expected, rtol=0, atol=tolerance)
    outside = float(1 - own.sum() / squares.sum())
    assert found.outside.value == pytest.approx(outside, abs=tolerance)
    assert (found.N, found.compared) == (len(data[0]), len(data[0]))


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("loss", ["CE", "BCE"])
def test_a_multilayer_perceptron(flavour, loss):
    loss = {"CE": CE, "BCE": BCE}[loss]
    model = mlp(4, 5, 4, 3)
    X = torch.randn(6, 4)
    data = X, labels(loss, model(X))
    torch.manual_seed(1)
    found = diagnose(model, loss, data, fisher=FLAVOURS[flavour])
    check(model, loss, data, flavour, "expand", found, basis=loss is CE)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("flavour", ["minimal", "Monte Carlo", "empirical"])
@pytest.mark.parametrize("net", NETS)
def test_every_layer_and_sharing(net, flavour, sharing):
    model, data = example(net, CE, 4)
    torch.manual_seed(1)
    found = diagnose(model, CE, data, fisher=FLAVOURS[flavour], sharing=SHARINGS[sharing])
    # B of these is singular with many equal eigenvalues, or A is the identity's multiple.
    check(model, CE, data, flavour, sharing, found, basis=False)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("N", [1, 2, 7])
def test_regression_of_few_and_more_data(N, reduction):
    loss, model = nn.MSELoss(reduction=reduction), mlp(4, 6, 3)
    data = torch.randn(N, 4), torch.randn(N, 3)
    found = diagnose(model, loss, data)
    check(model, loss, data, "type-II", "expand", found, basis=False)


def test_corrected_errors_are_those_of_the_library_itself():
    for net in NETS:
        model, data = example(net, CE, 5)
        for sharing in SHARINGS.values():
            found = diagnose(model, CE, data, fisher=TypeII(), sharing=sharing)
            P = gradient_rows(model, data, all_vectors(TypeII(), model, CE, data))
            R = reduction_factor(CE, model(data[0]).detach(), data[1])
            for name, E in EKFAC.compute(model, CE, data, sharing=sharing).items():
                G = R * P[name].T @ P[name]
                error = float((G - E.to_dense("rvec")).norm() / G.norm())
                assert found[name].ekfac_error.value == pytest.approx(error, abs=2e-3)


@pytest.mark.parametrize("subsample", [None, 4])
@pytest.mark.parametrize("net", NETS)
def test_the_trace_under_the_other_sharing_is_that_of_a_diagnosis_with_it(net, subsample):
    model, data = example(net, CE, 5)
    options = {"subsample": subsample}
    found = diagnose(model, CE, data, sharing=Expand(), **options)
    other = diagnose(model, CE, data, sharing=Reduce(), **options)
    for name, one in found.items():
        if one.positions == 1:
            assert math.isnan(one.other_trace_ratio)
            continue
        assert one.other_trace_ratio == pytest.approx(other[name].trace_ratio, rel=1e-8)
        assert other[name].other_trace_ratio == pytest.approx(one.trace_ratio, rel=1e-8)


@pytest.mark.parametrize("workspace", [8, 2000, 20000])
def test_small_blocks_of_pairs_change_nothing(workspace, monkeypatch):
    model, data = example("conv2d in groups", CE, 7)
    mixed = mlp(4, 5, 3)
    X = torch.randn(9, 4)
    both = [(model, data), (mixed, (X, labels(CE, mixed(X))))]
    whole = [diagnose(one, CE, of_one) for one, of_one in both]
    monkeypatch.setattr(pairs_module, "WORKSPACE", workspace)
    for (one, of_one), expected in zip(both, whole, strict=True):
        found = diagnose(one, CE, of_one)
        torch.testing.assert_close(found.coupling, expected.coupling, rtol=0, atol=1e-12)
        for name, layer in found.items():
            assert layer.norm.value == pytest.approx(expected[name].norm.value, rel=1e-12)
            assert layer.best_share == pytest.approx(expected[name].best_share, abs=1e-10)


def test_batches_and_chunks_of_vectors_change_nothing():
    model = mlp(4, 5, 3)
    X = torch.randn(7, 4)
    y = labels(CE, model(X))
    y[2] = -100
    expected = diagnose(model, CE, (X, y))
    assert expected.N == 6
    loader = [(X[:3], y[:3]), (X[3:4], y[3:4]), (X[4:], y[4:])]
    for chunk_size in (None, 1):
        found = diagnose(model, CE, loader, chunk_size=chunk_size)
        torch.testing.assert_close(found.coupling, expected.coupling, rtol=0, atol=1e-12)
        for name, one in found.items():
            for figure in ("kfac_error", "ekfac_error", "best_error", "norm"):
                value = getattr(expected[name], figure).value
                assert getattr(one, figure).value == pytest.approx(value, abs=1e-7)
            assert one.correlation == pytest.approx(expected[name].correlation, abs=1e-12)


def test_a_network_of_many_classes_keeps_its_vectors_joint():
    model = mlp(4, 3, 40)
    X = torch.randn(5, 4)
    data = X, labels(CE, model(X))
    check(model, CE, data, "type-II", "expand", diagnose(model, CE, data))


# ------------------------------------------------------------------------------- what it explains


def test_the_excess_of_the_trace_is_the_covariance_of_energies():
    model = mlp(4, 6, 3)
    X = torch.randn(9, 4) * torch.linspace(0.1, 3, 9).unsqueeze(1)
    found = diagnose(model, CE, (X, labels(CE, model(X))), fisher=Empirical())
    for one in found.values():
        assert 1 / one.trace_ratio - 1 == pytest.approx(one.excess, abs=1e-12)
        assert -1 <= one.correlation <= 1


def test_correlation_is_that_of_the_energies():
    model, data = example("linear on two axes", CE, 6)
    vectors = all_vectors(Empirical(), model, CE, data)
    for sharing, make in (("expand", Expand()), ("reduce", Reduce())):
        found = diagnose(model, CE, data, fisher=Empirical(), sharing=make)
        for name, [(x, g)] in rows(model, data[0], vectors).items():
            if sharing == "reduce":
                x, g = x.sum(1, True), g.sum(2, True)
            a, b = x.square().sum(2).flatten(), g.square().sum((0, 3)).flatten()
            expected = float(torch.corrcoef(torch.stack([a, b]))[0, 1])
            assert found[name].correlation == pytest.approx(expected, abs=1e-12)


def test_where_kfac_is_exact_the_error_is_zero():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    found = diagnose(model, MSE, (torch.randn(8, 4), torch.randn(8, 3)))
    for one in found.values():
        assert one.kfac_error.value < 1e-7
        assert one.best_share == pytest.approx(1, abs=1e-12)
        assert math.isnan(one.correlation)
    assert found.advice("0").startswith("KFAC is within 0% of the block.")


def test_a_planted_correlation_is_found():
    """Inputs and targets are large for the same data: gradients follow inputs."""
    scale = torch.linspace(0.1, 5, 40).unsqueeze(1)
    X = scale * torch.randn(40, 4)
    model = nn.Linear(4, 3)
    uncorrelated = diagnose(model, MSE, (X, model(X) + torch.randn(40, 3)), fisher=Empirical())
    planted = diagnose(model, MSE, (X, model(X) + scale * torch.randn(40, 3)), fisher=Empirical())
    assert planted[""].correlation > 0.5 > abs(uncorrelated[""].correlation)
    assert planted[""].excess > uncorrelated[""].excess
    assert "gradients are large" in planted.advice("")


def test_planted_coupling_between_layers_is_found():
    """Two branches: what both read is one thing, or two independent ones."""
    net = Net(
        lambda m, X: m.left(X[:, 0]) + m.right(X[:, 1]),
        left=nn.Linear(4, 3, bias=False),
        right=nn.Linear(4, 3, bias=False),
    )
    N = 400
    one, two = torch.randn(N, 4), torch.randn(N, 4)
    couplings = []
    for share in (0.0, 0.5, 1.0):
        X = torch.stack([one, share * one + (1 - share**2) ** 0.5 * two], dim=1)
        found = diagnose(net, MSE, (X, torch.randn(N, 3)))
        couplings.append(float(found.coupling[0, 1]))
        assert found["left"].coupled_to[0] == "right"
        assert found["left"].coupled_to[1].value == couplings[-1]
    assert couplings[0] < 0.3 < couplings[1] < couplings[2]
    assert couplings[2] == pytest.approx(1, abs=1e-12)
    assert "Coupled to 'right' at 1.00" in found.advice("left")
    assert found.outside.value == pytest.approx(0.5, abs=1e-12)


# ---------------------------------------------------------------------------------- the subsample


def population(N=60):
    model = mlp(4, 6, 3)
    X = torch.randn(N, 4) * torch.linspace(0.3, 2, N).unsqueeze(1)
    return model, (X, labels(CE, model(X)))


def test_subsampled_figures_are_within_five_standard_errors_and_not_far_within():
    model, data = population()
    exact = diagnose(model, CE, data, fisher=Empirical())
    z = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        found = diagnose(model, CE, data, fisher=Empirical(), subsample=30, generator=generator)
        assert (found.N, found.compared) == (60, 30)
        for name, one in found.items():
            for figure in ("norm", "kfac_error", "ekfac_error", "best_error"):
                value, error = getattr(one, figure)
                assert error > 0
                z.append((value - getattr(exact[name], figure).value) / error)
            assert one.inner == pytest.approx(exact[name].inner, rel=1e-10)
            assert one.trace_ratio == pytest.approx(exact[name].trace_ratio, rel=1e-10)
            assert one.correlation == pytest.approx(exact[name].correlation, rel=1e-10)
        value, error = found.outside
        z.append((value - exact.outside.value) / error)
    z = torch.tensor(z)
    assert z.abs().max() < 5
    assert 0.5 < z.square().mean().sqrt() < 2


def test_sums_over_pairs_are_estimated_without_bias():
    """The mean over all samples of a size is the sum over all pairs."""
    q = torch.rand(6, 6, 2, 2)
    q = q + q.transpose(0, 1)
    estimates = []
    for some in combinations(range(6), 4):
        of_some = q[list(some)][:, list(some)]
        own = of_some.diagonal(dim1=0, dim2=1).permute(2, 0, 1)
        estimates.append(PairSums(of_some.sum(1), own).total(6))
    torch.testing.assert_close(torch.stack(estimates).mean(0), q.sum((0, 1)))


def test_what_is_left_out_in_the_jackknife_is_left_out():
    q = torch.rand(5, 5, 1, 1)
    q = q + q.transpose(0, 1)

    def sums(some):
        of_some = q[some][:, some]
        return PairSums(of_some.sum(1), of_some.diagonal(dim1=0, dim2=1).permute(2, 0, 1))

    everyone = list(range(5))
    found = sums(everyone).without_each(9)
    for n in everyone:
        rest = [m for m in everyone if m != n]
        torch.testing.assert_close(found[n], sums(rest).total(9))


@pytest.mark.parametrize("net", ["embedding and conv", "conv2d in groups"])
@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_subsample_of_everything_is_everything(net, sharing):
    model, data = example(net, CE, 6)
    sharing = SHARINGS[sharing]
    exact = diagnose(model, CE, data, sharing=sharing)
    batches = [(data[0][:2], data[1][:2]), (data[0][2:], data[1][2:])]
    found = diagnose(model, CE, batches, sharing=sharing, subsample=6, chunk_size=2)
    torch.testing.assert_close(found.coupling, exact.coupling, rtol=0, atol=1e-10)
    for name, one in found.items():
        assert one.kfac_error.standard_error == 0
        assert one.kfac_error.value == pytest.approx(exact[name].kfac_error.value, abs=1e-7)
        assert one.best_share == pytest.approx(exact[name].best_share, abs=1e-3)
        assert one.excess == pytest.approx(exact[name].excess, abs=1e-10)
        assert one.trace_ratio == pytest.approx(exact[name].trace_ratio, rel=1e-10)


def test_a_random_flavour_draws_the_same_in_every_pass_and_puts_nothing_back():
    model, data = population(12)
    fisher = MonteCarlo(2, generator=torch.Generator().manual_seed(3))
    found = diagnose(model, CE, data, fisher=fisher, subsample=12)
    fisher.generator.manual_seed(3)
    exact = diagnose(model, CE, data, fisher=fisher)
    for name, one in found.items():
        assert one.kfac_error.value == pytest.approx(exact[name].kfac_error.value, abs=1e-7)


# -------------------------------------------------------------------------------- the exact step


@pytest.mark.parametrize("loss", ["MSE", "CE"])
def test_steps_are_compared_with_the_dense_one(loss):
    loss = {"MSE": MSE, "CE": CE}[loss]
    model, delta = mlp(4, 5, 3), 0.01
    X = torch.randn(12, 4)
    data = X, labels(loss, model(X))
    found = diagnose(model, loss, data, exact_step=True, damping=Exact(delta)).steps
    parameters = [p for layer in (model[0], model[2]) for p in (layer.weight, layer.bias)]
    gradient = torch.autograd.grad(loss(model(X), data[1]), parameters)
    joint = [
        torch.cat([W, b.unsqueeze(1)], 1).flatten()
        for W, b in zip(gradient[::2], gradient[1::2], strict=True)
    ]
    g, G = torch.cat(joint), ggn(model, loss, data, order="rvec")
    damped = G + delta * torch.eye(len(G))
    exact = torch.linalg.solve(damped, g)
    for name, kind in (("KFAC", KFAC), ("EKFAC", EKFAC)):
        K = kind.compute(model, loss, data).to_dense("rvec")
        s = torch.linalg.solve(K + delta * torch.eye(len(K)), g)
        most = 0.5 * g @ exact
        slope, bend = g @ s, s @ damped @ s
        one = found[name]
        assert one.cosine == pytest.approx(float(s @ exact / s.norm() / exact.norm()), abs=1e-5)
        assert one.decrease == pytest.approx(float((slope - 0.5 * bend) / most), abs=1e-5)
        assert one.best_decrease == pytest.approx(float(slope**2 / bend / 2 / most), abs=1e-5)
    assert found["gradient"].best_decrease < found["KFAC"].best_decrease <= 1 + 1e-9


def test_the_exact_step_leaves_out_what_is_ignored_and_sums_over_batches():
    model = mlp(4, 5, 3)
    X = torch.randn(12, 4)
    y = labels(CE, model(X))
    whole = diagnose(model, CE, (X, y), ignore="0.bias", exact_step=True).steps
    parts = [(X[:5], y[:5]), (X[5:], y[5:])]
    in_parts = diagnose(model, CE, parts, ignore="0.bias", exact_step=True).steps
    for name, one in whole.items():
        assert in_parts[name].cosine == pytest.approx(one.cosine, abs=1e-5)
        assert in_parts[name].decrease == pytest.approx(one.decrease, abs=1e-5)


# ------------------------------------------------------------------------------- what it looks like


def test_it_prints_a_table_with_advice():
    model, data = population(20)
    text = repr(diagnose(model, CE, data, exact_step=True))
    lines = text.splitlines()
    assert lines[0] == "Diagnosis(TypeII(columns='full'), 20 data)"
    assert lines[1].split()[:3] == ["layer", "shape", "KFAC"]
    assert lines[2].split()[:2] == ["0", "6×5"]
    (header,) = [line for line in lines if line.startswith("step ")]
    rows_of_steps = lines[lines.index(header) + 1 :]
    assert [row.split()[0] for row in rows_of_steps[:3]] == ["KFAC", "EKFAC", "gradient"]
    assert any(line.startswith("2: ") for line in lines)
    assert max(map(len, lines)) < 80
    sampled = repr(diagnose(model, CE, data, subsample=10))
    assert "10 compared pair by pair" in sampled
    assert "±" in sampled


@pytest.mark.parametrize(
    ("decrease", "best", "said"),
    [(0.9, 0.95, None), (-3.0, 0.8, "its length is not"), (-3.0, 0.2, "in its direction too")],
)
def test_advice_on_the_step_tells_length_from_direction(decrease, best, said):
    model, data = population(10)
    found = diagnose(model, CE, data)
    steps = {"KFAC": StepComparison(0.5, decrease, best)}
    whole = Diagnosis(
        dict(found),
        coupling=found.coupling,
        outside=found.outside,
        fisher=found.fisher,
        N=10,
        compared=10,
        steps=steps,
    )
    text = " ".join(repr(whole).split())
    for sentence in ("its length is not", "in its direction too"):
        assert (sentence in text) == (sentence == said)


def test_many_coupled_layers_are_told_by_how_much_a_step_may_be_too_long():
    deep, shallow = (mlp(*[4] * (L + 1)) for L in (4, 2))
    X = torch.randn(6, 4)
    for model, told in ((deep, True), (shallow, False)):
        text = repr(diagnose(model, MSE, (X, torch.randn(6, 4))))
        assert ("about 4 times too long" in " ".join(text.split())) == told


def test_advice_names_the_other_sharing_where_there_are_positions():
    model = nn.Sequential(nn.Conv1d(1, 3, 3), nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    X = torch.randn(8, 1, 9)
    data = X, labels(CE, model(X))
    expanded, reduced = (diagnose(model, CE, data, sharing=s) for s in (Expand(), Reduce()))
    assert (expanded["0"].positions, expanded["0"].sharing) == (7, Expand())
    assert expanded["0"].trace_ratio < 0.5
    assert "try Reduce()" in expanded.advice("0")
    assert "damp more" not in expanded.advice("0")
    assert 0.5 < reduced["0"].trace_ratio < 2
    assert "sharing" not in reduced.advice("0")


def test_one_layer_has_no_coupling():
    found = diagnose(nn.Linear(2, 3), MSE, (torch.randn(5, 2), torch.randn(5, 3)))
    assert found[""].coupled_to is None
    assert found.coupling.tolist() == [[1.0]]
    assert "(root)" in repr(found)


# -------------------------------------------------------------------------------------- bad input


def test_a_layer_without_curvature_is_named_so():
    model = mlp(4, 5, 3, activation="relu")
    with torch.no_grad():
        model[0].bias.fill_(-100)
    X = torch.randn(6, 4)
    found = diagnose(model, CE, (X, labels(CE, model(X))))
    assert found["0"].norm.value == 0
    assert math.isnan(found["0"].kfac_error.value)
    assert found.advice("0").startswith("No curvature")
    assert found.coupling[0].tolist() == [0, 0]
    assert "–" in repr(found)


def test_one_datum():
    model = mlp(4, 5, 3)
    X = torch.randn(1, 4)
    found = diagnose(model, CE, (X, labels(CE, model(X))))
    for one in found.values():
        assert one.kfac_error.value < 1e-6
        assert math.isnan(one.correlation)


def test_too_many_rows_are_refused_with_their_number_and_the_way_out():
    model, data = population(60)
    with pytest.raises(ValueError, match=r"of 60 data with 2 vectors each.*subsample=\d+") as error:
        diagnose(model, CE, data, max_memory=10_000)
    fitting = int(str(error.value).split("subsample=")[1].split(";")[0])
    assert diagnose(model, CE, data, max_memory=10_000, subsample=fitting).compared == fitting


@pytest.mark.parametrize("subsample", [0, 2, 1.5, "all"])
def test_a_subsample_is_a_number_of_data(subsample):
    model, data = population(6)
    with pytest.raises(ValueError, match="subsample"):
        diagnose(model, CE, data, subsample=subsample)


def test_what_cannot_be_diagnosed_is_refused():
    model, data = population(6)
    with pytest.raises(ValueError, match="InputOnly"):
        diagnose(model, CE, data, fisher=InputOnly())
    with pytest.raises(ValueError, match="only once"):
        diagnose(model, CE, iter([data]), subsample=4)
    with pytest.raises(NotImplementedError, match="exact_step"):
        diagnose(model, CE, data, params=dict(model.named_parameters()), exact_step=True)
    embedded = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    parts = [(torch.randint(5, (4, S)), torch.randn(4, S, 2)) for S in (2, 3)]
    with pytest.raises(ValueError, match="positions that share"):
        diagnose(embedded, MSE, parts)


def test_a_traced_net_has_the_same_figures():
    model, data = population(8)
    by_hooks = diagnose(model, CE, data)
    traced = diagnose(model, CE, data, params=dict(model.named_parameters()))
    torch.testing.assert_close(traced.coupling, by_hooks.coupling, rtol=0, atol=1e-12)
    for (name, one), other in zip(by_hooks.items(), traced.values(), strict=True):
        assert other.kfac_error.value == pytest.approx(one.kfac_error.value, abs=1e-7), name


def test_type_one_and_single_precision():
    model, (X, y) = population(10)
    exact = diagnose(model, CE, (X, y), fisher=TypeI())
    single = diagnose(model.float(), CE, (X.float(), y), fisher=TypeI())
    for name, one in single.items():
        assert one.kfac_error.value == pytest.approx(exact[name].kfac_error.value, abs=1e-4)


# --------------------------------------------------------------- what a sceptical user came across


@pytest.mark.parametrize("subsample", [None, 5])
@pytest.mark.parametrize("ignored", [0, 1, 2])
def test_a_batch_whose_labels_are_all_ignored_counts_nothing(ignored, subsample):
    model, (X, y) = population(12)
    y[4 * ignored : 4 * ignored + 4] = -100
    parts = [(X[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)]
    without = [part for number, part in enumerate(parts) if number != ignored]
    seeded = [torch.Generator().manual_seed(1) for _ in range(2)]
    found, other = (
        diagnose(model, CE, some, subsample=subsample, generator=g, chunk_size=1)
        for some, g in zip((parts, without), seeded, strict=True)
    )
    assert found.N == other.N == 8
    for name, one in found.items():
        assert one.kfac_error.value == pytest.approx(other[name].kfac_error.value, abs=1e-10)
        assert one.best_error.value == pytest.approx(other[name].best_error.value, abs=1e-10)


class Beside(nn.Module):
    """An MLP with a layer beside it, which acts on a datum as much as a gate says."""

    def __init__(self, gate):
        super().__init__()
        self.gate, self.aside, self.body = gate, nn.Linear(4, 3), mlp(4, 6, 3)

    def forward(self, X):
        return self.body(X) + self.gate(X) * self.aside(X)


def test_a_layer_without_curvature_keeps_no_other_from_its_nearest_product():
    model, (_, data) = Beside(lambda X: 0), population(60)
    exact = diagnose(model, CE, data)
    found = diagnose(model, CE, data, subsample=6, generator=torch.Generator().manual_seed(0))
    for name in ("body.0", "body.2"):
        known, at_best = (
            one[name].best_share * one[name].norm.value ** 2 for one in (found, exact)
        )
        assert known == pytest.approx(at_best, rel=2e-3)
    assert "No curvature" in found.advice("aside")


def heavy(N=200):
    """A net most of whose curvature rests on a few data."""
    model = mlp(6, 8, 4, activation="relu")
    X = torch.randn(N, 6) * torch.logspace(-1, 1, N).unsqueeze(1) ** 2
    return model, (X, labels(CE, model(X)))


def test_a_sample_never_gives_what_cannot_be():
    model, data = heavy()
    exact = diagnose(model, CE, data)
    for seed in range(25):
        g = torch.Generator().manual_seed(seed)
        found = diagnose(model, CE, data, subsample=10, generator=g)
        assert 0 <= found.outside.value <= 1
        assert bool(((found.coupling >= 0) & (found.coupling <= 1)).all())
        for name, one in found.items():
            assert "No curvature" not in found.advice(name)
            assert one.norm.value > 0
            for error in (one.ekfac_error, one.best_error):
                assert 0 <= error.value <= 1
                assert error.standard_error > 0
            explained = (1 - exact[name].ekfac_error.value ** 2) * exact[name].norm.value ** 2
            assert one.norm.value**2 >= explained * (1 - 1e-9)
        assert "Few data carry the sums" in repr(found)
    assert "Few data carry" not in repr(exact)


def test_a_layer_that_no_datum_of_the_sample_reaches_is_not_judged():
    X = torch.randn(40, 4)
    X[:, 0] = -1
    X[:2, 0] = torch.tensor([1.0, 2.0])
    model = Beside(lambda X: X[:, :1] > 0)
    data = X, labels(CE, model(X))
    unseen = 0
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        found = diagnose(model, CE, data, subsample=5, generator=g)
        if "Not in the sample" in found.advice("aside"):
            unseen += 1
            assert math.isnan(found["aside"].ekfac_error.value)
    assert unseen > 2


def test_advice_says_when_the_sample_leaves_it_open():
    model, data = population(60)
    g = torch.Generator().manual_seed(0)
    few = diagnose(model, CE, data, subsample=4, generator=g)
    assert "compare more data" in " ".join(map(few.advice, few))
    assert "±" in few.advice("0")
    exact = diagnose(model, CE, data)
    assert "compare more data" not in " ".join(map(exact.advice, exact))


@pytest.mark.parametrize("S", [1, 5])
def test_an_embedding_with_many_words_needs_no_dense_square(S):
    words, few = torch.randint(100_000, (6, S)), torch.randint(10, (6,))
    _, places = words.unique(return_inverse=True)
    big = nn.Sequential(nn.Embedding(100_000, 3), nn.Flatten(), nn.Linear(3 * S, 10))
    small = nn.Sequential(nn.Embedding(6 * S, 3), nn.Flatten(), nn.Linear(3 * S, 10))
    with torch.no_grad():
        small[0].weight[places] = big[0].weight[words]
    small[2].load_state_dict(big[2].state_dict())
    found = diagnose(big, CE, (words, few), max_memory=2**25)
    expected = diagnose(small, CE, (places, few))
    assert found["0"].shape == (3, 100_000)
    for figure in ("norm", "kfac_error", "ekfac_error", "best_error"):
        one, other = (getattr(one["0"], figure).value for one in (found, expected))
        assert one == pytest.approx(other, abs=1e-7)
    with pytest.raises(ValueError, match=r"layer '0' .* GiB.*ignore='0'"):
        diagnose(big, CE, (words, few), max_memory=2**25, subsample=3)


@pytest.mark.parametrize("subsample", [None, 6])
def test_data_that_change_between_passes_are_refused(subsample):
    model, (X, y) = population(12)

    class Augmented:
        def __iter__(self):
            yield X + 0.1 * torch.randn_like(X), y

    class Shrinking:
        left = 13

        def __iter__(self):
            self.left -= 1
            yield X[: self.left], y[: self.left]

    class Shuffled:
        def __iter__(self):
            order = torch.randperm(12)
            yield from zip(X[order].split(5), y[order].split(5), strict=True)

    for data in (Augmented(), Shrinking()):
        if subsample is None:
            diagnose(model, CE, data)
            continue
        with pytest.raises(ValueError, match="differ between two passes"):
            diagnose(model, CE, data, subsample=subsample)
    diagnose(model, CE, Shuffled(), subsample=subsample)


@pytest.mark.parametrize("power", [-1, 0, 1])
def test_the_other_sharing_is_advised_only_where_its_trace_is_nearer(power):
    model = nn.Linear(3, 2)
    size = torch.logspace(-1, 1, 20).reshape(20, 1, 1)
    X = size * torch.randn(20, 6, 3)
    data = X, model(X).detach() + size**power * torch.randn(20, 6, 2)
    found = {
        sharing: diagnose(model, MSE, data, fisher=Empirical(), sharing=sharing)
        for sharing in (Expand(), Reduce())
    }
    for sharing, other in ((Expand(), Reduce()), (Reduce(), Expand())):
        here, there = (abs(math.log(found[one][""].trace_ratio)) for one in (sharing, other))
        advice = found[sharing].advice("")
        assert (f"try {other}" in advice) == (there < here and here > math.log(2))
        assert (f"under {other}" in advice) == (here > math.log(2))


def test_only_layers_that_are_coupled_are_said_to_make_a_step_too_long():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(2, 1) for _ in range(5))
            self.deep = mlp(2, 3, 1)

        def forward(self, X):
            parts = [*self.heads, self.deep]
            return torch.cat([f(x) for f, x in zip(parts, X.split(2, 1), strict=True)], 1)

    X = torch.randn(30, 12)
    found = diagnose(Heads(), MSE, (X, torch.randn(30, 6)))
    assert float(found.coupling[-1, -2]) > 0.5
    assert "layers are coupled" not in " ".join(repr(found).split())


def test_a_good_step_is_not_called_too_long_and_the_better_one_is_named():
    deep = mlp(*[4] * 5)
    X = torch.randn(6, 4)
    found = diagnose(deep, MSE, (X, torch.randn(6, 4)))
    parts = {"layers": dict(found), "coupling": found.coupling, "outside": found.outside}
    parts |= {"fisher": found.fisher, "N": 6, "compared": 6}
    bad, good = StepComparison(0.1, -3.0, 0.3), StepComparison(0.9, 0.9, 0.95)
    assert "4 layers are coupled" in repr(Diagnosis(**parts))
    assert "layers are coupled" not in repr(Diagnosis(**parts, steps={"KFAC": good}))
    better = Diagnosis(**parts, steps={"KFAC": bad, "EKFAC": good, "gradient": bad})
    assert "EKFAC's direction is better (0.95" in " ".join(repr(better).split())
    neither = Diagnosis(**parts, steps={"KFAC": bad, "EKFAC": bad, "gradient": bad})
    assert "damp more" in " ".join(repr(neither).split())
    assert "sharing" not in repr(neither)


def test_repeated_samples_differ_whatever_the_flavour_draws_from():
    model, data = population(60)
    fisher = MonteCarlo(1, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    state = fisher.generator.get_state()
    norms = set()
    for _ in range(3):
        fisher.generator.set_state(state)
        norms.add(diagnose(model, CE, data, fisher=fisher, subsample=10)["0"].norm.value)
    assert len(norms) == 3


def test_second_derivatives_exist_through_attention():
    class Attention(nn.Module):
        def __init__(self, attend):
            super().__init__()
            self.attend, self.qkv, self.out = attend, nn.Linear(4, 12), nn.Linear(4, 3)

        def forward(self, X):
            q, k, v = self.qkv(X)[:, None].chunk(3, dim=-1)  # one head
            return self.out(self.attend(q, k, v)[:, 0]).mean(1)

    def by_hand(q, k, v):
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v

    fused = Attention(nn.functional.scaled_dot_product_attention)
    plain = Attention(by_hand)
    plain.load_state_dict(fused.state_dict())
    X = torch.randn(5, 3, 4)
    data = X, labels(CE, fused(X))
    found, expected = (
        diagnose(model, CE, data, exact_step=True, damping=Exact(0.1)) for model in (fused, plain)
    )
    assert found.steps["KFAC"].cosine == pytest.approx(expected.steps["KFAC"].cosine, rel=1e-6)
    assert "δ = 0.1" in repr(found)
    for matrix in (ggn, hessian):
        one, other = (matrix(model, CE, data, order="rvec") for model in (fused, plain))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    h = {name: torch.ones_like(p) for name, p in fused.named_parameters()}
    promised = [predicted_decrease(model, CE, data, h) for model in (fused, plain)]
    assert promised[0] == pytest.approx(promised[1], rel=1e-10)


def test_a_random_flavour_says_that_its_errors_hold_noise():
    model, data = population(20)
    for fisher, said in ((MonteCarlo(1), True), (TypeII(), False)):
        assert ("noise of this draw" in repr(diagnose(model, CE, data, fisher=fisher))) == said


def test_bad_options_are_refused_before_any_work():
    model, data = population(6)
    for options, error, said in (
        ({"exact_step": True, "damping": 1e-3}, TypeError, "damping"),
        ({"damping": "x"}, TypeError, "damping"),
        ({"max_memory": "1GiB"}, TypeError, "max_memory"),
        ({"max_memory": math.nan}, ValueError, "max_memory"),
        ({"max_memory": -1}, ValueError, "max_memory"),
        ({"subsample": 4, "generator": 0}, TypeError, "generator"),
        ({"max_memory": 500}, ValueError, r"Use a flavour with fewer vectors"),
    ):
        with pytest.raises(error, match=said):
            diagnose(model, CE, data, **options)
    with pytest.raises(ValueError, match="only once"):
        diagnose(model, CE, iter([data]), exact_step=True)
    half = mlp(4, 6, 3).bfloat16()
    with pytest.raises(NotImplementedError, match="float32"):
        diagnose(half, CE, (data[0].bfloat16(), data[1]), exact_step=True)
    assert diagnose(model, CE, data, subsample=np.int64(4)).compared == 4


def test_figures_that_overflow_are_refused():
    model = nn.Sequential(nn.Linear(4, 3))
    data = 1e90 * torch.randn(6, 4), torch.randn(6, 3)
    for subsample in (None, 4):
        with pytest.raises(ValueError, match=r"'0'.*overflow"):
            diagnose(model, MSE, data, subsample=subsample)
