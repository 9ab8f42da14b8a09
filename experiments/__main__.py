"""``python -m experiments NAME``: compute what ``book/NAME.json`` lacks."""

import argparse
from pathlib import Path

import torch

from experiments import damping
from experiments.store import run

EXPERIMENTS = {experiment.name: experiment for experiment in (damping.EXPERIMENT,)}
BOOK = Path(__file__).parent.parent / "book"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--most", type=int, help="stop after so many new cells")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run(EXPERIMENTS[arguments.name], BOOK, arguments.most)


if __name__ == "__main__":
    main()
