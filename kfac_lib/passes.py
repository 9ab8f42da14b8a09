"""Passes over one batch, and over the newest one again.

Explained in the sections :ref:`damp-preconditioner` and :ref:`ekfac-preconditioner`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from kfac_lib.capture import Hooks
from kfac_lib.coverage import cover
from kfac_lib.ekfac import same_draws
from kfac_lib.estimates import Feed
from kfac_lib.fisher import Fisher
from kfac_lib.kfac import Accumulator
from kfac_lib.losses import Criterion
from kfac_lib.stream import stream


class _Batch(NamedTuple):
    X: Any
    y: Tensor
    drawn: Callable[[], None] | None


class Passes:
    """Runs a model on batches for accumulators, as long as its layers are those of the first time.

    See :ref:`damp-preconditioner`.

    Args:
        model: Network.
        criterion: The criterion.
        fisher: The flavour.
        chunk_size: How many vectors are backpropagated at once; all when None.
        layers: Names or patterns of the layers or parameters to take; all when None.
        ignore: Names or patterns to leave out.

    Raises:
        ValueError: If a name or pattern does not fit.
        NotImplementedError: For a layer that is not supported.

    Example:
        >>> import torch
        >>> from kfac_lib import Expand, TypeII
        >>> from kfac_lib.accumulate import FactorSums
        >>> from kfac_lib.losses import SquaredError
        >>> passes = Passes(nn.Linear(2, 3), SquaredError("mean"), TypeII())
        >>> sums = {"": FactorSums(Expand())}
        >>> passes.over(torch.ones(5, 2), torch.zeros(5, 3))(sums)
        >>> sums[""].count.N
        5
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        fisher: Fisher,
        chunk_size: int | None = None,
        layers: Sequence[str] | str | None = None,
        ignore: Sequence[str] | str = (),
    ) -> None:
        self.model, self.criterion, self.fisher = model, criterion, fisher
        self.chunk_size = chunk_size
        self._selection = layers, ignore
        self.coverage = cover(model, layers, ignore)
        self._newest: _Batch | None = None

    def over(self, X: Any, y: Tensor) -> Feed:
        """Return a pass over a batch, as a function of the accumulators that see its rows."""

        def feed(accumulators: Mapping[str, Accumulator]) -> None:
            if cover(self.model, *self._selection) != self.coverage:
                raise ValueError(
                    "The model's layers, or which of its parameters are trainable, have changed "
                    "since the preconditioner was made. Make a new one after such a change."
                )
            for name, rows in stream(
                Hooks(self.model, self.coverage),
                self.criterion,
                self.fisher,
                [(X, y)],
                chunk_size=self.chunk_size,
            ):
                accumulators[name].update(rows)

        return feed

    def keep(self, X: Any, y: Tensor, drawn: Callable[[], None] | None) -> None:
        """Keep a reference to the newest batch.

        Args:
            X: Inputs.
            y: Targets.
            drawn: Goes back to where the random vectors of its first pass were drawn; None if
                there was no pass yet.
        """
        self._newest = _Batch(X, y, drawn)

    def forget(self) -> None:
        """Let the newest batch go."""
        self._newest = None

    def again(self) -> Feed | None:
        """Return a pass over the newest batch, with the vectors of its first; None without one."""
        batch = self._newest
        if batch is None:
            return None
        feed, drawn = self.over(batch.X, batch.y), batch.drawn
        if drawn is None:
            return feed

        def feed_again(accumulators: Mapping[str, Accumulator]) -> None:
            go_on = same_draws(self.fisher)
            drawn()
            try:
                feed(accumulators)
            finally:
                go_on()

        return feed_again
