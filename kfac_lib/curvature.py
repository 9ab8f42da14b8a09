"""Dense curvature matrices of a network, by autograd alone: the ground truth.

Nothing here knows of layers as linear maps, of hooks or of Kronecker products; that is the point.
Explained in the section :ref:`kfac-truth`. For small nets: memory grows with the square of the
number of parameters.
"""

import torch
from torch import Tensor, nn

from kfac_lib.fisher import Fisher
from kfac_lib.flattening import Order, check_order, flatten
from kfac_lib.losses import Criterion, criterion_of


def parameter_jacobians(
    model: nn.Module, X: Tensor, order: Order
) -> tuple[Tensor, dict[str, Tensor]]:
    """Jacobian of the prediction with respect to each layer's joint parameter [W b].

    See :ref:`kfac-truth`.

    Args:
        model: Network; only its trainable parameters count.
        X: Its input; axis 0 is the datum n.
        order: Flattening of [W b]; the weight's axes after the first are one, row-major.

    Returns:
        The prediction f of shape (N, ...), attached to its graph, and for each module with
        trainable parameters, by its name, a Jacobian of shape (N, C, D), with C the size of one
        datum's prediction, row-major, and D the size of [W b]. A parameter that is neither a
        ``weight`` nor a ``bias`` stands alone, under its own name.

    Raises:
        ValueError: If the order is unknown, or no parameter is trainable.

    Example:
        >>> f, jacobians = parameter_jacobians(nn.Linear(2, 3), torch.ones(5, 2), "cvec")
        >>> jacobians[""].shape
        torch.Size([5, 3, 9])
    """
    check_order(order)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("The model has no trainable parameter, so no curvature matrix.")
    with torch.enable_grad():
        f = model(X)
    N, C = f.shape[0], f[0].numel()
    v = torch.eye(N * C, dtype=f.dtype, device=f.device).reshape(N * C, *f.shape)
    rows = torch.autograd.grad(
        f,
        list(named.values()),
        v,
        retain_graph=True,
        is_grads_batched=True,
        allow_unused=True,
    )
    groups: dict[str, list[Tensor]] = {}
    for (name, parameter), row in zip(named.items(), rows, strict=True):
        owner, _, leaf = name.rpartition(".")
        key = owner if leaf in ("weight", "bias") else name
        row = parameter.new_zeros(N * C, *parameter.shape) if row is None else row
        out = parameter.shape[0] if parameter.ndim else 1
        groups.setdefault(key, []).append(row.reshape(N * C, out, -1))
    joint = {key: torch.cat(parts, dim=2) for key, parts in groups.items()}
    return f, {key: flatten(J, order, start=1).reshape(N, C, -1) for key, J in joint.items()}


def ggn_blocks(
    model: nn.Module, loss_func: nn.Module | Criterion, data: tuple[Tensor, Tensor], *, order: Order
) -> dict[str, Tensor]:
    """Diagonal blocks of the generalized Gauss-Newton matrix, one per layer (:ref:`kfac-truth`).

    Args:
        model: Network.
        loss_func: A supported loss, called as it is: its Hessian comes from autograd.
        data: One pair (X, y).
        order: Flattening of [W b].

    Returns:
        For each layer a matrix of shape (D, D), D the size of [W b].

    Raises:
        ValueError: If the order is unknown, or no parameter is trainable.

    Example:
        >>> X, y = torch.ones(5, 2), torch.zeros(5, 3)
        >>> ggn_blocks(nn.Linear(2, 3), nn.MSELoss(), (X, y), order="cvec")[""].shape
        torch.Size([9, 9])
    """
    f, jacobians = parameter_jacobians(model, data[0], order)
    H = _loss_hessian(loss_func, f.detach(), data[1])
    return {key: _sandwich(J, H, J) for key, J in jacobians.items()}


def ggn(
    model: nn.Module, loss_func: nn.Module | Criterion, data: tuple[Tensor, Tensor], *, order: Order
) -> Tensor:
    """The whole generalized Gauss-Newton matrix, layer after layer (:ref:`kfac-truth`).

    Args:
        model: Network.
        loss_func: A supported loss, called as it is: its Hessian comes from autograd.
        data: One pair (X, y).
        order: Flattening of each layer's [W b].

    Returns:
        Matrix of shape (D, D), D the number of trainable parameters; its diagonal blocks are those
        of :func:`ggn_blocks`.

    Raises:
        ValueError: If the order is unknown, or no parameter is trainable.

    Example:
        >>> X, y = torch.ones(5, 2), torch.zeros(5, 3)
        >>> ggn(nn.Linear(2, 3), nn.MSELoss(), (X, y), order="rvec").shape
        torch.Size([9, 9])
    """
    f, jacobians = parameter_jacobians(model, data[0], order)
    H = _loss_hessian(loss_func, f.detach(), data[1])
    J = torch.cat(list(jacobians.values()), dim=2)
    return _sandwich(J, H, J)


def fisher_blocks(
    model: nn.Module,
    loss_func: nn.Module | Criterion,
    data: tuple[Tensor, Tensor],
    fisher: Fisher,
    *,
    order: Order,
) -> dict[str, Tensor]:
    """Diagonal blocks of R Σ_n J_nᵀ (Σ_v Δ Δᵀ) J_n for a flavour (:ref:`kfac-truth`).

    Args:
        model: Network.
        loss_func: A supported loss.
        data: One pair (X, y).
        fisher: The flavour, which chooses the vectors Δ.
        order: Flattening of [W b].

    Returns:
        For each layer a matrix of shape (D, D), D the size of [W b].

    Raises:
        ValueError: If the order is unknown, or no parameter is trainable.

    Example:
        >>> from kfac_lib.fisher import Empirical
        >>> data = torch.ones(5, 2), torch.zeros(5, 3)
        >>> fisher_blocks(nn.Linear(2, 3), nn.MSELoss(), data, Empirical(), order="cvec")[""].shape
        torch.Size([9, 9])
    """
    criterion = criterion_of(loss_func)
    f, jacobians = parameter_jacobians(model, data[0], order)
    criterion.check(f, data[1])
    vectors = fisher.vectors(criterion, f.detach(), data[1])
    deltas = vectors.reshape(len(vectors), len(f), -1)
    R = criterion.reduction_factor(criterion.denominator(f, data[1]))
    M = R * torch.einsum("vnc,vnk->nck", deltas, deltas)
    return {key: _sandwich(J, M, J) for key, J in jacobians.items()}


def _loss_hessian(loss_func: nn.Module | Criterion, f: Tensor, y: Tensor) -> Tensor:
    """Hessian of the loss with respect to each datum's prediction, shape (N, C, C)."""
    f = f.requires_grad_()
    with torch.enable_grad():
        if isinstance(loss_func, Criterion):
            R = loss_func.reduction_factor(loss_func.denominator(f, y))
            loss = R * loss_func.value(f, y)
        else:
            loss = loss_func(f, y)
        (gradient,) = torch.autograd.grad(loss, f, create_graph=True)
        # The loss is a sum over data, so the derivative of Σ_n g_n is that of each g_n.
        total = gradient.sum(0)
    C = total.numel()
    v = torch.eye(C, dtype=f.dtype, device=f.device).reshape(C, *total.shape)
    (rows,) = torch.autograd.grad(total, f, v, is_grads_batched=True)
    return rows.reshape(C, len(f), C).transpose(0, 1)


def _sandwich(left: Tensor, middle: Tensor, right: Tensor) -> Tensor:
    inner = torch.einsum("nck,nkj->ncj", middle, right)
    return left.flatten(0, 1).T @ inner.flatten(0, 1)
