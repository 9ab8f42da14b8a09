"""One block of one case, its rows and its right numbers, and the constants that have a name.

Explained in the section :ref:`test-kit`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import prod
from typing import Literal, NamedTuple

import einops
import torch
from torch import Tensor, nn

from kfac_lib.accumulate import Reduce
from kfac_lib.exact_cases import ExactCase
from kfac_lib.fisher import InputOnly, MonteCarlo, RandomSigns
from kfac_lib.flattening import Order
from kfac_lib.layers import groups_of
from kfac_lib.losses import criterion_of
from kfac_lib.wrong_rows import prediction_of, rows_of

Part = Literal["joint", "weight", "bias"]
"""What a block belongs to: [W b], W alone, or b alone."""


class Scale(NamedTuple):
    """A constant with a name, a product of powers of sizes such as N · S⁻¹ (:ref:`test-kit`).

    Example:
        >>> Scale((("N", 1), ("S", -1))).name
        'N/S'
    """

    powers: tuple[tuple[str, int], ...]

    @property
    def complexity(self) -> int:
        """How much it takes to say; 0 for the constant 1."""
        return sum(abs(power) for _, power in self.powers)

    @property
    def name(self) -> str:
        """The constant in words, such as ``"1/N²"``."""
        above, below = (
            "·".join(
                letter + ("²" if abs(power) == 2 else "")
                for letter, power in reversed(self.powers)
                if sign * power > 0
            )
            for sign in (1, -1)
        )
        divisor = f"({below})" if "·" in below else below
        return f"{above or 1}/{divisor}" if below else above or "1"

    @property
    def legend(self) -> str:
        """What its letters stand for, such as ``" (N: data)"``; empty for numbers."""
        meanings = [f"{a}: {meaning}" for a, meaning in LETTERS.items() if a in self.name]
        return f" ({', '.join(meanings)})" if meanings else ""


LETTERS = {
    "N": "data",
    "S": "positions that share the weight",
    "C": "entries of one prediction",
    "K": "entries along axis 1 of the prediction",
    "T": "positions of the prediction",
    "M": "samples",
    "R": "reduction factor",
}
"""What the letters of a constant stand for."""


def _scales() -> Iterator[Scale]:
    letters = "M", "T", "K", "C", "S", "N", "2"
    for powers in product(*[(0, 1, -1, 2, -2)] * len(letters)):
        named = tuple((a, p) for a, p in zip(letters, powers, strict=True) if p)
        if Scale(named).complexity <= 3 and len(named) <= 2:
            yield Scale(named)
    for special in (
        "R of the mean / R",
        "R of the sum / R",
        "R",
        "R²",
        "1/R",
        "1/(N·R)",
        "1/(N·C·R)",
    ):
        yield Scale(((special, 1),))


SCALES = tuple(_scales())
"""All constants that are tried.

:meta hide-value:
"""


@dataclass(frozen=True)
class Block:
    """One block of one case: what a KFAC returns under one key (:ref:`test-kit`).

    Args:
        case: The case.
        layer: Name of the layer.
        part: Whether weight and bias are joint, or which of the two it is.
        order: Flattening of dense blocks.
        group: Which group of channels is meant; all of them when not given.
    """

    case: ExactCase
    layer: str
    part: Part
    order: Order
    group: int | None = None

    @property
    def key(self) -> str:
        """The name under which the block is returned."""
        return self.layer if self.part == "joint" else f"{self.layer}.{self.part}".lstrip(".")

    @property
    def module(self) -> nn.Module:
        """The layer itself."""
        return self.case.model.get_submodule(self.layer)

    @property
    def has_bias(self) -> bool:
        """Whether the layer adds a bias."""
        return getattr(self.module, "bias", None) is not None

    @property
    def bias_is_joint(self) -> bool:
        """Whether a 1 is appended to the rows."""
        return self.part == "joint" and self.has_bias

    @property
    def groups(self) -> int:
        """Number of groups of channels, each with factors of its own."""
        return groups_of(self.module)

    def of_groups(self) -> list["Block"]:
        """Return the blocks of the groups; the block itself where there is one group."""
        if self.groups == 1 or self.group is not None:
            return [self]
        return [replace(self, group=group) for group in range(self.groups)]

    @cached_property
    def sizes(self) -> dict[str, float]:
        """What the letters of a scale stand for here."""
        y = self.case.data[1]
        criterion, f = criterion_of(self.case.loss_func), prediction_of(self.case)
        counted = int(criterion.counted(f, y).sum())
        x, _ = self.rows("right")
        denominator = criterion.denominator(f, y)
        mean_R, sum_R = (
            replace(criterion, reduction=reduction).reduction_factor(denominator)
            for reduction in ("mean", "sum")
        )
        R = criterion.reduction_factor(denominator)
        random = (
            self.case.fisher if isinstance(self.case.fisher, MonteCarlo | RandomSigns) else None
        )
        return {
            "2": 2,
            "N": counted,
            "S": x.shape[1],
            "C": f[0].numel(),
            "K": f.shape[1],
            "T": f[0].numel() // f.shape[1],
            "M": random.samples if random else 1,
            "R of the mean / R": mean_R / R,
            "R of the sum / R": sum_R / R,
            "R": R,
            "R²": R**2,
            "1/R": 1 / R,
            "1/(N·R)": 1 / (len(y) * R),
            "1/(N·C·R)": 1 / (f.numel() * R),
        }

    @cached_property
    def scales(self) -> Tensor:
        """The value of every constant of :data:`SCALES`, shape (2, constants).

        N is the number of data that count in the first row, of all data in the second.
        """
        return torch.tensor(
            [
                [prod(sizes[letter] ** power for letter, power in scale.powers) for scale in SCALES]
                for sizes in (self.sizes, self.sizes | {"N": len(self.case.data[0])})
            ],
            dtype=torch.float64,
        )

    def rows(self, vectors: str, calls: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Rows x̃ of shape (N, S, D_in [+1]) and g of shape (V, N, S, D_out), in float64."""
        of_calls = rows_of(self.case, vectors)[self.layer][calls]
        x, g = (torch.cat(tensors, dim=-2) for tensors in zip(*of_calls, strict=True))
        return self.appended(x), self.of_group(g)

    def of_group(self, of_all: Tensor) -> Tensor:
        """Return the columns of this group, of those of all groups."""
        return of_all if self.group is None else of_all.chunk(self.groups, -1)[self.group]

    def appended(self, x: Tensor) -> Tensor:
        """Return x̃ of this part and group, from rows x of all groups."""
        ones = x.new_ones(*x.shape[:2], 1)
        if self.part == "bias":
            return ones
        x = self.of_group(x)
        return torch.cat([x, ones], -1) if self.bias_is_joint else x

    def dense(self, *pairs: tuple[Tensor, Tensor]) -> Tensor:
        """The block of a pair of factors, or of one for each group, in the order of this block."""
        if len(pairs) == 1:
            A, B = pairs[0]
            return torch.kron(A, B) if self.order == "cvec" else torch.kron(B, A)
        by_rows = torch.block_diag(*[torch.kron(B, A) for A, B in pairs])  # type: ignore[no-untyped-call]
        return self.ordered(by_rows, len(pairs[0][0]))

    def ordered(self, by_rows: Tensor, D_in: int) -> Tensor:
        """A matrix in rvec order, in the order of this block."""
        if self.order == "rvec":
            return by_rows
        return einops.rearrange(by_rows, "(o i) (p j) -> (i o) (j p)", i=D_in, j=D_in)

    def factors(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """KFAC's definition, A and B, on rows that may be wrong."""
        return self.input_factor(x), self.output_factor(g)

    def input_factor(self, x: Tensor) -> Tensor:
        """R Σ x̃ x̃ᵀ, of rows or of rows summed over positions."""
        if isinstance(self.case.sharing, Reduce):
            x = x.sum(1, keepdim=True)
        rows = x.flatten(0, 1)
        return self.sizes["R"] * rows.T @ rows

    def output_factor(self, g: Tensor) -> Tensor:
        """1/(N S) Σ g gᵀ, or 1/(N S²) with g summed over positions."""
        N, S = self.sizes["N"], g.shape[2]
        if isinstance(self.case.fisher, InputOnly):
            return torch.eye(g.shape[-1], dtype=g.dtype)
        if isinstance(self.case.sharing, Reduce):
            g, S = g.sum(2, keepdim=True), S**2
        rows = g.flatten(0, 2)
        return rows.T @ rows / (N * S)

    @cached_property
    def definition(self) -> Tensor:
        """KFAC as it is defined, dense."""
        return self.dense(*(block.factors(*block.rows("right")) for block in self.of_groups()))
