"""Ground truth for the tests, written without kfac_lib: torch.func, loops, dense algebra.

Also the small nets that the tests share, and the check that a model was left as it was.
"""

from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import nn

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "sigmoid": nn.Sigmoid, "linear": nn.Identity}


class To(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def mlp(*sizes, activation="tanh", bias=True):
    """Linear layers "0", "2", "4", ... with activations in between."""
    layers = []
    for d_in, d_out in pairwise(sizes):
        layers += [nn.Linear(d_in, d_out, bias=bias), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


def data_for(loss, N, *shape, D_in=4, K=3):
    """Generic inputs (N, *shape, D_in) and targets for predictions (N, K, *shape)."""
    X = torch.randn(N, *shape, D_in)
    if isinstance(loss, nn.MSELoss):
        return X, torch.randn(N, K, *shape)
    if isinstance(loss, nn.BCEWithLogitsLoss):
        return X, torch.randint(2, (N, K, *shape)).to(X.dtype)
    return X, torch.randint(K, (N, *shape))


def relative_error(found, expected):
    assert found.shape == expected.shape
    assert expected.norm() > 0
    return float(((found - expected).norm() / expected.norm()).detach())


def stack_entries(matrix, order):
    """Flatten a matrix entry by entry, with the loops written out."""
    rows, columns = matrix.shape
    if order == "cvec":
        return torch.stack([matrix[o, i] for i in range(columns) for o in range(rows)])
    return torch.stack([matrix[o, i] for o in range(rows) for i in range(columns)])


def jacobians(model, X, order):
    """For each linear layer, d f / d [W b] of shape (all entries of f, D), by torch.func."""
    params = {n: p.detach() for n, p in model.named_parameters()}
    J = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (X,)))(params)
    C = model(X).numel()
    result = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            prefix = f"{name}." if name else ""
            W = J[f"{prefix}weight"].reshape(C, *layer.weight.shape)
            parts = [W]
            if layer.bias is not None:
                parts.append(J[f"{prefix}bias"].reshape(C, -1, 1))
            index = torch.arange(W[0].numel() + (len(parts) - 1) * W.shape[1])
            index = stack_entries(index.reshape(W.shape[1], -1), order)
            result[name] = torch.cat(parts, 2).reshape(C, -1)[:, index]
    return result


def ggn_blocks(model, loss, data, order):
    """Jᵀ H J with H the Hessian of torch's own loss with respect to the whole prediction."""
    X, y = data
    f = model(X).detach()
    H = torch.func.hessian(lambda f: loss(f, y))(f).reshape(f.numel(), f.numel())
    return {name: J.T @ H @ J for name, J in jacobians(model, X, order).items()}


def reduction_factor(loss, f, y):
    """R of the page "the mathematics", spelled out."""
    if isinstance(loss, nn.MSELoss):
        return 2 / f.numel() if loss.reduction == "mean" else 2.0
    if loss.reduction == "sum":
        return 1.0
    if isinstance(loss, nn.BCEWithLogitsLoss):
        return 1 / f.numel()
    if y.shape == f.shape:
        return f.shape[1] / f.numel()
    valid = [label for label in y.flatten().tolist() if label != loss.ignore_index]
    weight = [1.0] * f.shape[1] if loss.weight is None else loss.weight.tolist()
    return 1 / sum(weight[label] for label in valid)


def fisher_blocks(model, loss, data, vectors, order):
    """R Σ_n Σ_v (J_nᵀ Δ_{n,v})(J_nᵀ Δ_{n,v})ᵀ with loops over data and vectors."""
    X, y = data
    f = model(X).detach()
    R = reduction_factor(loss, f, y)
    result = {}
    for name, J in jacobians(model, X, order).items():
        per_datum = J.reshape(len(f), -1, J.shape[1])
        g = [per_datum[n].T @ delta[n].reshape(-1) for delta in vectors for n in range(len(f))]
        result[name] = R * sum(torch.outer(v, v) for v in g)
    return result


def per_datum_gradients(model, loss, data):
    """∇_f c(f_n, y_n), with one vector a datum: that of torch's own loss, over R."""
    X, y = data
    f = model(X).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(f, y), f)
    return gradient.unsqueeze(0) / reduction_factor(loss, f, y)


def truth(model, loss, data, flavour, order, vectors=None):
    """The matrix that a flavour stands for: "type-II", "empirical", or that of given vectors."""
    if flavour == "type-II":
        return ggn_blocks(model, loss, data, order)
    if flavour == "empirical":
        vectors = per_datum_gradients(model, loss, data)
    return fisher_blocks(model, loss, data, vectors, order)


def _state(model):
    hooks = [
        (name, module.training, attribute, tuple(value.items()))
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if attribute.endswith("_hooks") and isinstance(value, dict)
    ]
    tensors = {
        name: (id(t), t._version, t.detach().clone(), t.requires_grad, t.is_leaf)
        for name, t in [*model.named_parameters(), *model.named_buffers()]
    }
    grads = {
        name: None if p.grad is None else (id(p.grad), p.grad.clone())
        for name, p in model.named_parameters()
    }
    return hooks, tensors, grads, torch.is_grad_enabled(), torch.get_default_dtype()


@contextmanager
def left_alone(model):
    """Hooks, mode, parameters, buffers, .grad and requires_grad are the same afterwards."""
    hooks, tensors, grads, *settings = _state(model)
    try:
        yield
    finally:
        new_hooks, new_tensors, new_grads, *new_settings = _state(model)
        assert new_hooks == hooks
        assert new_settings == settings
        for old, new in ((tensors, new_tensors), (grads, new_grads)):
            assert old.keys() == new.keys()
            for name, before in old.items():
                after = new[name]
                assert (before is None) == (after is None), name
                for was, now in zip(before or (), after or (), strict=True):
                    if isinstance(was, torch.Tensor):
                        same = torch.allclose(was, now, rtol=0, atol=0, equal_nan=True)
                    else:
                        same = was == now
                    assert same, name


WEIGHT = (0.5, 2.0, 0.0, 1.3)
"""Class weights for the tests, one of them zero; the first K are taken."""


def _weight(K):
    return torch.tensor(WEIGHT[:K], dtype=torch.float64)


LOSSES = {
    "MSE": (lambda K, **r: nn.MSELoss(**r), "real"),
    "CE": (lambda K, **r: nn.CrossEntropyLoss(**r), "index"),
    "CE weight": (lambda K, **r: nn.CrossEntropyLoss(weight=_weight(K), **r), "index"),
    "CE ignore": (lambda K, **r: nn.CrossEntropyLoss(ignore_index=1, **r), "index"),
    "CE ignore -100": (lambda K, **r: nn.CrossEntropyLoss(**r), "index with -100"),
    "CE smoothing": (lambda K, **r: nn.CrossEntropyLoss(label_smoothing=0.3, **r), "index"),
    "CE all options": (
        lambda K, **r: nn.CrossEntropyLoss(
            weight=_weight(K), ignore_index=0, label_smoothing=0.3, **r
        ),
        "index",
    ),
    "CE probabilities": (lambda K, **r: nn.CrossEntropyLoss(**r), "probabilities"),
    "CE probabilities weight smoothing": (
        lambda K, **r: nn.CrossEntropyLoss(weight=_weight(K), label_smoothing=0.3, **r),
        "probabilities",
    ),
    "BCE": (lambda K, **r: nn.BCEWithLogitsLoss(**r), "binary"),
    "BCE soft": (lambda K, **r: nn.BCEWithLogitsLoss(**r), "fractions"),
    "BCE weight": (
        lambda K, **r: nn.BCEWithLogitsLoss(weight=torch.rand(()).double() + 0.5, **r),
        "binary",
    ),
    "BCE pos_weight": (
        lambda K, **r: nn.BCEWithLogitsLoss(
            pos_weight=torch.tensor(3.0).double(), weight=torch.tensor(0.7).double(), **r
        ),
        "fractions",
    ),
}
"""Every loss with every option: a factory (K, reduction=...) and the kind of its targets."""


def targets(kind, N, K, shape=()):
    """Random targets for a prediction of shape (N, K, *shape)."""
    f = torch.randn(N, K, *shape)
    index = torch.randint(K, (N, *shape))
    index.view(-1)[:2] = torch.tensor([0, 1])  # both are there, so that ignoring one matters
    return {
        "real": f,
        "index": index,
        "index with -100": index.where(index != 1, -100),
        "probabilities": f.softmax(1),
        "binary": (f > 0).to(f.dtype),
        "fractions": f.sigmoid(),
    }[kind]


class Net(nn.Module):
    """Named layers, run by a function given from outside."""

    def __init__(self, run, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def labels(loss, f):
    """Random targets that fit a prediction."""
    if isinstance(loss, nn.MSELoss):
        return torch.randn_like(f)
    if isinstance(loss, nn.BCEWithLogitsLoss):
        return torch.rand_like(f)
    return torch.randint(f.shape[1], (len(f), *f.shape[2:]))
