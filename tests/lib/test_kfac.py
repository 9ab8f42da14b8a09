"""Constants, batches, options and the algebra over all layers."""

import pytest
import torch
from torch import nn
from truth import To, data_for, mlp, reduction_factor, relative_error

from kfac_lib import (
    KFAC,
    Empirical,
    Exact,
    Expand,
    Factored,
    InputOnly,
    MonteCarlo,
    Plain,
    Reduce,
    TypeII,
)
from kfac_lib.losses import CrossEntropy, SquaredError, criterion_of

pytestmark = pytest.mark.usefixtures("float64")
KINDS = (nn.MSELoss, nn.CrossEntropyLoss)
losses = pytest.mark.parametrize(
    "loss", [kind(reduction=r) for kind in KINDS for r in ("mean", "sum")], ids=range(4)
)
sharings = pytest.mark.parametrize("sharing", [Expand(), Reduce()], ids=repr)
FLAVOURS = [TypeII(), TypeII("minimal"), MonteCarlo(2), Empirical()]


def shared_net():
    return nn.Sequential(
        nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3), To(lambda z: z.movedim(-1, 1))
    )


def same(first, second, tolerance=1e-12):
    assert list(first) == list(second)
    for name in first:
        assert relative_error(first[name].A, second[name].A) < tolerance
        assert relative_error(first[name].B, second[name].B) < tolerance
    return True


def naive_factors(net, loss, data, fisher, sharing):
    """A and B by loops over data, positions and vectors, as the table of constants says."""
    X, y = data
    inputs, outputs = {}, {}
    x = X
    for name, layer in net.named_children():
        inputs[name], x = x, layer(x)
        outputs[name] = x
    vectors = fisher.vectors(criterion_of(loss), x, y)
    R, N, S = reduction_factor(loss, x, y), len(X), X[0, ..., 0].numel()
    result = {}
    for name in ("0", "2"):
        rows = inputs[name].detach().reshape(N, S, -1)
        rows = torch.cat([rows, torch.ones(N, S, 1)], 2)
        A, B = 0, 0
        for n in range(N):
            if sharing == Expand():
                A += R * sum(torch.outer(rows[n, s], rows[n, s]) for s in range(S))
            else:
                A += R * torch.outer(rows[n].sum(0), rows[n].sum(0))
        for v in vectors:
            (g,) = torch.autograd.grad(x, outputs[name], v, retain_graph=True)
            g = g.reshape(N, S, -1)
            for n in range(N):
                if sharing == Expand():
                    B += sum(torch.outer(g[n, s], g[n, s]) for s in range(S)) / (N * S)
                else:
                    B += torch.outer(g[n].sum(0), g[n].sum(0)) / (N * S**2)
        result[name] = A, B
    return result


@losses
@sharings
@pytest.mark.parametrize("fisher", FLAVOURS, ids=repr)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=["S=1", "S=3", "S=2x3"])
def test_factors_are_those_of_the_table_of_constants(loss, sharing, fisher, shape):
    net, data = shared_net(), data_for(loss, 3, *shape)
    torch.manual_seed(1)
    expected = naive_factors(net, loss, data, fisher, sharing)
    torch.manual_seed(1)
    found = KFAC.compute(net, loss, data, fisher, sharing)
    for name, (A, B) in expected.items():
        assert relative_error(found[name].A, A) < 1e-10
        assert relative_error(found[name].B, B) < 1e-10


@losses
@sharings
@pytest.mark.parametrize("shape", [(), (3,)], ids=["S=1", "S=3"])
def test_batches_of_unequal_size_are_one_big_batch(loss, sharing, shape):
    net, (X, y) = shared_net(), data_for(loss, 7, *shape)
    batches = [(X[:1], y[:1]), (X[1:3], y[1:3]), (X[3:], y[3:])]
    for fisher in (TypeII(), Empirical()):
        one = KFAC.compute(net, loss, (X, y), fisher, sharing)
        same(KFAC.compute(net, loss, batches, fisher, sharing), one)
        same(KFAC.compute(net, loss, iter(batches), fisher, sharing, chunk_size=2), one)
    each = [KFAC.compute(net, loss, batch, Empirical(), sharing) for batch in batches]
    averaged = sum(kfac["0"].B for kfac in each) / 3
    assert relative_error(averaged, one["0"].B) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_the_data_twice_are_the_same_under_mean_and_doubled_under_sum(kind):
    for reduction, factor in (("mean", 1), ("sum", 2)):
        loss = kind(reduction=reduction)
        net, (X, y) = mlp(4, 2, 3), data_for(loss, 5)
        once, twice = (KFAC.compute(net, loss, data) for data in ((X, y), [(X, y), (X, y)]))
        for name in once:
            assert relative_error(twice[name].A, factor * once[name].A) < 1e-12
            assert relative_error(twice[name].B, once[name].B) < 1e-12


@pytest.mark.parametrize(
    ("kind", "ratio"), [(nn.MSELoss, 5 * 3 * 2), (nn.CrossEntropyLoss, 5 * 2)], ids=["MSE", "CE"]
)
def test_sum_is_mean_times_the_denominator_of_the_mean_and_only_in_A(kind, ratio):
    net, data = shared_net(), data_for(kind(), 5, 2)
    mean, total = (KFAC.compute(net, kind(reduction=r), data) for r in ("mean", "sum"))
    for name in mean:
        assert relative_error(total[name].A, ratio * mean[name].A) < 1e-12
        assert relative_error(total[name].B, mean[name].B) < 1e-12


@pytest.mark.parametrize("base", [SquaredError, CrossEntropy])
def test_a_weight_of_the_loss_multiplies_kfac(base):
    class Weighted(base):
        def reduction_factor(self, denominator):
            return 0.3 * super().reduction_factor(denominator)

    loss = nn.MSELoss() if base is SquaredError else nn.CrossEntropyLoss()
    net, data = mlp(4, 2, 3), data_for(loss, 5)
    weighted, plain = (KFAC.compute(net, c, data) for c in (Weighted("mean"), loss))
    expected = 0.3 * plain.to_dense("rvec")
    assert relative_error(weighted.to_dense("rvec"), expected) < 1e-12


@pytest.mark.parametrize("fisher", FLAVOURS, ids=repr)
def test_chunks_change_nothing(fisher):
    loss = nn.CrossEntropyLoss()
    net, data = shared_net(), data_for(loss, 4, 2)
    factors = []
    for chunk_size in (None, 1, 2, 5, 100):
        torch.manual_seed(1)
        factors.append(KFAC.compute(net, loss, data, fisher, chunk_size=chunk_size))
    assert all(same(other, factors[0]) for other in factors[1:])


@sharings
def test_separate_bias_cuts_the_joint_factor_and_drops_the_coupling(sharing):
    loss = nn.MSELoss()
    net, data = shared_net(), data_for(loss, 5, 3)
    joint, apart = (
        KFAC.compute(net, loss, data, sharing=sharing, bias=b) for b in ("joint", "separate")
    )
    R = 2 / (5 * 3 * 3)
    for name in joint:
        A, B = joint[name].A, joint[name].B
        assert torch.equal(apart[f"{name}.weight"].A, A[:-1, :-1])
        corner = R * 5 * (3 if sharing == Expand() else 9)
        assert abs(float(apart[f"{name}.bias"].A) - corner) < 1e-12
        assert torch.equal(apart[f"{name}.weight"].B, B)
        assert torch.equal(apart[f"{name}.bias"].B, B)


def test_without_a_bias_separate_factors_are_those_of_the_weight_alone():
    net, data = mlp(4, 2, 3, bias=False), data_for(nn.MSELoss(), 5)
    joint, apart = (KFAC.compute(net, nn.MSELoss(), data, bias=b) for b in ("joint", "separate"))
    assert list(apart) == ["0.weight", "2.weight"]
    for name, K in joint.items():
        assert K.A.shape == (net[int(name)].in_features,) * 2
        assert torch.equal(apart[f"{name}.weight"].A, K.A)
        assert torch.equal(apart[f"{name}.weight"].B, K.B)


def test_a_root_layer_has_the_empty_name():
    net, data = nn.Linear(4, 3), data_for(nn.MSELoss(), 5)
    assert list(KFAC.compute(net, nn.MSELoss(), data)) == [""]
    assert list(KFAC.compute(net, nn.MSELoss(), data, bias="separate")) == ["weight", "bias"]
    assert list(KFAC.compute(nn.Sequential(net), nn.MSELoss(), data, layers="0")) == ["0"]


def test_dense_trace_and_logdet_are_over_all_layers():
    loss = nn.MSELoss()
    net, data = mlp(2, 2, 3, activation="sigmoid"), data_for(loss, 9, D_in=2)
    kfac = KFAC.compute(net, loss, data)
    for order in ("cvec", "rvec"):
        dense = kfac.to_dense(order)
        assert torch.equal(dense[:6, :6], kfac["0"].to_dense(order))
        assert torch.equal(dense[6:, 6:], kfac["2"].to_dense(order))
        assert dense[:6, 6:].norm() == 0
    assert relative_error(kfac.trace(), dense.trace()) < 1e-12
    assert relative_error(kfac.logdet(), torch.linalg.slogdet(dense)[1]) < 1e-8


@pytest.mark.parametrize("damping", [Exact(0.1), Factored(0.1), Plain(0.1)], ids=repr)
def test_precondition_applies_every_damped_inverse(damping):
    loss = nn.CrossEntropyLoss()
    kfac = KFAC.compute(mlp(4, 2, 3), loss, data_for(loss, 5))
    gradients = {name: torch.randn(K.shape) for name, K in kfac.items()}
    found = kfac.precondition(gradients, damping)
    for name, K in kfac.items():
        dense = K.inverse(damping).to_dense("rvec")
        assert relative_error(found[name].flatten(), dense @ gradients[name].flatten()) < 1e-10
    with pytest.raises(ValueError, match=r"\['0'\].*\['0', '2'\]"):
        kfac.precondition({"0": gradients["0"]}, damping)
    with pytest.raises(ValueError, match="joint bias"):
        kfac.precondition({**gradients, "2": gradients["0"]}, damping)


def test_repr_names_flavour_shapes_frozen_and_ignored():
    net, data = mlp(4, 2, 3, 3), data_for(nn.MSELoss(), 5)
    net[0].requires_grad_(False)
    text = repr(KFAC.compute(net, nn.MSELoss(), data, Empirical(), ignore="2.bias"))
    assert text.splitlines() == [
        "KFAC(Empirical(), Expand())",
        "  2: A (2, 2), B (3, 3)",
        "  4: A (4, 4), B (3, 3)",
        "  frozen: 0.weight, 0.bias",
        "  ignored: 2.bias",
    ]
    root = repr(KFAC.compute(nn.Linear(4, 3), nn.MSELoss(), data_for(nn.MSELoss(), 5)))
    assert root.splitlines()[1:] == [
        "  (root): A (5, 5), B (3, 3)", "  frozen: none", "  ignored: none"
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_that_of_the_model(dtype):
    net, (X, y) = mlp(4, 2, 3).to(dtype), data_for(nn.MSELoss(), 5)
    kfac = KFAC.compute(net, nn.MSELoss(), (X.to(dtype), y.to(dtype)))
    assert {factor.dtype for K in kfac.values() for factor in (K.A, K.B)} == {dtype}


@pytest.mark.parametrize("sharing", [Expand(), Reduce()], ids=repr)
def test_input_only_has_the_same_A_the_identity_as_B_and_no_backward_pass(sharing, monkeypatch):
    model = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3))
    data = [(torch.randn(N, 2, 4), torch.randn(N, 2, 3)) for N in (3, 5)]
    expected = KFAC.compute(model, nn.MSELoss(), data, sharing=sharing)
    monkeypatch.setattr(torch.autograd, "grad", None)
    found = KFAC.compute(model, nn.MSELoss(), data, InputOnly(), sharing)
    for name, K in expected.items():
        assert relative_error(found[name].A, K.A) < 1e-14
        assert torch.equal(found[name].B, torch.eye(len(K.B)))
        assert found[name].B.dtype == K.B.dtype
