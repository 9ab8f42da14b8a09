"""KFAC: for every layer a Kronecker product A ⊗ B in place of its curvature block.

Derived in the chapter :ref:`kfac`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from kfac_lib.accumulate import ExactBlocks, Expand, FactorSums, Sharing
from kfac_lib.capture import is_finite
from kfac_lib.coverage import Coverage, cover
from kfac_lib.damping import layer_inverse
from kfac_lib.fisher import Fisher, TypeII, flavours, require_vectors
from kfac_lib.flattening import Order, check_order
from kfac_lib.kronecker import Damping, Kronecker
from kfac_lib.losses import Criterion, criterion_of
from kfac_lib.stream import Data, stream

Accumulator = TypeVar("Accumulator", FactorSums, ExactBlocks)


class KFAC(Mapping[str, Kronecker]):
    """Kronecker-factored curvature of a network: layer name → :class:`~kfac_lib.Kronecker`.

    Derived in the chapter :ref:`kfac`. Made by :meth:`compute`; the layers stand in the model's
    order.

    Example:
        >>> torch.manual_seed(0)
        <...>
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> X, y = torch.randn(8, 4), torch.randint(2, (8,))
        >>> kfac = KFAC.compute(net, nn.CrossEntropyLoss(), (X, y))
        >>> kfac["0"].shape, kfac["2"].shape
        ((3, 5), (2, 4))
    """

    def __init__(
        self,
        factors: Mapping[str, Kronecker],
        *,
        fisher: Fisher,
        sharing: Sharing,
        frozen: Sequence[str] = (),
        ignored: Sequence[str] = (),
    ) -> None:
        self._factors = dict(factors)
        self.fisher = fisher
        self.sharing = sharing
        self.frozen = tuple(frozen)
        self.ignored = tuple(ignored)

    @classmethod
    def compute(
        cls,
        model: nn.Module,
        loss_func: nn.Module | Criterion,
        data: Data,
        fisher: Fisher = TypeII(),
        sharing: Sharing = Expand(),
        chunk_size: int | None = None,
        layers: Sequence[str] | str | None = None,
        ignore: Sequence[str] | str = (),
        *,
        bias: Literal["joint", "separate"] = "joint",
    ) -> "KFAC":
        """Compute the factors of every layer, over all data (:ref:`kfac-factors`).

        A is Σ x̃x̃ᵀ times the loss's reduction factor R, B is the mean of Σ_v g gᵀ over data and
        shared positions; :func:`kfac_lib.accumulate.constants` holds the table. The model, its
        gradients, hooks and mode stay as they are.

        Assumed, since it cannot be seen: axis 0 of every covered layer's input is the datum, and
        one datum's prediction depends on no other datum and on no random number. Modules that
        break this are refused; code inside a ``forward`` that does is not noticed.

        Args:
            model: Network of supported layers.
            loss_func: :class:`torch.nn.MSELoss`, :class:`torch.nn.CrossEntropyLoss` or
                :class:`torch.nn.BCEWithLogitsLoss`, with any of their options, or a criterion.
            data: One pair (X, y), or an iterable of them; axis 0 is the datum.
            fisher: Flavour: :class:`~kfac_lib.TypeII`, :class:`~kfac_lib.TypeI`,
                :class:`~kfac_lib.MonteCarlo`, :class:`~kfac_lib.Empirical`,
                :class:`~kfac_lib.RandomSigns` or :class:`~kfac_lib.InputOnly`.
            sharing: :class:`~kfac_lib.Expand` or :class:`~kfac_lib.Reduce`.
            chunk_size: How many vectors are backpropagated at once; all when not given. Smaller
                needs less memory.
            layers: Names or patterns of the layers or parameters to take; all when not given.
            ignore: Names or patterns to leave out.
            bias: ``"joint"``: one factor pair for [W b], under the layer's name. ``"separate"``:
                one for the weight and one for the bias, under the parameters' names.

        Returns:
            A mapping from layer name to factors, in the dtype and on the device of the model.

        Raises:
            ValueError: For bad data, options or patterns.
            TypeError: If model, loss or data are of the wrong kind.
            NotImplementedError: For a layer or a loss that is not supported; the message says
                what to do.
        """
        if bias not in ("joint", "separate"):
            raise ValueError(f"bias={bias!r}: use 'joint' or 'separate'.")
        check_kind("sharing", sharing, "rows", "Expand() or Reduce()")
        criterion = criterion_of(loss_func)
        coverage = cover(model, layers, ignore)
        sums = _accumulate(
            lambda: FactorSums(sharing), model, criterion, data, fisher, coverage, chunk_size
        )
        factors: dict[str, Kronecker] = {}
        for name, of_layer in sums.items():
            A, B = require_finite(name, *of_layer.finish(criterion))
            prefix = f"{name}." if name else ""
            if bias == "joint":
                factors[name] = Kronecker(A, B)
            elif name in coverage.biases:
                factors[f"{prefix}weight"] = Kronecker(A[:-1, :-1], B)
                factors[f"{prefix}bias"] = Kronecker(A[-1:, -1:], B)
            else:
                factors[f"{prefix}weight"] = Kronecker(A, B)
        return cls(
            factors,
            fisher=fisher,
            sharing=sharing,
            frozen=coverage.frozen,
            ignored=coverage.ignored,
        )

    def __getitem__(self, name: str) -> Kronecker:
        return self._factors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)

    def __repr__(self) -> str:
        lines = [f"KFAC({self.fisher}, {self.sharing})"]
        lines += [
            f"  {name or '(root)'}: A {tuple(K.A.shape)}, B {tuple(K.B.shape)}"
            for name, K in self.items()
        ]
        lines.append(f"  frozen: {', '.join(self.frozen) or 'none'}")
        lines.append(f"  ignored: {', '.join(self.ignored) or 'none'}")
        return "\n".join(lines)

    def to_dense(self, order: Order) -> Tensor:
        """Return the block-diagonal matrix of all layers, in the given order within each.

        Raises:
            ValueError: If the order is unknown.
        """
        dense: Tensor = torch.block_diag(*[K.to_dense(order) for K in self.values()])  # type: ignore[no-untyped-call]
        return dense

    def trace(self) -> Tensor:
        """Return the trace over all layers, a tensor with one entry."""
        return torch.stack([K.trace() for K in self.values()]).sum()

    def logdet(self) -> Tensor:
        """Return the log-determinant over all layers; −inf where a factor is singular."""
        return torch.stack([K.logdet() for K in self.values()]).sum()

    def precondition(self, gradients: Mapping[str, Tensor], damping: Damping) -> dict[str, Tensor]:
        """Apply the damped inverse of every layer to its gradient (:ref:`damp-gradient`).

        Args:
            gradients: For each name a weight-shaped matrix (D_out, D_in [+1]), [W b] where the
                bias is joint.
            damping: :class:`~kfac_lib.Exact`, :class:`~kfac_lib.Factored` or
                :class:`~kfac_lib.Plain`.

        Returns:
            For each name a matrix of the same shape.

        Raises:
            ValueError: If the names or a shape do not fit, or a factor has no inverse; the message
                names the layer.
        """
        if set(gradients) != set(self):
            raise ValueError(
                f"Gradients are given for {sorted(gradients)}, factors are there for "
                f"{sorted(self)}. Give one matrix for each."
            )
        return {name: layer_inverse(name, K, damping) @ gradients[name] for name, K in self.items()}


def exact_blocks(
    model: nn.Module,
    loss_func: nn.Module | Criterion,
    data: Data,
    fisher: Fisher = TypeII(),
    *,
    order: Order,
    layers: Sequence[str] | str | None = None,
    ignore: Sequence[str] | str = (),
    chunk_size: int | None = None,
) -> dict[str, Tensor]:
    """The dense block of every layer, from the same rows that KFAC sees (:ref:`kfac-sum`).

    No approximation: R Σ_{n,v} vec(P_{n,v}) vec(P_{n,v})ᵀ with P_{n,v} = Σ_s g x̃ᵀ. Memory grows
    with the square of a layer's number of parameters.

    Args:
        model: Network of supported layers.
        loss_func: A supported loss, or a criterion.
        data: One pair (X, y), or an iterable of them.
        fisher: Flavour: any but :class:`~kfac_lib.InputOnly`, which has no matrix.
        order: Flattening of [W b].
        layers: Names or patterns of the layers or parameters to take; all when not given.
        ignore: Names or patterns to leave out.
        chunk_size: How many vectors are backpropagated at once; all when not given.

    Returns:
        For each layer a matrix of shape (D, D), D the size of [W b].

    Raises:
        ValueError: For bad data, options or patterns.
        TypeError: If model, loss or data are of the wrong kind.
        NotImplementedError: For a layer or a loss that is not supported.

    Example:
        >>> X, y = torch.ones(5, 2), torch.zeros(5, 3)
        >>> exact_blocks(nn.Linear(2, 3), nn.MSELoss(), (X, y), order="cvec")[""].shape
        torch.Size([9, 9])
    """
    check_order(order)
    require_vectors(fisher)
    criterion = criterion_of(loss_func)
    blocks = _accumulate(
        lambda: ExactBlocks(order),
        model,
        criterion,
        data,
        fisher,
        cover(model, layers, ignore),
        chunk_size,
    )
    return {
        name: require_finite(name, block.finish(criterion))[0] for name, block in blocks.items()
    }


def check_kind(argument: str, given: object, method: str, possible: str) -> None:
    """Refuse what is not an object with the method that an option needs (:ref:`kfac-factors`).

    Raises:
        TypeError: If it is a class, or has no such method.

    Example:
        >>> check_kind("sharing", Expand(), "rows", "Expand() or Reduce()")
    """
    if isinstance(given, type) or not hasattr(given, method):
        raise TypeError(f"{argument}={given!r} is not usable. Give an object: {possible}.")


def _accumulate(
    new: Callable[[], Accumulator],
    model: nn.Module,
    criterion: Criterion,
    data: Data,
    fisher: Fisher,
    coverage: Coverage,
    chunk_size: int | None,
) -> dict[str, Accumulator]:
    check_kind("fisher", fisher, "vectors", flavours())
    accumulators = {name: new() for name in coverage.layers}
    for name, rows in stream(model, criterion, fisher, data, coverage, chunk_size=chunk_size):
        accumulators[name].update(rows)
    if all(accumulator.count.N == 0 for accumulator in accumulators.values()):
        raise ValueError(
            "No datum counts: the labels of all data are ignored (ignore_index). Give data with "
            "labels."
        )
    return accumulators


def require_finite(name: str, *results: Tensor) -> tuple[Tensor, ...]:
    """Return the factors or blocks of a layer, or refuse such that overflow.

    See :ref:`kfac-factors`.

    Raises:
        ValueError: If one holds NaN or inf.

    Example:
        >>> (A,) = require_finite("fc", torch.eye(2))
    """
    # In a positive semi-definite matrix no entry exceeds the largest on the diagonal.
    traces = torch.stack([result.trace() for result in results])
    if not is_finite(traces) and not all(is_finite(result) for result in results):
        raise ValueError(
            f"The factors of layer {name!r} hold NaN or inf: its inputs or gradients overflow in "
            f"{results[0].dtype}. Look at the scale of the data and of the parameters."
        )
    return results
