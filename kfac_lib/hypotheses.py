"""What is usually wrong with a KFAC, as predictions: the numbers that each mistake would give.

Every hypothesis rebuilds KFAC from one layer's rows with one mistake in it. Numbers that agree with
a prediction up to a *named* constant, such as N or 1/S, explain a failure. Explained in the section
:ref:`test-kit`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import product
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from kfac_lib.accumulate import Reduce
from kfac_lib.capture import capture
from kfac_lib.exact_cases import ExactCase
from kfac_lib.fisher import Empirical, InputOnly, MonteCarlo, RandomSigns, TypeII
from kfac_lib.flattening import Order
from kfac_lib.layers import input_rows, output_rows
from kfac_lib.losses import criterion_of

Part = Literal["joint", "weight", "bias"]
"""What a block belongs to: [W b], W alone, or b alone."""


class Scale(NamedTuple):
    """A constant with a name, a product of powers of sizes such as N · S⁻¹ (:ref:`test-kit`).

    Example:
        >>> Scale((("N", 1), ("S", -1))).name
        'N/S'
    """

    powers: tuple[tuple[str, int], ...]

    @property
    def complexity(self) -> int:
        """How much it takes to say; 0 for the constant 1."""
        return sum(abs(power) for _, power in self.powers)

    @property
    def name(self) -> str:
        """The constant in words, such as ``"1/N²"``."""
        above, below = (
            "·".join(
                letter + ("²" if abs(power) == 2 else "")
                for letter, power in reversed(self.powers)
                if sign * power > 0
            )
            for sign in (1, -1)
        )
        divisor = f"({below})" if "·" in below else below
        return f"{above or 1}/{divisor}" if below else above or "1"

    @property
    def legend(self) -> str:
        """What its letters stand for, such as ``" (N: data)"``; empty for numbers."""
        meanings = [f"{a}: {meaning}" for a, meaning in LETTERS.items() if a in self.name]
        return f" ({', '.join(meanings)})" if meanings else ""


LETTERS = {
    "N": "data",
    "S": "positions that share the weight",
    "C": "entries of one prediction",
    "K": "entries along axis 1 of the prediction",
    "T": "positions of the prediction",
    "M": "samples",
    "R": "reduction factor",
}
"""What the letters of a constant stand for."""


def _scales() -> Iterator[Scale]:
    letters = "M", "T", "K", "C", "S", "N", "2"
    for powers in product(*[(0, 1, -1, 2, -2)] * len(letters)):
        named = tuple((a, p) for a, p in zip(letters, powers, strict=True) if p)
        if Scale(named).complexity <= 3 and len(named) <= 2:
            yield Scale(named)
    for special in (
        "R of the mean / R",
        "R of the sum / R",
        "R",
        "R²",
        "1/R",
        "1/(N·R)",
        "1/(N·C·R)",
    ):
        yield Scale(((special, 1),))


SCALES = tuple(_scales())
"""All constants that are tried.

:meta hide-value:
"""


@dataclass(frozen=True)
class Block:
    """One block of one case: what a KFAC returns under one key (:ref:`test-kit`).

    Args:
        case: The case.
        layer: Name of the layer.
        part: Whether weight and bias are joint, or which of the two it is.
        order: Flattening of dense blocks.
    """

    case: ExactCase
    layer: str
    part: Part
    order: Order

    @property
    def key(self) -> str:
        """The name under which the block is returned."""
        return self.layer if self.part == "joint" else f"{self.layer}.{self.part}".lstrip(".")

    @property
    def has_bias(self) -> bool:
        """Whether the layer adds a bias."""
        return self.case.model.get_submodule(self.layer).bias is not None

    @cached_property
    def sizes(self) -> dict[str, float]:
        """What the letters of a scale stand for here."""
        y = self.case.data[1]
        criterion, f = criterion_of(self.case.loss_func), _prediction(self.case)
        counted = int(criterion.counted(f, y).sum())
        x, _ = self.rows("right")
        denominator = criterion.denominator(f, y)
        mean_R, sum_R = (
            replace(criterion, reduction=reduction).reduction_factor(denominator)
            for reduction in ("mean", "sum")
        )
        R = criterion.reduction_factor(denominator)
        random = (
            self.case.fisher if isinstance(self.case.fisher, MonteCarlo | RandomSigns) else None
        )
        return {
            "2": 2,
            "N": counted,
            "S": x.shape[1],
            "C": f[0].numel(),
            "K": f.shape[1],
            "T": f[0].numel() // f.shape[1],
            "M": random.samples if random else 1,
            "R of the mean / R": mean_R / R,
            "R of the sum / R": sum_R / R,
            "R": R,
            "R²": R**2,
            "1/R": 1 / R,
            "1/(N·R)": 1 / (len(y) * R),
            "1/(N·C·R)": 1 / (f.numel() * R),
        }

    @cached_property
    def scales(self) -> Tensor:
        """The value of every constant of :data:`SCALES`, shape (2, constants).

        N is the number of data that count in the first row, of all data in the second.
        """
        return torch.tensor(
            [
                [prod(sizes[letter] ** power for letter, power in scale.powers) for scale in SCALES]
                for sizes in (self.sizes, self.sizes | {"N": len(self.case.data[0])})
            ],
            dtype=torch.float64,
        )

    def rows(self, vectors: str, calls: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Rows x̃ of shape (N, S, D_in [+1]) and g of shape (V, N, S, D_out), in float64."""
        of_calls = _rows(self.case, vectors)[self.layer][calls]
        x, g = (torch.cat(tensors, dim=-2) for tensors in zip(*of_calls, strict=True))
        ones = x.new_ones(*x.shape[:2], 1)
        if self.part == "bias":
            return ones, g
        return (torch.cat([x, ones], -1) if self.part == "joint" and self.has_bias else x), g

    def dense(self, A: Tensor, B: Tensor) -> Tensor:
        """The block of a pair of factors, in the order of this block."""
        return torch.kron(A, B) if self.order == "cvec" else torch.kron(B, A)

    def factors(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """KFAC's definition, A and B, on rows that may be wrong."""
        return self.input_factor(x), self.output_factor(g)

    def input_factor(self, x: Tensor) -> Tensor:
        """R Σ x̃ x̃ᵀ, of rows or of rows summed over positions."""
        if isinstance(self.case.sharing, Reduce):
            x = x.sum(1, keepdim=True)
        rows = x.flatten(0, 1)
        return self.sizes["R"] * rows.T @ rows

    def output_factor(self, g: Tensor) -> Tensor:
        """1/(N S) Σ g gᵀ, or 1/(N S²) with g summed over positions."""
        N, S = self.sizes["N"], g.shape[2]
        if isinstance(self.case.fisher, InputOnly):
            return torch.eye(g.shape[-1], dtype=g.dtype)
        if isinstance(self.case.sharing, Reduce):
            g, S = g.sum(2, keepdim=True), S**2
        rows = g.flatten(0, 2)
        return rows.T @ rows / (N * S)

    @cached_property
    def definition(self) -> Tensor:
        """KFAC as it is defined, dense."""
        return self.dense(*self.factors(*self.rows("right")))


class Prediction(NamedTuple):
    """The numbers that a mistake would give for a block (:ref:`test-kit`)."""

    hypothesis: str
    variant: str
    dense: Tensor


HYPOTHESES = {
    "scale": "the numbers are that constant times the right ones; look where R, 1/N, 1/S and "
    "1/√M enter",
    "factors swapped": "A and B have changed places, or the weight is flattened in the other order "
    "(the same numbers)",
    "transposed": "a factor is X Xᵀ in place of Xᵀ X: a loop over the wrong axis",
    "bias missing": "the input has no 1 appended, so the bias has no row in A",
    "bias separate": "the coupling of weight and bias is dropped",
    "bias interleaved": "the entries of the bias stand in other places of the vector",
    "type-II against empirical": "the vectors of another flavour are backpropagated",
    "square of the mean against mean of squares": "vectors are averaged or summed before the outer "
    "product",
    "labels instead of samples": "the true labels stand where labels should be sampled",
    "shared axis averaged": "the positions that share the weight are averaged or summed where they "
    "should not be, or not where they should",
    "batch axis softmax": "the softmax runs over the batch and not over the classes",
    "last call only of a reused layer": "what the earlier calls of the layer read is overwritten",
    "vectors at all positions at once": "one vector fills all positions of the prediction, where "
    "each needs its own",
    "float32 inside": "something is computed in float32",
}
"""Every hypothesis with what it means.

:meta hide-value:
"""


@lru_cache(maxsize=1024)
def predictions(block: Block) -> tuple[Prediction, ...]:
    """What each hypothesis predicts for a block, up to a constant (:ref:`test-kit`).

    Args:
        block: The block.

    Returns:
        The predictions, all variants of all hypotheses, in an order that is the same for every
        block up to those that do not apply.

    Example:
        >>> from kfac_lib.exact_cases import exact_cases
        >>> block = Block(exact_cases()[0], layer="0", part="joint", order="cvec")
        >>> predictions(block)[0].hypothesis
        'factors swapped'
    """
    return tuple(Prediction(*found) for found in _predict(block))


def _predict(block: Block) -> Iterator[tuple[str, str, Tensor]]:
    x, g = block.rows("right")
    A, B = block.factors(x, g)
    yield "factors swapped", "", block.dense(B, A)
    yield from _transposed(block, x, g)
    yield from _biases(block, A, B)
    yield from _squares_of_means(block, x, g)
    yield from _shared_axes(block, x, g)
    yield from _other_vectors(block, x)
    if len(_rows(block.case, "right")[block.layer]) > 1:
        yield (
            "last call only of a reused layer",
            "",
            block.dense(*block.factors(*block.rows("right", slice(-1, None)))),
        )


def _transposed(block: Block, x: Tensor, g: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    A, B = block.factors(x, g)
    R, N, S = block.sizes["R"], block.sizes["N"], x.shape[1]
    data = x.flatten(0, 1)
    over_data = R * data @ data.T
    yield "transposed", "in A", block.dense(over_data, B)
    if len(g):
        vectors = g.flatten(0, 2)
        if len(vectors) <= 60:
            yield "transposed", "in B", block.dense(A, vectors @ vectors.T / (N * S))
        by_datum = g.flatten(2).mean(0)
        yield "transposed", "in A and B", block.dense(over_data, by_datum @ by_datum.T / (N * S))


def _biases(block: Block, A: Tensor, B: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    if block.part != "joint" or not block.has_bias:
        return
    name = "bias missing"
    yield name, "", block.dense(A[:-1, :-1], B)
    uncoupled = A.clone()
    uncoupled[-1, :-1] = uncoupled[:-1, -1] = 0
    yield "bias separate", "", block.dense(uncoupled, B)
    for variant, corner in (("zero in its place", 0.0), ("one in its place", 1.0)):
        without = uncoupled.clone()
        without[-1, -1] = corner
        yield name, variant, block.dense(without, B)
    joint = block.dense(A, B)
    D_out, D_in = len(B), len(A)
    places = torch.arange(D_out * D_in)
    at = places.reshape(D_out, D_in) if block.order == "rvec" else places.reshape(D_in, D_out).T
    W, b = at[:, :-1], at[:, -1:]
    for variant, layout in {
        "W row by row, then b": torch.cat([W.flatten(), b.flatten()]),
        "b, then W row by row": torch.cat([b.flatten(), W.flatten()]),
        "b, then W column by column": torch.cat([b.flatten(), W.T.flatten()]),
        "b first in each row": torch.cat([b, W], 1).flatten(),
    }.items():
        if not torch.equal(layout, places):
            yield "bias interleaved", variant, joint[layout][:, layout]


def _squares_of_means(block: Block, x: Tensor, g: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    name = "square of the mean against mean of squares"
    A, B = block.factors(x, g)
    x_mean = x.mean(0, keepdim=True)
    inputs = {"": A, "A over data": block.input_factor(x_mean)}
    outputs = {"": B}
    axes = {"B over data": (1,), "B over vectors": (0,), "B over data and vectors": (0, 1)}
    for at_B, axis in axes.items() if len(g) else ():
        # Independent draws of mean zero: no mixed terms are left in expectation.
        drawn = prod((block.sizes["M"], g.shape[1])[a] ** 2 for a in axis)
        random = block.case.is_random
        outputs[at_B] = B / drawn if random else block.output_factor(g.mean(axis, keepdim=True))
    for (at_A, wrong_A), (at_B, wrong_B) in product(inputs.items(), outputs.items()):
        if at_A or at_B:
            variant = ", ".join(filter(None, (at_A, at_B)))
            yield name, variant, block.dense(wrong_A, wrong_B)


def _shared_axes(block: Block, x: Tensor, g: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    if x.shape[1] == 1:
        return

    def gram(rows: Tensor, summed: bool) -> Tensor:
        rows = rows.sum(-2) if summed else rows
        flat = rows.flatten(0, -2)
        return flat.T @ flat

    S = x.shape[1]
    right = isinstance(block.case.sharing, Reduce)
    R, N = block.sizes["R"], block.sizes["N"]
    for in_A, in_B in product((False, True), repeat=2):
        if (in_A, in_B) != (right, right):
            variant = f"A {'summed' if in_A else 'as rows'}, B {'summed' if in_B else 'as rows'}"
            A = R * gram(x, in_A)
            B = gram(g, in_B) / (N * S) if len(g) else torch.eye(g.shape[-1])
            yield "shared axis averaged", variant, block.dense(A, B.to(A.dtype))
            if in_A == in_B:
                exchanged = "expand and reduce exchanged"
                B = B / S if in_B else B
                yield "shared axis averaged", exchanged, block.dense(A, B.to(A.dtype))


def _other_vectors(block: Block, x: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    A = block.input_factor(x)
    fisher = block.case.fisher
    names = {
        "empirical": "type-II against empirical",
        "true labels": "labels instead of samples",
        "type-II": "type-II against empirical",
        "everywhere": "vectors at all positions at once",
        "everywhere, classes last": "vectors at all positions at once",
        "softmax of the root": "batch axis softmax",
        "softmax of the Hessian": "batch axis softmax",
        "softmax of the labels": "batch axis softmax",
        "softmax of the gradient": "batch axis softmax",
        "softmax of both": "batch axis softmax",
    }
    for vectors, name in names.items():
        if isinstance(fisher, InputOnly):
            return
        same = {"empirical": isinstance(fisher, Empirical)}
        same["type-II"] = not same["empirical"]
        if same.get(vectors, False) or _vectors(block.case, vectors) is None:
            continue
        if vectors == "empirical" and isinstance(fisher, MonteCarlo):
            name = "labels instead of samples"
        _, g = block.rows(vectors)
        yield name, vectors, block.dense(A, block.output_factor(g))


@lru_cache(maxsize=512)
def _prediction(case: ExactCase) -> Tensor:
    with torch.no_grad():
        f: Tensor = case.model(case.data[0])
    return f


@lru_cache(maxsize=1024)
def _vectors(case: ExactCase, name: str) -> Tensor | None:
    """Vectors Δ of shape (V, N, K, ...), right ones or wrong ones; None where it makes no sense."""
    f, y = _prediction(case), case.data[1]
    criterion = criterion_of(case.loss_func)
    if name == "right":
        fisher = TypeII() if case.is_random else case.fisher
        return fisher.vectors(criterion, f, y)
    if name == "type-II":
        return TypeII().vectors(criterion, f, y)
    if name == "empirical":
        return Empirical().vectors(criterion, f, y)
    if name == "true labels":
        if not isinstance(case.fisher, MonteCarlo):
            return None
        root = criterion.kappa(f, y).sqrt()
        return -root * criterion.log_likelihood_gradient(f, y.unsqueeze(0))
    if name in ("everywhere", "everywhere, classes last"):
        classes_last = name != "everywhere"
        is_class_first = isinstance(case.loss_func, nn.CrossEntropyLoss)
        if f.ndim < 3 or isinstance(case.fisher, Empirical) or (classes_last and is_class_first):
            return None
        at_each = TypeII().vectors(criterion, f, y).reshape(*f.shape[1:], *f.shape)
        return at_each.sum(0) if classes_last else at_each.flatten(1, -f.ndim - 1).sum(1)
    if not isinstance(case.loss_func, nn.CrossEntropyLoss) or isinstance(case.fisher, Empirical):
        return None
    return criterion.kappa(f, y).sqrt() * _softmax_over_data(f, name)


def _softmax_over_data(f: Tensor, name: str) -> Tensor:
    logits = f.flatten(2) if f.ndim > 2 else f.unsqueeze(-1)
    K, T = logits.shape[1:]
    p, wrong = logits.softmax(1), logits.softmax(0)
    eye = torch.eye(K, dtype=f.dtype)
    labels = wrong / wrong.sum(1, keepdim=True)
    if name == "softmax of the Hessian":
        q = wrong.movedim(1, -1)
        eigenvalues, Q = torch.linalg.eigh(torch.diag_embed(q) - q.unsqueeze(-1) * q.unsqueeze(-2))
        roots = Q * eigenvalues.clamp(min=0).sqrt().unsqueeze(-2)
        columns = roots.permute(3, 0, 2, 1)  # (K, N, K, T)
        shift = f.new_zeros(1, *f.shape)
    else:
        # Labels drawn from q, the gradient mean − e_y: a spread about its mean at each position,
        # and the mean, which fills all positions of a draw.
        q, mean = {
            "softmax of the root": (wrong, wrong),
            "softmax of the labels": (labels, p),
            "softmax of the gradient": (p, wrong),
            "softmax of both": (labels, wrong),
        }[name]
        columns = q.sqrt().movedim(1, 0).unsqueeze(2) * (eye.reshape(K, 1, K, 1) - q.unsqueeze(0))
        shift = (mean - q).reshape(1, *f.shape)
    at_each = torch.stack([columns * (torch.arange(T) == t) for t in range(T)])
    return torch.cat([at_each.flatten(0, 1).reshape(-1, *f.shape), shift])


@lru_cache(maxsize=2048)
def _rows(case: ExactCase, vectors: str) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """For every layer and every call of it, x of shape (N, S, D_in) and g of (V, N, S, D_out)."""
    delta = _vectors(case, vectors)
    assert delta is not None
    layers = {n: m for n, m in case.model.named_modules() if isinstance(m, nn.Linear)}
    X, y = case.data
    with torch.enable_grad(), capture(layers) as calls:
        f = case.model(X)
    keep = criterion_of(case.loss_func).counted(f, y)
    result: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, of_layer in calls.items():
        for call in of_layer:
            x = input_rows(call.layer, call.x)
            g = [torch.autograd.grad(f, call.edge, v, retain_graph=True)[0] for v in delta]
            of_vectors = torch.stack(g) if g else f.new_empty(0, *call.shape)
            rows = output_rows(call.layer, of_vectors)
            result.setdefault(name, []).append((x[keep], rows[:, keep]))
    return result
