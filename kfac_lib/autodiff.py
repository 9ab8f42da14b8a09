"""Derivatives as matrices, from the graph that autograd has recorded.

Used for the ground truth of the chapter :ref:`kfac`. Everything keeps dtype and device; rows and
columns are flattened in the order that the caller names.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac_lib.flattening import Order, flatten, unflatten


def vjp(f: Tensor, x: Sequence[Tensor], v: Tensor) -> tuple[Tensor, ...]:
    """Vector-Jacobian products (J_x f)ᵀ v, one backward pass (:ref:`kfac-pseudo-gradients`).

    Args:
        f: Evaluated tensor of any shape whose graph reaches ``x``; the graph is kept.
        x: Tensors to differentiate with respect to.
        v: Tensor of the shape of ``f``.

    Returns:
        For each ``x`` a tensor of its shape; zeros where ``f`` does not depend on it.

    Raises:
        ValueError: If ``v`` does not have the shape of ``f``.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> vjp(x**2, [x], torch.tensor([1.0, 1.0]))[0].tolist()
        [2.0, 4.0]
    """
    if v.shape != f.shape:
        raise ValueError(
            f"v has shape {tuple(v.shape)}, f has {tuple(f.shape)}: a VJP takes a vector v of the "
            "shape of f."
        )
    return torch.autograd.grad(f, list(x), v, retain_graph=True, materialize_grads=True)


def jacobian(f: Tensor, x: Tensor, order: Order, *, create_graph: bool = False) -> Tensor:
    """Dense Jacobian of a tensor with respect to a tensor (:ref:`kfac-truth`).

    Args:
        f: Evaluated tensor of any shape whose graph reaches ``x``; the graph is kept.
        x: Tensor of any shape that requires grad.
        order: Flattening of both ``f`` and ``x``, ``"cvec"`` or ``"rvec"``.
        create_graph: Whether to record the graph of the Jacobian itself.

    Returns:
        Matrix of shape ``(f.numel(), x.numel())``.

    Raises:
        ValueError: If the order is unknown.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> jacobian(x.sum() * x, x, "rvec").tolist()
        [[4.0, 1.0], [2.0, 5.0]]
    """
    v = unflatten(torch.eye(f.numel(), dtype=f.dtype, device=f.device), order, f.shape, dim=1)
    if not f.requires_grad:
        return x.new_zeros(f.numel(), x.numel())
    (rows,) = torch.autograd.grad(
        f,
        x,
        v,
        retain_graph=True,
        create_graph=create_graph,
        is_grads_batched=True,
        allow_unused=True,
    )
    if rows is None:
        return x.new_zeros(f.numel(), x.numel())
    return flatten(rows, order, start=1)


def hessian(scalar: Tensor, x: Tensor, order: Order, y: Tensor | None = None) -> Tensor:
    """Dense Hessian of a scalar, or a mixed block of it (:ref:`kfac-truth`).

    Args:
        scalar: Evaluated tensor with one entry whose graph reaches ``x`` and ``y``.
        x: Tensor for the rows.
        order: Flattening of ``x`` and ``y``, ``"cvec"`` or ``"rvec"``.
        y: Tensor for the columns; ``x`` itself when not given.

    Returns:
        Matrix of second derivatives of shape ``(x.numel(), y.numel())``.

    Raises:
        ValueError: If ``scalar`` has more than one entry.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian(x[0] ** 2 * x[1], x, "rvec").tolist()
        [[4.0, 2.0], [2.0, 0.0]]
    """
    if scalar.numel() != 1:
        raise ValueError(
            f"A Hessian is that of a scalar, but the tensor has shape {tuple(scalar.shape)}. "
            "Reduce it first, for example with .sum()."
        )
    (gradient,) = torch.autograd.grad(
        scalar, x, create_graph=True, retain_graph=True, materialize_grads=True
    )
    return jacobian(gradient, x if y is None else y, order)


def ggn(loss: Tensor, f: Tensor, x: Tensor, order: Order) -> Tensor:
    """Dense generalized Gauss-Newton matrix Jᵀ H J (:ref:`kfac-truth`).

    The loss is linearized nowhere but between ``x`` and ``f``: J is the Jacobian of ``f`` with
    respect to ``x``, H the Hessian of the loss with respect to ``f``.

    Args:
        loss: Evaluated scalar, computed from ``f``.
        f: The prediction, a node of the loss's graph; its own graph reaches ``x``.
        x: Tensor of any shape that requires grad, often a parameter.
        order: Flattening of ``x``, ``"cvec"`` or ``"rvec"``.

    Returns:
        Matrix of shape ``(x.numel(), x.numel())``.

    Raises:
        ValueError: If ``loss`` has more than one entry.

    Example:
        >>> x = torch.tensor([3.0], requires_grad=True)
        >>> f = 2 * x
        >>> ggn(f**2, f, x, "rvec").tolist()
        [[8.0]]
    """
    J = jacobian(f, x, order)
    return J.T @ hessian(loss, f, order) @ J
