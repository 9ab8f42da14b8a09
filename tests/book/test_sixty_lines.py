"""``kfac_in_60_lines.py`` of chapter 8: short, alone, right, and loud where it cannot be right."""

from __future__ import annotations

import ast
import importlib.util
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks

from kfac_lib import KFAC, Empirical, TypeII
from kfac_lib.examples import ACTIVATIONS, mlp

FILE = Path(__file__).resolve().parents[2] / "book" / "kfac_in_60_lines.py"
TOLERANCE = 1e-10
LOSSES = [
    kind(reduction=reduction)
    for kind, reduction in product(
        (nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss), ("mean", "sum")
    )
]
losses = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss} {loss.reduction}")


def load():
    spec = importlib.util.spec_from_file_location("kfac_in_60_lines", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kfac = load().kfac


class Mean(nn.Module):
    def forward(self, z):
        return z.flatten(1, -2).mean(1)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(self.layer(x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0].mean(1)


class Merged(nn.Module):
    """Merges the positions into the data, so that axis 0 of the layer is not the datum."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x.flatten(0, 1)).reshape(*x.shape[:2], 3).mean(1)


@pytest.fixture(autouse=True)
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def _no_hook_stays():
    yield
    assert not _global_forward_hooks


def nets():
    """Name → net and shape of one input: depths, activations, biases, positions."""
    made = {f"mlp {name}": (mlp(4, 5, 3, activation=name), (4,)) for name in ACTIVATIONS}
    made["deep"] = mlp(4, 3, 6, 5, 3), (4,)
    made["no bias"] = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)), (4,)
    made["one layer"] = nn.Linear(4, 3), (4,)
    made["in place"] = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)), (4,)
    made["shared"] = nn.Sequential(*mlp(4, 5, 3), Mean()), (6, 4)
    made["shared twice"] = nn.Sequential(*mlp(4, 5, 3), Mean()), (2, 3, 4)
    shared_in_place = nn.Linear(4, 5), nn.ReLU(inplace=True), Mean(), nn.Linear(5, 3)
    made["shared in place"] = nn.Sequential(*shared_in_place), (6, 4)
    return made


def targets(loss, N, *shape):
    if isinstance(loss, nn.CrossEntropyLoss):
        return torch.randint(shape[-1], (N,))
    y = torch.randn(N, *shape)
    return y if isinstance(loss, nn.MSELoss) else (y > 0).double()


def assert_same(ours, library):
    assert list(ours) == list(library)
    for name, (A, B) in ours.items():
        for mine, theirs in ((A, library[name].A), (B, library[name].B)):
            assert mine.shape == theirs.shape
            assert torch.linalg.norm(mine - theirs) <= TOLERANCE * torch.linalg.norm(theirs)


def test_the_file_has_at_most_60_lines():
    assert len(FILE.read_text().splitlines()) <= 60


def test_no_line_is_longer_than_79_characters():
    assert max(map(len, FILE.read_text().splitlines())) <= 79


def test_it_imports_torch_alone():
    tree = ast.parse(FILE.read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported == {"torch"}


@losses
@pytest.mark.parametrize("name", nets())
@pytest.mark.parametrize("flavour", ["type-II", "empirical"])
def test_it_gives_what_the_library_gives(name, loss, flavour):
    net, shape = nets()[name]
    X, y = torch.randn(7, *shape), targets(loss, 7, 3)
    fisher = TypeII() if flavour == "type-II" else Empirical()
    assert_same(kfac(net, loss, X, y, flavour), KFAC.compute(net, loss, (X, y), fisher))


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if "CrossEntropy" not in repr(loss)])
@pytest.mark.parametrize("flavour", ["type-II", "empirical"])
def test_a_prediction_at_several_positions_works_where_the_loss_is_a_sum_of_entries(loss, flavour):
    net, X, y = mlp(4, 5, 3), torch.randn(7, 6, 4), targets(loss, 7, 6, 3)
    fisher = TypeII() if flavour == "type-II" else Empirical()
    assert_same(kfac(net, loss, X, y, flavour), KFAC.compute(net, loss, (X, y), fisher))


def drawn(loss, f, M):
    """M labels for every datum, drawn as the file draws them."""
    if isinstance(loss, nn.CrossEntropyLoss):
        return torch.distributions.OneHotCategorical(logits=f).sample((M,)).argmax(-1)
    if isinstance(loss, nn.MSELoss):
        return torch.distributions.Normal(f, 1.0).sample((M,))
    return torch.distributions.Bernoulli(logits=f).sample((M,))


@losses
@pytest.mark.parametrize("name", ["mlp tanh", "shared"])
def test_monte_carlo_is_the_mean_of_the_empirical_over_drawn_labels(name, loss):
    net, shape = nets()[name]
    X, y, M = torch.randn(7, *shape), targets(loss, 7, 3), 3
    torch.manual_seed(1)
    ours = kfac(net, loss, X, y, "mc", samples=M)
    torch.manual_seed(1)
    labels = drawn(loss, net(X).detach(), M)
    each = [KFAC.compute(net, loss, (X, label), Empirical()) for label in labels]
    for layer, (A, B) in ours.items():
        mean = sum(one[layer].B for one in each) / M
        assert torch.linalg.norm(B - mean) <= TOLERANCE * torch.linalg.norm(mean)
        torch.testing.assert_close(A, each[0][layer].A, rtol=TOLERANCE, atol=0)


@losses
def test_monte_carlo_comes_close_to_type_two(loss):
    net, X, y = mlp(4, 5, 3), torch.randn(7, 4), targets(loss, 7, 3)
    many, exact = (kfac(net, loss, X, y, *kind) for kind in (("mc", 20000), ("type-II",)))
    for layer in exact:
        B_many, B = many[layer][1], exact[layer][1]
        assert torch.linalg.norm(B_many - B) < 0.05 * torch.linalg.norm(B)


def test_it_works_in_float32_and_leaves_the_model_alone():
    net, X = mlp(4, 5, 3, dtype=torch.float32), torch.randn(7, 4, dtype=torch.float32)
    factors = kfac(net, nn.CrossEntropyLoss(), X, torch.zeros(7).long())
    assert all(
        M.dtype == torch.float32 and not M.requires_grad for AB in factors.values() for M in AB
    )
    assert all(p.grad is None for p in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())


def refused(net, loss, X, y, *options):
    with pytest.raises((NotImplementedError, ValueError)) as error:
        kfac(net, loss, X, y, *options)
    assert str(error.value)
    assert not _global_forward_hooks
    assert not any(module._forward_hooks for module in net.modules())


def tied():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    return net


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (Twice(), (4,)),
        (tied(), (4,)),
        (nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), (4,)),
        (nn.Sequential(nn.Conv1d(2, 3, 1), nn.Flatten()), (2, 1)),
        (nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), (4,)),
        (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False)), (4,)),
        (Attention(), (3, 4)),
        (Merged(), (3, 4)),
    ],
    ids=["twice", "tied", "norm", "conv", "dropout", "batch norm", "attention", "merged"],
)
def test_a_net_that_it_cannot_do_is_refused(net, shape):
    net, X = net.double(), torch.randn(7, *shape)
    with torch.no_grad():
        y = torch.zeros_like(net(X))
    refused(net, nn.MSELoss(), X, y)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(ignore_index=0),
        nn.CrossEntropyLoss(reduction="none"),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0])),
        nn.BCEWithLogitsLoss(weight=torch.tensor([2.0])),
        nn.MSELoss(reduction="none"),
        nn.L1Loss(),
        nn.HuberLoss(),
    ],
    ids=lambda loss: f"{loss} {loss.reduction}",
)
def test_a_loss_that_it_cannot_do_is_refused(loss):
    y = torch.zeros(7).long() if isinstance(loss, nn.CrossEntropyLoss) else torch.ones(7, 3)
    refused(mlp(4, 5, 3), loss, torch.randn(7, 4), y)


def test_labels_that_do_not_fit_are_refused():
    net, X = mlp(4, 5, 3), torch.randn(7, 4)
    refused(net, nn.MSELoss(), X, torch.zeros(7, 1))  # would broadcast
    refused(net, nn.BCEWithLogitsLoss(), X, torch.zeros(3))
    to_classes_first = nn.Sequential(*mlp(4, 5, 3), nn.Flatten(0, 0))
    refused(to_classes_first, nn.CrossEntropyLoss(), torch.randn(7, 6, 4), torch.zeros(7, 3).long())
    for ignored in (-100, -1):
        y = torch.full((7,), ignored)
        with pytest.raises(RuntimeError):
            kfac(net, nn.CrossEntropyLoss(ignore_index=ignored), X, y)


def test_an_unknown_flavour_is_refused():
    refused(mlp(4, 5, 3), nn.MSELoss(), torch.randn(7, 4), torch.zeros(7, 3), "type-2")


def test_hooks_are_gone_after_an_error_in_the_model():
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3))  # shapes do not fit
    with pytest.raises(RuntimeError):
        kfac(net, nn.MSELoss(), torch.randn(7, 4), torch.zeros(7, 3))
    assert not _global_forward_hooks
    assert not any(module._forward_hooks for module in net.modules())
