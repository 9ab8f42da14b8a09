"""How far a preconditioned step is from the exact damped Gauss-Newton step.

Explained in the section :ref:`diag-step`. No matrix is formed: the exact step is found by conjugate
gradients, one product with the GGN each.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfac_lib.autodiff import ggnvp, twice_differentiable
from kfac_lib.coverage import Coverage
from kfac_lib.damping import Exact, layer_inverse
from kfac_lib.gradients import parameters_of
from kfac_lib.kronecker import Damping, Element
from kfac_lib.layers import as_matrix, from_matrix
from kfac_lib.losses import Criterion
from kfac_lib.stream import Data, batches

Vectors = tuple[Tensor, ...]


@dataclass(frozen=True)
class StepComparison:
    """A step beside the exact one, −(G + δ I)⁻¹ g (:ref:`diag-step`).

    Args:
        cosine: Of the angle between the two; 1 where the directions agree.
        decrease: Of the damped quadratic model, as a share of the decrease of the exact step; 1 is
            the most, negative where the step goes uphill.
        best_decrease: The same with the step's best length along its direction.

    Example:
        >>> StepComparison(cosine=0.9, decrease=-0.5, best_decrease=0.8).best_decrease
        0.8
    """

    cosine: float
    decrease: float
    best_decrease: float


class QuadraticModel:
    """Gradient and GGN products of the loss over all data, for the covered parameters.

    See :ref:`diag-step`.

    Args:
        model: Network.
        criterion: The criterion.
        data: One pair (X, y), or an iterable of them that can be passed many times.
        coverage: Which parameters.

    Example:
        >>> from kfac_lib.coverage import cover
        >>> from kfac_lib.losses import SquaredError
        >>> net = nn.Linear(1, 1, bias=False)
        >>> data = torch.ones(5, 1), torch.zeros(5, 1)
        >>> quadratic = QuadraticModel(net, SquaredError("mean"), data, cover(net))
        >>> quadratic.product((torch.ones(1, 1),))[0].item()
        2.0
    """

    def __init__(
        self, model: nn.Module, criterion: Criterion, data: Data, coverage: Coverage
    ) -> None:
        self.model, self.criterion, self.data, self.coverage = model, criterion, data, coverage
        of_layers = {name: parameters_of(coverage, name) for name in coverage.layers}
        self.parameters = [p for of_layer in of_layers.values() for p in of_layer]
        self._number = {name: len(of_layer) for name, of_layer in of_layers.items()}
        self._R = 0.0

    def gradient(self) -> Vectors:
        """Return the gradient of the loss, for each parameter."""
        denominator = 0.0

        def of_batch(c: Tensor, f: Tensor, y: Tensor) -> Vectors:
            nonlocal denominator
            denominator += self.criterion.denominator(f, y)
            return torch.autograd.grad(c, self.parameters)

        total = self._sum(of_batch)
        self._R = self.criterion.reduction_factor(denominator)
        return tuple(self._R * g for g in total)

    def product(self, v: Vectors) -> Vectors:
        """Return G v."""
        if not self._R:
            self.gradient()
        total = self._sum(lambda c, f, y: ggnvp(c, f, self.parameters, v))
        return tuple(self._R * Gv for Gv in total)

    def preconditioned(
        self, elements: Mapping[str, Element], gradient: Vectors, damping: Damping
    ) -> Vectors:
        """Return the damped inverse of each layer times its gradient."""
        inverses = {name: layer_inverse(name, K, damping) for name, K in elements.items()}
        return self.applied(inverses, gradient)

    def applied(self, elements: Mapping[str, Element], gradient: Vectors) -> Vectors:
        """Return the element of each layer times its gradient."""
        steps: list[Tensor] = []
        given = iter(gradient)
        for name, layer in self.coverage.layers.items():
            assert isinstance(layer, nn.Module)
            parts = [next(given) for _ in range(self._number[name])]
            joint = torch.cat([as_matrix(layer, part) for part in parts], dim=1)
            step = elements[name] @ joint
            widths = [as_matrix(layer, part).shape[1] for part in parts]
            for part, matrix in zip(parts, torch.split(step, widths, dim=1), strict=True):
                steps.append(from_matrix(layer, matrix, part.shape))
        return tuple(steps)

    def _sum(self, of_batch: Callable[[Tensor, Tensor, Tensor], Any]) -> Vectors:
        total: Vectors | None = None
        for X, y in batches(self.data):
            with twice_differentiable():
                f = self.model(X)
                c = self.criterion.value(f, y)
                found = of_batch(c, f, y)
            total = found if total is None else tuple(map(torch.add, total, found))
        assert total is not None
        return tuple(t.detach() for t in total)


def conjugate_gradients(
    product: Callable[[Vectors], Vectors],
    b: Vectors,
    tolerance: float = 1e-6,
    most: int = 1000,
    truncate: bool = False,
) -> Vectors:
    """Solve M x = b for a symmetric positive definite M, given its products (:ref:`diag-step`).

    Args:
        product: v ↦ M v.
        b: Right-hand side, a tuple of tensors.
        tolerance: Stop once ‖b − M x‖ is this small beside ‖b‖.
        most: Most products.
        truncate: Whether to stop there with what is found, which is a descent direction too,
            rather than to raise.

    Returns:
        The solution, in the shapes of b.

    Raises:
        ValueError: If the tolerance is not reached, unless truncated.

    Example:
        >>> (x,) = conjugate_gradients(lambda v: (2 * v[0],), (torch.ones(3),))
        >>> x.tolist()
        [0.5, 0.5, 0.5]
    """
    x, r = tuple(map(torch.zeros_like, b)), b
    p, rr = r, dot(r, r)
    limit = tolerance**2 * rr
    for _ in range(most):
        if rr <= limit:
            return x
        Mp = product(p)
        alpha = rr / dot(p, Mp)
        x = added(x, p, alpha)
        r = added(r, Mp, -alpha)
        rr, before = dot(r, r), rr
        p = added(r, p, rr / before)
    if truncate or rr <= limit:
        return x
    raise ValueError(
        f"Conjugate gradients did not reach {tolerance:g} within {most} products; they are at "
        f"{(rr / dot(b, b)) ** 0.5:.2g}. Use more damping, for example Exact(1e-2)."
    )


def compare_steps(
    quadratic: QuadraticModel,
    elements: Mapping[str, Mapping[str, Element]],
    damping: Exact,
) -> dict[str, StepComparison]:
    """Compare preconditioned steps, and the gradient's, with the exact one (:ref:`diag-step`).

    Args:
        quadratic: The loss.
        elements: For each approximation its elements by layer.
        damping: δ of the exact step and of all others.

    Returns:
        For each approximation, and ``"gradient"``, the comparison.

    Raises:
        ValueError: If the gradient is zero, or there is no inverse.

    Example:
        >>> from kfac_lib import KFAC
        >>> from kfac_lib.coverage import cover
        >>> from kfac_lib.losses import criterion_of
        >>> net, loss = nn.Linear(2, 3), nn.MSELoss()
        >>> data = torch.ones(5, 2), torch.zeros(5, 3)
        >>> kfac = KFAC.compute(net, loss, data)
        >>> quadratic = QuadraticModel(net, criterion_of(loss), data, cover(net))
        >>> found = compare_steps(quadratic, {"KFAC": kfac}, Exact(0.1))
        >>> round(found["KFAC"].decrease, 4)
        1.0
    """
    g = quadratic.gradient()
    if dot(g, g) == 0:
        raise ValueError("The gradient is zero: there is no step to compare.")

    def damped(v: Vectors) -> Vectors:
        return added(quadratic.product(v), v, damping.delta)

    exact = conjugate_gradients(damped, g)
    most = 0.5 * dot(g, exact)
    steps = {
        name: quadratic.preconditioned(of_layers, g, damping)
        for name, of_layers in elements.items()
    } | {"gradient": g}
    found = {}
    for name, s in steps.items():
        slope, bend = dot(g, s), dot(s, damped(s))
        found[name] = StepComparison(
            cosine=dot(s, exact) / (dot(s, s) * dot(exact, exact)) ** 0.5,
            decrease=(slope - 0.5 * bend) / most,
            best_decrease=0.5 * slope**2 / bend / most if slope > 0 else 0.0,
        )
    return found


def dot(a: Vectors, b: Vectors) -> float:
    """Inner product of two tuples of tensors (:ref:`diag-step`).

    Example:
        >>> dot((torch.ones(2), torch.ones(3)), (torch.ones(2), torch.ones(3)))
        5.0
    """
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def added(a: Vectors, b: Vectors, scale: float) -> Vectors:
    """Return a + scale · b, tensor by tensor (:ref:`diag-step`).

    Example:
        >>> added((torch.ones(1),), (torch.ones(1),), 2.0)[0].item()
        3.0
    """
    return tuple(torch.add(x, y, alpha=scale) for x, y in zip(a, b, strict=True))
