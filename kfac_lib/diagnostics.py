"""How wrong the two approximations of KFAC are for a given net and its data.

Within a layer a mean of Kronecker products is replaced by a product of means; between layers
everything is dropped. Both are measured exactly, without a dense matrix. Explained in the chapter
:ref:`diagnostics`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isnan, log, nan
from operator import index
from textwrap import fill
from typing import TYPE_CHECKING, NamedTuple, SupportsIndex

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
CARRIERS = 5
"""A sample is called too small that holds fewer than so many of the data that carry the sums."""

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
    norm. They are NaN for a block that is zero, and for one that no datum of a sample reaches.

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
        other_trace_ratio: The same under the other sharing; NaN for S = 1.
        correlation: Of input and gradient energy over the rows that KFAC sees (‖x̃‖² and Σ_v ‖g‖²);
            NaN where one does not vary.
        excess: Their covariance over the product of their means; for S = 1 and one group
            tr G / tr K − 1.
        half: The smallest number of data that hold half of Σ_n (Σ_s ‖x̃‖² Σ_v ‖g‖²)²: on so few
            the norm of the block may rest.
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
    other_trace_ratio: float
    correlation: float
    excess: float
    half: int
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
        damping: The δ of these steps.
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
        damping: float = 0.0,
    ) -> None:
        self._layers = dict(layers)
        self.coupling, self.outside = coupling, outside
        self.fisher, self.N, self.compared = fisher, N, compared
        self.steps, self.damping = steps, damping

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
            lines.append(f"steps with δ = {self.damping:g}, beside the exact one")
            lines.append("step      cosine  decrease  at best length")
        for name, step in (self.steps or {}).items():
            shares = f"{step.decrease:8.3g}  {step.best_decrease:14.2f}"
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
        half = min(one.half for one in self.values())
        if self.compared < self.N and half * self.compared < CARRIERS * self.N:
            yield (
                f"Few data carry the sums: half of them rests on {half} of {self.N}, of which "
                f"{self.compared} drawn at random hold {half * self.compared / self.N:.1f} on "
                "average. Errors come out too small then, and their bars too short: compare more "
                "data."
            )
        if hasattr(self.fisher, "generator"):
            yield (
                "The flavour is random: part of each error is the noise of this draw. More vectors "
                "show how much, or TypeII(), which has none."
            )
        step = (self.steps or {}).get("KFAC")
        many = _largest_group(self.coupling > COUPLED)
        if many > 2 and (step is None or step.decrease < ENOUGH):
            yield (
                f"{many} layers are coupled: even with exact blocks a step may be about {many} "
                f"times too long{'' if step else '; see exact_step=True'}."
            )
        if step is None or step.decrease >= ENOUGH:
            return
        if step.best_decrease >= ENOUGH:
            yield (
                "On the quadratic model the direction of KFAC's step is good, its length is not: "
                "choose the length, by a learning rate below 1 or kl_clip, or damp more."
            )
            return
        ways = "damp more"
        corrected = (self.steps or {}).get("EKFAC")
        if corrected and corrected.best_decrease >= max(ENOUGH, step.best_decrease / BETTER):
            ways = (
                f"EKFAC's direction is better ({corrected.best_decrease:.2f} against "
                f"{step.best_decrease:.2f} of the exact decrease at the best length): correct the "
                "eigenvalues, or damp more"
            )
        if any(_is_off(one) and _is_nearer(one) for one in self.values()):
            ways += ", or try the other sharing"
        yield f"On the quadratic model KFAC's step is wrong in its direction too: {ways}."

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
    widths, memory with the rows, N · V · Σ S · D_out numbers and the inputs.

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
        damping: Of these steps; δ counts beside the curvature of the loss as it is reduced.
        max_memory: Bytes of rows that may be kept, and of one datum's matrices P together with
            the factor of the nearest product; 1 GiB when not given.
        generator: Draws the subsample; seeded by torch's default generator when not given.
        chunk_size: How many vectors are backpropagated at once; what fits into 64 MiB when
            not given (:ref:`speed-memory`).
        params: The parameters by name, for a function or a network that hooks cannot follow.

    Returns:
        The findings.

    Raises:
        ValueError: For bad data or options, figures that overflow, or a need for more than
            ``max_memory``.
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
    limit = MAX_MEMORY if max_memory is None else _bytes(max_memory)
    if subsample is not None:
        subsample = _number_of_data(subsample)
        generator = _own(generator)
    if subsample is not None or exact_step:
        require_two_passes(data)
    if not isinstance(damping, Exact):
        raise TypeError(
            f"damping is a {type(damping).__name__}. The step is compared with the exact one, "
            "(G + δ I)⁻¹ g: give Exact(1e-3), for example."
        )
    if exact_step and (params is not None or not isinstance(model, nn.Module)):
        raise NotImplementedError(
            "exact_step needs a torch.nn.Module without params. Leave exact_step out."
        )
    source, data = source_of(model, data, params, layers, ignore)
    if exact_step and any(
        p.dtype not in (torch.float32, torch.float64)
        for p in model.parameters()  # type: ignore[union-attr]
    ):
        raise NotImplementedError(
            "exact_step needs parameters in float32 or float64: there are no decompositions in "
            "half precision. Give copy.deepcopy(model).float(), and data to match."
        )
    criterion = criterion_of(loss_func)
    run = Comparison(
        source,
        criterion,
        data,
        fisher,
        sharing_of(sharing, list(source.coverage.layers)),
        chunk_size,
        limit,
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
        _layers(found, values, errors, criterion),
        coupling=values.coupling,
        outside=Estimate(float(values.outside), float(errors.outside)),
        fisher=fisher,
        N=found.N,
        compared=len(found.pairs.rows),
        steps=steps,
        damping=damping.delta if exact_step else 0.0,
    )


def _bytes(max_memory: float) -> int:
    if not isinstance(max_memory, int | float):
        raise TypeError(f"max_memory={max_memory!r}: give a number of bytes, such as 2**30.")
    if not 0 < max_memory < inf:
        raise ValueError(f"max_memory={max_memory!r}: give a positive number of bytes.")
    return int(max_memory)


def _number_of_data(subsample: object) -> int:
    if isinstance(subsample, SupportsIndex) and index(subsample) >= 3:
        return index(subsample)
    raise ValueError(
        f"subsample={subsample!r}: give a number of data, at least 3, or None for all."
    )


def _own(generator: torch.Generator | None) -> torch.Generator:
    """A generator that no rewinding of torch's default one touches."""
    if generator is None:
        return torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator is a {type(generator).__name__}: give torch.Generator().manual_seed(0)."
        )
    return generator


class _Squares(NamedTuple):
    """What follows from sums over pairs, squared; with an axis in front, from many of them."""

    norm: Tensor
    kfac_error: Tensor
    ekfac_error: Tensor
    best_error: Tensor
    coupling: Tensor
    outside: Tensor


class _FromPairs(NamedTuple):
    """What only pairs of data can tell; with an axis in front, from many sets of them."""

    rest: Tensor
    coupling: Tensor
    outside: Tensor


def _from_pairs(found: Found, sums: Callable[[PairSums], Tensor]) -> _FromPairs:
    squared = found.R**2 * sums(found.pairs)
    own = squared.diagonal(dim1=-2, dim2=-1)
    corrected = torch.stack([one.corrected.square().sum() for one in found.spectra.values()])
    # What EKFAC explains is known from all data; only the rest must be estimated from some.
    explained = corrected if found.diagonals is None else found.R**2 * sums(found.diagonals)
    scale = (own.unsqueeze(-1) * own.unsqueeze(-2)).clamp(min=0).sqrt()
    return _FromPairs(
        rest=own - explained,
        coupling=squared / scale.where(scale > 0, 1),
        outside=1 - own.sum(-1) / squared.sum((-1, -2)),
    )


def _estimated(found: Found) -> tuple[_Squares, _Squares]:
    """The figures, and their standard errors by the jackknife."""
    one = _from_pairs(found, lambda sums: sums.total(found.N))
    m = len(found.pairs.rows)
    errors_of = _FromPairs(*(torch.zeros_like(value) for value in one))
    if m < found.N:
        each = _from_pairs(found, lambda sums: sums.without_each(found.N))
        # Drawn without replacement: what is known already has no error.
        scale = (m - 1) * (1 - m / found.N)
        errors_of = _FromPairs(*((scale * v.var(0, correction=0)).sqrt() for v in each))
    spectra = found.spectra.values()
    corrected = torch.stack([one.corrected.square().sum() for one in spectra])
    beside = torch.stack([(one.corrected - one.kfac).square().sum() for one in spectra])
    best = torch.stack(list(found.best.values())).nan_to_num(0)
    _require_no_overflow(found, torch.stack([corrected, beside, best, one.rest]))
    # An estimate may be less than what all data are known to hold.
    rest = one.rest.clamp(min=0).maximum(best - corrected)
    norm = corrected + rest
    slope = errors_of.rest / norm.square()
    squares = _Squares(
        norm=norm,
        kfac_error=(rest + beside) / norm,
        ekfac_error=rest / norm,
        best_error=((norm - best) / norm).clamp(min=0),
        coupling=one.coupling.clamp(0, 1),
        outside=one.outside.clamp(0, 1),
    )
    of_squares = _Squares(
        norm=errors_of.rest,
        kfac_error=slope * (corrected - beside).abs(),
        ekfac_error=slope * corrected,
        best_error=slope * best,
        coupling=errors_of.coupling,
        outside=errors_of.outside,
    )
    values, errors = [], []
    for name, square, error in zip(_Squares._fields, squares, of_squares, strict=True):
        if name == "outside":
            values.append(square)
            errors.append(error)
            continue
        # Of a root; near zero, where the slope has no bound, the root of the error.
        root = square.sqrt()
        values.append(root)
        errors.append(torch.minimum(error / (2 * root), error.sqrt()).nan_to_num(0))
    unseen = (found.pairs.total().diagonal() == 0) & (corrected > 0)
    for figure in (*values[:4], values[4], values[4].T):
        figure[unseen] = nan
    return _Squares(*values), _Squares(*errors)


def _require_no_overflow(found: Found, sums: Tensor) -> None:
    for name, finite in zip(found.spectra, sums.isfinite().all(0), strict=True):
        if not finite:
            raise ValueError(
                f"Layer {name!r}: the squared norm of its block overflows double precision. Scale "
                "the inputs, the targets or the loss down; relative errors do not change by a "
                "factor before the loss."
            )


def _layers(
    found: Found, values: _Squares, errors: _Squares, criterion: Criterion
) -> dict[str, LayerDiagnosis]:
    names = list(found.spectra)
    layers = {}
    for i, name in enumerate(names):
        spectrum, energies = found.spectra[name], found.energies[name]
        coupled_to = None
        if len(names) > 1:
            others = values.coupling[i].nan_to_num(-1)
            others[i] = -2
            j = int(others.argmax())
            strength = Estimate(float(values.coupling[i, j]), float(errors.coupling[i, j]))
            coupled_to = (names[j], strength)
        norm, kfac, ekfac, best = (
            Estimate(float(value[i]), float(error[i]))
            for value, error in zip(values[:4], errors[:4], strict=True)
        )
        S, trace = found.positions[name], spectrum.corrected.sum()
        other = found.others[name].trace(criterion, S) if S > 1 else nan
        layers[name] = LayerDiagnosis(
            shape=found.shapes[name],
            positions=S,
            sharing=energies.sharing,
            norm=norm,
            kfac_norm=float(spectrum.kfac.norm()),
            inner=float(spectrum.inner),
            kfac_error=kfac,
            ekfac_error=ekfac,
            best_error=best,
            trace_ratio=float(spectrum.trace_ratio),
            other_trace_ratio=float(other / trace),
            correlation=energies.correlation(),
            excess=energies.excess(),
            half=energies.half(),
            coupled_to=coupled_to,
        )
    return layers


def _advice(one: LayerDiagnosis) -> Iterator[str]:
    if one.norm.value == 0:
        yield "No curvature: the block is zero, for these data no output depends on the layer."
        return
    if isnan(one.norm.value):
        yield "Not in the sample: no output of its data depends on the layer. Compare more data."
        return
    kfac, ekfac, best = map(_percent, (one.kfac_error, one.ekfac_error, one.best_error))
    D = one.shape[0] * one.shape[1]
    said = {
        "close": f"KFAC is within {kfac} of the block.",
        "EKFAC": f"KFAC is off by {kfac}, EKFAC by {ekfac}: correct the eigenvalues.",
        "nearest": (
            f"KFAC is off by {kfac}, the nearest product by {best}: the factors are at fault, not "
            f'the form; use the nearest product (approximation="nearest"; the dense block, '
            f"{D} × {D}, is formed)."
        ),
        "neither": (
            f"KFAC is off by {kfac}, and neither EKFAC ({ekfac}) nor any one product ({best}) "
            f"does much better: {_remedy(one)}."
        ),
    }
    verdict = _verdict(one)
    yield said[verdict]
    if any(_verdict(one, shift) != verdict for shift in (-2.0, 2.0)):
        yield "Two standard errors away the answer is another one: compare more data."
    close = verdict == "close"
    if not close and _is_off(one):
        remedy = ""
        if one.positions > 1:
            other = Expand() if isinstance(one.sharing, Reduce) else Reduce()
            remedy = f", under {other} {one.other_trace_ratio:.2g} times"
            remedy += f": try {other}" if _is_nearer(one) else ""
        yield f"Its trace is {one.trace_ratio:.2g} times that of the block{remedy}."
    if not close and abs(one.correlation) > CORRELATED:
        size = "large" if one.correlation > 0 else "small"
        yield (
            f"Where inputs are large, gradients are {size} (correlation {one.correlation:.2f}): "
            "the mean of products is not the product of means."
        )
    if one.coupled_to is not None and one.coupled_to[1].value > COUPLED:
        yield f"Coupled to {one.coupled_to[0]!r} at {one.coupled_to[1].value:.2f}."


def _verdict(one: LayerDiagnosis, shift: float = 0.0) -> str:
    """Which sentence fits, at so many standard errors from the estimates."""
    kfac, ekfac, best = (
        e.value + shift * e.standard_error
        for e in (one.kfac_error, one.ekfac_error, one.best_error)
    )
    if kfac <= CLOSE:
        return "close"
    D = one.shape[0] * one.shape[1]
    if best <= BETTER * min(ekfac, kfac) and 8 * D**2 <= MAX_MEMORY:
        return "nearest"
    return "EKFAC" if ekfac <= BETTER * kfac else "neither"


def _remedy(one: LayerDiagnosis) -> str:
    """What to do where nothing is much better within this sharing."""
    if _is_off(one) and _is_nearer(one):
        return "the sharing is at fault"
    return "use it" if one.kfac_error.value <= FAR else "damp more"


def _is_off(one: LayerDiagnosis) -> bool:
    return not 1 / TRACE < one.trace_ratio < TRACE


def _is_nearer(one: LayerDiagnosis) -> bool:
    """Whether the trace of K is nearer to that of the block under the other sharing."""
    if isnan(one.other_trace_ratio) or min(one.trace_ratio, one.other_trace_ratio) <= 0:
        return False
    return abs(log(one.other_trace_ratio)) < abs(log(one.trace_ratio))


def _percent(error: Estimate) -> str:
    spread = f" ± {error.standard_error:.0%}" if error.standard_error else ""
    return f"{error.value:.0%}{spread}"


def _largest_group(coupled: Tensor) -> int:
    """Size of the largest set of layers that are coupled, one through the other."""
    reached = coupled.double() + torch.eye(len(coupled), dtype=torch.float64, device=coupled.device)
    for _ in range(len(coupled)):
        reached = (reached @ reached > 0).double()
    return int(reached.sum(1).max())
