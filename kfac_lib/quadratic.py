"""The damped quadratic model of the loss, and the decrease that it promises.

Explained in the section :ref:`damp-adaptive`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kfac_lib.autodiff import ggnvp, twice_differentiable
from kfac_lib.coverage import check_per_datum
from kfac_lib.damping import Exact
from kfac_lib.losses import Criterion, criterion_of
from kfac_lib.stream import batches


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
    with twice_differentiable():
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
