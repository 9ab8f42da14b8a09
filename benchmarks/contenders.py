"""The same work by each library: a function that returns the factors of every layer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from curvlinops import EKFACLinearOperator, KFACLinearOperator
from nngeometry.metrics import FIM, FIM_MonteCarlo
from nngeometry.object import PMatEKFAC, PMatKFAC
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kfac_lib import EKFAC, KFAC, Empirical, Expand, MonteCarlo, Reduce, TypeII
from kfac_lib.kronecker import Element

Factors = list[tuple[Tensor, ...]]


@dataclass
class Problem:
    """A network, its loss and one batch, in float32."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    N: int
    classes: int = 10
    model: nn.Module = field(init=False)
    X: Tensor = field(init=False)
    y: Tensor = field(init=False)
    loss_func: nn.Module = field(default_factory=nn.CrossEntropyLoss)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = self.build()
        self.X = torch.randn(self.N, *self.shape)
        self.y = torch.randint(self.classes, (self.N,))

    def gradient(self) -> tuple[Tensor, ...]:
        """One gradient of the loss: the unit in which everything is measured."""
        loss = self.loss_func(self.model(self.X), self.y)
        return torch.autograd.grad(loss, list(self.model.parameters()))


def mlp(*widths: int) -> nn.Module:
    modules: list[nn.Module] = []
    for D_in, D_out in pairwise(widths):
        modules += [nn.Linear(D_in, D_out), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 10)),
    )


class MeanOverTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def tokens() -> nn.Module:
    body = (nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    return nn.Sequential(*body, MeanOverTokens(), nn.Linear(64, 10))


class OneBatch(DataLoader):
    """A loader that hands over its batch as it is, without the time that collating takes."""

    def __init__(self, X: Tensor, y: Tensor) -> None:
        super().__init__(TensorDataset(X, y), batch_size=len(X))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.dataset.tensors


@dataclass(frozen=True)
class Work:
    """What is computed: a flavour, a sharing, KFAC or EKFAC."""

    flavour: str = "type-II"
    sharing: str = "expand"
    ekfac: bool = False

    def __str__(self) -> str:
        kind = ("EKFAC, " if self.ekfac else "") + self.flavour
        return kind if self.sharing == "expand" else f"{kind}, {self.sharing}"


def traced(problem: Problem, work: Work) -> Callable[[], Factors]:
    """Ours from a traced graph; traced once, outside of what is timed."""
    return ours(problem, work, params=dict(problem.model.named_parameters()))


def ours(
    problem: Problem, work: Work, params: dict[str, Tensor] | None = None
) -> Callable[[], Factors]:
    fisher = {"type-II": TypeII(), "Monte Carlo": MonteCarlo(1), "empirical": Empirical()}
    sharing = {"expand": Expand(), "reduce": Reduce()}[work.sharing]
    kind = EKFAC if work.ekfac else KFAC

    def run() -> Factors:
        data = (problem.X, problem.y)
        blocks = kind.compute(
            problem.model, problem.loss_func, data, fisher[work.flavour], sharing, params=params
        )
        return [_parts(block) for block in blocks.values()]

    return run


def _parts(block: Element) -> tuple[Tensor, ...]:
    return tuple(part for part in vars(block).values() if part is not None)


def curvlinops(problem: Problem, work: Work) -> Callable[[], Factors]:
    kind = {"type-II": "type-2", "Monte Carlo": "mc", "empirical": "empirical"}[work.flavour]
    data, parameters = [(problem.X, problem.y)], list(problem.model.parameters())
    operator_kind = EKFACLinearOperator if work.ekfac else KFACLinearOperator

    def run() -> Factors:
        operator = operator_kind(
            problem.model,
            problem.loss_func,
            parameters,
            data,
            fisher_type=kind,
            kfac_approx=work.sharing,
            check_deterministic=False,
            separate_weight_and_bias=False,
            num_data=problem.N,
            num_per_example_loss_terms=1,
        )
        operator.compute_kronecker_factors()
        if work.ekfac:
            operator.compute_eigenvalue_correction()
            return []
        A, B = operator._input_covariances, operator._gradient_covariances
        return [(A[name], B[name]) for name in A]

    return run


def nngeometry(problem: Problem, work: Work) -> Callable[[], Factors]:
    loader = OneBatch(problem.X, problem.y)
    representation = PMatEKFAC if work.ekfac else PMatKFAC

    def per_datum_loss(X: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(problem.model(X), y, reduction="none").unsqueeze(1)

    def run() -> Factors:
        if work.flavour == "type-II":
            matrix = FIM(problem.model, loader, representation, "classif_logits")
        elif work.flavour == "Monte Carlo":
            matrix = FIM_MonteCarlo(problem.model, loader, representation, "classif_logits")
        else:
            matrix = FIM(
                problem.model, loader, representation, "regression", function=per_datum_loss
            )
        if work.ekfac:
            matrix.update_diag(loader)
            return []
        return list(matrix.data.values())

    return run


CONTENDERS = {
    "kfac_lib": ours,
    "traced": traced,
    "curvlinops": curvlinops,
    "nngeometry": nngeometry,
}


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
