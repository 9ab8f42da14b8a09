"""Rows: the Gram matrix by blocks, and what can be made of a layer's rows."""

import pytest
import torch

from kfac_lib.rows import gram

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("D", [1, 128, 129, 257, 600])
def test_gram_of_any_width_is_the_product(D):
    rows = torch.randn(7, D)
    result = gram(rows)
    assert torch.linalg.norm(result - rows.T @ rows) < 1e-12 * torch.linalg.norm(result)


def test_gram_reads_rows_of_any_layout_and_keeps_the_type():
    rows = torch.randn(300, 5, dtype=torch.float32).T
    assert gram(rows).dtype == torch.float32
    torch.testing.assert_close(gram(rows), rows.T @ rows)
