"""What the kit says of the wrong KFACs, and what it should say: the table of chapter 9.

``make verdicts`` writes book/wrong_kfacs.csv; a test holds the file against the kit.
"""

import csv
from functools import cache
from pathlib import Path

from wrong_kfacs import ZOO

from kfac_lib.conformance import check_kfac

TABLE = Path(__file__).resolve().parents[2] / "book" / "wrong_kfacs.csv"
NONE = "none explains"
PLACES = "bias interleaved"
MEANS = "square of the mean against mean of squares"
OTHER = "type-II against empirical"
SHARED = "shared axis averaged"
SOFTMAX = "batch axis softmax"
PATCHES = "patches cut wrongly"
COLUMNS = "columns of the kernel reordered"
GROUPS = "groups not kept apart"
CALLS = "calls of a reused layer taken apart"
TOKENS = "tokens miscounted"

# The faults that fall under a hypothesis, with the beginnings of the names that say what is wrong.
# Decided from the sentences of the zoo. The rest is outside of the list.
LISTED = {
    "no R": ["scale 1/R"],
    "R twice": ["scale R"],
    "always mean": ["scale R of the mean / R"],
    "MSE mean over data only": ["scale C"],
    "MSE without 2": ["scale 1/2"],
    "MSE sum without 2": ["scale 1/2"],
    "CE mean over data only": ["scale T", "scale 1/(N·R)"],
    "CE mean over entries": ["scale 1/K", "scale 1/(N·C·R)"],
    "BCE mean over data only": ["scale C", "scale K"],
    "type-II on the mean loss": ["scale R"],
    "MSE 2 in root and R": ["scale 2"],
    "B summed over data": ["scale N"],
    "N in both factors": ["scale 1/N"],
    "expand B without S": ["scale S"],
    "expand A with S": ["scale 1/S"],
    "reduce B over S": ["scale S"],
    "reduce B without S": ["scale S²"],
    "reduce A averaged": ["scale 1/S²", SHARED],
    "reduce B averaged twice": ["scale 1/S²", SHARED],
    "reduce N and S swapped": ["scale S/N"],
    "T for S": ["scale S/T"],
    "B over all labels": ["scale 1/T"],
    "sharings swapped": [SHARED],
    "reduce A as expand": [SHARED],
    "reduce B squares first": [SHARED],
    "expand A averaged first": [SHARED],
    "rows summed over data": [MEANS],
    "gradients averaged over data": [MEANS],
    "vectors summed before squaring": [MEANS],
    "samples averaged before squaring": [MEANS, "scale 1/M"],
    "MC without 1/M": ["scale M"],
    "MC with 1/M²": ["scale 1/M"],
    "type-II averaged over classes": ["scale 1/C"],
    "all positions at once": ["vectors at all positions at once"],
    "softmax over data": [SOFTMAX],
    "MC with true labels": ["labels instead of samples"],
    "MC variance one half": ["scale 1/2"],
    "MC gradient of the MSE": ["scale 2²"],
    "empirical gradient of the MSE": ["scale 2²"],
    "empirical gradient of the mean loss": ["scale R²"],
    "flavour ignored": [OTHER],
    "no 1 appended": ["bias missing"],
    "1 at the front": [PLACES],
    "0 appended": ["bias missing"],
    "factors swapped": ["factors swapped"],
    "float32": ["float32 inside"],
    "hook fires twice": ["scale 2"],
    "twice, last call kept": ["last call only of a reused layer"],
    "last layer without R": ["scale 1/R"],
    "mean losses without N": ["scale N"],
    "dense kron(B, A) as cvec": ["factors swapped"],
    "dense kron(A, B) as rvec": ["factors swapped"],
    "dense bias last in rvec": [PLACES],
    "dense bias first": [PLACES],
    "dense without coupling": ["bias separate"],
    "dense separate kron(B, A) as cvec": ["factors swapped"],
    "separate reduce bias as expand": ["scale 1/S"],
    "shared dense as rvec": ["factors swapped"],
    "padding mode unread": [PATCHES],
    "dilation unread": [PATCHES],
    "stride unread": [PATCHES],
    "patches of the kernel size alone": [PATCHES],
    "columns channels last": [COLUMNS],
    "kernel turned": [COLUMNS],
    "conv gradients reshaped": ["channels and positions confused"],
    "conv B without S": ["scale S"],
    "conv sharings swapped": [SHARED],
    "conv 1 at the front": [PLACES],
    "groups share a mean": [GROUPS],
    "first group for all": [GROUPS],
    "groups unread": [GROUPS],
    "groups as positions": [GROUPS],
    "groups in turn": [GROUPS],
    "first call kept": ["first call only of a reused layer"],
    "last call kept": ["last call only of a reused layer"],
    "factors averaged over calls": [CALLS],
    "input overwritten by calls": [CALLS],
    "padding token counted": [TOKENS],
    "padding left out of B": [TOKENS],
    "counts squared": [TOKENS],
    "tokens seen or not": [TOKENS],
    "embedding reduce by counts": [SHARED],
    "embedding as it lies": ["factors swapped"],
}


@cache
def verdict(entry):
    """The name of the hypothesis that explains a wrong KFAC, or NONE; None if it passes."""
    report = check_kfac(entry.fn, output=entry.output, order=entry.order, bias=entry.bias)
    if report.passed:
        return None
    return report.explanation.hypothesis if report.explanation else NONE


def is_right(entry):
    """Whether the kit says what is wrong, or that none explains what is not on its list."""
    if entry.name not in LISTED:
        return verdict(entry) == NONE
    found = verdict(entry) or ""
    name = found.split(" (")[0] if not found.startswith("scale") else found
    return any(name == right or name.startswith(f"{right},") for right in LISTED[entry.name])


def rows():
    """The table: name, fault, whether it is on the list, verdict, whether that is right."""
    return [
        [
            entry.name,
            entry.fault,
            "yes" if entry.name in LISTED else "no",
            verdict(entry),
            "yes" if is_right(entry) else "no",
        ]
        for entry in ZOO
    ]


if __name__ == "__main__":
    with TABLE.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [["name", "fault", "listed", "verdict", "right"], *rows()]
        )
