"""Damped inverses against their definitions, and a δ that adapts."""

import pytest
import torch
from torch import nn
from truth import data_for, mlp, relative_error

from kfac_lib import KFAC, EigenKronecker, Exact, Factored, Kronecker, LevenbergMarquardt, Plain

pytestmark = pytest.mark.usefixtures("float64")
orders = pytest.mark.parametrize("order", ["cvec", "rvec"])
deltas = pytest.mark.parametrize("delta", [1e-4, 0.1, 3.0])


def psd(size, rank):
    root = torch.randn(size, rank)
    return root @ root.T


def example():
    """Factors of different scale, one of them singular."""
    return Kronecker(7.0 * psd(4, 2), 0.02 * psd(3, 3))


def damped_matrix(K, damping, order="cvec"):
    return torch.linalg.inv(K.inverse(damping).to_dense(order))


@orders
@deltas
def test_exact_is_the_inverse_of_the_dense_sum(order, delta):
    K = example()
    inverse = K.inverse(Exact(delta))
    expected = torch.linalg.inv(K.to_dense(order) + delta * torch.eye(12))
    assert isinstance(inverse, EigenKronecker)
    assert relative_error(inverse.to_dense(order), expected) < 1e-10
    assert relative_error(K.inverse(Exact(2 * delta)).to_dense(order), expected) > 0.1


def dense(A, B, order):
    return torch.kron(A, B) if order == "cvec" else torch.kron(B, A)


@orders
@deltas
def test_factored_is_the_formula_and_stays_a_kronecker_product(order, delta):
    K = example()
    inverse = K.inverse(Factored(delta))
    pi = ((K.A.trace() / 4) / (K.B.trace() / 3)) ** 0.5
    A = K.A + pi * delta**0.5 * torch.eye(4)
    B = K.B + delta**0.5 / pi * torch.eye(3)
    assert isinstance(inverse, Kronecker)
    expected = torch.linalg.inv(dense(A, B, order))
    assert relative_error(inverse.to_dense(order), expected) < 1e-10


@deltas
def test_factored_exceeds_the_damped_product_in_the_loewner_order(delta):
    for _ in range(10):
        K = example()
        exact = K.to_dense("cvec") + delta * torch.eye(12)
        gap = damped_matrix(K, Factored(delta)) - exact
        assert torch.linalg.eigvalsh(gap).min() > -1e-8 * exact.norm()
        assert gap.norm() > 1e-3 * delta


@orders
@deltas
def test_plain_is_the_formula(order, delta):
    K = example()
    expected = dense(K.A + delta * torch.eye(4), K.B + delta * torch.eye(3), order)
    assert relative_error(damped_matrix(K, Plain(delta), order), expected) < 1e-10


def test_plain_under_damps_small_factors():
    K = Kronecker(0.01 * torch.eye(2), 0.01 * torch.eye(2))
    exact = K.to_dense("cvec") + 0.1 * torch.eye(4)
    assert torch.linalg.eigvalsh(damped_matrix(K, Plain(0.1)) - exact).max() < -0.05


@pytest.mark.parametrize(("damping", "same"), [(Exact, True), (Factored, True), (Plain, False)])
def test_only_plain_depends_on_where_the_reduction_factor_sits(damping, same):
    K = example()
    moved = Kronecker(K.A / 50, K.B * 50)
    found = relative_error(damped_matrix(moved, damping(0.1)), damped_matrix(K, damping(0.1)))
    assert found < 1e-9 if same else found > 0.05


def test_factored_with_a_zero_factor_uses_pi_one():
    for A, B in ((psd(4, 4), torch.zeros(3, 3)), (torch.zeros(4, 4), psd(3, 3))):
        expected = torch.kron(A + 0.5 * torch.eye(4), B + 0.5 * torch.eye(3))
        assert relative_error(damped_matrix(Kronecker(A, B), Factored(0.25)), expected) < 1e-10


@pytest.mark.parametrize("damping", [Exact, Factored, Plain])
def test_dtype_is_kept(damping):
    K = Kronecker(psd(4, 4).float(), psd(3, 3).float())
    assert K.inverse(damping(0.1)).to_dense("cvec").dtype == torch.float32


FORMS = [Exact, Factored, Plain]
forms = pytest.mark.parametrize("form", FORMS)


@forms
@pytest.mark.parametrize("delta", [-1.0, float("nan"), float("inf"), "1", None])
def test_delta_must_be_finite_and_not_negative(form, delta):
    with pytest.raises(ValueError, match=r"delta=.*finite number, zero or more"):
        form(delta)


@forms
@orders
def test_no_damping_is_the_plain_inverse_where_there_is_one(form, order):
    K = Kronecker(psd(4, 4) + torch.eye(4), psd(3, 3) + torch.eye(3))
    expected = torch.linalg.inv(K.to_dense(order))
    assert relative_error(K.inverse(form(0)).to_dense(order), expected) < 1e-10


def test_no_damping_of_a_product_worse_conditioned_than_either_factor():
    K = Kronecker(torch.tensor([1.0, 1e-10]).diag(), torch.tensor([1.0, 1e-10]).diag())
    found = K.inverse(Exact(0)).to_dense("cvec").diagonal()
    assert relative_error(found, torch.tensor([1.0, 1e10, 1e10, 1e20])) < 1e-10


@forms
@pytest.mark.parametrize("singular", ["A", "B"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_damping_of_a_singular_factor_is_refused_and_the_factor_named(form, singular, dtype):
    for _ in range(10):
        factors = {"A": psd(4, 4) + torch.eye(4), "B": psd(3, 3) + torch.eye(3)}
        factors[singular] = psd(5, 2)
        K = Kronecker(**{name: factor.to(dtype) for name, factor in factors.items()})
        with pytest.raises(ValueError, match=rf"Factor {singular} of shape.*singular.*[Dd]amp"):
            K.inverse(form(0))


def test_damping_that_vanishes_in_the_dtype_of_the_factors_is_none():
    K = Kronecker(psd(4, 2).float(), psd(3, 3).float())
    with pytest.raises(ValueError, match=r"Factor A.*singular"):
        K.inverse(Exact(1e-50))


def test_a_negative_eigenvalue_in_the_eigenbasis_is_refused_without_damping():
    free = EigenKronecker(torch.eye(2), torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    with pytest.raises(ValueError, match=r"eigenvalue.*not positive.*[Dd]amp"):
        Exact(0).inverse(free)
    assert Exact(1.0).inverse(free).eigenvalues.tolist() == [[0.5, 1.0], [0.5, 0.5]]


@forms
@pytest.mark.parametrize("name", ["A", "B"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_factors_that_hold_nan_or_inf_are_refused_and_named(form, name, bad):
    factors = {"A": psd(4, 4), "B": psd(3, 3)}
    factors[name][0, 1] = bad
    with pytest.raises(ValueError, match=rf"Factor {name} of shape.*NaN or inf"):
        Kronecker(**factors).inverse(form(0.1))


def test_a_decomposed_element_is_damped_without_another_decomposition(monkeypatch):
    K = example()
    eigen = K.eigh()
    monkeypatch.setattr(torch.linalg, "eigh", None)
    expected = torch.linalg.inv(K.to_dense("cvec") + 0.3 * torch.eye(12))
    assert relative_error(Exact(0.3).inverse(eigen).to_dense("cvec"), expected) < 1e-10


def test_factors_far_apart_in_scale_have_a_finite_pi():
    K = Kronecker(1e30 * torch.eye(2), 1e-30 * torch.eye(2))
    K = Kronecker(K.A.float(), K.B.float())
    expected = Kronecker(torch.eye(2).float(), torch.eye(2).float()).inverse(Factored(0.1))
    found = K.inverse(Factored(0.1))
    assert relative_error(found.to_dense("cvec"), expected.to_dense("cvec")) < 1e-5


@forms
def test_kfac_names_the_layer_whose_factor_has_no_inverse(form):
    net, (X, y) = mlp(4, 3), data_for(nn.MSELoss(), 9)
    X[:, 2] = 0
    kfac = KFAC.compute(net, nn.MSELoss(), (X, y))
    with pytest.raises(ValueError, match=r"Layer '0': Factor A of shape \(5, 5\) is singular"):
        kfac.precondition({"0": torch.ones(3, 5)}, form(0))


# A δ that adapts


def adaptive(delta=0.1, **options):
    return LevenbergMarquardt(Exact(delta), **{"factor": 2.0, **options})


@forms
def test_adaptive_damping_stands_wherever_a_damping_stands(form):
    K, damping = example(), LevenbergMarquardt(form(0.1), factor=2.0)
    assert damping.delta == 0.1
    assert torch.equal(K.inverse(damping).to_dense("cvec"), K.inverse(form(0.1)).to_dense("cvec"))
    damping.update(0.0, 1.0)
    assert torch.equal(K.inverse(damping).to_dense("cvec"), K.inverse(form(0.2)).to_dense("cvec"))


@pytest.mark.parametrize(
    ("ratio", "delta"),
    [(-3.0, 0.2), (0.0, 0.2), (0.24, 0.2), (0.25, 0.1), (0.5, 0.1), (0.75, 0.1), (0.76, 0.05),
     (1.0, 0.05), (30.0, 0.05)],
)  # fmt: skip
@pytest.mark.parametrize("predicted", [0.5, 4.0])
def test_a_low_ratio_multiplies_delta_and_a_high_one_divides_it(ratio, delta, predicted):
    damping = adaptive()
    assert damping.update(ratio * predicted, predicted) == delta == damping.delta
    loss = torch.tensor(ratio * predicted, requires_grad=True)
    assert adaptive().update(loss, torch.tensor(predicted)) == delta


@pytest.mark.parametrize("predicted", [0.0, -1.0, float("nan"), float("inf"), -float("inf")])
def test_a_prediction_that_is_no_decrease_counts_as_a_bad_step(predicted):
    for actual in (1.0, -1.0, 0.0):
        assert adaptive().update(actual, predicted) == 0.2


@pytest.mark.parametrize("actual", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_counts_as_a_bad_step(actual):
    assert adaptive().update(actual, 1.0) == 0.2


def test_delta_stays_within_its_bounds():
    damping = adaptive(minimum=0.04, maximum=0.3)
    assert [damping.update(0, 1) for _ in range(3)] == [0.2, 0.3, 0.3]
    assert [damping.update(1, 1) for _ in range(4)] == [0.15, 0.075, 0.04, 0.04]


def test_the_thresholds_are_the_callers():
    damping = adaptive(lower=0.5, upper=0.9)
    assert [damping.update(r, 1) for r in (0.4, 0.8, 0.95)] == [0.2, 0.2, 0.1]


def test_adaptive_damping_saves_and_loads_its_delta():
    damping, fresh = adaptive(), adaptive(3.0)
    damping.update(0, 1)
    fresh.load_state_dict(damping.state_dict())
    assert fresh.delta == 0.2
    assert "0.2" in repr(fresh)
    with pytest.raises(ValueError, match=r"Exact.*Factored"):
        LevenbergMarquardt(Factored(0.1)).load_state_dict(damping.state_dict())
    with pytest.raises(ValueError, match=r"delta=0\.2.*0\.01.*0\.1"):
        adaptive(minimum=0.01, maximum=0.1).load_state_dict(damping.state_dict())
    with pytest.raises(ValueError, match=r"state.*'delta'.*LevenbergMarquardt"):
        fresh.load_state_dict({})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"factor": 1.0}, r"factor=1\.0.*greater than 1"),
        ({"factor": float("nan")}, r"factor=nan"),
        ({"factor": float("inf")}, r"factor=inf"),
        ({"lower": 0.8}, r"lower=0\.8, upper=0\.75.*0 ≤ lower < upper"),
        ({"lower": -0.1}, r"lower=-0\.1"),
        ({"upper": float("nan")}, r"upper=nan"),
        ({"minimum": 0.0}, r"minimum=0\.0.*0 < minimum"),
        ({"minimum": 0.2}, r"delta=0\.1.*minimum=0\.2"),
        ({"maximum": 0.05}, r"delta=0\.1.*maximum=0\.05"),
        ({"maximum": float("inf")}, r"maximum=inf"),
        ({"delta": 0}, r"delta=0.*minimum"),
    ],
    ids=str,
)
def test_options_of_adaptive_damping_that_do_not_fit(options, words):
    with pytest.raises(ValueError, match=words):
        adaptive(**options)


@pytest.mark.parametrize("form", [0.1, Exact, None, LevenbergMarquardt(Exact(0.1))], ids=str)
def test_adaptive_damping_needs_a_form(form):
    with pytest.raises(TypeError, match=r"damping=.*Exact\(delta\), Factored\(delta\) or Plain"):
        LevenbergMarquardt(form)
