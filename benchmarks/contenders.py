"""Who competes, by the names that the tables use."""

from collections.abc import Iterable

from benchmarks import loop, ours, peers, reference
from benchmarks.problems import Made
from benchmarks.rows import Contender, Prepared, Work

OURS = "kfac_lib"
PEERS = ("curvlinops", "nngeometry", "backpack", "loop")
"""Whom the goals compare with: libraries from PyPI, and the paper's way of doing it."""

TIMED: dict[str, Contender] = {
    OURS: ours.by_hooks,
    "traced": ours.traced,
    "curvlinops": peers.curvlinops,
    "nngeometry": peers.nngeometry,
    "backpack": peers.backpack,
    "loop": loop.loop,
    "reference": reference.reference,
}
CHUNKED = "kfac_lib, chunk_size=1"
WEIGHED: dict[str, Contender] = {
    OURS: ours.by_hooks,
    CHUNKED: ours.chunked,
    "curvlinops": peers.curvlinops,
    "nngeometry": peers.nngeometry,
    "backpack": peers.backpack,
    "loop": loop.loop,
}
"""Those whose memory is measured."""


def prepare(made: Made, work: Work, labels: Iterable[str] = tuple(TIMED)) -> dict[str, Prepared]:
    """The contenders that know the work; for a training step, the optimizers."""
    if work.kind == "training step":
        return ours.training(made)
    prepared = {label: (TIMED | WEIGHED)[label](made, work) for label in labels}
    return {label: one for label, one in prepared.items() if one is not None}
