"""Rows of the exact cases, right ones and such with a mistake in them.

What :mod:`kfac_lib.hypotheses` makes its predictions from: vectors of another flavour, patches that
are cut in another way, columns in another order. Explained in the section :ref:`test-kit`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from kfac_lib.capture import Call, capture
from kfac_lib.exact_cases import ExactCase
from kfac_lib.fisher import Empirical, MonteCarlo, TypeII
from kfac_lib.layers import Convolution, Lookup, input_rows, is_supported, output_rows
from kfac_lib.losses import criterion_of


@lru_cache(maxsize=512)
def prediction_of(case: ExactCase) -> Tensor:
    """The prediction f of a case (:ref:`test-kit`)."""
    with torch.no_grad():
        f: Tensor = case.model(case.data[0])
    return f


@lru_cache(maxsize=1024)
def vectors_of(case: ExactCase, name: str) -> Tensor | None:
    """Vectors Δ of shape (V, N, K, ...), right ones or wrong ones (:ref:`test-kit`).

    Args:
        case: The case.
        name: ``"right"``, or what is mistaken for them.

    Returns:
        The vectors; None where it makes no sense.
    """
    f, y = prediction_of(case), case.data[1]
    criterion = criterion_of(case.loss_func)
    if name == "right":
        fisher = TypeII() if case.is_random else case.fisher
        return fisher.vectors(criterion, f, y)
    if name == "type-II":
        return TypeII().vectors(criterion, f, y)
    if name == "empirical":
        return Empirical().vectors(criterion, f, y)
    if name == "true labels":
        if not isinstance(case.fisher, MonteCarlo):
            return None
        root = criterion.kappa(f, y).sqrt()
        return -root * criterion.log_likelihood_gradient(f, y.unsqueeze(0))
    if name in ("everywhere", "everywhere, classes last"):
        classes_last = name != "everywhere"
        is_class_first = isinstance(case.loss_func, nn.CrossEntropyLoss)
        if f.ndim < 3 or isinstance(case.fisher, Empirical) or (classes_last and is_class_first):
            return None
        at_each = TypeII().vectors(criterion, f, y).reshape(*f.shape[1:], *f.shape)
        if classes_last:
            return at_each.flatten(0, f.ndim - 3).sum(0)
        return at_each.flatten(1, f.ndim - 2).sum(1)
    if not isinstance(case.loss_func, nn.CrossEntropyLoss) or isinstance(case.fisher, Empirical):
        return None
    return criterion.kappa(f, y).sqrt() * _softmax_over_data(f, name)


def _softmax_over_data(f: Tensor, name: str) -> Tensor:
    logits = f.flatten(2) if f.ndim > 2 else f.unsqueeze(-1)
    K, T = logits.shape[1:]
    p, wrong = logits.softmax(1), logits.softmax(0)
    eye = torch.eye(K, dtype=f.dtype)
    labels = wrong / wrong.sum(1, keepdim=True)
    if name == "softmax of the Hessian":
        q = wrong.movedim(1, -1)
        eigenvalues, Q = torch.linalg.eigh(torch.diag_embed(q) - q.unsqueeze(-1) * q.unsqueeze(-2))
        roots = Q * eigenvalues.clamp(min=0).sqrt().unsqueeze(-2)
        columns = roots.permute(3, 0, 2, 1)  # (K, N, K, T)
        shift = f.new_zeros(1, *f.shape)
    else:
        # Labels drawn from q, the gradient mean − e_y: a spread about its mean at each position,
        # and the mean, which fills all positions of a draw.
        q, mean = {
            "softmax of the root": (wrong, wrong),
            "softmax of the labels": (labels, p),
            "softmax of the gradient": (p, wrong),
            "softmax of both": (labels, wrong),
        }[name]
        columns = q.sqrt().movedim(1, 0).unsqueeze(2) * (eye.reshape(K, 1, K, 1) - q.unsqueeze(0))
        shift = (mean - q).reshape(1, *f.shape)
    at_each = torch.stack([columns * (torch.arange(T) == t) for t in range(T)])
    return torch.cat([at_each.flatten(0, 1).reshape(-1, *f.shape), shift])


@lru_cache(maxsize=2048)
def rows_of(case: ExactCase, of_vectors: str) -> Mapping[str, list[tuple[Tensor, Tensor]]]:
    """For every layer and every call of it, its rows (:ref:`test-kit`).

    Args:
        case: The case.
        of_vectors: Which vectors are backpropagated, a name that :func:`vectors_of` knows.

    Returns:
        x of shape (N, S, D_in) and g of shape (V, N, S, D_out), of the data that count.
    """
    delta = vectors_of(case, of_vectors)
    assert delta is not None
    f, calls = _calls(case)
    keep = _keep(case)
    result: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, of_layer in calls.items():
        for call in of_layer:
            x = input_rows(call.layer, call.x).to(f.dtype)
            g = [torch.autograd.grad(f, call.edge, v, retain_graph=True)[0] for v in delta]
            stacked = torch.stack(g) if g else f.new_empty(0)
            stacked = stacked.reshape(len(g), *call.shape)
            result.setdefault(name, []).append((x[keep], output_rows(call.layer, stacked)[:, keep]))
    return result


def wrong_inputs(case: ExactCase, layer: str) -> Iterator[tuple[str, str, Tensor]]:
    """Rows of a layer's input that are not those that it reads (:ref:`test-kit`).

    Args:
        case: The case.
        layer: Name of the layer.

    Yields:
        Hypothesis, variant, and x of shape (N, S, D_in), where the number of positions S may be
        another than it should be.
    """
    _, calls = _calls(case)
    keep = _keep(case)
    module, xs = case.model.get_submodule(layer), [call.x[keep] for call in calls[layer]]
    right = torch.cat([input_rows(module, x) for x in xs], dim=1)

    def joined(operation: Convolution | Lookup) -> Tensor:
        return torch.cat([input_rows(operation, x) for x in xs], dim=1).to(dtype)

    dtype = prediction_of(case).dtype
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        yield "tokens miscounted", "padding_idx counted", joined(Lookup(module.num_embeddings))
    if not isinstance(module, _ConvNd):
        return
    for variant, wrong in _other_options(Convolution.of(module)):
        if not _fits(wrong, xs[0].shape[2:]):
            continue
        x = joined(wrong)
        if x.shape != right.shape or not torch.equal(x, right):
            yield "patches cut wrongly", variant, x


def _other_options(right: Convolution) -> Iterator[tuple[str, Convolution]]:
    axes = len(right.kernel_size)
    none, one = ((0, 0),) * axes, (1,) * axes
    for variant, wrong in {
        "zeros for the padding mode": replace(right, padding_mode="zeros"),
        "padding ignored": replace(right, padding=none),
        "padding before and after exchanged": replace(
            right, padding=tuple((after, before) for before, after in right.padding)
        ),
        "dilation ignored": replace(right, dilation=one),
        "stride ignored": replace(right, stride=one),
        "all options ignored": Convolution(right.kernel_size, one, none, one, right.groups),
    }.items():
        if wrong != right:
            yield variant, wrong


def _fits(operation: Convolution, pixels: torch.Size) -> bool:
    """Is the kernel no larger than the padded input?"""
    return all(
        step * (k - 1) < size + before + after
        for k, step, size, (before, after) in zip(
            operation.kernel_size, operation.dilation, pixels, operation.padding, strict=True
        )
    )


def other_columns(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Orders of a convolution's columns other than (C_in, k₁, k₂, ...) (:ref:`test-kit`).

    Args:
        module: A layer.

    Yields:
        What the order is, and the permutation of the columns of one group.

    Example:
        >>> [variant for variant, _ in other_columns(nn.Conv1d(2, 4, 3))]
        ['(k, C_in)', 'kernel flipped']
    """
    if not isinstance(module, _ConvNd):
        return
    k = tuple(module.kernel_size)
    places = torch.arange(module.weight[0].numel())
    at = places.reshape(-1, *k)
    for variant, other in {
        "(k, C_in)": at.movedim(0, -1),
        "axes of the kernel reversed": at.permute(0, *range(len(k), 0, -1)),
        "kernel flipped": at.flip(*range(1, len(k) + 1)),
    }.items():
        if not torch.equal(other.flatten(), places):
            yield variant, other.flatten()


def read_in_another_order(tensor: Tensor) -> Tensor:
    """Rows (..., S, D) whose memory, which is (..., D, S), is read as (..., S, D).

    See :ref:`test-kit`.

    Example:
        >>> read_in_another_order(torch.tensor([[1, 2], [3, 4], [5, 6]])).tolist()
        [[1, 3], [5, 2], [4, 6]]
    """
    return tensor.transpose(-2, -1).reshape(tensor.shape)


@lru_cache(maxsize=512)
def _calls(case: ExactCase) -> tuple[Tensor, Mapping[str, list[Call]]]:
    layers = {n: m for n, m in case.model.named_modules() if is_supported(m)}
    with torch.enable_grad(), capture(layers) as calls:
        f: Tensor = case.model(case.data[0])
    return f, calls


def _keep(case: ExactCase) -> Tensor:
    return criterion_of(case.loss_func).counted(prediction_of(case), case.data[1])
