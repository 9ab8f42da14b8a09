"""Conjugate gradients against dense linear algebra; that they are cut short is part of it."""

import pytest
import torch

from kfac_lib.steps import conjugate_gradients

pytestmark = pytest.mark.usefixtures("float64")


def system(D=12):
    source = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(D, D, generator=source))
    M = Q @ torch.diag(torch.logspace(0, 4, D)) @ Q.T
    b = torch.randn(D, generator=source)
    return M, b


def solved(M, b, **options):
    def product(v):
        Mv = M @ torch.cat(v)
        return Mv[:5], Mv[5:]

    return torch.cat(conjugate_gradients(product, (b[:5], b[5:]), **options))


def test_conjugate_gradients_solve_the_system():
    M, b = system()
    x = solved(M, b, tolerance=1e-10)
    assert (M @ x - b).norm() <= 1e-10 * b.norm()


@pytest.mark.parametrize("most", [1, 3, 6])
def test_cut_short_they_minimize_over_the_krylov_space(most):
    """After k products: the minimum of ½xᵀMx − bᵀx over the span of b, Mb, …, M^{k−1}b."""
    M, b = system()
    powers = [b]
    for _ in range(most - 1):
        powers.append(M @ powers[-1] / powers[-1].norm())
    basis, _ = torch.linalg.qr(torch.stack(powers, dim=1))
    expected = basis @ torch.linalg.solve(basis.T @ M @ basis, basis.T @ b)
    x = solved(M, b, tolerance=1e-12, most=most, truncate=True)
    assert torch.allclose(x, expected, rtol=1e-8, atol=1e-10)
    assert b @ x > 0


def test_without_leave_to_stop_they_say_how_far_they_are():
    M, b = system()
    with pytest.raises(ValueError, match=r"within 3 products; they are at .*more damping"):
        solved(M, b, most=3)
