import pytest
import torch
from truth import relative_error, stack_entries

from kfac_lib.autodiff import ggn, ggnvp, hessian, hvp, jacobian, jvp, vjp
from kfac_lib.flattening import flatten

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
    expected = torch.einsum("ab,abcd->cd", v, J)
    assert relative_error(vjp(function(x), x, v), expected) < 1e-12
    (found,) = vjp(function(x), [x], v)
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    x = torch.randn(3, 2, dtype=dtype, requires_grad=True)
    f = function(x)
    loss = f.square().sum()
    matrices = [jacobian(f, x, "cvec"), hessian(loss, x, "cvec"), ggn(loss, f, x, "cvec")]
    assert {m.dtype for m in matrices} == {dtype}


def two_inputs():
    x, y = torch.randn(3, 2, requires_grad=True), torch.randn(2, 2, requires_grad=True)
    return x, y, torch.randn(3, 2), torch.randn(2, 2)


def bilinear(x, y):
    return (x @ y).sin() * y.sum()


def scalar_of_two(x, y):
    return bilinear(x, y).square().sum()


def test_jvp_is_the_forward_mode_product():
    x, y, v, w = two_inputs()
    f = bilinear(x, y)
    _, expected = torch.func.jvp(lambda x: bilinear(x, y.detach()), (x.detach(),), (v,))
    assert relative_error(jvp(f, x, v), expected) < 1e-12
    _, expected = torch.func.jvp(bilinear, (x.detach(), y.detach()), (v, w))
    assert relative_error(jvp(f, [x, y], [v, w]), expected) < 1e-12


def test_jvp_against_finite_differences():
    x, y, v, _ = two_inputs()
    # central differences err by ε²/6 times the third derivative, and by rounding over ε
    eps = 1e-5
    with torch.no_grad():
        ahead, behind = bilinear(x + eps * v, y), bilinear(x - eps * v, y)
    assert relative_error(jvp(bilinear(x, y), x, v), (ahead - behind) / (2 * eps)) < 1e-8


def test_jvp_of_an_affine_function_and_of_the_input_itself():
    x, _, v, _ = two_inputs()
    assert relative_error(jvp(3 * x + 1, x, v), 3 * v) < 1e-15
    assert torch.equal(jvp(x, x, v), v)


def test_products_are_differentiable_on_request():
    x, _, v, _ = two_inputs()
    f = (x**3).sum()
    pushed = jvp(f, x, v, create_graph=True)
    (found,) = torch.autograd.grad(pushed, x)
    assert relative_error(found, 6 * x * v) < 1e-12
    pulled = vjp(f, x, torch.ones_like(f), create_graph=True)
    (found,) = torch.autograd.grad(pulled, x, v)
    assert relative_error(found, 6 * x * v) < 1e-12
    assert not jvp(f, x, v).requires_grad
    assert not vjp(f, x, torch.ones_like(f)).requires_grad


def test_hvp_is_forward_over_reverse():
    x, _, v, _ = two_inputs()
    _, expected = torch.func.jvp(torch.func.grad(scalar), (x.detach(),), (v,))
    assert relative_error(hvp(scalar(x), x, v), expected) < 1e-12


def test_hvp_over_several_tensors_and_of_mixed_blocks():
    x, y, v, w = two_inputs()
    s = scalar_of_two(x, y)
    gradient = torch.func.grad(scalar_of_two, argnums=(0, 1))
    _, expected = torch.func.jvp(gradient, (x.detach(), y.detach()), (v, w))
    for found, part in zip(hvp(s, [x, y], [v, w]), expected, strict=True):
        assert relative_error(found, part) < 1e-12
    mixed = hessian(s, x, "rvec", y)
    assert relative_error(hvp(s, x, w, y).reshape(-1), mixed @ w.reshape(-1)) < 1e-12
    assert relative_error(hvp(s, y, v, x).reshape(-1), mixed.T @ v.reshape(-1)) < 1e-12
    assert hvp(s, x, w, y).shape == x.shape


@orders
def test_ggn_and_its_mixed_block_and_products_agree(order):
    x, y, v, w = two_inputs()
    f = bilinear(x, y)
    loss = f.exp().sum()
    J_x, J_y = jacobian(f, x, order), jacobian(f, y, order)
    H = hessian(loss, f, order)
    assert relative_error(ggn(loss, f, x, order, y), J_x.T @ H @ J_y) < 1e-14
    column = ggn(loss, f, x, order) @ flatten(v, order)
    assert relative_error(flatten(ggnvp(loss, f, x, v), order), column) < 1e-12
    both = ggnvp(loss, f, [x, y], [v, w])
    column = column + ggn(loss, f, x, order, y) @ flatten(w, order)
    assert relative_error(flatten(both[0], order), column) < 1e-12


def test_vanishing_second_derivatives_are_zeros():
    x, y = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    linear, separate = x.sum(), x.square().sum() + y.square().sum()
    assert hessian(linear, x, "rvec").tolist() == [[0] * 2] * 2
    assert hvp(linear, x, torch.ones(2)).tolist() == [0] * 2
    assert hessian(separate, x, "rvec", y).tolist() == [[0] * 3] * 2
    assert hvp(separate, x, torch.ones(3), y).tolist() == [0] * 2


EACH = {
    "vjp": lambda f, x: vjp(f, x, torch.ones_like(f)),
    "jvp": lambda f, x: jvp(f, x, torch.ones_like(x)),
    "jacobian": lambda f, x: jacobian(f, x, "rvec"),
    "hessian": lambda f, x: hessian(f.sum(), x, "rvec"),
    "hvp": lambda f, x: hvp(f.sum(), x, torch.ones_like(x)),
    "ggn": lambda f, x: ggn(f.square().sum(), f, x, "rvec"),
    "ggnvp": lambda f, x: ggnvp(f.square().sum(), f, x, torch.ones_like(x)),
}
each = pytest.mark.parametrize("derivative", EACH.values(), ids=EACH)


@each
def test_a_tensor_that_is_not_on_the_graph_is_an_error(derivative):
    x, z = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="not on the graph"):
        derivative(x * 2, z)
    with pytest.raises(ValueError, match="not on the graph"):
        derivative(x * 2, x[:1])


@each
def test_a_tensor_without_a_graph_is_an_error(derivative):
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"requires_grad_\(\) before"):
        derivative((x * 2).detach(), x)
    with pytest.raises(ValueError, match=r"requires_grad_\(\) before"):
        derivative(x * 2, torch.ones(2))


@each
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex128])
def test_integer_tensors_have_no_derivatives(derivative, dtype):
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(TypeError, match=f"{dtype}.*floating-point"):
        derivative(x * 2, torch.ones(2).to(dtype))


def test_wrong_shapes_are_named():
    x = torch.ones(2, requires_grad=True)
    for product in [vjp, jvp]:
        with pytest.raises(ValueError, match=r"\(3,\).*\(2,\).*never broadcast"):
            product(x * 2, x, torch.ones(3))
    with pytest.raises(ValueError, match=r"\(1,\).*\(2,\).*never broadcast"):
        hvp((x**2).sum(), x, torch.ones(1))
    with pytest.raises(ValueError, match="1 vectors are given for 2 tensors"):
        jvp(x * 2, [x, x], torch.ones(2))
    with pytest.raises(TypeError, match=r"v has dtype torch.float32.*v.to\(torch.float64\)"):
        jvp(x * 2, x, torch.ones(2, dtype=torch.float32))
    for derivative in [hessian, lambda f, x, order: hvp(f, x, torch.ones(2))]:
        with pytest.raises(ValueError, match=r"scalar.*\(2,\).*sum"):
            derivative(x * 2, x, "rvec")
    with pytest.raises(ValueError, match=r"cvec.*rvec"):
        jacobian(x * 2, x, "vec")
    with pytest.raises(ValueError, match=r"cvec.*rvec"):
        hessian((x * 2).sum(), x, "vec")
