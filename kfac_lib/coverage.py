"""Which parameters a computation covers: nothing is left out silently.

Names select layers and parameters by :mod:`fnmatch` patterns; a parameter that is tied goes by any
of its names. Explained in the section :ref:`kfac-rows`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor, nn

from kfac_lib.layers import (
    Operation,
    check_options,
    groups_of,
    is_supported,
    kind_of,
    lookup_of,
    supported,
)


@dataclass(frozen=True)
class Coverage:
    """The layers to take, and the parameters left out, by name (:ref:`kfac-rows`).

    Args:
        layers: The layers to take, in the model's order; or the operations of a traced function.
        biases: Names of those whose bias is covered too.
        frozen: Parameters that do not require grad.
        ignored: Trainable parameters that the caller leaves out.
        twins: Further layers that hold the same weight as one of the layers.
        parameters: For each key of a traced function the names of weight and bias (None without
            a bias), where they are not ``key.weight`` and ``key.bias``.
    """

    layers: dict[str, nn.Module | Operation]
    biases: frozenset[str]
    frozen: tuple[str, ...]
    ignored: tuple[str, ...]
    twins: dict[str, tuple[nn.Module, ...]] = field(default_factory=dict)
    parameters: dict[str, tuple[str, str | None]] = field(default_factory=dict)

    def names(self, layer: str) -> tuple[str, str | None]:
        """Return the names of a layer's weight and bias, None where no bias is covered."""
        prefix = f"{layer}." if layer else ""
        bias = f"{prefix}bias" if layer in self.biases else None
        return self.parameters.get(layer, (f"{prefix}weight", bias))


def cover(
    model: nn.Module, layers: Sequence[str] | str | None = None, ignore: Sequence[str] | str = ()
) -> Coverage:
    """Decide which layers to take (:ref:`kfac-rows`).

    A pattern matches a parameter by the parameter's own name (``"fc.bias"``), by its layer's
    (``"fc"``), or by that of a module around it (``"encoder"``).

    Args:
        model: Network.
        layers: Patterns of what to take; all trainable parameters when not given.
        ignore: Patterns of what to leave out.

    Returns:
        The decision.

    Raises:
        TypeError: If the model is no module.
        ValueError: If a pattern matches nothing, something is named in both, nothing is left, or
            a bias is to be covered without its weight.
        NotImplementedError: If a trainable parameter that is not left out belongs to no supported
            layer, or is tied in a way that is not: in transposed roles, or with other biases.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> list(cover(net, ignore=["0"]).layers)
        ['1']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"The model is a {type(model).__name__}; give a torch.nn.Module.")
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = {
        f"{name}.{leaf}" if name else leaf: p
        for name, module in modules.items()
        for leaf, p in module._parameters.items()
        if p is not None
    }
    names_of = _names_by_tensor(parameters)
    wanted, frozen = select(parameters, layers, ignore)
    unsupported = [n for n in wanted if not is_supported(modules[_owner(n)]) or not _is_known(n)]
    if unsupported:
        first = unsupported[0]
        owner = _owner(first)
        # A module's name leaves out all that it holds: right only where none of it is wanted.
        whole = {
            _owner(n)
            for n in unsupported
            if _owner(n) and all(m in unsupported for m in wanted if m.startswith(f"{_owner(n)}."))
        }
        paste = list(dict.fromkeys(_owner(n) if _owner(n) in whole else n for n in unsupported))
        what = f"layer {owner!r}" if owner else "the model's own parameter"
        trace = (
            "Its projections call no module: where the function takes params, trace the model "
            "with params=dict(model.named_parameters()); to train with a preconditioner, write "
            "them as nn.Linear. Or pass"
        )
        attention = isinstance(modules[owner], nn.MultiheadAttention)
        raise NotImplementedError(
            f"KFAC does not support {what} ({type(modules[owner]).__name__}), which holds the "
            f"trainable parameter {first!r}. Supported: {supported()}. "
            f"{trace if attention else 'Pass'} ignore={_paste(paste)} to leave out what is not "
            "supported."
        )
    weights = [n for n in wanted if n.rpartition(".")[2] == "weight"]
    biases = [n for n in wanted if n.rpartition(".")[2] == "bias"]
    alone = [n for n in biases if _sibling(n, "weight") not in weights]
    if alone:
        raise ValueError(
            f"{', '.join(alone)}: trainable, but its weight is frozen or left out. A bias is "
            f"covered with its weight only; pass ignore={_paste(alone)} to leave it out."
        )
    found: dict[str, nn.Module | Operation] = {}
    twins: dict[str, tuple[nn.Module, ...]] = {}
    for name in weights:
        aliases = names_of[id(parameters[name])]
        if name != aliases[0]:
            continue
        owners = {id(modules[_owner(n)]): _owner(n) for n in reversed(aliases)}
        layers_of = {owner: modules[owner] for owner in reversed(owners.values())}
        if len(layers_of) > 1:
            _check_tied(layers_of, parameters, set(map(_owner, biases)))
            twins[_owner(name)] = tuple(layers_of.values())[1:]
        check_options(_owner(name), modules[_owner(name)])
        found[_owner(name)] = modules[_owner(name)]
    for name in biases:
        owners_of_bias = {id(modules[_owner(n)]) for n in names_of[id(parameters[name])]}
        weight_names = names_of[id(parameters[_sibling(name, "weight")])]
        if owners_of_bias != {id(modules[_owner(n)]) for n in weight_names}:
            tied = names_of[id(parameters[name])]
            raise NotImplementedError(
                f"The parameters {', '.join(tied)} are one and the same bias (tied), but their "
                f"weights are not. Pass ignore={_paste(tied)} to leave it out."
            )
    return Coverage(
        layers=found,
        biases=frozenset(_owner(n) for n in biases if _owner(n) in found),
        frozen=tuple(frozen),
        ignored=tuple(n for n in parameters if n not in wanted and n not in frozen),
        twins=twins,
    )


def select(
    parameters: Mapping[str, Tensor],
    layers: Sequence[str] | str | None = None,
    ignore: Sequence[str] | str = (),
) -> tuple[list[str], list[str]]:
    """Decide which parameters to take, by their names (:ref:`kfac-rows`).

    Args:
        parameters: The parameters by name. One :class:`torch.nn.Parameter` that does not require
            grad is frozen; any other tensor is trainable.
        layers: Patterns of what to take; all trainable parameters when not given.
        ignore: Patterns of what to leave out.

    Returns:
        The names of those to take, and of the frozen ones.

    Raises:
        ValueError: If a pattern matches nothing, something is named in both, or nothing is left.

    Example:
        >>> select(dict(nn.Sequential(nn.Linear(2, 3)).named_parameters()), ignore="*.bias")
        (['0.weight'], [])
    """
    names_of = _names_by_tensor(parameters)
    frozen = [
        name
        for name, p in parameters.items()
        if isinstance(p, nn.Parameter) and not p.requires_grad
    ]
    taken = set(parameters) if layers is None else set()
    for pattern in [] if layers is None else _as_list(layers):
        asked = _matching([pattern], "layers", parameters)
        asked = {alias for name in asked for alias in names_of[id(parameters[name])]}
        taken |= asked
        if asked <= set(frozen):
            raise ValueError(
                f"layers: {pattern!r} names frozen parameters alone ({', '.join(sorted(asked))}). "
                "Call requires_grad_() on them, or leave the pattern out."
            )
    ignored = _matching(_as_list(ignore), "ignore", parameters)
    ignored = {alias for name in ignored for alias in names_of[id(parameters[name])]}
    both = sorted(taken & ignored) if layers is not None else []
    if both:
        raise ValueError(f"Named in both layers and ignore: {', '.join(both)}. Name each in one.")
    wanted = [n for n in parameters if n in taken and n not in ignored and n not in frozen]
    if not wanted:
        raise ValueError(
            "No trainable parameter is left to cover: all are frozen, ignored or not selected "
            f"(frozen: {', '.join(frozen) or 'none'})."
        )
    return wanted, frozen


def _check_tied(
    layers: dict[str, nn.Module], parameters: dict[str, nn.Parameter], with_bias: set[str]
) -> None:
    """Refuse layers with one weight whose rows do not join along S."""
    names = list(layers)
    first = layers[names[0]]
    tied = [f"{name}.weight" if name else "weight" for name in names]
    what = f"The parameters {', '.join(tied)} are one and the same (tied)"
    for layer in layers.values():
        if kind_of(layer) is not kind_of(first) or groups_of(layer) != groups_of(first):
            kinds = ", ".join(f"{n} ({type(m).__name__})" for n, m in layers.items())
            roles = " (an Embedding looks up columns of what a Linear multiplies)"
            raise NotImplementedError(
                f"{what}, in layers of different kinds: {kinds}. Inputs of one are not inputs of "
                f"the other{roles if any(map(lookup_of, layers.values())) else ''}, so they have "
                f"no factors in common. Pass ignore={_paste(tied)} to leave it out."
            )
        if lookup_of(layer) != lookup_of(first):
            raise NotImplementedError(
                f"{what}, with different padding_idx. Give both the same, or pass "
                f"ignore={_paste(tied)} to leave it out."
            )
    biases = {
        id(parameters[f"{n}.bias" if n else "bias"]) if n in with_bias else None for n in names
    }
    if len(biases) > 1:
        own = [f"{n}.bias" if n else "bias" for n in names if n in with_bias]
        raise NotImplementedError(
            f"{what}, but the biases of their layers differ, so [W b] is not one matrix. Pass "
            f"ignore={_paste(own)} to leave the biases out, or ignore={_paste(tied)}."
        )


def check_per_datum(model: nn.Module) -> None:
    """Refuse modules whose output for a datum is random or depends on other data.

    See :ref:`kfac-rows`: the factors of such a net are not defined datum by datum.

    Raises:
        ValueError: For active dropout, batch normalization over batch statistics, and instance
            normalization that would update its running statistics.

    Example:
        >>> check_per_datum(nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.1)).eval())
    """
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            raise ValueError(
                f"Layer {name!r} ({kind}) normalizes over the batch, so one datum's prediction "
                "depends on the others. Call model.eval() first (with running statistics)."
            )
        if (
            isinstance(module, nn.modules.instancenorm._InstanceNorm)
            and module.training
            and module.track_running_stats
        ):
            raise ValueError(
                f"Layer {name!r} ({kind}) would update its running statistics in training mode. "
                "Call model.eval() first."
            )
        p = getattr(module, "p", 0) if isinstance(module, nn.modules.dropout._DropoutNd) else 0
        p = module.dropout if isinstance(module, nn.MultiheadAttention | nn.RNNBase) else p
        if module.training and (p > 0 or isinstance(module, nn.RReLU)):
            raise ValueError(
                f"Layer {name!r} ({kind}) is random in training mode, so the curvature is that of "
                "a random net. Call model.eval() first."
            )


def _names_by_tensor(parameters: Mapping[str, Tensor]) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    return names


def _as_list(patterns: Sequence[str] | str) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _matching(patterns: Iterable[str], argument: str, parameters: Iterable[str]) -> set[str]:
    found: set[str] = set()
    names = list(parameters)
    for pattern in patterns:
        # A name with brackets in it is itself first, a pattern second.
        hits = {n for n in names if pattern in _names_of(n)} or {
            n for n in names if any(fnmatchcase(c, pattern) for c in _names_of(n))
        }
        if not hits:
            raise ValueError(
                f"{argument}: {pattern!r} matches no layer or parameter. The parameters are "
                f"{', '.join(names) or 'none'}."
            )
        found |= hits
    return found


def _names_of(parameter: str) -> list[str]:
    parts = parameter.split(".")
    return [""] * (len(parts) == 1) + [".".join(parts[: i + 1]) for i in range(len(parts))]


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _sibling(parameter: str, leaf: str) -> str:
    owner = _owner(parameter)
    return f"{owner}.{leaf}" if owner else leaf


def _is_known(parameter: str) -> bool:
    return parameter.rpartition(".")[2] in ("weight", "bias")


def _paste(names: Iterable[str]) -> str:
    return "[" + ", ".join(f'"{name}"' for name in names) + "]"
