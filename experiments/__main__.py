"""``python -m experiments NAME``: compute what ``book/NAME.json`` lacks."""

import argparse
import signal
import sys
from pathlib import Path

import torch

from experiments import damping, finals, tuning
from experiments.store import run

BOOK = Path(__file__).parent.parent / "book"
EXPERIMENTS = {
    "damping": lambda: damping.EXPERIMENT,
    "tuning": lambda: tuning.EXPERIMENT,
    "training": lambda: finals.experiment(BOOK),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--most", type=int, help="stop after so many new cells")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with one thread")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which ends the other processes too
    run(EXPERIMENTS[arguments.name](), BOOK, arguments.most, arguments.jobs)


if __name__ == "__main__":
    main()
