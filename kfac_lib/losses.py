"""Losses as a criterion and a reduction factor, kept apart.

A loss is L = R · Σ_n c(f_n, y_n). The *criterion* c is minus a log-likelihood up to a constant;
the *reduction factor* R is all that ``reduction="mean"`` or ``"sum"`` does, and the ½ that
:class:`torch.nn.MSELoss` leaves out. Explained in the chapter :ref:`likelihoods`.

========================  =======================  =====================  =================
loss of ``torch.nn``      R for ``"mean"``         Hessian of c           likelihood r
========================  =======================  =====================  =================
MSELoss                   2 / (N · dim y)          I                      Normal(f, I)
CrossEntropyLoss, index   1 / Σ w_y, valid only    κ (diag p − p pᵀ)      Categorical(p)
… probabilities           1 / (N · T)              κ (diag p − p pᵀ)      Categorical(p)
BCEWithLogitsLoss         1 / (N · dim y)          diag(κ σ (1 − σ))      Bernoulli(σ)
========================  =======================  =====================  =================

For ``"sum"`` R is 2, 1, 1, 1. A weight multiplies c and its Hessian by κ ≥ 0 and never changes r.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from kfac_lib.closed_form import OutputHessian

Columns = Literal["full", "minimal"]
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True, eq=False)
class Criterion(ABC):
    """What a curvature matrix needs to know of a loss (:ref:`lik-risk`).

    Axis 0 of a prediction is the datum n; there are N of them. ``reduction`` is ``"mean"`` or
    ``"sum"``, as in :mod:`torch.nn`.

    Raises:
        ValueError: If the reduction is another, or an option is out of its range.

    Example:
        >>> criterion = criterion_of(nn.MSELoss())
        >>> f, y = torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]])
        >>> criterion.value(f, y).item()
        2.0
        >>> criterion.reduction_factor(criterion.denominator(f, y))
        1.0
    """

    reduction: Reduction

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise ValueError(
                f"{type(self).__name__}: reduction={self.reduction!r} has no single value, so no "
                "curvature. Use reduction='mean' or 'sum'."
            )

    def agrees(self, method: str) -> bool:
        """Whether a method belongs to the same root of the Hessian as :meth:`hessian_root`.

        False where a subclass has a root of its own, and inherits what was written for another.
        """
        kinds = type(self).__mro__
        places = [
            next(i for i, kind in enumerate(kinds) if name in vars(kind))
            for name in (method, "hessian_root")
        ]
        return places[0] <= places[1]

    @abstractmethod
    def check(self, f: Tensor, y: Tensor) -> None:
        """Raise ``ValueError`` or ``TypeError`` if the targets y do not fit the prediction f."""

    @abstractmethod
    def value(self, f: Tensor, y: Tensor) -> Tensor:
        """Return Σ_n c(f_n, y_n), a tensor with one entry."""

    @abstractmethod
    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """Return ∇_f c(f_n, y_n) for each datum, in the shape of f."""

    def kappa(self, f: Tensor, y: Tensor) -> Tensor:
        """Return κ, by which weights multiply the Hessian: a tensor that broadcasts to f's shape.

        It is that of the true targets y; a sampled label never chooses it.
        """
        return f.new_ones(())

    def counted(self, f: Tensor, y: Tensor) -> Tensor:
        """Return which data count, shape (N,), boolean: not those whose labels are all ignored."""
        return torch.ones(len(f), dtype=torch.bool, device=f.device)

    @abstractmethod
    def hessian_root(self, f: Tensor, y: Tensor, columns: Columns = "full") -> Tensor:
        """Return the columns of √κ L_n with κ L_n L_nᵀ = ∇²_f c(f_n, y_n).

        The Hessian is block diagonal over the T positions of a prediction, so each column is
        nonzero at one position only.

        Returns:
            Tensor of shape (V, *f.shape); V is the size of one datum's prediction, or the rank of
            the Hessian for ``columns="minimal"``.
        """

    def output_hessian(self, f: Tensor, y: Tensor) -> OutputHessian | None:
        """Return the Hessians κ ∇²_f c(f_n, y_n) in closed form, for f of shape (N, C).

        None where there is no such form, or it is not known; the columns of
        :meth:`hessian_root` are taken then.
        """
        return None

    @abstractmethod
    def hessian_root_product(self, f: Tensor, y: Tensor, u: Tensor) -> Tensor:
        """Return √κ L_n u for vectors u of shape (M, *f.shape), without the columns themselves."""

    @abstractmethod
    def sample(self, f: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
        """Draw labels from the likelihood r(· given f_n).

        Returns:
            Tensor of M labels for every label of the data, shape (M, N, ...), detached.
        """

    @abstractmethod
    def log_likelihood_gradient(self, f: Tensor, labels: Tensor) -> Tensor:
        """Return ∇_f log r(label given f_n) for M labels a datum, shape (M, *f.shape)."""

    @abstractmethod
    def enumerated_gradients(self, f: Tensor) -> Tensor:
        """Return −√r ∇_f log r for *every* label, position by position.

        For the normal likelihood, which has no list of labels, sigma points take their place: at
        a position with K entries the 2K points f ± √K e_k, with weight 1/(2K) for r.

        Returns:
            Tensor of shape (V, *f.shape), V the number of labels of all positions.
        """

    def denominator(self, f: Tensor, y: Tensor) -> float:
        """Return what this batch adds to the denominator of R for ``"mean"``; batches add up."""
        return y.numel()

    def reduction_factor(self, denominator: float) -> float:
        """Return R, given the denominators of all batches added up.

        Raises:
            ValueError: If the mean is over nothing: all labels are ignored, or have weight zero.
        """
        if self.reduction == "sum":
            return 1.0
        if denominator <= 0:
            raise ValueError(
                "The mean is over nothing: every label is ignored or has weight zero, and torch "
                "returns NaN for such a loss. Leave these data out, or use reduction='sum'."
            )
        return 1.0 / denominator


@dataclass(frozen=True)
class SquaredError(Criterion):
    """½‖f − y‖², the criterion of :class:`torch.nn.MSELoss` (:ref:`lik-three`).

    Predictions and targets have the same shape (N, ...). The likelihood is Normal(f, I), and the
    Hessian is the identity. R is 2 / (N · dim y) for ``"mean"``, 2 for ``"sum"``.

    Example:
        >>> SquaredError("sum").reduction_factor(7)
        2.0
    """

    def check(self, f: Tensor, y: Tensor) -> None:  # noqa: D102
        _check_same_shape("MSELoss", f, y)

    def value(self, f: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        return 0.5 * (f - y).square().sum()

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        return f - y

    def hessian_root(self, f: Tensor, y: Tensor, columns: Columns = "full") -> Tensor:  # noqa: D102
        # one identity for all data, without memory of its own
        size = f[0].numel()
        identity = torch.eye(size, dtype=f.dtype, device=f.device)
        return identity.reshape(size, 1, *f.shape[1:]).expand(size, *f.shape)

    def output_hessian(self, f: Tensor, y: Tensor) -> OutputHessian | None:  # noqa: D102
        return OutputHessian(f.new_ones(()).expand(f.shape)) if f.ndim == 2 else None

    def hessian_root_product(self, f: Tensor, y: Tensor, u: Tensor) -> Tensor:  # noqa: D102
        return u

    def sample(self, f: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:  # noqa: D102
        noise = torch.randn(
            (samples, *f.shape), dtype=f.dtype, device=f.device, generator=generator
        )
        return f.detach() + noise

    def log_likelihood_gradient(self, f: Tensor, labels: Tensor) -> Tensor:  # noqa: D102
        return labels - f

    def enumerated_gradients(self, f: Tensor) -> Tensor:  # noqa: D102
        # The gradient at f ± √K e_k is ±√K e_k; the square root of its weight is 1/√(2K).
        points = 0.5**0.5 * self.hessian_root(f, f)
        return torch.cat([-points, points])

    def reduction_factor(self, denominator: float) -> float:  # noqa: D102
        return 2.0 * super().reduction_factor(denominator)


@dataclass(frozen=True, eq=False)
class CrossEntropy(Criterion):
    """−κ log softmax(f)_y, the criterion of :class:`torch.nn.CrossEntropyLoss`.

    See :ref:`lik-three`; the options are explained in :ref:`lik-weights`. Logits have shape
    (N, K, *T), the class axis is axis 1, as in torch. Targets are class indices (N, *T) or class
    probabilities (N, K, *T). The likelihood is Categorical(softmax f), and the Hessian at one
    position is κ (diag(p) − p pᵀ), with

    - class index y: κ = (1 − ε) w_y + (ε/K) Σ_k w_k, zero where y is ignored;
    - class probabilities q: κ = Σ_k w_k q′_k with q′ = (1 − ε) q + ε/K.

    R for ``"mean"`` is 1 / Σ w_y over the labels that are not ignored; for class probabilities
    1 / (N·T), also with weights. For ``"sum"`` it is 1.

    Args:
        reduction: ``"mean"`` or ``"sum"``.
        weight: Class weights w ≥ 0 of shape (K,); 1 when not given.
        ignore_index: Class index whose data have no loss.
        label_smoothing: ε between 0 and 1.

    Raises:
        ValueError: If an option is out of its range.

    Example:
        >>> f = torch.zeros(1, 2, dtype=torch.float64)
        >>> L = CrossEntropy("sum").hessian_root(f, torch.tensor([0]))[:, 0].T
        >>> (L @ L.T).round(decimals=6).tolist()
        [[0.25, -0.25], [-0.25, 0.25]]
    """

    weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weight("CrossEntropyLoss", "weight", self.weight)
        if self.weight is not None and self.weight.ndim != 1:
            raise ValueError(
                f"CrossEntropyLoss: weight has shape {tuple(self.weight.shape)}. Give one weight a "
                "class, shape (K,)."
            )
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(
                f"CrossEntropyLoss: label_smoothing={self.label_smoothing}. Use a number between "
                "0 and 1."
            )

    def check(self, f: Tensor, y: Tensor) -> None:  # noqa: D102
        if f.ndim < 2:
            raise ValueError(
                f"CrossEntropyLoss: the logits have shape {tuple(f.shape)}. Give (N, K) or "
                "(N, K, positions): axis 0 is the datum, axis 1 the class."
            )
        K = f.shape[1]
        if self.weight is not None and len(self.weight) != K:
            raise ValueError(
                f"CrossEntropyLoss: {len(self.weight)} class weights for {K} classes. The class "
                "axis of the logits is axis 1."
            )
        if self._are_probabilities(f, y):
            self._check_probabilities(y)
            return
        expected = (f.shape[0], *f.shape[2:])
        if tuple(y.shape) != expected:
            raise ValueError(
                f"CrossEntropyLoss: logits of shape {tuple(f.shape)} need class indices of shape "
                f"{expected}, or class probabilities of the logits' shape; the targets have "
                f"{tuple(y.shape)}. The class axis is axis 1."
            )
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise TypeError(
                f"CrossEntropyLoss: the targets have dtype {y.dtype}. Give class indices, for "
                "example y.long()."
            )
        low, high = _range(y)
        if low < 0 or high >= K:
            low, high = _range(y[self._valid(y)])
        if low < 0 or high >= K:
            raise ValueError(
                f"CrossEntropyLoss: the targets lie in {low}..{high}, but the logits have "
                f"{K} classes, 0..{K - 1}."
            )

    def value(self, f: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        return cross_entropy(
            f,
            y.to(f.dtype) if self._are_probabilities(f, y) else y.long(),
            weight=None if self.weight is None else self.weight.to(f),
            ignore_index=self.ignore_index,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        targets = self._weighted_targets(f, y)
        return targets.sum(1, keepdim=True) * _softmax(f) - targets

    def kappa(self, f: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        if self._are_probabilities(f, y):
            return self._weighted_targets(f, y).sum(1, keepdim=True)
        valid = self._valid(y)
        if self.weight is None:
            return valid.to(f.dtype).unsqueeze(1)
        w = self.weight.to(f)
        of_label = w[y.long().where(valid, 0)]
        kappa = (1 - self.label_smoothing) * of_label + self.label_smoothing * w.mean()
        return (kappa * valid).unsqueeze(1)

    def counted(self, f: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        if self._are_probabilities(f, y):
            return super().counted(f, y)
        return self._valid(y).flatten(1).any(1) if y.ndim > 1 else self._valid(y)

    def hessian_root(self, f: Tensor, y: Tensor, columns: Columns = "full") -> Tensor:  # noqa: D102
        # At one position, with q = √p: L = diag(q) − p qᵀ, column by column q_j (e_j − p). L q = 0,
        # so L times an orthonormal basis of q's complement is a root with one column less:
        # q_j (e_j − (p + q_K e_K) / (1 + q_K)), no small divisor, exact at p = 0 and p = 1.
        # Every column is a multiple of q_j, and there √κ enters.
        classes = f.shape[1]
        p = _softmax(f).unsqueeze(2) if f.ndim == 2 else _softmax(f.flatten(2))
        q = p.sqrt()
        kappa = self.kappa(f, y).reshape(len(f), 1, -1)
        if columns == "full" or classes == 1:
            shift, scaled = p, kappa.sqrt() * q
        else:
            last = q[:, -1:]
            shift = torch.cat([p[:, :-1], p[:, -1:] + last], dim=1) / (1 + last)
            scaled = kappa.sqrt() * q[:, :-1]
        root = -scaled.movedim(1, 0).unsqueeze(2) * shift
        root.diagonal(dim1=0, dim2=2).add_(scaled.movedim(1, 2))
        return _at_each_position(root, f)

    def output_hessian(self, f: Tensor, y: Tensor) -> OutputHessian | None:  # noqa: D102
        kappa = self.kappa(f, y).expand(len(f), 1) if f.ndim == 2 else None
        return None if kappa is None else OutputHessian(_softmax(f), kappa)

    def hessian_root_product(self, f: Tensor, y: Tensor, u: Tensor) -> Tensor:  # noqa: D102
        p = _softmax(f)
        q = p.sqrt()
        product = q * u - p * (q * u).sum(2, keepdim=True)
        return self.kappa(f, y).sqrt() * product

    def sample(self, f: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:  # noqa: D102
        # Inverse transform sampling, several times faster than torch.multinomial: the first class
        # whose cumulated probability exceeds a uniform number.
        p = _softmax(f.detach()).movedim(1, -1)
        cumulated = p.cumsum(-1)
        u = torch.rand(
            (*p.shape[:-1], samples), dtype=f.dtype, device=f.device, generator=generator
        )
        labels = torch.searchsorted(cumulated, u * cumulated[..., -1:], right=True)
        return labels.clamp_(max=p.shape[-1] - 1).movedim(-1, 0)

    def log_likelihood_gradient(self, f: Tensor, labels: Tensor) -> Tensor:  # noqa: D102
        gradient = (-_softmax(f)).expand(len(labels), *f.shape).clone()
        index = labels.long().unsqueeze(2)
        return gradient.scatter_add_(2, index, gradient.new_ones(()).expand(index.shape))

    def enumerated_gradients(self, f: Tensor) -> Tensor:  # noqa: D102
        classes = f.shape[1]
        shape = (classes, len(f), *f.shape[2:])
        labels = torch.arange(classes, device=f.device).reshape(-1, *[1] * (f.ndim - 1))
        probabilities = _softmax(f).movedim(1, 0).unsqueeze(2)
        gradients = self.log_likelihood_gradient(f, labels.expand(shape))
        weighted = -probabilities.sqrt() * gradients
        return _at_each_position(weighted.reshape(*weighted.shape[:3], -1), f)

    def denominator(self, f: Tensor, y: Tensor) -> float:  # noqa: D102
        if self._are_probabilities(f, y):
            return y.numel() // y.shape[1]
        valid = self._valid(y)
        if self.weight is None:
            return int(valid.sum())
        return float(self.weight.to(f)[y.long()[valid]].sum())

    def _are_probabilities(self, f: Tensor, y: Tensor) -> bool:
        return y.shape == f.shape and y.is_floating_point()

    def _check_probabilities(self, y: Tensor) -> None:
        if self.ignore_index >= 0:
            raise ValueError(
                f"CrossEntropyLoss: ignore_index={self.ignore_index} needs class indices as "
                "targets, but class probabilities are given. Leave it out, or give indices."
            )
        if not bool((y >= 0).all()):
            raise ValueError(
                "CrossEntropyLoss: the targets are class probabilities, and some are negative or "
                "NaN. Give probabilities, not logits."
            )

    def _valid(self, y: Tensor) -> Tensor:
        return y != self.ignore_index

    def _weighted_targets(self, f: Tensor, y: Tensor) -> Tensor:
        """The vector w ∘ q′ that the loss compares log p with, zero where ignored; sums to κ."""
        if self._are_probabilities(f, y):
            targets, valid = y.to(f.dtype), None
        else:
            valid = self._valid(y).unsqueeze(1)
            labels = y.long().unsqueeze(1).where(valid, 0)
            targets = torch.zeros_like(f).scatter_(1, labels, 1.0)
        if self.label_smoothing:
            targets = (1 - self.label_smoothing) * targets + self.label_smoothing / f.shape[1]
        if self.weight is not None:
            targets = self.weight.to(f).reshape(-1, *[1] * (f.ndim - 2)) * targets
        return targets if valid is None else targets * valid


@dataclass(frozen=True, eq=False)
class BinaryCrossEntropy(Criterion):
    """Σ_k κ_k BCE(f_k, y_k), the criterion of :class:`torch.nn.BCEWithLogitsLoss`.

    See :ref:`lik-three`; the options are explained in :ref:`lik-weights`. Logits and targets have
    the same shape (N, ...), targets lie between 0 and 1. The likelihood is an independent
    Bernoulli(σ(f)) at every entry, and the Hessian is diag(κ σ (1 − σ)) with
    κ_k = w_k (1 + (pos_weight_k − 1) y_k). R is 1 / (N · dim y) for ``"mean"``, 1 for ``"sum"``.

    Args:
        reduction: ``"mean"`` or ``"sum"``.
        weight: Weights w ≥ 0 that broadcast to the shape of the logits; 1 when not given.
        pos_weight: Weights ≥ 0 of the positive label, likewise; 1 when not given.

    Raises:
        ValueError: If an option is out of its range.

    Example:
        >>> f = torch.zeros(1, 2, dtype=torch.float64)
        >>> L = BinaryCrossEntropy("sum").hessian_root(f, torch.zeros(1, 2))[:, 0].T
        >>> (L @ L.T).round(decimals=6).tolist()
        [[0.25, 0.0], [0.0, 0.25]]
    """

    weight: Tensor | None = None
    pos_weight: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weight("BCEWithLogitsLoss", "weight", self.weight)
        _check_weight("BCEWithLogitsLoss", "pos_weight", self.pos_weight)

    def check(self, f: Tensor, y: Tensor) -> None:  # noqa: D102
        _check_same_shape("BCEWithLogitsLoss", f, y)
        if not bool(((y >= 0) & (y <= 1)).all()):
            raise ValueError(
                "BCEWithLogitsLoss: some targets lie outside 0..1. Give 0, 1, or probabilities."
            )
        for name, weight in (("weight", self.weight), ("pos_weight", self.pos_weight)):
            if weight is not None and not _broadcasts(weight, f):
                raise ValueError(
                    f"BCEWithLogitsLoss: {name} has shape {tuple(weight.shape)}, which does not "
                    f"broadcast to the logits' {tuple(f.shape)}."
                )

    def value(self, f: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        return binary_cross_entropy_with_logits(
            f,
            y.to(f.dtype),
            weight=None if self.weight is None else self.weight.to(f),
            pos_weight=None if self.pos_weight is None else self.pos_weight.to(f),
            reduction="sum",
        )

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        y = y.to(f.dtype)
        positive = y if self.pos_weight is None else self.pos_weight.to(f) * y
        gradient = (positive + 1 - y) * f.sigmoid() - positive
        return gradient if self.weight is None else self.weight.to(f) * gradient

    def kappa(self, f: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        kappa = torch.ones_like(f) if self.weight is None else self.weight.to(f)
        if self.pos_weight is None:
            return kappa
        return kappa * (1 + (self.pos_weight.to(f) - 1) * y.to(f.dtype))

    def hessian_root(self, f: Tensor, y: Tensor, columns: Columns = "full") -> Tensor:  # noqa: D102
        return _at_each_entry(self._root(f, y))

    def output_hessian(self, f: Tensor, y: Tensor) -> OutputHessian | None:  # noqa: D102
        return OutputHessian(self._root(f, y).square()) if f.ndim == 2 else None

    def hessian_root_product(self, f: Tensor, y: Tensor, u: Tensor) -> Tensor:  # noqa: D102
        return self._root(f, y) * u

    def sample(self, f: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:  # noqa: D102
        shape = (samples, *f.shape)
        u = torch.rand(shape, dtype=f.dtype, device=f.device, generator=generator)
        return (u < f.detach().sigmoid()).to(f.dtype)

    def log_likelihood_gradient(self, f: Tensor, labels: Tensor) -> Tensor:  # noqa: D102
        return labels - f.sigmoid()

    def enumerated_gradients(self, f: Tensor) -> Tensor:  # noqa: D102
        labels = torch.stack([torch.zeros_like(f), torch.ones_like(f)])
        probabilities = torch.stack([(-f).sigmoid(), f.sigmoid()])
        weighted = -probabilities.sqrt() * self.log_likelihood_gradient(f, labels)
        return torch.cat([_at_each_entry(of_label) for of_label in weighted])

    def _root(self, f: Tensor, y: Tensor) -> Tensor:
        # σ(f) σ(−f) rather than σ (1 − σ), which is zero for large f
        return (self.kappa(f, y) * f.sigmoid() * (-f).sigmoid()).sqrt()


def criterion_of(loss_func: nn.Module | Criterion) -> Criterion:
    """The criterion and reduction of a loss from :mod:`torch.nn` (:ref:`lik-reduction`).

    Args:
        loss_func: :class:`torch.nn.MSELoss`, :class:`torch.nn.CrossEntropyLoss`,
            :class:`torch.nn.BCEWithLogitsLoss`, each with all of its options, or a
            :class:`Criterion`, which is returned as it is.

    Returns:
        The criterion, with its reduction.

    Raises:
        NotImplementedError: For another loss.
        ValueError: For ``reduction="none"``, or an option that is out of its range.
        TypeError: If it is no loss object at all.

    Example:
        >>> criterion_of(nn.MSELoss())
        SquaredError(reduction='mean')
    """
    if isinstance(loss_func, Criterion):
        return loss_func
    supported = (
        "Supported: torch.nn.MSELoss, torch.nn.CrossEntropyLoss and torch.nn.BCEWithLogitsLoss, "
        "or a kfac_lib Criterion"
    )
    if not isinstance(loss_func, nn.Module):
        raise TypeError(
            f"The loss is {loss_func!r}, not a loss object. {supported}; pass nn.MSELoss(), not "
            "a function or a class."
        )
    # A subclass may compute something else.
    if type(loss_func) is nn.MSELoss:
        return SquaredError(_reduction(loss_func))
    if type(loss_func) is nn.CrossEntropyLoss:
        return CrossEntropy(
            _reduction(loss_func),
            weight=loss_func.weight,
            ignore_index=loss_func.ignore_index,
            label_smoothing=loss_func.label_smoothing,
        )
    if type(loss_func) is nn.BCEWithLogitsLoss:
        return BinaryCrossEntropy(
            _reduction(loss_func), weight=loss_func.weight, pos_weight=loss_func.pos_weight
        )
    raise NotImplementedError(f"{type(loss_func).__name__} is not supported. {supported}.")


def _reduction(loss_func: nn.Module) -> Reduction:
    reduction: Reduction = loss_func.reduction  # type: ignore[assignment]
    return reduction


def _range(labels: Tensor) -> tuple[int, int]:
    """Smallest and largest label; zero where there is none."""
    if labels.numel() == 0:
        return 0, 0
    low, high = labels.aminmax()
    return int(low), int(high)


def _softmax(f: Tensor) -> Tensor:
    """Softmax over the classes, axis 1; of few classes transposed, several times faster so."""
    return f.T.softmax(0).T.contiguous() if f.ndim == 2 and f.shape[1] < 64 else f.softmax(1)


def _check_same_shape(loss: str, f: Tensor, y: Tensor) -> None:
    if f.shape != y.shape:
        raise ValueError(
            f"{loss}: the prediction has shape {tuple(f.shape)}, the targets {tuple(y.shape)}. "
            "Give targets of the prediction's shape; broadcasting would silently compare every "
            "datum with every target."
        )
    if not y.is_floating_point():
        raise TypeError(
            f"{loss}: the targets have dtype {y.dtype}. Give floating-point targets, for example "
            f"y.to({f.dtype})."
        )


def _check_weight(loss: str, name: str, weight: Tensor | None) -> None:
    if weight is not None and not bool((weight.isfinite() & (weight >= 0)).all()):
        raise ValueError(
            f"{loss}: {name} holds negative, infinite or NaN entries. Curvature is positive only "
            "for finite weights of zero or more."
        )


def _broadcasts(weight: Tensor, f: Tensor) -> bool:
    if weight.ndim > f.ndim:
        return False
    tail = f.shape[f.ndim - weight.ndim :]
    return all(w in (1, size) for w, size in zip(weight.shape, tail, strict=True))


def _at_each_entry(values: Tensor) -> Tensor:
    """Of (N, ...) with C entries a datum make C vectors (C, N, ...), each with one entry."""
    flat = values.reshape(len(values), -1)
    return torch.diag_embed(flat, dim1=0, dim2=2).reshape(-1, *values.shape)


def _at_each_position(vectors: Tensor, f: Tensor) -> Tensor:
    """Of (J, N, K, T) make J·T vectors in the shape of f, each at one of the T positions."""
    T = vectors.shape[3]
    if T > 1:
        at = torch.eye(T, dtype=f.dtype, device=f.device)
        vectors = torch.einsum("jnkt,ts->jsnkt", vectors, at)
    return vectors.reshape(-1, *f.shape)
