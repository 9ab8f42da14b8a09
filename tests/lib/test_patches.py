"""Patches that are cut only where they are needed, against all of them, unfolded by loops."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_layers import convolutions
from torch import nn
from truth_layers import patches as naive_patches

from kfac_lib import rows as under_test
from kfac_lib.layers import Convolution, Patches
from kfac_lib.rows import Count, LayerRows, PatchRows

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]
some = settings(
    max_examples=25,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
axes = pytest.mark.parametrize("axes", [1, 2, 3])
COUNT = Count(N=3, denominator=7)


def close(found, expected, tolerance=1e-12):
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert (found - expected).norm() <= tolerance * expected.norm() + 1e-300
    return True


def both(layer, x, V=3, bias=None):
    """Rows that cut patches when they must, and rows of patches that were cut by loops."""
    unfolded = naive_patches(layer, x)
    g = torch.randn(V, *unfolded.shape[:2], layer.out_channels)
    bias = (1.0 if layer.bias is not None else None) if bias is None else bias
    lazy = PatchRows(Patches(x, Convolution.of(layer)), g, bias, COUNT)
    return lazy, LayerRows(unfolded, g, bias, COUNT, layer.groups)


def same_rows(lazy, rows):
    """The rows themselves, and all sums over them; those of several groups by group."""
    close(lazy.x, rows.x)
    close(lazy.g, rows.g)
    assert (lazy.S, lazy.V, lazy.bias, lazy.count) == (rows.S, rows.V, rows.bias, rows.count)
    assert lazy.nbytes == rows.nbytes
    close(lazy.input_gram(), rows.input_gram())
    close(lazy.output_gram(), rows.output_gram())
    close(lazy.outer(), rows.outer())
    return True


def bases(rows):
    """Any matrices of the right sizes: nothing needs them to be orthogonal."""
    D = rows.x.shape[-1] + (rows.bias is not None)
    return torch.randn(D, D), torch.randn(rows.g.shape[-1], rows.g.shape[-1])


def same_squares(lazy, rows):
    """Σ_{n,v} [Q_Bᵀ P Q_A]², from the formula, for rows of one group."""
    Q_A, Q_B = bases(rows)
    P = torch.einsum("vnso,nsi->vnoi", rows.g, with_ones(rows))
    for basis in (Q_A, None):
        rotated = Q_B.T @ P @ (torch.eye(len(Q_A)) if basis is None else basis)
        expected = rotated.square().sum((0, 1))
        close(lazy.squares(basis, Q_B), expected)
        close(rows.squares(basis, Q_B), expected)
    return True


def with_ones(rows):
    """The inputs x̃, with what a bias appends."""
    if rows.bias is None:
        return rows.x
    return torch.cat([rows.x, torch.full((*rows.x.shape[:2], 1), rows.bias)], dim=2)


def follows_the_formulas(rows):
    """Of one group: Σ x̃x̃ᵀ, Σ ggᵀ and P_{n,v} = Σ_s g x̃ᵀ by plain sums."""
    x, g = with_ones(rows), rows.g
    close(rows.input_gram(), torch.einsum("nsi,nsj->ij", x, x))
    close(rows.output_gram(), torch.einsum("vnso,vnsp->op", g, g))
    close(rows.outer(), torch.einsum("vnso,nsi->vnoi", g, x))
    return True


def all_is_the_same(lazy, rows):
    same_rows(lazy, rows)
    reduced = lazy.reduced()
    assert reduced.S == 1
    same_rows(reduced, rows.reduced())
    groups, expected = lazy.split(), rows.split()
    assert len(groups) == len(expected) == rows.groups
    for one, other in zip(groups, expected, strict=True):
        same_rows(one, other)
        follows_the_formulas(one)
        follows_the_formulas(other)
        same_squares(one, other)
        follows_the_formulas(one.reduced())
        for name in ("joint", "weight", "bias"):
            if name == "bias" and rows.bias is None:
                continue
            same_rows(one.part(name), other.part(name))
            follows_the_formulas(one.part(name))
            same_squares(one.part(name), other.part(name))
    for name in ("joint", "weight", "bias"):
        if name == "bias" and rows.bias is None:
            with pytest.raises(ValueError, match="no bias"):
                lazy.part(name)
        else:
            same_rows(lazy.part(name), rows.part(name))
            same_rows(lazy.part(name).reduced(), rows.part(name).reduced())
    return True


@pytest.mark.parametrize("axes", [1, 2, 3])
@some
@given(data=st.data())
def test_rows_are_those_of_the_unfolded_patches(axes, data):
    layer, x = data.draw(convolutions(axes))
    all_is_the_same(*both(layer, x))


@pytest.mark.parametrize("axes", [1, 2])
@some
@given(data=st.data(), entries=st.sampled_from([1, 50, 200]))
def test_data_in_small_parts_give_the_same(axes, data, entries):
    layer, x = data.draw(convolutions(axes))
    x = torch.cat([x, torch.randn(2, *x.shape[1:])])
    before, under_test._ENTRIES = under_test._ENTRIES, entries
    try:
        all_is_the_same(*both(layer, x))
    finally:
        under_test._ENTRIES = before


@axes
@some
@given(data=st.data())
def test_sums_of_patches_are_those_over_all_positions(axes, data):
    layer, x = data.draw(convolutions(axes))
    convolution = Convolution.of(layer)
    expected = naive_patches(layer, x)
    found = convolution.patch_sums(x)
    # Of zeros alone a sum is zero; others are compared on the scale of their terms.
    assert (found - expected.sum(1)).norm() <= 1e-12 * expected.norm()
    assert (found - convolution.patches(x).sum(1)).norm() <= 1e-12 * expected.norm()
    close(Patches(x, convolution).rows(), expected)
    assert torch.equal(Patches(x, convolution).total(), found)


SPECIAL = {
    "stride that leaves pixels over": (lambda: nn.Conv2d(2, 3, 2, stride=3), (2, 7, 9)),
    "stride larger than the kernel": (lambda: nn.Conv1d(2, 3, 2, stride=5), (2, 18)),
    "kernel as large as the image": (lambda: nn.Conv2d(2, 3, (4, 5)), (2, 4, 5)),
    "kernel of one": (lambda: nn.Conv2d(3, 2, 1), (3, 4, 5)),
    "kernel of one with stride": (lambda: nn.Conv2d(3, 2, 1, stride=2), (3, 4, 5)),
    "dilation with stride": (lambda: nn.Conv2d(2, 3, 3, stride=2, dilation=2), (2, 9, 8)),
    "padding larger than the kernel": (lambda: nn.Conv1d(1, 2, 2, padding=4), (1, 3)),
    "same with an even kernel": (lambda: nn.Conv1d(2, 2, 4, padding="same", dilation=3), (2, 9)),
    "reflected": (
        lambda: nn.Conv2d(2, 2, 3, padding=(2, 1), padding_mode="reflect"), (2, 5, 4)
    ),
    "circular, same": (
        lambda: nn.Conv2d(2, 2, (3, 2), padding="same", padding_mode="circular"), (2, 5, 4)
    ),
    "depthwise": (lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3), (3, 4, 4)),
    "grouped without bias": (lambda: nn.Conv1d(4, 2, 3, groups=2, bias=False), (4, 8)),
    "three axes": (lambda: nn.Conv3d(2, 2, (1, 2, 3), stride=(1, 2, 1), groups=2), (2, 3, 5, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("entries", [2**20, 60])
def test_corner_cases_of_a_convolution(name, entries, monkeypatch):
    make, shape = SPECIAL[name]
    monkeypatch.setattr(under_test, "_ENTRIES", entries)
    all_is_the_same(*both(make(), torch.randn(5, *shape)))


def test_a_joint_bias_that_is_not_one_is_kept():
    lazy, rows = both(nn.Conv2d(2, 3, 2), torch.randn(3, 2, 4, 4), bias=2.5)
    all_is_the_same(lazy, rows)
    assert lazy.reduced().bias == 2.5 * lazy.S


@pytest.mark.parametrize("keep", [slice(1, 4), torch.tensor([True, False, True, True, False])])
def test_patches_of_some_of_the_data_are_theirs(keep):
    layer, x = nn.Conv2d(2, 3, 2, padding=1), torch.randn(5, 2, 4, 4)
    patches = Patches(x, Convolution.of(layer))
    assert len(patches) == 5
    assert len(patches[keep]) == 3
    close(patches[keep].rows(), naive_patches(layer, x)[keep])
    close(patches[keep].total(), naive_patches(layer, x)[keep].sum(1))


def test_without_vectors_the_inputs_still_count():
    layer, x = nn.Conv2d(4, 2, 2, groups=2), torch.randn(3, 4, 4, 4)
    lazy, rows = both(layer, x, V=0)
    close(lazy.input_gram(), rows.input_gram())
    assert lazy.output_gram().norm() == 0
    assert lazy.output_gram().shape == rows.output_gram().shape == (2, 1, 1)


@pytest.mark.parametrize("groups", [1, 2])
def test_of_no_data_all_sums_are_zero(groups):
    layer = nn.Conv2d(2, 2, 3, padding=1, groups=groups)
    g = torch.randn(3, 0, 16, 2)
    lazy = PatchRows(Patches(torch.randn(0, 2, 4, 4), Convolution.of(layer)), g, 1.0, Count(0, 0))
    D = 18 // groups + 1
    shape = (D, D) if groups == 1 else (groups, D, D)
    assert lazy.input_gram().shape == shape
    assert lazy.input_gram().norm() == lazy.output_gram().norm() == 0
    for one in lazy.split():
        o = 2 // groups
        squares = one.squares(torch.eye(D), torch.eye(o))
        assert squares.shape == (o, D)
        assert squares.norm() == 0


def test_inputs_without_an_axis_for_the_data_are_refused():
    with pytest.raises(ValueError, match="Axis 0 must be the datum"):
        Patches(torch.randn(2, 4, 4), Convolution.of(nn.Conv2d(2, 3, 2)))
