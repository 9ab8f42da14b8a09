"""KFAC, and what corrects it, as a preconditioner of gradients in front of any optimizer of torch.

Explained in the sections :ref:`damp-preconditioner` and :ref:`ekfac-preconditioner`.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from kfac_lib.accumulate import Choice, Expand, sharing_of
from kfac_lib.corrections import Approximation, estimate_of
from kfac_lib.damping import Exact, LevenbergMarquardt, layer_inverse
from kfac_lib.ekfac import EKFAC, same_draws
from kfac_lib.estimates import Estimate
from kfac_lib.fisher import Fisher, TypeII, flavours, require_vectors
from kfac_lib.gradients import (
    clip_scale,
    factors_in_words,
    joint_gradients,
    parameters_of,
    write_gradients,
)
from kfac_lib.kfac import KFAC, check_kind, described
from kfac_lib.kronecker import Damping, Element
from kfac_lib.losses import Criterion, criterion_of
from kfac_lib.passes import Passes
from kfac_lib.quadratic import predicted_decrease as predicted_decrease
from kfac_lib.saved import check_kinds, check_layers, pack, sharing_in_words, unpack, wide, widened
from kfac_lib.schedules import check_options, form_of, require_exact, value_at


class KFACPreconditioner:
    """Rewrites ``.grad`` to (A ⊗ B damped)⁻¹ times the gradient, layer by layer.

    See :ref:`damp-preconditioner`, and for EKFAC :ref:`ekfac-preconditioner`. The loop is
    ``loss.backward()``, ``pre.update(X, y)``, ``pre.precondition()``, ``optimizer.step()``, with
    any optimizer. Every option from ``damping`` to ``lr`` is a value or a schedule: a function of
    the step, which counts the calls of :meth:`update` from zero.

    The curvature is an exponential moving average over batches. What is averaged are raw sums and
    counts, Σ_i (1−β) β^(t−i) of each batch i, and the constants are applied once, at the end: the
    average needs no bias correction, and a batch counts by its size. It is that of *one* batch on
    average, for ``"sum"`` as for ``"mean"``. With ``"ekfac"`` the basis is that of the averaged
    factors and changes every ``inverse_every`` steps; the eigenvalues are averaged within it and
    act at once. When it changes, their average is turned into the new basis (its diagonal there),
    but for the newest batch, which is run once more: ``update`` keeps a reference to it, until the
    next ``precondition`` or ``update``.

    Args:
        model: Network; which parameters are trainable is decided here.
        loss_func: A supported loss, or a criterion.
        fisher: Flavour of the Fisher.
        sharing: :class:`~kfac_lib.Expand` or :class:`~kfac_lib.Reduce`; or a mapping from names or
            patterns to one of them, or a function of the layer's name
            (:func:`~kfac_lib.accumulate.sharing_of`). ``"nearest"`` does not depend on it.
        approximation: ``"kfac"``; ``"ekfac"``, which needs :class:`~kfac_lib.Exact` damping; or
            ``"nearest"``, the Kronecker product nearest to the averaged exact block, whose memory
            grows with the square of a layer's number of parameters.
        damping: For example ``Exact(1e-3)`` or :class:`~kfac_lib.LevenbergMarquardt`; δ is stated
            for the mean loss.
        factor_every: The factors are refreshed when so many calls of :meth:`update` have passed.
        inverse_every: The factors are inverted, or decomposed, anew when so many calls of
            :meth:`precondition` have passed, and they have changed. A changed δ acts at once, on
            the factors last taken; for ``Exact`` it costs no new eigendecomposition.
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
        sharing: Choice = Expand(),
        approximation: Approximation = "kfac",
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
        self.model, self.fisher, self.sharing = model, fisher, sharing
        self.criterion, self.chunk_size = criterion_of(loss_func), chunk_size
        self.damping, self.factor_every, self.inverse_every = damping, factor_every, inverse_every
        self.ema, self.kl_clip, self.lr = ema, kl_clip, lr
        options = ("damping", "factor_every", "inverse_every", "ema", "kl_clip", "lr")
        check_options({option: getattr(self, option) for option in options})
        if kl_clip is not None and lr is None:
            raise ValueError(f"kl_clip={kl_clip!r} needs the learning rate of the optimizer: lr=.")
        self._passes = Passes(model, self.criterion, fisher, chunk_size, layers, ignore)
        self.coverage = self._passes.coverage
        self._sharing_of = sharing_of(sharing, list(self.coverage.layers))
        self.approximation = approximation
        self._estimate: Estimate = estimate_of(approximation, self.coverage, self._sharing_of)
        if self._estimate.corrected:
            require_exact(damping)
        if approximation != "kfac":
            require_vectors(fisher)
        self.steps = 0
        self._preconditions = 0
        self._factors_at: int | None = None
        self._inverses_at: int | None = None
        self._outdated = True
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
        drawn = None
        if self._factors_at is None or self.steps - self._factors_at >= period:
            beta: float = self._now("ema", self.steps)
            drawn = same_draws(self.fisher) if self._estimate.corrected else None
            estimate = self._estimate.updated(self._passes.over(X, y), beta)
            if estimate is not None:
                self._estimate, self._factors_at, self._outdated = estimate, self.steps, True
        if self._estimate.corrected:
            self._passes.keep(X, y, drawn)
        self.steps += 1

    def factors(self) -> KFAC | EKFAC:
        """Return the present curvature, that of one batch on average.

        Returns:
            The factors as they are now, even if they are not inverted yet; for ``"ekfac"`` the
            present eigenvalues in the basis in use, or before the first :meth:`precondition` in
            that of the present factors, by a pass over the newest batch; for ``"nearest"`` the
            nearest products.

        Raises:
            ValueError: If there was no update with labels that count.
        """
        estimate = self._estimate
        if not estimate.ready:
            renewed = self._renewed(max(self.steps - 1, 0))
            assert renewed is not None
            estimate = renewed
        elements: dict[str, Any] = estimate.elements(self.criterion)
        result: type[KFAC] | type[EKFAC] = EKFAC if estimate.corrected else KFAC
        return result(
            elements,
            fisher=self.fisher,
            sharing=described(self.sharing, self._sharing_of),
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
            TypeError: If a schedule of the damping gives none, or for ``"ekfac"`` one that is not
                exact.
            NotImplementedError: If a gradient is sparse.
        """
        step = max(self.steps - 1, 0)
        with torch.no_grad():
            self._refresh_inverses(step)
            gradients = joint_gradients(self.coverage)
            steps = {name: self._inverses[name] @ wide(g) for name, g in gradients.items()}
            kappa: float | None = self._now("kl_clip", step)
            scale = 1.0
            if kappa is not None:
                scale = clip_scale(gradients, steps, kappa, self._now("lr", step))
            write_gradients(self.coverage, steps, scale)
        self._preconditions += 1
        self._passes.forget()

    def state_dict(self) -> dict[str, Any]:
        """Return all that changes, for :func:`torch.save`; ``weights_only=True`` loads it.

        Sums, counts, steps, bases, inverses, the δ of :class:`~kfac_lib.LevenbergMarquardt`, and
        the state of the flavour's generator where it has one; not the options, nor torch's default
        generator, nor a batch: with ``"ekfac"`` save after :meth:`precondition`, not between it and
        :meth:`update`.
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
            **self._estimate.state(),
            "damped_with": self._damped_with,
            "taken": {name: pack(element) for name, element in self._taken.items()},
            "inverses": {name: pack(element) for name, element in self._inverses.items()},
            "damping": self.damping.state_dict() if adaptive else None,  # type: ignore[union-attr]
            "generator": None if generator is None else generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another preconditioner, of the same net and options, stood.

        Tensors are copied, to the device and dtype of the layer's weight. A generator of the
        flavour, and an adaptive damping, are set to their saved states.

        Raises:
            ValueError: If it is no such state, or that of another net, loss, flavour, sharing,
                approximation or damping; the message names the first layer that differs. Nothing
                has changed then.
        """
        missing = sorted(set(self.state_dict()) - set(state))
        if missing:
            raise ValueError(
                f"The state lacks {missing}. Give what KFACPreconditioner.state_dict() returned."
            )
        check_layers(state["sums"], self.coverage)
        check_kinds(state["kinds"], self._kinds())
        generator: torch.Generator | None = getattr(self.fisher, "generator", None)
        if (state["generator"] is None) != (generator is None):
            had, has = ("no", "one") if state["generator"] is None else ("a", "none")
            raise ValueError(
                f"The state was made with {had} generator in the flavour, here there is {has}. "
                "Give the flavour a torch.Generator in both, or in neither."
            )
        # One copy, which keeps what inverses and decompositions have in common.
        state = deepcopy(dict(state))
        estimate = self._estimate.loaded(state, self.coverage)
        if isinstance(self.damping, LevenbergMarquardt):
            self.damping.load_state_dict(state["damping"])
        if generator is not None:
            generator.set_state(state["generator"].cpu())
        self._estimate = estimate
        self._passes.forget()
        self.steps, self._preconditions = state["steps"], state["preconditions"]
        self._factors_at, self._inverses_at = state["factors_at"], state["inverses_at"]
        self._outdated = state["outdated"]
        damped_with = state["damped_with"]
        self._damped_with = None if damped_with is None else (damped_with[0], damped_with[1])
        like = {name: wide(parameters_of(self.coverage, name)[0]) for name in self.coverage.layers}
        self._taken = {n: unpack(parts, like[n]) for n, parts in state["taken"].items()}
        self._inverses = {n: unpack(parts, like[n]) for n, parts in state["inverses"].items()}

    def __repr__(self) -> str:
        sharing = sharing_in_words(self._sharing_of)
        lines = [
            f"KFACPreconditioner({self.fisher}, {sharing}, approximation={self.approximation!r}, "
            f"damping={self.damping!r}, steps={self.steps})"
        ]
        for name in self.coverage.layers:
            lines.append(f"  {name or '(root)'}: {factors_in_words(self.coverage, name)}")
        lines.append(f"  not preconditioned, frozen: {', '.join(self.coverage.frozen) or 'none'}")
        lines.append(f"  not preconditioned, ignored: {', '.join(self.coverage.ignored) or 'none'}")
        return "\n".join(lines)

    def _now(self, option: str, step: int) -> Any:
        return value_at(option, getattr(self, option), step)

    def _renewed(self, step: int) -> Estimate | None:
        """The average in a new basis; None if that needs a batch, and none is there."""
        if not self._estimate.weight:
            raise ValueError(
                "There are no factors yet: no data with labels that count were seen. Call "
                "update(X, y) before precondition()."
            )
        if not self._estimate.corrected:
            return self._estimate
        return self._estimate.renewed(self.criterion, self._passes.again(), self._now("ema", step))

    def _refresh_inverses(self, step: int) -> None:
        damping: Damping = self._now("damping", step)
        if self._estimate.corrected:
            require_exact(damping, f" at step {step}")
        form = form_of(damping)
        kind, last = type(form).__name__, self._damped_with
        period: int = self._now("inverse_every", step)
        since = None if self._inverses_at is None else self._preconditions - self._inverses_at
        due = since is None or (self._outdated and since >= period)
        due = due or last is None or last[0] != kind
        renewed = self._renewed(step) if due else None
        estimate, taken = renewed or self._estimate, self._taken
        if renewed is not None or estimate.corrected:
            present = estimate.elements(self.criterion)
            elements = {name: widened(element) for name, element in present.items()}
            taken = {n: K.eigh() if isinstance(form, Exact) else K for n, K in elements.items()}
        elif last == (kind, damping.delta):
            return
        inverses = {name: layer_inverse(name, element, form) for name, element in taken.items()}
        self._estimate, self._taken, self._inverses = estimate, taken, inverses
        self._damped_with = kind, damping.delta
        if renewed is not None:
            self._inverses_at, self._outdated = self._preconditions, False

    def _kinds(self) -> dict[str, str]:
        adaptive = isinstance(self.damping, LevenbergMarquardt)
        return {
            "approximation": self.approximation,
            "loss": type(self.criterion).__name__,
            "flavour": type(self.fisher).__name__,
            "sharing": sharing_in_words(self._sharing_of),
            "damping": "adaptive" if adaptive else "of fixed or scheduled δ",
        }
