import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from truth import LOSSES, WEIGHT, relative_error, targets

from kfac_lib.losses import BinaryCrossEntropy, CrossEntropy, SquaredError, criterion_of

pytestmark = pytest.mark.usefixtures("float64")
K = 4
options = pytest.mark.parametrize("option", LOSSES)
reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])
positions = pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=["2d", "1 axis", "2 axes"])
BASIC = ["MSE", "CE", "BCE"]
basic = pytest.mark.parametrize("option", BASIC)


def example(option, shape, N=5, reduction="mean"):
    factory, kind = LOSSES[option]
    f, loss = torch.randn(N, K, *shape), factory(K, reduction=reduction)
    return f, targets(kind, N, K, shape), loss


def blocks(loss, f, y):
    """∇²_f of a loss by autograd, datum by datum, (N, C, C)."""
    size = (len(f), f[0].numel())
    H = torch.func.hessian(lambda f: loss(f, y))(f).reshape(*size, *size)
    off = H.clone()
    for n in range(len(f)):
        off[n, :, n] = 0
    assert not off.any()
    return torch.stack([H[n, :, n] for n in range(len(f))])


def squares(vectors):
    v = vectors.flatten(2)
    return torch.einsum("vnc,vnk->nck", v, v)


def factor(criterion, f, y):
    return criterion.reduction_factor(criterion.denominator(f, y))


@options
@reductions
@positions
def test_value_gradient_and_hessian_are_those_of_torchs_loss(option, reduction, shape):
    f, y, loss = example(option, shape, reduction=reduction)
    criterion = criterion_of(loss)
    criterion.check(f, y)
    R = factor(criterion, f, y)
    assert relative_error(R * criterion.value(f, y), loss(f, y)) < 1e-14
    gradient = torch.func.grad(lambda f: loss(f, y))(f)
    assert relative_error(R * criterion.gradient(f, y), gradient) < 1e-12
    H = blocks(loss, f, y)
    for columns in ("full", "minimal"):
        L = criterion.hessian_root(f, y, columns)
        assert relative_error(R * squares(L), H) < 1e-12
    scores = criterion.kappa(f, y).sqrt() * criterion.enumerated_gradients(f)
    assert relative_error(R * squares(scores), H) < 1e-12
    # a gradient that does not show in the Hessian, and the other way round: they differ
    assert relative_error(R * squares(criterion.gradient(f, y).unsqueeze(0)), H) > 0.05


@options
@positions
def test_the_root_times_a_vector_needs_no_columns(option, shape):
    f, y, loss = example(option, shape)
    criterion = criterion_of(loss)
    u = torch.randn(3, *f.shape)
    L = criterion.hessian_root(f, y)
    # column v belongs to one entry of the prediction; its coefficient is u there
    at = torch.eye(f[0].numel()).reshape(-1, *f.shape[1:])
    if option.startswith("CE"):
        T = f[0, 0].numel()
        at = at.reshape(K, T, *f.shape[1:]).flatten(0, 1)
    coefficients = torch.einsum("vc,mnc->mnv", at.flatten(1), u.flatten(2))
    expected = torch.einsum("mnv,vnc->mnc", coefficients, L.flatten(2)).reshape(u.shape)
    assert relative_error(criterion.hessian_root_product(f, y, u), expected) < 1e-12


@basic
@positions
def test_each_column_of_the_root_and_each_label_lives_at_one_position(option, shape):
    f, y, loss = example(option, shape)
    T, criterion = f[0, 0].numel(), criterion_of(loss)
    minimal = K - 1 if option == "CE" else K
    labels = K if option == "CE" else 2 * K
    for vectors, per_position in (
        (criterion.hessian_root(f, y), K),
        (criterion.hessian_root(f, y, "minimal"), minimal),
        (criterion.enumerated_gradients(f), labels),
    ):
        assert len(vectors) == T * per_position
        assert ((vectors.reshape(-1, len(f), K, T) != 0).any(2).sum(-1) == 1).all()


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


def test_binary_cross_entropy_root_is_exact_for_saturated_logits():
    f = torch.tensor([[40.0, -40.0, 800.0, -800.0]])
    found = squares(BinaryCrossEntropy("sum").hessian_root(f, torch.zeros_like(f)))[0].diagonal()
    # σ(40) σ(−40) = e^{−40} to first order; σ (1 − σ) in floating point would be zero
    assert relative_error(found[:2], torch.tensor([-40.0, -40.0]).exp()) < 1e-12
    assert found[2:].tolist() == [0, 0]


@options
@reductions
def test_denominators_of_batches_add_up(option, reduction):
    f, y, loss = example(option, (3,), reduction=reduction)
    criterion = criterion_of(loss)
    f2, y2 = torch.randn(2, K, 3), targets(LOSSES[option][1], 2, K, (3,))
    R = criterion.reduction_factor(criterion.denominator(f, y) + criterion.denominator(f2, y2))
    total = R * (criterion.value(f, y) + criterion.value(f2, y2))
    expected = loss(torch.cat([f, f2]), torch.cat([y, y2]))
    assert relative_error(total, expected) < 1e-14
    mean_of_means = (loss(f, y) + loss(f2, y2)) / 2
    assert relative_error(mean_of_means, expected) > 1e-4


@reductions
@pytest.mark.parametrize("epsilon", [0.0, 1.0])
def test_label_smoothing_may_be_none_or_all(epsilon, reduction):
    loss = nn.CrossEntropyLoss(label_smoothing=epsilon, reduction=reduction)
    f, y = torch.randn(5, K), torch.tensor([0, 1, 2, 3, 0])
    criterion = criterion_of(loss)
    R = factor(criterion, f, y)
    gradient = torch.func.grad(lambda f: loss(f, y))(f)
    assert relative_error(R * criterion.gradient(f, y), gradient) < 1e-12
    assert relative_error(R * squares(criterion.hessian_root(f, y)), blocks(loss, f, y)) < 1e-12


@pytest.mark.parametrize("weight", [None, torch.tensor(WEIGHT)], ids=["plain", "weight"])
def test_certain_class_probabilities_are_the_class_index(weight):
    f, y = torch.randn(5, K), torch.tensor([0, 1, 2, 3, 0])
    criterion = CrossEntropy("sum", weight, label_smoothing=0.2)
    certain = nn.functional.one_hot(y, K).double()
    criterion.check(f, certain)
    assert relative_error(criterion.gradient(f, certain), criterion.gradient(f, y)) < 1e-12
    assert relative_error(criterion.kappa(f, certain), criterion.kappa(f, y)) < 1e-12


@pytest.mark.parametrize("weight", [None, torch.tensor([2.0])], ids=["plain", "weight"])
def test_an_ignored_label_needs_no_class_of_its_own(weight):
    """One class and an ignored datum: there is no other class that could stand in for the label."""
    f, y = torch.randn(2, 1), torch.tensor([0, -100])
    criterion = CrossEntropy("sum", weight)
    assert criterion.gradient(f, y).tolist() == [[0], [0]]
    assert criterion.kappa(f, y).tolist() == [[1 if weight is None else 2], [0]]


def test_two_classes_have_a_root_of_one_column():
    f, y = torch.randn(5, 2), torch.tensor([0, 1, 0, 1, 1])
    L = CrossEntropy("mean").hessian_root(f, y, "minimal")
    assert L.shape == (1, 5, 2)
    assert relative_error(squares(L) / 5, blocks(nn.CrossEntropyLoss(), f, y)) < 1e-12


@basic
@positions
def test_log_likelihood_gradient_is_that_of_the_distribution(option, shape):
    f, y, loss = example(option, shape)
    labels = torch.stack([y, y.flip(0)])
    for m, label in enumerate(labels):
        leaf = f.clone().requires_grad_()
        r = {
            "MSE": lambda f: torch.distributions.Normal(f, 1.0),
            "CE": lambda f: torch.distributions.Categorical(logits=f.movedim(1, -1)),
            "BCE": lambda f: torch.distributions.Bernoulli(logits=f),
        }[option](leaf)
        (expected,) = torch.autograd.grad(r.log_prob(label).sum(), leaf)
        found = criterion_of(loss).log_likelihood_gradient(f, labels)
        assert relative_error(found[m], expected) < 1e-12
        # minus a log-likelihood, up to a constant
        assert relative_error(criterion_of(loss).gradient(f, label), -expected) < 1e-12


@options
def test_samples_are_labels_and_detached(option):
    f, y, loss = example(option, (3,))
    labels = criterion_of(loss).sample(f.requires_grad_(), 7, None)
    index = option.startswith("CE")
    assert labels.shape == ((7, 5, 3) if index else (7, *y.shape))
    assert labels.dtype == (torch.long if index else y.dtype)
    assert not labels.requires_grad


def test_samples_have_the_frequencies_of_the_likelihood():
    f, M = torch.tensor([[1.0, -0.5, 0.3]]), 40_000
    generator = torch.Generator().manual_seed(0)
    labels = CrossEntropy("sum").sample(f, M, generator)[:, 0]
    for found, p in (
        (labels.bincount(minlength=3) / M, f.softmax(1)[0]),
        (BinaryCrossEntropy("sum").sample(f, M, generator).mean(0)[0], f.sigmoid()[0]),
    ):
        assert ((found - p).abs() < 5 * (p * (1 - p) / M).sqrt()).all()


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53], ids=["lowest", "highest"])
def test_a_label_of_probability_zero_is_never_drawn(u, monkeypatch):
    """Not even by the smallest and the largest number that torch.rand may return."""
    monkeypatch.setattr(torch, "rand", lambda shape, generator, **o: torch.full(shape, u, **o))
    f = torch.randn(100, 50)  # so many classes that not all probabilities add up to 1 by rounding
    f[:, [0, 1, -2, -1]] = -1e4
    labels = CrossEntropy("sum").sample(f, 2, None)
    assert (f.softmax(1).gather(1, labels.T) > 0).all()
    certain = torch.tensor([[-1e4, 1e4]])
    assert (BinaryCrossEntropy("sum").sample(certain, 2, None) <= certain.sigmoid()).all()


def test_ignored_labels_and_their_data():
    f, criterion = torch.randn(3, K, 2), CrossEntropy("mean", ignore_index=2)
    y = torch.tensor([[0, 2], [2, 2], [1, 3]])
    assert criterion.counted(f, y).tolist() == [True, False, True]
    assert criterion.denominator(f, y) == 3
    assert criterion.kappa(f, y)[:, 0].tolist() == [[1, 0], [0, 0], [1, 1]]
    everyone = [CrossEntropy("mean").counted(f, y), CrossEntropy("mean").counted(f, f.softmax(1))]
    for counted in [*everyone, SquaredError("mean").counted(f, f)]:
        assert counted.tolist() == [True] * 3
        assert counted.dtype == torch.bool
    assert criterion.counted(f[..., 0], y[:, 1]).tolist() == [False, False, True]
    ignored = torch.full((3, 2), 2)
    criterion.check(f, ignored)
    with pytest.raises(ValueError, match=r"mean is over nothing.*ignored"):
        criterion.reduction_factor(criterion.denominator(f, ignored))
    assert CrossEntropy("sum", ignore_index=2).reduction_factor(0) == 1


@basic
def test_draws_depend_on_the_dtype_of_the_prediction_and_on_no_default(option):
    f, _, loss = example(option, (3,))
    f, labels = f.float(), []
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        generator = torch.Generator().manual_seed(0)
        labels.append(criterion_of(loss).sample(f, 100, generator))
    assert torch.equal(*labels)


@pytest.mark.parametrize("shape", [(), (3,)], ids=["2d", "positions"])
def test_sigma_points_are_gradients_at_labels_around_the_prediction(shape):
    f, criterion = torch.randn(5, K, *shape), SquaredError("mean")
    C = f[0].numel()
    steps = C**0.5 * torch.eye(C).reshape(C, 1, *f.shape[1:])
    expected = [
        torch.func.grad(lambda f, y=f + step: criterion.value(f, y))(f) / (2 * C) ** 0.5
        for step in [*steps, *-steps]
    ]
    assert relative_error(criterion.enumerated_gradients(f), torch.stack(expected)) < 1e-12


@pytest.mark.parametrize("shape", [(), (3,)], ids=["2d", "positions"])
def test_both_labels_of_every_entry_have_their_gradient_times_the_root_of_their_probability(shape):
    f, criterion = torch.randn(5, K, *shape), BinaryCrossEntropy("mean")
    C = f[0].numel()
    found = criterion.enumerated_gradients(f).reshape(2, C, 5, C)
    for label, r in enumerate([1 - f.sigmoid(), f.sigmoid()]):
        y = torch.full_like(f, label)
        gradient = torch.func.grad(lambda f, y=y: criterion.value(f, y))(f)
        expected = torch.diag_embed((r.sqrt() * gradient).reshape(5, C)).movedim(1, 0)
        assert relative_error(found[label], expected) < 1e-12


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (SquaredError, nn.MSELoss),
        (CrossEntropy, nn.CrossEntropyLoss),
        (BinaryCrossEntropy, nn.BCEWithLogitsLoss),
    ],
    ids=BASIC,
)
@reductions
def test_a_criterion_without_options_is_torchs_loss_without_options(make, loss, reduction):
    f, y = torch.randn(5, K), torch.rand(5, K)
    if make is CrossEntropy:
        y = torch.tensor([0, 1, -100, 3, 2])
    criterion, loss = make(reduction), loss(reduction=reduction)
    R = factor(criterion, f, y)
    assert relative_error(R * criterion.value(f, y), loss(f, y)) < 1e-14
    gradient = torch.func.grad(lambda f: loss(f, y))(f)
    assert relative_error(R * criterion.gradient(f, y), gradient) < 1e-12
    assert relative_error(R * squares(criterion.hessian_root(f, y)), blocks(loss, f, y)) < 1e-12


@pytest.mark.parametrize(
    "criterion",
    [
        SquaredError("mean"),
        CrossEntropy("mean", torch.tensor(WEIGHT), label_smoothing=0.2),
        BinaryCrossEntropy("mean", torch.ones(K), torch.ones(K)),
    ],
    ids=BASIC,
)
def test_everything_is_made_on_the_device_of_the_logits_and_weights_follow(criterion):
    """On the device "meta", where tensors have no entries, and which is not the default."""

    class AllOnMeta(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            assert all(made.device.type == "meta" for made in tree_leaves(result)), func
            return result

    f = torch.zeros(5, K, device="meta")
    index = torch.zeros(5, dtype=torch.long, device="meta")
    targets = [f, index] if isinstance(criterion, CrossEntropy) else [f]
    with AllOnMeta():
        for y in targets:
            for method in (criterion.value, criterion.gradient, criterion.kappa, criterion.counted):
                method(f, y)
            for columns in ("full", "minimal"):
                criterion.hessian_root(f, y, columns)
            criterion.hessian_root_product(f, y, f.expand(2, 5, K))
        criterion.log_likelihood_gradient(f, criterion.sample(f, 2, None))
        criterion.enumerated_gradients(f)


def test_the_weights_of_a_mean_are_added_in_the_dtype_of_the_logits():
    f, y = torch.randn(1000, K), torch.randint(K, (1000,))
    weight = torch.tensor([0.1, 0.2, 0.3, 0.7], dtype=torch.float32)
    expected = sum(float(weight[label]) for label in y)
    assert abs(CrossEntropy("mean", weight).denominator(f, y) / expected - 1) < 1e-12


def test_weights_and_targets_follow_the_dtype_of_the_logits():
    f, y = torch.randn(3, K).float(), torch.tensor([0, 1, 2])
    q = f.double().softmax(1)
    criterion = CrossEntropy("mean", weight=torch.ones(K, dtype=torch.float64))
    binary = BinaryCrossEntropy("mean", torch.ones(K), torch.ones(K))
    for result in (
        criterion.gradient(f, y),
        criterion.hessian_root(f, y),
        criterion.value(f, y),
        criterion.gradient(f, q),
        criterion.hessian_root(f, q),
        criterion.value(f, q),
        binary.gradient(f, q),
        binary.hessian_root(f, q),
        binary.value(f, q),
    ):
        assert result.dtype == torch.float32


@pytest.mark.parametrize("shape", [(), (2,)], ids=["2d", "positions"])
def test_weights_of_binary_cross_entropy_broadcast_as_in_torch(shape):
    f = torch.randn(5, K, *shape)
    y = (f > 0).double()
    for size in [(), (5, *[1] * (f.ndim - 1)), (1, K, *[1] * len(shape)), f.shape, f.shape[1:]]:
        weight, pos_weight = torch.rand(size), torch.rand(size)
        loss = nn.BCEWithLogitsLoss(weight=weight, pos_weight=pos_weight)
        criterion = criterion_of(loss)
        criterion.check(f, y)
        R = factor(criterion, f, y)
        assert relative_error(R * squares(criterion.hessian_root(f, y)), blocks(loss, f, y)) < 1e-12


def test_a_criterion_is_taken_as_it_is():
    criterion = SquaredError("sum")
    assert criterion_of(criterion) is criterion


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (nn.CrossEntropyLoss(reduction="none"), ValueError, "'none'.*mean.*sum"),
        (nn.MSELoss(reduction="none"), ValueError, "'none'.*mean.*sum"),
        (nn.BCEWithLogitsLoss(reduction="none"), ValueError, "'none'.*mean.*sum"),
        (nn.L1Loss(), NotImplementedError, "L1Loss.*Supported.*MSELoss"),
        (nn.BCELoss(), NotImplementedError, "BCELoss.*Supported.*BCEWithLogitsLoss"),
        (nn.NLLLoss(), NotImplementedError, "NLLLoss.*Supported"),
        (type("Own", (nn.MSELoss,), {})(), NotImplementedError, "Own.*Supported"),
        (nn.functional.mse_loss, TypeError, r"function.*Supported.*MSELoss\(\)"),
        (nn.MSELoss, TypeError, "class"),
        ("mse", TypeError, "'mse'.*Supported"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value))[:40],
)
def test_an_unsupported_loss_is_refused(loss, error, words):
    with pytest.raises(error, match=words):
        criterion_of(loss)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SquaredError("none"), "SquaredError.*'none'.*mean.*sum"),
        (lambda: CrossEntropy("none"), "CrossEntropy.*'none'.*mean.*sum"),
        (lambda: CrossEntropy("mean", torch.tensor([1.0, -1])), "^CrossEntropyLoss: weight holds"),
        (lambda: CrossEntropy("mean", torch.tensor([1.0, torch.nan])), "weight.*NaN"),
        (lambda: CrossEntropy("mean", torch.tensor([1.0, torch.inf])), "weight.*infinite"),
        (lambda: CrossEntropy("mean", torch.ones(2, 2)), r"\(2, 2\).*\(K,\)"),
        (lambda: CrossEntropy("mean", label_smoothing=1.5), "label_smoothing=1.5.*0 and 1"),
        (lambda: CrossEntropy("mean", label_smoothing=float("nan")), "label_smoothing=nan"),
        (lambda: CrossEntropy("mean", label_smoothing=-0.1), "label_smoothing=-0.1"),
        (lambda: BinaryCrossEntropy("mean", -torch.ones(2)), "^BCEWithLogitsLoss: weight holds"),
        (lambda: BinaryCrossEntropy("mean", None, -torch.ones(2)), "^BCEW.*: pos_weight holds"),
    ],
    ids=range(11),
)
def test_an_option_out_of_its_range_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


ROWS = torch.zeros(5, 3)
INDEX = torch.zeros(5, dtype=torch.long)


@pytest.mark.parametrize(
    ("criterion", "y", "words"),
    [
        (CrossEntropy("mean", torch.ones(4)), INDEX, "4 class weights for 3 classes"),
        (CrossEntropy("mean", ignore_index=0), ROWS, "ignore_index=0 needs class indices"),
        (CrossEntropy("mean"), ROWS - 1, "negative or NaN.*not logits"),
        (CrossEntropy("mean"), INDEX + 3, r"3\.\.3.*3 classes"),
        (CrossEntropy("mean", ignore_index=0), torch.arange(5) // 4 * 3, r"3\.\.3.*3 classes"),
        (CrossEntropy("mean"), ROWS.long(), r"shape \(5,\).*targets have \(5, 3\)"),
        (BinaryCrossEntropy("mean"), ROWS + 2, r"outside 0\.\.1"),
        (BinaryCrossEntropy("mean"), ROWS[:, :1], r"^BCEWithLogitsLoss.*\(5, 3\).*\(5, 1\)"),
        (SquaredError("mean"), ROWS[:, :1], r"^MSELoss.*\(5, 3\).*\(5, 1\)"),
        (BinaryCrossEntropy("mean", torch.ones(4)), ROWS, r": weight has shape \(4,\).*\(5, 3\)"),
        (BinaryCrossEntropy("mean", torch.ones(1, 5, 3)), ROWS, r"\(1, 5, 3\).*\(5, 3\)"),
        (BinaryCrossEntropy("mean", None, torch.ones(5)), ROWS, r": pos_weight has shape \(5,\)"),
    ],
    ids=range(12),
)
def test_targets_and_weights_that_do_not_fit_are_refused(criterion, y, words):
    with pytest.raises(ValueError, match=words):
        criterion.check(ROWS, y)
