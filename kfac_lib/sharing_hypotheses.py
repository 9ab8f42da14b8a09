"""What is usually wrong with a KFAC of layers whose weight is shared, as pairs of factors.

Convolutions, groups of channels, embeddings, layers that are called several times. Explained in the
section :ref:`test-kit`.
"""

from collections.abc import Iterator
from dataclasses import replace

import einops
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from kfac_lib.blocks import Block
from kfac_lib.wrong_rows import other_columns, read_in_another_order, rows_of, wrong_inputs

Found = tuple[str, str, tuple[Tensor, Tensor]]
"""Hypothesis, variant, and the pair of factors that it gives."""


def calls_apart(block: Block, A: Tensor, B: Tensor) -> Iterator[Found]:
    """Of a layer that is called several times, one call only, or each by itself.

    See :ref:`share-reused`.

    Args:
        block: The block, of one group.
        A: The right input-based factor.
        B: The right grad-output-based factor.
    """
    calls = len(rows_of(block.case, "right")[block.layer])
    if calls == 1:
        return
    pairs = [block.factors(*block.rows("right", slice(call, call + 1))) for call in range(calls)]
    yield "last call only of a reused layer", "", pairs[-1]
    yield "first call only of a reused layer", "", pairs[0]
    name = "calls of a reused layer taken apart"
    of_A, of_B = (torch.stack(factors) for factors in zip(*pairs, strict=True))
    yield name, "averaged", (of_A.mean(0), of_B.mean(0))
    yield name, "summed", (of_A.sum(0), of_B.sum(0))
    yield name, "A of the last call", (pairs[-1][0], B)
    yield name, "A of the first call", (pairs[0][0], B)
    yield name, "B of the last call", (A, pairs[-1][1])


def wrong_patches(block: Block, B: Tensor) -> Iterator[Found]:
    """A of patches, or tokens, that are not those that the layer reads.

    See :ref:`share-convolution`.

    Args:
        block: The block, of one group.
        B: The right grad-output-based factor.
    """
    for name, variant, x in wrong_inputs(block.case, block.layer):
        yield name, variant, (block.input_factor(block.appended(x)), B)


def other_orders(block: Block, x: Tensor, g: Tensor) -> Iterator[Found]:
    """Columns of a kernel, or the axes of memory, in another order.

    See :ref:`share-convolution`.

    Args:
        block: The block, of one group, with a weight.
        x: Its rows x̃.
        g: Its pseudo-gradients.
    """
    if not isinstance(block.module, _ConvNd):
        return
    A, B = block.factors(x, g)
    for variant, order in other_columns(block.module):
        with_bias = torch.cat([order, torch.arange(len(order), len(A))])
        yield "columns of the kernel reordered", variant, (A[with_bias][:, with_bias], B)
    if x.shape[1] == 1:
        return
    calls = rows_of(block.case, "right")[block.layer]
    in_A = torch.cat([read_in_another_order(x_of) for x_of, _ in calls], dim=-2)
    in_B = torch.cat([read_in_another_order(g_of) for _, g_of in calls], dim=-2)
    wrong_A = block.input_factor(block.appended(in_A))
    wrong_B = block.output_factor(block.of_group(in_B))
    name = "channels and positions confused"
    yield name, "in A", (wrong_A, B)
    yield name, "in B", (A, wrong_B)
    yield name, "in A and B", (wrong_A, wrong_B)


def wrong_counts(block: Block, x: Tensor, g: Tensor) -> Iterator[Found]:
    """An Embedding whose tokens are counted in another way.

    See :ref:`share-embedding`.

    Args:
        block: The block.
        x: Its one-hot rows.
        g: Its pseudo-gradients.
    """
    if not isinstance(block.module, nn.Embedding):
        return
    R, counts = block.sizes["R"], x.sum(1)
    total = counts.sum(0)
    B = block.output_factor(g)
    for variant, A in {
        "counts squared": total.square().diag(),
        "counts of each datum squared": counts.square().sum(0).diag(),
        "each token once": total.sign().diag(),
        "each token once a datum": counts.sign().sum(0).diag(),
        "each token once a datum, with the pairs": counts.sign().T @ counts.sign(),
    }.items():
        if not torch.equal(R * A, block.input_factor(x)):
            yield "tokens miscounted", variant, (R * A, B)
    if block.module.padding_idx is not None:
        without = block.output_factor(g * x.sum(-1, keepdim=True))
        yield "tokens miscounted", "B without padding", (block.input_factor(x), without)


def mixed_groups(block: Block) -> Iterator[tuple[str, str, Tensor]]:
    """Groups of channels that share a pair of factors, or are not apart at all.

    See :ref:`share-groups`.

    Args:
        block: The block, of all groups.

    Yields:
        Hypothesis, variant and the dense matrix, whose shape may be another than it should be.
    """
    other = replace(block, order="rvec" if block.order == "cvec" else "cvec")
    yield "factors swapped", "the other order", other.definition
    for variant, dense in _mixed(block):
        yield "groups not kept apart", variant, dense


def _mixed(block: Block) -> Iterator[tuple[str, Tensor]]:
    groups = block.of_groups()
    rows = [one.rows("right") for one in groups]
    pairs = [one.factors(x, g) for one, (x, g) in zip(groups, rows, strict=True)]
    of_A, of_B = (torch.stack(factors) for factors in zip(*pairs, strict=True))
    G, D_in, D_out = len(groups), of_A.shape[-1], of_B.shape[-1]
    mean = of_A.mean(0), of_B.mean(0)
    x, g = block.rows("right")
    B = block.output_factor(g)
    yield "averaged, for each group", block.dense(*[mean] * G)
    yield "averaged, one pair", block.dense(mean)
    yield "first group, for each group", block.dense(*[pairs[0]] * G)
    yield "first group alone", block.dense(pairs[0])
    yield "A averaged, B over all channels", block.dense((mean[0], B))
    yield "A summed, B over all channels", block.dense((of_A.sum(0), B))
    yield "A of the first group, B over all channels", block.dense((of_A[0], B))
    yield "over all channels", block.dense((block.input_factor(x), B))
    # Each with its own 1: the matrix that the groups are the diagonal blocks of.
    A = block.input_factor(torch.cat([x for x, _ in rows], -1))
    crossed = torch.einsum(
        "hokp,hikj->hoikpj", B.reshape(G, D_out, G, D_out), A.reshape(G, D_in, G, D_in)
    )
    yield "coupling of groups kept", block.ordered(crossed.reshape([G * D_out * D_in] * 2), D_in)
    k = 1 if block.part == "bias" else block.module.get_parameter("weight")[0, 0].numel()
    only_x = torch.cat([x[..., : D_in - int(block.bias_is_joint)] for x, _ in rows], -1)
    in_turn = einops.rearrange(only_x, "n s (c group k) -> n s (group c k)", group=G, k=k)
    in_turn_g = einops.rearrange(g, "v n s (o group) -> v n s (group o)", group=G)
    if not torch.equal(in_turn, only_x) or not torch.equal(in_turn_g, g):
        pairs = [one.factors(one.appended(in_turn), one.of_group(in_turn_g)) for one in groups]
        yield "channels dealt out in turn", block.dense(*pairs)
