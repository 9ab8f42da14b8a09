"""Inverting A ⊗ B + δ I: the three ways that are in use, and a δ that adapts.

δ is stated for the mean loss; a sum loss takes N·δ. Explained in the chapter :ref:`damping`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf, isfinite
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from kfac_lib.kronecker import Damping, EigenKronecker, Element, Kronecker


@dataclass(frozen=True)
class _Delta:
    delta: float

    def __post_init__(self) -> None:
        if not isinstance(self.delta, Real) or not 0 <= self.delta < inf:
            raise ValueError(f"delta={self.delta!r}: damping is a finite number, zero or more.")


class Exact(_Delta):
    """(A ⊗ B + δ I)⁻¹ itself, by eigenvalues 1/(λ_A λ_B + δ) (:ref:`damp-exact`).

    Args:
        delta: δ ≥ 0; zero needs factors that are not singular.

    Raises:
        ValueError: If δ is negative or not finite.

    Example:
        >>> K = Kronecker(torch.eye(2), torch.eye(3))
        >>> K.inverse(Exact(1.0)).eigenvalues[0].tolist()
        [0.5, 0.5]
    """

    def inverse(self, kronecker: Kronecker | EigenKronecker) -> EigenKronecker:
        """Return the damped inverse, in the eigenbasis of the factors.

        An element that is decomposed already is taken as it is: another δ then costs no further
        decomposition.

        Raises:
            ValueError: If a factor holds NaN or inf, or is singular and δ is zero.
        """
        _check_finite(kronecker)
        eigen = kronecker if isinstance(kronecker, EigenKronecker) else kronecker.eigh()
        if self.delta < torch.finfo(eigen.eigenvalues.dtype).tiny:
            _check_regular(eigen.eigenvalues)
        inverted = eigen.eigenvalues.clamp(min=0).add_(self.delta).reciprocal_()
        return EigenKronecker(eigen.Q_A, eigen.Q_B, inverted)


class Factored(_Delta):
    """(A + π√δ I)⁻¹ ⊗ (B + (√δ/π) I)⁻¹ with π² = mean eigenvalue of A over that of B.

    See :ref:`damp-factored`. What is inverted exceeds A ⊗ B + δI in the Loewner order, and does
    not depend on whether the reduction factor R sits in A or in B.

    Args:
        delta: δ ≥ 0; zero needs factors that are not singular.

    Raises:
        ValueError: If δ is negative or not finite.

    Example:
        >>> K = Kronecker(4 * torch.eye(2), torch.eye(3))
        >>> inverse = K.inverse(Factored(1.0))
        >>> round(inverse.A[0, 0].item(), 4), round(inverse.B[0, 0].item(), 4)
        (0.1667, 0.6667)
    """

    def inverse(self, kronecker: Kronecker | EigenKronecker) -> Kronecker:
        """Return the damped inverse, a Kronecker product.

        Raises:
            ValueError: If a factor holds NaN or inf, or is singular even when damped.
            TypeError: If the element has no two factors, as that of EKFAC.
        """
        A, B = _two_factors(kronecker, self)
        mean_A, mean_B = (A if A.ndim == 1 else A.diagonal()).mean(), B.diagonal().mean()
        # The roots first: the quotient of the means may overflow.
        usable = float(mean_A) > 0 and float(mean_B) > 0
        pi = mean_A.sqrt() / mean_B.sqrt() if usable else 1.0
        root = self.delta**0.5
        return Kronecker(_shift(A, pi * root), _shift(B, root / pi)).inverse()  # type: ignore[return-value]


class Plain(_Delta):
    """(A + δ I)⁻¹ ⊗ (B + δ I)⁻¹: the same δ on both factors (:ref:`damp-plain`).

    Depends on where the reduction factor sits, and under-damps where λ_A + λ_B < 1 − δ. Here to
    be compared with, not recommended.

    Args:
        delta: δ ≥ 0; zero needs factors that are not singular.

    Raises:
        ValueError: If δ is negative or not finite.

    Example:
        >>> inverse = Kronecker(torch.eye(2), torch.eye(3)).inverse(Plain(1.0))
        >>> round(inverse.A[0, 0].item(), 4), round(inverse.B[0, 0].item(), 4)
        (0.5, 0.5)
    """

    def inverse(self, kronecker: Kronecker | EigenKronecker) -> Kronecker:
        """Return the damped inverse, a Kronecker product.

        Raises:
            ValueError: If a factor holds NaN or inf, or is singular even when damped.
            TypeError: If the element has no two factors, as that of EKFAC.
        """
        A, B = _two_factors(kronecker, self)
        return Kronecker(_shift(A, self.delta), _shift(B, self.delta)).inverse()  # type: ignore[return-value]


class LevenbergMarquardt:
    """Damping whose δ adapts to how well the damped quadratic model predicts the loss.

    See :ref:`damp-adaptive`. Usable wherever a damping is. After a step, ρ is the decrease of the
    loss over the decrease that the model had promised
    (:func:`~kfac_lib.quadratic.predicted_decrease`). Where ρ is low the model was not to be
    trusted, and δ is multiplied by ``factor``; where it is high, δ is divided by it (Moré 1978;
    Martens and Grosse 2015, section 6.5).

    Args:
        damping: Form and first δ: :class:`Exact`, :class:`Factored` or :class:`Plain`.
        factor: By which δ changes, greater than 1; Martens and Grosse use (20/19)⁵ where ρ is
            computed every fifth step.
        lower: ρ below it makes δ grow.
        upper: ρ above it makes δ shrink.
        minimum: Smallest δ, positive: from zero no factor leads back.
        maximum: Largest δ.

    Raises:
        TypeError: If ``damping`` is not one of the three forms.
        ValueError: If a number is out of its range.

    Example:
        >>> damping = LevenbergMarquardt(Exact(0.1), factor=2.0)
        >>> damping.update(actual=0.1, predicted=1.0), damping.update(actual=0.9, predicted=1.0)
        (0.2, 0.1)
    """

    def __init__(
        self,
        damping: Exact | Factored | Plain,
        *,
        factor: float = (20 / 19) ** 5,
        lower: float = 0.25,
        upper: float = 0.75,
        minimum: float = 1e-8,
        maximum: float = 1e8,
    ) -> None:
        if not isinstance(damping, _Delta):
            raise TypeError(
                f"damping={damping!r} has no δ to adapt. Give Exact(delta), Factored(delta) or "
                "Plain(delta)."
            )
        if not 1 < factor < inf:
            raise ValueError(f"factor={factor!r}: use a finite number greater than 1.")
        if not 0 <= lower < upper < inf:
            raise ValueError(f"lower={lower!r}, upper={upper!r}: use 0 ≤ lower < upper.")
        if not 0 < minimum <= maximum < inf:
            raise ValueError(
                f"minimum={minimum!r}, maximum={maximum!r}: use 0 < minimum ≤ maximum."
            )
        self.factor, self.lower, self.upper = factor, lower, upper
        self.minimum, self.maximum = minimum, maximum
        self._check_bounds(damping.delta)
        self.damping = damping

    @property
    def delta(self) -> float:
        """The present δ."""
        return self.damping.delta

    def inverse(self, kronecker: Kronecker | EigenKronecker) -> Kronecker | EigenKronecker:
        """Return the damped inverse, with the present δ."""
        return self.damping.inverse(kronecker)

    def update(self, actual: float | Tensor, predicted: float | Tensor) -> float:
        """Adapt δ after a step and return it.

        A step after which the loss is not finite, or for which no decrease was predicted (zero,
        negative, NaN or inf), is a bad one: δ grows.

        Args:
            actual: Loss before the step minus loss after it, on the same data.
            predicted: Decrease of the damped quadratic model.

        Returns:
            The new δ.
        """
        actual, predicted = (
            float(value.detach() if isinstance(value, Tensor) else value)
            for value in (actual, predicted)
        )
        usable = isfinite(actual) and isfinite(predicted) and predicted > 0
        rho = actual / predicted if usable else -inf
        delta = self.delta
        if rho < self.lower:
            delta = min(delta * self.factor, self.maximum)
        elif rho > self.upper:
            delta = max(delta / self.factor, self.minimum)
        self.damping = replace(self.damping, delta=delta)
        return delta

    def state_dict(self) -> dict[str, Any]:
        """Return form and δ, all that changes, as plain Python values."""
        return {"form": type(self.damping).__name__, "delta": self.delta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take δ from a state.

        Raises:
            ValueError: If it is no state of this class, of another form of damping, or its δ is
                out of bounds.
        """
        if not {"form", "delta"} <= set(state):
            raise ValueError(
                f"The state holds {sorted(state)}, not 'form' and 'delta'. Give what "
                "LevenbergMarquardt.state_dict() returned."
            )
        form = type(self.damping).__name__
        if state["form"] != form:
            raise ValueError(f"The state is that of {state['form']} damping, this one is {form}.")
        self._check_bounds(state["delta"])
        self.damping = replace(self.damping, delta=state["delta"])

    def __repr__(self) -> str:
        return f"LevenbergMarquardt({self.damping!r})"

    def _check_bounds(self, delta: float) -> None:
        if not self.minimum <= delta <= self.maximum:
            raise ValueError(
                f"delta={delta!r} is not between minimum={self.minimum!r} and "
                f"maximum={self.maximum!r}. Start within the bounds, or widen them."
            )


def layer_inverse(name: str, element: Element, damping: Damping) -> Element:
    """The damped inverse of one layer's element; an error names the layer (:ref:`damping`).

    Args:
        name: The layer's name.
        element: Its element; decomposed only where the damping takes that, as :class:`Exact`.
        damping: How to damp.

    Raises:
        ValueError: If there is no inverse; the message names layer and factor.
        TypeError: If the damping needs two factors, and the element has none.

    Example:
        >>> layer_inverse("fc", Kronecker(torch.zeros(2, 2), torch.eye(3)), Factored(0.0))
        Traceback (most recent call last):
        ValueError: Layer 'fc': Factor A of shape (2, 2) is singular to machine precision, ...
    """
    try:
        return element.inverse(damping)
    except ValueError as error:
        raise ValueError(f"Layer {name!r}: {error}") from error


def _two_factors(kronecker: Kronecker | EigenKronecker, damping: Damping) -> tuple[Tensor, Tensor]:
    if not isinstance(kronecker, Kronecker):
        raise TypeError(
            f"{damping!r} damps two factors, but a {type(kronecker).__name__} has free "
            "eigenvalues, not two factors. Use Exact(delta), which adds δ to each."
        )
    _check_finite(kronecker)
    return kronecker.A, kronecker.B


def _shift(factor: Tensor, delta: Tensor | float) -> Tensor:
    if factor.ndim == 1:
        return factor + delta
    shifted = factor.clone()
    shifted.diagonal().add_(delta)
    return shifted


def _check_finite(kronecker: Kronecker | EigenKronecker) -> None:
    for name, part in vars(kronecker).items():
        # A finite sum has no hidden NaN or inf; a sum may overflow, then the entries decide.
        if part is None or isfinite(part.detach().sum().item()):
            continue
        if not bool(torch.isfinite(part).all()):
            raise ValueError(
                f"Factor {name} of shape {tuple(part.shape)} holds NaN or inf, so there is no "
                "inverse. Look at the data and parameters that it was computed from."
            )


def _check_regular(eigenvalues: Tensor) -> None:
    """Refuse what is singular to machine precision, by the eigenvalues λ_B λ_Aᵀ."""
    eps = torch.finfo(eigenvalues.dtype).eps
    # Up to a constant, the sums over one factor are the eigenvalues of the other.
    for name, of_factor in (("A", eigenvalues.sum(0)), ("B", eigenvalues.sum(1))):
        if bool(of_factor.min() <= of_factor.max() * len(of_factor) * eps):
            shape = (len(of_factor), len(of_factor))
            raise ValueError(
                f"Factor {name} of shape {shape} is singular to machine precision, as factors of "
                "real data often are. Damp, with delta > 0: Exact(1e-3)."
            )
    if not bool((eigenvalues > 0).all()):
        raise ValueError(
            "An eigenvalue is not positive, so there is no inverse. Damp, with delta > 0: "
            "Exact(1e-3)."
        )
