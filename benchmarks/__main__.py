"""Run the benchmarks; write book/speed.json and benchmarks/results.md.

python -m benchmarks [WORDS...] runs the rows whose names hold all the words, and merges them into
what is there; without words, all. So with the chapters of the book.
"""

import argparse
import os
import sys

# Freed memory stays with the process, for every contender alike: handing it back and faulting it in
# again costs as much as the arithmetic on small nets, and varies with the machine's load.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
    "MALLOC_TOP_PAD_": "200000000",
}

DISTURBED = 0.1  # cores that others keep busy
PARTS = ("times", "memory", "chapters")


def run(words: list[str], repeats: int, parts: list[str]) -> None:
    import gc
    import resource

    import torch

    from benchmarks import chapters, results, timing, weighing
    from benchmarks.rows import Row, memory_rows, rows

    torch.set_num_threads(results.THREADS)
    # What does not fit is to raise, not to be killed.
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    resource.setrlimit(resource.RLIMIT_AS, (available, resource.RLIM_INFINITY))
    gc.freeze()  # collecting between the rounds need not look at what was imported

    def chosen(listed: list[Row]) -> list[Row]:
        return [row for row in listed if all(word in row.key for word in words)]

    # Saved row by row: what comes to grief later loses nothing.
    for row in chosen(rows()) if "times" in parts else []:
        found = timing.measure(row, repeats)
        results.save(results.load(), timed=[found])
        unit = found["unit"]["median"]
        ratios = [f"{k} {one['median'] / unit:.3g}" for k, one in found["contenders"].items()]
        disturbed = f" (disturbed: {found['others']} cores)" if found["others"] > DISTURBED else ""
        print(f"{row.key}: {1e3 * unit:.2f} ms; {', '.join(ratios)}{disturbed}", flush=True)
    for row in chosen(memory_rows()) if "memory" in parts else []:
        found = weighing.measure(row)
        results.save(results.load(), weighed=[found])
        growth = [f"{k} {one['growth'] / 2**20:.1f}" for k, one in found["contenders"].items()]
        print(f"memory, {row.key}, MiB: {', '.join(growth)}", flush=True)
    paths = [path for path in chapters.notebooks() if all(word in path.stem for word in words)]
    for path in paths if "chapters" in parts else []:
        found = chapters.measure(path)
        results.save(results.load(), executed=[found])
        print(f"{path.stem}: {found['seconds']} s", flush=True)
    results.TABLES.write_text(results.tables(results.load()))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("words", nargs="*", help="parts of the names of the rows to run")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure; all by default"
    )
    given = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in KEEP_MEMORY.items()):
        # malloc reads them when a process starts. The peers' warnings are not ours to mend.
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | KEEP_MEMORY)
    run(given.words, given.repeats, given.parts)


if __name__ == "__main__":
    main()
