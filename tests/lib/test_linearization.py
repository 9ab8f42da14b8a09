import pytest
import torch
from truth import relative_error

from kfac_lib.autodiff import ggn, hessian
from kfac_lib.linearization import linearize, partially_linearize

pytestmark = pytest.mark.usefixtures("float64")


def inner(x):
    return torch.stack([x[0, 0] * x[1, 0].exp(), x.sin().sum(), x[0, 1] ** 3])


def outer(f):
    return f.exp().sum() + f[0] * f[1]


def test_the_linearization_touches_and_errs_by_the_square_of_the_step():
    anchor, step = torch.randn(2, 2), torch.randn(2, 2)
    line = linearize(inner, anchor)
    assert torch.equal(line(anchor), inner(anchor))
    errors = [(inner(anchor + h * step) - line(anchor + h * step)).norm() for h in (1e-2, 1e-3)]
    assert 95 < errors[0] / errors[1] < 105
    _, expected = torch.func.jvp(inner, (anchor,), (step,))
    assert relative_error(line(anchor + step) - inner(anchor), expected) < 1e-12


def test_it_is_affine_and_differentiable_in_x_alone():
    anchor = torch.randn(2, 2, requires_grad=True)
    line = linearize(inner, anchor)
    x, y = torch.randn(2, 2), torch.randn(2, 2)
    assert relative_error(line(0.3 * x + 0.7 * y), 0.3 * line(x) + 0.7 * line(y)) < 1e-12
    assert not line(x).requires_grad
    expected = torch.func.jacrev(inner)(anchor.detach())
    assert relative_error(torch.func.jacrev(line)(x), expected) < 1e-12


def test_many_points_by_vmap():
    line, points = linearize(inner, torch.randn(2, 2)), torch.randn(5, 2, 2)
    expected = torch.stack([line(point) for point in points])
    assert relative_error(torch.vmap(line)(points), expected) < 1e-14


def test_the_hessian_of_the_partially_linearized_function_is_the_ggn():
    anchor = torch.randn(2, 2)
    partial = partially_linearize(outer, inner, anchor)
    x = anchor.clone().requires_grad_()
    f = inner(x)
    expected = ggn(outer(f), f, x, "rvec")
    assert relative_error(hessian(partial(x), x, "rvec"), expected) < 1e-12
    assert relative_error(hessian(outer(inner(x)), x, "rvec"), expected) > 0.05
    (gradient,) = torch.autograd.grad(partial(x), x)
    (truth,) = torch.autograd.grad(outer(inner(x)), x)
    assert relative_error(gradient, truth) < 1e-12


def test_the_anchor_is_not_changed_and_may_be_changed_afterwards():
    anchor = torch.ones(2, 2)
    line = linearize(inner, anchor)
    before = line(torch.zeros(2, 2))
    anchor.zero_()
    assert torch.equal(line(torch.zeros(2, 2)), before)


def test_it_works_without_grad_mode():
    with torch.no_grad():
        assert torch.equal(
            linearize(inner, torch.ones(2, 2))(torch.ones(2, 2)), inner(torch.ones(2, 2))
        )


def test_bad_input():
    with pytest.raises(TypeError, match=r"anchor has dtype torch.int64"):
        linearize(inner, torch.ones(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(2,\).*\(2, 2\).*vmap"):
        linearize(inner, torch.ones(2, 2))(torch.ones(2))
    with pytest.raises(ValueError, match="requires_grad"):
        linearize(lambda x: torch.ones(2), torch.ones(2))
