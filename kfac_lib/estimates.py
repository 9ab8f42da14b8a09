"""Running averages of curvature over batches: what they have in common, and that of KFAC.

Explained in the section :ref:`damp-preconditioner`. What is averaged are raw sums and counts, with
the weight (1−β) β^(t−i) for batch i at step t; the constants are applied once, at the end. An
average is never changed but replaced by the next one, so that nothing is half done after an error.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, TypeVar

from kfac_lib.accumulate import FactorSums
from kfac_lib.coverage import Coverage
from kfac_lib.gradients import parameters_of
from kfac_lib.kfac import Accumulator, require_finite
from kfac_lib.kronecker import Element, element
from kfac_lib.layers import lookup_of
from kfac_lib.losses import Criterion
from kfac_lib.rows import Count
from kfac_lib.saved import check_tensors, shape_of_group

Feed = Callable[[Mapping[str, Accumulator]], None]
"""Runs the model on a batch and gives every layer's rows to its accumulator."""


class Estimate(Protocol):
    """A running average over batches, and the elements that follow (:ref:`damp-preconditioner`)."""

    corrected: ClassVar[bool]
    """Whether eigenvalues are corrected: they move with every batch, within a basis that is
    renewed more rarely, by a further pass over a batch."""

    @property
    def weight(self) -> float:
        """Sum of the weights of all batches; zero before the first."""

    @property
    def ready(self) -> bool:
        """Whether there are elements."""

    def updated(self, feed: Feed, beta: float) -> "Estimate | None":
        """Return the average with a further batch; None if no datum of it counts."""

    def renewed(self, criterion: Criterion, feed: Feed | None, beta: float) -> "Estimate | None":
        """Return the average in a new basis; None if that needs a batch, and none is there."""

    def elements(self, criterion: Criterion) -> dict[str, Element]:
        """Return the elements of all layers, those of one batch on average."""

    def state(self) -> dict[str, Any]:
        """Return weight and sums as plain containers of tensors and numbers."""

    def loaded(self, state: Mapping[str, Any], coverage: Coverage) -> "Estimate":
        """Return the average of a state, on the devices and in the dtypes of the weights."""


class Sums(Protocol):
    """Raw sums and counts of one layer (:ref:`kfac-batches`)."""

    def scaled(self, weight: float) -> Self:
        """Return them times a weight."""

    def merge(self, other: Self) -> None:
        """Add others."""


S = TypeVar("S", bound=Sums)


def averaged(mine: Mapping[str, S], batch: Mapping[str, S], beta: float) -> dict[str, S]:
    """β times an average plus 1−β times a batch, layer by layer (:ref:`damp-preconditioner`).

    Example:
        >>> import torch
        >>> from kfac_lib.accumulate import ExactBlocks
        >>> one = ExactBlocks("cvec")
        >>> one.sum, one.count = torch.ones(1, 1), Count(4, 4)
        >>> averaged({"fc": ExactBlocks("cvec")}, {"fc": one}, 0.75)["fc"].count
        Count(N=1.0, denominator=1.0)
    """
    result = {name: of_layer.scaled(1 - beta) for name, of_layer in batch.items()}
    for name, total in result.items():
        total.merge(mine[name].scaled(beta))
    return result


def averaged_weight(weight: float, beta: float) -> float:
    """The sum of the weights after a further batch (:ref:`damp-preconditioner`).

    Example:
        >>> averaged_weight(averaged_weight(0.0, 0.5), 0.5)
        0.75
    """
    return beta * weight + (1 - beta)


def any_counts(batch: Mapping[str, Accumulator]) -> bool:
    """Whether a datum counts: not all labels are ignored (:ref:`damp-preconditioner`).

    Example:
        >>> any_counts({})
        False
    """
    return any(of_layer.count.N for of_layer in batch.values())


@dataclass(frozen=True)
class FactorAverage:
    """The average of KFAC's factors A and B (:ref:`damp-preconditioner`).

    Args:
        sums: For each layer the weighted raw sums.
        weight: Sum of the weights.

    Example:
        >>> from kfac_lib import Expand
        >>> average = FactorAverage({"fc": FactorSums(Expand())})
        >>> average.weight, average.ready
        (0.0, False)
    """

    corrected: ClassVar[bool] = False
    sums: Mapping[str, FactorSums]
    weight: float = 0.0

    @property
    def ready(self) -> bool:
        """Whether there was a batch."""
        return self.weight > 0

    def fresh(self) -> dict[str, FactorSums]:
        """Return accumulators for one batch."""
        return {name: FactorSums(mine.sharing) for name, mine in self.sums.items()}

    def plus(self, batch: Mapping[str, FactorSums], beta: float) -> "FactorAverage":
        """Return the average with a batch that was accumulated.

        Raises:
            ValueError: If sums of the batch are not finite.
        """
        for name, of_layer in batch.items():
            require_finite(name, *(s for s in (of_layer.xx, of_layer.gg) if s is not None))
        sums = averaged(self.sums, batch, beta)
        return FactorAverage(sums, averaged_weight(self.weight, beta))

    def updated(self, feed: Feed, beta: float) -> "FactorAverage | None":
        """Return the average with a further batch; None if no datum of it counts."""
        feed(batch := self.fresh())
        return self.plus(batch, beta) if any_counts(batch) else None

    def renewed(self, criterion: Criterion, feed: Feed | None, beta: float) -> "FactorAverage":
        """Return the average as it is, which has no basis."""
        return self

    def elements(self, criterion: Criterion) -> dict[str, Element]:
        """Return A ⊗ B for each layer, one for each group of a grouped convolution."""
        return {
            name: element(*sums.scaled(1 / self.weight).finish(criterion))
            for name, sums in self.sums.items()
        }

    def state(self) -> dict[str, Any]:
        """Return weight and sums."""
        keys = ("S", "vectors", "xx", "gg")
        packed = {
            name: {key: getattr(sums, key) for key in keys} | {"count": tuple(sums.count)}
            for name, sums in self.sums.items()
        }
        return {"weight": self.weight, "sums": packed}

    def loaded(self, state: Mapping[str, Any], coverage: Coverage) -> "FactorAverage":
        """Return the average of a state.

        Raises:
            ValueError: If the shape of a factor is another one.
        """
        averages = self.fresh()
        for name, sums in averages.items():
            saved, ((D_out, D_in), G) = state["sums"][name], shape_of_group(coverage, name)
            groups = () if G == 1 else (G,)
            diagonal = [(D_in,)] if lookup_of(coverage.layers[name]) else []
            check_tensors(name, [saved["gg"]], [(*groups, D_out, D_out)], 1)
            check_tensors(name, [saved["xx"]], [*diagonal, (*groups, D_in, D_in)], 1)
            weight = parameters_of(coverage, name)[0]
            sums.S, sums.vectors = saved["S"], saved["vectors"]
            sums.count = Count(*saved["count"])
            sums.xx = None if saved["xx"] is None else saved["xx"].to(weight)
            sums.gg = None if saved["gg"] is None else saved["gg"].to(weight)
        return FactorAverage(averages, state["weight"])
