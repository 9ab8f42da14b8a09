"""Functions replaced by their first-order Taylor expansion, wholly or in part.

Explained in the sections :ref:`ggn-linearize` and :ref:`ggn-partial`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kfac_lib.autodiff import jacobian

Function = Callable[[Tensor], Tensor]
"""A map from a tensor to a tensor."""


def linearize(fn: Function, anchor: Tensor) -> Function:
    """Linearize a function at an anchor: x ↦ fn(x̂) + J(x̂) (x − x̂).

    See :ref:`ggn-linearize`. The dense Jacobian is computed once, here; for large functions see
    :func:`torch.func.linearize`.

    Args:
        fn: Differentiable function of one tensor.
        anchor: The point x̂, of any shape; it is not changed, and no gradient flows to it.

    Returns:
        The linearized function, differentiable in x. It takes tensors of the anchor's shape and
        returns tensors of the shape of ``fn(anchor)``.

    Raises:
        TypeError: If the anchor or ``fn(anchor)`` is not a real floating-point tensor.
        ValueError: If ``fn(anchor)`` does not depend on the anchor, or, when the linearized
            function is called, x does not have the anchor's shape.

    Example:
        >>> square = linearize(lambda x: x**2, torch.tensor([3.0]))
        >>> square(torch.tensor([4.0])).item()
        15.0
    """
    if not anchor.is_floating_point():
        raise TypeError(
            f"The anchor has dtype {anchor.dtype}, which has no derivatives. Use a floating-point "
            f"tensor, such as anchor.to({torch.get_default_dtype()})."
        )
    with torch.enable_grad():
        x_hat = anchor.detach().clone().requires_grad_()
        f = fn(x_hat)
        J = jacobian(f, x_hat, "rvec")
    x_hat, f = x_hat.detach(), f.detach()

    def linearized(x: Tensor) -> Tensor:
        if x.shape != x_hat.shape:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, the anchor {tuple(x_hat.shape)}. A linearized "
                "function takes what the anchor is; use torch.vmap for many points."
            )
        return f + (J @ (x - x_hat).reshape(-1)).reshape(f.shape)

    return linearized


def partially_linearize(outer: Function, inner: Function, anchor: Tensor) -> Function:
    """Linearize only the inner of two composed functions (:ref:`ggn-partial`).

    The Hessian of the result at the anchor is the generalized Gauss-Newton matrix of
    ``outer(inner(x))``. If ``outer`` is convex, so is the result.

    Args:
        outer: Function that is kept, such as a loss.
        inner: Function that is linearized, such as a network.
        anchor: The point x̂ at which ``inner`` is linearized, of any shape.

    Returns:
        The function x ↦ outer(inner(x̂) + J(x̂) (x − x̂)), differentiable in x.

    Raises:
        TypeError: As :func:`linearize`.
        ValueError: As :func:`linearize`.

    Example:
        >>> partial = partially_linearize(torch.exp, torch.square, torch.tensor(1.0))
        >>> round(partial(torch.tensor(0.5)).item(), 4)
        1.0
    """
    linearized = linearize(inner, anchor)
    return lambda x: outer(linearized(x))
