"""The work by libraries from PyPI: curvlinops, nngeometry, BackPACK.

Where a library has another constant than ours, ``read`` brings it into our convention, outside of
what is timed.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from backpack import backpack as extensions_on
from backpack import extend
from backpack import extensions as backpack_extensions
from curvlinops import EKFACLinearOperator, KFACInverseLinearOperator, KFACLinearOperator
from nngeometry.metrics import FIM, FIM_MonteCarlo
from nngeometry.object import PMatEKFAC, PMatKFAC, PVector
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.problems import Made
from benchmarks.rows import Factors, Prepared, Work


def curvlinops(made: Made, work: Work) -> Prepared | None:
    if work.layers != "all":
        return None
    if work.kind in ("KFAC", "EKFAC"):
        return _curvlinops_factors(made, work)
    if work.kind in ("inverse", "precondition"):
        return _curvlinops_inverse(made, work)
    return None


def _curvlinops_operator(made: Made, work: Work) -> KFACLinearOperator:
    kinds = {
        "type-II": "type-2",
        "Monte Carlo": "mc",
        "empirical": "empirical",
        "input-only": "forward-only",
    }
    operator = EKFACLinearOperator if work.kind == "EKFAC" else KFACLinearOperator
    return operator(
        made.model,
        made.loss_func,
        list(made.model.parameters()),
        [(made.X, made.y)],
        fisher_type=kinds[work.flavour],
        kfac_approx=work.sharing,
        check_deterministic=False,
        separate_weight_and_bias=False,
        num_data=len(made.X),
        num_per_example_loss_terms=1,
    )


def _curvlinops_factors(made: Made, work: Work) -> Prepared:
    # Its empirical gradients are those of ‖f − y‖², ours of ½‖f − y‖² (R holds the other 2).
    halved = 0.5 if made.problem.regression and work.flavour == "empirical" else 1.0

    def run() -> Any:
        operator = _curvlinops_operator(made, work)
        operator.compute_kronecker_factors()
        if work.kind == "EKFAC":
            operator.compute_eigenvalue_correction()
        return operator

    def read(operator: Any) -> list[Any]:
        if work.kind == "EKFAC":
            return [operator._corrected_eigenvalues[name] for name in operator._mapping]
        A, B = operator._input_covariances, operator._gradient_covariances
        return [(halved * A[name], B[name]) for name in A]

    return Prepared(run, read)


def _curvlinops_inverse(made: Made, work: Work) -> Prepared:
    operator = _curvlinops_operator(made, Work())
    operator.compute_kronecker_factors()
    kind = {"Exact": "use_exact_damping", "Factored": "use_heuristic_damping"}[work.damping]
    gradient = list(made.gradient())

    def invert() -> Any:
        inverse = KFACInverseLinearOperator(operator, damping=made.problem.delta, **{kind: True})
        for name in operator._mapping:  # it is lazy, and keeps what it has inverted
            inverse._compute_or_get_cached_inverse(name)
        return inverse

    if work.kind == "inverse":
        return Prepared(invert, lambda inverse: inverse @ gradient)
    inverse = invert()
    return Prepared(lambda: inverse @ gradient, list)


class OneBatch(DataLoader):
    """A loader that hands over its batch as it is, without the time that collating takes."""

    def __init__(self, X: Tensor, y: Tensor) -> None:
        super().__init__(TensorDataset(X, y), batch_size=len(X))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.dataset.tensors


def nngeometry(made: Made, work: Work) -> Prepared | None:
    """It knows neither reduce nor a Linear with shared axes, nor labels of a normal distribution.

    Its inverse is damped as ours is by Factored.
    """
    known = {
        "KFAC": work.flavour != "input-only",
        "EKFAC": True,
        "inverse": work.damping == "Factored",
        "precondition": work.damping == "Factored",
    }
    normal_labels = made.problem.regression and work.flavour == "Monte Carlo"
    shared = work.sharing == "reduce" or made.problem.net == "tokens"
    if not known.get(work.kind) or work.layers != "all" or normal_labels or shared:
        return None
    # It asks for the gradient of its inputs, in place: they must be its own.
    loader = OneBatch(made.X.clone(), made.y)
    if work.kind in ("KFAC", "EKFAC"):
        return _nngeometry_factors(made, work, loader)
    return _nngeometry_inverse(made, work, loader)


def _nngeometry_matrix(made: Made, work: Work, loader: OneBatch) -> Any:
    representation = PMatEKFAC if work.kind == "EKFAC" else PMatKFAC
    variant = "regression" if made.problem.regression else "classif_logits"

    def per_datum_loss(X: Tensor, y: Tensor) -> Tensor:
        f = made.model(X)
        if made.problem.regression:
            return 0.5 * (f - y).square().sum(1, keepdim=True)
        return nn.functional.cross_entropy(f, y, reduction="none").unsqueeze(1)

    if work.flavour == "Monte Carlo":
        return FIM_MonteCarlo(made.model, loader, representation, variant)
    if work.flavour == "empirical":
        return FIM(made.model, loader, representation, "regression", function=per_datum_loss)
    return FIM(made.model, loader, representation, variant)


def _nngeometry_scale(made: Made) -> float:
    """It has no 2/C of a mean squared error."""
    return 2 / made.problem.outputs if made.problem.regression else 1.0


def _nngeometry_factors(made: Made, work: Work, loader: OneBatch) -> Prepared:
    def run() -> Any:
        matrix = _nngeometry_matrix(made, work, loader)
        if work.kind == "EKFAC":
            matrix.update_diag(loader)
        return matrix

    def read(matrix: Any) -> list[Any]:
        scale = _nngeometry_scale(made)
        if work.kind == "EKFAC":
            return [scale * eigenvalues for eigenvalues in matrix.data[1].values()]
        return [(scale * A, B) for A, B in matrix.data.values()]

    return Prepared(run, read)


def _nngeometry_inverse(made: Made, work: Work, loader: OneBatch) -> Prepared:
    scale, matrix = _nngeometry_scale(made), _nngeometry_matrix(made, Work(), loader)
    scaled = PMatKFAC(matrix.generator, {i: (scale * A, B) for i, (A, B) in matrix.data.items()})
    gradient = made.gradient()
    pairs = zip(gradient[::2], gradient[1::2], strict=True)
    collection = matrix.generator.layer_collection
    vector = PVector(collection, dict_repr=dict(zip(collection.layers, pairs, strict=True)))

    def read(step: Any) -> list[Tensor]:
        return [part for parts in step.to_dict().values() for part in parts]

    if work.kind == "inverse":
        return Prepared(
            lambda: scaled.inverse(made.problem.delta), lambda inverse: read(inverse.mv(vector))
        )
    inverse = scaled.inverse(made.problem.delta)
    return Prepared(lambda: inverse.mv(vector), read)


def backpack(made: Made, work: Work) -> Prepared | None:
    """KFLR is type-II, KFAC one Monte Carlo sample; MLPs only, see below.

    For a convolution its G is another quantity. Its A has no bias, and is returned for the weight.
    """
    kinds = {
        "type-II": ("kflr", backpack_extensions.KFLR),
        "Monte Carlo": ("kfac", backpack_extensions.KFAC),
    }
    if work.kind != "KFAC" or work.flavour not in kinds or work.layers != "all":
        return None
    if made.problem.net != "mlp":
        return None
    field, extension = kinds[work.flavour]
    # It marks modules in place: they must be its own.
    model, loss_func = extend(deepcopy(made.model)), extend(deepcopy(made.loss_func))

    def run() -> Factors:
        model.zero_grad()
        with extensions_on(extension()):
            loss_func(model(made.X), made.y).backward()
        layers = [module for module in model if isinstance(module, nn.Linear)]
        return [tuple(reversed(getattr(layer.weight, field))) for layer in layers]

    return Prepared(run, list)
