import pytest
import torch
from truth import relative_error, stack_entries

from kfac_lib import EigenKronecker, Exact, Factored, Kronecker, Plain

pytestmark = pytest.mark.usefixtures("float64")
orders = pytest.mark.parametrize("order", ["cvec", "rvec"])


def spd(size):
    root = torch.randn(size, size)
    return root @ root.T + 0.3 * torch.eye(size)


@pytest.fixture
def K(float64):
    return Kronecker(A=spd(4), B=spd(3))


@pytest.fixture(params=["product", "free eigenvalues"])
def element(request, K):
    if request.param == "product":
        return K
    return EigenKronecker(K.eigh().Q_A, K.eigh().Q_B, 0.5 + torch.rand(3, 4))


def dense(K, order):
    """The matrix by what it does to each unit matrix, entry by entry: U → B U Aᵀ."""
    units = torch.eye(12).reshape(12, 3, 4)
    columns = {tuple(map(int, unit.nonzero()[0])): K.B @ unit @ K.A.T for unit in units}
    index = stack_entries(torch.arange(12).reshape(3, 4), order)
    places = [(int(i) // 4, int(i) % 4) for i in index]
    return torch.stack([stack_entries(columns[place], order) for place in places], dim=1)


@orders
def test_dense_form_is_the_map_on_the_flattened_weight(K, order):
    assert relative_error(K.to_dense(order), dense(K, order)) < 1e-12
    other = "rvec" if order == "cvec" else "cvec"
    assert relative_error(K.to_dense(order), dense(K, other)) > 0.1


@orders
def test_matmul_is_the_dense_matrix_on_the_vector(element, order):
    U = torch.randn(3, 4)
    expected = element.to_dense(order) @ stack_entries(U, order)
    assert relative_error(stack_entries(element @ U, order), expected) < 1e-12
    assert torch.allclose((element @ torch.stack([U, 2 * U]))[1], 2 * (element @ U))


@orders
def test_inverse_power_and_eigh_agree_with_dense_algebra(element, order):
    matrix = element.to_dense(order)
    assert relative_error(element.inverse().to_dense(order), torch.linalg.inv(matrix)) < 1e-10
    eigenvalues, Q = torch.linalg.eigh(matrix)
    for exponent in (-0.5, 0.5, 2.0):
        expected = Q @ torch.diag(eigenvalues**exponent) @ Q.T
        assert relative_error(element.power(exponent).to_dense(order), expected) < 1e-10


def test_trace_logdet_and_norm_agree_with_dense_algebra(element):
    matrix = element.to_dense("cvec")
    assert relative_error(element.trace(), matrix.trace()) < 1e-12
    assert relative_error(element.logdet(), torch.linalg.slogdet(matrix)[1]) < 1e-12
    assert relative_error(element.norm(), torch.linalg.matrix_norm(matrix)) < 1e-12


@orders
def test_eigh_is_another_form_of_the_same_matrix(K, order):
    assert relative_error(K.eigh().to_dense(order), K.to_dense(order)) < 1e-12


def test_a_number_times_the_product_scales_the_matrix_once(K):
    for scaled in (2.5 * K, K * 2.5):
        assert relative_error(scaled.to_dense("rvec"), 2.5 * K.to_dense("rvec")) < 1e-12


def test_shape_is_that_of_the_weight(element):
    assert element.shape == (3, 4)


def test_logdet_of_a_singular_product_is_minus_infinity(K):
    assert Kronecker(torch.zeros(4, 4), K.B).logdet() == -torch.inf


@pytest.mark.parametrize("which", ["A", "B"])
def test_a_singular_factor_has_no_inverse_and_the_message_says_damp(K, which):
    v = torch.randn(4 if which == "A" else 3)
    singular = {"A": K.A, "B": K.B, which: torch.outer(v, v)}
    with pytest.raises(ValueError, match=rf"Factor {which}.*singular.*Damp"):
        Kronecker(**singular).inverse()
    with pytest.raises(ValueError, match=r"no inverse.*Damp"):
        Kronecker(**{**singular, which: torch.zeros(len(v), len(v))}).eigh().inverse()
    for damping in (Exact(0.1), Factored(0.1), Plain(0.1)):
        assert torch.isfinite(Kronecker(**singular).inverse(damping).to_dense("cvec")).all()


@pytest.mark.parametrize("which", ["A", "B"])
def test_a_factor_whose_pivots_end_at_rounding_is_singular_though_it_has_a_root(which):
    # Cholesky's pivots are 1 and the root of the entry; rounding of four rows is 2⁻⁵⁰.
    at_rounding, above = (torch.diag(torch.tensor([1, 1, 1, 2.0**e])) for e in (-50, -48))
    assert torch.linalg.cholesky_ex(at_rounding).info == 0
    other = {"A": torch.eye(2), "B": torch.eye(2)}
    with pytest.raises(ValueError, match=rf"Factor {which}.*singular to machine precision"):
        Kronecker(**{**other, which: at_rounding}).inverse()
    inverse = Kronecker(**{**other, which: above}).inverse()
    assert getattr(inverse, which).diagonal().tolist() == [1, 1, 1, 2.0**48]


def test_the_power_zero_is_the_identity_also_where_singular():
    E = EigenKronecker(torch.eye(2), torch.eye(1), torch.tensor([[4.0, 0.0]]))
    assert E.power(0).eigenvalues.tolist() == [[1, 1]]


def test_rounding_below_zero_counts_as_zero():
    E = EigenKronecker(torch.eye(2), torch.eye(1), torch.tensor([[4.0, -1e-17]]))
    assert E.power(0.5).eigenvalues.tolist() == [[2.0, 0.0]]


def test_shapes_and_dtypes_that_do_not_fit_are_named(K):
    with pytest.raises(ValueError, match=r"A has shape \(2, 3\).*square"):
        Kronecker(torch.ones(2, 3), torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"float32.*float64.*one dtype"):
        Kronecker(torch.ones(2, 2).float(), torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(1, 2\)"):
        EigenKronecker(torch.eye(2), torch.eye(1), torch.ones(2, 2))
    for element in (K, K.eigh()):
        with pytest.raises(ValueError, match=r"\(4, 3\).*3, 4.*joint bias"):
            element @ torch.ones(4, 3)
        with pytest.raises(ValueError, match=r"cvec.*rvec"):
            element.to_dense("vec")


def test_a_factor_that_fails_in_single_precision_is_decomposed_in_double(monkeypatch):
    original = torch.linalg.eigh

    def fails(factor):
        if factor.dtype == torch.float32:
            raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")
        return original(factor)

    root = torch.randn(5, 3, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    K = Kronecker(root @ root.T, root.T @ root)
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    eigen = K.eigh()
    assert eigen.Q_A.dtype == eigen.eigenvalues.dtype == torch.float32
    found, wanted = eigen.to_dense("cvec"), K.to_dense("cvec")
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.norm()))
