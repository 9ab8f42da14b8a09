"""The JSON that the book shows, merged row by row, and the tables of ratios."""

import json
import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import kfac_lib
from benchmarks import chapters
from benchmarks.contenders import TIMED, WEIGHED
from benchmarks.goals import (
    MEMORY_GOALS,
    Json,
    fastest_peer,
    memory_verdicts,
    ratio_to,
    verdicts,
)
from benchmarks.rows import memory_rows, rows

ROOT = Path(__file__).parent.parent
JSON, TABLES = ROOT / "book" / "speed.json", Path(__file__).parent / "results.md"
THREADS = 2
PACKAGES = ("torch", "curvlinops-for-pytorch", "nngeometry", "backpack-for-pytorch")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "kfac_lib": kfac_lib.__version__}
    return found | {package: version(package) for package in PACKAGES}


def machine() -> Json:
    """The machine, in words that do not name it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_GiB": round(memory / 2**30),
        "threads": THREADS,
        "system": f"{platform.system()} {platform.release()}",
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def name_of(row: Json) -> tuple[str, int, str]:
    return row["problem"], row["N"], row["work"]


def merged(old: Iterable[Json], new: Iterable[Json], order: Iterable[Any]) -> list[Json]:
    """Old rows with the new ones in their places; rows that no longer exist are dropped."""
    found = {name_of(row): row for row in (*old, *new)}
    names = [(row.problem.name, row.problem.N, str(row.work)) for row in order]
    return [found[name] for name in names if name in found]


def load(path: Path = JSON) -> Json:
    return json.loads(path.read_text()) if path.exists() else {"rows": [], "memory": []}


def save(
    old: Json,
    timed: Sequence[Json] = (),
    weighed: Sequence[Json] = (),
    executed: Sequence[Json] = (),
    path: Path = JSON,
) -> Json:
    """Merge new rows into what was there, judge all by the goals, and write the JSON."""
    dated = [row["date"] for row in (*timed, *weighed, *executed)]
    of_chapter = {one["name"]: one for one in (*old.get("chapters", ()), *executed)}
    names = [path.stem for path in chapters.notebooks()]
    result = {
        "date": max(dated, default=old.get("date")),
        "versions": versions(),
        "machine": machine(),
        "rows": merged(old["rows"], timed, rows()),
        "memory": merged(old["memory"], weighed, memory_rows()),
        "chapters": [of_chapter[name] for name in names if name in of_chapter],
    }
    for row in result["rows"]:
        found = [v for v in verdicts(row, result["rows"]) if v.ratio is not None]
        row["aims"] = [v.goal.against for v in found]
        row["missed"] = [
            {"against": v.goal.against, "ratio": v.ratio, "wanted": v.goal.ratio}
            for v in found
            if not v.met
        ]
    for row in result["memory"]:
        of_memory = memory_verdicts(row)
        row["aims"] = [f"memory, {v.label}" for v in of_memory]
        row["missed"] = [
            {"against": f"memory, {v.label}", "ratio": v.ratio, "wanted": MEMORY_GOALS[v.label]}
            for v in of_memory
            if not v.met
        ]
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def tables(result: Json) -> str:
    """Markdown: times as multiples of the unit, verdicts, and memory."""
    parts = [
        f"# How fast\n\nMedians, {result['machine']['threads']} threads, "
        f"{result['machine']['cpu']}; quartiles in brackets. `make bench` writes this file."
    ]
    usual = [row for row in result["rows"] if row["unit"]["label"] == "gradient"]
    steps = [row for row in result["rows"] if row["unit"]["label"] != "gradient"]
    if usual:
        parts.append("## As a multiple of one gradient\n\n" + _times(usual, list(TIMED)))
        parts.append("## Goals\n\n" + _goals(usual))
    if steps:
        labels = list(steps[0]["contenders"])
        parts.append("## A training step, as a multiple of one of SGD\n\n" + _times(steps, labels))
    if result["memory"]:
        parts.append("## Growth of the peak memory, in MiB\n\n" + _memory(result["memory"]))
    if result["chapters"]:
        body = [[one["name"], f"{one['seconds']:.1f}"] for one in result["chapters"]]
        parts.append("## Executing the book\n\n" + _lines(["notebook", "seconds"], body))
    reasons = [
        f"- {label}, {_title(row)}: {reason}."
        for row in (*result["rows"], *result["memory"])
        for label, reason in row["left_out"].items()
    ]
    if reasons:
        parts.append("## Left out\n\n" + "\n".join(dict.fromkeys(reasons)))
    return "\n\n".join(parts) + "\n"


def _title(row: Json) -> str:
    return f"{row['problem']}, N={row['N']}, {row['work']}"


def _lines(header: list[str], body: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *body))


def _times(listed: list[Json], labels: list[str]) -> str:
    def cell(row: Json, label: str) -> str:
        if label not in row["contenders"]:
            return "–"
        one, unit = row["contenders"][label], row["unit"]["median"]
        low, high = (quartile / unit for quartile in one["quartiles"])
        few = "" if one["repeats"] >= 15 else f", {one['repeats']} repeats"
        return f"{one['median'] / unit:.3g} ({low:.3g}–{high:.3g}{few})"

    header = ["row", listed[0]["unit"]["label"], *labels]
    body = [
        [_title(row), f"{1e3 * row['unit']['median']:.2f} ms", *(cell(row, k) for k in labels)]
        for row in listed
    ]
    return _lines(header, body)


def _goals(listed: list[Json]) -> str:
    marks = {True: "met", False: "**missed**", None: "–"}
    body = []
    for row in listed:
        peer, reference = fastest_peer(row), ratio_to(row, "reference")
        judged = [
            f"goal {v.goal.number}, {v.goal.against}: {_number(v.ratio)} "
            f"(≥ {v.goal.ratio:.2f}) {marks[v.met]}"
            for v in verdicts(row, listed)
            if v.ratio is not None
        ]
        cells = [peer or "–", _number(ratio_to(row, peer)), _number(reference)]
        body.append([_title(row), *cells, "; ".join(judged) or "–"])
    return _lines(["row", "fastest peer", "its time / ours", "reference / ours", "goals"], body)


def _number(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"


def _memory(listed: list[Json]) -> str:
    def cell(row: Json, label: str) -> str:
        found = row["contenders"].get(label)
        return f"{found['growth'] / 2**20:.1f}" if found else "–"

    body = []
    for row in listed:
        judged = "; ".join(
            f"{v.label}: {v.ratio:.2f} {'met' if v.met else '**missed**'}"
            for v in memory_verdicts(row)
        )
        body.append([_title(row), *(cell(row, label) for label in WEIGHED), judged or "–"])
    return _lines(["row", *WEIGHED, "over the most frugal library"], body)
