"""The gradients of the covered layers as matrices [W b], and the way back into ``.grad``.

Explained in the section :ref:`damp-gradient`.
"""

from collections.abc import Mapping
from math import sqrt

import torch
from torch import Tensor, nn

from kfac_lib.coverage import Coverage
from kfac_lib.layers import as_matrix, from_matrix, groups_of, lookup_of


def parameters_of(coverage: Coverage, name: str) -> list[nn.Parameter]:
    """The weight of a layer, and its bias where that is covered (:ref:`damp-gradient`).

    A tied parameter belongs to the one layer under whose name its factors stand.

    Example:
        >>> from kfac_lib.coverage import cover
        >>> len(parameters_of(cover(nn.Linear(2, 3)), ""))
        2
    """
    layer = coverage.layers[name]
    leaves = ["weight", "bias"] if name in coverage.biases else ["weight"]
    return [getattr(layer, leaf) for leaf in leaves]


def shape_of(coverage: Coverage, name: str) -> tuple[int, int]:
    """Shape (D_out, D_in [+1]) of a layer's [W b] (:ref:`damp-gradient`).

    Example:
        >>> from kfac_lib.coverage import cover
        >>> shape_of(cover(nn.Conv2d(2, 4, 3)), "")
        (4, 19)
    """
    parts = [as_matrix(_module(coverage, name), p) for p in parameters_of(coverage, name)]
    return len(parts[0]), sum(part.shape[1] for part in parts)


def factors_in_words(coverage: Coverage, name: str) -> str:
    """The shapes of a layer's factors, for people (:ref:`share-groups`).

    Example:
        >>> from kfac_lib.coverage import cover
        >>> factors_in_words(cover(nn.Conv1d(4, 6, 3, groups=2)), "")
        '2 groups, each A (7, 7), B (3, 3)'
    """
    D_out, D_in = shape_of(coverage, name)
    G = groups_of(coverage.layers[name])
    one = f"A {(D_in, D_in)}, B {(D_out // G, D_out // G)}"
    return one if G == 1 else f"{G} groups, each {one}"


def joint_gradients(coverage: Coverage) -> dict[str, Tensor]:
    """The gradients [W b] of the layers that have one (:ref:`damp-gradient`).

    Returns:
        For each layer a matrix of shape (D_out, D_in [+1]).

    Raises:
        ValueError: If no layer has a gradient, or one for its weight or its bias alone.
        NotImplementedError: If one is sparse.

    Example:
        >>> from kfac_lib.coverage import cover
        >>> net = nn.Linear(2, 3)
        >>> net(torch.ones(5, 2)).sum().backward()
        >>> joint_gradients(cover(net))[""].shape
        torch.Size([3, 3])
    """
    gradients = {}
    for name in coverage.layers:
        layer, parameters = _module(coverage, name), parameters_of(coverage, name)
        given = [p.grad for p in parameters if p.grad is not None]
        if any(grad.layout != torch.strided for grad in given):
            raise NotImplementedError(
                f"Layer {name!r} ({type(layer).__name__}) has a sparse gradient, which is not "
                "supported. Make it with sparse=False, or name it in ignore."
            )
        if given and len(given) < len(parameters):
            raise ValueError(
                f"Layer {name!r} has a gradient for its weight or its bias alone, the other's "
                ".grad is None. Freeze the other with requires_grad_(False) before the "
                "preconditioner is made, or name it in ignore."
            )
        if given:
            gradients[name] = torch.cat([as_matrix(layer, grad) for grad in given], dim=1)
    if not gradients:
        raise ValueError(
            "No covered layer has a gradient. Call loss.backward() before precondition(), and "
            "zero_grad() after optimizer.step()."
        )
    return gradients


def write_gradients(coverage: Coverage, matrices: Mapping[str, Tensor], scale: float) -> None:
    """Write matrices [W b], times a scale, into ``.grad``; the tensors stay what they are.

    See :ref:`damp-gradient`.

    Example:
        >>> from kfac_lib.coverage import cover
        >>> net = nn.Linear(2, 3)
        >>> net(torch.ones(5, 2)).sum().backward()
        >>> write_gradients(cover(net), {"": torch.ones(3, 3)}, 2.0)
        >>> net.bias.grad.tolist()
        [2.0, 2.0, 2.0]
    """
    for name, matrix in matrices.items():
        layer, parameters = _module(coverage, name), parameters_of(coverage, name)
        columns = [as_matrix(layer, p).shape[1] for p in parameters]
        padding = getattr(lookup_of(layer), "padding_idx", None)
        for parameter, part in zip(parameters, torch.split(matrix, columns, dim=1), strict=True):
            assert parameter.grad is not None
            # A padded token's vector must not move by rounding, which a small δ magnifies.
            still = padding is not None and not bool(parameter.grad[padding].any())
            parameter.grad.copy_(from_matrix(layer, scale * part, parameter.shape))
            if still:
                parameter.grad[padding] = 0


def clip_scale(
    gradients: Mapping[str, Tensor], steps: Mapping[str, Tensor], kappa: float, lr: float
) -> float:
    """min(1, √(κ / (lr² Σ ⟨g, p⟩))), which bounds a step p by κ (:ref:`damp-preconditioner`).

    Args:
        gradients: g, by layer.
        steps: p, the preconditioned gradients.
        kappa: κ.
        lr: Learning rate.

    Example:
        >>> clip_scale({"fc": torch.ones(1, 4)}, {"fc": torch.ones(1, 4)}, kappa=1.0, lr=1.0)
        0.5
    """
    length = lr**2 * sum(float((gradients[name] * p).sum()) for name, p in steps.items())
    return min(1.0, sqrt(kappa / length)) if length > 0 else 1.0


def _module(coverage: Coverage, name: str) -> nn.Module:
    layer = coverage.layers[name]
    assert isinstance(layer, nn.Module)
    return layer
