"""Modules that run several times, tied weights, and sharing chosen layer by layer."""

import pytest
import torch
from layer_cases import FLAVOURS, SHARINGS, classes_first, drawn, is_fisher_of_draws, labels
from torch import nn
from truth import Net, To, left_alone, relative_error
from truth_layers import blocks, dense, factors

from kfac_lib import EKFAC, KFAC, Expand, Reduce, exact_blocks

pytestmark = pytest.mark.usefixtures("float64")
MSE, CE = nn.MSELoss(), nn.CrossEntropyLoss()
orders = pytest.mark.parametrize("order", ["cvec", "rvec"])
sharings = pytest.mark.parametrize("sharing", SHARINGS)
flavours = pytest.mark.parametrize("flavour", FLAVOURS)
losses = pytest.mark.parametrize("loss", [MSE, CE], ids=repr)


def in_sequence():
    """A layer on its own output, twice."""
    return nn.Sequential(same := nn.Linear(3, 3), nn.Tanh(), same, nn.Sigmoid(), same)


def siamese():
    """A layer on two inputs, and a last layer."""

    def run(m, x):
        return m.head(m.body(x[:, 0]).tanh() * m.body(x[:, 1]).sin())

    return Net(run, body=nn.Linear(4, 2), head=nn.Linear(2, 3))


def shared_and_pooled():
    """A layer on three tokens and once more on what they give together."""

    def run(m, x):
        z = m.body(x).tanh()
        return m.head(z).movedim(-1, 1) + m.body(z.mean(1, keepdim=True).sin()).movedim(-1, 1)

    return Net(run, body=nn.Linear(3, 3), head=nn.Linear(3, 3, bias=False))


def convolved_twice():
    """A grouped convolution on its own, shorter output."""

    def run(m, x):
        return m.head(m.conv(m.conv(x).tanh()).sin().flatten(1))

    return Net(run, conv=nn.Conv1d(4, 4, 2, groups=2), head=nn.Linear(8, 3))


def looked_up_twice():
    """Two lists of tokens of different lengths, one of the tokens padding."""

    def run(m, x):
        return m.head((m.table(x[:, :1]).tanh() + m.table(x[:, 1:]) ** 2).sum(1))

    return Net(run, table=nn.Embedding(5, 3, padding_idx=2), head=nn.Linear(3, 3))


NETS = {
    "in sequence": (in_sequence, lambda N: torch.randn(N, 3)),
    "siamese": (siamese, lambda N: torch.randn(N, 2, 4)),
    "shared and pooled": (shared_and_pooled, lambda N: torch.randn(N, 3, 3)),
    "convolved twice": (convolved_twice, lambda N: torch.randn(N, 4, 4)),
    "looked up twice": (looked_up_twice, lambda N: torch.randint(5, (N, 3))),
}
"""A net with a module that runs several times, and its inputs."""


def tied_linear():
    model = nn.Sequential(
        nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
    )
    model[2].weight = model[0].weight
    return model


def tied_with_one_bias():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    return model


def tied_convolutions():
    """One weight, two strides."""
    model = nn.Sequential(
        nn.Conv1d(3, 3, 2, bias=False), nn.Tanh(), nn.Conv1d(3, 3, 2, stride=2, bias=False),
        nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip
    model[2].weight = model[0].weight
    return model


def tied_embeddings():
    model = Net(
        lambda m, x: m.head((m.a(x[:, :1]).tanh() * m.b(x[:, 1:])).sum(1)),
        a=nn.Embedding(5, 3), b=nn.Embedding(5, 3), head=nn.Linear(3, 3),
    )  # fmt: skip
    model.b.weight = model.a.weight
    return model


TIED = {
    "linear": (tied_linear, lambda N: torch.randn(N, 3), ["0", "3"]),
    "linear, one bias": (tied_with_one_bias, lambda N: torch.randn(N, 3), ["0"]),
    "convolutions": (tied_convolutions, lambda N: torch.randn(N, 3, 6), ["0", "4"]),
    "embeddings": (tied_embeddings, lambda N: torch.randint(5, (N, 3)), ["a", "head"]),
}
"""A net with one weight in two modules, its inputs, and the keys."""
ties = pytest.mark.parametrize("net", TIED)


def example(net, loss, N):
    make, inputs, *_ = {**NETS, **TIED}[net]
    model, X = make(), inputs(N)
    return model, (X, labels(loss, model(X).detach()))


@pytest.mark.parametrize("net", [*NETS, *TIED])
@flavours
@losses
def test_blocks_of_reused_and_tied_weights_are_those_of_autograd(net, flavour, loss):
    fisher = FLAVOURS[flavour]
    for N, order in ((1, "rvec"), (3, "cvec")):
        model, data = example(net, loss, N)
        (vectors,) = drawn(fisher, model, loss, data)
        given = vectors if is_fisher_of_draws(flavour) else None
        expected = blocks(model, loss, data, order, given)
        torch.manual_seed(1)
        found = exact_blocks(model, loss, data, fisher, order=order)
        assert list(found) == list(expected)
        for name in expected:
            assert relative_error(found[name], expected[name]) < 1e-10


@pytest.mark.parametrize("net", [*NETS, *TIED])
@flavours
@sharings
@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_kfac_of_reused_and_tied_weights_is_that_of_all_calls_joined(net, flavour, sharing, bias):
    fisher, loss = FLAVOURS[flavour], CE
    model, data = example(net, loss, 3)
    (vectors,) = drawn(fisher, model, loss, data)
    expected = factors(model, loss, data, vectors, sharing, bias)
    torch.manual_seed(1)
    found = KFAC.compute(model, loss, data, fisher, SHARINGS[sharing], bias=bias)
    assert list(found) == list(expected)
    for name, pairs in expected.items():
        assert relative_error(found[name].to_dense("cvec"), dense(pairs, "cvec")) < 1e-10


@pytest.mark.parametrize(
    ("net", "key", "S"),
    [("in sequence", "0", 3), ("siamese", "body", 2), ("shared and pooled", "body", 4),
     ("convolved twice", "conv", 3 + 2)],
)  # fmt: skip
def test_the_number_of_positions_is_that_of_all_calls(net, key, S):
    loss = nn.MSELoss(reduction="sum")
    model, data = example(net, loss, 3)
    for sharing, count in (("expand", S), ("reduce", S**2)):
        found = KFAC.compute(model, loss, data, sharing=SHARINGS[sharing], bias="separate")
        bias = found[f"{key}.bias"]
        for K in getattr(bias, "blocks", [bias]):
            assert abs(float(K.A) - 2 * 3 * count) < 1e-10  # R N S and R N S²


def test_taking_only_the_last_call_is_clearly_off():
    model, data = example("in sequence", MSE, 3)
    whole = exact_blocks(model, MSE, data, order="cvec")["0"]
    once = nn.Sequential(*[nn.Linear(3, 3) for _ in range(3)])
    run = nn.Sequential(once[0], nn.Tanh(), once[1], nn.Sigmoid(), once[2])
    for layer in once:
        layer.load_state_dict(model[0].state_dict())
    each = blocks(run, MSE, data, "cvec")
    assert relative_error(each["4"], whole) > 0.1
    assert relative_error(sum(each.values()), whole) > 0.01  # the calls couple


def test_one_datum_is_not_exact_for_two_calls_which_are_two_positions():
    model, data = example("siamese", MSE, 1)
    G = blocks(model, MSE, data, "cvec")
    for sharing in SHARINGS.values():
        found = KFAC.compute(model, MSE, data, sharing=sharing)
        assert relative_error(found["body"].to_dense("cvec"), G["body"]) > 0.01
        assert relative_error(found["head"].to_dense("cvec"), G["head"]) < 1e-10


@orders
def test_a_sum_of_calls_is_exact_for_reduce_as_pooling_is(order):
    model = Net(lambda m, x: m.fc(x[:, 0]) + m.fc(x[:, 1]), fc=nn.Linear(4, 3))
    data = torch.randn(5, 2, 4), torch.randn(5, 3)
    G = blocks(model, MSE, data, order)["fc"]
    for sharing, is_exact in (("reduce", True), ("expand", False)):
        K = KFAC.compute(model, MSE, data, sharing=SHARINGS[sharing])["fc"]
        assert (relative_error(K.to_dense(order), G) < 1e-10) == is_exact


@orders
def test_calls_side_by_side_are_exact_for_expand_as_separate_positions_are(order):
    model = Net(lambda m, x: torch.cat([m.fc(x[:, 0]), m.fc(x[:, 1])], 1), fc=nn.Linear(4, 3))
    data = torch.randn(5, 2, 4), torch.randn(5, 6)
    G = blocks(model, MSE, data, order)["fc"]
    for sharing, is_exact in (("reduce", False), ("expand", True)):
        K = KFAC.compute(model, MSE, data, sharing=SHARINGS[sharing])["fc"]
        assert (relative_error(K.to_dense(order), G) < 1e-10) == is_exact


@ties
@sharings
def test_tied_weights_stand_under_the_first_name(net, sharing):
    model, data = example(net, MSE, 3)
    assert list(KFAC.compute(model, MSE, data, sharing=SHARINGS[sharing])) == TIED[net][2]
    assert "frozen: none" in repr(KFAC.compute(model, MSE, data))


def test_batches_and_chunks_change_nothing():
    model, (X, y) = example("in sequence", CE, 5)
    (vectors,) = drawn(FLAVOURS["type-II"], model, CE, (X, y))
    expected = factors(model, CE, (X, y), vectors, "reduce")
    for chunk_size in (None, 1, 2):
        found = KFAC.compute(
            model, CE, [(X[:2], y[:2]), (X[2:], y[2:])], sharing=Reduce(), chunk_size=chunk_size
        )
        for name, pairs in expected.items():
            assert relative_error(found[name].to_dense("cvec"), dense(pairs, "cvec")) < 1e-10


@pytest.mark.parametrize("net", [*NETS, *TIED])
@sharings
def test_ekfac_of_reused_and_tied_weights_has_the_trace_of_the_block(net, sharing):
    model, data = example(net, CE, 3)
    kfac, ekfac = (
        which.compute(model, CE, data, sharing=SHARINGS[sharing]) for which in (KFAC, EKFAC)
    )
    for name, G in blocks(model, CE, data, "cvec").items():
        E, K = ekfac[name].to_dense("cvec"), kfac[name].to_dense("cvec")
        assert abs(E.trace() / G.trace() - 1) < 1e-10
        assert abs(G.norm() ** 2 - E.norm() ** 2 - (G - E).norm() ** 2) < 1e-10 * G.norm() ** 2
        assert (G - E).norm() <= (G - K).norm() + 1e-12 * G.norm()


# Refused


def refused(model, data, words, error=NotImplementedError, **options):
    for compute in (
        lambda: KFAC.compute(model, MSE, data, **options),
        lambda: exact_blocks(model, MSE, data, order="cvec", **options),
    ):
        with left_alone(model), pytest.raises(error, match=words):
            compute()


def tied_with_different_biases():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    return model


def test_different_biases_of_a_tied_weight_are_refused_and_may_be_ignored():
    model, data = tied_with_different_biases(), (torch.randn(4, 3), torch.randn(4, 3))
    refused(model, data, r"(?s)0.*2.*bias.*ignore")
    found = exact_blocks(model, MSE, data, order="rvec", ignore=["0.bias", "2.bias"])
    # the same net with its biases as constants
    W, (b, c) = model[0].weight, (model[0].bias.detach(), model[2].bias.detach())
    J = torch.func.jacrev(lambda W: (data[0] @ W.T + b).tanh() @ W.T + c)(W.detach())
    J = J.reshape(12, 9)
    assert list(found) == ["0"]
    assert relative_error(found["0"], 2 / 12 * J.T @ J) < 1e-10


def test_one_bias_of_two_tied_layers_is_refused_too():
    model, data = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False)), None
    model[1].weight, data = model[0].weight, (torch.randn(4, 3), torch.randn(4, 3))
    refused(model, data, r"(?s)bias.*ignore")
    found = exact_blocks(model, MSE, data, order="rvec", ignore="0.bias")
    b = model[0].bias.detach()
    J = torch.func.jacrev(lambda W: (data[0] @ W.T + b) @ W.T)(model[0].weight.detach())
    J = J.reshape(12, 9)
    assert relative_error(found["0"], 2 / 12 * J.T @ J) < 1e-10


def tied_to_embedding():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Tanh(), nn.Linear(3, 5, bias=False))
    model[2].weight = model[0].weight
    return model


def test_a_linear_layer_tied_to_an_embedding_is_refused():
    model, data = tied_to_embedding(), (torch.randint(5, (4,)), torch.randn(4, 5))
    refused(model, data, r"(?s)0.*2.*(Linear|Embedding).*ignore")


def test_a_weight_used_outside_its_layer_is_still_refused():
    model = Net(lambda m, x: m.fc(x) + x @ m.fc.weight.T, fc=nn.Linear(3, 3))
    refused(model, (torch.randn(4, 3), torch.randn(4, 3)), r"(?s)weight.*'fc'.*ignore")


# Sharing, layer by layer


def three_layers():
    return nn.Sequential(
        nn.Embedding(5, 4), To(lambda z: z.transpose(1, 2).sin()), nn.Conv1d(4, 2, 2),
        To(lambda z: z.transpose(1, 2).tanh()), nn.Linear(2, 3), classes_first,
    )  # fmt: skip


CHOICES = {
    "names": ({"0": Reduce(), "4": Reduce()}, {"0": "reduce", "2": "expand", "4": "reduce"}),
    "pattern": ({"[24]": Reduce()}, {"0": "expand", "2": "reduce", "4": "reduce"}),
    "first wins": ({"2": Expand(), "*": Reduce()}, {"0": "reduce", "2": "expand", "4": "reduce"}),
    "all": ({"*": Reduce()}, {"0": "reduce", "2": "reduce", "4": "reduce"}),
    "empty": ({}, {"0": "expand", "2": "expand", "4": "expand"}),
    "callable": (
        lambda key: Reduce() if key == "2" else Expand(),
        {"0": "expand", "2": "reduce", "4": "expand"},
    ),
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_sharing_may_be_chosen_for_each_layer(choice, bias):
    model, X = three_layers(), torch.randint(5, (3, 3))
    data = X, labels(CE, model(X).detach())
    given, own = CHOICES[choice]
    (vectors,) = drawn(FLAVOURS["type-II"], model, CE, data)
    expected = factors(model, CE, data, vectors, own, bias)
    found = KFAC.compute(model, CE, data, sharing=given, bias=bias)
    assert list(found) == list(expected)
    for name, pairs in expected.items():
        assert relative_error(found[name].to_dense("rvec"), dense(pairs, "rvec")) < 1e-10
    other = {"expand": "reduce", "reduce": "expand"}
    wrong = factors(model, CE, data, vectors, {n: other[s] for n, s in own.items()}, bias)
    for name, pairs in wrong.items():
        if name.endswith(".bias"):
            continue  # without mixing behind the layer the two agree
        assert relative_error(found[name].to_dense("rvec"), dense(pairs, "rvec")) > 0.01


@pytest.mark.parametrize("choice", CHOICES)
def test_ekfac_takes_the_basis_of_each_layers_own_sharing(choice):
    model, X = three_layers(), torch.randint(5, (3, 3))
    data = X, labels(CE, model(X).detach())
    given, own = CHOICES[choice]
    found = EKFAC.compute(model, CE, data, sharing=given)
    for name, sharing in own.items():
        expected = EKFAC.compute(model, CE, data, sharing=SHARINGS[sharing])[name]
        assert relative_error(found[name].eigenvalues, expected.eigenvalues) < 1e-10
        assert (found[name].Q_A is None) == (name == "0" and sharing == "expand")


def test_a_module_used_twice_takes_the_sharing_of_its_name():
    model, data = example("shared and pooled", CE, 3)
    (vectors,) = drawn(FLAVOURS["type-II"], model, CE, data)
    own = {"body": "reduce", "head": "expand"}
    found = KFAC.compute(model, CE, data, sharing={"body": Reduce()})
    for name, pairs in factors(model, CE, data, vectors, own).items():
        assert relative_error(found[name].to_dense("rvec"), dense(pairs, "rvec")) < 1e-10


def test_the_root_layer_has_the_empty_name_also_here():
    model, data = nn.Conv1d(2, 3, 2), (torch.randn(3, 2, 3), torch.randn(3, 3, 2))
    (vectors,) = drawn(FLAVOURS["type-II"], model, MSE, data)
    (pairs,) = factors(model, MSE, data, vectors, "reduce").values()
    for sharing in ({"": Reduce()}, {"*": Reduce()}, lambda key: Reduce() if not key else 0):
        found = KFAC.compute(model, MSE, data, sharing=sharing)[""]
        assert relative_error(found.to_dense("rvec"), dense(pairs, "rvec")) < 1e-10
