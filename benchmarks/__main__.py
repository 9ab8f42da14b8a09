"""Run the benchmarks and write benchmarks/results.json and benchmarks/results.md."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

if __name__ == "__main__":
    sys.exit(
        pytest.main(
            [
                str(HERE),
                "--quiet",
                "-p",
                "no:cacheprovider",
                "--benchmark-disable-gc",
                f"--benchmark-json={HERE / 'results.json'}",
                # The peers' own warnings are not ours to mend.
                "-W",
                "default",
                *sys.argv[1:],
            ]
        )
    )
