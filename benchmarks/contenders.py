"""The same work by each library: a function that returns the factors of every layer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from curvlinops import KFACLinearOperator
from nngeometry.metrics import FIM, FIM_MonteCarlo
from nngeometry.object import PMatKFAC
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kfac_lib import KFAC, Empirical, MonteCarlo, TypeII

Factors = list[tuple[Tensor, Tensor]]


@dataclass
class Problem:
    """A network, its loss and one batch, in float32."""

    name: str
    widths: tuple[int, ...]
    N: int = 512
    model: nn.Sequential = field(init=False)
    X: Tensor = field(init=False)
    y: Tensor = field(init=False)
    loss_func: nn.Module = field(default_factory=nn.CrossEntropyLoss)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        modules: list[nn.Module] = []
        for D_in, D_out in zip(self.widths[:-1], self.widths[1:], strict=True):
            modules += [nn.Linear(D_in, D_out), nn.ReLU()]
        self.model = nn.Sequential(*modules[:-1])
        self.X = torch.randn(self.N, self.widths[0])
        self.y = torch.randint(self.widths[-1], (self.N,))

    def gradient(self) -> tuple[Tensor, ...]:
        """One gradient of the loss: the unit in which everything is measured."""
        loss = self.loss_func(self.model(self.X), self.y)
        return torch.autograd.grad(loss, list(self.model.parameters()))


class OneBatch(DataLoader):
    """A loader that hands over its batch as it is, without the time that collating takes."""

    def __init__(self, X: Tensor, y: Tensor) -> None:
        super().__init__(TensorDataset(X, y), batch_size=len(X))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.dataset.tensors


def ours(problem: Problem, flavour: str) -> Callable[[], Factors]:
    fisher = {"type-II": TypeII(), "Monte Carlo": MonteCarlo(1), "empirical": Empirical()}[flavour]

    def run() -> Factors:
        data = (problem.X, problem.y)
        kfac = KFAC.compute(problem.model, problem.loss_func, data, fisher)
        return [(K.A, K.B) for K in kfac.values()]

    return run


def curvlinops(problem: Problem, flavour: str) -> Callable[[], Factors]:
    kind = {"type-II": "type-2", "Monte Carlo": "mc", "empirical": "empirical"}[flavour]
    data, parameters = [(problem.X, problem.y)], list(problem.model.parameters())

    def run() -> Factors:
        operator = KFACLinearOperator(
            problem.model,
            problem.loss_func,
            parameters,
            data,
            fisher_type=kind,
            check_deterministic=False,
            separate_weight_and_bias=False,
            num_data=problem.N,
            num_per_example_loss_terms=1,
        )
        operator.compute_kronecker_factors()
        A, B = operator._input_covariances, operator._gradient_covariances
        return [(A[name], B[name]) for name in A]

    return run


def nngeometry(problem: Problem, flavour: str) -> Callable[[], Factors]:
    loader = OneBatch(problem.X, problem.y)

    def per_datum_loss(X: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(problem.model(X), y, reduction="none").unsqueeze(1)

    def run() -> Factors:
        if flavour == "type-II":
            matrix = FIM(problem.model, loader, PMatKFAC, "classif_logits")
        elif flavour == "Monte Carlo":
            matrix = FIM_MonteCarlo(problem.model, loader, PMatKFAC, "classif_logits")
        else:
            matrix = FIM(problem.model, loader, PMatKFAC, "regression", function=per_datum_loss)
        return list(matrix.data.values())

    return run


CONTENDERS = {"kfac_lib": ours, "curvlinops": curvlinops, "nngeometry": nngeometry}


def same_products(one: Factors, other: Factors) -> float:
    """Largest relative difference of A ⊗ B over the layers, without forming it.

    With unit factors a, b and norms s: ‖s a⊗b − s′ a′⊗b′‖² = s² + s′² − 2 s s′ ⟨a, a′⟩⟨b, b′⟩.
    """
    worst = 0.0
    for (A, B), (A2, B2) in zip(one, other, strict=True):
        A, B, A2, B2 = (factor.double() for factor in (A, B, A2, B2))
        s, s2 = A.norm() * B.norm(), A2.norm() * B2.norm()
        inner = (A * A2).sum() * (B * B2).sum()
        worst = max(worst, float(((s**2 + s2**2 - 2 * inner).clamp(min=0).sqrt()) / s))
    return worst
