"""KFAC of torch.nn.Linear layers in 60 lines, [W b] as one matrix."""

import torch
from torch import distributions, nn


def backpropagated(loss_func, f, y, flavour, samples):
    """Return the vectors of a flavour, shape (V, *f.shape), and R."""
    cls, odd = type(loss_func), bool(loss_func.state_dict())  # weights
    R = {"sum": 1.0, "mean": 1 / y.numel()}.get(loss_func.reduction)
    if flavour not in ("type-II", "empirical", "mc") or R is None:
        raise ValueError(f"{flavour!r} or {loss_func.reduction!r} unknown")
    if cls is nn.CrossEntropyLoss and f.ndim == 2:
        odd |= loss_func.label_smoothing > 0 or loss_func.ignore_index >= 0
        r = distributions.OneHotCategorical(logits=f)
        y = nn.functional.one_hot(y, f.shape[1])
    elif cls is nn.BCEWithLogitsLoss:
        r = distributions.Bernoulli(logits=f)
    else:
        r, R, odd = distributions.Normal(f, 1), 2 * R, cls is not nn.MSELoss
    if odd or y.shape != f.shape:
        raise NotImplementedError(f"{loss_func}, prediction {f.shape}")
    if flavour != "type-II":  # gradients, for the labels or for drawn ones
        y = y[None] if flavour == "empirical" else r.sample((samples,))
        return (r.mean - y) / len(y) ** 0.5, R
    p, L = r.mean, r.stddev.flatten(1).diag_embed()  # L Lᵀ: Hessian of c
    if cls is nn.CrossEntropyLoss:
        L = p.sqrt().diag_embed() - p[:, :, None] * p.sqrt()[:, None]
    return L.permute(2, 0, 1).reshape(-1, *f.shape), R


def kfac(model, loss_func, X, y, flavour="type-II", samples=1):
    """Return {layer: (A, B)}; kron(B, A) is for the order rvec([W b])."""
    names = {m: n for n, m in model.named_modules() if type(m) is nn.Linear}
    own = {p for m in names for p in m.parameters() if p.requires_grad}
    if len(list(model.named_parameters(remove_duplicate=False))) > len(own):
        raise NotImplementedError("parameter not in Linear, tied or frozen")
    active = str([m for m in model.modules() if m.training])
    if "Dropout" in active or "BatchNorm" in active:
        raise NotImplementedError("training mode: call model.eval()")
    A, z = {}, {}

    def hook(layer, arguments, output):
        if layer not in names:
            return output
        if layer in z or len(output) != len(y):
            raise NotImplementedError(f"{layer} reused, or axis 0 no datum")
        x = arguments[0].detach().flatten(0, -2)  # positions are like data
        if layer.bias is not None:
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        A[layer], z[layer] = x.T @ x, output
        return output.clone()  # what works in place then spares z

    with nn.modules.module.register_module_forward_hook(hook):
        f = model(X)
    delta, R = backpropagated(loss_func, f.detach(), y, flavour, samples)
    g = torch.autograd.grad(f, [*z.values()], delta, is_grads_batched=True)
    g = [rows.flatten(0, -2) for rows in g]
    B = [rows.T @ rows / (len(rows) / len(delta)) for rows in g]
    return {names[m]: (R * A[m], B_m) for m, B_m in zip(z, B, strict=True)}
