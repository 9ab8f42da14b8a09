"""Memory of one contender on one row, in a process of its own.

python -m benchmarks.memory ROW CONTENDER

Every library is imported, and a tiny problem of the same kind is run, before the baseline: code
that is loaded on first use is not what the work needs. Then comes one gradient, whose buffers torch
keeps. The peak of the resident memory is reset by /proc/self/clear_refs, and the work runs once.
:mod:`benchmarks.weighing` starts these processes.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

TINY = 4


def peak() -> int:
    """Largest resident memory since the last reset, in bytes."""
    return _status("VmHWM")


def resident() -> int:
    """Resident memory, in bytes."""
    return _status("VmRSS")


def _status(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{entry}:"))


def measure(key: str, label: str) -> dict[str, int]:
    """Growth of the peak by one run, and the whole peak, in bytes, of this process."""
    import torch

    from benchmarks.contenders import prepare
    from benchmarks.rows import rows

    torch.set_num_threads(2)
    row = next(row for row in rows() if row.key == key)
    prepare(replace(row.problem, N=TINY).make(), row.work, [label])[label].run()
    made = row.problem.make()
    made.gradient()
    prepared = prepare(made, row.work, [label])[label]
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")
    result = prepared.run()
    growth = max(0, peak() - before)
    del result
    return {"growth": growth, "peak": peak()}


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
