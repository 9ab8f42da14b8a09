"""What is usually wrong with a KFAC, as predictions: the numbers that each mistake would give.

Every hypothesis rebuilds KFAC from one layer's rows with one mistake in it. Numbers that agree with
a prediction up to a *named* constant, such as N or 1/S, explain a failure. Explained in the section
:ref:`test-kit`.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_lib.accumulate import Reduce
from kfac_lib.blocks import Block
from kfac_lib.fisher import Empirical, InputOnly, MonteCarlo
from kfac_lib.sharing_hypotheses import (
    Found,
    calls_apart,
    mixed_groups,
    other_orders,
    wrong_counts,
    wrong_patches,
)
from kfac_lib.wrong_rows import vectors_of


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
    "first call only of a reused layer": "the later calls of the layer are not seen",
    "calls of a reused layer taken apart": "the calls of the layer are averaged, or one of them "
    "stands for all in A; their rows belong together, as further positions",
    "patches cut wrongly": "padding, its mode, dilation or stride are not those of the convolution",
    "columns of the kernel reordered": "the columns of A are not in the order of weight.flatten(1)",
    "channels and positions confused": "memory that holds channels first is read as if they stood "
    "last",
    "groups not kept apart": "each group of channels needs a pair of factors of its own",
    "tokens miscounted": "A of an Embedding is not R times the counts of its tokens, or "
    "padding_idx counts",
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
        >>> from kfac_lib.blocks import Block
        >>> from kfac_lib.exact_cases import exact_cases
        >>> block = Block(exact_cases()[0], layer="0", part="joint", order="cvec")
        >>> predictions(block)[0].hypothesis
        'factors swapped'
    """
    return tuple(Prediction(*found) for found in _predict(block))


def _predict(block: Block) -> Iterator[tuple[str, str, Tensor]]:
    for of_groups in zip(*map(_predict_group, block.of_groups()), strict=True):
        name, variant, _ = of_groups[0]
        yield name, variant, block.dense(*(pair for _, _, pair in of_groups))
    yield from _other_places(block)
    if block.groups > 1:
        yield from mixed_groups(block)


def _predict_group(block: Block) -> Iterator[Found]:
    x, g = block.rows("right")
    A, B = block.factors(x, g)
    yield "factors swapped", "", (B, A)
    yield from _transposed(block, x, g)
    yield from _biases(block, A, B)
    yield from _squares_of_means(block, x, g)
    yield from _shared_axes(block, x, g)
    yield from _other_vectors(block, x)
    yield from calls_apart(block, A, B)
    yield from wrong_patches(block, B)
    if block.part != "bias":
        yield from other_orders(block, x, g)
        yield from wrong_counts(block, x, g)


def _transposed(block: Block, x: Tensor, g: Tensor) -> Iterator[Found]:
    A, B = block.factors(x, g)
    R, N, S = block.sizes["R"], block.sizes["N"], x.shape[1]
    data = x.flatten(0, 1)
    over_data = R * data @ data.T
    yield "transposed", "in A", (over_data, B)
    if len(g):
        vectors = g.flatten(0, 2)
        if len(vectors) <= 60:
            yield "transposed", "in B", (A, vectors @ vectors.T / (N * S))
        by_datum = g.flatten(2).mean(0)
        yield "transposed", "in A and B", (over_data, by_datum @ by_datum.T / (N * S))


def _biases(block: Block, A: Tensor, B: Tensor) -> Iterator[Found]:
    if block.part != "joint" or not block.has_bias:
        return
    name = "bias missing"
    yield name, "", (A[:-1, :-1], B)
    uncoupled = A.clone()
    uncoupled[-1, :-1] = uncoupled[:-1, -1] = 0
    yield "bias separate", "", (uncoupled, B)
    for variant, corner in (("zero in its place", 0.0), ("one in its place", 1.0)):
        without = uncoupled.clone()
        without[-1, -1] = corner
        yield name, variant, (without, B)


def _other_places(block: Block) -> Iterator[tuple[str, str, Tensor]]:
    if block.part != "joint" or not block.has_bias:
        return
    joint = block.definition
    D_out = sum(g.shape[-1] for _, g in (b.rows("right") for b in block.of_groups()))
    D_in = len(joint) // D_out
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


def _squares_of_means(block: Block, x: Tensor, g: Tensor) -> Iterator[Found]:
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
            yield name, variant, (wrong_A, wrong_B)


def _shared_axes(block: Block, x: Tensor, g: Tensor) -> Iterator[Found]:
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
            yield "shared axis averaged", variant, (A, B.to(A.dtype))
            if in_A == in_B:
                exchanged = "expand and reduce exchanged"
                B = B / S if in_B else B
                yield "shared axis averaged", exchanged, (A, B.to(A.dtype))


def _other_vectors(block: Block, x: Tensor) -> Iterator[Found]:
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
    for of_vectors, name in names.items():
        if isinstance(fisher, InputOnly):
            return
        same = {"empirical": isinstance(fisher, Empirical)}
        same["type-II"] = not same["empirical"]
        if same.get(of_vectors, False) or vectors_of(block.case, of_vectors) is None:
            continue
        if of_vectors == "empirical" and isinstance(fisher, MonteCarlo):
            name = "labels instead of samples"
        _, g = block.rows(of_vectors)
        yield name, of_vectors, (A, block.output_factor(g))
