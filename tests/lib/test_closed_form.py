"""Closed forms at the prediction, against dense Hessians by autograd, one datum at a time."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.functional import hessian

from kfac_lib.losses import criterion_of

pytestmark = pytest.mark.usefixtures("float64")
some = settings(
    max_examples=12,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
sizes = st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 4), st.integers(0, 999))


def weight(C):
    return torch.rand(C).where(torch.arange(C) % 3 != 1, 0.0)


LOSSES = {
    "MSE": (lambda C: nn.MSELoss(), "real"),
    "BCE": (lambda C: nn.BCEWithLogitsLoss(), "fractions"),
    "BCE weight": (lambda C: nn.BCEWithLogitsLoss(weight=weight(C)), "binary"),
    "BCE pos_weight": (lambda C: nn.BCEWithLogitsLoss(pos_weight=3 * torch.rand(C)), "binary"),
    "BCE both": (
        lambda C: nn.BCEWithLogitsLoss(weight=weight(C), pos_weight=3 * torch.rand(C)),
        "fractions",
    ),
    "CE": (lambda C: nn.CrossEntropyLoss(), "index"),
    "CE weight": (lambda C: nn.CrossEntropyLoss(weight=weight(C)), "index"),
    "CE ignore": (lambda C: nn.CrossEntropyLoss(ignore_index=0), "index"),
    "CE smoothing": (lambda C: nn.CrossEntropyLoss(label_smoothing=0.3), "index"),
    "CE all options": (
        lambda C: nn.CrossEntropyLoss(weight=weight(C), ignore_index=0, label_smoothing=0.3),
        "index",
    ),
    "CE probabilities": (lambda C: nn.CrossEntropyLoss(), "probabilities"),
    "CE probabilities, all options": (
        lambda C: nn.CrossEntropyLoss(weight=weight(C), label_smoothing=0.3),
        "probabilities",
    ),
}
losses = pytest.mark.parametrize("loss", LOSSES)


def example(loss, N, C, scale=2.0):
    """The criterion, predictions (N, C) and targets."""
    make, kind = LOSSES[loss]
    f = scale * torch.randn(N, C)
    y = {
        "real": torch.randn(N, C),
        "fractions": torch.rand(N, C),
        "binary": torch.randint(2, (N, C)).double(),
        "index": torch.randint(C, (N,)),
        "probabilities": torch.randn(N, C).softmax(1),
    }[kind]
    return criterion_of(make(C)), f, y


def dense_hessians(criterion, f, y):
    """∇²_f c(f_n, y_n) of each datum by itself, shape (N, C, C)."""
    C = f.shape[1]
    each = [
        hessian(lambda one, n=n: criterion.value(one, y[n : n + 1]), f[n : n + 1]).reshape(C, C)
        for n in range(len(f))
    ]
    return torch.stack(each)


def close(found, expected, tolerance=1e-12, scale=None):
    assert found.shape == expected.shape
    scale = expected.norm() if scale is None else scale
    assert (found - expected).norm() <= tolerance * scale + 1e-300
    return True


@losses
@some
@given(size=sizes)
def test_sums_over_the_columns_are_those_of_the_dense_hessians(loss, size):
    N, C, D, seed = size
    torch.manual_seed(seed)
    criterion, f, y = example(loss, N, C)
    W, Q = torch.randn(C, D), torch.randn(C, D)
    H = dense_hessians(criterion, f, y)
    found = criterion.output_hessian(f, y)
    # One class, or a label without weight: H is zero, and rounding of size 1 is left.
    scale = H.norm() + 1e-3
    close(found.total(), H.sum(0), scale=scale)
    close(found.pulled_back(W), W.T @ H @ W, scale=scale * W.norm() ** 2)
    expected = torch.einsum("ci,ncd,di->ni", Q, H, Q)
    close(found.quadratic(Q), expected, scale=scale * Q.norm() ** 2)


@losses
def test_with_several_classes_the_errors_are_relative_to_the_hessians_alone(loss):
    criterion, f, y = example(loss, 6, 5)
    W = torch.randn(5, 3)
    H = dense_hessians(criterion, f, y)
    assert H.norm() > 0.1
    found = criterion.output_hessian(f, y)
    close(found.total(), H.sum(0))
    close(found.pulled_back(W), W.T @ H @ W)
    close(found.quadratic(W), torch.einsum("ci,ncd,di->ni", W, H, W))
    assert not torch.allclose(found.total(), f.shape[0] * H[0], rtol=1e-6) or loss == "MSE"


@losses
def test_the_hessians_of_some_of_the_data_are_theirs_alone(loss):
    criterion, f, y = example(loss, 6, 5)
    W = torch.randn(5, 3)
    H = dense_hessians(criterion, f, y)
    keep = torch.tensor([True, False, True, True, False, False])
    for which in (keep, slice(2, 5)):
        some_of_them = criterion.output_hessian(f, y)[which]
        close(some_of_them.total(), H[which].sum(0))
        close(some_of_them.pulled_back(W), W.T @ H[which] @ W)
        close(some_of_them.quadratic(W), torch.einsum("ci,ncd,di->ni", W, H[which], W))


@losses
def test_few_entries_at_a_time_change_nothing(loss, monkeypatch):
    criterion, f, y = example(loss, 7, 5)
    W = torch.randn(5, 3)
    expected = W.T @ dense_hessians(criterion, f, y) @ W
    for entries in (1, 31, 45):
        monkeypatch.setattr("kfac_lib.closed_form._ENTRIES", entries)
        close(criterion.output_hessian(f, y).pulled_back(W), expected)


@losses
def test_predictions_with_positions_have_no_closed_form(loss):
    criterion, f, y = example(loss, 4, 5)
    shape = (4, 5, 1)
    y = y.reshape(4, 1) if y.ndim == 1 else y.reshape(shape)
    assert criterion.output_hessian(f.reshape(shape), y) is None


@losses
def test_the_closed_form_says_what_the_root_says(loss):
    criterion, f, y = example(loss, 4, 5)
    root = criterion.hessian_root(f, y)
    close(criterion.output_hessian(f, y).total(), torch.einsum("vno,vnp->op", root, root))


CONFIDENT = [20.0, 40.0, 80.0]
confident = pytest.mark.parametrize("scale", CONFIDENT)


def in_both_types(loss, scale):
    """The closed form in float32 and in float64, for the same numbers."""
    criterion, f, y = example(loss, 16, 6)
    f = (scale * f * 32).round() / 64  # differences of logits are exact in float32
    if y.is_floating_point():
        y = (y * 256).round() / 256
    low = f.float(), y.float() if y.is_floating_point() else y
    return (criterion.output_hessian(f, y), criterion.output_hessian(*low))


def same_entries(low, high, scale):
    """Equal to 1e-5 entry by entry, where the entry is not tiny beside the given scale."""
    assert low.dtype == torch.float32
    not_tiny = high.abs() > 1e-2 * scale
    assert not_tiny.any()
    error = (low.double() - high).abs() / high.abs()
    worst = float(error[not_tiny].max())
    assert worst < 1e-5, worst


def representable(M):
    """Entry by entry, whether float32 can hold what is summed: well above its smallest numbers."""
    return M > 1e-33


@losses
@confident
def test_confident_totals_lose_nothing_in_float32(loss, scale):
    high, low = in_both_types(loss, scale)
    for n in range(16):
        H = high[n : n + 1].total()
        if representable(H.abs().max()):
            same_entries(low[n : n + 1].total(), H, H.abs().max())
    H = high.total()
    same_entries(low.total(), H, H.abs().max())


@losses
@confident
def test_confident_quadratic_forms_lose_nothing_in_float32(loss, scale):
    high, low = in_both_types(loss, scale)
    Q = torch.randn(6, 4).float()
    found, expected = low.quadratic(Q), high.quadratic(Q.double())
    for one, other in zip(found, expected, strict=True):
        if representable(other.max()):
            same_entries(one, other, other.max())


@losses
@confident
def test_confident_pulled_back_hessians_lose_nothing_in_float32(loss, scale):
    high, low = in_both_types(loss, scale)
    W = torch.randn(6, 4).float()
    found, expected = low.pulled_back(W), high.pulled_back(W.double())
    for one, other in zip(found, expected, strict=True):
        if representable(other.abs().max()):
            same_entries(one, other, other.abs().max())
