"""A test for anybody's KFAC: does it give the right numbers, and if not, what is wrong with it?

The callable is run on the cases of :mod:`kfac_lib.exact_cases`; numbers that are off are compared
with the predictions of :mod:`kfac_lib.hypotheses`. Explained in the section :ref:`test-kit`.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kfac_lib.blocks import Block, Part
from kfac_lib.exact_cases import ExactCase, exact_cases
from kfac_lib.fisher import MonteCarlo, RandomSigns
from kfac_lib.flattening import Order, check_order
from kfac_lib.report import Outcome, Report, Status, explain, measure, truth

DRAWS = 30
"""How often a random flavour is drawn."""


def check_kfac(
    fn: Callable[..., Any],
    *,
    output: Literal["factors", "dense"] = "factors",
    order: Order = "cvec",
    bias: Literal["joint", "separate"] = "joint",
    generator: torch.Generator | None = None,
) -> Report:
    """Check any KFAC against the truth, and say what is wrong with it.

    See :ref:`test-kit`. The callable is run on some hundred and fifty small nets in float64, where
    KFAC *is* the curvature block or where its definition is known, each time with a fresh copy:
    first nets of Linear layers, then convolutions, embeddings and reused layers. Random
    flavours are drawn 30 times and tested in their mean. Nothing that the callable does gets out
    of here: it is reported. The model and the data must come back as they were given, without
    gradients or hooks left on them; numbers are compared all the same.

    Args:
        fn: Callable ``(model, loss_func, (X, y), fisher, sharing)`` that returns a mapping from
            layer name to a pair (A, B), or to a dense block. ``fisher`` is a flavour of
            :mod:`kfac_lib.fisher`, ``sharing`` is :class:`~kfac_lib.Expand` or
            :class:`~kfac_lib.Reduce`. What it does not support, such as a kind of layer, it
            refuses by ``NotImplementedError``.
        output: ``"factors"`` for pairs (A, B), A input-based of shape (D_in [+1], D_in [+1]) and
            B grad-output-based of shape (D_out, D_out), or anything with attributes A and B; only
            their Kronecker product counts. For a convolution D_in counts the columns of
            ``weight.flatten(1)``; with groups, give a list of pairs, one for each group, or
            anything with such ``blocks``. For an Embedding W is ``weight.T``, and A may be given
            as its diagonal, of shape (D_in,). ``"dense"`` for matrices, with groups one for the
            whole layer, or anything with ``to_dense(order)``.
        order: Flattening of dense blocks, on the weight-shaped matrix (D_out, D_in [+1]); pairs
            need none.
        bias: ``"joint"`` for blocks of [W b] under the layer's name, ``"separate"`` for blocks
            under ``"fc.weight"`` and ``"fc.bias"``.
        generator: Generator of the random flavours; a freshly seeded one when not given.

    Returns:
        The report: ``passed``, ``failures``, ``refusals``, ``explanation``, ``runner_up``,
        ``diagnosis``.

    Raises:
        TypeError: If ``fn`` is not callable.
        ValueError: If an option is unknown.

    Example:
        >>> from kfac_lib import KFAC
        >>> report = check_kfac(KFAC.compute)
        >>> report.passed
        True
        >>> def forgets_the_mean(model, loss_func, data, fisher, sharing):
        ...     kfac = KFAC.compute(model, loss_func, data, fisher, sharing)
        ...     return {name: len(data[0]) * K for name, K in kfac.items()}
        >>> check_kfac(forgets_the_mean).explanation.hypothesis
        'scale N'
    """
    if not callable(fn):
        raise TypeError(
            f"fn is a {type(fn).__name__}: give a callable (model, loss_func, (X, y), fisher, "
            "sharing) that returns a mapping from layer name to (A, B)."
        )
    for name, value, possible in (
        ("output", output, ("factors", "dense")),
        ("bias", bias, ("joint", "separate")),
    ):
        if value not in possible:
            raise ValueError(f"{name}={value!r}: use {possible[0]!r} or {possible[1]!r}.")
    check_order(order)
    generator = generator or torch.Generator().manual_seed(0)
    outcomes = tuple(
        _run(fn, case, output == "dense", order, bias == "joint", generator)
        for case in exact_cases()
    )
    return Report(outcomes, tuple(explain(outcomes)))


class _UnusableError(Exception):
    """What the callable returned cannot be compared; the message says why."""


@lru_cache(maxsize=2048)
def _blocks(case: ExactCase, order: Order, joint: bool) -> tuple[Block, ...]:
    parts: tuple[Part, ...]
    blocks = []
    for layer in case.layers:
        whole = Block(case, layer, "joint", order)
        parts = ("joint",) if joint else ("weight", "bias") if whole.has_bias else ("weight",)
        blocks += [Block(case, layer, part, order) for part in parts]
    return tuple(blocks)


def _run(
    fn: Callable[..., Any],
    case: ExactCase,
    dense: bool,
    order: Order,
    joint: bool,
    generator: torch.Generator,
) -> Outcome:
    blocks = _blocks(case, order, joint)
    draws, notes = [], []
    for draw in range(DRAWS if case.is_random else 1):
        try:
            returned, changed = _call(fn, case, generator, seed=draw)
        except NotImplementedError as refusal:
            return Outcome(case, "refused", message=str(refusal) or "not implemented")
        except (Exception, SystemExit) as error:
            return Outcome(case, "failed", message=f"raised {type(error).__name__}: {error}")
        notes += [changed] if changed and changed not in notes else []
        try:
            draws.append(_all_dense(returned, blocks, dense))
        except _UnusableError as problem:
            return Outcome(case, "failed", message="; ".join([*notes, str(problem)]))
    measured = tuple(measure(block, [of_draw[block.key] for of_draw in draws]) for block in blocks)
    errors = [m.error for m in measured if m.error == m.error]
    shapes = [m for m in measured if m.error != m.error]
    if shapes:
        found, right = tuple(shapes[0].draws[0].shape), tuple(truth(shapes[0].block).shape)
        notes.append(f"block {shapes[0].block.key!r} has shape {found}, not {right}")
    good = all(m.right for m in measured)
    if not good and case.is_random and all(bool((m.draws == m.draws[0]).all()) for m in measured):
        notes.append(f"all {DRAWS} draws are the same")
    status: Status = "failed" if notes or not good else "passed"
    return Outcome(case, status, max(errors) if errors else None, "; ".join(notes), measured)


def _call(
    fn: Callable[..., Any], case: ExactCase, generator: torch.Generator, seed: int
) -> tuple[Any, str]:
    """What the callable returns, and what it has changed that is not its own, in words."""
    model, data = copy.deepcopy(case.model), tuple(tensor.clone() for tensor in case.data)
    fisher = case.fisher
    if isinstance(fisher, MonteCarlo | RandomSigns):
        fisher = replace(fisher, generator=generator)
    before = _state(model)
    dtype, grad_enabled = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            returned = fn(model, copy.deepcopy(case.loss_func), data, fisher, case.sharing)
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad_enabled)
    changed = _difference(before, _state(model))
    if changed:
        return returned, f"changes the model: {changed}"
    same = all(torch.equal(a, b) for a, b in zip(data, case.data, strict=True))
    return returned, "" if same else "changes the data in place"


def _all_dense(returned: Any, blocks: Sequence[Block], dense: bool) -> dict[str, Tensor]:
    if not isinstance(returned, Mapping):
        raise _UnusableError(
            f"returns a {type(returned).__name__}, not a mapping from layer name to factors"
        )
    wanted = [block.key for block in blocks]
    missing = [key for key in wanted if key not in returned]
    if missing:
        raise _UnusableError(f"misses {missing}; the keys are {list(map(str, returned))}")
    try:
        return {block.key: _as_dense(returned[block.key], block, dense) for block in blocks}
    except (RuntimeError, NotImplementedError) as error:
        raise _UnusableError(f"returns what cannot be read: {error}") from error


def _as_dense(value: Any, block: Block, dense: bool) -> Tensor:
    key = block.key
    if dense:
        matrix = (
            value.to_dense(block.order)
            if hasattr(value, "to_dense") and not isinstance(value, Tensor)
            else value
        )
        return _checked(matrix, f"block {key!r}")
    pairs = _pairs(getattr(value, "blocks", value), block)
    if len(pairs) not in (1, block.groups) or len({len(A) for A, _ in pairs}) != 1:
        raise _UnusableError(
            f"{key!r} has {len(pairs)} pairs of factors, with A of sizes "
            f"{[len(A) for A, _ in pairs]}; the layer has {block.groups} groups"
        )
    return block.dense(*pairs)


def _pairs(value: Any, block: Block) -> list[tuple[Tensor, Tensor]]:
    """One pair of factors, or one for each group of channels."""
    if hasattr(value, "A") and hasattr(value, "B"):
        value = value.A, value.B
    is_list = isinstance(value, tuple | list)
    if block.groups > 1 and is_list and not any(isinstance(part, Tensor) for part in value):
        return [pair for part in value for pair in _pairs(part, block)]
    if not is_list or len(value) != 2:
        raise _UnusableError(
            f"{block.key!r} is a {type(value).__name__}, not a pair of factors (A, B)"
        )
    A, B = value
    if isinstance(block.module, nn.Embedding) and isinstance(A, Tensor) and A.ndim == 1:
        A = A.diag()
    name = f"of {block.key!r}"
    return [(_checked(A, f"factor A {name}"), _checked(B, f"factor B {name}"))]


def _checked(matrix: object, name: str) -> Tensor:
    if not isinstance(matrix, Tensor):
        raise _UnusableError(f"{name} is a {type(matrix).__name__}, not a tensor")
    if matrix.is_complex() or matrix.is_meta or matrix.layout != torch.strided:
        kind = f"{matrix.dtype}, {matrix.layout}, on {matrix.device}"
        raise _UnusableError(f"{name} is not a dense real tensor with numbers ({kind})")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.numel() > 250_000:
        raise _UnusableError(f"{name} has shape {tuple(matrix.shape)}, not that of a square matrix")
    matrix = matrix.detach().to("cpu", torch.float64)
    if not bool(matrix.isfinite().all()):
        raise _UnusableError(f"{name} holds NaN or inf")
    return matrix


def _state(model: nn.Module) -> list[tuple[str, Any]]:
    state: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        state.append((f"mode of {name!r}", module.training))
        for attribute, value in vars(module).items():
            if attribute.endswith("_hooks") and isinstance(value, dict):
                state.append((f"{attribute} of {name!r}", tuple(value)))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state.append((f"values of {name!r}", tensor.detach().clone()))
        state.append((f"requires_grad of {name!r}", tensor.requires_grad))
        gradient = tensor.grad if tensor.is_leaf else None
        state.append((f".grad of {name!r}", None if gradient is None else gradient.clone()))
    return state


def _difference(before: list[tuple[str, Any]], after: list[tuple[str, Any]]) -> str:
    if [name for name, _ in before] != [name for name, _ in after]:
        return "it has other modules or parameters"
    for (name, old), (_, new) in zip(before, after, strict=True):
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            same = old.shape == new.shape and torch.equal(old, new)
        else:
            same = type(old) is type(new) and old == new
        if not same:
            return name
    return ""
