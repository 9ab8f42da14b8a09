"""Chunks of vectors, columns made when they are needed, and rows that are kept or made anew."""

import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layer_cases import all_vectors
from torch import nn
from truth import LOSSES as OPTIONS
from truth import To, labels, mlp, reduction_factor, relative_error, targets
from truth_layers import factors, keys, layers_of, rows

from kfac_lib import EKFAC, KFAC, Empirical, MonteCarlo, RandomSigns, TypeI, TypeII, exact_blocks
from kfac_lib import backward as under_test
from kfac_lib.backward import RootColumns, vectors_of
from kfac_lib.kfac import Held
from kfac_lib.losses import criterion_of

pytestmark = pytest.mark.usefixtures("float64")
few = settings(
    max_examples=20,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
MSE, CE, BCE = nn.MSELoss(), nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()
losses = pytest.mark.parametrize("loss", [MSE, CE, BCE], ids=["MSE", "CE", "BCE"])


def positions():
    """Predictions (N, 4, 3), with positions that mix."""
    return nn.Sequential(
        nn.Linear(4, 3),
        To(lambda z: z + z.roll(1, 1).sin() + z.mean(1, keepdim=True) ** 2),
        nn.Linear(3, 4),
        To(lambda z: z.movedim(-1, 1)),
    )


def skip():
    """Ways of different lengths to the prediction, and a narrow place on one of them."""

    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 9), nn.Linear(9, 3)
            self.c, self.d = nn.Linear(3, 5), nn.Linear(5, 36)
            self.e = nn.Linear(9, 36)

        def forward(self, x):
            z = self.a(x).tanh()
            return self.d(self.c(self.b(z).tanh()).tanh()) + self.e(z)

    return Skip()


NETS = {
    "few classes": (lambda: mlp(4, 5, 7), lambda N: torch.randn(N, 4)),
    "many classes": (lambda: mlp(4, 9, 5, 36), lambda N: torch.randn(N, 4)),
    "many classes, no head": (
        lambda: nn.Sequential(*mlp(4, 9, 5, 36), nn.Tanh()),
        lambda N: torch.randn(N, 4),
    ),
    "positions": (positions, lambda N: torch.randn(N, 3, 4)),
    "skip": (skip, lambda N: torch.randn(N, 4)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 7)),
        lambda N: torch.randn(N, 2, 4),
    ),
}
nets = pytest.mark.parametrize("net", NETS)


def example(net, loss, N=4):
    make, inputs = NETS[net]
    model, X = make(), inputs(N)
    return model, (X, labels(loss, model(X).detach()))


def same_factors(found, model, loss, data, fisher=None, vectors=None):
    """Equal to the table of constants, with loops over all vectors."""
    if vectors is None:
        vectors = all_vectors(fisher or TypeII(), model, loss, data)
    expected = factors(model, loss, data, vectors, "expand")
    assert list(found) == list(expected)
    for key, ((A, B),) in expected.items():
        assert relative_error(found[key].A, A) < 1e-12, key
        assert relative_error(found[key].B, B) < 1e-12, key
    return True


def same_eigenvalues(found, model, loss, data, vectors):
    """Equal to R Σ_{n,v} [Q_Bᵀ P Q_A]², with P from all vectors."""
    X, y = data
    R = reduction_factor(loss, model(X).detach(), y)
    for name, ((x, g),) in rows(model, X, vectors).items():
        (key,) = keys(name, layers_of(model)[name], "joint")
        P = torch.einsum("vnso,nsi->vnoi", g, x)
        values = torch.einsum("op,vnoi,ij->vnpj", found[key].Q_B, P, found[key].Q_A)
        assert relative_error(found[key].eigenvalues, R * values.square().sum((0, 1))) < 1e-12, key
    return True


# ---------------------------------------------------------------------------------------- columns


@st.composite
def predictions(draw):
    """A loss of any options, predictions with and without positions, and targets."""
    torch.manual_seed(draw(st.integers(0, 999)))
    factory, kind = OPTIONS[draw(st.sampled_from(sorted(OPTIONS)))]
    N, K = draw(st.integers(2, 4)), draw(st.integers(2, 4))
    shape = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    f, y = 2 * torch.randn(N, K, *shape), targets(kind, N, K, shape)
    return criterion_of(factory(K)), f, y


def outer_products(vectors):
    """Σ_v Δ Δᵀ of each datum."""
    flat = vectors.flatten(2)
    return torch.einsum("vnc,vnd->ncd", flat, flat)


@few
@given(example=predictions(), size=st.integers(1, 5))
def test_columns_that_are_made_when_needed_are_those_of_the_root(example, size):
    criterion, f, y = example
    root = criterion.hessian_root(f, y)
    columns = RootColumns(criterion, f, y)
    assert len(columns) == len(root) == f[0].numel()
    chunks = [columns[start : start + size] for start in range(0, len(columns), size)]
    assert all(chunk.shape[1:] == f.shape for chunk in chunks)
    assert [len(chunk) for chunk in chunks[:-1]] == [size] * (len(chunks) - 1)
    made = torch.cat(chunks)
    assert made.shape == root.shape
    assert relative_error(outer_products(made), outer_products(root)) < 1e-12
    assert relative_error(columns[:].square().sum(), root.square().sum()) < 1e-12
    assert len(columns[:0]) == 0


@few
@given(example=predictions())
def test_columns_and_the_minimal_root_have_the_hessians_of_autograd(example):
    criterion, f, y = example
    size = f[0].numel()
    H = [
        torch.autograd.functional.hessian(
            lambda one, n=n: criterion.value(one, y[n : n + 1]), f[n : n + 1]
        ).reshape(size, size)
        for n in range(len(f))
    ]
    columns = RootColumns(criterion, f, y)[:]
    assert relative_error(outer_products(columns), torch.stack(H)) < 1e-12


def test_a_large_root_is_made_chunk_by_chunk(monkeypatch):
    criterion, f, y = criterion_of(CE), torch.randn(5, 7), torch.randint(7, (5,))
    kinds = {}
    for memory in (5 * 7 * 7 * 8, 5 * 7 * 7 * 8 - 1):
        monkeypatch.setattr(under_test, "MEMORY", memory)
        kinds[memory] = type(vectors_of(TypeII("minimal"), criterion, f, y)).__name__
    assert list(kinds.values()) == ["Tensor", "RootColumns"]
    for fisher in (TypeI(), MonteCarlo(3), Empirical(), RandomSigns(2)):
        assert isinstance(vectors_of(fisher, criterion, f, y), torch.Tensor)


# ----------------------------------------------------------------------------------------- chunks


@nets
@losses
@pytest.mark.parametrize("memory", [1, 1000, 3000])
def test_chunks_chosen_by_memory_change_nothing(net, loss, memory, monkeypatch):
    model, data = example(net, loss)
    everything = KFAC.compute(model, loss, data)
    monkeypatch.setattr(under_test, "MEMORY", memory)
    found = KFAC.compute(model, loss, data)
    same_factors(found, model, loss, data)
    for name in everything:
        assert relative_error(found[name].B, everything[name].B) < 1e-12


def test_less_memory_means_more_and_smaller_chunks(calls, monkeypatch):
    model, data = example("few classes", CE)
    largest = []
    for memory in (2**24, 400, 1):
        calls.clear()
        monkeypatch.setattr(under_test, "MEMORY", memory)
        KFAC.compute(model, CE, data)
        largest.append(max(calls))
        assert sum(calls) in (6, 7)
    # Of each vector 4 data times 5 units, 8 bytes each, are held: 160 bytes.
    assert largest[0] == 6
    assert largest[1:] == [2, 1]


@nets
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 6, 11, 34, 35, 36, 100])
def test_a_chunk_size_changes_nothing(net, chunk_size):
    model, data = example(net, CE)
    same_factors(KFAC.compute(model, CE, data, chunk_size=chunk_size), model, CE, data)
    vectors = all_vectors(TypeII(), model, CE, data)
    found = EKFAC.compute(model, CE, data, chunk_size=chunk_size)
    same_eigenvalues(found, model, CE, data, vectors)


@nets
@pytest.mark.parametrize(
    "fisher", [TypeII("minimal"), TypeI(), Empirical()], ids=["minimal", "type-I", "empirical"]
)
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_a_chunk_size_changes_nothing_for_other_flavours(net, fisher, chunk_size):
    model, data = example(net, CE)
    found = KFAC.compute(model, CE, data, fisher, chunk_size=chunk_size)
    same_factors(found, model, CE, data, fisher)


@nets
@pytest.mark.parametrize("memory", [1, 2000, 2**24])
@pytest.mark.parametrize("kind", [MonteCarlo, RandomSigns])
def test_drawn_vectors_do_not_depend_on_chunks(net, kind, memory, monkeypatch):
    monkeypatch.setattr(under_test, "MEMORY", memory)
    model, data = example(net, CE)

    def fisher():
        return kind(37, torch.Generator().manual_seed(5))

    vectors = all_vectors(fisher(), model, CE, data)
    for chunk_size in (None, 9):
        found = KFAC.compute(model, CE, data, fisher(), chunk_size=chunk_size)
        same_factors(found, model, CE, data, vectors=vectors)
        found = EKFAC.compute(model, CE, data, fisher(), chunk_size=chunk_size)
        same_eigenvalues(found, model, CE, data, vectors)


@nets
def test_exact_blocks_do_not_depend_on_chunks(net, monkeypatch):
    model, data = example(net, CE, N=2)
    vectors = all_vectors(TypeII(), model, CE, data)
    R = reduction_factor(CE, model(data[0]).detach(), data[1])
    expected = {}
    for name, ((x, g),) in rows(model, data[0], vectors).items():
        P = torch.einsum("vnso,nsi->vnoi", g, x).flatten(2)
        expected[name] = R * torch.einsum("vnd,vne->de", P, P)
    for memory, chunk_size in ((2**24, 4), (1, None), (3000, None)):
        monkeypatch.setattr(under_test, "MEMORY", memory)
        found = exact_blocks(model, CE, data, order="rvec", chunk_size=chunk_size)
        for name, block in expected.items():
            assert relative_error(found[name], block) < 1e-12


# ------------------------------------------------------------------------------ rows that are kept


FLAVOURS = {
    "type-II": lambda: TypeII(),
    "type-I": lambda: TypeI(),
    "empirical": lambda: Empirical(),
    "Monte Carlo, own generator": lambda: MonteCarlo(3, torch.Generator().manual_seed(5)),
    "Monte Carlo, torch's generator": lambda: MonteCarlo(3),
    "signs, own generator": lambda: RandomSigns(40, torch.Generator().manual_seed(5)),
}


@nets
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_ekfac_is_the_same_whether_rows_are_kept_or_not(net, flavour, monkeypatch):
    model, data = example(net, CE)
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    torch.manual_seed(1)
    vectors = all_vectors(FLAVOURS[flavour](), model, CE, data)
    found, drawn_last, ran = {}, {}, {}
    for limit in (2**24, 500, 0):
        monkeypatch.setattr("kfac_lib.ekfac.Held", lambda limit=limit: Held(limit))
        torch.manual_seed(1)
        fisher = FLAVOURS[flavour]()
        passes.clear()
        found[limit] = EKFAC.compute(model, CE, data, fisher)
        ran[limit] = len(passes)
        generator = getattr(fisher, "generator", None)
        drawn_last[limit] = torch.rand(1, generator=generator)
        same_eigenvalues(found[limit], model, CE, data, vectors)
    assert ran[2**24] == 1
    assert ran[0] == 2
    for limit in (500, 0):
        # Whoever draws after it draws the same.
        assert torch.equal(drawn_last[limit], drawn_last[2**24])
        for name in found[0]:
            kept, anew = found[2**24][name], found[limit][name]
            assert relative_error(anew.to_dense("rvec"), kept.to_dense("rvec")) < 1e-12


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_ekfac_of_several_batches_draws_the_same_in_both_passes(flavour):
    model, (X, y) = example("many classes", CE, N=6)
    batches = [(X[:2], y[:2]), (X[2:], y[2:])]
    torch.manual_seed(1)
    fisher = FLAVOURS[flavour]()
    each = [all_vectors(fisher, model, CE, batch) for batch in batches]
    torch.manual_seed(1)
    found = EKFAC.compute(model, CE, batches, FLAVOURS[flavour]())
    vectors = torch.cat(each, dim=1)
    same_eigenvalues(found, model, CE, (X, y), vectors)


# ------------------------------------------------------------------------------------------ no_grad


@nets
@pytest.mark.parametrize("chunk_size", [None, 1, 5])
@pytest.mark.parametrize("traced", [False, True], ids=["hooks", "traced"])
def test_a_caller_without_grad_gets_the_same(net, chunk_size, traced):
    model, data = example(net, CE)
    options = {"params": dict(model.named_parameters())} if traced else {}
    for compute in (KFAC.compute, EKFAC.compute):
        expected = compute(model, CE, data, chunk_size=chunk_size, **options)
        with torch.no_grad():
            found = compute(model, CE, data, chunk_size=chunk_size, **options)
            assert not torch.is_grad_enabled()
        for name, block in expected.items():
            assert relative_error(found[name].to_dense("rvec"), block.to_dense("rvec")) < 1e-13
            assert not found[name].to_dense("rvec").requires_grad


@nets
@pytest.mark.parametrize("loaded", [False, True], ids=["without sympy", "with sympy"])
def test_one_vector_under_no_grad_is_backpropagated_as_well(net, loaded, monkeypatch):
    if not loaded:  # what torch would load to check the vectors that it is given
        monkeypatch.delitem(sys.modules, "sympy", raising=False)
    model, data = example(net, CE)
    with torch.no_grad():
        found = KFAC.compute(model, CE, data, Empirical())
        assert loaded or "sympy" not in sys.modules
    same_factors(found, model, CE, data, Empirical())
