"""Bad input for convolutions, embeddings, sharing and EKFAC: a clear error, and nothing changed."""

import re

import pytest
import torch
from layer_cases import classes_first
from torch import nn
from truth import To, left_alone, mlp, relative_error
from truth_layers import blocks

from kfac_lib import (
    EKFAC,
    KFAC,
    Expand,
    InputOnly,
    KFACPreconditioner,
    Reduce,
    TypeII,
    exact_blocks,
)
from kfac_lib.layers import input_rows

pytestmark = pytest.mark.usefixtures("float64")
MSE = nn.MSELoss()
SUPPORTED = r"Supported: Linear, Conv1d, Conv2d, Conv3d, Embedding"


def entry_points(model, data, **options):
    """All that compute something, with the options that each of them knows."""
    exact = {k: v for k, v in options.items() if k not in ("bias", "sharing")}
    return [
        lambda: KFAC.compute(model, MSE, data, **options),
        lambda: EKFAC.compute(model, MSE, data, **options),
        lambda: exact_blocks(model, MSE, data, order="cvec", **exact),
    ]


def with_state(model):
    """Hooks and gradients of the caller's own, to see that they stay."""
    for module in model.modules():
        module.register_forward_hook(lambda layer, args, z: None)
        module.register_forward_pre_hook(lambda layer, args: None)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model


def refused(model, data, error, words, skip=(), **options):
    with_state(model)
    for i, compute in enumerate(entry_points(model, data, **options)):
        if i not in skip:
            with left_alone(model), pytest.raises(error, match=rf"(?s){words}"):
                compute()


def accepted(model, data, **options):
    """Nothing of the caller's changes when all goes well either."""
    with_state(model)
    with left_alone(model):
        results = [compute() for compute in entry_points(model, data, **options)]
    assert list(results[0]) == list(results[1])
    return results


def conv_net(*layers, **options):
    conv = nn.Conv1d(2, 3, 2, **options)
    return nn.Sequential(conv, *layers), (torch.randn(5, 2, 4), torch.randn(5, 3, 3))


def embedding_net(*layers, **options):
    model = nn.Sequential(nn.Embedding(6, 3, **options), *layers, classes_first)
    return model, (torch.randint(6, (5, 2)), torch.randn(5, 3, 2))


# All goes well


@pytest.mark.parametrize("make", [conv_net, embedding_net])
def test_nothing_of_the_callers_changes(make):
    model, data = make(nn.Dropout(0.5))
    model.eval()
    model[0].register_buffer("own", torch.randn(3))
    kfac, ekfac, exact = accepted(model, data)
    assert list(kfac) == list(ekfac) == list(exact) == ["0"]
    assert not model.training


@pytest.mark.parametrize("make", [conv_net, embedding_net])
def test_an_in_place_activation_does_not_touch_the_rows(make):
    in_place, data = make(nn.ReLU(inplace=True), nn.Sigmoid())
    torch.manual_seed(0)
    plain, _ = make(nn.ReLU(), nn.Sigmoid())
    plain.load_state_dict(in_place.state_dict())
    kfac, ekfac, exact = accepted(in_place, data)
    G = blocks(plain, MSE, data, "cvec")["0"]
    assert relative_error(exact["0"], G) < 1e-10
    assert relative_error(ekfac["0"].trace(), G.trace()) < 1e-10
    expected = KFAC.compute(plain, MSE, data)["0"].to_dense("cvec")
    assert relative_error(kfac["0"].to_dense("cvec"), expected) < 1e-12


def test_an_in_place_change_of_a_convolutions_input_is_refused():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 3, padding=1)

        def forward(self, x):
            h = x * 1.0
            h += self.conv(h)
            return h

    data = torch.randn(5, 2, 4), torch.randn(5, 2, 4)
    refused(Residual(), data, ValueError, r"input of layer 'conv' was overwritten")


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_a_frozen_bias_gives_the_block_of_the_weight(kind):
    axes = int(kind.__name__[-2])
    model = nn.Sequential(kind(2, 3, 2), To(lambda z: z.sin()))
    X = torch.randn(4, 2, *[3] * axes)
    data = X, torch.randn_like(model(X))
    whole = blocks(model, MSE, data, "cvec")["0"]
    model[0].bias.requires_grad_(False)
    kfac, ekfac, exact = accepted(model, data)
    assert relative_error(exact["0"], whole[:-3, :-3]) < 1e-10
    assert tuple(kfac["0"].shape) == tuple(ekfac["0"].shape) == (3, 2 * 2**axes)
    assert "frozen: 0.bias" in repr(kfac)
    assert "frozen: 0.bias" in repr(ekfac)


def test_frozen_and_ignored_layers_are_left_out_and_named():
    model = nn.Sequential(
        nn.Embedding(6, 2), To(lambda z: z.transpose(1, 2)), nn.Conv1d(2, 3, 2), nn.Conv1d(3, 3, 1)
    )
    data = torch.randint(6, (5, 3)), torch.randn(5, 3, 2)
    model[0].requires_grad_(False)
    for result in accepted(model, data, ignore="2")[:2]:
        assert list(result) == ["3"]
        assert "frozen: 0.weight" in repr(result)
        assert "ignored: 2.weight, 2.bias" in repr(result)
    for result in accepted(model, data, layers=["2"]):
        assert list(result) == ["2"]
    refused(model, data, ValueError, r"'0' names frozen parameters alone", layers=["0", "2"])
    refused(model.requires_grad_(False), data, ValueError, r"No trainable.*frozen: 0\.weight")


def test_only_the_bias_of_a_convolution_has_no_factors():
    model, data = conv_net()
    refused(
        model, data, ValueError, r"0\.bias.*weight is frozen or left out.*ignore", layers="*bias"
    )


# Refused layers


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_a_convolution_without_an_axis_for_the_data(kind):
    layer, shape = kind(3, 3, 2), (3, 4, 2, 2)[: int(kind.__name__[-2]) + 1]
    model, X = nn.Sequential(layer), torch.randn(shape)
    words = rf"[Cc]onv.*{re.escape(str(shape))}.*datum.*\(N, C_in"
    # Channels in and out are three: they look like three data.
    refused(model, (X, torch.randn_like(model(X))), ValueError, words)
    with pytest.raises(ValueError, match=rf"(?s){words}"):
        input_rows(layer, X)


def test_an_embedding_without_an_axis_for_the_data():
    with pytest.raises(ValueError, match=r"Embedding.*single index.*\(N, \.\.\.\)"):
        input_rows(nn.Embedding(4, 2), torch.tensor(3))


def test_positions_that_are_looked_up_without_an_axis_for_the_data():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(6, 3), nn.Embedding(4, 3)

        def forward(self, x):
            z = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
            return z.sin().movedim(-1, 1)

    data = torch.randint(6, (5, 2)), torch.randn(5, 3, 2)
    words = r"'positions'.*\(2,\).*5 data"
    refused(Positions(), data, ValueError, words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_norm": 1.0}, r"'0' \(Embedding\).*max_norm.*ignore"),
        ({"scale_grad_by_freq": True}, r"'0' \(Embedding\).*scale_grad_by_freq.*ignore"),
    ],
    ids=str,
)
def test_options_of_an_embedding_that_have_no_rows(options, words):
    model, data = embedding_net(**options)
    before = model[0].weight.detach().clone()
    refused(model, data, (NotImplementedError, ValueError), words)
    assert torch.equal(model[0].weight, before)  # max_norm scales it in place when it runs


def test_an_embedding_with_max_norm_may_be_left_out():
    model, data = embedding_net(nn.Linear(3, 3), max_norm=100.0)
    assert list(KFAC.compute(model, MSE, data, ignore="0")) == ["1"]


def test_an_unknown_padding_mode_is_not_taken_for_a_known_one():
    layer, x = nn.Conv1d(2, 3, 3, padding=1, padding_mode="replicate"), torch.randn(5, 2, 4)
    layer.padding_mode = "mirror"
    with pytest.raises((ValueError, NotImplementedError), match="mirror"):
        input_rows(layer, x)


def test_sparse_gradients_of_an_embedding_do_not_change_its_factors():
    sparse, data = embedding_net(sparse=True)
    plain, _ = embedding_net()
    plain.load_state_dict(sparse.state_dict())
    kfac, ekfac, exact = accepted(sparse, data)
    assert relative_error(exact["0"], blocks(plain, MSE, data, "cvec")["0"]) < 1e-10
    for found, compute in ((kfac, KFAC.compute), (ekfac, EKFAC.compute)):
        expected = compute(plain, MSE, data)["0"]
        assert relative_error(found["0"].trace(), expected.trace()) < 1e-12


@pytest.mark.parametrize(
    "layer",
    [nn.ConvTranspose1d(2, 3, 2), nn.EmbeddingBag(6, 3), nn.GroupNorm(1, 2)],
    ids=lambda layer: type(layer).__name__,
)
def test_other_layers_give_the_list_to_paste(layer):
    name = type(layer).__name__
    model = nn.Sequential(layer)
    data = torch.randn(5, 2, 4), torch.randn(5, 3, 3)
    words = rf"'0' \({name}\).*{SUPPORTED}.*ignore=\[\"0\"\]"
    refused(model.double(), data, NotImplementedError, words)


def own_forward(kind):
    class Own(kind):
        def forward(self, x):
            return 2 * super().forward(x)

    return Own


def own_conv_forward():
    class Own(nn.Conv1d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, 2 * weight, bias)

    return Own


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Embedding, nn.Linear, "_conv_forward"], ids=str)
def test_a_subclass_with_its_own_forward(kind):
    if kind is nn.Embedding:
        model = nn.Sequential(own_forward(kind)(6, 3), classes_first)
        data = embedding_net()[1]
    elif kind is nn.Linear:
        model, data = nn.Sequential(own_forward(kind)(4, 3)), (torch.randn(5, 4), torch.randn(5, 3))
    else:
        own = own_conv_forward() if kind == "_conv_forward" else own_forward(kind)
        model, data = nn.Sequential(own(2, 3, 2)), conv_net()[1]
    refused(model, data, NotImplementedError, r"'0' \(Own\).*not x Wᵀ \+ b.*ignore=\[.0.\]")


def test_a_subclass_with_the_forward_of_its_base_is_as_good_as_that():
    class Named(nn.Conv1d):
        """Only another name."""

    model, data = nn.Sequential(Named(2, 3, 2)), conv_net()[1]
    _, _, exact = accepted(model, data)
    plain = nn.Sequential(nn.Conv1d(2, 3, 2))
    plain.load_state_dict(model.state_dict())
    assert relative_error(exact["0"], blocks(plain, MSE, data, "cvec")["0"]) < 1e-10


def test_positions_merged_into_the_data_before_a_convolution():
    model = nn.Sequential(
        To(lambda x: x.flatten(0, 1)), nn.Conv1d(2, 3, 2), To(lambda z: z.unflatten(0, (5, 2)))
    )
    data = torch.randn(5, 2, 2, 4), torch.randn(5, 2, 3, 3)
    refused(model, data, ValueError, r"'1'.*\(10, 2, 4\).*5 data")


def test_pictures_of_different_sizes():
    model = nn.Sequential(nn.Conv1d(2, 3, 2), To(lambda z: z.mean(2)))
    data = [(torch.randn(2, 2, L), torch.randn(2, 3)) for L in (3, 4)]
    refused(model, data, ValueError, r"2 positions.*3", skip=[2])
    # the exact block needs no S: it is the sum over the batches
    found = exact_blocks(model, nn.MSELoss(reduction="sum"), data, order="cvec")["0"]
    each = [blocks(model, nn.MSELoss(reduction="sum"), batch, "cvec")["0"] for batch in data]
    assert relative_error(found, sum(each)) < 1e-10


@pytest.mark.parametrize("module", [nn.BatchNorm1d(3), nn.Dropout1d(0.5), nn.FeatureAlphaDropout()])
def test_batch_norm_and_dropout_behind_a_convolution(module):
    model, data = conv_net(module.double().requires_grad_(False))
    refused(model, data, ValueError, r"Layer '1'.*model\.eval\(\)")
    accepted(model.eval(), data)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_named(bad):
    model, (X, y) = conv_net()
    X[2, 1, 0] = bad
    refused(model, (X, y), ValueError, r"inputs X.*NaN or inf")
    model, data = embedding_net()
    with torch.no_grad():
        model[0].weight[data[0][0, 0]] = bad
    refused(model, data, ValueError, r"prediction.*NaN or inf")


# Sharing and parameters


@pytest.mark.parametrize(
    ("sharing", "error", "words"),
    [
        (Expand, TypeError, r"sharing=.*Expand\(\).*Reduce\(\)"),
        ("reduce", TypeError, r"sharing='reduce'.*Expand\(\).*Reduce\(\)"),
        (3, TypeError, r"sharing=3.*Expand\(\).*Reduce\(\)"),
        (None, TypeError, r"sharing=None.*Expand\(\).*Reduce\(\)"),
        ([Reduce()], TypeError, r"sharing=.*Expand\(\).*Reduce\(\)"),
        ({"0": "reduce"}, TypeError, r"'reduce'.*Expand\(\).*Reduce\(\)"),
        ({"0": Reduce}, TypeError, r"Reduce.*Expand\(\).*Reduce\(\)"),
        ({0: Reduce()}, TypeError, r"0.*(name|pattern|string|str)"),
        (lambda key: None, TypeError, r"None.*Expand\(\).*Reduce\(\)"),
        (lambda key: "reduce", TypeError, r"'reduce'.*Expand\(\).*Reduce\(\)"),
        ({"conv*": Reduce()}, ValueError, r"'conv\*' matches no.*0"),
        ({"0": Reduce(), "1": Reduce()}, ValueError, r"'1' matches no.*0"),
        ({"0.weight": Reduce()}, ValueError, r"'0\.weight' matches no.*0"),
    ],
    ids=range(13),
)
def test_sharing_of_the_wrong_kind_or_that_matches_nothing(sharing, error, words):
    model, data = conv_net()
    refused(model, data, error, words, skip=[2], sharing=sharing)


@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ([torch.ones(3)], TypeError, r"params.*list.*dict"),
        (torch.ones(3), TypeError, r"params.*Tensor.*dict"),
        ("0.weight", TypeError, r"params.*str.*dict"),
        ({"0.weight": 3.0}, TypeError, r"params.*0\.weight.*float.*[Tt]ensor"),
        ({0: torch.ones(3)}, TypeError, r"params.*0.*(name|str)"),
        ({"0.weight": torch.ones(3, 2, 2).long()}, TypeError, r"params.*0\.weight.*int64"),
        ({}, ValueError, r"params.*(empty|no )"),
        ({"9": torch.ones(3)}, ValueError, r"params.*'9'.*0\.weight"),
    ],
    ids=range(8),
)
def test_params_of_the_wrong_kind(params, error, words):
    model, data = conv_net()
    refused(model, data, error, words, params=params)


def test_a_function_without_params_is_refused():
    data = torch.randn(5, 4), torch.randn(5, 3)
    for compute in entry_points(lambda p, x: x, data):
        with pytest.raises(TypeError, match=r"function.*params.*Module"):
            compute()


# The preconditioner


@pytest.mark.parametrize("approximation", ["kfca", None, 3, KFAC])
def test_an_unknown_approximation(approximation):
    model, _ = conv_net()
    with pytest.raises((ValueError, TypeError), match=r"(?s)approximation=.*kfac.*ekfac.*nearest"):
        KFACPreconditioner(model, MSE, approximation=approximation)


@pytest.mark.parametrize("approximation", ["kfac", "ekfac", "nearest"])
@pytest.mark.parametrize("make", [conv_net, embedding_net])
def test_the_preconditioner_takes_the_new_layers_and_changes_gradients_only(make, approximation):
    model, data = make()
    pre = KFACPreconditioner(model, MSE, approximation=approximation)
    with left_alone(model):
        pre.update(*data)
    MSE(model(data[0]), data[1]).backward()
    before = {name: (p.grad.clone(), p.detach().clone()) for name, p in model.named_parameters()}
    pre.precondition()
    for name, p in model.named_parameters():
        assert p.grad.shape == p.shape
        assert relative_error(p.grad, before[name][0]) > 0.01
        assert torch.equal(p, before[name][1])


def test_the_fisher_of_ekfac_needs_vectors_in_the_preconditioner_too():
    model, data = mlp(4, 3), (torch.randn(5, 4), torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"InputOnly"):
        KFACPreconditioner(model, MSE, fisher=InputOnly(), approximation="ekfac").update(*data)
    KFACPreconditioner(model, MSE, fisher=TypeII(), approximation="ekfac").update(*data)
