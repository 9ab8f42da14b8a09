"""What the chapters load was computed by this code, and a stopped run goes on where it was."""

import json
import math
import os
from collections import Counter

import pytest
import torch

from experiments import damping
from experiments.damping import adaptive_key, batch_key, clip_key, map_key, new_key
from experiments.problems import MLP, PROBLEMS, QUADRATIC
from experiments.stability import stable_rate
from experiments.store import Cell, Experiment, Store, rounded, run
from experiments.training import minibatches, train
from kfac_lib.damping import Exact

SETTINGS = {"grid": [1, 2, 3]}


def counting(calls, keys=("a", "b", "c"), settings=SETTINGS):
    def cell(key):
        return Cell(key, lambda: calls.update([key]) or {"loss": len(calls) / 3})

    return Experiment("toy", settings, lambda: [cell(key) for key in keys])


@pytest.fixture(scope="module")
def stored(root):
    return json.loads((root / "book" / "damping.json").read_text())


def test_what_was_computed_is_not_computed_again(tmp_path):
    calls = Counter()
    run(counting(calls), tmp_path, most=2)
    assert calls == {"a": 1, "b": 1}
    store = run(counting(calls), tmp_path)
    assert calls == {"a": 1, "b": 1, "c": 1}
    assert list(store) == ["a", "b", "c"]


def test_an_interrupted_run_keeps_the_cells_it_has(tmp_path):
    def stop():
        raise KeyboardInterrupt

    cells = [Cell("a", lambda: 1.5), Cell("b", stop)]
    with pytest.raises(KeyboardInterrupt):
        run(Experiment("toy", SETTINGS, lambda: cells), tmp_path)
    assert Store(tmp_path / "toy.json", SETTINGS)["a"] == 1.5


def test_a_file_that_cannot_be_replaced_stays_whole(tmp_path, monkeypatch):
    run(counting(Counter(), keys=("a",)), tmp_path)
    before = (tmp_path / "toy.json").read_text()

    def fail(*_):
        raise OSError

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):  # noqa: PT011
        run(counting(Counter()), tmp_path)
    assert (tmp_path / "toy.json").read_text() == before


def test_results_of_other_settings_are_not_mixed(tmp_path):
    run(counting(Counter()), tmp_path)
    with pytest.raises(ValueError, match=r"toy\.json was made with other settings"):
        run(counting(Counter(), settings={"grid": [1]}), tmp_path)


def test_cells_that_no_longer_exist_are_dropped(tmp_path):
    run(counting(Counter()), tmp_path)
    assert list(run(counting(Counter(), keys=("c", "a")), tmp_path)) == ["c", "a"]


def test_floats_are_rounded_and_what_is_not_finite_is_none():
    assert rounded({"x": (1 / 3, math.inf, math.nan), "n": 1234567}) == {
        "x": [0.333333, None, None],
        "n": 1234567,
    }


def test_batches_of_an_epoch_hold_each_datum_once():
    parts = minibatches(PROBLEMS["MLP"].data(), 64, seed=0)
    X = torch.cat([next(parts).X for _ in range(4)])
    assert torch.equal(X.sort(dim=0).values, MLP.data().X.sort(dim=0).values)


def test_the_stable_rate_of_an_exact_curvature_is_the_formula(float64):
    net, data, delta = QUADRATIC.net(0), QUADRATIC.data(), 0.1
    largest = 2 / 3  # that of the second moments is 1, and R is 2 / (3 N)
    rate = stable_rate(net, QUADRATIC.loss_func, data, Exact(delta))
    assert rate == pytest.approx(2 * (largest + delta) / largest, rel=1e-4)


def test_a_run_whose_loss_explodes_is_given_up():
    given_up = train(QUADRATIC, 0, Exact(1e-7), 16.0, 40)
    assert given_up.stopped
    assert len(given_up.losses) < 10
    assert given_up.at(40) == math.inf


def test_the_grid_in_the_file_is_the_grid_in_the_code(stored):
    assert stored["settings"] == rounded(damping.settings())
    assert list(stored["cells"]) == [cell.key for cell in damping.cells()]
    assert len(stored["cells"]) == stored["settings"]["budget"]["runs"]


def test_the_file_is_small(root):
    assert (root / "book" / "damping.json").stat().st_size < 700_000


@pytest.mark.parametrize(
    "key",
    [
        map_key("quadratic", "Factored", 1e-3, 1.0, 0),
        map_key("quadratic", "Plain", 1e-7, 0.5, 0),
        map_key("deep linear", "Factored", 1e-2, 0.25, 1),
        map_key("MLP", "Exact", 1e-2, 0.25, 0),
        map_key("MLP", "Plain", 1e-1, 1.0, 2),
        map_key("CNN", "Exact", 1e-1, 0.5, 0),
        adaptive_key("MLP", "Exact", 10.0),
        batch_key(16, 0.9, 1e-1, 0.25, 1),
        new_key("ReLU, 2 layers", "Factored", 1.0, 0.25, 1),
        new_key("tanh, CNN", "Exact", 10.0, 0.5, 2),
        clip_key("ReLU, CNN", "Exact", 10.0, 0.01, 0),
    ],
)
def test_a_stored_cell_computed_again_is_the_same(key, stored, one_thread):
    (cell,) = (cell for cell in damping.cells() if cell.key == key)
    again, before = rounded(cell.compute()), stored["cells"][key]
    if isinstance(again, dict):
        again, before = (v["losses"] + v["deltas"] for v in (again, before))
    assert again == pytest.approx(before, rel=1e-6)
