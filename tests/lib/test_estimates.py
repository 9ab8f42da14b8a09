"""The preconditioner's three approximations, for every layer: dense solves, averages by hand."""

import gc
import io
import weakref

import pytest
import torch
from test_optim import backward, count_calls, gradients, step
from torch import nn
from truth import To, left_alone, mlp, relative_error

from kfac_lib import (
    EKFAC,
    KFAC,
    Empirical,
    Exact,
    Expand,
    Factored,
    InputOnly,
    KFACPreconditioner,
    LevenbergMarquardt,
    MonteCarlo,
    Plain,
    Reduce,
    TypeII,
    exact_blocks,
    nearest_kronecker,
)

pytestmark = pytest.mark.usefixtures("float64")
MSE, CE = nn.MSELoss(), nn.CrossEntropyLoss()
DELTA = 0.1
approximations = pytest.mark.parametrize("approximation", ["kfac", "ekfac", "nearest"])
reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])


class Reused(nn.Module):
    """One layer, called twice."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.fc(torch.tanh(self.fc(x))))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(self.b(torch.tanh(self.a(x))))


def conv1d():
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, groups=2, padding=1), nn.Tanh(), nn.Conv1d(4, 3, 5), nn.Flatten()
    )


def conv2d():
    return nn.Sequential(
        nn.Conv2d(4, 6, (3, 2), groups=2, stride=(2, 1)),
        nn.Tanh(),
        nn.Conv2d(6, 3, (1, 2), groups=3, bias=False),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


def conv3d():
    return nn.Sequential(
        nn.Conv3d(2, 4, 2, groups=2), nn.Tanh(), nn.Conv3d(4, 3, (2, 1, 1)), nn.Flatten()
    )


def embedding(tokens=7):
    return nn.Sequential(
        nn.Embedding(tokens, 4, padding_idx=0), nn.Linear(4, 4), nn.Tanh(), nn.Flatten(),
        nn.Linear(12, 3),
    )  # fmt: skip


def shared():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), To(lambda z: z.mean(1)))


NETS = {
    "linear": (lambda: mlp(4, 3, 3), (4,)),
    "conv1d": (conv1d, (2, 5)),
    "conv2d": (conv2d, (4, 4, 4)),
    "conv3d": (conv3d, (2, 3, 2, 2)),
    "embedding": (embedding, None),
    "shared": (shared, (5, 4)),
    "reused": (Reused, (4,)),
    "tied": (Tied, (4,)),
}
nets = pytest.mark.parametrize("kind", NETS)


def batch_of(kind, N, loss=CE):
    shape = NETS[kind][1]
    X = torch.randint(7, (N, 3)) if shape is None else torch.randn(N, *shape)
    return X, torch.randn(N, 3) if isinstance(loss, nn.MSELoss) else torch.randint(3, (N,))


def net_and_batch(kind, N=6, loss=CE):
    return NETS[kind][0](), batch_of(kind, N, loss)


def matrices(net, grads, names):
    """Weight-shaped [W b], spelled out; ``grads`` by the names of parameters."""
    result = {}
    for name in names:
        weight = grads[f"{name}.weight"]
        is_embedding = isinstance(net.get_submodule(name), nn.Embedding)
        W = weight.T if is_embedding else weight.flatten(1)
        bias = grads.get(f"{name}.bias")
        result[name] = W if bias is None else torch.cat([W, bias[:, None]], 1)
    return result


def groups(net, name):
    return getattr(net.get_submodule(name), "groups", 1)


def group_blocks(net, exact):
    """The own diagonal block of each group, on rvec([W b]): (block, G) by layer."""
    result = {}
    for name, block in exact.items():
        size = len(block) // groups(net, name)
        result[name] = [block[i : i + size, i : i + size] for i in range(0, len(block), size)]
    return result


def nearest_dense(net, exact, shapes):
    """Block by block the nearest product, as one dense matrix on rvec."""
    return {
        name: torch.block_diag(
            *[
                nearest_kronecker(b, (shapes[name][0] // len(blocks), shapes[name][1]), "rvec")
                .to_dense("rvec")
                for b in blocks
            ]
        )
        for name, blocks in group_blocks(net, exact).items()
    }  # fmt: skip


def reference(approximation, net, loss, data, fisher=None, **options):
    """The dense matrix on rvec([W b]) of each layer, for one batch."""
    fisher = TypeII() if fisher is None else fisher
    if approximation == "nearest":
        kfac = KFAC.compute(net, loss, data, fisher)
        shapes = {name: K.shape for name, K in kfac.items()}
        return nearest_dense(net, exact_blocks(net, loss, data, fisher, order="rvec"), shapes)
    kind = KFAC if approximation == "kfac" else EKFAC
    return {
        name: K.to_dense("rvec")
        for name, K in kind.compute(net, loss, data, fisher, **options).items()
    }


def check_step(net, before, dense, delta=DELTA):
    after = matrices(net, gradients(net), dense)
    for name, g in matrices(net, before, dense).items():
        expected = torch.linalg.solve(dense[name] + delta * torch.eye(g.numel()), g.reshape(-1))
        assert relative_error(after[name], expected.reshape(g.shape)) < 1e-10, name


def one_step(pre, loss, data):
    """One step; returns the gradients before it."""
    backward(pre.model, loss, data)
    before = gradients(pre.model)
    pre.update(*data)
    pre.precondition()
    return before


def tensors_close(found, expected):
    assert found.keys() == expected.keys()
    for name, dense in expected.items():
        assert relative_error(found[name].to_dense("rvec"), dense) < 1e-11, name


# One batch


@nets
@approximations
@reductions
def test_one_batch_gives_the_step_of_compute(approximation, kind, reduction):
    loss = nn.CrossEntropyLoss(reduction=reduction)
    net, data = net_and_batch(kind, loss=loss)
    pre = KFACPreconditioner(net, loss, damping=Exact(DELTA), ema=0, approximation=approximation)
    ids = {name: id(p.grad) for name, p in net.named_parameters()}
    for new in (data, batch_of(kind, 4, loss)):
        before = one_step(pre, loss, new)
        dense = reference(approximation, net, loss, new)
        check_step(net, before, dense)
        tensors_close(pre.factors(), dense)
    assert set(dense) == set(pre.coverage.layers)
    assert ids.keys() == gradients(net).keys()


@approximations
def test_one_batch_gives_the_step_of_precondition(approximation):
    net, data = net_and_batch("conv2d")
    pre = KFACPreconditioner(net, CE, damping=Exact(DELTA), ema=0, approximation=approximation)
    before = one_step(pre, CE, data)
    names = list(pre.coverage.layers)
    factors = pre.factors()
    assert type(factors) is (EKFAC if approximation == "ekfac" else KFAC)
    expected = factors.precondition(matrices(net, before, names), Exact(DELTA))
    for name, found in matrices(net, gradients(net), names).items():
        assert relative_error(found, expected[name]) < 1e-10


@pytest.mark.parametrize("approximation", ["kfac", "nearest"])
@pytest.mark.parametrize("damping", [Factored(DELTA), Plain(DELTA)], ids=repr)
@pytest.mark.parametrize("kind", ["conv2d", "embedding"])
def test_two_factors_of_any_layer_are_damped(approximation, damping, kind):
    net, data = net_and_batch(kind)
    pre = KFACPreconditioner(net, CE, damping=damping, approximation=approximation)
    before = one_step(pre, CE, data)
    for name, g in matrices(net, before, pre.coverage.layers).items():
        element, parts = pre.factors()[name], []
        blocks = getattr(element, "blocks", [element])
        for K, rows in zip(blocks, g.chunk(len(blocks)), strict=True):
            A = torch.diag(K.A) if K.A.ndim == 1 else K.A
            pi = (A.trace() / len(A) / (K.B.trace() / len(K.B))) ** 0.5
            factored = damping == Factored(DELTA)
            a, b = (pi * DELTA**0.5, DELTA**0.5 / pi) if factored else (DELTA, DELTA)
            left = torch.linalg.inv(K.B + b * torch.eye(len(K.B)))
            parts.append(left @ rows @ torch.linalg.inv(A + a * torch.eye(len(A))))
        found = matrices(net, gradients(net), [name])[name]
        assert relative_error(found, torch.cat(parts)) < 1e-9


@pytest.mark.parametrize("fisher", [Empirical(), MonteCarlo(2)], ids=repr)
@approximations
def test_chunks_of_vectors_and_frozen_biases(approximation, fisher):
    net, data = net_and_batch("conv2d")
    net[0].bias.requires_grad_(False)
    options = {"fisher": fisher, "ema": 0, "damping": Exact(DELTA), "chunk_size": 1}
    pre = KFACPreconditioner(net, CE, approximation=approximation, **options)
    torch.manual_seed(4)
    before = one_step(pre, CE, data)
    assert "0.bias" not in before
    if approximation == "nearest" and isinstance(fisher, MonteCarlo):
        torch.manual_seed(4)
        exact = exact_blocks(net, CE, data, fisher, order="rvec")
        shapes = {name: K.shape for name, K in pre.factors().items()}
        dense = nearest_dense(net, exact, shapes)
    else:
        torch.manual_seed(4)
        dense = reference(approximation, net, CE, data, fisher)
    check_step(net, before, dense)


def test_a_tied_parameter_has_one_key_and_is_written_once():
    net, data = net_and_batch("tied")
    pre = KFACPreconditioner(net, CE, damping=Exact(DELTA), approximation="ekfac")
    one_step(pre, CE, data)
    assert list(pre.factors()) == ["a", "head"]
    assert net.b.weight.grad is net.a.weight.grad
    assert "b:" not in repr(pre)


@approximations
@pytest.mark.parametrize("sharing", [Expand(), Reduce()], ids=repr)
def test_the_gradient_of_a_padded_token_stays_exactly_zero(approximation, sharing):
    net, data = net_and_batch("embedding", 20)
    pre = KFACPreconditioner(net, CE, sharing=sharing, approximation=approximation)
    one_step(pre, CE, data)
    assert net[0].weight.grad[1:].any(1).all()
    assert not net[0].weight.grad[0].any()
    net.zero_grad()
    (CE(net(data[0]), data[1]) + net[0].weight.sum()).backward()
    pre.precondition()
    assert net[0].weight.grad[0].all()


def test_a_sparse_gradient_is_refused():
    net = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(12, 3))
    data = batch_of("embedding", 5)
    pre = KFACPreconditioner(net, CE)
    backward(net, CE, data)
    pre.update(*data)
    with pytest.raises(NotImplementedError, match=r"Layer '0' \(Embedding\).*sparse=False"):
        pre.precondition()


@approximations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["conv2d", "embedding"])
def test_dtype_of_any_approximation_is_kept(approximation, dtype, kind):
    net, (X, y) = net_and_batch(kind)
    pre = KFACPreconditioner(net, CE, damping=Exact(DELTA), approximation=approximation)
    step(pre, CE, (X, y))
    expected = gradients(net)
    net = net.to(dtype)
    pre = KFACPreconditioner(net, CE, damping=Exact(DELTA), approximation=approximation)
    step(pre, CE, (X.to(dtype) if X.is_floating_point() else X, y))
    for name, p in net.named_parameters():
        assert p.grad.dtype == dtype
        assert relative_error(p.grad.double(), expected[name]) < 30 * torch.finfo(dtype).eps ** 0.9


# Sharing


@approximations
def test_sharing_may_differ_between_layers(approximation):
    net, data = net_and_batch("embedding")
    mixed = {"[01]": Reduce()}
    expected = reference(approximation, net, CE, data)
    if approximation != "nearest":
        different = reference(approximation, net, CE, data, sharing=mixed)
        assert relative_error(different["0"], expected["0"]) > 1e-3
        expected = different
    for sharing in (mixed, lambda name: Reduce() if name in ("0", "1") else Expand()):
        pre = KFACPreconditioner(
            net, CE, damping=Exact(DELTA), sharing=sharing, approximation=approximation
        )
        check_step(net, one_step(pre, CE, data), expected)
        factors = pre.factors()
        assert factors.sharing == {"0": Reduce(), "1": Reduce(), "4": Expand()}
        assert "Reduce" in repr(pre)
        assert "Expand" in repr(pre)
        assert "lambda" not in repr(pre)


@pytest.mark.parametrize(
    ("sharing", "error", "words"),
    [
        ({"9": Reduce()}, ValueError, r"sharing: '9' matches no layer"),
        ({"0": Reduce}, TypeError, r"sharing=<class.*Reduce\(\)"),
        (lambda name: name, TypeError, r"sharing='0'"),
    ],
    ids=range(3),
)
def test_a_choice_of_sharing_that_fits_nothing(sharing, error, words):
    with pytest.raises(error, match=words):
        KFACPreconditioner(shared(), CE, sharing=sharing)


# Averages


def bases(kfac):
    """The eigenvectors on rvec of each layer, groups block by block, by torch alone."""
    result = {}
    for name, element in kfac.items():
        Q = []
        for K in getattr(element, "blocks", [element]):
            Q_A = torch.eye(len(K.A)) if K.A.ndim == 1 else torch.linalg.eigh(K.A)[1]
            Q_B = torch.linalg.eigh(K.B)[1]
            Q.append(torch.kron(Q_B.contiguous(), Q_A.contiguous()))
        result[name] = torch.block_diag(*Q)
    return result


def in_basis(Q, block):
    return Q @ torch.diag((Q.T @ block @ Q).diagonal()) @ Q.T


def raw_average(net, loss, data, weights):
    """Exact blocks of unequal batches as raw sums over raw counts, constants once."""
    each = [exact_blocks(net, loss, one, order="rvec") for one in data]
    if loss.reduction == "sum":
        total = sum(weights)
        return {
            name: sum(w * e[name] for w, e in zip(weights, each, strict=True)) / total
            for name in each[0]
        }
    sizes = [len(y) for _, y in data]
    total = sum(w * N for w, N in zip(weights, sizes, strict=True))
    return {
        name: sum(w * N * e[name] for w, N, e in zip(weights, sizes, each, strict=True)) / total
        for name in each[0]
    }


@reductions
@pytest.mark.parametrize("kind", ["conv2d", "embedding"])
def test_eigenvalues_are_averaged_in_the_basis_in_use(kind, reduction, monkeypatch):
    loss, beta = nn.CrossEntropyLoss(reduction=reduction), 0.7
    net = NETS[kind][0]()
    data = [batch_of(kind, N) for N in (20, 9, 5)]
    options = {"ema": beta, "inverse_every": 10, "damping": Exact(DELTA)}
    pre = KFACPreconditioner(net, loss, approximation="ekfac", **options)
    calls = count_calls(monkeypatch, torch.linalg, "eigh")
    for t, one in enumerate(data):
        made = len(calls)
        before = one_step(pre, loss, one)
        assert (len(calls) > made) == (t == 0)
        weights = [(1 - beta) * beta ** (t - i) for i in range(t + 1)]
        exact = raw_average(net, loss, data[: t + 1], weights)
        Q = bases(KFAC.compute(net, loss, data[0]))
        expected = {name: in_basis(Q[name], exact[name]) for name in exact}
        tensors_close(pre.factors(), expected)
        check_step(net, before, expected)


@reductions
@pytest.mark.parametrize("every", [1, 2])
def test_a_new_basis_takes_over_the_average_and_adds_the_newest_batch(reduction, every):
    loss, beta = nn.CrossEntropyLoss(reduction=reduction), 0.7
    net = conv2d()
    data = [batch_of("conv2d", 5) for _ in range(4)]  # as many each, so that averages are linear
    twin = KFACPreconditioner(net, loss, ema=beta)
    pre = KFACPreconditioner(
        net, loss, ema=beta, inverse_every=every, approximation="ekfac", damping=Exact(DELTA)
    )
    average, weight = None, 0.0
    for t, one in enumerate(data):
        before = one_step(pre, loss, one)
        twin.update(*one)
        if t % every == 0:
            Q = bases(twin.factors())
        newest = raw_average(net, loss, [one], [1.0])
        past, weight = beta * weight, beta * weight + 1 - beta
        average = {
            name: in_basis(Q[name], block)
            if average is None
            else (past * in_basis(Q[name], average[name]) + (1 - beta) * in_basis(Q[name], block))
            / weight
            for name, block in newest.items()
        }
        tensors_close(pre.factors(), average)
        check_step(net, before, average)
        assert torch.allclose(pre.factors().trace(), sum(E.trace() for E in average.values()))


@reductions
@pytest.mark.parametrize("kind", ["conv1d", "embedding"])
def test_nearest_products_are_those_of_the_averaged_blocks(kind, reduction):
    loss, beta = nn.CrossEntropyLoss(reduction=reduction), 0.7
    net = NETS[kind][0]()
    data = [batch_of(kind, N) for N in (3, 9, 5)]
    pre = KFACPreconditioner(
        net, loss, ema=beta, inverse_every=2, approximation="nearest", damping=Exact(DELTA)
    )
    shapes = {name: K.shape for name, K in KFAC.compute(net, loss, data[0]).items()}
    used = None
    for t, one in enumerate(data):
        before = one_step(pre, loss, one)
        weights = [(1 - beta) * beta ** (t - i) for i in range(t + 1)]
        exact = raw_average(net, loss, data[: t + 1], weights)
        expected = nearest_dense(net, exact, shapes)
        tensors_close(pre.factors(), expected)
        used = expected if t % 2 == 0 else used
        check_step(net, before, used)


def test_nearest_keeps_no_blocks_between_groups():
    net, data = net_and_batch("conv2d")
    pre = KFACPreconditioner(net, CE, approximation="nearest")
    pre.update(*data)
    kept = [tuple(b.shape) for b in pre.state_dict()["sums"]["2"]["blocks"]]
    assert kept == [(4, 4)] * 3


@approximations
def test_the_same_batch_again_and_again_gives_the_matrix_of_one(approximation):
    net, data = net_and_batch("conv1d")
    pre = KFACPreconditioner(net, CE, approximation=approximation, inverse_every=2)
    for _ in range(5):
        step(pre, CE, data)
    tensors_close(pre.factors(), reference(approximation, net, CE, data))


@approximations
def test_a_changed_delta_acts_at_once_on_what_was_taken(approximation, monkeypatch):
    net, data = net_and_batch("conv2d")
    damping = LevenbergMarquardt(Exact(DELTA), factor=3.0)
    pre = KFACPreconditioner(net, CE, damping=damping, approximation=approximation)
    calls = count_calls(monkeypatch, torch.linalg, "eigh")
    one_step(pre, CE, data)
    once = len(calls)
    damping.update(-1.0, 1.0)
    backward(net, CE, data)
    before = gradients(net)
    pre.precondition()
    assert len(calls) == once > 0
    check_step(net, before, reference(approximation, net, CE, data), 3 * DELTA)


# What the corrected eigenvalues cost


def test_a_new_basis_costs_one_further_pass_and_nothing_else_does(monkeypatch):
    net, data = net_and_batch("linear")
    calls = count_calls(monkeypatch, torch.autograd, "grad")
    pre = KFACPreconditioner(net, CE, approximation="ekfac", inverse_every=3)
    passes = []
    for _ in range(7):
        before = len(calls)
        pre.update(*data)
        middle = len(calls)
        backward(net, CE, data)
        pre.precondition()
        passes.append((middle - before, len(calls) - middle))
    assert passes == [(1, 1), (1, 0), (1, 0), (1, 1), (1, 0), (1, 0), (1, 1)]


@pytest.mark.parametrize("ends_with", ["precondition", "update"])
def test_the_batch_is_let_go(ends_with):
    net, (X, y) = net_and_batch("linear")
    for approximation in ("kfac", "ekfac", "nearest"):
        pre = KFACPreconditioner(net, CE, approximation=approximation)
        batch = X.clone()
        reference_to = weakref.ref(batch)
        backward(net, CE, (batch, y))
        pre.update(batch, y)
        del batch
        gc.collect()
        assert (reference_to() is None) == (approximation != "ekfac")
        pre.precondition() if ends_with == "precondition" else pre.update(X, y)
        gc.collect()
        assert reference_to() is None


def test_a_step_without_new_factors_gives_the_batch_of_a_new_basis():
    net, first = net_and_batch("linear")
    newest = batch_of("linear", 8)
    pre = KFACPreconditioner(
        net, CE, damping=Exact(DELTA), approximation="ekfac", factor_every=2, inverse_every=3, ema=0
    )
    data = [first, first, batch_of("linear", 5), newest]
    for one in data:
        before = one_step(pre, CE, one)
    Q = bases(KFAC.compute(net, CE, data[2]))
    exact = exact_blocks(net, CE, newest, order="rvec")
    check_step(net, before, {name: in_basis(Q[name], exact[name]) for name in exact})


def test_without_a_batch_the_basis_stays_until_the_next_update():
    net, data = net_and_batch("linear")
    pre = KFACPreconditioner(
        net, CE, damping=Exact(DELTA), approximation="ekfac", inverse_every=2, ema=0
    )
    one_step(pre, CE, data)
    second, third = batch_of("linear", 9), batch_of("linear", 7)
    one_step(pre, CE, second)
    backward(net, CE, data)
    before = gradients(net)
    pre.precondition()
    Q = bases(KFAC.compute(net, CE, data))
    exact = exact_blocks(net, CE, second, order="rvec")
    check_step(net, before, {name: in_basis(Q[name], exact[name]) for name in exact})
    check_step(net, one_step(pre, CE, third), reference("ekfac", net, CE, third))


@approximations
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_ignored_labels_leave_basis_and_eigenvalues(approximation, kind):
    loss = nn.CrossEntropyLoss(ignore_index=1)
    net, (X, _) = net_and_batch(kind)
    y, none = torch.tensor([0, 2, 1, 0, 2, 1]), torch.ones(6).long()
    pre = KFACPreconditioner(net, loss, damping=Exact(DELTA), approximation=approximation, ema=0)
    pre.update(X, none)
    with pytest.raises(ValueError, match=r"no factors yet.*update\(X, y\)"):
        pre.factors()
    dense = reference(approximation, net, loss, (X, y))
    check_step(net, one_step(pre, loss, (X, y)), dense)
    backward(net, loss, (X, y))
    before = gradients(net)
    pre.update(2 * X, none)
    pre.precondition()
    check_step(net, before, dense)


def test_a_first_basis_needs_labels_that_count():
    loss = nn.CrossEntropyLoss(ignore_index=1)
    net, (X, _) = net_and_batch("linear")
    pre = KFACPreconditioner(net, loss, approximation="ekfac", factor_every=2, damping=Exact(DELTA))
    y, none = torch.tensor([0, 2, 1, 0, 2, 1]), torch.ones(6).long()
    backward(net, loss, (X, y))
    before = gradients(net)
    pre.update(X, y)
    pre.update(X, none)
    with left_alone(net), pytest.raises(ValueError, match=r"newest batch.*update\(X, y\)"):
        pre.precondition()
    pre.update(X, y)
    pre.precondition()
    check_step(net, before, reference("ekfac", net, loss, (X, y)))


@pytest.mark.parametrize("own", [True, False])
def test_random_vectors_are_the_same_in_both_passes(own):
    net, data = net_and_batch("conv2d")

    def fisher():
        torch.manual_seed(5)
        return MonteCarlo(2, torch.Generator().manual_seed(5) if own else None)

    first = fisher()
    pre = KFACPreconditioner(
        net, CE, damping=Exact(DELTA), fisher=first, ema=0, approximation="ekfac"
    )
    backward(net, CE, data)
    before = gradients(net)
    pre.update(*data)
    torch.rand(3, generator=first.generator)  # somebody else draws
    here = (first.generator or torch.default_generator).get_state()
    pre.precondition()
    assert torch.equal((first.generator or torch.default_generator).get_state(), here)
    check_step(net, before, reference("ekfac", net, CE, data, fisher()))


def test_vectors_of_a_batch_that_was_not_drawn_for_are_new_ones():
    net, data = net_and_batch("linear")
    generator = torch.Generator().manual_seed(5)
    fisher = MonteCarlo(2, generator)
    pre = KFACPreconditioner(
        net, CE, fisher=fisher, approximation="ekfac", factor_every=2, inverse_every=3
    )
    states = []
    for _ in range(4):
        step(pre, CE, data)
        states.append(generator.get_state())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[2], states[3])


def test_a_pass_in_precondition_leaves_the_model_alone():
    net, data = net_and_batch("conv2d")
    pre = KFACPreconditioner(net, CE, approximation="ekfac")
    backward(net, CE, data)
    with left_alone(net), torch.no_grad():
        pre.update(*data)
        pre.factors()
    before = {n: (id(p), p._version, p.requires_grad) for n, p in net.named_parameters()}
    with torch.no_grad():
        pre.precondition()
    assert before == {n: (id(p), p._version, p.requires_grad) for n, p in net.named_parameters()}
    assert all(not p.grad.requires_grad for p in net.parameters())


def test_factors_before_the_first_step_are_those_that_it_will_use():
    net, data = net_and_batch("conv2d")
    pre = KFACPreconditioner(net, CE, approximation="ekfac", damping=Exact(DELTA))
    pre.update(*data)
    tensors_close(pre.factors(), reference("ekfac", net, CE, data))
    backward(net, CE, data)
    pre.precondition()
    tensors_close(pre.factors(), reference("ekfac", net, CE, data))


# Failures


@approximations
def test_a_failed_update_changes_nothing(approximation):
    net, (X, y) = mlp(4, 3, 3, activation="linear"), batch_of("linear", 6, MSE)
    pre = KFACPreconditioner(net, MSE, approximation=approximation, damping=Exact(DELTA))
    step(pre, MSE, (X, y))
    before = {name: K.to_dense("rvec") for name, K in pre.factors().items()}
    with pytest.raises(ValueError, match=r"layer '0' hold NaN or inf.*overflow"):
        pre.update(X * 1e200, y)
    assert pre.steps == 1
    for name, K in pre.factors().items():
        assert torch.equal(K.to_dense("rvec"), before[name])


def test_a_failed_step_leaves_the_batch_of_the_new_basis():
    net, (X, y) = net_and_batch("linear")
    X[:, 1] = 0
    pre = KFACPreconditioner(net, CE, damping=Exact(0), approximation="ekfac")
    backward(net, CE, (X, y))
    before = gradients(net)
    pre.update(X, y)
    with left_alone(net), pytest.raises(ValueError, match=r"Layer '0'.*Damp"):
        pre.precondition()
    pre.damping = Exact(DELTA)
    pre.precondition()
    check_step(net, before, reference("ekfac", net, CE, (X, y)))


@pytest.mark.parametrize("damping", [Factored(0.1), Plain(0.1), LevenbergMarquardt(Factored(0.1))])
def test_corrected_eigenvalues_need_exact_damping(damping):
    net, data = net_and_batch("linear")
    words = r"damping=.*\(.*approximation='ekfac'.*free eigenvalues.*Exact\(delta\)"
    with pytest.raises(TypeError, match=words):
        KFACPreconditioner(net, CE, damping=damping, approximation="ekfac")
    pre = KFACPreconditioner(
        net, CE, damping=lambda t: damping if t else Exact(0.1), approximation="ekfac"
    )
    step(pre, CE, data)
    backward(net, CE, data)
    pre.update(*data)
    with left_alone(net), pytest.raises(TypeError, match=r"damping=.* at step 1.*Exact\(delta\)"):
        pre.precondition()


def test_an_approximation_that_is_none():
    with pytest.raises(ValueError, match=r"approximation='tridiagonal'.*'kfac', 'ekfac' or"):
        KFACPreconditioner(mlp(4, 3), CE, approximation="tridiagonal")
    for approximation in ("ekfac", "nearest"):
        with pytest.raises(ValueError, match=r"InputOnly\(\).*another flavour"):
            KFACPreconditioner(mlp(4, 3), CE, fisher=InputOnly(), approximation=approximation)


# Save and load


def made(approximation, kind="conv2d", generator=None, **options):
    torch.manual_seed(3)
    net = NETS[kind][0]()
    pre = KFACPreconditioner(
        net,
        CE,
        approximation=approximation,
        **{
            "fisher": MonteCarlo(2, generator) if generator else Empirical(),
            "damping": LevenbergMarquardt(Exact(0.1), factor=2.0),
            "factor_every": 2,
            "inverse_every": 3,
            "sharing": {"0": Reduce()},
            **options,
        },
    )
    return net, pre, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def train(net, pre, optimizer, batches):
    for batch in batches:
        step(pre, CE, batch, optimizer)
        pre.damping.update(float(batch[0].flatten()[0]), 1.0)


@approximations
@pytest.mark.parametrize(("kind", "draws"), [("conv2d", True), ("embedding", False)])
@pytest.mark.parametrize("first", [0, 3, 4])
def test_training_of_any_net_goes_on_bit_for_bit(approximation, kind, first, draws):
    sharing = {"0": Reduce()} if kind == "conv2d" else Expand()
    batches = [batch_of(kind, 6) for _ in range(7)]
    generator = torch.Generator().manual_seed(1) if draws else None
    net, pre, optimizer = made(approximation, kind, generator, sharing=sharing)
    train(net, pre, optimizer, batches[:first])
    file = io.BytesIO()
    parts = {"pre": pre, "optimizer": optimizer, "net": net}
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    train(net, pre, optimizer, batches[first:])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    generator = torch.Generator().manual_seed(2) if draws else None
    new_net, new, new_optimizer = made(approximation, kind, generator, sharing=sharing)
    for name, part in {"pre": new, "optimizer": new_optimizer, "net": new_net}.items():
        part.load_state_dict(saved[name])
    train(new_net, new, new_optimizer, batches[first:])
    for found, expected in zip(new_net.parameters(), net.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_a_state_of_another_approximation_sharing_or_net_is_refused():
    _, pre, _ = made("ekfac")
    pre.update(*batch_of("conv2d", 6))
    state = pre.state_dict()
    wider, ungrouped = made("ekfac")[1], made("ekfac")[1]
    for other, conv in (
        (wider, nn.Conv2d(4, 6, (3, 3), groups=2)),
        (ungrouped, nn.Conv2d(4, 6, (3, 2), groups=1)),
    ):
        net = conv2d()
        net[0] = conv
        other.__init__(
            net, CE, fisher=Empirical(), damping=other.damping, approximation="ekfac",
            sharing={"0": Reduce()},
        )  # fmt: skip
    for other, words in (
        (made("kfac")[1], r"approximation ekfac.*has kfac.*same approximation"),
        (made("nearest")[1], r"approximation ekfac.*has nearest"),
        (made("ekfac", sharing=Reduce())[1], r"sharing .*'0': Reduce.*has Reduce"),
        (made("ekfac", sharing={"2": Reduce()})[1], r"sharing .*has .*'2': Reduce"),
        (wider, r"another net: layer '0'.*\(2, 13, 13\).*\(2, 19, 19\)"),
        (ungrouped, r"another net: layer '0'.*\(2, 3, 3\).*\(6, 6\)"),
        (made("ekfac", "conv1d")[1], r"another net: layer '4' is in the state"),
    ):
        with pytest.raises(ValueError, match=words):
            other.load_state_dict(state)
        assert other.steps == 0
    same = made("ekfac", sharing=lambda name: Reduce() if name == "0" else Expand())[1]
    same.load_state_dict(state)
    assert same.steps == 1


@approximations
def test_a_state_of_another_vocabulary_is_refused(approximation):
    pres = {}
    for tokens in (7, 9):
        net = embedding(tokens)
        pres[tokens] = KFACPreconditioner(net, CE, approximation=approximation)
        step(pres[tokens], CE, batch_of("embedding", 6))
    with pytest.raises(ValueError, match=r"another net: layer '0'"):
        pres[9].load_state_dict(pres[7].state_dict())


def test_a_state_saved_within_a_step_lacks_the_batch_of_a_new_basis():
    net, data = net_and_batch("linear")
    options = {"approximation": "ekfac", "damping": Exact(DELTA), "ema": 0}
    pre = KFACPreconditioner(net, CE, **options)
    pre.update(*data)
    new = KFACPreconditioner(net, CE, **options)
    new.load_state_dict(pre.state_dict())
    backward(net, CE, data)
    for use in (new.precondition, new.factors):
        with left_alone(net), pytest.raises(ValueError, match=r"newest batch.*update\(X, y\)"):
            use()
    before = gradients(net)
    new.update(*data)
    new.precondition()
    check_step(net, before, reference("ekfac", net, CE, data))


@approximations
def test_a_state_is_not_changed_by_going_on_or_loading(approximation):
    net, pre, optimizer = made(approximation)
    batches = [batch_of("conv2d", 6) for _ in range(6)]
    train(net, pre, optimizer, batches[:3])
    state = pre.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    other_net, other, other_optimizer = made(approximation)
    other.load_state_dict(state)
    train(net, pre, optimizer, batches[3:])
    train(other_net, other, other_optimizer, batches[3:])
    again = io.BytesIO()
    torch.save(state, again)
    assert file.getvalue() == again.getvalue()


# Text


@approximations
def test_repr_names_approximation_and_shapes(approximation):
    net, _ = net_and_batch("conv2d")
    text = repr(KFACPreconditioner(net, CE, approximation=approximation))
    assert f"approximation='{approximation}'" in text
    assert "0: 2 groups, each A (13, 13), B (3, 3)" in text
    assert "2: 3 groups, each A (4, 4), B (1, 1)" in text
    assert "4: A (7, 7), B (3, 3)" in text
