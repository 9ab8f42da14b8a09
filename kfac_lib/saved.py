"""What a preconditioner saves: elements as plain containers, and whether a state fits a net.

Explained in the section :ref:`damp-preconditioner`. A state holds tensors, numbers and strings in
dicts, lists and tuples, so that :func:`torch.load` takes it with ``weights_only=True``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_lib.accumulate import Sharing
from kfac_lib.coverage import Coverage
from kfac_lib.gradients import shape_of
from kfac_lib.kronecker import BlockDiagonal, EigenKronecker, Element, Kronecker
from kfac_lib.layers import groups_of

Packed = list[dict[str, Tensor | None]]
"""The tensors of an element by their names, one dict for each group."""


def pack(element: Element) -> Packed:
    """Return the tensors of an element (:ref:`damp-preconditioner`).

    Example:
        >>> [list(block) for block in pack(Kronecker(torch.eye(2), torch.eye(3)))]
        [['A', 'B']]
    """
    return [dict(vars(block)) for block in _blocks(element)]


def unpack(packed: Packed, like: Tensor) -> Element:
    """Return the element, on the device and in the dtype of a tensor (:ref:`damp-preconditioner`).

    Example:
        >>> unpack(pack(Kronecker(torch.eye(2), torch.eye(3))), torch.zeros(1)).shape
        (3, 2)
    """
    blocks: list[Kronecker | EigenKronecker] = []
    for parts in packed:
        kind: type[Any] = Kronecker if "A" in parts else EigenKronecker
        blocks.append(kind(**{k: None if t is None else t.to(like) for k, t in parts.items()}))
    return blocks[0] if len(blocks) == 1 else BlockDiagonal(blocks)


def widened(element: Element) -> Element:
    """Return the element in single precision, if it is in half (:ref:`damp-preconditioner`).

    Factors in half precision have no decomposition.

    Example:
        >>> half = Kronecker(torch.eye(2).bfloat16(), torch.eye(3).bfloat16())
        >>> widened(half).A.dtype
        torch.float32
    """
    like = next(t for t in vars(_blocks(element)[0]).values() if t is not None)
    return unpack(pack(element), wide(like))


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in single precision, if it is in half (:ref:`damp-preconditioner`).

    Example:
        >>> wide(torch.ones(1).bfloat16()).dtype, wide(torch.ones(1).double()).dtype
        (torch.float32, torch.float64)
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def sharing_in_words(sharing: Mapping[str, Sharing]) -> str:
    """How layers share, by names that another run finds again (:ref:`share-choice`).

    Example:
        >>> from kfac_lib import Expand, Reduce
        >>> sharing_in_words({"a": Reduce(), "b": Reduce()})
        'Reduce'
        >>> sharing_in_words({"a": Expand(), "b": Reduce()})
        "{'a': Expand, 'b': Reduce}"
    """
    names = {name: type(one).__name__ for name, one in sharing.items()}
    if len(set(names.values())) == 1:
        return next(iter(names.values()))
    return "{" + ", ".join(f"{layer!r}: {name}" for layer, name in names.items()) + "}"


def shape_of_group(coverage: Coverage, name: str) -> tuple[tuple[int, int], int]:
    """Shape (D_out, D_in [+1]) of one group of a layer, and how many there are.

    See :ref:`share-groups`.

    Example:
        >>> from torch import nn
        >>> from kfac_lib.coverage import cover
        >>> shape_of_group(cover(nn.Conv1d(4, 6, 3, groups=2)), "")
        ((3, 7), 2)
    """
    (D_out, D_in), G = shape_of(coverage, name), groups_of(coverage.layers[name])
    return (D_out // G, D_in), G


def check_layers(saved: Mapping[str, Any], coverage: Coverage) -> None:
    """Refuse a state whose layers are others (:ref:`damp-preconditioner`).

    Raises:
        ValueError: The message names the first that differs.

    Example:
        >>> from torch import nn
        >>> from kfac_lib.coverage import cover
        >>> check_layers({"": None}, cover(nn.Linear(2, 3)))
    """
    for name in [*coverage.layers, *saved]:
        if name not in saved or name not in coverage.layers:
            has, lacks = ("net", "state") if name not in saved else ("state", "net")
            raise ValueError(
                f"The state is that of another net: layer {name!r} is in the {has}, but not in "
                f"the {lacks}. The net's layers are {list(coverage.layers)}."
            )


def check_kinds(saved: Mapping[str, str], own: Mapping[str, str]) -> None:
    """Refuse a state that was made with other options (:ref:`damp-preconditioner`).

    Raises:
        ValueError: The message names the first that differs.

    Example:
        >>> check_kinds({"loss": "CrossEntropy"}, {"loss": "CrossEntropy"})
    """
    for kind, name in own.items():
        if saved.get(kind) != name:
            raise ValueError(
                f"The state was made with {kind} {saved.get(kind)}, this preconditioner has "
                f"{name}. Use the same {kind}."
            )


def check_tensors(
    name: str, saved: Sequence[Tensor | None], possible: Sequence[tuple[int, ...]], number: int
) -> None:
    """Refuse sums of another shape, or for another number of groups (:ref:`damp-preconditioner`).

    Args:
        name: The layer's name.
        saved: Tensors; None, or none at all, before the first batch.
        possible: The shapes that each may have.
        number: How many there should be.

    Raises:
        ValueError: If one does not fit.

    Example:
        >>> check_tensors("fc", [torch.eye(2), None], [(2, 2)], 2)
    """
    if len(saved) not in (0, number):
        raise ValueError(
            f"The state is that of another net: layer {name!r} has {len(saved)} groups in it, "
            f"here {number}."
        )
    for one in saved:
        if one is not None and tuple(one.shape) not in possible:
            raise ValueError(
                f"The state is that of another net: layer {name!r} has sums of shape "
                f"{tuple(one.shape)} in it, here {' or '.join(map(str, possible))}."
            )


def _blocks(element: Element) -> Sequence[Kronecker | EigenKronecker]:
    return element.blocks if isinstance(element, BlockDiagonal) else (element,)
