"""Prints the table of ratios, and writes it beside the JSON."""

from pathlib import Path
from typing import Any

LIBRARIES = ("kfac_lib", "traced", "curvlinops", "nngeometry")


def table(benchmarks: list[dict[str, Any]]) -> str:
    lines = [
        "| problem, flavour | one gradient | " + " | ".join(LIBRARIES) + " |",
        "|---|---|" + "---|" * len(LIBRARIES),
    ]
    for info in benchmarks:
        medians, quartiles = info["median_seconds"], info["quartiles_seconds"]
        unit = medians["gradient"]
        cells = [
            f"{medians[library] / unit:.1f} "
            f"({quartiles[library][0] / unit:.1f}–{quartiles[library][1] / unit:.1f})"
            if library in medians
            else "–"
            for library in LIBRARIES
        ]
        row = [f"{info['problem']}, {info['work']}", f"{1e3 * unit:.2f} ms", *cells]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    session = getattr(config, "_benchmarksession", None)
    infos = [b.extra_info for b in session.benchmarks if b.extra_info] if session else []
    if not infos:
        return
    text = table(infos)
    terminalreporter.write_line("\nMedian time (quartiles) as a multiple of one gradient:\n" + text)
    (Path(__file__).parent / "results.md").write_text(text + "\n")
