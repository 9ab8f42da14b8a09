"""Derivatives as products and as matrices, from the graph that autograd has recorded.

Two products carry everything: :func:`vjp` (one backward pass) and :func:`jvp` (two). Explained in
the chapters :ref:`jacobians`, :ref:`hessians` and :ref:`gauss-newton`. Everything keeps dtype and
device; rows and columns of a matrix are flattened in the order that the caller names.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import overload

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kfac_lib.flattening import Order, check_order, flatten, unflatten


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Record graphs through which second derivatives, and products with them, exist.

    See :ref:`hess-hvp`. Gradients are on whatever the caller's mode, and attention
    (``scaled_dot_product_attention``) takes the one kernel that can be differentiated twice.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> with torch.no_grad(), twice_differentiable():
        ...     y = x.square()
        >>> y.requires_grad
        True
    """
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


@overload
def vjp(f: Tensor, x: Tensor, v: Tensor, *, create_graph: bool = ...) -> Tensor: ...
@overload
def vjp(
    f: Tensor, x: Sequence[Tensor], v: Tensor, *, create_graph: bool = ...
) -> tuple[Tensor, ...]: ...
def vjp(
    f: Tensor, x: Tensor | Sequence[Tensor], v: Tensor, *, create_graph: bool = False
) -> Tensor | tuple[Tensor, ...]:
    """Vector-Jacobian product (J_x f)ᵀ v, one backward pass (:ref:`jac-vjp`).

    Args:
        f: Evaluated tensor of any shape whose graph reaches ``x``; the graph is kept.
        x: Tensor to differentiate with respect to, or several.
        v: Tensor of the shape of ``f``.
        create_graph: Whether to record the graph of the product itself.

    Returns:
        A tensor of the shape of ``x``; for several, a tuple of them.

    Raises:
        ValueError: If ``v`` does not have the shape of ``f``, or ``x`` is not on its graph.
        TypeError: If ``f`` or ``x`` is not real floating-point.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> vjp(x**2, x, torch.tensor([1.0, 1.0])).tolist()
        [2.0, 4.0]
    """
    several, xs = _as_tuple(x)
    _check_shape("v", v, "f", f)
    products = _first_derivatives(f, xs, v, create_graph)
    return products if several else products[0]


def jvp(
    f: Tensor,
    x: Tensor | Sequence[Tensor],
    v: Tensor | Sequence[Tensor],
    *,
    create_graph: bool = False,
) -> Tensor:
    """Jacobian-vector product (J_x f) v, by two backward passes (:ref:`jac-jvp`).

    The VJP u ↦ (J_x f)ᵀ u is linear in u, so the VJP of that map is u's Jacobian transposed, and
    backpropagating v through it gives (J_x f) v.

    Args:
        f: Evaluated tensor of any shape whose graph reaches ``x``; the graph is kept.
        x: Tensor to differentiate with respect to, or several.
        v: Tensor of the shape of ``x``, or one for each of several.
        create_graph: Whether to record the graph of the product itself.

    Returns:
        A tensor of the shape of ``f``; over several ``x`` the products add up.

    Raises:
        ValueError: If ``v`` does not fit ``x``, or ``x`` is not on the graph of ``f``.
        TypeError: If ``f`` or ``x`` is not real floating-point.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> jvp(x.prod() * x, x, torch.tensor([1.0, 0.0])).tolist()
        [4.0, 4.0]
    """
    _, xs = _as_tuple(x)
    vs = _vectors_for(xs, v)
    u = torch.zeros_like(f, requires_grad=True)
    pulled = _first_derivatives(f, xs, u, create_graph=True)
    (pushed,) = _derivatives_or_zeros(pulled, (u,), vs, create_graph)
    return pushed


def jacobian(f: Tensor, x: Tensor, order: Order, *, create_graph: bool = False) -> Tensor:
    """Dense Jacobian of a tensor with respect to a tensor (:ref:`jac-matrix`).

    Args:
        f: Evaluated tensor of any shape whose graph reaches ``x``; the graph is kept.
        x: Tensor of any shape that requires grad.
        order: Flattening of both ``f`` and ``x``, ``"cvec"`` or ``"rvec"``.
        create_graph: Whether to record the graph of the Jacobian itself.

    Returns:
        Matrix of shape ``(f.numel(), x.numel())``.

    Raises:
        ValueError: If the order is unknown, or ``x`` is not on the graph of ``f``.
        TypeError: If ``f`` or ``x`` is not real floating-point.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> jacobian(x.sum() * x, x, "rvec").tolist()
        [[4.0, 1.0], [2.0, 5.0]]
    """
    check_order(order)
    _check_graph(f, (x,))
    rows = _rows_of_jacobian(f, x, order, create_graph)
    if rows is None:
        raise _not_on_graph(x)
    return flatten(rows, order, start=1)


def hessian(scalar: Tensor, x: Tensor, order: Order, y: Tensor | None = None) -> Tensor:
    """Dense Hessian of a scalar, or a mixed block of it (:ref:`hess-general`).

    Args:
        scalar: Evaluated tensor with one entry whose graph reaches ``x`` and ``y``.
        x: Tensor for the rows.
        order: Flattening of ``x`` and ``y``, ``"cvec"`` or ``"rvec"``.
        y: Tensor for the columns; ``x`` itself when not given.

    Returns:
        Matrix of second derivatives of shape ``(x.numel(), y.numel())``; zeros where the first
        derivative does not depend on ``y``.

    Raises:
        ValueError: If ``scalar`` has more than one entry, the order is unknown, or ``x`` or ``y``
            is not on the graph.
        TypeError: If a tensor is not real floating-point.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian(x[0] ** 2 * x[1], x, "rvec").tolist()
        [[4.0, 2.0], [2.0, 0.0]]
    """
    check_order(order)
    y = x if y is None else y
    (gradient, _) = _gradients(scalar, (x, y))
    rows = _rows_of_jacobian(gradient, y, order) if gradient.requires_grad else None
    if rows is None:
        return x.new_zeros(x.numel(), y.numel())
    return flatten(rows, order, start=1)


@overload
def hvp(
    scalar: Tensor,
    x: Tensor,
    v: Tensor | Sequence[Tensor],
    y: Tensor | Sequence[Tensor] | None = ...,
) -> Tensor: ...
@overload
def hvp(
    scalar: Tensor,
    x: Sequence[Tensor],
    v: Tensor | Sequence[Tensor],
    y: Tensor | Sequence[Tensor] | None = ...,
) -> tuple[Tensor, ...]: ...
def hvp(
    scalar: Tensor,
    x: Tensor | Sequence[Tensor],
    v: Tensor | Sequence[Tensor],
    y: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Hessian-vector product, or that of a mixed block (:ref:`hess-hvp`).

    The gradient of the number vᵀ ∇_y s with respect to x: rows belong to ``x``, columns to ``y``,
    as in :func:`hessian`. Two backward passes.

    Args:
        scalar: Evaluated tensor with one entry whose graph reaches ``x`` and ``y``; it is kept.
        x: Tensor for the rows, or several.
        v: Tensor of the shape of ``y``, or one for each of several.
        y: Tensor for the columns, or several; ``x`` itself when not given.

    Returns:
        A tensor of the shape of ``x``; for several, a tuple of them. Zeros where the second
        derivative vanishes.

    Raises:
        ValueError: If ``scalar`` has more than one entry, ``v`` does not fit ``y``, or a tensor is
            not on the graph.
        TypeError: If a tensor is not real floating-point.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hvp(x[0] ** 2 * x[1], x, torch.tensor([1.0, 0.0])).tolist()
        [4.0, 2.0]
    """
    several, xs = _as_tuple(x)
    _, ys = _as_tuple(x if y is None else y)
    vs = _vectors_for(ys, v)
    gradients = _gradients(scalar, (*xs, *ys))[len(xs) :]
    products = _derivatives_or_zeros(gradients, xs, vs)
    return products if several else products[0]


def ggn(loss: Tensor, f: Tensor, x: Tensor, order: Order, y: Tensor | None = None) -> Tensor:
    """Dense generalized Gauss-Newton matrix J_xᵀ H J_y, or a block of it (:ref:`ggn-two-ways`).

    The loss is linearized nowhere but between ``x`` and ``f``: J is the Jacobian of ``f``, H the
    Hessian of the loss with respect to ``f``.

    Args:
        loss: Evaluated scalar, computed from ``f``.
        f: The prediction, a node of the loss's graph; its own graph reaches ``x`` and ``y``.
        x: Tensor for the rows, often a parameter.
        order: Flattening of ``x`` and ``y``, ``"cvec"`` or ``"rvec"``.
        y: Tensor for the columns; ``x`` itself when not given.

    Returns:
        Matrix of shape ``(x.numel(), y.numel())``.

    Raises:
        ValueError: If ``loss`` has more than one entry, the order is unknown, or a tensor is not
            on the graph.
        TypeError: If a tensor is not real floating-point.

    Example:
        >>> x = torch.tensor([3.0], requires_grad=True)
        >>> f = 2 * x
        >>> ggn(f**2, f, x, "rvec").tolist()
        [[8.0]]
    """
    H = hessian(loss, f, order)
    J_x = jacobian(f, x, order)
    J_y = J_x if y is None or y is x else jacobian(f, y, order)
    return J_x.T @ H @ J_y


@overload
def ggnvp(loss: Tensor, f: Tensor, x: Tensor, v: Tensor | Sequence[Tensor]) -> Tensor: ...
@overload
def ggnvp(
    loss: Tensor, f: Tensor, x: Sequence[Tensor], v: Tensor | Sequence[Tensor]
) -> tuple[Tensor, ...]: ...
def ggnvp(
    loss: Tensor, f: Tensor, x: Tensor | Sequence[Tensor], v: Tensor | Sequence[Tensor]
) -> Tensor | tuple[Tensor, ...]:
    """GGN-vector product Jᵀ (H (J v)), without any matrix (:ref:`ggn-vp`).

    A JVP through the model, an HVP of the loss, a VJP back through the model.

    Args:
        loss: Evaluated scalar, computed from ``f``; its graph is kept.
        f: The prediction, a node of the loss's graph; its own graph reaches ``x``.
        x: Tensor, or several, often all parameters.
        v: Tensor of the shape of ``x``, or one for each of several.

    Returns:
        A tensor of the shape of ``x``; for several, a tuple of them.

    Raises:
        ValueError: If ``loss`` has more than one entry, ``v`` does not fit ``x``, or a tensor is
            not on the graph.
        TypeError: If a tensor is not real floating-point.

    Example:
        >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> f = x.prod()
        >>> ggnvp(f**2, f, x, torch.tensor([1.0, 0.0])).tolist()
        [32.0, 24.0]
    """
    return vjp(f, x, hvp(loss, f, jvp(f, x, v)))


def _as_tuple(x: Tensor | Sequence[Tensor]) -> tuple[bool, tuple[Tensor, ...]]:
    return (False, (x,)) if isinstance(x, Tensor) else (True, tuple(x))


def _vectors_for(xs: Sequence[Tensor], v: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    _, vs = _as_tuple(v)
    if len(vs) != len(xs):
        raise ValueError(f"{len(vs)} vectors are given for {len(xs)} tensors. Give one for each.")
    for vector, x in zip(vs, xs, strict=True):
        _check_shape("v", vector, "its tensor", x)
    return vs


def _check_shape(name: str, v: Tensor, partner: str, x: Tensor) -> None:
    if v.shape != x.shape:
        raise ValueError(
            f"{name} has shape {tuple(v.shape)}, {partner} has {tuple(x.shape)}. Give {name} the "
            f"shape of {partner}; it is never broadcast."
        )
    if v.dtype != x.dtype:
        raise TypeError(
            f"{name} has dtype {v.dtype}, {partner} has {x.dtype}. Use {name}.to({x.dtype})."
        )


def _check_graph(f: Tensor, xs: Sequence[Tensor]) -> None:
    for name, tensor in [("x", x) for x in xs] + [("f", f)]:
        if not tensor.is_floating_point():
            raise TypeError(
                f"{name} has dtype {tensor.dtype}, which has no derivatives. Use a real "
                f"floating-point tensor, such as {name}.to({torch.get_default_dtype()})."
            )
        if not tensor.requires_grad:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} does not require grad, so no graph leads "
                "from f to x. Call x.requires_grad_() before f is computed, without no_grad or "
                "detach."
            )


def _not_on_graph(x: Tensor) -> ValueError:
    return ValueError(
        f"x of shape {tuple(x.shape)} is not on the graph of f: f was computed without it, or from "
        "a copy, a view or a detached part of it. Compute f from this very tensor."
    )


def _first_derivatives(
    f: Tensor, xs: Sequence[Tensor], v: Tensor, create_graph: bool
) -> tuple[Tensor, ...]:
    """The VJPs, each of which must exist."""
    _check_graph(f, xs)
    products = torch.autograd.grad(
        f, xs, v, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    for x, product in zip(xs, products, strict=True):
        if product is None:
            raise _not_on_graph(x)
    return products


def _gradients(scalar: Tensor, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if scalar.numel() != 1:
        raise ValueError(
            f"A Hessian is that of a scalar, but the tensor has shape {tuple(scalar.shape)}. "
            "Reduce it first, for example with .sum()."
        )
    return _first_derivatives(scalar, xs, torch.ones_like(scalar), create_graph=True)


def _derivatives_or_zeros(
    fs: Sequence[Tensor], xs: Sequence[Tensor], vs: Sequence[Tensor], create_graph: bool = False
) -> tuple[Tensor, ...]:
    """VJPs of first derivatives, which need not depend on x: a derivative may vanish."""
    attached = [(f, v) for f, v in zip(fs, vs, strict=True) if f.requires_grad]
    if not attached:
        return tuple(torch.zeros_like(x) for x in xs)
    return torch.autograd.grad(
        [f for f, _ in attached],
        xs,
        [v for _, v in attached],
        retain_graph=True,
        create_graph=create_graph,
        materialize_grads=True,
    )


def _rows_of_jacobian(
    f: Tensor, x: Tensor, order: Order, create_graph: bool = False
) -> Tensor | None:
    """The gradients of all entries of f, in the order's sequence; None if there is no way to x."""
    v = unflatten(torch.eye(f.numel(), dtype=f.dtype, device=f.device), order, f.shape, dim=1)
    (rows,) = torch.autograd.grad(
        f,
        x,
        v,
        retain_graph=True,
        create_graph=create_graph,
        is_grads_batched=True,
        allow_unused=True,
    )
    return rows.unsqueeze(1) if rows is not None and x.ndim == 0 else rows
