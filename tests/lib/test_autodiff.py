import pytest
import torch
from truth import relative_error, stack_entries

from kfac_lib.autodiff import ggn, hessian, jacobian, vjp

pytestmark = pytest.mark.usefixtures("float64")
orders = pytest.mark.parametrize("order", ["cvec", "rvec"])


def function(x):
    return torch.stack([x.sin() @ x.T.exp()[:, 0], (x**3).sum(1)])


def scalar(x):
    return function(x).square().sum()


def reorder(matrix, order, rows=None, columns=None):
    """Bring a row-major matrix of derivatives into an order, with index loops."""
    for dim, shape in ((0, rows), (1, columns)):
        if shape is not None:
            index = torch.arange(matrix.shape[dim]).reshape(shape)
            matrix = matrix.index_select(dim, stack_entries(index, order))
    return matrix


@orders
def test_jacobian_is_that_of_torch_func(order):
    x = torch.randn(3, 2, requires_grad=True)
    expected = torch.func.jacrev(function)(x.detach()).reshape(6, 6)
    found = jacobian(function(x), x, order)
    assert relative_error(found, reorder(expected, order, (2, 3), (3, 2))) < 1e-12
    other = "rvec" if order == "cvec" else "cvec"
    assert relative_error(found, reorder(expected, other, (2, 3), (3, 2))) > 0.1


@orders
def test_hessian_is_that_of_torch_func(order):
    x = torch.randn(3, 2, requires_grad=True)
    expected = torch.func.hessian(scalar)(x.detach()).reshape(6, 6)
    found = hessian(scalar(x), x, order)
    assert relative_error(found, reorder(expected, order, (3, 2), (3, 2))) < 1e-12


@orders
def test_mixed_hessian_block_has_rows_of_the_first_tensor(order):
    x, y = torch.randn(3, 2, requires_grad=True), torch.randn(2, 2, requires_grad=True)

    def both(x, y):
        return (x @ y).sin().sum() * y.sum()

    expected = torch.func.jacrev(torch.func.grad(both), argnums=1)(x.detach(), y.detach())
    expected = reorder(expected.reshape(6, 4), order, (3, 2), (2, 2))
    assert relative_error(hessian(both(x, y), x, order, y), expected) < 1e-12


@orders
def test_ggn_leaves_out_the_curvature_of_the_model(order):
    x = torch.randn(3, 2, requires_grad=True)
    J = torch.func.jacrev(function)(x.detach()).reshape(6, 6)
    H = torch.func.hessian(lambda f: f.exp().sum())(function(x.detach())).reshape(6, 6)
    f = function(x)
    loss = f.exp().sum()
    found = ggn(loss, f, x, order)
    assert relative_error(found, reorder(J.T @ H @ J, order, (3, 2), (3, 2))) < 1e-12
    assert relative_error(hessian(loss, x, order), found) > 0.05


def test_vjp_is_the_transposed_jacobian_times_a_vector():
    x, v = torch.randn(3, 2, requires_grad=True), torch.randn(2, 3)
    J = torch.func.jacrev(function)(x.detach())
    (found,) = vjp(function(x), [x], v)
    assert relative_error(found, torch.einsum("ab,abcd->cd", v, J)) < 1e-12


def test_no_dependence_gives_zeros():
    x, z = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    assert jacobian(x * 2, z, "rvec").tolist() == [[0] * 3] * 2
    assert jacobian((x * 2).detach(), z, "rvec").tolist() == [[0] * 3] * 2
    assert vjp(x * 2, [z], torch.ones(2))[0].tolist() == [0] * 3
    assert hessian(x.sum(), x, "rvec").tolist() == [[0] * 2] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    x = torch.randn(3, 2, dtype=dtype, requires_grad=True)
    f = function(x)
    loss = f.square().sum()
    matrices = [jacobian(f, x, "cvec"), hessian(loss, x, "cvec"), ggn(loss, f, x, "cvec")]
    assert {m.dtype for m in matrices} == {dtype}


def test_wrong_shapes_are_named():
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        vjp(x * 2, [x], torch.ones(3))
    with pytest.raises(ValueError, match=r"scalar.*\(2,\).*sum"):
        hessian(x * 2, x, "rvec")
    with pytest.raises(ValueError, match=r"cvec.*rvec"):
        jacobian(x * 2, x, "vec")
