"""Put faults in one at a time; each must turn the tests red.

    python -m tests.faults                 all faults
    python -m tests.faults softmax bias    those whose name holds one of the words
    python -m tests.faults --library       faults of the library only

Every fault lives in a fresh copy of the sources (of the built site too, where the tests need it);
the checkout is never touched. The selections are run on a copy without a fault first: they must be
green there, or their redness proves nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.faults.book_faults import NOTEBOOK_FAULTS, SITE_FAULTS
from tests.faults.experiment_faults import EXPERIMENT_FAULTS
from tests.faults.fault import Fault, StaleFaultError
from tests.faults.library_faults import LIBRARY_FAULTS

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ["kfac_lib", "experiments", "tests", "book", "pyproject.toml", "_toc.yml", "_config.yml"]
BUILT = ["_build/html", ".web_assets/axe-core"]
NOTHING = Fault("no fault", lambda root: None, ())


def copy_tree(target: Path, *, site: bool) -> None:
    """Copy sources, and the built site where it is needed, without caches."""
    ignore = shutil.ignore_patterns("__pycache__", ".*")
    for name in SOURCES + BUILT * site:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=ignore)
        elif source.exists():
            shutil.copy2(source, target / name)


def run(fault: Fault) -> tuple[int, str]:
    """Put a fault into a fresh copy and run its tests; return pytest's status and what it said."""
    with tempfile.TemporaryDirectory(prefix="fault-") as folder:
        tree = Path(folder)
        copy_tree(tree, site=fault.site)
        try:
            fault.put(tree)
        except StaleFaultError as stale:
            return -1, str(stale)
        env = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        env.setdefault("OMP_NUM_THREADS", "1")
        where = "import kfac_lib; print(kfac_lib.__file__)"
        command = [sys.executable, "-c", where]
        used = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True).stdout
        if tree.resolve() not in Path(used.strip()).resolve().parents:
            return -1, f"the copy is not what is imported, but {used.strip() or 'nothing'}"
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-rfE", "--tb=line", "--no-header"]
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider", *fault.tests],
            cwd=tree, env=env, capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr


def verdict(fault: Fault, status: int, said: str) -> tuple[bool, str]:
    """Whether the fault was noticed, and by which test."""
    red = re.findall(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", said, re.M)
    if status == 1 and red and not said.count("ERROR collecting"):
        return True, red[0]
    if status == -1:
        return False, f"NOT PUT IN: {said}"
    if status == 0:
        return False, f"SURVIVED {' '.join(fault.tests)}"
    return False, f"pytest ended with {status}: {' / '.join(said.strip().splitlines()[-3:])}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="run faults whose name holds one of these words")
    for kind in ("library", "experiments", "notebooks", "site"):
        parser.add_argument(f"--{kind}", action="store_true", help=f"faults of the {kind} only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    chosen = parser.parse_args()
    kinds = {
        "library": LIBRARY_FAULTS,
        "experiments": EXPERIMENT_FAULTS,
        "notebooks": NOTEBOOK_FAULTS,
        "site": SITE_FAULTS,
    }
    selected = [kind for kind in kinds if getattr(chosen, kind)] or list(kinds)
    faults = [
        fault for kind in selected for fault in kinds[kind]
        if not chosen.words or any(word in fault.name for word in chosen.words)
    ]  # fmt: skip
    if not faults:
        print("No fault has such a name.")
        return 1
    clean = {fault.tests: fault.site for fault in faults}
    controls = [Fault(" ".join(t), NOTHING.put, t, site) for t, site in clean.items()]
    failures, red_anyway = 0, set()
    with ThreadPoolExecutor(chosen.jobs) as pool:
        for control, (status, said) in zip(controls, pool.map(run, controls), strict=True):
            if status:
                failures += 1
                red_anyway.add(control.tests)
                print(f"RED WITHOUT A FAULT  {control.name}\n{said[-2000:]}", flush=True)
        width = max(len(fault.name) for fault in faults)
        for fault, result in zip(faults, pool.map(run, faults), strict=True):
            noticed, by = verdict(fault, *result)
            if fault.tests in red_anyway:
                noticed, by = False, "UNPROVEN: these tests are red without a fault"
            failures += not noticed
            print(f"{'red ' if noticed else 'BAD '} {fault.name:{width}}  {by}", flush=True)
    print(f"{len(faults)} faults put in, {failures} problems")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
