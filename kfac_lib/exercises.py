"""The checker of the book's exercises: it says which case fails, and never gives the answer.

First used in the section :ref:`flat-exercises`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """One thing that a right answer must do (:ref:`flat-exercises`)."""

    arguments: tuple[Any, ...]
    expected: Any
    hint: str


def grade(attempt: Callable[..., Any], cases: Sequence[Case], tolerance: float = 1e-10) -> bool:
    """Try an answer on every case and print one line of verdict (:ref:`flat-exercises`).

    Args:
        attempt: The reader's function; ``...`` or None as result counts as not started.
        cases: Arguments, expected results (tensors or numbers) and hints.
        tolerance: Largest relative difference that counts as equal.

    Returns:
        Whether every case holds.

    Raises:
        ValueError: If there is no case.

    Example:
        >>> cases = [Case((2,), 4, "squares"), Case((3,), 9, "squares")]
        >>> grade(lambda x: x * x, cases)
        2 of 2 cases hold. Well done.
        True
        >>> grade(lambda x: 2 * x, cases)
        Case 2 of 2 does not hold yet. Hint: squares
        False
        >>> grade(lambda x: ..., cases)
        Not started: write the function, then run this cell again.
        False
    """
    if not cases:
        raise ValueError("An exercise without a case would accept any answer.")
    for number, case in enumerate(cases, start=1):
        try:
            result = attempt(*case.arguments)
        except Exception as error:
            print(f"Case {number} of {len(cases)} raises {type(error).__name__}: {error}")
            return False
        if result is None or result is ...:
            print("Not started: write the function, then run this cell again.")
            return False
        if not _equal(result, case.expected, tolerance):
            print(f"Case {number} of {len(cases)} does not hold yet. Hint: {case.hint}")
            return False
    print(f"{len(cases)} of {len(cases)} cases hold. Well done.")
    return True


def _equal(result: Any, expected: Any, tolerance: float) -> bool:
    if not isinstance(result, Tensor | int | float):
        return bool(result == expected)
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    given = torch.as_tensor(result, dtype=torch.float64)
    if given.shape != wanted.shape:
        return False
    scale = max(1.0, float(wanted.abs().max()) if wanted.numel() else 0.0)
    return bool(((given - wanted).abs() <= tolerance * scale).all())
