"""EKFAC: the best eigenvalues in KFAC's basis, and what follows from that (exact case 10)."""

import pytest
import torch
from layer_cases import (
    FLAVOURS,
    LOSSES,
    NETS,
    SHARINGS,
    drawn,
    example,
    is_fisher_of_draws,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from truth import left_alone, mlp, reduction_factor, relative_error
from truth_layers import blocks, factors, in_order, keys, layers_of, rows

from kfac_lib import (
    EKFAC,
    KFAC,
    Empirical,
    Exact,
    InputOnly,
    MonteCarlo,
    RandomSigns,
    Reduce,
    TypeII,
    nearest_kronecker,
)
from kfac_lib.losses import criterion_of

pytestmark = pytest.mark.usefixtures("float64")
MSE, CE = nn.MSELoss(), nn.CrossEntropyLoss()
nets = pytest.mark.parametrize("net", NETS)
flavours = pytest.mark.parametrize("flavour", FLAVOURS)
sharings = pytest.mark.parametrize("sharing", SHARINGS)
biases = pytest.mark.parametrize("bias", ["joint", "separate"])
orders = pytest.mark.parametrize("order", ["cvec", "rvec"])


def of_groups(element):
    return getattr(element, "blocks", [element])


def basis(E):
    """Q_A and Q_B as matrices; None stands for the identity."""
    return torch.eye(E.shape[1]) if E.Q_A is None else E.Q_A, E.Q_B


def eigenvalues(model, loss, data, vectors, bases, bias):
    """λ_{o,i} = R Σ_{n,v} [Q_Bᵀ P_{n,v} Q_A]²_{o,i} for each key and group, with loops."""
    X, y = data
    R = reduction_factor(loss, model(X).detach(), y)
    result = {}
    for name, groups in rows(model, X, vectors).items():
        for key, columns in keys(name, layers_of(model)[name], bias).items():
            result[key] = []
            for (x, g), (Q_A, Q_B) in zip(groups, bases[key], strict=True):
                squares = 0
                for v in range(len(g)):
                    for n in range(len(x)):
                        P = g[v, n].T @ x[n][:, columns]  # Σ_s g x̃ᵀ
                        squares = squares + (Q_B.T @ P @ Q_A) ** 2
                result[key].append(R * squares)
    return result


def dense_of_eigen(parts, order):
    """Blockdiag of (Q_B ⊗ Q_A) diag(λ) (Q_B ⊗ Q_A)ᵀ over the groups."""
    each = []
    for (Q_A, Q_B), values in parts:
        Q = torch.kron(Q_B, Q_A)
        each.append(Q @ torch.diag(values.flatten()) @ Q.T)
    return in_order(torch.block_diag(*each), len(parts[0][0][0]), order)


def is_diagonal(M, scale):
    return (M - torch.diag(M.diagonal())).norm() < 1e-10 * scale


def matches_the_formula(found, model, loss, data, vectors, sharing, bias):
    """The basis is that of the table's A and B, and λ is the loops'."""
    pairs = factors(model, loss, data, vectors, sharing, bias)
    assert list(found) == list(pairs)
    bases = {key: [basis(E) for E in of_groups(found[key])] for key in found}
    expected = eigenvalues(model, loss, data, vectors, bases, bias)
    for key, groups in pairs.items():
        assert len(of_groups(found[key])) == len(groups)
        for (A, B), (Q_A, Q_B) in zip(groups, bases[key], strict=True):
            for factor, Q in ((A, Q_A), (B, Q_B)):
                assert torch.allclose(Q.T @ Q, torch.eye(len(Q)), atol=1e-10)
                assert is_diagonal(Q.T @ factor @ Q, factor.norm())
        for E, values in zip(of_groups(found[key]), expected[key], strict=True):
            assert relative_error(E.eigenvalues, values) < 1e-10
        parts = list(zip(bases[key], expected[key], strict=True))
        for order in ("cvec", "rvec"):
            assert relative_error(found[key].to_dense(order), dense_of_eigen(parts, order)) < 1e-10


def is_the_best_in_its_basis(found, kfac, G, order):
    """Tr E = tr G, ‖G‖² = ‖E‖² + ‖G − E‖², and E is no worse than KFAC."""
    assert list(found) == list(kfac) == list(G)
    for key, block in G.items():
        E, K, norm = found[key].to_dense(order), kfac[key].to_dense(order), block.norm()
        assert abs(E.trace() - block.trace()) < 1e-10 * block.trace()
        assert abs(norm**2 - E.norm() ** 2 - (block - E).norm() ** 2) < 1e-10 * norm**2
        assert (block - E).norm() <= (block - K).norm() + 1e-12 * norm
        assert abs(found[key].trace() - block.trace()) < 1e-10 * block.trace()


@nets
@flavours
@sharings
def test_eigenvalues_are_those_of_the_loops(net, flavour, sharing):
    loss, fisher = LOSSES["CE"], FLAVOURS[flavour]
    model, data = example(net, loss, 3)
    for bias in ("joint", "separate"):
        (vectors,) = drawn(fisher, model, loss, data)
        with left_alone(model):
            found = EKFAC.compute(model, loss, data, fisher, SHARINGS[sharing], bias=bias)
        matches_the_formula(found, model, loss, data, vectors, sharing, bias)


@nets
@flavours
@sharings
@pytest.mark.parametrize("loss", ["MSE", "CE sum"])
def test_ekfac_has_the_trace_of_the_block_and_is_the_nearest_in_its_basis(
    net, flavour, sharing, loss
):
    loss, fisher = LOSSES[loss], FLAVOURS[flavour]
    model, data = example(net, loss, 3)
    for bias, order in (("joint", "cvec"), ("separate", "rvec")):
        (vectors,) = drawn(fisher, model, loss, data)
        given = vectors if is_fisher_of_draws(flavour) else None
        G = blocks(model, loss, data, order, given, bias)
        torch.manual_seed(1)
        found = EKFAC.compute(model, loss, data, fisher, SHARINGS[sharing], bias=bias)
        torch.manual_seed(1)
        kfac = KFAC.compute(model, loss, data, fisher, SHARINGS[sharing], bias=bias)
        is_the_best_in_its_basis(found, kfac, G, order)
        # A control: KFAC has another trace, and is strictly worse.
        first = next(iter(G))
        K, E = (which[first].to_dense(order) for which in (kfac, found))
        assert abs(K.trace() / G[first].trace() - 1) > 1e-3
        assert (G[first] - E).norm() < (G[first] - K).norm() - 1e-6 * G[first].norm()


@pytest.mark.parametrize("size", [(4, 3), (4, 6, 3), (3, 5, 4, 3)])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@flavours
def test_on_linear_layers_without_sharing(size, activation, flavour):
    model, fisher = mlp(*size, activation=activation), FLAVOURS[flavour]
    data = torch.randn(6, size[0]), torch.randint(3, (6,))
    (vectors,) = drawn(fisher, model, CE, data)
    given = vectors if is_fisher_of_draws(flavour) else None
    G = blocks(model, CE, data, "rvec", given)
    torch.manual_seed(1)
    found = EKFAC.compute(model, CE, data, fisher)
    matches_the_formula(found, model, CE, data, vectors, "expand", "joint")
    torch.manual_seed(1)
    is_the_best_in_its_basis(found, KFAC.compute(model, CE, data, fisher), G, "rvec")


def test_where_kfac_is_exact_ekfac_is_too():
    model, data = mlp(4, 6, 3), (torch.randn(1, 4), torch.tensor([1]))
    found = EKFAC.compute(model, CE, data)
    for name, block in blocks(model, CE, data, "cvec").items():
        assert relative_error(found[name].to_dense("cvec"), block) < 1e-10


# Batches, chunks, draws


def batches_of(data, sizes):
    X, y = data
    return list(zip(X.split(sizes), y.split(sizes), strict=True))


def joined(vectors):
    return torch.cat(vectors, dim=1)


@nets
@flavours
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_many_batches_and_chunks_are_one_batch_with_the_same_draws(net, flavour, chunk_size):
    loss, fisher = LOSSES["CE"], FLAVOURS[flavour]
    model, data = example(net, loss, 6)
    batches = batches_of(data, [1, 3, 2])
    vectors = joined(drawn(fisher, model, loss, *batches))
    found = EKFAC.compute(model, loss, batches, fisher, chunk_size=chunk_size)
    matches_the_formula(found, model, loss, data, vectors, "expand", "joint")


DRAWN = {"Monte Carlo": MonteCarlo, "signs": RandomSigns}


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize("seeded", [True, False], ids=["own generator", "default generator"])
@sharings
def test_both_passes_draw_the_same(kind, seeded, sharing):
    model, data = example("conv1d", CE, 6)
    batches = batches_of(data, [2, 4])

    def fisher():
        generator = torch.Generator().manual_seed(3) if seeded else None
        return DRAWN[kind](2, generator)

    vectors = joined(drawn(fisher(), model, CE, *batches))
    G = blocks(model, CE, data, "cvec", vectors)
    once = fisher()
    found = EKFAC.compute(model, CE, batches, once, SHARINGS[sharing])
    matches_the_formula(found, model, CE, data, vectors, sharing, "joint")
    for name, block in G.items():
        assert abs(found[name].trace() / block.trace() - 1) < 1e-10
    # A control: other draws have another trace.
    torch.manual_seed(2)
    other = EKFAC.compute(model, CE, batches, once, SHARINGS[sharing])
    assert abs(other["0"].trace() / G["0"].trace() - 1) > 1e-3


def test_the_generator_stands_afterwards_where_one_pass_leaves_it():
    model, data = example("conv1d", CE, 6)
    states = []
    for compute in (KFAC.compute, EKFAC.compute):
        torch.manual_seed(1)
        generator = torch.Generator().manual_seed(3)
        compute(model, CE, data, MonteCarlo(2, generator))
        compute(model, CE, data, MonteCarlo(2))
        states.append((generator.get_state(), torch.get_rng_state()))
    for one, two in zip(*states, strict=True):
        assert torch.equal(one, two)


class Passes:
    """An iterable that counts how often it is read, and how far."""

    def __init__(self, batches):
        self.batches, self.passes, self.given = batches, 0, 0

    def __iter__(self):
        self.passes += 1
        for batch in self.batches:
            self.given += 1
            yield batch


@pytest.mark.parametrize("fisher", [TypeII(), MonteCarlo(), Empirical()], ids=repr)
def test_the_data_are_read_exactly_twice(fisher):
    model, data = example("embedding", CE, 6)
    counted = Passes(batches_of(data, [1, 3, 2]))
    EKFAC.compute(model, CE, counted, fisher)
    assert (counted.passes, counted.given) == (2, 6)
    KFAC.compute(model, CE, counted, fisher)
    assert (counted.passes, counted.given) == (3, 9)


@pytest.mark.parametrize("one_shot", [iter, lambda batches: (batch for batch in batches)])
def test_an_iterator_that_can_be_read_once_is_refused(one_shot):
    model, data = example("conv1d", CE, 4)
    given = one_shot(batches_of(data, [2, 2]))
    with left_alone(model), pytest.raises((TypeError, ValueError), match=r"once.*two passes.*list"):
        EKFAC.compute(model, CE, given)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("flavour", ["type-II", "empirical", "Monte Carlo"])
def test_a_data_loader_works(shuffle, flavour):
    model, data = example("conv1d", CE, 6)
    fisher, loader = FLAVOURS[flavour], DataLoader(TensorDataset(*data), 4, shuffle=shuffle)
    torch.manual_seed(1)
    batches, vectors = [], []
    for X, y in loader:  # the loader draws from torch's default generator too
        batches.append((X, y))
        vectors += [fisher.vectors(criterion_of(CE), model(X).detach(), y)]
    data = tuple(torch.cat(of_all) for of_all in zip(*batches, strict=True))
    torch.manual_seed(1)
    found = EKFAC.compute(model, CE, loader, fisher)
    matches_the_formula(found, model, CE, data, joined(vectors), "expand", "joint")


@pytest.mark.parametrize("own", [False, True], ids=["default", "own generator"])
def test_a_shuffling_data_loader_and_a_generator_of_the_fisher_belong_together(own):
    model, data = example("conv1d", CE, 8)
    order = torch.Generator() if own else torch.default_generator
    loader = DataLoader(TensorDataset(*data), 3, shuffle=True, generator=order if own else None)
    order.manual_seed(1)
    fisher, batches, vectors = MonteCarlo(2, torch.Generator().manual_seed(3)), [], []
    for X, y in loader:
        batches.append((X, y))
        vectors += [fisher.vectors(criterion_of(CE), model(X).detach(), y)]
    data = tuple(torch.cat(of_all) for of_all in zip(*batches, strict=True))
    order.manual_seed(1)
    found = EKFAC.compute(model, CE, loader, MonteCarlo(2, torch.Generator().manual_seed(3)))
    matches_the_formula(found, model, CE, data, joined(vectors), "expand", "joint")


def test_batches_in_another_order_are_refused_where_vectors_are_drawn():
    model, (X, y) = example("conv1d", CE, 8)

    class Turning:
        """Batches that come in the other order each time."""

        def __init__(self):
            self.batches = [(X[:3], y[:3]), (X[3:], y[3:])]

        def __iter__(self):
            self.batches = self.batches[::-1]
            return iter(self.batches)

    with pytest.raises(ValueError, match=r"another order.*list of batches"):
        EKFAC.compute(model, CE, Turning(), MonteCarlo(2))
    assert (
        EKFAC.compute(model, CE, Turning(), TypeII()).keys()
        == KFAC.compute(model, CE, (X, y)).keys()
    )


@sharings
@pytest.mark.parametrize("kind", [nn.MSELoss, nn.CrossEntropyLoss])
def test_the_data_twice_are_the_same_under_mean_and_doubled_under_sum(sharing, kind):
    for reduction, factor in (("mean", 1), ("sum", 2)):
        loss = kind(reduction=reduction)
        model, data = example("embedding", kind(), 5)
        once, twice = (
            EKFAC.compute(model, loss, given, sharing=SHARINGS[sharing])
            for given in (data, [data, data])
        )
        for name in once:
            expected = factor * once[name].trace()
            assert relative_error(twice[name].trace(), expected) < 1e-10


def test_data_whose_labels_are_ignored_change_nothing():
    loss = nn.CrossEntropyLoss(ignore_index=1)
    model, (X, y) = example("embedding", loss, 4)
    y = y.where(y != 1, 0)
    padded = [(X, y), (X[:2], torch.ones(2, *y.shape[1:]).long())]
    expected, found = (EKFAC.compute(model, loss, given) for given in ((X, y), padded))
    for name in expected:
        assert relative_error(found[name].to_dense("rvec"), expected[name].to_dense("rvec")) < 1e-10


# The mapping


@biases
def test_it_is_a_mapping_in_the_models_order(bias):
    model, data = example("conv2d in groups", CE, 4)
    found = EKFAC.compute(model, CE, data, bias=bias)
    kfac = KFAC.compute(model, CE, data, bias=bias)
    assert list(found) == list(kfac)
    assert len(found) == len(kfac)
    assert {key: tuple(E.shape) for key, E in found.items()} == {
        key: tuple(K.shape) for key, K in kfac.items()
    }
    with pytest.raises(KeyError):
        found["9"]


@nets
@biases
def test_dense_trace_and_logdet_are_over_all_layers(net, bias):
    model, data = example(net, CE, 4)
    found = EKFAC.compute(model, CE, data, bias=bias)
    for order in ("cvec", "rvec"):
        whole = found.to_dense(order)
        parts = [E.to_dense(order) for E in found.values()]
        assert relative_error(whole, torch.block_diag(*parts)) < 1e-14
    assert relative_error(found.trace(), whole.trace()) < 1e-12
    assert found.trace().shape == ()
    values = torch.cat([E.eigenvalues.flatten() for K in found.values() for E in of_groups(K)])
    assert relative_error(found.trace(), values.sum()) < 1e-12
    if (values > 1e-6).all():
        assert relative_error(found.logdet(), torch.linalg.slogdet(whole)[1]) < 1e-8
    if (values == 0).any():
        assert found.logdet() == -torch.inf
    with pytest.raises(ValueError, match=r"cvec.*rvec"):
        found.to_dense("vec")


def test_logdet_is_that_of_the_dense_matrix():
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 3))
    data = torch.randn(20, 2), torch.randn(20, 3)
    found = EKFAC.compute(model, MSE, data)
    assert relative_error(found.logdet(), torch.linalg.slogdet(found.to_dense("cvec"))[1]) < 1e-8


@nets
@biases
def test_precondition_applies_the_exactly_damped_inverse_of_every_layer(net, bias):
    model, data = example(net, CE, 4)
    found = EKFAC.compute(model, CE, data, bias=bias)
    gradients = {key: torch.randn(*E.shape) for key, E in found.items()}
    result = found.precondition(gradients, Exact(0.1))
    assert list(result) == list(found)
    for key, E in found.items():
        M = E.to_dense("rvec")
        expected = torch.linalg.solve(M + 0.1 * torch.eye(len(M)), gradients[key].flatten())
        assert result[key].shape == gradients[key].shape
        assert relative_error(result[key].flatten(), expected) < 1e-10
    with pytest.raises(ValueError, match=r"Gradients are given for.*factors are there"):
        found.precondition({}, Exact(0.1))


def test_repr_names_what_is_covered_frozen_and_ignored():
    model, data = example("embedding and conv", CE, 4)
    model[2].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    text = repr(EKFAC.compute(model, CE, data, Empirical(), Reduce()))
    assert text.startswith("EKFAC(Empirical(), Reduce())")
    assert "0: " in text
    assert "frozen: 2.weight, 2.bias" in text
    assert "ignored: none" in text
    data = torch.randn(4, 4), torch.randn(4, 3)
    text = repr(EKFAC.compute(mlp(4, 3, 3), MSE, data, ignore="0"))
    assert "ignored: 0.weight, 0.bias" in text


def test_an_embedding_keeps_its_basis_as_it_is_under_expand():
    model, data = example("embedding", CE, 4)
    expand = EKFAC.compute(model, CE, data)["0"]
    assert expand.Q_A is None
    assert tuple(expand.shape) == (2, 5)
    assert torch.equal(expand.eigenvalues[:, 1], torch.zeros(2))  # the padding token
    reduce = EKFAC.compute(model, CE, data, sharing=Reduce())["0"]
    assert reduce.Q_A.shape == (5, 5)


def test_input_only_is_refused():
    model, data = example("conv1d", CE, 4)
    with left_alone(model), pytest.raises(ValueError, match=r"InputOnly.*TypeII\(\)"):
        EKFAC.compute(model, CE, data, InputOnly())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"bias": "no"}, ValueError, r"'no'.*joint.*separate"),
        ({"sharing": Reduce}, TypeError, r"sharing=.*Reduce\(\)"),
        ({"chunk_size": 0}, ValueError, r"chunk_size=0"),
        ({"layers": "9"}, ValueError, r"'9' matches no"),
        ({"ignore": "9"}, ValueError, r"'9' matches no"),
        ({"fisher": TypeII}, TypeError, r"fisher="),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options, error, words):
    model, data = example("conv1d", CE, 4)
    with left_alone(model), pytest.raises(error, match=words):
        EKFAC.compute(model, CE, data, **options)


# The nearest Kronecker product


def rearranged(block, D_out, D):
    """Van Loan's rearrangement of a block in rvec order: rank 1 for B ⊗ A, with loops."""
    rows = [
        block[o * D : (o + 1) * D, p * D : (p + 1) * D].flatten()
        for o in range(D_out)
        for p in range(D_out)
    ]
    return torch.stack(rows)


def group_blocks(block, shapes):
    """The group-diagonal sub-blocks of a block in rvec order."""
    start, result = 0, []
    for D_out, D in shapes:
        result.append(block[start : start + D_out * D, start : start + D_out * D])
        start += D_out * D
    return result


@nets
@flavours
@sharings
def test_the_nearest_product_is_never_worse_than_kfac(net, flavour, sharing):
    fisher = FLAVOURS[flavour]
    model, data = example(net, CE, 3)
    (vectors,) = drawn(fisher, model, CE, data)
    G = blocks(model, CE, data, "rvec", vectors if is_fisher_of_draws(flavour) else None)
    torch.manual_seed(1)
    kfac = KFAC.compute(model, CE, data, fisher, SHARINGS[sharing])
    for name, element in kfac.items():
        groups = of_groups(element)
        for K, own in zip(groups, group_blocks(G[name], [K.shape for K in groups]), strict=True):
            others = torch.linalg.svdvals(rearranged(own, *K.shape))[1:]
            norm, D = own.norm(), K.shape[1]
            for order in ("cvec", "rvec"):
                block = in_order(own, D, order)
                nearest = nearest_kronecker(block, tuple(K.shape), order)
                error = (block - nearest.to_dense(order)).norm()
                assert abs(error**2 - others.square().sum()) < 1e-10 * norm**2
                assert error <= (block - K.to_dense(order)).norm() + 1e-10 * norm
                for factor in (nearest.A, nearest.B):
                    assert torch.linalg.eigvalsh(factor).min() > -1e-10 * factor.norm()


def test_the_nearest_product_and_ekfac_may_each_win():
    wins = set()
    for net in NETS:
        model, data = example(net, CE, 3)
        G, E = blocks(model, CE, data, "cvec"), EKFAC.compute(model, CE, data)
        for name, block in G.items():
            if len(of_groups(E[name])) == 1:
                nearest = nearest_kronecker(block, tuple(E[name].shape), "cvec")
                nearest, ekfac = (
                    (block - M.to_dense("cvec")).norm() / block.norm() for M in (nearest, E[name])
                )
                if abs(nearest - ekfac) > 1e-3:
                    wins.add("nearest" if nearest < ekfac else "ekfac")
    assert wins == {"nearest", "ekfac"}


@orders
def test_the_nearest_product_of_a_product_is_itself(order):
    A, B = torch.randn(4, 6), torch.randn(3, 5)
    A, B = A @ A.T, B @ B.T
    M = in_order(torch.kron(B, A), 4, order)
    assert relative_error(nearest_kronecker(M, (3, 4), order).to_dense(order), M) < 1e-10
    other = "rvec" if order == "cvec" else "cvec"
    assert relative_error(nearest_kronecker(M, (3, 4), other).to_dense(other), M) > 0.05
