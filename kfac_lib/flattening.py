"""Turning matrices and tensors into vectors, and back.

Explained in the chapter :ref:`flattening`. Two orders are in use, and every formula with a
Kronecker product holds in one of them only:

* ``cvec``, *column-major*: the first index runs fastest (columns of a matrix are stacked);
* ``rvec``, *row-major*: the last index runs fastest (rows are stacked). It is what
  :meth:`torch.Tensor.reshape` does.
"""

from collections.abc import Sequence
from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor

Order = Literal["cvec", "rvec"]
"""The name of a flattening order."""


def check_order(order: str) -> Order:
    """Return ``order`` if it names a flattening order (see :ref:`flat-orders`).

    Args:
        order: Candidate, ``"cvec"`` or ``"rvec"``.

    Returns:
        The same string, typed.

    Raises:
        ValueError: If it is anything else.

    Example:
        >>> check_order("cvec")
        'cvec'
    """
    for known in get_args(Order):
        if order == known:
            return known  # type: ignore[no-any-return]
    raise ValueError(
        f"order={order!r} is not a flattening order. Use 'cvec' (first index fastest, columns "
        "stacked) or 'rvec' (last index fastest, rows stacked, torch's own order)."
    )


def rvec(tensor: Tensor, start: int = 0, end: int = -1) -> Tensor:
    """Flatten the axes ``start`` to ``end`` row-major: the last of them runs fastest.

    See :ref:`flat-orders` and, for only some of the axes, :ref:`flat-partial`.

    Args:
        tensor: Tensor of any shape.
        start: First axis to flatten.
        end: Last axis to flatten (included).

    Returns:
        Tensor in which the axes ``start`` to ``end`` are one.

    Example:
        >>> rvec(torch.tensor([[1, 2], [3, 4]])).tolist()
        [1, 2, 3, 4]
    """
    return tensor.flatten(start, end)


def cvec(tensor: Tensor, start: int = 0, end: int = -1) -> Tensor:
    """Flatten the axes ``start`` to ``end`` column-major: the first of them runs fastest.

    See :ref:`flat-orders` and, for only some of the axes, :ref:`flat-partial`.

    Args:
        tensor: Tensor of any shape.
        start: First axis to flatten.
        end: Last axis to flatten (included).

    Returns:
        Tensor in which the axes ``start`` to ``end`` are one.

    Example:
        >>> cvec(torch.tensor([[1, 2], [3, 4]])).tolist()
        [1, 3, 2, 4]
    """
    if tensor.ndim == 0:
        return tensor.flatten()
    first, last = start % tensor.ndim, end % tensor.ndim
    axes = list(range(tensor.ndim))
    axes[first : last + 1] = axes[first : last + 1][::-1]
    return tensor.permute(axes).flatten(first, last)


def rvec_inverse(tensor: Tensor, shape: Sequence[int], dim: int = 0) -> Tensor:
    """Undo :func:`rvec`: give axis ``dim`` the axes ``shape`` back (:ref:`flat-inverse`).

    Args:
        tensor: Tensor whose axis ``dim`` has ``prod(shape)`` entries; often a vector.
        shape: The axes that were flattened.
        dim: The flattened axis.

    Returns:
        Tensor with axis ``dim`` replaced by the axes ``shape``.

    Raises:
        ValueError: If the number of entries does not fit.

    Example:
        >>> rvec_inverse(torch.tensor([1, 2, 3, 4]), (2, 2)).tolist()
        [[1, 2], [3, 4]]
    """
    _check_size(tensor, shape, dim)
    first = dim % tensor.ndim
    return tensor.reshape((*tensor.shape[:first], *shape, *tensor.shape[first + 1 :]))


def cvec_inverse(tensor: Tensor, shape: Sequence[int], dim: int = 0) -> Tensor:
    """Undo :func:`cvec`: give axis ``dim`` the axes ``shape`` back (:ref:`flat-inverse`).

    Args:
        tensor: Tensor whose axis ``dim`` has ``prod(shape)`` entries; often a vector.
        shape: The axes that were flattened.
        dim: The flattened axis.

    Returns:
        Tensor with axis ``dim`` replaced by the axes ``shape``.

    Raises:
        ValueError: If the number of entries does not fit.

    Example:
        >>> cvec_inverse(torch.tensor([1, 3, 2, 4]), (2, 2)).tolist()
        [[1, 2], [3, 4]]
    """
    _check_size(tensor, shape, dim)
    first = dim % tensor.ndim
    unflat = rvec_inverse(tensor, tuple(shape)[::-1], first)
    axes = list(range(unflat.ndim))
    axes[first : first + len(shape)] = axes[first : first + len(shape)][::-1]
    return unflat.permute(axes)


def flatten(tensor: Tensor, order: Order, start: int = 0, end: int = -1) -> Tensor:
    """Flatten in the order of that name: :func:`cvec` or :func:`rvec` (:ref:`flat-orders`).

    Args:
        tensor: Tensor of any shape.
        order: ``"cvec"`` or ``"rvec"``.
        start: First axis to flatten.
        end: Last axis to flatten (included).

    Returns:
        Tensor in which the axes ``start`` to ``end`` are one.

    Raises:
        ValueError: If the order is unknown.

    Example:
        >>> flatten(torch.tensor([[1, 2], [3, 4]]), "cvec").tolist()
        [1, 3, 2, 4]
    """
    return (cvec if check_order(order) == "cvec" else rvec)(tensor, start, end)


def unflatten(tensor: Tensor, order: Order, shape: Sequence[int], dim: int = 0) -> Tensor:
    """Undo :func:`flatten` in the order of that name (:ref:`flat-inverse`).

    Args:
        tensor: Tensor whose axis ``dim`` has ``prod(shape)`` entries; often a vector.
        order: ``"cvec"`` or ``"rvec"``.
        shape: The axes that were flattened.
        dim: The flattened axis.

    Returns:
        Tensor with axis ``dim`` replaced by the axes ``shape``.

    Raises:
        ValueError: If the order is unknown or the number of entries does not fit.

    Example:
        >>> unflatten(torch.tensor([1, 3, 2, 4]), "cvec", (2, 2)).tolist()
        [[1, 2], [3, 4]]
    """
    return (cvec_inverse if check_order(order) == "cvec" else rvec_inverse)(tensor, shape, dim)


def rvec_to_cvec(shape: Sequence[int]) -> Tensor:
    """The permutation that turns ``rvec`` into ``cvec`` (:ref:`flat-permutation`).

    Args:
        shape: Shape of the tensor that was flattened.

    Returns:
        Index vector ``p`` of shape ``(prod(shape),)`` with ``cvec(X) = rvec(X)[p]``; a matrix
        ``M`` on rvec(X) becomes ``M[p][:, p]`` on cvec(X).

    Example:
        >>> rvec_to_cvec((2, 3)).tolist()
        [0, 3, 1, 4, 2, 5]
    """
    return cvec(torch.arange(prod(shape)).reshape(tuple(shape)))


def cvec_to_rvec(shape: Sequence[int]) -> Tensor:
    """The permutation that turns ``cvec`` into ``rvec`` (:ref:`flat-permutation`).

    Args:
        shape: Shape of the tensor that was flattened.

    Returns:
        Index vector ``p`` of shape ``(prod(shape),)`` with ``rvec(X) = cvec(X)[p]``, the inverse
        of :func:`rvec_to_cvec`.

    Example:
        >>> cvec_to_rvec((2, 3)).tolist()
        [0, 2, 4, 1, 3, 5]
    """
    return rvec_to_cvec(shape).argsort()


def _check_size(tensor: Tensor, shape: Sequence[int], dim: int) -> None:
    if tensor.shape[dim] != prod(shape):
        raise ValueError(
            f"Axis {dim} has {tensor.shape[dim]} entries, but shape {tuple(shape)} holds "
            f"{prod(shape)}. Give the shape that the axis had before it was flattened."
        )
