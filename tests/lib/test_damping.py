import pytest
import torch
from truth import relative_error

from kfac_lib import EigenKronecker, Exact, Factored, Kronecker, Plain

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


@deltas
def test_factored_is_the_formula_and_stays_a_kronecker_product(delta):
    K = example()
    inverse = K.inverse(Factored(delta))
    pi = ((K.A.trace() / 4) / (K.B.trace() / 3)) ** 0.5
    A = K.A + pi * delta**0.5 * torch.eye(4)
    B = K.B + delta**0.5 / pi * torch.eye(3)
    assert isinstance(inverse, Kronecker)
    expected = torch.linalg.inv(torch.kron(A, B))
    assert relative_error(inverse.to_dense("cvec"), expected) < 1e-10


@deltas
def test_factored_exceeds_the_damped_product_in_the_loewner_order(delta):
    for _ in range(10):
        K = example()
        exact = K.to_dense("cvec") + delta * torch.eye(12)
        gap = damped_matrix(K, Factored(delta)) - exact
        assert torch.linalg.eigvalsh(gap).min() > -1e-8 * exact.norm()
        assert gap.norm() > 1e-3 * delta


def test_plain_is_the_formula():
    K = example()
    expected = torch.kron(K.A + 0.1 * torch.eye(4), K.B + 0.1 * torch.eye(3))
    assert relative_error(damped_matrix(K, Plain(0.1)), expected) < 1e-10


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


@pytest.mark.parametrize("damping", [Exact, Factored, Plain])
@pytest.mark.parametrize("delta", [0, -1.0, float("nan"), float("inf")])
def test_delta_must_be_positive_and_finite(damping, delta):
    with pytest.raises(ValueError, match=r"delta=.*positive, finite"):
        damping(delta)
