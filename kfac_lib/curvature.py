"""Dense curvature matrices of a network, by autograd alone: the ground truth.

Hessian, generalized Gauss-Newton matrix and the Fishers, whole, layer by layer, or the mixed block
of two layers. Nothing here knows of layers as linear maps, of hooks or of Kronecker products; that
is the point. Explained in the sections :ref:`hess-blocks`, :ref:`ggn-network` and
:ref:`fish-pictures`. For small nets: memory grows with the square of the number of parameters.

Everywhere a layer is a module with trainable parameters, under its name; its weight and bias are
one matrix [W b], the weight's axes after the first taken as one, row-major. A parameter that is
neither a ``weight`` nor a ``bias`` stands alone, under its own name.
"""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from kfac_lib.autodiff import twice_differentiable
from kfac_lib.fisher import Fisher, require_vectors
from kfac_lib.flattening import Order, check_order, flatten
from kfac_lib.losses import Criterion, criterion_of

Part = TypeVar("Part")
Data = tuple[Tensor, Tensor]
"""One pair (X, y); axis 0 is the datum."""


def layer_sizes(model: nn.Module) -> dict[str, int]:
    """The number of trainable parameters of each layer (:ref:`hess-blocks`).

    They say where the blocks of a matrix over all layers begin and end.

    Args:
        model: Network; only its trainable parameters count.

    Returns:
        For each layer, in the model's order, the number D of entries of [W b].

    Raises:
        ValueError: If no parameter is trainable.

    Example:
        >>> layer_sizes(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))
        {'0': 24, '2': 15}
    """
    named = _trainable(model)
    return {
        layer: sum(named[name].numel() for name in names) for layer, names in _layers(named).items()
    }


def parameter_jacobians(
    model: nn.Module, X: Tensor, order: Order
) -> tuple[Tensor, dict[str, Tensor]]:
    """Jacobian of the prediction with respect to each layer's joint parameter [W b].

    See :ref:`jac-network`.

    Args:
        model: Network; only its trainable parameters count.
        X: Its input; axis 0 is the datum n.
        order: Flattening of [W b].

    Returns:
        The prediction f of shape (N, ...), attached to its graph, and for each layer a Jacobian of
        shape (N, C, D), with C the size of one datum's prediction, row-major, and D the size of
        [W b]; zeros for a layer that the prediction does not depend on.

    Raises:
        ValueError: If the order is unknown, or no parameter is trainable.

    Example:
        >>> f, jacobians = parameter_jacobians(nn.Linear(2, 3), torch.ones(5, 2), "cvec")
        >>> jacobians[""].shape
        torch.Size([5, 3, 9])
    """
    check_order(order)
    named = _trainable(model)
    with twice_differentiable():
        f = model(X)
    N, C = f.shape[0], f[0].numel()
    joint = _joint_jacobians(f, named, order)
    return f, {layer: J.reshape(N, C, -1) for layer, J in joint.items()}


def hessian(
    model: nn.Module,
    loss_func: nn.Module | Criterion,
    data: Data,
    *,
    order: Order,
    rows: str | None = None,
    columns: str | None = None,
) -> Tensor:
    """The Hessian of the loss, layer after layer, or the block of two layers (:ref:`hess-blocks`).

    Args:
        model: Network.
        loss_func: A supported loss, called as it is.
        data: One pair (X, y).
        order: Flattening of each layer's [W b].
        rows: Name of the layer of the rows; all layers when not given.
        columns: Name of the layer of the columns; all layers when not given.

    Returns:
        Matrix of shape (D, D), D the number of trainable parameters of the layers of rows and
        columns.

    Raises:
        ValueError: If the order or a layer's name is unknown, no parameter is trainable, or the
            data do not fit the loss.

    Example:
        >>> net, data = nn.Linear(2, 3), (torch.ones(5, 2), torch.zeros(5, 3))
        >>> hessian(net, nn.MSELoss(), data, order="cvec").shape
        torch.Size([9, 9])
    """
    check_order(order)
    layers = _layers(_trainable(model))
    across = list(_chosen(layers, columns))
    down = list(_chosen(layers, rows))
    gradients = _joint_gradients(model, loss_func, data)
    return torch.cat([_second(gradients[layer], model, across, order) for layer in down])


def hessian_blocks(
    model: nn.Module, loss_func: nn.Module | Criterion, data: Data, *, order: Order
) -> dict[str, Tensor]:
    """Diagonal blocks of the Hessian of the loss, one per layer (:ref:`hess-blocks`).

    Args:
        model: Network.
        loss_func: A supported loss, called as it is.
        data: One pair (X, y).
        order: Flattening of [W b].

    Returns:
        For each layer a matrix of shape (D, D), D the size of [W b].

    Raises:
        ValueError: As :func:`hessian`.

    Example:
        >>> net, data = nn.Linear(2, 3), (torch.ones(5, 2), torch.zeros(5, 3))
        >>> hessian_blocks(net, nn.MSELoss(), data, order="cvec")[""].shape
        torch.Size([9, 9])
    """
    check_order(order)
    gradients = _joint_gradients(model, loss_func, data)
    return {layer: _second(g, model, [layer], order) for layer, g in gradients.items()}


def ggn_blocks(
    model: nn.Module, loss_func: nn.Module | Criterion, data: Data, *, order: Order
) -> dict[str, Tensor]:
    """Diagonal blocks of the generalized Gauss-Newton matrix, one per layer (:ref:`ggn-network`).

    Args:
        model: Network.
        loss_func: A supported loss, called as it is: its Hessian comes from autograd.
        data: One pair (X, y).
        order: Flattening of [W b].

    Returns:
        For each layer a matrix of shape (D, D), D the size of [W b].

    Raises:
        ValueError: If the order is unknown, no parameter is trainable, or the data do not fit the
            loss.

    Example:
        >>> X, y = torch.ones(5, 2), torch.zeros(5, 3)
        >>> ggn_blocks(nn.Linear(2, 3), nn.MSELoss(), (X, y), order="cvec")[""].shape
        torch.Size([9, 9])
    """
    f, jacobians = parameter_jacobians(model, data[0], order)
    H = _loss_hessian(loss_func, f.detach(), data[1])
    return {layer: _sandwich(J, H, J) for layer, J in jacobians.items()}


def ggn(
    model: nn.Module,
    loss_func: nn.Module | Criterion,
    data: Data,
    *,
    order: Order,
    rows: str | None = None,
    columns: str | None = None,
) -> Tensor:
    """The generalized Gauss-Newton matrix, layer after layer, or the block of two layers.

    See :ref:`ggn-network`.

    Args:
        model: Network.
        loss_func: A supported loss, called as it is: its Hessian comes from autograd.
        data: One pair (X, y).
        order: Flattening of each layer's [W b].
        rows: Name of the layer of the rows; all layers when not given.
        columns: Name of the layer of the columns; all layers when not given.

    Returns:
        Matrix of shape (D, D), D the number of trainable parameters of the layers of rows and
        columns. Its diagonal blocks are those of :func:`ggn_blocks`.

    Raises:
        ValueError: If the order or a layer's name is unknown, no parameter is trainable, or the
            data do not fit the loss.

    Example:
        >>> X, y = torch.ones(5, 2), torch.zeros(5, 3)
        >>> ggn(nn.Linear(2, 3), nn.MSELoss(), (X, y), order="rvec").shape
        torch.Size([9, 9])
    """
    f, jacobians = parameter_jacobians(model, data[0], order)
    H = _loss_hessian(loss_func, f.detach(), data[1])
    return _sandwich(_side_by_side(jacobians, rows), H, _side_by_side(jacobians, columns))


def fisher_blocks(
    model: nn.Module,
    loss_func: nn.Module | Criterion,
    data: Data,
    fisher: Fisher,
    *,
    order: Order,
) -> dict[str, Tensor]:
    """Diagonal blocks of R Σ_n J_nᵀ (Σ_v Δ Δᵀ) J_n for a flavour (:ref:`fish-pictures`).

    Args:
        model: Network.
        loss_func: A supported loss.
        data: One pair (X, y).
        fisher: The flavour, which chooses the vectors Δ.
        order: Flattening of [W b].

    Returns:
        For each layer a matrix of shape (D, D), D the size of [W b].

    Raises:
        ValueError: If the order is unknown, no parameter is trainable, the flavour has no vectors,
            or the data do not fit the loss.

    Example:
        >>> from kfac_lib.fisher import Empirical
        >>> data = torch.ones(5, 2), torch.zeros(5, 3)
        >>> fisher_blocks(nn.Linear(2, 3), nn.MSELoss(), data, Empirical(), order="cvec")[""].shape
        torch.Size([9, 9])
    """
    f, jacobians = parameter_jacobians(model, data[0], order)
    middle = _outer_products(loss_func, f.detach(), data[1], fisher)
    return {layer: _sandwich(J, middle, J) for layer, J in jacobians.items()}


def fisher_matrix(
    model: nn.Module,
    loss_func: nn.Module | Criterion,
    data: Data,
    fisher: Fisher,
    *,
    order: Order,
    rows: str | None = None,
    columns: str | None = None,
) -> Tensor:
    """R Σ_n J_nᵀ (Σ_v Δ Δᵀ) J_n for a flavour, layer after layer, or the block of two layers.

    See :ref:`fish-pictures`.

    Args:
        model: Network.
        loss_func: A supported loss.
        data: One pair (X, y).
        fisher: The flavour, which chooses the vectors Δ.
        order: Flattening of each layer's [W b].
        rows: Name of the layer of the rows; all layers when not given.
        columns: Name of the layer of the columns; all layers when not given.

    Returns:
        Matrix of shape (D, D), D the number of trainable parameters of the layers of rows and
        columns. Its diagonal blocks are those of :func:`fisher_blocks` with the same draws.

    Raises:
        ValueError: If the order or a layer's name is unknown, no parameter is trainable, the
            flavour has no vectors, or the data do not fit the loss.

    Example:
        >>> from kfac_lib.fisher import Empirical
        >>> data = torch.ones(5, 2), torch.zeros(5, 3)
        >>> fisher_matrix(nn.Linear(2, 3), nn.MSELoss(), data, Empirical(), order="rvec").shape
        torch.Size([9, 9])
    """
    f, jacobians = parameter_jacobians(model, data[0], order)
    middle = _outer_products(loss_func, f.detach(), data[1], fisher)
    return _sandwich(_side_by_side(jacobians, rows), middle, _side_by_side(jacobians, columns))


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("The model has no trainable parameter, so no curvature matrix.")
    return named


def _layers(named: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The names of the parameters of each layer."""
    layers: dict[str, list[str]] = {}
    for name in named:
        owner, _, leaf = name.rpartition(".")
        layers.setdefault(owner if leaf in ("weight", "bias") else name, []).append(name)
    # [W b], also where a module registers its bias first
    return {layer: sorted(names, reverse=True) for layer, names in layers.items()}


def _join(tensors: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of tensors (rows, *parameter shape) make one (rows, D_out, D_in [+1]) for each layer."""

    def matrix(name: str) -> Tensor:
        out = named[name].shape[0] if named[name].ndim else 1
        return tensors[name].reshape(len(tensors[name]), out, -1)

    return {
        layer: torch.cat([matrix(name) for name in names], dim=2)
        for layer, names in _layers(named).items()
    }


def _joint_jacobians(f: Tensor, named: Mapping[str, Tensor], order: Order) -> dict[str, Tensor]:
    """Jacobians (all entries of f, D) of a tensor with respect to each layer's [W b]."""
    v = torch.eye(f.numel(), dtype=f.dtype, device=f.device).reshape(-1, *f.shape)
    found = torch.autograd.grad(
        f,
        list(named.values()),
        v,
        retain_graph=True,
        is_grads_batched=True,
        allow_unused=True,
    )
    rows = {
        name: parameter.new_zeros(f.numel(), *parameter.shape) if row is None else row
        for (name, parameter), row in zip(named.items(), found, strict=True)
    }
    return {layer: flatten(J, order, start=1) for layer, J in _join(rows, named).items()}


def _joint_gradients(
    model: nn.Module, loss_func: nn.Module | Criterion, data: Data
) -> dict[str, Tensor]:
    """The gradient of the loss for each layer, (1, D_out, D_in [+1]), attached to its graph."""
    named = _trainable(model)
    with twice_differentiable():
        loss = _loss(loss_func, model(data[0]), data[1])
        found = torch.autograd.grad(
            loss, list(named.values()), create_graph=True, materialize_grads=True
        )
        rows = {name: row.unsqueeze(0) for name, row in zip(named, found, strict=True)}
        return _join(rows, named)


def _second(gradient: Tensor, model: nn.Module, columns: list[str], order: Order) -> Tensor:
    """The derivatives of one layer's gradient with respect to some layers, side by side."""
    named = _trainable(model)
    layers = _layers(named)
    of_columns = {name: named[name] for layer in columns for name in layers[layer]}
    flat = flatten(gradient[0], order)
    if not flat.requires_grad:
        return flat.new_zeros(len(flat), sum(p.numel() for p in of_columns.values()))
    return torch.cat(list(_joint_jacobians(flat, of_columns, order).values()), dim=1)


def _chosen(parts: dict[str, Part], layer: str | None) -> dict[str, Part]:
    if layer is None:
        return parts
    if layer not in parts:
        raise ValueError(
            f"There is no layer {layer!r} with trainable parameters. Use one of "
            f"{', '.join(map(repr, parts))}."
        )
    return {layer: parts[layer]}


def _side_by_side(jacobians: dict[str, Tensor], layer: str | None) -> Tensor:
    return torch.cat(list(_chosen(jacobians, layer).values()), dim=2)


def _loss(loss_func: nn.Module | Criterion, f: Tensor, y: Tensor) -> Tensor:
    """The loss as torch computes it, after the checks that torch leaves out."""
    criterion = criterion_of(loss_func)
    criterion.check(f, y)
    R = criterion.reduction_factor(criterion.denominator(f, y))
    if isinstance(loss_func, Criterion):
        return R * criterion.value(f, y)
    loss: Tensor = loss_func(f, y)
    return loss


def _loss_hessian(loss_func: nn.Module | Criterion, f: Tensor, y: Tensor) -> Tensor:
    """Hessian of the loss with respect to each datum's prediction, shape (N, C, C)."""
    f = f.requires_grad_()
    with twice_differentiable():
        loss = _loss(loss_func, f, y)
        (gradient,) = torch.autograd.grad(loss, f, create_graph=True)
        # The loss is a sum over data, so the derivative of Σ_n g_n is that of each g_n.
        total = gradient.sum(0)
    C = total.numel()
    v = torch.eye(C, dtype=f.dtype, device=f.device).reshape(C, *total.shape)
    (rows,) = torch.autograd.grad(total, f, v, is_grads_batched=True)
    return rows.reshape(C, len(f), C).transpose(0, 1)


def _outer_products(
    loss_func: nn.Module | Criterion, f: Tensor, y: Tensor, fisher: Fisher
) -> Tensor:
    """R Σ_v Δ Δᵀ for each datum, shape (N, C, C)."""
    require_vectors(fisher)
    criterion = criterion_of(loss_func)
    criterion.check(f, y)
    R = criterion.reduction_factor(criterion.denominator(f, y))
    vectors = fisher.vectors(criterion, f, y)
    deltas = vectors.reshape(len(vectors), len(f), -1)
    return R * torch.einsum("vnc,vnk->nck", deltas, deltas)


def _sandwich(left: Tensor, middle: Tensor, right: Tensor) -> Tensor:
    inner = torch.einsum("nck,nkj->ncj", middle, right)
    return left.flatten(0, 1).T @ inner.flatten(0, 1)
