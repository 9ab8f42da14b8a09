"""Corner cases: each must be right, or say what to do."""

import pytest
import torch
from torch import nn
from truth import data_for, mlp

from kfac_lib import KFAC, Kronecker, Plain, TypeII, exact_blocks

MSE, CE = nn.MSELoss(), nn.CrossEntropyLoss()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.scale * self.norm(self.fc(x))


def test_the_list_to_paste_leaves_out_no_more_than_it_must():
    net, data = nn.Sequential(Block(), nn.Linear(4, 3)), data_for(MSE, 5)
    with pytest.raises(NotImplementedError) as refused:
        KFAC.compute(net, MSE, data)
    assert 'ignore=["0.scale", "0.norm"]' in str(refused.value)
    assert list(KFAC.compute(net, MSE, data, ignore=["0.scale", "0.norm"])) == ["0.fc", "1"]


def test_a_wide_damped_factor_in_float32_is_inverted():
    net = nn.Sequential(nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 10)).float()
    generator = torch.Generator().manual_seed(0)
    X = torch.rand(512, 784, generator=generator, dtype=torch.float32)
    y = torch.randint(10, (512,), generator=generator)
    K = KFAC.compute(net, CE, (X, y))["0"]
    exact = torch.linalg.inv(K.A.double() + 1e-2 * torch.eye(785, dtype=torch.float64))
    error = torch.linalg.norm(K.inverse(Plain(1e-2)).A.double() - exact)
    assert error < 1e-2 * torch.linalg.norm(exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [3, 99])
def test_a_singular_factor_is_refused(dtype, rank):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rank, 100, generator=generator, dtype=dtype)
    with pytest.raises(ValueError, match="singular"):
        Kronecker(x.T @ x, torch.eye(2, dtype=dtype)).inverse()


def test_eigenvalues_at_zero_give_minus_infinity_and_no_negative_power():
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    eigen = Kronecker(x.T @ x, torch.eye(2, dtype=torch.float64)).eigh()
    zeroed = type(eigen)(eigen.Q_A, eigen.Q_B, eigen.eigenvalues * (eigen.eigenvalues > 1e-9))
    assert zeroed.logdet() == -torch.inf
    with pytest.raises(ValueError, match=r"power -0\.5"):
        zeroed.power(-0.5)


@pytest.mark.parametrize("wrong", ["type-II", TypeII, None])
def test_a_flavour_that_is_none_is_refused(wrong):
    for compute in (KFAC.compute, lambda *a: exact_blocks(*a, order="cvec")):
        with pytest.raises(TypeError, match=r"fisher=.*TypeII\(\)"):
            compute(mlp(4, 3), MSE, data_for(MSE, 2), wrong)


def test_a_sharing_that_is_none_is_refused():
    with pytest.raises(TypeError, match=r"sharing='reduce'.*Expand\(\)"):
        KFAC.compute(mlp(4, 3), MSE, data_for(MSE, 2), sharing="reduce")


@pytest.mark.parametrize("columns", ["full", "minimal"])
def test_one_class_has_no_curvature(columns):
    data = torch.randn(5, 4), torch.zeros(5, dtype=torch.long)
    kfac = KFAC.compute(nn.Linear(4, 1), CE, data, TypeII(columns))
    assert kfac[""].B.abs().max() < 1e-12


def test_an_empty_prediction_is_refused():
    data = torch.randn(5, 0, 4), torch.zeros(5, 0, 3)
    with pytest.raises(ValueError, match="empty"):
        KFAC.compute(nn.Linear(4, 3), MSE, data)
