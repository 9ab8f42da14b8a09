"""Losses as a criterion and a reduction factor, kept apart.

A loss is L = R · Σ_n c(f_n, y_n). The *criterion* c is minus a log-likelihood up to a constant;
the *reduction factor* R is all that ``reduction="mean"`` or ``"sum"`` does, and the ½ that
:class:`torch.nn.MSELoss` leaves out. Explained in the section :ref:`kfac-criterion`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Columns = Literal["full", "minimal"]


@dataclass(frozen=True)
class Criterion(ABC):
    """What a curvature matrix needs to know of a loss (:ref:`kfac-criterion`).

    Axis 0 of a prediction is the datum n; there are N of them. ``reduction`` is ``"mean"`` or
    ``"sum"``, as in :mod:`torch.nn`.

    Example:
        >>> criterion = criterion_of(nn.MSELoss())
        >>> f, y = torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]])
        >>> criterion.value(f, y).item()
        2.0
        >>> criterion.reduction_factor(criterion.denominator(f, y))
        1.0
    """

    reduction: Literal["mean", "sum"]

    @abstractmethod
    def check(self, f: Tensor, y: Tensor) -> None:
        """Raise ``ValueError`` or ``TypeError`` if the targets y do not fit the prediction f."""

    @abstractmethod
    def value(self, f: Tensor, y: Tensor) -> Tensor:
        """Return Σ_n c(f_n, y_n), a tensor with one entry."""

    @abstractmethod
    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """Return ∇_f c(f_n, y_n) for each datum, in the shape of f."""

    @abstractmethod
    def hessian_root(self, f: Tensor, y: Tensor, columns: Columns = "full") -> Tensor:
        """Return the columns of L_n with L_n L_nᵀ = ∇²_f c(f_n, y_n).

        The Hessian is block diagonal over the T positions of a prediction, so each column is
        nonzero at one position only.

        Returns:
            Tensor of shape (V, *f.shape); V is the size of one datum's prediction, or the rank of
            the Hessian for ``columns="minimal"``.
        """

    @abstractmethod
    def sample(self, f: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
        """Draw labels from the likelihood r(· given f_n).

        Returns:
            Tensor of shape (M, *y.shape), detached.
        """

    @abstractmethod
    def log_likelihood_gradient(self, f: Tensor, labels: Tensor) -> Tensor:
        """Return ∇_f log r(label given f_n) for labels of shape (M, *y.shape): (M, *f.shape)."""

    @abstractmethod
    def denominator(self, f: Tensor, y: Tensor) -> int:
        """Return what this batch adds to the denominator of R for ``"mean"``; batches add up."""

    @abstractmethod
    def reduction_factor(self, denominator: int) -> float:
        """Return R, given the denominators of all batches added up."""


class SquaredError(Criterion):
    """½‖f − y‖², the criterion of :class:`torch.nn.MSELoss` (:ref:`kfac-criterion`).

    Predictions and targets have the same shape (N, ...). The likelihood is Normal(f, I), and the
    Hessian is the identity. R is 2 / (N · dim y) for ``"mean"``, 2 for ``"sum"``.

    Example:
        >>> SquaredError("sum").reduction_factor(7)
        2.0
    """

    def check(self, f: Tensor, y: Tensor) -> None:  # noqa: D102
        if f.shape != y.shape:
            raise ValueError(
                f"MSELoss: the prediction has shape {tuple(f.shape)}, the targets "
                f"{tuple(y.shape)}. Give targets of the prediction's shape; broadcasting would "
                "silently compare every datum with every target."
            )
        if not y.is_floating_point():
            raise TypeError(
                f"MSELoss: the targets have dtype {y.dtype}. Give floating-point targets, for "
                f"example y.to({f.dtype})."
            )

    def value(self, f: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        return 0.5 * (f - y).square().sum()

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        return f - y

    def hessian_root(self, f: Tensor, y: Tensor, columns: Columns = "full") -> Tensor:  # noqa: D102
        size = f[0].numel()
        identity = torch.eye(size, dtype=f.dtype, device=f.device)
        return identity.reshape(size, 1, *f.shape[1:]).expand(size, *f.shape)

    def sample(self, f: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:  # noqa: D102
        noise = torch.randn(
            (samples, *f.shape), dtype=f.dtype, device=f.device, generator=generator
        )
        return f.detach() + noise

    def log_likelihood_gradient(self, f: Tensor, labels: Tensor) -> Tensor:  # noqa: D102
        return labels - f

    def denominator(self, f: Tensor, y: Tensor) -> int:  # noqa: D102
        return y.numel()

    def reduction_factor(self, denominator: int) -> float:  # noqa: D102
        return 2.0 if self.reduction == "sum" else 2.0 / denominator


class CrossEntropy(Criterion):
    """−log softmax(f)_y, the criterion of :class:`torch.nn.CrossEntropyLoss`.

    See :ref:`kfac-criterion`. Logits have shape (N, K, *T), the class axis is axis 1, as in torch;
    targets are class indices of shape (N, *T). The likelihood is Categorical(softmax f), and the
    Hessian at one position is diag(p) − p pᵀ. R is 1 / (N·T) for ``"mean"``, 1 for ``"sum"``.

    Example:
        >>> f = torch.zeros(1, 2, dtype=torch.float64)
        >>> L = CrossEntropy("sum").hessian_root(f, torch.tensor([0]))[:, 0].T
        >>> (L @ L.T).round(decimals=6).tolist()
        [[0.25, -0.25], [-0.25, 0.25]]
    """

    def check(self, f: Tensor, y: Tensor) -> None:  # noqa: D102
        if f.ndim < 2:
            raise ValueError(
                f"CrossEntropyLoss: the logits have shape {tuple(f.shape)}. Give (N, K) or "
                "(N, K, positions): axis 0 is the datum, axis 1 the class."
            )
        expected = (f.shape[0], *f.shape[2:])
        if tuple(y.shape) == tuple(f.shape) and y.is_floating_point():
            raise NotImplementedError(
                "CrossEntropyLoss with class probabilities as targets is not supported. Give class "
                "indices (integers)."
            )
        if tuple(y.shape) != expected:
            raise ValueError(
                f"CrossEntropyLoss: logits of shape {tuple(f.shape)} need class indices of shape "
                f"{expected}, the targets have {tuple(y.shape)}. The class axis is axis 1."
            )
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise TypeError(
                f"CrossEntropyLoss: the targets have dtype {y.dtype}. Give class indices, for "
                "example y.long()."
            )
        low, high = (int(bound) for bound in y.long().aminmax())
        if low < 0 or high >= f.shape[1]:
            raise ValueError(
                f"CrossEntropyLoss: the targets lie in {low}..{high}, but the logits have "
                f"{f.shape[1]} classes, 0..{f.shape[1] - 1}."
            )

    def value(self, f: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        return nn.functional.cross_entropy(f, y.long(), reduction="sum")

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:  # noqa: D102
        return -self.log_likelihood_gradient(f, y.unsqueeze(0))[0]

    def hessian_root(self, f: Tensor, y: Tensor, columns: Columns = "full") -> Tensor:  # noqa: D102
        # At one position, with q = √p: L = diag(q) − p qᵀ. L q = 0, so L times an orthonormal
        # basis of q's complement is a root with one column less.
        classes, positions = f.shape[1], f[0, 0].numel()
        p = f.reshape(f.shape[0], classes, positions).softmax(1)
        q = p.sqrt()
        if columns == "full" or classes == 1:
            root = -q.movedim(1, 0).unsqueeze(2) * p
        else:
            # s_j = q_j (e_j − (p + q_K e_K) / (1 + q_K)): no small divisor, exact at p = 0 and 1.
            last = q[:, -1:]
            shift = torch.cat([p[:, :-1], p[:, -1:] + last], dim=1) / (1 + last)
            root = -q[:, :-1].movedim(1, 0).unsqueeze(2) * shift
        root.diagonal(dim1=0, dim2=2).add_(q[:, : len(root)].movedim(1, 2))
        if positions == 1:
            return root.reshape(-1, *f.shape)
        at = torch.eye(positions, dtype=f.dtype, device=f.device)
        return torch.einsum("jnkt,ts->jsnkt", root, at).reshape(-1, *f.shape)

    def sample(self, f: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:  # noqa: D102
        # Inverse transform sampling, several times faster than torch.multinomial: the first class
        # whose cumulated probability exceeds a uniform number.
        p = f.detach().movedim(1, -1).softmax(-1)
        cumulated = p.cumsum(-1)
        u = torch.rand(
            (*p.shape[:-1], samples), dtype=f.dtype, device=f.device, generator=generator
        )
        labels = torch.searchsorted(cumulated, u * cumulated[..., -1:], right=True)
        return labels.clamp_(max=p.shape[-1] - 1).movedim(-1, 0)

    def log_likelihood_gradient(self, f: Tensor, labels: Tensor) -> Tensor:  # noqa: D102
        gradient = (-f.softmax(1)).expand(len(labels), *f.shape).clone()
        index = labels.long().unsqueeze(2)
        return gradient.scatter_add_(2, index, gradient.new_ones(()).expand(index.shape))

    def denominator(self, f: Tensor, y: Tensor) -> int:  # noqa: D102
        return y.numel()

    def reduction_factor(self, denominator: int) -> float:  # noqa: D102
        return 1.0 if self.reduction == "sum" else 1.0 / denominator


def criterion_of(loss_func: nn.Module | Criterion) -> Criterion:
    """The criterion and reduction of a loss from :mod:`torch.nn` (:ref:`kfac-criterion`).

    Args:
        loss_func: :class:`torch.nn.MSELoss`, :class:`torch.nn.CrossEntropyLoss`, or a
            :class:`Criterion`, which is returned as it is.

    Returns:
        The criterion, with its reduction.

    Raises:
        NotImplementedError: For another loss, or an option that is not supported.
        ValueError: For ``reduction="none"``.
        TypeError: If it is no loss object at all.

    Example:
        >>> criterion_of(nn.CrossEntropyLoss())
        CrossEntropy(reduction='mean')
    """
    if isinstance(loss_func, Criterion):
        return loss_func
    supported = "Supported: torch.nn.MSELoss and torch.nn.CrossEntropyLoss, or a kfac_lib Criterion"
    if not isinstance(loss_func, nn.Module):
        raise TypeError(
            f"The loss is {loss_func!r}, not a loss object. {supported}; pass nn.MSELoss(), not "
            "a function or a class."
        )
    kind = {nn.MSELoss: SquaredError, nn.CrossEntropyLoss: CrossEntropy}.get(type(loss_func))
    if kind is None:
        raise NotImplementedError(f"{type(loss_func).__name__} is not supported. {supported}.")
    if isinstance(loss_func, nn.CrossEntropyLoss):
        unsupported = {
            "weight": loss_func.weight is not None,
            "label_smoothing": loss_func.label_smoothing != 0,
            "ignore_index": loss_func.ignore_index != -100,
        }
        given = [name for name, is_given in unsupported.items() if is_given]
        if given:
            raise NotImplementedError(
                f"CrossEntropyLoss with {', '.join(given)} is not supported. Leave the option out; "
                "ignoring it would give the curvature of another loss."
            )
    reduction = loss_func.reduction
    if reduction == "mean":
        return kind("mean")
    if reduction == "sum":
        return kind("sum")
    raise ValueError(
        f"{type(loss_func).__name__}(reduction={reduction!r}) has no single value, so no "
        "curvature. Use reduction='mean' or 'sum'."
    )
