"""Run the benchmarks and write benchmarks/results.json and benchmarks/results.md."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# Freed memory stays with the process, for every contender alike: handing it back and faulting it in
# again costs as much as the arithmetic on small nets, and varies with the machine's load.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
    "MALLOC_TOP_PAD_": "200000000",
}

if __name__ == "__main__":
    command = [
        *(sys.executable, "-m", "pytest", str(HERE), "--quiet", "-p", "no:cacheprovider"),
        *("--benchmark-disable-gc", f"--benchmark-json={HERE / 'results.json'}"),
        *("-W", "default"),  # the peers' own warnings are not ours to mend
        *sys.argv[1:],
    ]
    sys.exit(subprocess.run(command, env=os.environ | KEEP_MEMORY).returncode)
