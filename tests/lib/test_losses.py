import pytest
import torch
from torch import nn
from truth import per_datum_gradients, relative_error

from kfac_lib.losses import CrossEntropy, SquaredError, criterion_of

pytestmark = pytest.mark.usefixtures("float64")
K = 4
kinds = pytest.mark.parametrize("kind", [nn.MSELoss, nn.CrossEntropyLoss])
reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])
positions = pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=["2d", "1 axis", "2 axes"])


def example(kind, shape, N=5):
    f = torch.randn(N, K, *shape)
    return f, torch.randn_like(f) if kind is nn.MSELoss else torch.randint(K, (N, *shape))


def dense_hessian(criterion, f, y):
    """∇²_f Σ_n c_n by autograd, as (N, C, N, C)."""
    size = (len(f), f[0].numel())
    return torch.func.hessian(lambda f: criterion.value(f, y))(f).reshape(*size, *size)


@kinds
@reductions
@positions
def test_criterion_times_reduction_factor_is_torchs_loss(kind, reduction, shape):
    f, y = example(kind, shape)
    loss = kind(reduction=reduction)
    criterion = criterion_of(loss)
    R = criterion.reduction_factor(criterion.denominator(f, y))
    assert relative_error(R * criterion.value(f, y), loss(f, y)) < 1e-14


@kinds
@positions
def test_gradient_and_hessian_root_are_those_of_autograd(kind, shape):
    f, y = example(kind, shape)
    criterion = criterion_of(kind())
    expected = per_datum_gradients(nn.Identity(), kind(), (f, y))[0]
    assert relative_error(criterion.gradient(f, y), expected) < 1e-12
    H = dense_hessian(criterion, f, y)
    for columns in ("full", "minimal"):
        L = criterion.hessian_root(f, y, columns).flatten(2)
        for n in range(len(f)):
            assert relative_error(L[:, n].T @ L[:, n], H[n, :, n]) < 1e-12


@positions
def test_each_column_of_the_root_lives_at_one_position(shape):
    f, y = example(nn.CrossEntropyLoss, shape)
    T = f[0, 0].numel()
    for columns, per_position in (("full", K), ("minimal", K - 1)):
        L = CrossEntropy("mean").hessian_root(f, y, columns).reshape(-1, len(f), K, T)
        assert len(L) == T * per_position
        assert ((L != 0).any(2).sum(-1) == 1).all()


@pytest.mark.parametrize("columns", ["full", "minimal"])
def test_cross_entropy_root_is_finite_and_right_where_probabilities_are_zero_or_one(columns):
    extreme = torch.tensor([1e4, 0.0, -1e4, 800.0])
    f = torch.stack([extreme, extreme.flip(0), -extreme, torch.zeros(4)])
    f = torch.cat([f, torch.tensor([[-1e4, 0, 0, -1e4], [0, 0, 0, 1e4]])])
    f = torch.cat([f, torch.eye(4) * 30])
    L = CrossEntropy("sum").hessian_root(f, torch.zeros(len(f), dtype=torch.long), columns)
    assert torch.isfinite(L).all()
    p = f.softmax(1)
    H = torch.diag_embed(p) - torch.einsum("nk,nj->nkj", p, p)
    assert (torch.einsum("vnk,vnj->nkj", L, L) - H).abs().max() < 1e-14


@kinds
@reductions
def test_denominators_of_batches_add_up(kind, reduction):
    loss = kind(reduction=reduction)
    criterion = criterion_of(loss)
    (f, y), (f2, y2) = example(kind, (3,)), example(kind, (3,), N=2)
    R = criterion.reduction_factor(criterion.denominator(f, y) + criterion.denominator(f2, y2))
    total = R * (criterion.value(f, y) + criterion.value(f2, y2))
    expected = loss(torch.cat([f, f2]), torch.cat([y, y2]))
    assert relative_error(total, expected) < 1e-14
    mean_of_means = (loss(f, y) + loss(f2, y2)) / 2
    assert relative_error(mean_of_means, expected) > 1e-3


@kinds
@positions
def test_log_likelihood_gradient_is_that_of_the_distribution(kind, shape):
    f, y = example(kind, shape)
    labels = torch.stack([y, y.flip(0)])
    for m, label in enumerate(labels):
        leaf = f.clone().requires_grad_()
        if kind is nn.MSELoss:
            r = torch.distributions.Normal(leaf, 1.0)
        else:
            r = torch.distributions.Categorical(logits=leaf.movedim(1, -1))
        (expected,) = torch.autograd.grad(r.log_prob(label).sum(), leaf)
        found = criterion_of(kind()).log_likelihood_gradient(f, labels)
        assert relative_error(found[m], expected) < 1e-12


@kinds
def test_samples_are_labels_and_detached(kind):
    f, y = example(kind, (3,))
    labels = criterion_of(kind()).sample(f.requires_grad_(), 7, None)
    assert labels.shape == (7, *y.shape)
    assert labels.dtype == y.dtype
    assert not labels.requires_grad


def test_a_criterion_is_taken_as_it_is():
    criterion = SquaredError("sum")
    assert criterion_of(criterion) is criterion


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (nn.CrossEntropyLoss(weight=torch.ones(3)), NotImplementedError, "weight"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), NotImplementedError, "label_smoothing"),
        (nn.CrossEntropyLoss(ignore_index=0), NotImplementedError, "ignore_index"),
        (nn.CrossEntropyLoss(reduction="none"), ValueError, "'none'.*mean.*sum"),
        (nn.MSELoss(reduction="none"), ValueError, "'none'.*mean.*sum"),
        (nn.L1Loss(), NotImplementedError, "L1Loss.*Supported.*MSELoss"),
        (nn.NLLLoss(), NotImplementedError, "NLLLoss.*Supported"),
        (type("Own", (nn.MSELoss,), {})(), NotImplementedError, "Own.*Supported"),
        (nn.functional.mse_loss, TypeError, r"function.*Supported.*MSELoss\(\)"),
        (nn.MSELoss, TypeError, "class"),
        ("mse", TypeError, "'mse'.*Supported"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value))[:40],
)
def test_an_unsupported_loss_or_option_is_refused(loss, error, words):
    with pytest.raises(error, match=words):
        criterion_of(loss)
