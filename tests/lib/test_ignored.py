"""Data whose labels are all ignored change nothing, wherever they stand."""

import pytest
import torch
from torch import nn
from truth import To, mlp, relative_error, truth

from kfac_lib import KFAC, Empirical, InputOnly, Reduce, TypeI, TypeII, exact_blocks
from kfac_lib.curvature import fisher_blocks, ggn_blocks, hessian_blocks

pytestmark = pytest.mark.usefixtures("float64")
IGNORED = 1
reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])
shapes = pytest.mark.parametrize("shape", [(), (3,)], ids=["2d", "positions"])
FLAVOURS = [TypeII(), TypeI(), Empirical()]


def example(reduction, shape):
    """A net, a loss with every option, data with some labels ignored, and data with all."""
    loss = nn.CrossEntropyLoss(
        torch.tensor([0.5, 2.0, 1.3]).double(),
        ignore_index=IGNORED,
        label_smoothing=0.2,
        reduction=reduction,
    )
    net = nn.Sequential(mlp(4, 2, 3), To(lambda z: (z + z.mean(1, True)).movedim(-1, 1)))
    if not shape:
        net = mlp(4, 2, 3)
    y = torch.tensor([0, 2, 0, 2])
    if shape:
        y = torch.tensor([[0, 2, IGNORED], [2, 0, 0], [IGNORED, 2, 2], [2, 2, 0]])
    pad = torch.randn(3, *shape, 4), torch.full((3, *shape), IGNORED)
    return net, loss, (torch.randn(4, *shape, 4), y), pad


def places(data, pad):
    """The ignored data behind, in front, in the middle, and in a batch of their own."""
    (X, y), (P, ignored) = data, pad
    return [
        (torch.cat([X, P]), torch.cat([y, ignored])),
        (torch.cat([P, X]), torch.cat([ignored, y])),
        (torch.cat([X[:2], P, X[2:]]), torch.cat([y[:2], ignored, y[2:]])),
        [(X, y), (P, ignored)],
        [(P, ignored), (X[:1], y[:1]), (X[1:], y[1:])],
    ]


@reductions
@shapes
@pytest.mark.parametrize("fisher", [*FLAVOURS, InputOnly()], ids=repr)
def test_padding_changes_no_factor(reduction, shape, fisher):
    net, loss, data, pad = example(reduction, shape)
    options = {"sharing": Reduce()} if shape else {}
    expected = KFAC.compute(net, loss, data, fisher, **options)
    for padded in places(data, pad):
        for chunk_size in (None, 2):
            found = KFAC.compute(net, loss, padded, fisher, chunk_size=chunk_size, **options)
            for name, K in expected.items():
                assert relative_error(found[name].A, K.A) < 1e-12
                assert relative_error(found[name].B, K.B) < 1e-12
    # the same padding with labels that count
    counted = pad[0], torch.zeros_like(pad[1])
    other = KFAC.compute(net, loss, places(data, counted)[0], fisher, **options)
    first = "0.0" if shape else "0"
    assert relative_error(other[first].A, expected[first].A) > 0.01


@reductions
@shapes
@pytest.mark.parametrize("fisher", FLAVOURS, ids=repr)
def test_padding_changes_no_block(reduction, shape, fisher):
    net, loss, data, pad = example(reduction, shape)
    expected = exact_blocks(net, loss, data, fisher, order="cvec")
    kind = "empirical" if fisher == Empirical() else "type-II"
    for name, block in truth(net, loss, data, kind, "cvec").items():
        assert relative_error(expected[name], block) < 1e-10
    for padded in places(data, pad):
        found = exact_blocks(net, loss, padded, fisher, order="cvec")
        for name, block in expected.items():
            assert relative_error(found[name], block) < 1e-12
    for padded in places(data, pad)[:3]:
        found = fisher_blocks(net, loss, padded, fisher, order="cvec")
        for name, block in expected.items():
            assert relative_error(found[name], block) < 1e-10


@reductions
@pytest.mark.parametrize("blocks", [ggn_blocks, hessian_blocks])
def test_padding_changes_no_dense_matrix(reduction, blocks):
    net, loss, data, pad = example(reduction, (3,))
    expected = blocks(net, loss, data, order="rvec")
    for padded in places(data, pad)[:3]:
        for name, block in blocks(net, loss, padded, order="rvec").items():
            assert relative_error(block, expected[name]) < 1e-12


def test_a_datum_that_is_partly_ignored_stays():
    net, loss, (X, y), _ = example("sum", (3,))
    kfac = KFAC.compute(net, loss, (X, y))["0.0"]
    assert kfac.A[-1, -1] == 4 * 3  # R N S: all four data count
    y = y.clone()
    y[0] = IGNORED
    assert KFAC.compute(net, loss, (X, y))["0.0"].A[-1, -1] == 3 * 3


@reductions
def test_nothing_but_ignored_data_is_an_error(reduction):
    net, loss, _, pad = example(reduction, ())
    for compute in (
        lambda: KFAC.compute(net, loss, pad),
        lambda: exact_blocks(net, loss, [pad, pad], order="cvec"),
    ):
        with pytest.raises(ValueError, match=r"No datum counts.*ignored"):
            compute()
    if reduction == "mean":
        for blocks in (ggn_blocks, hessian_blocks):
            with pytest.raises(ValueError, match=r"mean is over nothing"):
                blocks(net, loss, pad, order="cvec")
