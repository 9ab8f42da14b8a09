from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from truth import stack_entries

from kfac_lib.flattening import (
    check_order,
    cvec,
    cvec_inverse,
    cvec_to_rvec,
    flatten,
    rvec,
    rvec_inverse,
    rvec_to_cvec,
    unflatten,
)

# rank 0 to 5, axes of size 1, and empty axes
shapes = st.lists(st.integers(0, 3), max_size=5)
orders = st.sampled_from(["cvec", "rvec"])


@st.composite
def shape_and_axes(draw):
    shape = draw(shapes.filter(bool))
    start = draw(st.integers(0, len(shape) - 1))
    return shape, start, draw(st.integers(start, len(shape) - 1))


def numbered(shape):
    return torch.arange(prod(shape)).reshape(shape)


def indices(shape, order):
    """All indices of a tensor, in the order in which its entries stand in the vector."""
    if order == "rvec":
        return list(product(*map(range, shape)))
    return [index[::-1] for index in product(*map(range, shape[::-1]))]


@given(shape_and_axes(), orders, st.booleans())
def test_flattening_some_axes_is_an_index_loop(case, order, negative):
    shape, start, end = case
    X = numbered(shape)
    middle = indices(shape[start : end + 1], order)
    found = flatten(X, order, *((a - len(shape) for a in (start, end)) if negative else case[1:]))
    assert found.shape == (*shape[:start], len(middle), *shape[end + 1 :])
    for before in product(*map(range, shape[:start])):
        for position, index in enumerate(middle):
            assert torch.equal(found[(*before, position)], X[(*before, *index)])


@given(shape_and_axes(), orders)
def test_unflatten_undoes_flatten_on_any_axes(case, order):
    shape, start, end = case
    X = numbered(shape)
    back = unflatten(flatten(X, order, start, end), order, shape[start : end + 1], dim=start)
    assert torch.equal(back, X)
    dim = start - (len(shape) - (end - start))
    assert torch.equal(
        unflatten(flatten(X, order, start, end), order, shape[start : end + 1], dim=dim), X
    )


@given(shapes)
def test_the_permutations_translate_vectors_and_are_inverse(shape):
    X = numbered(shape)
    assert torch.equal(rvec(X)[rvec_to_cvec(shape)], cvec(X))
    assert torch.equal(cvec(X)[cvec_to_rvec(shape)], rvec(X))
    assert torch.equal(rvec_to_cvec(shape)[cvec_to_rvec(shape)], torch.arange(X.numel()))


@given(shapes, orders)
def test_a_whole_tensor_of_any_rank_comes_back(shape, order):
    X = numbered(shape)
    vector = flatten(X, order)
    assert vector.shape == (X.numel(),)
    assert torch.equal(unflatten(vector, order, shape), X)
    assert [int(entry) for entry in vector] == [int(X[index]) for index in indices(shape, order)]
    inverse = cvec_inverse if order == "cvec" else rvec_inverse
    assert torch.equal(inverse(vector, shape), X)


@given(shapes)
def test_cvec_is_rvec_of_the_reversed_axes(shape):
    X = numbered(shape)
    assert torch.equal(cvec(X), rvec(X.permute(tuple(range(X.ndim))[::-1])))


@given(st.integers(1, 4), st.integers(1, 4))
def test_a_matrix_is_stacked_by_columns_or_by_rows(m, n):
    X = numbered([m, n])
    assert torch.equal(cvec(X), stack_entries(X, "cvec"))
    assert torch.equal(rvec(X), stack_entries(X, "rvec"))


@given(*[st.integers(1, 4)] * 4)
@settings(max_examples=30)
def test_vec_of_a_product_is_kron_times_vec_in_both_orders(m, n, p, q):
    random = torch.Generator().manual_seed(0)
    B, U, A = (
        torch.randn(s, generator=random, dtype=torch.float64) for s in ((p, m), (m, n), (q, n))
    )
    product_ = B @ U @ A.T
    assert torch.allclose(torch.kron(A, B) @ cvec(U), cvec(product_), atol=1e-12)
    assert torch.allclose(torch.kron(B, A) @ rvec(U), rvec(product_), atol=1e-12)
    assert torch.allclose(
        (A.reshape(q, 1, n, 1) * B.reshape(1, p, 1, m)).reshape(q * p, n * m) @ cvec(U),
        cvec(product_),
        atol=1e-12,
    )


def test_the_wrong_order_of_kron_is_clearly_off():
    A, B, U = (torch.randn(3, 3, dtype=torch.float64) for _ in range(3))
    assert (torch.kron(B, A) @ cvec(U) - cvec(B @ U @ A.T)).norm() > 0.1
    assert (torch.kron(A, B) @ rvec(U) - rvec(B @ U @ A.T)).norm() > 0.1


def test_a_permuted_matrix_acts_on_the_permuted_vector():
    U, M = torch.randn(2, 3, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)
    p = rvec_to_cvec((2, 3))
    assert torch.allclose(M[p][:, p] @ cvec(U), (M @ rvec(U))[p])


def test_a_scalar_becomes_a_vector_with_one_entry():
    for order in ("cvec", "rvec"):
        assert flatten(torch.tensor(3.0), order).shape == (1,)


def test_an_unknown_order_names_both_that_exist():
    X = torch.ones(2, 2)
    for call in (check_order, lambda o: flatten(X, o), lambda o: unflatten(X, o, (2,))):
        with pytest.raises(ValueError, match=r"'vec'.*cvec.*rvec"):
            call("vec")


@pytest.mark.parametrize("inverse", [cvec_inverse, rvec_inverse])
def test_a_shape_that_does_not_fit_is_named(inverse):
    with pytest.raises(ValueError, match=r"6 entries.*\(2, 2\).*4"):
        inverse(torch.arange(6), (2, 2))
