from math import ceil

import pytest
import torch
from torch import nn
from truth import To, data_for, mlp, relative_error

from kfac_lib import KFAC, Empirical, Expand, MonteCarlo, Reduce, TypeII, exact_blocks
from kfac_lib.capture import Hooks
from kfac_lib.layers import input_rows, output_rows
from kfac_lib.losses import criterion_of
from kfac_lib.stream import batches, stream

pytestmark = pytest.mark.usefixtures("float64")
MSE = nn.MSELoss()


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize(
    ("fisher", "V"),
    [(TypeII(), 6), (TypeII("minimal"), 4), (MonteCarlo(5), 5), (Empirical(), 1)],
    ids=repr,
)
def test_a_batch_costs_v_over_chunk_size_calls_of_autograd(calls, chunk_size, fisher, V):
    net = nn.Sequential(mlp(4, 3, 3), To(lambda z: z.movedim(-1, 1)))
    X, y = data_for(nn.CrossEntropyLoss(), 5, 2)
    two = [(X, y), (X[:2], y[:2])]
    KFAC.compute(net, nn.CrossEntropyLoss(), two, fisher, chunk_size=chunk_size)
    assert len(calls) == 2 * ceil(V / (chunk_size or V))
    # With no chunk size the library is free to take another root of the same Hessian.
    assert sum(calls) == 2 * (4 if fisher == TypeII() and chunk_size is None else V)


class NoBatchingRule(torch.autograd.Function):
    """x², with a backward pass that looks at a value, which vmap cannot."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g if g.abs().sum().item() >= 0 else g


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_without_a_batching_rule_vectors_go_one_by_one_with_the_same_result(calls, chunk_size):
    net, data = mlp(4, 2, 3), data_for(MSE, 5)
    with_rule = nn.Sequential(net[0], To(lambda z: z**2), net[2])
    without = nn.Sequential(net[0], To(NoBatchingRule.apply), net[2])
    for compute in (
        lambda net: KFAC.compute(net, MSE, data, chunk_size=chunk_size).to_dense("cvec"),
        lambda net: exact_blocks(net, MSE, data, order="cvec", chunk_size=chunk_size)["0"],
    ):
        expected = compute(with_rule)
        calls.clear()
        assert relative_error(compute(without), expected) < 1e-12
        assert calls.count(1) >= 3


def test_an_error_of_the_models_own_backward_is_not_swallowed():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, g):
            raise RuntimeError("broken on purpose")

    net = nn.Sequential(nn.Linear(4, 3), To(Broken.apply))
    with pytest.raises(RuntimeError, match="broken on purpose"):
        KFAC.compute(net, MSE, data_for(MSE, 5))


@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (1, 2, 2)])
def test_linear_rows_keep_the_datum_and_merge_the_shared_axes(shape):
    layer = nn.Linear(4, 3)
    x, g = torch.randn(5, *shape, 4), torch.randn(7, 5, *shape, 3)
    rows_x, rows_g = input_rows(layer, x), output_rows(layer, g)
    S = torch.Size(shape).numel()
    assert (rows_x.shape, rows_g.shape) == ((5, S, 4), (7, 5, S, 3))
    for s, index in enumerate(torch.ones(shape).nonzero().tolist()):
        assert torch.equal(rows_x[:, s], x[(slice(None), *index)])
        assert torch.equal(rows_g[:, :, s], g[(slice(None), slice(None), *index)])


def test_data_enter_once_however_many_chunks():
    net, (X, y) = mlp(4, 2, 3), data_for(MSE, 5)
    counts = [
        rows.count
        for name, rows in stream(
            Hooks(net), criterion_of(MSE), TypeII(), [(X, y), (X[:2], y[:2])], chunk_size=1
        )
        if name == "2"
    ]
    assert [count.N for count in counts] == [5, 0, 0, 2, 0, 0]
    assert [count.denominator for count in counts] == [15, 0, 0, 6, 0, 0]


@pytest.mark.parametrize("sharing", [Expand(), Reduce()], ids=repr)
def test_inputs_may_be_whatever_the_model_takes(sharing):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, batch):
            return self.fc(batch["a"] + batch["more"][0])

    net, (X, y) = Sum(), data_for(MSE, 5)
    found = KFAC.compute(net, MSE, ({"a": X / 2, "more": [X / 2]}, y), sharing=sharing)
    expected = KFAC.compute(net.fc, MSE, (X, y), sharing=sharing)
    assert relative_error(found["fc"].A, expected[""].A) < 1e-12


def test_data_are_one_pair_or_any_iterable_of_pairs():
    X, y = data_for(MSE, 5)
    dataset = torch.utils.data.TensorDataset(X, y)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2)
    for data, number in (((X, y), 1), ([X, y], 1), ([(X, y)] * 2, 2), (((X, y), (X, y)), 2)):
        assert len(list(batches(data))) == number
    assert [len(y) for _, y in batches(loader)] == [2, 2, 1]
    one = KFAC.compute(net := mlp(4, 2, 3), MSE, (X, y))
    assert (
        relative_error(KFAC.compute(net, MSE, loader).to_dense("cvec"), one.to_dense("cvec"))
        < 1e-12
    )


def test_targets_that_require_grad_leave_no_graph_in_the_factors():
    model, X = nn.Linear(4, 3), torch.randn(6, 4)
    y = model(X) + torch.randn(6, 3)
    assert y.requires_grad
    for fisher in (TypeII(), Empirical(), MonteCarlo()):
        K = KFAC.compute(model, nn.MSELoss(), (X, y), fisher)[""]
        assert not K.A.requires_grad
        assert not K.B.requires_grad
