"""Options that are values or functions of the step, and what their values may be.

Explained in the section :ref:`damp-preconditioner`.
"""

from collections.abc import Mapping
from math import inf
from numbers import Integral, Real
from typing import Any

from kfac_lib.damping import Exact, LevenbergMarquardt
from kfac_lib.kronecker import Damping


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse values that are nonsense; schedules are left for :func:`value_at`.

    See :ref:`damp-preconditioner`.

    Raises:
        ValueError: For a value that is out of its range.
        TypeError: For a damping that is none.

    Example:
        >>> check_options({"ema": 0.9, "factor_every": lambda step: 1 + step // 10})
    """
    for option, value in options.items():
        if isinstance(value, type) or not callable(value):
            _check(option, value)


def value_at(option: str, value: Any, step: int) -> Any:
    """The value of an option at a step (:ref:`damp-preconditioner`).

    Args:
        option: Its name.
        value: A value, or a function of the step.
        step: The step, counted from zero.

    Raises:
        ValueError: For a value that is out of its range.
        TypeError: For a damping that is none.

    Example:
        >>> value_at("ema", lambda step: 1 - 1 / (step + 2), 0)
        0.5
    """
    if callable(value):
        value = value(step)
    _check(option, value, f" at step {step}")
    return value


def form_of(damping: Damping | LevenbergMarquardt) -> Damping:
    """The damping itself, of an adaptive one its present form (:ref:`damp-adaptive`).

    Example:
        >>> form_of(LevenbergMarquardt(Exact(0.1)))
        Exact(delta=0.1)
    """
    return damping.damping if isinstance(damping, LevenbergMarquardt) else damping


def require_exact(damping: Any, where: str = "") -> None:
    """Refuse a damping of two factors where the eigenvalues are free.

    See :ref:`ekfac-preconditioner`.

    Args:
        damping: The damping, or a schedule, which is let through.
        where: Says when, for the message.

    Raises:
        TypeError: If it is not exact, nor adapts an exact one.

    Example:
        >>> require_exact(LevenbergMarquardt(Exact(0.1)))
    """
    schedule = callable(damping) and not isinstance(damping, type)
    if not schedule and not isinstance(form_of(damping), Exact):
        raise TypeError(
            f"damping={damping!r}{where} damps two factors, but approximation='ekfac' has free "
            "eigenvalues. Use Exact(delta), which adds δ to each, or "
            "LevenbergMarquardt(Exact(delta))."
        )


def _check(option: str, value: Any, where: str = "") -> None:
    number = isinstance(value, Real) and not isinstance(value, bool)
    whole = number and isinstance(value, Integral) and int(value) >= 1
    good, hint = {
        "damping": (
            hasattr(value, "inverse") and hasattr(value, "delta") and not isinstance(value, type),
            "an object such as Exact(1e-3)",
        ),
        "factor_every": (whole, "a positive integer"),
        "inverse_every": (whole, "a positive integer"),
        "ema": (number and 0 <= value < 1, "a number from 0 up to, but not, 1"),
        "kl_clip": (value is None or (number and 0 < value < inf), "a positive number, or None"),
        "lr": (
            (value is None and not where) or (number and 0 <= value < inf),
            "the optimizer's learning rate, a number that is not negative",
        ),
    }[option]
    if not good:
        error = TypeError if option == "damping" else ValueError
        raise error(f"{option}={value!r}{where}: use {hint}, or a function of the step.")
