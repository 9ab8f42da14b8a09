"""Running averages beyond KFAC's factors: corrected eigenvalues, and nearest products.

Explained in the sections :ref:`ekfac-preconditioner` and :ref:`ekfac-nearest`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

from kfac_lib.accumulate import EigenSums, ExactBlocks, FactorSums, Sharing, bases_of
from kfac_lib.coverage import Coverage
from kfac_lib.estimates import (
    Estimate,
    FactorAverage,
    Feed,
    any_counts,
    averaged,
    averaged_weight,
)
from kfac_lib.gradients import parameters_of
from kfac_lib.kfac import Both, require_finite
from kfac_lib.kronecker import BlockDiagonal, Element, nearest_kronecker
from kfac_lib.losses import Criterion
from kfac_lib.rows import Count, Rows
from kfac_lib.saved import check_tensors, pack, shape_of_group, unpack, wide

Approximation = Literal["kfac", "ekfac", "nearest"]


@dataclass(frozen=True)
class EigenAverage:
    """The average of KFAC's factors, and in their basis that of EKFAC's eigenvalues.

    See :ref:`ekfac-preconditioner`. A sum of squares belongs to the basis in which it was taken.
    When the basis changes, the average over the batches before the newest is turned into the new
    one (:meth:`EigenSums.turned <kfac_lib.accumulate.EigenSums.turned>`), and the newest is run
    again and added, exact there.

    Args:
        factors: The average of the factors, of which the next basis is made.
        squares: For each layer the weighted raw sums of squares in the present basis; empty
            before the first.
        squares_weight: Sum of the weights of the batches in them.
        past: The same without the newest batch.
        past_weight: Sum of its weights.

    Example:
        >>> from kfac_lib import Expand
        >>> EigenAverage(FactorAverage({"fc": FactorSums(Expand())})).ready
        False
    """

    corrected: ClassVar[bool] = True
    factors: FactorAverage
    squares: Mapping[str, EigenSums] = field(default_factory=dict)
    squares_weight: float = 0.0
    past: Mapping[str, EigenSums] = field(default_factory=dict)
    past_weight: float = 0.0

    @property
    def weight(self) -> float:
        """Sum of the weights of the batches in the factors."""
        return self.factors.weight

    @property
    def ready(self) -> bool:
        """Whether there is a basis."""
        return bool(self.squares)

    def updated(self, feed: Feed, beta: float) -> "EigenAverage | None":
        """Return both averages with a further batch, by one pass; None if no datum counts."""
        batch = self.factors.fresh()
        squares = {name: EigenSums(mine.basis) for name, mine in self.squares.items()}
        feed(
            {
                name: Both((of_layer, squares[name])) if name in squares else of_layer
                for name, of_layer in batch.items()
            }
        )
        if not any_counts(batch):
            return None
        for name, of_layer in squares.items():
            require_finite(name, *(total.flatten() for total in of_layer.sums or ()))
        return EigenAverage(
            self.factors.plus(batch, beta),
            averaged(self.squares, squares, beta),
            averaged_weight(self.squares_weight, beta),
            {name: mine.scaled(beta) for name, mine in self.squares.items()},
            beta * self.squares_weight,
        )

    def renewed(
        self, criterion: Criterion, feed: Feed | None, beta: float
    ) -> "EigenAverage | None":
        """Return the average in the basis of the present factors.

        Args:
            criterion: The criterion.
            feed: Passes over the newest batch; None if it is not there any more.
            beta: Decay, for the weight of this batch.

        Returns:
            The average; None if there is no batch, or no datum of it counts, so that the present
            basis stays.

        Raises:
            ValueError: If there is no batch and no present basis either.
        """
        squares: dict[str, EigenSums] = {}
        if feed is not None:
            elements = self.factors.elements(criterion)
            squares = {name: EigenSums(bases_of(K)) for name, K in elements.items()}  # type: ignore[arg-type]
            feed(squares)
        if not any_counts(squares):
            if self.ready:
                return None
            raise ValueError(
                "The first eigenvalues of EKFAC need the newest batch, but its labels are all "
                "ignored, or it is not there, since the state was saved between update() and "
                "precondition(). Call update(X, y) with labels that count first."
            )
        for name, of_layer in squares.items():
            require_finite(name, *(total.flatten() for total in of_layer.sums or ()))
        past = {name: of_layer.turned(squares[name].basis) for name, of_layer in self.past.items()}
        totals = {name: of_layer.scaled(1 - beta) for name, of_layer in squares.items()}
        for name, of_layer in past.items():
            totals[name].merge(of_layer)
        weight = self.past_weight + 1 - beta
        return replace(self, squares=totals, squares_weight=weight, past=past)

    def elements(self, criterion: Criterion) -> dict[str, Element]:
        """Return the present basis with the present eigenvalues."""
        return {
            name: of_layer.scaled(1 / self.squares_weight).finish(criterion)
            for name, of_layer in self.squares.items()
        }

    def state(self) -> dict[str, Any]:
        """Return weights, sums, and the basis."""
        state = self.factors.state()
        for name, packed in state["sums"].items():
            mine = self.squares.get(name)
            past = self.past.get(name)
            packed["squares"] = mine and {
                "weight": self.squares_weight,
                "count": tuple(mine.count),
                "sums": mine.sums,
                "basis": pack(BlockDiagonal(mine.basis)),
                "past_weight": self.past_weight,
                "past_count": past and tuple(past.count),
                "past_sums": past and past.sums,
            }
        return state

    def loaded(self, state: Mapping[str, Any], coverage: Coverage) -> "EigenAverage":
        """Return the average of a state.

        Raises:
            ValueError: If a shape is another one.
        """
        squares, total = {}, 0.0
        past, past_total = {}, 0.0
        for name in self.factors.sums:
            saved = state["sums"][name]["squares"]
            if saved is None:
                continue
            weight = parameters_of(coverage, name)[0]
            shape, G = shape_of_group(coverage, name)
            check_tensors(name, saved["sums"], [shape], G)
            sums = EigenSums(bases_of(unpack(saved["basis"], weight)))  # type: ignore[arg-type]
            sums.count = Count(*saved["count"])
            sums.sums = [one.to(weight) for one in saved["sums"]]
            squares[name], total = sums, saved["weight"]
            if saved["past_sums"] is not None:
                check_tensors(name, saved["past_sums"], [shape], G)
                before = EigenSums(sums.basis)
                before.count = Count(*saved["past_count"])
                before.sums = [one.to(weight) for one in saved["past_sums"]]
                past[name], past_total = before, saved["past_weight"]
        return EigenAverage(self.factors.loaded(state, coverage), squares, total, past, past_total)


@dataclass(frozen=True)
class BlockAverage:
    """The average of the exact blocks, of which the nearest products are made.

    See :ref:`ekfac-nearest`. Memory grows with the square of a layer's number of parameters, or of
    those of one group; and a singular value decomposition of as many entries makes the product.

    Args:
        blocks: For each layer the weighted raw sums of its groups.
        shapes: For each layer the shape (D_out, D_in [+1]) of one group.
        weight: Sum of the weights.

    Example:
        >>> BlockAverage({"fc": GroupBlocks(1)}, {"fc": (2, 3)}).ready
        False
    """

    corrected: ClassVar[bool] = False
    blocks: Mapping[str, "GroupBlocks"]
    shapes: Mapping[str, tuple[int, int]]
    weight: float = 0.0

    @property
    def ready(self) -> bool:
        """Whether there was a batch."""
        return self.weight > 0

    def updated(self, feed: Feed, beta: float) -> "BlockAverage | None":
        """Return the average with a further batch; None if no datum of it counts."""
        batch = {name: GroupBlocks(len(mine.groups)) for name, mine in self.blocks.items()}
        feed(batch)
        if not any_counts(batch):
            return None
        for name, of_layer in batch.items():
            require_finite(name, *(g.sum for g in of_layer.groups if g.sum is not None))
        blocks = averaged(self.blocks, batch, beta)
        return BlockAverage(blocks, self.shapes, averaged_weight(self.weight, beta))

    def renewed(self, criterion: Criterion, feed: Feed | None, beta: float) -> "BlockAverage":
        """Return the average as it is, which has no basis."""
        return self

    def elements(self, criterion: Criterion) -> dict[str, Element]:
        """Return the nearest product of each layer, or of each group's own diagonal block."""
        elements: dict[str, Element] = {}
        for name, of_layer in self.blocks.items():
            nearest = [
                nearest_kronecker(wide(block.finish(criterion)), self.shapes[name], "rvec")
                for block in of_layer.scaled(1 / self.weight).groups
            ]
            elements[name] = nearest[0] if len(nearest) == 1 else BlockDiagonal(nearest)
        return elements

    def state(self) -> dict[str, Any]:
        """Return weight and sums."""
        packed = {
            name: {
                "count": tuple(of_layer.count),
                "blocks": [g.sum for g in of_layer.groups if g.sum is not None],
            }
            for name, of_layer in self.blocks.items()
        }
        return {"weight": self.weight, "sums": packed}

    def loaded(self, state: Mapping[str, Any], coverage: Coverage) -> "BlockAverage":
        """Return the average of a state.

        Raises:
            ValueError: If the shape of a block is another one.
        """
        blocks = {}
        for name in self.blocks:
            saved, ((D_out, D_in), G) = state["sums"][name], shape_of_group(coverage, name)
            check_tensors(name, saved["blocks"], [(D_out * D_in, D_out * D_in)], G)
            blocks[name] = GroupBlocks(G)
            for block, total in zip(blocks[name].groups, saved["blocks"], strict=False):
                block.sum = total.to(parameters_of(coverage, name)[0])
                block.count = Count(*saved["count"])
        return BlockAverage(blocks, self.shapes, state["weight"])


class GroupBlocks:
    """The exact blocks of one layer's groups, without those between groups (:ref:`share-groups`).

    Args:
        number: Number of groups.

    Example:
        >>> len(GroupBlocks(2).groups)
        2
    """

    def __init__(self, number: int) -> None:
        self.groups = [ExactBlocks("rvec") for _ in range(number)]

    @property
    def count(self) -> Count:
        """The counts of the data so far."""
        return self.groups[0].count

    def update(self, rows: Rows) -> None:
        """Add the rows of a batch, or of a further chunk of its vectors."""
        of_groups: Sequence[Rows] = rows.split()
        for block, of_group in zip(self.groups, of_groups, strict=True):
            block.update(of_group)

    def merge(self, other: "GroupBlocks") -> None:
        """Add the sums of another accumulator of the same layer, over other data."""
        for mine, theirs in zip(self.groups, other.groups, strict=True):
            mine.merge(theirs)

    def scaled(self, weight: float) -> "GroupBlocks":
        """Return sums and counts times a weight."""
        result = GroupBlocks(0)
        result.groups = [block.scaled(weight) for block in self.groups]
        return result


def estimate_of(
    approximation: Approximation, coverage: Coverage, sharing: Mapping[str, Sharing]
) -> Estimate:
    """The average that belongs to an approximation, before the first batch.

    See :ref:`ekfac-ladder`.

    Args:
        approximation: ``"kfac"``, ``"ekfac"`` or ``"nearest"``.
        coverage: The layers to take.
        sharing: Each layer's sharing.

    Raises:
        ValueError: If it is none of the three.

    Example:
        >>> from torch import nn
        >>> from kfac_lib import Expand
        >>> from kfac_lib.coverage import cover
        >>> type(estimate_of("ekfac", cover(nn.Linear(2, 3)), {"": Expand()})).__name__
        'EigenAverage'
    """
    if approximation not in get_args(Approximation):
        raise ValueError(f"approximation={approximation!r}: use 'kfac', 'ekfac' or 'nearest'.")
    if approximation == "nearest":
        of_groups = {name: shape_of_group(coverage, name) for name in coverage.layers}
        return BlockAverage(
            {name: GroupBlocks(G) for name, (_, G) in of_groups.items()},
            {name: shape for name, (shape, _) in of_groups.items()},
        )
    factors = FactorAverage({name: FactorSums(one) for name, one in sharing.items()})
    return EigenAverage(factors) if approximation == "ekfac" else factors
