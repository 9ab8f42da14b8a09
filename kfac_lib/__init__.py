"""KFAC from scratch: the library that the book builds, one module for one idea.

Read the modules in this order: flattening, autodiff, linearization, closed_form, losses, fisher,
curvature, kronecker, damping, layers, coverage, rows, capture, graph, graph_uses, graph_calls,
tracing, compression, backward, stream, accumulate, kfac, ekfac, schedules, gradients, saved,
estimates, corrections, passes, quadratic, optim, exact_cases, sharing_cases, wrong_rows, blocks,
sharing_hypotheses, hypotheses, report, conformance, pairs, spectra, comparison, steps, diagnostics.
The names below are the ones to import.
"""

from kfac_lib.accumulate import Expand, Reduce
from kfac_lib.conformance import check_kfac
from kfac_lib.damping import Exact, Factored, LevenbergMarquardt, Plain
from kfac_lib.diagnostics import Diagnosis, diagnose
from kfac_lib.ekfac import EKFAC
from kfac_lib.fisher import Empirical, InputOnly, MonteCarlo, RandomSigns, TypeI, TypeII
from kfac_lib.flattening import cvec, cvec_inverse, rvec, rvec_inverse
from kfac_lib.kfac import KFAC, exact_blocks
from kfac_lib.kronecker import BlockDiagonal, EigenKronecker, Kronecker, nearest_kronecker
from kfac_lib.optim import KFACPreconditioner

__all__ = [
    "EKFAC",
    "KFAC",
    "BlockDiagonal",
    "Diagnosis",
    "EigenKronecker",
    "Empirical",
    "Exact",
    "Expand",
    "Factored",
    "InputOnly",
    "KFACPreconditioner",
    "Kronecker",
    "LevenbergMarquardt",
    "MonteCarlo",
    "Plain",
    "RandomSigns",
    "Reduce",
    "TypeI",
    "TypeII",
    "check_kfac",
    "cvec",
    "cvec_inverse",
    "diagnose",
    "exact_blocks",
    "nearest_kronecker",
    "rvec",
    "rvec_inverse",
]
__version__ = "0.1.0"
