"""Before anything is timed: does a contender compute what ours computes?"""

from statistics import mean, stdev
from typing import Any

from benchmarks.rows import Factors, Prepared, Work

TOLERANCE = 1e-3
DRAWS = 20
STANDARD_ERRORS = 6.0


def difference(work: Work, ours: list[Any], other: list[Any]) -> float:
    """Largest relative difference over the layers.

    Factors: of A ⊗ B. EKFAC: of the sum of the eigenvalues, since the order and, where they are
    equal, the bases are free. A diagnosis: of the errors themselves. Inverses: of the
    preconditioned gradient. Input-only: of A up to a
    constant, which libraries choose differently.
    """
    if work.kind == "diagnose":
        return max(abs(one - another) for one, another in zip(ours, other, strict=True))
    if work.kind == "EKFAC":
        return max(
            abs(float(one.double().sum() / another.double().sum()) - 1)
            for one, another in zip(ours, other, strict=True)
        )
    if work.kind in ("inverse", "precondition"):
        pairs = zip(ours, other, strict=True)
        return max(float((one - another).norm() / one.norm()) for one, another in pairs)
    if work.flavour == "input-only":
        ours, other = ([(A / A[-1, -1], B) for A, B in factors] for factors in (ours, other))
    return same_products(ours, other)


def same_products(ours: Factors, other: Factors) -> float:
    """Largest relative difference of A ⊗ B over the layers, without forming it.

    With A′, B′ scaled so that tr B = tr B′, it is ‖(A − A′) ⊗ B + A′ ⊗ (B − B′)‖, bounded by the
    norms of the two parts: no difference of large numbers. An A without bias is compared with the
    weight part.
    """
    worst = 0.0
    for (A, B), (A2, B2) in zip(ours, other, strict=True):
        A, B, A2, B2 = (factor.double() for factor in (A, B, A2, B2))
        A = A[: len(A2), : len(A2)]
        c = B2.trace() / B.trace()
        A2, B2 = c * A2, B2 / c
        apart = (A - A2).norm() / A.norm() + (A2.norm() / A.norm()) * (B - B2).norm() / B.norm()
        worst = max(worst, float(apart))
    return worst


def check(work: Work, results: dict[str, list[Any]], ours: Prepared) -> None:
    """Refuse to time what computes something else.

    Monte Carlo is random: there one draw of the trace of the whole matrix is compared with the mean
    and the spread of twenty draws of ours.

    Args:
        work: What was computed.
        results: What each contender computed, as ``read`` returns it; ours as ``"kfac_lib"``.
        ours: Computes more draws.

    Raises:
        ValueError: If a contender differs.
    """
    random = work.flavour == "Monte Carlo" and work.kind in ("KFAC", "EKFAC")
    draws = [ours.read(ours.run()) for _ in range(DRAWS if random else 0)]
    for label, other in results.items():
        if random:
            traces = [total_trace(work, draw, other) for draw in draws]
            error = abs(total_trace(work, other, other) - mean(traces))
            wrong = error > STANDARD_ERRORS * stdev(traces) + TOLERANCE * mean(traces)
        else:
            error = difference(work, results["kfac_lib"], other)
            wrong = not error < TOLERANCE
        if wrong:
            raise ValueError(f"{label} computes another {work}: it is off by {error:.2g}.")


def total_trace(work: Work, read: list[Any], like: list[Any]) -> float:
    """Trace over all layers: of A ⊗ B, A as far as another's goes, or the sum of eigenvalues."""
    if work.kind == "EKFAC":
        return float(sum(eigenvalues.double().sum() for eigenvalues in read))
    return sum(
        float(A[: len(A2), : len(A2)].double().trace() * B.double().trace())
        for (A, B), (A2, _) in zip(read, like, strict=True)
    )
