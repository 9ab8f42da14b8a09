"""EKFAC: KFAC's eigenbasis, with the eigenvalues that the curvature has in it.

Derived in the chapter :ref:`ekfac`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfac_lib.accumulate import Choice, EigenSums, Expand, Sharing, bases_of, sharing_of
from kfac_lib.fisher import Fisher, TypeII, require_vectors
from kfac_lib.kfac import (
    Bias,
    Blocks,
    Held,
    accumulate,
    described,
    factor_sums,
    of_part_of,
    parts_of,
    require_finite,
    source_of,
)
from kfac_lib.kronecker import BlockDiagonal, EigenKronecker, element
from kfac_lib.losses import Criterion, criterion_of
from kfac_lib.rows import Count, Rows
from kfac_lib.stream import Data, is_pair, repeated


class EKFAC(Blocks[EigenKronecker | BlockDiagonal]):
    """Eigenvalue-corrected KFAC: layer name → :class:`~kfac_lib.EigenKronecker`.

    Derived in the chapter :ref:`ekfac`. Made by :meth:`compute`; the layers stand in the model's
    order. A grouped convolution has a :class:`~kfac_lib.kronecker.BlockDiagonal`. Of all matrices
    that are diagonal in KFAC's eigenbasis it is the nearest to the exact block, and it has the
    block's trace.

    Example:
        >>> torch.manual_seed(0)
        <...>
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> X, y = torch.randn(8, 4), torch.randint(2, (8,))
        >>> ekfac = EKFAC.compute(net, nn.CrossEntropyLoss(), (X, y))
        >>> ekfac["0"].shape, ekfac["2"].shape
        ((3, 5), (2, 4))
    """

    @classmethod
    def compute(
        cls,
        model: nn.Module | Callable[..., Tensor],
        loss_func: nn.Module | Criterion,
        data: Data,
        fisher: Fisher = TypeII(),
        sharing: Choice = Expand(),
        chunk_size: int | None = None,
        layers: Sequence[str] | str | None = None,
        ignore: Sequence[str] | str = (),
        *,
        bias: Bias = "joint",
        params: Mapping[str, Tensor] | None = None,
    ) -> "EKFAC":
        """Compute eigenbasis and corrected eigenvalues of every layer (:ref:`ekfac-correction`).

        Two passes over the data (one, if they are one batch whose rows fit into 64 MiB): for KFAC's
        factors A = Q_A Λ_A Q_Aᵀ and B = Q_B Λ_B Q_Bᵀ, and for λ = R Σ_{n,v} [Q_Bᵀ P_{n,v} Q_A]²,
        with P_{n,v} = Σ_s g x̃ᵀ. Random flavours draw the same vectors in both. No P is kept longer
        than it takes to square it.

        Args:
            model: Network of supported layers; with ``params`` a function f(params, X), or a
                network that is traced.
            loss_func: A supported loss of torch, or a criterion.
            data: One pair (X, y), or an iterable of them that can be passed twice; axis 0 is the
                datum.
            fisher: Flavour: any but :class:`~kfac_lib.InputOnly`.
            sharing: As in :meth:`KFAC.compute <kfac_lib.KFAC.compute>`; it decides the basis. The
                eigenvalues are those of the exact block, whatever the sharing.
            chunk_size: How many vectors are backpropagated at once; what fits into 64 MiB when
                not given (:ref:`speed-memory`).
            layers: Names or patterns of the layers or parameters to take; all when not given.
            ignore: Names or patterns to leave out.
            bias: ``"joint"`` or ``"separate"``, as in :meth:`KFAC.compute <kfac_lib.KFAC.compute>`.
            params: The parameters by name, for a function or a network that hooks cannot follow.

        Returns:
            A mapping from layer name to elements, in the dtype and on the device of the model.

        Raises:
            ValueError: For bad data, options or patterns, data that can be passed only once or
                differ between the passes, or a flavour without vectors.
            TypeError: If model, loss or data are of the wrong kind.
            NotImplementedError: For a layer or a loss that is not supported.

        Source: George, Laurent, Bouthillier, Ballas, Vincent, *Fast Approximate Natural Gradient
        Descent in a Kronecker-factored Eigenbasis*, 2018.
        """
        require_vectors(fisher)
        require_two_passes(data)
        source, data = source_of(model, data, params, layers, ignore)
        criterion = criterion_of(loss_func)
        choice = sharing_of(sharing, list(source.coverage.layers))
        parts = {name: parts_of(source.coverage, name, bias) for name in choice}
        rewind = same_draws(fisher, data)
        data = repeated(data, in_order=hasattr(fisher, "generator"))
        # Where the rows of one batch fit into memory together, there is no need to run it again.
        held = Held() if is_pair(data) and chunk_size is None else None
        factors = factor_sums(source, criterion, data, fisher, choice, chunk_size, held)
        sums: dict[str, _OfLayer] = {}
        of_part: dict[str, Sharing] = {}
        for name in list(factors):
            A, B = require_finite(name, *factors.pop(name).finish(criterion))
            sums[name] = _OfLayer(
                {
                    key: EigenSums(bases_of(element(of_part_of(A, part), B)), part)
                    for key, part in parts[name].items()
                }
            )
            of_part |= dict.fromkeys(parts[name], choice[name])
        if held is not None and held.rows is not None:
            for name, rows in held.rows:
                sums[name].update(rows)
        else:
            rewind()
            accumulate(sums, source, criterion, data, fisher, chunk_size)
        return cls(
            {key: one.finish(criterion) for of in sums.values() for key, one in of.parts.items()},
            fisher=fisher,
            sharing=described(sharing, of_part),
            frozen=source.coverage.frozen,
            ignored=source.coverage.ignored,
        )


def require_two_passes(data: Data) -> None:
    """Refuse data that can be passed only once (:ref:`ekfac-cost`).

    Raises:
        ValueError: If they are an iterator, such as a generator.

    Example:
        >>> require_two_passes((torch.ones(5, 2), torch.zeros(5, 3)))
    """
    if isinstance(data, Iterator):
        raise ValueError(
            f"The data are a {type(data).__name__}, which can be passed only once, and two passes "
            "are needed. Give a list of batches, a DataLoader, or one pair (X, y)."
        )


def same_draws(fisher: Fisher, data: Data = None) -> Callable[[], None]:
    """Remember where the random numbers of a flavour stand (:ref:`ekfac-pythagoras`).

    Args:
        fisher: A flavour; without randomness nothing is remembered.
        data: The data; a loader that shuffles is to do it in the same way again.

    Returns:
        A function that goes back to this place, so that the same vectors are drawn again, for the
        same data.

    Example:
        >>> from kfac_lib import MonteCarlo
        >>> generator = torch.Generator().manual_seed(0)
        >>> rewind = same_draws(MonteCarlo(generator=generator))
        >>> first = torch.rand(2, generator=generator)
        >>> rewind()
        >>> torch.equal(first, torch.rand(2, generator=generator))
        True
    """
    if not hasattr(fisher, "generator"):
        return lambda: None
    holders = (fisher, data, getattr(data, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    generators = {id(g): g for g in found if isinstance(g, torch.Generator)}.values()
    states = [(g, g.get_state()) for g in generators]
    cpu, others = torch.get_rng_state(), torch.cuda.get_rng_state_all()

    def rewind() -> None:
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(others)
        for generator, state in states:
            generator.set_state(state)

    return rewind


@dataclass
class _OfLayer:
    """The sums of one layer: of [W b], or of weight and bias each by itself."""

    parts: dict[str, EigenSums]

    def update(self, rows: Rows) -> None:
        for sums in self.parts.values():
            sums.update(rows)

    @property
    def count(self) -> Count:
        return next(iter(self.parts.values())).count
