import itertools

import pytest
import torch
from torch import nn
from truth import per_datum_gradients, relative_error

from kfac_lib import Empirical, InputOnly, MonteCarlo, RandomSigns, TypeI, TypeII
from kfac_lib.fisher import flavours
from kfac_lib.losses import BinaryCrossEntropy, CrossEntropy, SquaredError

pytestmark = pytest.mark.usefixtures("float64")
K, M = 3, 100_000
CRITERIA = [SquaredError("mean"), CrossEntropy("mean"), BinaryCrossEntropy("mean")]
WEIGHTED = [
    CrossEntropy("mean", torch.tensor([0.5, 2.0, 1.3]).double(), 1, 0.2),
    BinaryCrossEntropy("mean", None, torch.tensor(3.0).double()),
]
IDS = ["MSE", "CE", "BCE", "CE weighted", "BCE weighted"]
criteria = pytest.mark.parametrize("criterion", CRITERIA, ids=IDS[:3])
all_criteria = pytest.mark.parametrize("criterion", CRITERIA + WEIGHTED, ids=IDS)
positions = pytest.mark.parametrize("shape", [(), (2,)], ids=["2d", "positions"])
FLAVOURS = [
    TypeII(),
    TypeII("minimal"),
    TypeI(),
    MonteCarlo(4),
    Empirical(),
    RandomSigns(4),
    InputOnly(),
]


def example(criterion, shape, N=2):
    f = torch.randn(N, K, *shape)
    if isinstance(criterion, CrossEntropy):
        return f, torch.tensor([0, 2] * N).repeat(f[0, 0].numel())[: N * f[0, 0].numel()].reshape(
            N, *shape
        )
    return f, (f > 0).double() if isinstance(criterion, BinaryCrossEntropy) else torch.randn_like(f)


def hessians(criterion, f, y):
    """The Hessian of every datum's criterion by autograd, (N, C, C)."""
    H = torch.func.hessian(lambda f: criterion.value(f, y))(f)
    H = H.reshape(len(f), f[0].numel(), len(f), -1)
    return torch.stack([H[n, :, n] for n in range(len(f))])


def sum_of_squares(vectors):
    v = vectors.flatten(2)
    return torch.einsum("vnc,vnk->nck", v, v)


def z_score(vectors, expected):
    """Largest distance of Σ_v Δ Δᵀ from a matrix, in standard errors of the mean over samples.

    An entry that is the same for every draw, as some are for random signs, must be right to
    rounding: its standard error is the rounding of the sum.
    """
    v = vectors.flatten(2) * len(vectors) ** 0.5
    outer = torch.einsum("vnc,vnk->vnck", v, v)
    error = outer.std(0) / len(v) ** 0.5 + 1e-12
    return float(((sum_of_squares(vectors) - expected).abs() / error).max())


def seeded(flavour, seed=1):
    return flavour(M, torch.Generator().manual_seed(seed))


@all_criteria
@positions
def test_type_ii_full_and_minimal_and_type_i_are_the_hessian(criterion, shape):
    f, y = example(criterion, shape)
    H = hessians(criterion, f, y)
    for flavour in (TypeII(), TypeII("minimal"), TypeI()):
        assert relative_error(sum_of_squares(flavour.vectors(criterion, f, y)), H) < 1e-12
    assert relative_error(sum_of_squares(Empirical().vectors(criterion, f, y)), H) > 0.1


@positions
def test_enumerated_labels_are_the_columns_of_the_root_up_to_sign(shape):
    criterion = CrossEntropy("mean")
    f, y = example(criterion, shape)
    columns, labels = (flavour.vectors(criterion, f, y) for flavour in (TypeII(), TypeI()))
    assert relative_error(columns, -labels) < 1e-12


@positions
def test_enumeration_is_the_expectation_over_all_labels(shape):
    """The definition, written out: Σ_y r(y) ∇log r ∇log rᵀ over the labels of all positions."""
    f = torch.randn(2, K, *shape)
    for criterion, choices in ((CRITERIA[1], K), (CRITERIA[2], 2)):
        index = criterion is CRITERIA[1]
        label_shape = (2, *shape) if index else tuple(f.shape)
        size = f[0, 0].numel() if index else f[0].numel()
        expected = torch.zeros(2, f[0].numel(), f[0].numel())
        for labels in itertools.product(range(choices), repeat=size):
            y = torch.tensor(labels).expand(2, size).reshape(label_shape)
            leaf = f.clone().requires_grad_()
            if index:
                r = torch.distributions.Categorical(logits=leaf.movedim(1, -1))
            else:
                r, y = torch.distributions.Bernoulli(logits=leaf), y.double()
            log_r = r.log_prob(y).reshape(2, -1).sum(1)
            (g,) = torch.autograd.grad(log_r.sum(), leaf)
            g = g.reshape(2, -1)
            expected += log_r.detach().exp()[:, None, None] * g.unsqueeze(2) * g.unsqueeze(1)
        found = sum_of_squares(TypeI().vectors(criterion, f, example(criterion, shape)[1]))
        assert relative_error(found, expected) < 1e-12


@all_criteria
@positions
def test_random_signs_averaged_over_all_signs_are_the_hessian(criterion, shape):
    f, y = example(criterion, shape)
    C = f[0].numel()
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=C)))
    u = signs.reshape(-1, 1, *f.shape[1:]).expand(-1, *f.shape)
    vectors = criterion.hessian_root_product(f, y, u) / len(signs) ** 0.5
    H = hessians(criterion, f, y)
    assert relative_error(sum_of_squares(vectors), H) < 1e-12
    half = vectors[: len(vectors) // 2 - 1] * 2**0.5
    assert relative_error(sum_of_squares(half), H) > 0.01


@all_criteria
@positions
@pytest.mark.parametrize("flavour", [MonteCarlo, RandomSigns])
def test_draws_are_type_ii_in_expectation(criterion, shape, flavour):
    f, y = example(criterion, shape)
    vectors = seeded(flavour).vectors(criterion, f, y)
    H = hessians(criterion, f, y)
    assert z_score(vectors, H) < 5
    assert z_score(vectors, 1.05 * H) > 5  # a scale of 5 % off
    assert z_score(vectors * M**0.5, H) > 5  # 1/√M forgotten


@criteria
@positions
def test_labels_from_a_wrong_temperature_fail_the_test(criterion, shape):
    f, y = example(criterion, shape)
    if isinstance(criterion, SquaredError):  # noise of another width
        labels = f + 1.1 * (criterion.sample(f, M, None) - f)
    else:
        labels = criterion.sample(f / 1.2, M, None)
    wrong = -criterion.log_likelihood_gradient(f, labels) / M**0.5
    assert z_score(wrong, hessians(criterion, f, y)) > 5


@all_criteria
def test_the_trace_shows_whether_the_samples_are_averaged(criterion):
    f, y = example(criterion, ())
    for flavour in (MonteCarlo, RandomSigns):
        trace = sum_of_squares(seeded(flavour).vectors(criterion, f, y)).diagonal(dim1=1, dim2=2)
        expected = hessians(criterion, f, y).diagonal(dim1=1, dim2=2).sum(1)
        assert relative_error(trace.sum(1), expected) < 0.05


@criteria
def test_empirical_is_the_gradient_of_the_criterion(criterion):
    f, y = example(criterion, (2,))
    loss = {
        CrossEntropy: nn.CrossEntropyLoss(),
        SquaredError: nn.MSELoss(),
        BinaryCrossEntropy: nn.BCEWithLogitsLoss(),
    }[type(criterion)]
    expected = per_datum_gradients(nn.Identity(), loss, (f, y))
    assert relative_error(Empirical().vectors(criterion, f, y), expected) < 1e-12


@criteria
@positions
def test_monte_carlo_is_the_gradient_for_each_drawn_label_with_its_sign(criterion, shape):
    f, y = example(criterion, shape)
    labels = criterion.sample(f, 3, torch.Generator().manual_seed(0))
    vectors = MonteCarlo(3, torch.Generator().manual_seed(0)).vectors(criterion, f, y)
    for label, vector in zip(labels, vectors, strict=True):
        gradient = torch.func.grad(lambda f, label=label: criterion.value(f, label))(f)
        assert relative_error(3**0.5 * vector, gradient) < 1e-12


@criteria
@positions
@pytest.mark.parametrize("flavour", FLAVOURS, ids=repr)
def test_shapes_and_dtype_are_those_of_the_prediction(criterion, shape, flavour):
    f, y = example(criterion, shape)
    f, y = f.float().requires_grad_(), y if y.dtype == torch.long else y.float()
    vectors = flavour.vectors(criterion, f, y)
    T, ce = f[0, 0].numel(), isinstance(criterion, CrossEntropy)
    V = {
        "TypeII(columns='full')": K * T,
        "TypeII(columns='minimal')": (K - ce) * T,
        "TypeI()": K * T if ce else 2 * K * T,
        "MonteCarlo(samples=4)": 4,
        "Empirical()": 1,
        "RandomSigns(samples=4)": 4,
        "InputOnly()": 0,
    }
    assert vectors.shape == (V[repr(flavour)], *f.shape)
    assert vectors.dtype == torch.float32
    assert not vectors.requires_grad


@all_criteria
@positions
@pytest.mark.parametrize("flavour", FLAVOURS, ids=repr)
def test_vectors_live_on_the_device_of_the_prediction(criterion, shape, flavour):
    """On the device "meta", where tensors have no entries: one made elsewhere is an error."""
    f, y = (t.to("meta") for t in example(criterion, shape))
    assert flavour.vectors(criterion, f, y).device == f.device
    assert criterion.counted(f, y).device == f.device


@pytest.mark.parametrize("kind", [MonteCarlo, RandomSigns])
@criteria
def test_a_generator_makes_the_draws_reproducible_and_leaves_torchs_own_alone(criterion, kind):
    f, y = example(criterion, ())

    def draw(seed):
        flavour = kind(5, torch.Generator().manual_seed(seed))
        return flavour.vectors(criterion, f, y)

    before = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", [MonteCarlo, RandomSigns])
@criteria
def test_without_a_generator_torchs_default_is_used(criterion, kind):
    f, y = example(criterion, ())
    torch.manual_seed(3)
    first = kind(5).vectors(criterion, f, y)
    assert not torch.equal(kind(5).vectors(criterion, f, y), first)
    torch.manual_seed(3)
    assert torch.equal(kind(5).vectors(criterion, f, y), first)


def test_samples_of_a_datum_and_of_its_positions_are_independent():
    criterion = CrossEntropy("mean")
    f = torch.zeros(1, 2, 2)
    labels = criterion.sample(f, 40_000, torch.Generator().manual_seed(0))[:, 0].double()
    assert abs(torch.corrcoef(labels.T)[0, 1]) < 5 / 200
    assert abs((labels[1:] - 0.5).mul(labels[:-1] - 0.5).mean()) < 5 * 0.25 / 200


@pytest.mark.parametrize("samples", [0, -1, 1.5, True, "3"])
def test_samples_must_be_a_positive_integer(samples):
    for kind in (MonteCarlo, RandomSigns):
        with pytest.raises(ValueError, match=r"samples=.*positive integer"):
            kind(samples)


def test_flavours_that_draw_draw_once_and_their_generator_is_no_part_of_what_they_are():
    for kind in (MonteCarlo, RandomSigns):
        assert kind() == kind(1) == kind(1, torch.Generator())
        assert kind(1) != kind(2)
        assert repr(kind(1, torch.Generator())) == f"{kind.__name__}(samples=1)"


def test_unknown_columns_are_refused():
    with pytest.raises(ValueError, match=r"'few'.*full.*minimal"):
        TypeII("few")


def test_signs_of_data_positions_and_samples_are_independent():
    f = torch.zeros(2, 1, 2)
    draws = RandomSigns(40_000, torch.Generator().manual_seed(0)).vectors(
        SquaredError("mean"), f, f
    )
    signs = draws.flatten(1).sign()
    correlation = torch.corrcoef(signs.T) - torch.eye(4)
    assert correlation.abs().max() < 5 / 200
    assert (signs[1:] * signs[:-1]).mean(0).abs().max() < 5 / 200


def test_all_flavours_are_named():
    for kind in (TypeII, TypeI, MonteCarlo, Empirical, RandomSigns, InputOnly):
        assert f"{kind.__name__}()" in flavours()
