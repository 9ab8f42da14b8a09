"""The floor: nothing but the arithmetic, written by hand for the networks of the benchmark.

No hooks, no autograd, no checks. Forward pass, the vectors in closed form at the last hidden layer,
backward products, one Gram matrix for each factor; the ones of the bias are sums. Cross-entropy has
K−1 vectors. The last layer's B is in closed form, and where the classes outnumber a datum's last
hidden features, its vectors are replaced by as many as there are features.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.problems import Made
from benchmarks.rows import Factors, Prepared, Work

MOST_ENTRIES = 2**24  # of what is formed at once, where data come in chunks


@dataclass(frozen=True)
class Forward:
    """What a forward pass leaves.

    Args:
        f: The prediction, shape (N, K).
        inputs: Each layer's input features, (N, D_in) or with shared positions (N, D_in, S).
        backward: From vectors (V, N, D) at the last layer's input to the hidden layers' outputs,
            each (V, N, D_out) or (V, N, D_out, S), in the model's order.
    """

    f: Tensor
    inputs: list[Tensor]
    backward: Callable[[Tensor], list[Tensor]]


def mlp(made: Made) -> Forward:
    layers = [module for module in made.model if isinstance(module, nn.Linear)]
    inputs = [made.X]
    for layer in layers[:-1]:
        inputs.append(F.linear(inputs[-1], layer.weight, layer.bias).relu_())

    def backward(g: Tensor) -> list[Tensor]:
        found = [_relu_backward(g, inputs[-1])]
        for layer, x in zip(layers[-2:0:-1], inputs[-2:0:-1], strict=True):
            found.append(_relu_backward(found[-1] @ layer.weight, x))
        return found[::-1]

    return Forward(F.linear(inputs[-1], layers[-1].weight, layers[-1].bias), inputs, backward)


def cnn(made: Made) -> Forward:
    conv1, conv2, last = (made.model[i] for i in (0, 3, 7))
    N = len(made.X)
    x2, where1, patches1 = _convolution(conv1, made.X)
    x3, where2, patches2 = _convolution(conv2, x2)
    f = F.linear(x3.flatten(1), last.weight, last.bias)

    def backward(g: Tensor) -> list[Tensor]:
        g2 = _pool_backward(g.unflatten(2, x3.shape[1:]), x3, where2)
        images = g2.unflatten(3, x2.shape[2:]).flatten(0, 1)
        g1 = F.conv_transpose2d(images, conv2.weight, padding=1).unflatten(0, (-1, N))
        return [_pool_backward(g1, x2, where1), g2]

    return Forward(f, [patches1, patches2, x3.flatten(1)], backward)


def tokens(made: Made) -> Forward:
    first, second, last = (made.model[i] for i in (0, 2, 5))
    x2 = F.linear(made.X, first.weight, first.bias).relu_()
    x3 = F.linear(x2, second.weight, second.bias).relu_()
    pooled = x3.mean(1)
    S = made.X.shape[1]

    def backward(g: Tensor) -> list[Tensor]:
        g2 = _relu_backward((g / S).unsqueeze(2).expand(-1, -1, S, -1), x3)
        g1 = _relu_backward(g2 @ second.weight, x2)
        return [g1.mT, g2.mT]

    f = F.linear(pooled, last.weight, last.bias)
    return Forward(f, [made.X.mT, x2.mT, pooled], backward)


NETS = {"mlp": mlp, "cnn": cnn, "tokens": tokens}


def _convolution(layer: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Convolution, ReLU and pooling: what comes out, where it was largest, and the patches."""
    pooled, where = F.max_pool2d(
        F.conv2d(x, layer.weight, layer.bias, padding=1).relu_(), 2, return_indices=True
    )
    return pooled, where, F.unfold(x, 3, padding=1)


def _relu_backward(g: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(g, x, 0)


def _pool_backward(g: Tensor, x: Tensor, where: Tensor) -> Tensor:
    """Through pooling and ReLU, to (V, N, D_out, S): to the largest, if that was positive."""
    V, (N, D, *sizes) = len(g), x.shape
    wide = g.new_zeros(V, N, D, 4 * sizes[0] * sizes[1])
    where = where.flatten(2).expand(V, -1, -1, -1)
    return wide.scatter_(3, where, _relu_backward(g, x).flatten(3))


@dataclass(frozen=True)
class Vectors:
    """The vectors of a flavour, as the last layer and the layers below it need them.

    Args:
        gram: Σ_n Σ_v g gᵀ at the last layer's output, shape (K, K).
        squares: Of an orthogonal Q of shape (K, K), the sums Σ_v (g Q)² for each datum, (N, K).
        below: The vectors at the last layer's input, shape (V, N, D).
    """

    gram: Callable[[], Tensor]
    squares: Callable[[Tensor], Tensor]
    below: Callable[[], Tensor]


def vectors(made: Made, f: Tensor, flavour: str) -> Vectors:
    weight = made.model[-1].weight
    if flavour == "type-II" and made.problem.regression:
        N, K = f.shape
        return Vectors(
            lambda: N * torch.eye(K, dtype=f.dtype),
            lambda Q: torch.ones_like(f),
            lambda: weight.unsqueeze(1).expand(-1, N, -1),
        )
    if flavour == "type-II":
        p = f.softmax(1)
        few = p.shape[1] - 1 <= weight.shape[1]
        return Vectors(
            lambda: torch.diag(p.sum(0)).addmm_(p.T, p, alpha=-1),
            lambda Q: p @ Q.square() - (p @ Q).square(),
            lambda: _columns(p, weight) if few else _compressed(p, weight),
        )
    if made.problem.regression:
        g = f - made.y if flavour == "empirical" else -torch.randn_like(f)
    else:
        p = f.softmax(1)
        label = made.y if flavour == "empirical" else p.multinomial(1)[:, 0]
        g = p.scatter_add_(1, label[:, None], -torch.ones_like(p[:, :1]))
    return Vectors(lambda: g.T @ g, lambda Q: (g @ Q).square_(), lambda: (g @ weight).unsqueeze(0))


def _columns(p: Tensor, weight: Tensor) -> Tensor:
    """√p_k (w_k − (Wᵀp + √p_K w_K) / (1 + √p_K)) for k < K, shape (K−1, N, D)."""
    root = p.sqrt()
    shift = (p @ weight).addcmul_(root[:, -1:], weight[-1]) / (1 + root[:, -1:])
    return (weight[:-1].unsqueeze(1) - shift).mul_(root.T[:-1].unsqueeze(2))


def _compressed(p: Tensor, weight: Tensor) -> Tensor:
    """D vectors whose Gram matrix is Wᵀ (diag p − p pᵀ) W, for each datum: (D, N, D)."""
    (N, K), D = p.shape, weight.shape[1]
    gram = p.new_empty(N, D, D)
    for some in torch.arange(N).split(max(1, MOST_ENTRIES // (K * D))):
        of = p[some]
        centred = (weight - (of @ weight).unsqueeze(1)).mul_(of.sqrt().unsqueeze(2))
        gram[some] = centred.mT @ centred
    # No smaller than rounding, so that the root exists.
    tiny = torch.finfo(p.dtype).eps * gram.diagonal(dim1=1, dim2=2).sum(1)
    gram.diagonal(dim1=1, dim2=2).add_(tiny.unsqueeze(1))
    return torch.linalg.cholesky(gram).permute(2, 0, 1).contiguous()


def reference(made: Made, work: Work) -> Prepared | None:
    if work.layers != "all":
        return None
    if work.kind == "KFAC":
        return Prepared(lambda: factors(made, work)[0], list)
    if work.kind == "EKFAC":
        return Prepared(lambda: ekfac(made, work), lambda found: [values for *_, values in found])
    if work.kind in ("inverse", "precondition"):
        return _inverse(made, work)
    return None


@torch.no_grad()
def factors(made: Made, work: Work) -> tuple[Factors, Forward, list[Tensor], Vectors | None]:
    """A and B of every layer, and what they were made from.

    Vectors and data are merged: the hidden layers' gradients are (V·N, D_out[, S]).
    """
    forward = NETS[made.problem.net](made)
    N, reduce = len(made.X), work.sharing == "reduce"
    A = [_input_factor(x, _reduction_factor(made), reduce) for x in forward.inputs]
    if work.flavour == "input-only":
        B = [torch.eye(len(m.weight), dtype=made.X.dtype) for m in made.layers().values()]
        return list(zip(A, B, strict=True)), forward, [], None
    of_flavour = vectors(made, forward.f, work.flavour)
    gradients = [g.flatten(0, 1) for g in forward.backward(of_flavour.below())]
    B = [_output_factor(g, N, reduce) for g in gradients]
    B.append(of_flavour.gram().div_(N))
    return list(zip(A, B, strict=True)), forward, gradients, of_flavour


def _reduction_factor(made: Made) -> float:
    """R of the mean loss."""
    return (2 / made.problem.outputs if made.problem.regression else 1) / len(made.X)


def _gram(rows: Tensor) -> Tensor:
    """Σ rowsᵀ rows of (n, D), or over positions too of (n, D, S)."""
    if rows.ndim == 3 and not rows.mT.is_contiguous():
        return (rows @ rows.mT).sum(0)
    rows = rows.mT.flatten(0, 1) if rows.ndim == 3 else rows
    return rows.T @ rows


def _input_factor(x: Tensor, R: float, reduce: bool) -> Tensor:
    """A of [W b]; the appended one, summed over positions, is S."""
    one = 1
    if reduce and x.ndim == 3:
        one, x = x.shape[2], x.sum(2)
    D = x.shape[1]
    A = x.new_empty(D + 1, D + 1)
    A[:D, :D] = _gram(x)
    A[:D, D] = A[D, :D] = one * x.transpose(0, 1).flatten(1).sum(1)
    A[D, D] = one**2 * x.numel() / D
    return A.mul_(R)


def _output_factor(g: Tensor, N: int, reduce: bool) -> Tensor:
    S = g.shape[2] if g.ndim == 3 else 1
    if reduce and g.ndim == 3:
        g, S = g.sum(2), S**2
    return _gram(g).div_(N * S)


@torch.no_grad()
def ekfac(made: Made, work: Work) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Q_A, Q_B and the eigenvalues R Σ_{n,v} [Q_Bᵀ P Q_A]² of every layer."""
    pairs, forward, gradients, of_flavour = factors(made, work)
    assert of_flavour is not None
    found = []
    for (A, B), x, g in zip(pairs, forward.inputs, [*gradients, None], strict=True):
        Q_A, Q_B = torch.linalg.eigh(A)[1], torch.linalg.eigh(B)[1]
        if x.ndim == 3:
            eigenvalues = _corrected(Q_A, Q_B, x, g)
        else:
            outputs = of_flavour.squares(Q_B) if g is None else _summed_squares(g @ Q_B, len(x))
            eigenvalues = outputs.T @ torch.addmm(Q_A[-1], x, Q_A[:-1]).square_()
        found.append((Q_A, Q_B, eigenvalues.mul_(_reduction_factor(made))))
    return found


def _summed_squares(rows: Tensor, N: int) -> Tensor:
    """Σ_v of the squares, for each datum."""
    return rows.square_().unflatten(0, (-1, N)).sum(0)


def _corrected(Q_A: Tensor, Q_B: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """Σ_{n,v} [Q_Bᵀ (Σ_s g x̃ᵀ) Q_A]², vector by vector; Q_B acts where it meets fewer columns."""
    x = x.mT @ Q_A[:-1] + Q_A[-1]
    late = x.shape[2] < x.shape[1]
    eigenvalues = torch.zeros(len(Q_B), len(Q_A), dtype=g.dtype)
    for of_vector in g.split(len(x)):
        early = of_vector if late else (of_vector.mT @ Q_B).mT
        P = early @ x
        eigenvalues += (Q_B.T @ P if late else P).square_().sum(0)
    return eigenvalues


def _inverse(made: Made, work: Work) -> Prepared:
    pairs = factors(made, Work())[0]
    gradient = list(made.gradient())
    invert, apply = {
        "Exact": (_exact_inverse, _apply_exact),
        "Factored": (_factored_inverse, _apply_factored),
    }[work.damping]

    def run() -> list[tuple[Tensor, ...]]:
        return [invert(A, B, made.problem.delta) for A, B in pairs]

    def precondition(inverses: list[tuple[Tensor, ...]]) -> list[Tensor]:
        steps = []
        for W, b, inverse in zip(gradient[::2], gradient[1::2], inverses, strict=True):
            step = apply(torch.cat([W.flatten(1), b.unsqueeze(1)], dim=1), *inverse)
            steps += [step[:, :-1].reshape(W.shape), step[:, -1]]
        return steps

    if work.kind == "inverse":
        return Prepared(run, precondition)
    inverses = run()
    return Prepared(lambda: precondition(inverses), list)


def _exact_inverse(A: Tensor, B: Tensor, delta: float) -> tuple[Tensor, ...]:
    (a, Q_A), (b, Q_B) = torch.linalg.eigh(A), torch.linalg.eigh(B)
    return Q_A, Q_B, torch.outer(b, a).clamp_(min=0).add_(delta).reciprocal_()


def _apply_exact(U: Tensor, Q_A: Tensor, Q_B: Tensor, inverted: Tensor) -> Tensor:
    return Q_B @ (Q_B.T @ U @ Q_A).mul_(inverted) @ Q_A.T


def _factored_inverse(A: Tensor, B: Tensor, delta: float) -> tuple[Tensor, ...]:
    pi = float((A.trace() / len(A) / (B.trace() / len(B))).sqrt())
    shifts = (pi * delta**0.5, delta**0.5 / pi)
    inverses = []
    for factor, shift in zip((A, B), shifts, strict=True):
        damped = factor.clone()
        damped.diagonal().add_(shift)
        inverses.append(torch.cholesky_inverse(torch.linalg.cholesky(damped)))
    return tuple(inverses)


def _apply_factored(U: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return B @ U @ A
