"""Ground truth for every layer, written without kfac_lib: patches by loops, factors by the table.

A layer's rows are x (N, S, D_in [+1]) and g (V, N, S, D_out), one such pair for each group of a
grouped convolution. The calls of a layer that runs several times are joined along S.
"""

from itertools import product

import torch
from torch import nn
from truth import reduction_factor, stack_entries

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


def layers_of(model):
    """The layers by name; of several with one weight the first."""
    result = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LAYERS) and all(layer.weight is not o.weight for o in result.values()):
            result[name] = layer
    return result


def matrix(layer, weight):
    """A stack of weights as (..., D_out, D_in)."""
    if isinstance(layer, nn.Embedding):
        return weight.transpose(-1, -2)
    return weight.flatten(1 - layer.weight.ndim)


def parameters(layer):
    bias = getattr(layer, "bias", None)
    return [layer.weight] + ([] if bias is None else [bias])


def flatten(matrices, order):
    """(..., D_out, D) to (..., D_out D), entry by entry."""
    D_out, D = matrices.shape[-2:]
    index = stack_entries(torch.arange(D_out * D).reshape(D_out, D), order)
    return matrices.flatten(-2)[..., index]


def jacobians(model, X):
    """For each layer d f / d [W b] of shape (entries of f, D_out, D_in [+1])."""
    layers = layers_of(model)
    wanted = [p for layer in layers.values() for p in parameters(layer)]
    entries = model(X).flatten()
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    J = [torch.autograd.grad(entry, wanted, **options) for entry in entries]
    J = iter([torch.stack(of_one) for of_one in zip(*J, strict=True)])
    result = {}
    for name, layer in layers.items():
        result[name] = matrix(layer, next(J))
        for bias in parameters(layer)[1:]:
            result[name] = torch.cat([result[name], next(J).reshape(len(entries), len(bias), 1)], 2)
    return result


def keys(name, layer, bias):
    """The library's keys, each with the columns of [W b] that it covers."""
    prefix = f"{name}." if name else ""
    if bias == "joint":
        return {name: slice(None)}
    if len(parameters(layer)) == 1:
        return {f"{prefix}weight": slice(None)}
    return {f"{prefix}weight": slice(-1), f"{prefix}bias": slice(-1, None)}


def blocks(model, loss, data, order, vectors=None, bias="joint"):
    """Jᵀ H J with the Hessian of torch's loss, or R Σ_{n,v} (J_nᵀ Δ)(J_nᵀ Δ)ᵀ of given vectors."""
    X, y = data
    f = model(X).detach()
    if vectors is None:
        H = torch.func.hessian(lambda f: loss(f, y))(f).reshape(f.numel(), f.numel())
    result = {}
    for name, whole in jacobians(model, X).items():
        for key, columns in keys(name, layers_of(model)[name], bias).items():
            J = flatten(whole[..., columns], order)
            if vectors is None:
                result[key] = J.T @ H @ J
            else:
                per_datum = J.reshape(len(f), -1, J.shape[1])
                P = torch.einsum("vnc,ncd->vnd", vectors.flatten(2), per_datum)
                R = reduction_factor(loss, f, y)
                result[key] = R * torch.einsum("vnd,vne->de", P, P)
    return result


def place(i, size, mode):
    """Where pixel i of a padded axis comes from; None for a zero."""
    if 0 <= i < size:
        return i
    if mode == "zeros":
        return None
    if mode == "circular":
        return i % size
    if mode == "replicate":
        return 0 if i < 0 else size - 1
    return -i if i < 0 else 2 * (size - 1) - i


def padding_of(layer):
    """How many pixels stand before and behind, for each axis."""
    if layer.padding == "valid":
        return [(0, 0)] * len(layer.kernel_size)
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [(t // 2, t - t // 2) for t in total]
    return [(p, p) for p in layer.padding]


def patches(layer, x):
    """Rows (N, S, C_in k₁ k₂ ...), with loops over pixels and over the kernel."""
    reads = []  # for each axis and output pixel the pixels that the kernel reads
    for axis, (before, behind) in enumerate(padding_of(layer)):
        size, k = x.shape[2 + axis], layer.kernel_size[axis]
        stride, dilation = layer.stride[axis], layer.dilation[axis]
        steps = (size + before + behind - dilation * (k - 1) - 1) // stride + 1
        reads.append(
            [
                [
                    place(o * stride + j * dilation - before, size, layer.padding_mode)
                    for j in range(k)
                ]
                for o in range(steps)
            ]
        )
    rows = []
    for pixel in product(*reads):
        row = [
            x[:, :, *where] if None not in where else torch.zeros_like(x[:, :, *[0] * len(where)])
            for where in product(*pixel)
        ]
        rows.append(torch.stack(row, dim=2).flatten(1))
    return torch.stack(rows, dim=1)


def input_rows(layer, x):
    if isinstance(layer, nn.Embedding):
        rows = torch.zeros(len(x), x[0].numel(), layer.num_embeddings)
        for n, datum in enumerate(x):
            for s, token in enumerate(datum.flatten().tolist()):
                rows[n, s, token] = float(token != layer.padding_idx)
        return rows
    if isinstance(layer, nn.Linear):
        return x.reshape(len(x), -1, x.shape[-1])
    return patches(layer, x)


def output_rows(layer, g):
    if isinstance(layer, nn.Linear | nn.Embedding):
        return g.reshape(len(g), -1, g.shape[-1])
    return g.flatten(2).transpose(1, 2)


def record(model, X):
    """The prediction, and for each layer the input and output of each of its calls."""
    layers, calls, handles = layers_of(model), {}, []
    for module in model.modules():
        for name, layer in layers.items():
            if getattr(module, "weight", None) is layer.weight:
                calls[name] = []
                handles.append(
                    module.register_forward_hook(
                        lambda m, args, z, name=name: calls[name].append((m, args[0].detach(), z))
                    )
                )
    f = model(X)
    for handle in handles:
        handle.remove()
    return f, {name: calls[name] for name in layers}


def rows(model, X, vectors):
    """For each layer, for each group: inputs with the 1 of a bias, and pseudo-gradients."""
    f, calls = record(model, X)
    result = {}
    for name, of_layer in calls.items():
        layer, G = of_layer[0][0], getattr(of_layer[0][0], "groups", 1)
        x = torch.cat([input_rows(m, x) for m, x, _ in of_layer], 1)
        outputs = [z for _, _, z in of_layer]
        g = []
        for v in vectors:
            of_calls = torch.autograd.grad(f, outputs, v, retain_graph=True)
            g.append(torch.cat([output_rows(layer, of_one) for of_one in of_calls], 1))
        pairs = list(zip(x.chunk(G, -1), torch.stack(g).chunk(G, -1), strict=True))
        if len(parameters(layer)) == 2:
            pairs = [(torch.cat([x, torch.ones(*x.shape[:2], 1)], 2), g) for x, g in pairs]
        result[name] = pairs
    return result


def factors_of(x, g, R, sharing):
    """A and B of one layer or group: the table of constants."""
    N, S, _ = x.shape
    if sharing == "expand":
        A = sum(torch.outer(x[n, s], x[n, s]) for n in range(N) for s in range(S))
        return R * A, torch.einsum("vnso,vnsp->op", g, g) / (N * S)
    A = sum(torch.outer(x[n].sum(0), x[n].sum(0)) for n in range(N))
    return R * A, torch.einsum("vnso,vntp->op", g, g) / (N * S**2)


def factors(model, loss, data, vectors, sharing, bias="joint"):
    """For each key of the library the pairs (A, B), one for each group.

    sharing: "expand", "reduce" or one of them for each layer's name.
    """
    X, y = data
    R = reduction_factor(loss, model(X).detach(), y)
    result = {}
    for name, groups in rows(model, X, vectors).items():
        own = sharing if isinstance(sharing, str) else sharing[name]
        pairs = [factors_of(x, g, R, own) for x, g in groups]
        for key, columns in keys(name, layers_of(model)[name], bias).items():
            result[key] = [(A[columns, columns], B) for A, B in pairs]
    return result


def in_order(rvec_matrix, D, order):
    """A matrix on rvec of (D_out, D) in the given order."""
    if order == "rvec":
        return rvec_matrix
    index = stack_entries(torch.arange(len(rvec_matrix)).reshape(-1, D), "cvec")
    return rvec_matrix[index][:, index]


def dense(pairs, order):
    """Blockdiag of B_g ⊗ A_g over the groups, in the given order of the whole weight."""
    whole = torch.block_diag(*[torch.kron(B, A) for A, B in pairs])
    return in_order(whole, len(pairs[0][0]), order)
