"""How wrong the two approximations of KFAC are for a given net and its data.

Within a layer a mean of Kronecker products is replaced by a product of means; between layers
everything is dropped. Both are measured exactly, without a dense matrix. Explained in the chapter
:ref:`diagnostics`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from textwrap import fill
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from kfac_lib.accumulate import Choice, Expand, Reduce, Sharing, sharing_of
from kfac_lib.comparison import Comparison, Found
from kfac_lib.damping import Exact
from kfac_lib.ekfac import EKFAC, require_two_passes
from kfac_lib.fisher import Fisher, TypeII, require_vectors
from kfac_lib.kfac import KFAC, source_of
from kfac_lib.kronecker import Element
from kfac_lib.losses import Criterion, criterion_of
from kfac_lib.pairs import PairSums
from kfac_lib.steps import QuadraticModel, StepComparison, compare_steps
from kfac_lib.stream import Data

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_MEMORY = 2**30
"""Bytes of rows that are kept to be compared, unless another number is given."""


CLOSE = 0.1
"""Relative error up to which KFAC is called close."""
FAR = 0.5
"""Relative error from which on more damping is advised where nothing is better."""
BETTER = 0.7
"""Something is called better whose error is at most this share of that of KFAC."""
TRACE = 2.0
"""Ratio of traces, or its inverse, from which on it is mentioned."""
CORRELATED = 0.3
"""Correlation of energies that is mentioned."""
COUPLED = 0.5
"""Coupling of two layers that is mentioned."""


ENOUGH = 0.5
"""Share of the exact decrease from which on a step is called good."""


class Estimate(NamedTuple):
    """A figure and its standard error (:ref:`diag-subsample`).

    Args:
        value: The figure.
        standard_error: Zero where all data were compared.

    Example:
        >>> f"{Estimate(0.25, 0.01)}"
        '0.25 ± 0.01'
    """

    value: float
    standard_error: float = 0.0

    def __str__(self) -> str:
        if isnan(self.value):
            return "–"
        spread = f" ± {self.standard_error:.2g}" if self.standard_error else ""
        return f"{self.value:.3g}{spread}"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


@dataclass(frozen=True)
class LayerDiagnosis:
    """What was found for one layer (:ref:`diag-errors`).

    G is the exact block of the flavour, and errors are relative: ‖G − K‖ / ‖G‖ in the Frobenius
    norm. They are NaN for a block that is zero.

    Args:
        shape: Shape (D_out, D_in [+1]) of the weight-shaped matrices.
        positions: Number S of positions that share the weight.
        sharing: How KFAC treats them.
        norm: ‖G‖.
        kfac_norm: ‖K‖.
        inner: ⟨G, K⟩.
        kfac_error: Error of KFAC.
        ekfac_error: Error of EKFAC, the best that the eigenbasis of KFAC allows.
        best_error: Error of the nearest Kronecker product, the best that a product can do.
        trace_ratio: tr K / tr G.
        correlation: Of input and gradient energy over the rows that KFAC sees (‖x̃‖² and Σ_v ‖g‖²);
            NaN where one does not vary.
        excess: Their covariance over the product of their means; for S = 1 tr G / tr K − 1.
        coupled_to: The layer that this one is coupled to most, with the coupling; None for a net
            of one layer.
    """

    shape: tuple[int, int]
    positions: int
    sharing: Sharing
    norm: Estimate
    kfac_norm: float
    inner: float
    kfac_error: Estimate
    ekfac_error: Estimate
    best_error: Estimate
    trace_ratio: float
    correlation: float
    excess: float
    coupled_to: tuple[str, Estimate] | None

    @property
    def best_share(self) -> float:
        """Share of ‖G‖² that the nearest Kronecker product explains."""
        return 1 - self.best_error.value**2


class Diagnosis(Mapping[str, LayerDiagnosis]):
    """What :func:`diagnose` found: layer name → :class:`LayerDiagnosis` (:ref:`diag-tool`).

    Printed, it is a table with a sentence of advice for each layer; :meth:`plot` draws it.

    Args:
        layers: The findings by layer.
        coupling: ‖G_ij‖ / √(‖G_ii‖ ‖G_jj‖), shape (L, L) in the order of the layers, in 0..1.
        outside: Share of the squared norm of the whole matrix that lies outside its diagonal
            blocks.
        fisher: The flavour.
        N: Number of data.
        compared: Number of data that were compared pair by pair.
        steps: For ``"KFAC"``, ``"EKFAC"`` and ``"gradient"`` the comparison with the exact step;
            None if it was not asked for.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerDiagnosis],
        *,
        coupling: Tensor,
        outside: Estimate,
        fisher: Fisher,
        N: int,
        compared: int,
        steps: Mapping[str, StepComparison] | None = None,
    ) -> None:
        self._layers = dict(layers)
        self.coupling, self.outside = coupling, outside
        self.fisher, self.N, self.compared, self.steps = fisher, N, compared, steps

    def __getitem__(self, name: str) -> LayerDiagnosis:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        pairs = "" if self.compared == self.N else f", {self.compared} compared pair by pair"
        lines = [f"Diagnosis({self.fisher}, {self.N} data{pairs})", *self._table()]
        lines.append(f"outside the diagonal blocks: {self.outside} of the squared norm")
        if self.steps:
            lines.append("step      cosine  decrease  best length")
        for name, step in (self.steps or {}).items():
            shares = f"{step.decrease:8.3g}  {step.best_decrease:11.2f}"
            lines.append(f"{name:8}  {step.cosine:6.2f}  {shares}")
        sentences = [f"{name or '(root)'}: {self.advice(name)}" for name in self]
        sentences += self._of_the_whole()
        lines += [fill(sentence, 72, subsequent_indent="  ") for sentence in sentences]
        return "\n".join(lines)

    def advice(self, name: str) -> str:
        """Return what the figures of a layer say, and what to try.

        Which figure is worth a word is set by :data:`CLOSE`, :data:`FAR`, :data:`BETTER`,
        :data:`TRACE`, :data:`CORRELATED` and :data:`COUPLED`.
        """
        return " ".join(_advice(self[name]))

    def plot(self) -> "Figure":
        """Return a figure: errors by layer, and the coupling of layers.

        Needs the ``book`` extra.
        """
        import matplotlib.pyplot as plt

        from kfac_lib.plotting import APPROXIMATION, EXACT, INPUT, style

        names = [name or "(root)" for name in self]
        errors = {
            "KFAC": (APPROXIMATION, [one.kfac_error for one in self.values()]),
            "EKFAC": (INPUT, [one.ekfac_error for one in self.values()]),
            "nearest product": (EXACT, [one.best_error for one in self.values()]),
        }
        with style():
            height = 1.9 + 0.6 * len(self)
            figure = plt.figure(figsize=(6.4, height + 3.4), layout="constrained")
            above, below = figure.subfigures(2, 1, height_ratios=[height, 3.4])  # type: ignore[misc]
            errors_at, map_at = above.subplots(), below.subplots()
            for i, (label, (colour, found)) in enumerate(errors.items()):
                errors_at.barh(
                    [j + 0.27 * (i - 1) for j in range(len(self))],
                    [one.value for one in found],
                    0.25,
                    xerr=[one.standard_error for one in found] if self.compared < self.N else None,
                    color=colour,
                    label=label,
                )
            errors_at.set_yticks(range(len(self)), names)
            errors_at.invert_yaxis()
            errors_at.set_xlabel("relative error of the block")
            above.legend(loc="outside upper center", ncols=3, fontsize=12)
            image = map_at.imshow(self.coupling.cpu(), vmin=0, vmax=1, cmap="Greys")
            map_at.set_xticks(
                range(len(self)), names, rotation=90 if max(map(len, names)) > 3 else 0
            )
            map_at.set_yticks(range(len(self)), names)
            below.colorbar(image, ax=map_at, label="coupling", anchor=(0, 0.5), panchor=(0.6, 0.5))
        plt.close(figure)
        return figure

    def _of_the_whole(self) -> Iterator[str]:
        L = len(self)
        pairs = [one.coupled_to[1].value for one in self.values() if one.coupled_to]
        if L > 2 and max(pairs) > COUPLED:
            yield (
                f"Coupled layers: a block-diagonal step may be up to {L} times too long"
                f"{'' if self.steps else '; see exact_step=True'}."
            )
        step = (self.steps or {}).get("KFAC")
        if step is None or step.decrease >= ENOUGH:
            return
        yield (
            "On the quadratic model the direction of KFAC's step is good, its length is not: "
            "choose the length, by a learning rate below 1 or kl_clip, or damp more."
            if step.best_decrease >= ENOUGH
            else "On the quadratic model KFAC's step is wrong in its direction too: damp more, or "
            "try another sharing."
        )

    def _table(self) -> list[str]:
        header = ("layer", "shape", "KFAC", "EKFAC", "best ⊗", "tr K/tr G", "corr", "coupling")
        rows = [header]
        for name, one in self.items():
            rows.append(
                (
                    name or "(root)",
                    "×".join(map(str, one.shape)),
                    str(one.kfac_error),
                    str(one.ekfac_error),
                    str(one.best_error),
                    str(Estimate(one.trace_ratio)),
                    str(Estimate(one.correlation)),
                    "–" if one.coupled_to is None else f"{one.coupled_to[1]}",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]


def diagnose(
    model: nn.Module | Callable[..., Tensor],
    loss_func: nn.Module | Criterion,
    data: Data,
    *,
    fisher: Fisher = TypeII(),
    sharing: Choice = Expand(),
    layers: Sequence[str] | str | None = None,
    ignore: Sequence[str] | str = (),
    subsample: int | None = None,
    exact_step: bool = False,
    damping: Exact = Exact(1e-3),
    max_memory: int | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    params: Mapping[str, Tensor] | None = None,
) -> Diagnosis:
    """Measure both approximations of KFAC on a net and its data (:ref:`diagnostics`).

    All figures are exact, up to rounding in double precision, and none needs a dense block: they
    come from inner products of inputs and of pseudo-gradients. Time grows with (N · V)² and the
    widths, memory with the rows, N · V · Σ D_out numbers and the inputs.

    Args:
        model: Network of supported layers; with ``params`` a function f(params, X), or a network
            that is traced.
        loss_func: A supported loss of torch, or a criterion.
        data: One pair (X, y), or an iterable of them; axis 0 is the datum.
        fisher: Flavour: any but :class:`~kfac_lib.InputOnly`. What KFAC is compared with is the
            exact matrix of the same flavour, and for a random one of the same draw.
        sharing: As in :meth:`KFAC.compute <kfac_lib.KFAC.compute>`.
        layers: Names or patterns of the layers to take; all when not given.
        ignore: Names or patterns to leave out.
        subsample: How many data, drawn at random, are compared pair by pair. Norms of blocks are
            then estimated without bias, with a standard error; what is linear in G still comes
            from all data, in further passes: two, and some for the nearest product.
        exact_step: Whether to compare preconditioned steps with the exact damped Gauss-Newton
            step.
        damping: Of these steps.
        max_memory: Bytes of rows that may be kept; 1 GiB when not given.
        generator: Draws the subsample; torch's default generator when not given.
        chunk_size: How many vectors are backpropagated at once; what fits into 64 MiB when
            not given (:ref:`speed-memory`).
        params: The parameters by name, for a function or a network that hooks cannot follow.

    Returns:
        The findings.

    Raises:
        ValueError: For bad data or options, or rows that need more than ``max_memory``.
        TypeError: If model, loss or data are of the wrong kind.
        NotImplementedError: For a layer or a loss that is not supported, or the exact step of a
            function.

    Example:
        >>> torch.manual_seed(0)
        <...>
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> X, y = torch.randn(8, 4), torch.randint(2, (8,))
        >>> found = diagnose(net, nn.CrossEntropyLoss(), (X, y))
        >>> found["0"].shape, found.coupling.shape
        ((3, 5), torch.Size([2, 2]))
    """
    require_vectors(fisher)
    if subsample is not None:
        require_two_passes(data)
        if not isinstance(subsample, int) or subsample < 3:
            raise ValueError(
                f"subsample={subsample!r}: give a number of data, at least 3, or None for all."
            )
    if exact_step and params is not None:
        raise NotImplementedError(
            "exact_step needs a torch.nn.Module without params. Leave exact_step out."
        )
    source, data = source_of(model, data, params, layers, ignore)
    criterion = criterion_of(loss_func)
    run = Comparison(
        source,
        criterion,
        data,
        fisher,
        sharing_of(sharing, list(source.coverage.layers)),
        chunk_size,
        MAX_MEMORY if max_memory is None else max_memory,
    )
    found = run.of_all() if subsample is None else run.of_some(subsample, generator)
    steps = None
    if exact_step:
        assert isinstance(model, nn.Module)
        elements: dict[str, Mapping[str, Element]] = {}
        for kind in (KFAC, EKFAC):
            run.rewind()
            elements[kind.__name__] = kind.compute(
                model, criterion, run.data, fisher, sharing, chunk_size, layers, ignore
            )
        quadratic = QuadraticModel(model, criterion, data, source.coverage)
        steps = compare_steps(quadratic, elements, damping)
    values, errors = _estimated(found)
    return Diagnosis(
        _layers(found, values, errors),
        coupling=values.coupling,
        outside=Estimate(float(values.outside), float(errors.outside)),
        fisher=fisher,
        N=found.N,
        compared=len(found.pairs.rows),
        steps=steps,
    )


class _Squares(NamedTuple):
    """What follows from sums over pairs, squared; with an axis in front, from many of them."""

    norm: Tensor
    kfac_error: Tensor
    ekfac_error: Tensor
    best_error: Tensor
    coupling: Tensor
    outside: Tensor


def _squares(found: Found, sums: Callable[[PairSums], Tensor]) -> _Squares:
    """The squares that follow from one way to sum over pairs."""
    squared = found.R**2 * sums(found.pairs)
    own = squared.diagonal(dim1=-2, dim2=-1)
    spectra = found.spectra.values()
    corrected = torch.stack([one.corrected.square().sum() for one in spectra])
    beside = torch.stack([(one.corrected - one.kfac).square().sum() for one in spectra])
    best = torch.stack(list(found.best.values()))
    # What EKFAC explains is known from all data; only the rest must be estimated from some.
    explained = corrected if found.diagonals is None else found.R**2 * sums(found.diagonals)
    rest = own - explained
    norm = corrected + rest
    scale = (own.unsqueeze(-1) * own.unsqueeze(-2)).clamp(min=0).sqrt()
    return _Squares(
        norm=norm,
        kfac_error=(rest + beside) / norm,
        ekfac_error=rest / norm,
        best_error=(norm - best) / norm,
        coupling=squared / scale.where(scale > 0, 1),
        outside=(1 - own.sum(-1) / squared.sum((-1, -2))),
    )


def _estimated(found: Found) -> tuple[_Squares, _Squares]:
    """The figures, and their standard errors by the jackknife."""
    squares = _squares(found, lambda sums: sums.total(found.N))
    m = len(found.pairs.rows)
    each = squares
    scale = 0.0
    if m < found.N:
        each = _squares(found, lambda sums: sums.without_each(found.N))
        # Drawn without replacement: what is known already has no error.
        scale = (m - 1) * (1 - m / found.N)
    values, errors = [], []
    for name, square, of_each in zip(_Squares._fields, squares, each, strict=True):
        error = (scale * of_each.var(0, correction=0)).sqrt() if scale else square * 0
        if name == "outside":
            values.append(square)
            errors.append(error)
            continue
        # Of a root; near zero, where the slope has no bound, the root of the error.
        root = square.clamp(min=0).sqrt()
        values.append(root)
        errors.append(torch.minimum(error / (2 * root), error.sqrt()).nan_to_num(0))
    return _Squares(*values), _Squares(*errors)


def _layers(found: Found, values: _Squares, errors: _Squares) -> dict[str, LayerDiagnosis]:
    names = list(found.spectra)
    layers = {}
    for i, name in enumerate(names):
        spectrum, energies = found.spectra[name], found.energies[name]
        coupled_to = None
        if len(names) > 1:
            others = values.coupling[i].clone()
            others[i] = -1
            j = int(others.argmax())
            strength = Estimate(float(values.coupling[i, j]), float(errors.coupling[i, j]))
            coupled_to = (names[j], strength)
        norm, kfac, ekfac, best = (
            Estimate(float(value[i]), float(error[i]))
            for value, error in zip(values[:4], errors[:4], strict=True)
        )
        layers[name] = LayerDiagnosis(
            shape=found.shapes[name],
            positions=found.positions[name],
            sharing=energies.sharing,
            norm=norm,
            kfac_norm=float(spectrum.kfac.norm()),
            inner=float(spectrum.inner),
            kfac_error=kfac,
            ekfac_error=ekfac,
            best_error=best,
            trace_ratio=float(spectrum.trace_ratio),
            correlation=energies.correlation(),
            excess=energies.excess(),
            coupled_to=coupled_to,
        )
    return layers


def _advice(one: LayerDiagnosis) -> Iterator[str]:
    kfac, ekfac, best = (e.value for e in (one.kfac_error, one.ekfac_error, one.best_error))
    if one.norm.value == 0:
        yield "No curvature: the block is zero, for these data no output depends on the layer."
        return
    if kfac <= CLOSE:
        yield f"KFAC is within {kfac:.0%} of the block."
    elif ekfac <= BETTER * kfac:
        yield f"KFAC is off by {kfac:.0%}, EKFAC by {ekfac:.0%}: correct the eigenvalues."
    elif best <= BETTER * kfac:
        yield (
            f"KFAC is off by {kfac:.0%}, the nearest product by {best:.0%}: the factors are at "
            'fault, not the form; use the nearest product (approximation="nearest").'
        )
    else:
        yield (
            f"KFAC is off by {kfac:.0%}, and neither EKFAC ({ekfac:.0%}) nor any one product "
            f"({best:.0%}) does much better: {'use it' if kfac <= FAR else 'damp more'}."
        )
    if kfac > CLOSE and not 1 / TRACE < one.trace_ratio < TRACE:
        other = Expand() if isinstance(one.sharing, Reduce) else Reduce()
        remedy = f"try {other}" if one.positions > 1 else "scale its damping with it"
        yield f"Its trace is {one.trace_ratio:.2g} times that of the block: {remedy}."
    if kfac > CLOSE and abs(one.correlation) > CORRELATED:
        size = "large" if one.correlation > 0 else "small"
        yield (
            f"Where inputs are large, gradients are {size} (correlation {one.correlation:.2f}): "
            "the mean of products is not the product of means."
        )
    if one.coupled_to is not None and one.coupled_to[1].value > COUPLED:
        yield f"Coupled to {one.coupled_to[0]!r} at {one.coupled_to[1].value:.2f}."
