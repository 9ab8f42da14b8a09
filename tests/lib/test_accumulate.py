import pytest
import torch
from truth import relative_error, stack_entries

from kfac_lib import Expand, Reduce
from kfac_lib.accumulate import ExactBlocks, FactorSums, constants
from kfac_lib.losses import CrossEntropy, SquaredError
from kfac_lib.rows import Count, LayerRows

pytestmark = pytest.mark.usefixtures("float64")
MSE = SquaredError("mean")
sharings = pytest.mark.parametrize("sharing", [Expand(), Reduce()], ids=repr)


def rows(N, S=2, V=3, bias=1.0, seed=0):
    random = torch.Generator().manual_seed(seed + N)
    x, g = torch.randn(N, S, 4, generator=random), torch.randn(V, N, S, 3, generator=random)
    return LayerRows(x, g, bias, Count(N, 3 * S * N))


def accumulate(new, *parts):
    accumulator = new()
    for part in parts:
        accumulator.update(part)
    return accumulator


def joined(*parts):
    count = Count(sum(p.count.N for p in parts), sum(p.count.denominator for p in parts))
    x, g = torch.cat([p.x for p in parts]), torch.cat([p.g for p in parts], 1)
    return LayerRows(x, g, parts[0].bias, count)


@pytest.mark.parametrize("bias", [None, 1.0])
def test_rows_make_grams_and_outer_products(bias):
    r = rows(3, bias=bias)
    x = r.x if bias is None else torch.cat([r.x, torch.ones(3, 2, 1)], 2)
    assert relative_error(r.input_gram(), sum(torch.outer(v, v) for v in x.flatten(0, 1))) < 1e-12
    assert (
        relative_error(r.output_gram(), sum(torch.outer(v, v) for v in r.g.flatten(0, 2))) < 1e-12
    )
    P = torch.stack([sum(torch.outer(r.g[1, n, s], x[n, s]) for s in range(2)) for n in range(3)])
    assert relative_error(r.outer()[1], P) < 1e-12
    total = x.sum(1)
    assert relative_error(r.reduced().input_gram(), total.T @ total) < 1e-12
    g = r.g.sum(2).flatten(0, 1)
    assert relative_error(r.reduced().output_gram(), g.T @ g) < 1e-12
    assert r.reduced().S == 1


def test_constants_are_those_of_the_table():
    count = Count(N=5, denominator=30)
    assert constants(MSE, count, Expand(), 3) == (2 / 30, 1 / (5 * 3))
    assert constants(MSE, count, Reduce(), 3) == (2 / 30, 1 / (5 * 9))
    assert constants(CrossEntropy("sum"), count, Reduce(), 3) == (1, 1 / (5 * 9))


@sharings
def test_merged_sums_are_those_of_all_data(sharing):
    first, second, third = rows(2), rows(3), rows(4)

    def new():
        return FactorSums(sharing)

    expected = accumulate(new, joined(first, second, third)).finish(MSE)
    merged, empty = accumulate(new, first, second), new()
    merged.merge(accumulate(new, third))
    merged.merge(empty)
    empty.merge(merged)
    for accumulator in (merged, empty):
        for found, factor in zip(accumulator.finish(MSE), expected, strict=True):
            assert relative_error(found, factor) < 1e-12
    # as many vectors in the one as in the other
    alike = accumulate(new, first)
    alike.merge(accumulate(new, second))
    for found, factor in zip(
        alike.finish(MSE), accumulate(new, joined(first, second)).finish(MSE), strict=True
    ):
        assert relative_error(found, factor) < 1e-12


def test_merging_sums_over_ignored_data_alone_changes_nothing():
    r = rows(3)
    nothing = LayerRows(r.x, torch.zeros_like(r.g), r.bias, Count(0, 0))
    ignored, accumulator = (accumulate(lambda: FactorSums(Expand()), p) for p in (nothing, rows(2)))
    before = accumulator.finish(MSE)
    accumulator.merge(ignored)
    assert all(map(torch.equal, accumulator.finish(MSE), before))
    with pytest.raises(ValueError, match="No rows"):
        ignored.finish(MSE)


def test_merging_leaves_the_other_accumulator_as_it_was():
    first, second = (accumulate(lambda: FactorSums(Expand()), rows(N)) for N in (2, 3))
    before = [factor.clone() for factor in second.finish(MSE)]
    first.merge(second)
    empty = FactorSums(Expand())
    empty.merge(second)
    empty.merge(first)
    assert all(map(torch.equal, before, second.finish(MSE)))


@pytest.mark.parametrize("order", ["cvec", "rvec"])
def test_merged_blocks_are_the_sum_of_outer_products(order):
    first, second = rows(2), rows(3)
    merged = accumulate(lambda: ExactBlocks(order), first)
    merged.merge(accumulate(lambda: ExactBlocks(order), second))
    merged.merge(ExactBlocks(order))
    P = [p for r in (first, second) for p in r.outer().flatten(0, 1)]
    vectors = [stack_entries(p, order) for p in P]
    expected = 2 / 30 * sum(torch.outer(v, v) for v in vectors)
    assert relative_error(merged.finish(MSE), expected) < 1e-12


@sharings
def test_chunks_of_vectors_count_the_data_once(sharing):
    r = rows(3)
    chunks = [
        LayerRows(r.x, r.g[:2], r.bias, r.count),
        LayerRows(r.x, r.g[2:], r.bias, Count(0, 0)),
    ]
    whole, parts = (accumulate(lambda: FactorSums(sharing), *p) for p in ([r], chunks))
    for found, factor in zip(parts.finish(MSE), whole.finish(MSE), strict=True):
        assert relative_error(found, factor) < 1e-12


@pytest.mark.parametrize("like", [{"dtype": torch.float32}, {"device": "meta"}], ids=str)
def test_without_vectors_B_is_the_identity_in_dtype_and_device_of_the_sums(like):
    r = LayerRows(torch.ones(5, 2, 4, **like), torch.ones(0, 5, 2, 3, **like), None, Count(5, 30))
    A, B = accumulate(lambda: FactorSums(Expand()), r).finish(MSE)
    assert (B.shape, B.dtype, B.device) == ((3, 3), A.dtype, A.device)
    if A.device.type != "meta":
        assert torch.equal(B, torch.eye(3, dtype=torch.float32))


def test_what_does_not_add_up_is_refused():
    expand = accumulate(lambda: FactorSums(Expand()), rows(2))
    with pytest.raises(ValueError, match=r"Expand.*Reduce"):
        expand.merge(FactorSums(Reduce()))
    with pytest.raises(ValueError, match=r"2 positions.*3.*one S"):
        expand.update(rows(2, S=3))
    with pytest.raises(ValueError, match=r"2 positions.*3.*one S"):
        expand.merge(accumulate(lambda: FactorSums(Expand()), rows(2, S=3)))
    with pytest.raises(ValueError, match=r"cvec.*rvec"):
        ExactBlocks("cvec").merge(ExactBlocks("rvec"))


@pytest.mark.parametrize(
    "empty", [FactorSums(Expand()), ExactBlocks("cvec")], ids=["sums", "blocks"]
)
def test_nothing_accumulated_gives_nothing(empty):
    with pytest.raises(ValueError, match="No rows"):
        empty.finish(MSE)
