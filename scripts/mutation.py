"""Mutation testing: change the library in one small place after another; do the tests notice?

    python scripts/mutation.py                           every mutant of the modules of the theory
    python scripts/mutation.py losses fisher             of these modules only
    python scripts/mutation.py --sample 300 --seed 0     of a sample, in proportion to their size

The mutants are those of mutmut's operators, without what is not behaviour: docstrings, types,
decorators, the text of errors, and strings for the reader (those with a space or a capital). The
conditions of errors count. A mutant is killed when a test of tests/lib fails, or hangs for 60 s, or
when the library cannot be imported any more.

mutmut's own runner starts pytest anew for each mutant, which takes seconds. Here one pytest session
collects the tests once, and each mutant is put into a fork of it: a function's code is replaced in
place. First every test is run to see which functions it calls; a mutant's tests are those that call
its function, quickest first, until one fails.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import os
import pickle
import random
import resource
import signal
import sys
import time
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a pool of threads does not survive a fork

import libcst as cst
import libcst.matchers as m
import pytest
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_string

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "kfac_lib"
MODULES = ["kfac", "accumulate", "kronecker", "fisher", "losses", "flattening"]
TIMEOUT = 60
MEMORY = 12 * 2**30  # a mutant may ask for more than there is, and must not take it from others
GENERATED = ("__init__", "__eq__", "__repr__", "__hash__", "__rmul__")
OPTIONS = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--tb=native"]
SKIPPED = (
    m.Annotation()
    | m.Decorator()
    | m.Raise()
    | m.Assign(value=m.Subscript(value=m.Name("Literal")) | m.Call(func=m.Name("TypeVar")))
    | m.Call(func=m.Name("len") | m.Name("isinstance"))  # as mutmut does: None there is an error
)


@dataclass(frozen=True, eq=False)
class Mutant:
    """A module with a node replaced; ``function`` is the one around it, if there is one."""

    module: str
    function: str | None
    line: int
    tree: cst.Module
    old: cst.CSTNode
    new: cst.CSTNode

    @property
    def text(self) -> str:
        """The module's text with the change."""
        return self.tree.deep_replace(self.old, self.new).code

    def __str__(self) -> str:
        before, after = self.tree.code.splitlines(), self.text.splitlines()
        diff = list(difflib.unified_diff(before, after, n=0))[2:]
        change = "  ".join(f"{part[0]} {part[1:].strip()}" for part in diff if part[0] in "+-")
        return f"{self.module}.py:{self.line} {self.function or ''}: {change}"


class Collector(cst.CSTVisitor):
    """Apply every operator of mutmut to every node that is behaviour."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        self.path: list[cst.FunctionDef | cst.ClassDef] = []
        self.found: list[tuple[str | None, int, cst.CSTNode, cst.CSTNode]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        """Collect the node's mutants, with the outermost function around it."""
        if m.matches(node, SKIPPED):
            return False
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self.path.append(node)
        for kind, operator in mutation_operators:
            if not isinstance(node, kind) or (operator is operator_string and for_reader(node)):
                continue
            line = self.get_metadata(PositionProvider, node).start.line
            self.found += [(self.function(), line, node, new) for new in operator(node)]
        return True

    def on_leave(self, node: cst.CSTNode) -> None:
        """Leave the scope."""
        if self.path and self.path[-1] is node:
            self.path.pop()

    def function(self) -> str | None:
        """The qualified name of the outermost function around, a method being outermost too."""
        names: list[str] = []
        for scope in self.path:
            names.append(scope.name.value)
            if isinstance(scope, cst.FunctionDef):
                return ".".join(names)
        return None


def for_reader(node: cst.CSTNode) -> bool:
    """Whether a string is text for people: one with a space or a capital."""
    return isinstance(node, cst.SimpleString) and (
        " " in node.value or node.value != node.value.lower()
    )


def mutants_of(module: str) -> list[Mutant]:
    """All mutants of a module."""
    wrapper = MetadataWrapper(cst.parse_module((LIBRARY / f"{module}.py").read_text()))
    collector = Collector()
    wrapper.visit(collector)
    return [
        Mutant(module, function, line, wrapper.module, old, new)
        for function, line, old, new in collector.found
    ]


def in_fork(task: Callable[[], object]) -> object:
    """Run a task in a forked process and return its result; a signal ends it with its own name."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        try:
            result: object = task()
        except BaseException as error:
            result = SystemExit(f"An error outside the tests: {error!r}")
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(result, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    result = pickle.loads(said)
    if isinstance(result, SystemExit):
        raise result
    return result


class Session:
    """A plugin of pytest that runs the collected tests as it is asked to, in forks."""

    def __init__(self, task: Callable[[Session], None]) -> None:
        self.task = task
        self.items: list[pytest.Item] = []
        self.failed = ""

    def pytest_sessionstart(self) -> None:
        """Let hypothesis draw the same examples for every mutant, and stop at the first failure."""
        from hypothesis import Phase, settings

        phases = [Phase.explicit, Phase.generate]
        settings.register_profile(
            "mutants", derandomize=True, database=None, deadline=None, phases=phases
        )
        settings.load_profile("mutants")

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Take the place of pytest's own loop."""
        self.items = session.items
        gc.freeze()
        self.task(self)
        return True

    def pytest_runtest_setup(self) -> None:
        """A test that hangs ends the fork."""
        signal.alarm(TIMEOUT)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember the first test that failed."""
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def run(self, item: pytest.Item, after: pytest.Item | None) -> None:
        """Run one test."""
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)


def calls(session: Session) -> dict[str, tuple[float, set[tuple[str, str]]]]:
    """For each test its time and the functions of the library that it calls."""
    folder, result = str(LIBRARY), {}
    for item, after in pairwise([*session.items, None]):
        called: set[tuple[str, str]] = set()

        def trace(frame: types.FrameType, *_: object, called: set = called) -> None:
            code = frame.f_code
            if code.co_filename.startswith(folder):
                called.add((Path(code.co_filename).stem, code.co_qualname.split(".<locals>")[0]))

        start = time.perf_counter()
        sys.settrace(trace)
        session.run(item, after)
        sys.settrace(None)
        if session.failed:
            raise SystemExit(f"{session.failed} fails without a mutant.")
        result[item.nodeid] = time.perf_counter() - start, called
    return result


def lookup(module: types.ModuleType, name: str) -> types.FunctionType:
    """The function of that qualified name, out of its property or classmethod."""
    owner: object = module
    for part in name.split("."):
        owner = vars(owner)[part]
        owner = getattr(owner, "fget", None) or getattr(owner, "__func__", owner)
    assert isinstance(owner, types.FunctionType)
    return owner


def put(mutant: Mutant) -> str:
    """Let this process's library do what the mutant does; return an error of its import."""
    module = sys.modules[f"kfac_lib.{mutant.module}"]
    fresh = types.ModuleType(module.__name__)
    try:
        exec(compile(mutant.text, module.__file__, "exec"), vars(fresh))
    except Exception as error:
        return f"import: {error!r}"
    if mutant.function:
        live, new = lookup(module, mutant.function), lookup(fresh, mutant.function)
        live.__code__, live.__defaults__ = new.__code__, new.__defaults__
        live.__kwdefaults__ = new.__kwdefaults__
    else:  # in the body of a class, whose dataclass and subclasses depend on it
        for name, kind in vars(fresh).items():
            if isinstance(kind, type) and kind.__module__ == module.__name__:
                for key in vars(kind).keys() & {*GENERATED, *kind.__annotations__}:
                    setattr(vars(module)[name], key, vars(kind)[key])
    return ""


def noticed(session: Session, mutant: Mutant, items: list[pytest.Item]) -> str:
    """Name the first of the tests that fails; empty if none does."""
    session.failed = put(mutant)
    for item, after in pairwise([*items, None]):
        if session.failed:
            break
        session.run(item, after)
    return session.failed


def reaches(mutant: Mutant, called: set[tuple[str, str]]) -> bool:
    """Whether a test that calls these functions can notice: any of the module's, outside one."""
    if mutant.function:
        return (mutant.module, mutant.function) in called
    return any(module == mutant.module for module, _ in called)


def judge(mutants: list[Mutant], say: Callable[[Mutant, str], None]) -> dict[Mutant, str]:
    """For each mutant the test that noticed it, or an empty string."""
    verdicts: dict[Mutant, str] = {}

    def inside(session: Session) -> None:
        known = in_fork(lambda: calls(session))
        if not isinstance(known, dict):
            raise SystemExit(f"The tests do not run without a mutant: {known}")
        quickest = sorted(session.items, key=lambda item: known[item.nodeid][0])
        kills: Counter[str] = Counter()
        for mutant in mutants:
            tests = [item for item in quickest if reaches(mutant, known[item.nodeid][1])]
            tests.sort(key=lambda item: -kills[item.nodeid])  # what killed the last kills the next
            verdict = in_fork(lambda mutant=mutant, tests=tests: noticed(session, mutant, tests))
            verdicts[mutant] = verdict
            kills = Counter({test: n / 2 for test, n in kills.items()}) + Counter([verdict])
            say(mutant, verdict)

    pytest.main([*OPTIONS, str(ROOT / "tests/lib")], plugins=[Session(inside)])
    return verdicts


def main() -> None:
    """Print a table, one line a module, and the survivors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", default=MODULES, help="modules of kfac_lib")
    parser.add_argument("--sample", type=int, help="how many mutants; all when not given")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--verbose", action="store_true", help="one line for each mutant")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    start = time.perf_counter()
    mutants = [mutant for module in options.modules for mutant in mutants_of(module)]
    if options.sample is not None and options.sample < len(mutants):
        mutants = random.Random(options.seed).sample(mutants, options.sample)

    def say(mutant: Mutant, verdict: str) -> None:
        if options.verbose:
            print(f"{verdict or 'SURVIVED'}  <-  {mutant}", flush=True)

    verdicts = judge(mutants, say)

    total, killed = Counter(), Counter()
    for mutant, verdict in verdicts.items():
        for key in (mutant.module, "all"):
            total[key] += 1
            killed[key] += bool(verdict)
    for mutant in mutants:
        if not verdicts[mutant]:
            print(mutant)
    print(f"\n{'module':<12}{'mutants':>8}{'killed':>8}{'survived':>10}{'share':>8}")
    for key in [*options.modules, "all"]:
        if total[key]:
            share = f"{100 * killed[key] / total[key]:.1f} %"
            left = total[key] - killed[key]
            print(f"{key:<12}{total[key]:>8}{killed[key]:>8}{left:>10}{share:>8}")
    hung = sum(verdict == "SIGALRM" for verdict in verdicts.values())
    print(f"{hung} of the killed hung for {TIMEOUT} s; {time.perf_counter() - start:.0f} s in all.")


if __name__ == "__main__":
    main()
