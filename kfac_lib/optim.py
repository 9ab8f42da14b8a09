"""KFAC as a preconditioner of gradients, in front of any optimizer of torch.

Explained in the section :ref:`damp-preconditioner`.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from math import inf, sqrt
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from kfac_lib.accumulate import Expand, FactorSums, Sharing
from kfac_lib.autodiff import ggnvp
from kfac_lib.capture import Hooks
from kfac_lib.coverage import check_per_datum, cover
from kfac_lib.damping import Exact, LevenbergMarquardt, layer_inverse
from kfac_lib.fisher import Fisher, TypeII, flavours
from kfac_lib.kfac import KFAC, check_kind, require_finite
from kfac_lib.kronecker import Damping, EigenKronecker, Kronecker
from kfac_lib.losses import Criterion, criterion_of
from kfac_lib.rows import Count
from kfac_lib.stream import batches, stream

Element = Kronecker | EigenKronecker


class KFACPreconditioner:
    """Rewrites ``.grad`` to (A ⊗ B damped)⁻¹ times the gradient, layer by layer.

    See :ref:`damp-preconditioner`. The loop is ``loss.backward()``, ``pre.update(X, y)``,
    ``pre.precondition()``, ``optimizer.step()``, with any optimizer. Every option from ``damping``
    to ``lr`` is a value or a schedule: a function of the step, which counts the calls of
    :meth:`update` from zero.

    The factors are an exponential moving average over batches. What is averaged are raw sums and
    counts, Σ_i (1−β) β^(t−i) of each batch i, and the constants of KFAC are applied once, at the
    end: the average needs no bias correction, and a batch counts by its size. Factors are those
    of *one* batch on average, for ``"sum"`` as for ``"mean"``.

    Args:
        model: Network; which parameters are trainable is decided here.
        loss_func: A supported loss, or a criterion.
        fisher: Flavour of the Fisher.
        sharing: :class:`~kfac_lib.Expand` or :class:`~kfac_lib.Reduce`.
        damping: For example ``Exact(1e-3)`` or :class:`~kfac_lib.LevenbergMarquardt`; δ is stated
            for the mean loss.
        factor_every: The factors are refreshed when so many calls of :meth:`update` have passed.
        inverse_every: The factors are inverted anew when so many calls of :meth:`precondition`
            have passed, and they have changed. A changed δ acts at once, on the factors last
            taken; for ``Exact`` it costs no new eigendecomposition.
        ema: Decay β of the average, in [0, 1); zero for the newest batch alone.
        kl_clip: κ: all preconditioned gradients p are multiplied by
            min(1, √(κ / (lr² Σ ⟨g, p⟩))), which bounds the squared length of a plain step in the
            damped metric, about twice its KL divergence, by κ. None for no clipping.
        lr: Learning rate of the optimizer, for ``kl_clip`` only.
        chunk_size: How many vectors are backpropagated at once; all when not given.
        layers: Names or patterns of the layers or parameters to take; all when not given.
        ignore: Names or patterns to leave out; their gradients stay as they are.

    Raises:
        ValueError: For an option that is out of its range, or patterns that do not fit.
        TypeError: If an option is of the wrong kind.
        NotImplementedError: For a layer or a loss that is not supported.

    Example:
        >>> model, loss_func = nn.Linear(2, 1), nn.MSELoss()
        >>> X, y = torch.eye(2), torch.ones(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> pre = KFACPreconditioner(model, loss_func, damping=Exact(1e-6))
        >>> loss_func(model(X), y).backward()
        >>> pre.update(X, y)
        >>> pre.precondition()
        >>> optimizer.step()
        >>> round(loss_func(model(X), y).item(), 4)
        0.0
    """

    def __init__(
        self,
        model: nn.Module,
        loss_func: nn.Module | Criterion,
        *,
        fisher: Fisher = TypeII(),
        sharing: Sharing = Expand(),
        damping: Damping | Callable[[int], Damping] = Exact(1e-3),
        factor_every: int | Callable[[int], int] = 1,
        inverse_every: int | Callable[[int], int] = 1,
        ema: float | Callable[[int], float] = 0.95,
        kl_clip: float | Callable[[int], float | None] | None = None,
        lr: float | Callable[[int], float] | None = None,
        chunk_size: int | None = None,
        layers: Sequence[str] | str | None = None,
        ignore: Sequence[str] | str = (),
    ) -> None:
        check_kind("fisher", fisher, "vectors", flavours())
        check_kind("sharing", sharing, "rows", "Expand() or Reduce()")
        self.model, self.fisher, self.sharing = model, fisher, sharing
        self.criterion, self.chunk_size = criterion_of(loss_func), chunk_size
        self.damping, self.factor_every, self.inverse_every = damping, factor_every, inverse_every
        self.ema, self.kl_clip, self.lr = ema, kl_clip, lr
        for option in ("damping", "factor_every", "inverse_every", "ema", "kl_clip", "lr"):
            value = getattr(self, option)
            if isinstance(value, type) or not callable(value):
                _check_option(option, value)
        if kl_clip is not None and lr is None:
            raise ValueError(f"kl_clip={kl_clip!r} needs the learning rate of the optimizer: lr=.")
        self._selection = layers, ignore
        self.coverage = cover(model, layers, ignore)
        self.steps = 0
        self._preconditions = 0
        self._factors_at: int | None = None
        self._inverses_at: int | None = None
        self._outdated = True
        self._weight = 0.0
        self._sums = {name: FactorSums(sharing) for name in self.coverage.layers}
        self._damped_with: tuple[str, float] | None = None
        self._taken: dict[str, Element] = {}
        self._inverses: dict[str, Element] = {}

    def update(self, X: Any, y: Tensor) -> None:
        """Count a step, and bring the factors up to date if they are due.

        The model is run once more, with the loss's vectors backpropagated; ``.grad`` is not
        touched. A batch whose labels are all ignored leaves the factors as they are, due. After
        an error nothing has changed, and no step is counted.

        Args:
            X: Input of the model; axis 0 is the datum.
            y: Targets.

        Raises:
            ValueError: For bad data, a model whose factors are not defined (active dropout, batch
                normalization in training mode), other trainable parameters than at first, or a
                schedule that gives nonsense.
            TypeError: If the data are of the wrong kind.
            NotImplementedError: For a model that is not supported.
        """
        period: int = self._now("factor_every", self.steps)
        if self._factors_at is None or self.steps - self._factors_at >= period:
            beta: float = self._now("ema", self.steps)
            batch = self._sums_of(X, y)
            if any(sums.count.N for sums in batch.values()):
                averages = {}
                for name, sums in batch.items():
                    require_finite(name, *(s for s in (sums.xx, sums.gg) if s is not None))
                    averages[name] = sums.scaled(1 - beta)
                    averages[name].merge(self._sums[name].scaled(beta))
                self._sums = averages
                self._weight = beta * self._weight + (1 - beta)
                self._factors_at, self._outdated = self.steps, True
        self.steps += 1

    def factors(self) -> KFAC:
        """Return the present factors, those of one batch on average.

        Raises:
            ValueError: If there was no update with labels that count.
        """
        if not self._weight:
            raise ValueError(
                "There are no factors yet: no data with labels that count were seen. Call "
                "update(X, y) before precondition()."
            )
        factors = {}
        for name, sums in self._sums.items():
            A, B = sums.scaled(1 / self._weight).finish(self.criterion)
            factors[name] = Kronecker(A, B)
        return KFAC(
            factors,
            fisher=self.fisher,
            sharing=self.sharing,
            frozen=self.coverage.frozen,
            ignored=self.coverage.ignored,
        )

    def precondition(self) -> None:
        """Rewrite the gradients of the covered layers in place; all others stay as they are.

        A layer without gradient, which the loss did not reach, is left without.

        Raises:
            ValueError: If there was no update, no covered layer has a gradient, one has a gradient
                for weight or bias alone, a factor has no inverse (the message names the layer), or
                a schedule gives nonsense.
        """
        step = max(self.steps - 1, 0)
        with torch.no_grad():
            self._refresh_inverses(step)
            gradients = self._gradients()
            preconditioned = {
                name: self._inverses[name] @ g.to(_wide(g.dtype)) for name, g in gradients.items()
            }
            scale = self._clip(step, gradients, preconditioned)
            for name, p in preconditioned.items():
                parameters = self._parameters(name)
                columns = torch.split(p, [q[0].numel() for q in parameters], dim=1)
                for parameter, part in zip(parameters, columns, strict=True):
                    assert parameter.grad is not None
                    parameter.grad.copy_((scale * part).reshape(parameter.shape))
        self._preconditions += 1

    def state_dict(self) -> dict[str, Any]:
        """Return all that changes, for :func:`torch.save`; ``weights_only=True`` loads it.

        Sums, counts, steps, inverses, the δ of :class:`~kfac_lib.LevenbergMarquardt`, and the
        state of the flavour's generator where it has one; not the options, nor torch's default
        generator.
        """
        generator: torch.Generator | None = getattr(self.fisher, "generator", None)
        adaptive = isinstance(self.damping, LevenbergMarquardt)
        return {
            "kinds": self._kinds(),
            "steps": self.steps,
            "preconditions": self._preconditions,
            "factors_at": self._factors_at,
            "inverses_at": self._inverses_at,
            "outdated": self._outdated,
            "weight": self._weight,
            "sums": {name: _packed(sums) for name, sums in self._sums.items()},
            "damped_with": self._damped_with,
            "taken": {name: dict(vars(element)) for name, element in self._taken.items()},
            "inverses": {name: dict(vars(element)) for name, element in self._inverses.items()},
            "damping": self.damping.state_dict() if adaptive else None,  # type: ignore[union-attr]
            "generator": None if generator is None else generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another preconditioner, of the same net and options, stood.

        Tensors are copied, to the device and dtype of the layer's weight. A generator of the
        flavour, and an adaptive damping, are set to their saved states.

        Raises:
            ValueError: If it is no such state, or that of another net, loss, flavour or damping;
                the message names the first layer that differs. Nothing has changed then.
        """
        missing = sorted(set(self.state_dict()) - set(state))
        if missing:
            raise ValueError(
                f"The state lacks {missing}. Give what KFACPreconditioner.state_dict() returned."
            )
        for kind, own in self._kinds().items():
            if state["kinds"].get(kind) != own:
                raise ValueError(
                    f"The state was made with {kind} {state['kinds'].get(kind)}, this "
                    f"preconditioner has {own}. Use the same {kind}."
                )
        self._check_layers(state["sums"])
        generator: torch.Generator | None = getattr(self.fisher, "generator", None)
        if (state["generator"] is None) != (generator is None):
            had, has = ("no", "one") if state["generator"] is None else ("a", "none")
            raise ValueError(
                f"The state was made with {had} generator in the flavour, here there is {has}. "
                "Give the flavour a torch.Generator in both, or in neither."
            )
        if isinstance(self.damping, LevenbergMarquardt):
            self.damping.load_state_dict(state["damping"])
        if generator is not None:
            generator.set_state(state["generator"].cpu())
        # One copy, which keeps what inverses and decompositions have in common.
        state = deepcopy(dict(state))
        self.steps, self._preconditions = state["steps"], state["preconditions"]
        self._factors_at, self._inverses_at = state["factors_at"], state["inverses_at"]
        self._outdated, self._weight = state["outdated"], state["weight"]
        damped_with = state["damped_with"]
        self._damped_with = None if damped_with is None else (damped_with[0], damped_with[1])
        self._sums = {n: self._unpacked(n, packed) for n, packed in state["sums"].items()}
        self._taken = {n: self._element(n, parts) for n, parts in state["taken"].items()}
        self._inverses = {n: self._element(n, parts) for n, parts in state["inverses"].items()}

    def __repr__(self) -> str:
        lines = [
            f"KFACPreconditioner({self.fisher}, {self.sharing}, damping={self.damping!r}, "
            f"steps={self.steps})"
        ]
        for name in self.coverage.layers:
            D_out, D_in = self._shape(name)
            lines.append(f"  {name or '(root)'}: A {(D_in, D_in)}, B {(D_out, D_out)}")
        lines.append(f"  not preconditioned, frozen: {', '.join(self.coverage.frozen) or 'none'}")
        lines.append(f"  not preconditioned, ignored: {', '.join(self.coverage.ignored) or 'none'}")
        return "\n".join(lines)

    def _now(self, option: str, step: int) -> Any:
        value = getattr(self, option)
        if callable(value):
            value = value(step)
        _check_option(option, value, f" at step {step}")
        return value

    def _sums_of(self, X: Any, y: Tensor) -> dict[str, FactorSums]:
        if cover(self.model, *self._selection) != self.coverage:
            raise ValueError(
                "The model's layers, or which of its parameters are trainable, have changed since "
                "the preconditioner was made. Make a new one after such a change."
            )
        sums = {name: FactorSums(self.sharing) for name in self.coverage.layers}
        rows_of_layers = stream(
            Hooks(self.model, self.coverage),
            self.criterion,
            self.fisher,
            [(X, y)],
            chunk_size=self.chunk_size,
        )
        for name, rows in rows_of_layers:
            sums[name].update(rows)
        return sums

    def _refresh_inverses(self, step: int) -> None:
        damping: Damping = self._now("damping", step)
        form = damping.damping if isinstance(damping, LevenbergMarquardt) else damping
        kind, last = type(form).__name__, self._damped_with
        period: int = self._now("inverse_every", step)
        since = None if self._inverses_at is None else self._preconditions - self._inverses_at
        due = since is None or (self._outdated and since >= period)
        taken = self._taken
        if due or last is None or last[0] != kind:
            due = True
            wide = {name: _widened(K) for name, K in self.factors().items()}
            taken = {n: K.eigh() if isinstance(form, Exact) else K for n, K in wide.items()}
        elif last[1] == damping.delta:
            return
        inverses = {name: layer_inverse(name, element, form) for name, element in taken.items()}
        self._taken, self._inverses, self._damped_with = taken, inverses, (kind, damping.delta)
        if due:
            self._inverses_at, self._outdated = self._preconditions, False

    def _gradients(self) -> dict[str, Tensor]:
        """The gradients [W b], (D_out, D_in [+1]), of the layers that have one."""
        gradients = {}
        for name in self.coverage.layers:
            parameters = self._parameters(name)
            parts = [p.grad.reshape(len(p), -1) for p in parameters if p.grad is not None]
            if len(parts) == len(parameters):
                gradients[name] = torch.cat(parts, dim=1)
            elif parts:
                raise ValueError(
                    f"Layer {name!r} has a gradient for its weight or its bias alone, the other's "
                    ".grad is None. Freeze the other with requires_grad_(False) before the "
                    "preconditioner is made, or name it in ignore."
                )
        if not gradients:
            raise ValueError(
                "No covered layer has a gradient. Call loss.backward() before precondition(), and "
                "zero_grad() after optimizer.step()."
            )
        return gradients

    def _clip(
        self, step: int, gradients: Mapping[str, Tensor], preconditioned: Mapping[str, Tensor]
    ) -> float:
        kappa: float | None = self._now("kl_clip", step)
        if kappa is None:
            return 1.0
        lr: float = self._now("lr", step)
        products = sum(float((gradients[n] * p).sum()) for n, p in preconditioned.items())
        length = lr**2 * products
        return min(1.0, sqrt(kappa / length)) if length > 0 else 1.0

    def _parameters(self, name: str) -> list[nn.Parameter]:
        layer = self.coverage.layers[name]
        names = ["weight", "bias"] if name in self.coverage.biases else ["weight"]
        return [getattr(layer, parameter) for parameter in names]

    def _shape(self, name: str) -> tuple[int, int]:
        parameters = self._parameters(name)
        return len(parameters[0]), sum(p[0].numel() for p in parameters)

    def _kinds(self) -> dict[str, str]:
        parts = {"loss": self.criterion, "flavour": self.fisher, "sharing": self.sharing}
        adaptive = isinstance(self.damping, LevenbergMarquardt)
        kinds = {kind: type(part).__name__ for kind, part in parts.items()}
        return {**kinds, "damping": "adaptive" if adaptive else "of fixed or scheduled δ"}

    def _check_layers(self, saved: Mapping[str, Any]) -> None:
        for name in [*self.coverage.layers, *saved]:
            if name not in saved or name not in self.coverage.layers:
                has, lacks = ("net", "state") if name not in saved else ("state", "net")
                raise ValueError(
                    f"The state is that of another net: layer {name!r} is in the {has}, but not "
                    f"in the {lacks}. The net's layers are {list(self.coverage.layers)}."
                )
            for factor, D in zip(("gg", "xx"), self._shape(name), strict=True):
                shape = None if saved[name][factor] is None else tuple(saved[name][factor].shape)
                if shape not in (None, (D, D)):
                    raise ValueError(
                        f"The state is that of another net: layer {name!r} has factors of shape "
                        f"{shape} in it, here {(D, D)}."
                    )

    def _unpacked(self, name: str, packed: Mapping[str, Any]) -> FactorSums:
        weight = self._parameters(name)[0]
        sums = FactorSums(self.sharing)
        sums.S, sums.vectors, sums.count = packed["S"], packed["vectors"], Count(*packed["count"])
        sums.xx = None if packed["xx"] is None else packed["xx"].to(weight)
        sums.gg = None if packed["gg"] is None else packed["gg"].to(weight)
        return sums

    def _element(self, name: str, parts: Mapping[str, Tensor]) -> Element:
        weight = self._parameters(name)[0]
        dtype = _wide(weight.dtype)
        kind = Kronecker if "A" in parts else EigenKronecker
        return kind(**{key: part.to(weight.device, dtype) for key, part in parts.items()})


def predicted_decrease(
    model: nn.Module,
    loss_func: nn.Module | Criterion,
    data: tuple[Any, Tensor],
    step: Mapping[str, Tensor],
    delta: float = 0.0,
) -> float:
    """The decrease −(⟨g, s⟩ + ½ ⟨s, (G + δ I) s⟩) that the damped quadratic model promises.

    See :ref:`damp-adaptive`. g is the gradient and G the exact GGN of the loss at the present
    parameters, by one product; no KFAC is involved. What
    :meth:`LevenbergMarquardt.update <kfac_lib.LevenbergMarquardt.update>` needs, computed *before*
    the step is taken.

    Args:
        model: Network.
        loss_func: A supported loss, or a criterion.
        data: One pair (X, y).
        step: s, what is added to each parameter, by its name; parameters that are not named do
            not move. For plain gradient descent ``{name: -lr * p.grad}``.
        delta: δ ≥ 0, that of the damping.

    Returns:
        The decrease, in units of the loss.

    Raises:
        ValueError: If a name or a shape does not fit, δ is negative or not finite, or the data
            are bad.
        TypeError: If loss or data are of the wrong kind.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(3.0)  # the loss is w², with gradient 6 and GGN 2
        >>> data, step = (torch.ones(1, 1), torch.zeros(1, 1)), {"weight": torch.tensor([[-3.0]])}
        >>> predicted_decrease(model, nn.MSELoss(), data, step)
        9.0
    """
    criterion = criterion_of(loss_func)
    check_per_datum(model)
    Exact(delta)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, s in step.items():
        if name not in trainable:
            raise ValueError(
                f"step: there is no trainable parameter {name!r}. They are {list(trainable)}."
            )
        if s.shape != trainable[name].shape:
            raise ValueError(
                f"step: {name!r} has shape {tuple(s.shape)}, the parameter "
                f"{tuple(trainable[name].shape)}."
            )
    ((X, y),) = batches([data])
    with torch.enable_grad():
        f = model(X)
        criterion.check(f, y)
        loss = criterion.reduction_factor(criterion.denominator(f, y)) * criterion.value(f, y)
        parameters = [trainable[name] for name in step]
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        # Parameters that the loss does not depend on enter by the damping alone.
        reached = [name for name, g in zip(step, found, strict=True) if g is not None]
        g = [gradient for gradient in found if gradient is not None]
        s_reached = [step[name].detach().to(trainable[name]) for name in reached]
        Gs = ggnvp(loss, f, [trainable[n] for n in reached], s_reached) if reached else ()
    linear = sum(float((a * b).sum()) for a, b in zip(g, s_reached, strict=True))
    quadratic = sum(float((a * b).sum()) for a, b in zip(Gs, s_reached, strict=True))
    length = sum(float((v.detach() ** 2).sum()) for v in step.values())
    return -(linear + 0.5 * (quadratic + delta * length))


def _check_option(option: str, value: Any, where: str = "") -> None:
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


def _packed(sums: FactorSums) -> dict[str, Any]:
    parts = {key: getattr(sums, key) for key in ("S", "vectors", "xx", "gg")}
    return {**parts, "count": tuple(sums.count)}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _widened(kronecker: Kronecker) -> Kronecker:
    """Factors in half precision have no decomposition, and are taken in single."""
    dtype = _wide(kronecker.A.dtype)
    return Kronecker(kronecker.A.to(dtype), kronecker.B.to(dtype))
