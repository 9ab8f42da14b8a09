"""The paper's way: one datum and one vector after the other, outer products summed.

Short and easily checked, as in *KFAC From Scratch*; every library is measured against it too.
"""

import torch
from torch import Tensor, nn

from benchmarks.problems import Made
from benchmarks.rows import Factors, Prepared, Work


def loop(made: Made, work: Work) -> Prepared | None:
    if work.kind != "KFAC" or work.layers != "all":
        return None
    return Prepared(lambda: factors(made, work), list)


def factors(made: Made, work: Work) -> Factors:
    """A and B of every layer, by one backward pass for each datum and vector."""
    layers = list(made.layers().values())
    inputs, outputs = {}, {}

    def keep(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        inputs[layer], outputs[layer] = args[0].detach(), output

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    N, mean = len(made.X), made.problem.outputs / 2 if made.problem.regression else 1
    A = dict.fromkeys(layers, 0)
    B = dict.fromkeys(layers, 0)
    for x, y in zip(made.X.split(1), made.y.split(1), strict=True):
        f = made.model(x)
        for layer in layers:
            rows = shared(input_rows(layer, inputs[layer]), work)
            A[layer] = A[layer] + rows.T @ rows / (N * mean)
        for v in vectors(f.detach(), y, work):
            found = torch.autograd.grad(f, [outputs[m] for m in layers], v, retain_graph=True)
            for layer, g in zip(layers, found, strict=True):
                rows = shared(output_rows(layer, g), work)
                B[layer] = B[layer] + rows.T @ rows / (N * positions(layer, g, work))
    for hook in hooks:
        hook.remove()
    if work.flavour == "input-only":
        B = {layer: torch.eye(len(layer.weight)).to(made.X) for layer in layers}
    return [(A[layer], B[layer]) for layer in layers]


def vectors(f: Tensor, y: Tensor, work: Work) -> list[Tensor]:
    """The vectors to backpropagate from the prediction f of one datum, each of f's shape."""
    if work.flavour == "input-only":
        return []
    if y.is_floating_point():
        of_flavour = {
            "type-II": torch.eye(f.shape[1]).to(f),
            "Monte Carlo": -torch.randn_like(f),
            "empirical": f - y,
        }
        return list(of_flavour[work.flavour].split(1))
    p = f.softmax(1)
    if work.flavour == "type-II":
        root = p.sqrt().diag_embed()[0] - p.T @ p.sqrt()
        return list(root.T.split(1))
    label = p.multinomial(1)[0] if work.flavour == "Monte Carlo" else y
    return [p - nn.functional.one_hot(label, f.shape[1])]


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """Rows x̃ of one datum, shape (S, D_in + 1)."""
    if isinstance(layer, nn.Conv2d):
        x = nn.functional.unfold(x, layer.kernel_size, padding=layer.padding).mT
    x = x.reshape(-1, x.shape[-1])
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)


def output_rows(layer: nn.Module, g: Tensor) -> Tensor:
    """Rows g of one datum, shape (S, D_out)."""
    return g.flatten(2)[0].T if isinstance(layer, nn.Conv2d) else g.reshape(-1, g.shape[-1])


def shared(rows: Tensor, work: Work) -> Tensor:
    return rows.sum(0, keepdim=True) if work.sharing == "reduce" else rows


def positions(layer: nn.Module, g: Tensor, work: Work) -> int:
    """What B is divided by, next to N: S for expand, S² for reduce."""
    S = len(output_rows(layer, g))
    return S**2 if work.sharing == "reduce" else S
