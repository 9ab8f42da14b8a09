"""Memory of the contenders of one row, each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.contenders import WEIGHED, prepare
from benchmarks.rows import Row
from benchmarks.timing import now, too_slow

# Every tensor above 64 KiB comes straight from the kernel and goes back when it is freed, so that
# the growth of the peak is what is alive at once, and repeats itself.
PRECISE_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}
TIMEOUT = 300  # seconds


def measure(row: Row) -> dict[str, Any]:
    """Weigh the contenders of a row, one after the other, and return the row of the JSON."""
    found, left_out = {}, {}
    for label in prepare(row.problem.make(), row.work, WEIGHED):
        weighed = too_slow(row, label) or weigh(row, label)
        (left_out if isinstance(weighed, str) else found)[label] = weighed
    return {
        "problem": row.problem.name,
        "N": row.problem.N,
        "work": str(row.work),
        "date": now(),
        "contenders": found,
        "left_out": left_out,
    }


def weigh(row: Row, label: str) -> dict[str, int] | str:
    """Growth of the peak and the whole peak, in bytes; a reason if there is nothing to report."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", row.key, label]
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).parent.parent,
            env=os.environ | PRECISE_MEMORY,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return f"it takes more than {TIMEOUT} s"
    if done.returncode:
        return f"it fails: {(done.stderr.strip().splitlines() or ['killed'])[-1]}"
    return json.loads(done.stdout.splitlines()[-1])
