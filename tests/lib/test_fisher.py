import pytest
import torch
from torch import nn
from truth import per_datum_gradients, relative_error

from kfac_lib.fisher import Empirical, MonteCarlo, TypeII
from kfac_lib.losses import CrossEntropy, SquaredError

pytestmark = pytest.mark.usefixtures("float64")
K, M = 3, 100_000
criteria = pytest.mark.parametrize("criterion", [SquaredError("mean"), CrossEntropy("mean")])
positions = pytest.mark.parametrize("shape", [(), (2,)], ids=["2d", "positions"])
FLAVOURS = [TypeII(), TypeII("minimal"), MonteCarlo(4), Empirical()]


def example(criterion, shape, N=2):
    f = torch.randn(N, K, *shape)
    ce = isinstance(criterion, CrossEntropy)
    return f, torch.randint(K, (N, *shape)) if ce else torch.randn_like(f)


def hessians(criterion, f, y):
    """The Hessian of every datum's criterion by autograd, (N, C, C)."""
    H = torch.func.hessian(lambda f: criterion.value(f, y))(f)
    H = H.reshape(len(f), f[0].numel(), len(f), -1)
    return torch.stack([H[n, :, n] for n in range(len(f))])


def sum_of_squares(vectors):
    v = vectors.flatten(2)
    return torch.einsum("vnc,vnk->nck", v, v)


def z_score(vectors, expected):
    """Largest distance of Σ_v Δ Δᵀ from a matrix, in standard errors of the mean over samples."""
    v = vectors.flatten(2) * len(vectors) ** 0.5
    outer = torch.einsum("vnc,vnk->vnck", v, v)
    error = outer.std(0) / len(v) ** 0.5
    return float(((sum_of_squares(vectors) - expected).abs() / error).max())


@criteria
@positions
def test_type_ii_full_and_minimal_are_the_hessian(criterion, shape):
    f, y = example(criterion, shape)
    H = hessians(criterion, f, y)
    for flavour in (TypeII(), TypeII("minimal")):
        assert relative_error(sum_of_squares(flavour.vectors(criterion, f, y)), H) < 1e-12
    assert relative_error(sum_of_squares(Empirical().vectors(criterion, f, y)), H) > 0.1


@positions
def test_all_labels_enumerated_with_their_probability_give_type_ii(shape):
    criterion = CrossEntropy("mean")
    f, y = example(criterion, shape)
    labels = torch.arange(K).reshape(K, *[1] * y.ndim).expand(K, *y.shape)
    gradients = criterion.log_likelihood_gradient(f, labels)
    p = f.softmax(1)
    for t in range(f[0, 0].numel()):
        g, q = gradients.reshape(K, 2, K, -1)[..., t], p.reshape(2, K, -1)[..., t]
        H = torch.diag_embed(q) - torch.einsum("nk,nj->nkj", q, q)
        assert relative_error(torch.einsum("ny,ynk,ynj->nkj", q, g, g), H) < 1e-12


@criteria
@positions
def test_monte_carlo_is_type_ii_in_expectation(criterion, shape):
    f, y = example(criterion, shape)
    vectors = MonteCarlo(M, torch.Generator().manual_seed(1)).vectors(criterion, f, y)
    H = hessians(criterion, f, y)
    assert z_score(vectors, H) < 5
    assert z_score(vectors, 1.05 * H) > 5
    # A wrong temperature: drawn from softmax(f/1.2), or with a noise of another width.
    if isinstance(criterion, CrossEntropy):
        labels = criterion.sample(f / 1.2, M, None)
    else:
        labels = f + 1.1 * (criterion.sample(f, M, None) - f)
    wrong = -criterion.log_likelihood_gradient(f, labels) / M**0.5
    assert z_score(wrong, H) > 5


@criteria
def test_monte_carlo_needs_one_over_the_root_of_the_samples(criterion):
    f, y = example(criterion, ())
    vectors = MonteCarlo(M).vectors(criterion, f, y)
    trace = sum_of_squares(vectors).diagonal(dim1=1, dim2=2).sum(1)
    expected = hessians(criterion, f, y).diagonal(dim1=1, dim2=2).sum(1)
    assert relative_error(trace, expected) < 0.05


@criteria
def test_empirical_is_the_gradient_of_the_criterion(criterion):
    f, y = example(criterion, (2,))
    loss = nn.CrossEntropyLoss() if isinstance(criterion, CrossEntropy) else nn.MSELoss()
    expected = per_datum_gradients(nn.Identity(), loss, (f, y))
    assert relative_error(Empirical().vectors(criterion, f, y), expected) < 1e-12


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
        "MonteCarlo(samples=4)": 4,
        "Empirical()": 1,
    }
    assert vectors.shape == (V[repr(flavour)], *f.shape)
    assert vectors.dtype == torch.float32
    assert not vectors.requires_grad


@criteria
def test_a_generator_makes_the_draws_reproducible_and_leaves_torchs_own_alone(criterion):
    f, y = example(criterion, ())

    def draw(seed):
        flavour = MonteCarlo(5, torch.Generator().manual_seed(seed))
        return flavour.vectors(criterion, f, y)

    before = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), before)


@criteria
def test_without_a_generator_torchs_default_is_used(criterion):
    f, y = example(criterion, ())
    torch.manual_seed(3)
    first = MonteCarlo(5).vectors(criterion, f, y)
    assert not torch.equal(MonteCarlo(5).vectors(criterion, f, y), first)
    torch.manual_seed(3)
    assert torch.equal(MonteCarlo(5).vectors(criterion, f, y), first)


def test_samples_of_a_datum_and_of_its_positions_are_independent():
    criterion = CrossEntropy("mean")
    f = torch.zeros(1, 2, 2)
    labels = criterion.sample(f, 40_000, torch.Generator().manual_seed(0))[:, 0].double()
    assert abs(torch.corrcoef(labels.T)[0, 1]) < 5 / 200
    assert abs((labels[1:] - 0.5).mul(labels[:-1] - 0.5).mean()) < 5 * 0.25 / 200


@pytest.mark.parametrize("samples", [0, -1, 1.5, True, "3"])
def test_samples_must_be_a_positive_integer(samples):
    with pytest.raises(ValueError, match=r"samples=.*positive integer"):
        MonteCarlo(samples)


def test_unknown_columns_are_refused():
    with pytest.raises(ValueError, match=r"'few'.*full.*minimal"):
        TypeII("few")
