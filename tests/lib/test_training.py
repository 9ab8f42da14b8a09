"""What chapter 17 loads was computed by this code: tasks, methods, runs, choice and memory."""

import json
import math
from functools import partial
from itertools import pairwise, product
from operator import attrgetter

import pytest
import torch
from pytorch_optimizer import ScalableShampoo

from experiments import finals, methods, race, tuning
from experiments.finals import WEIGHED_STEPS, final_key, first_key, memory_key, weighed
from experiments.methods import METHODS, TRIALS, Decay, LogUniform, OneOf
from experiments.problems import Data
from experiments.store import Cell, Experiment, rounded, run
from experiments.tasks import LENGTH, TASKS, CharacterTransformer, text, windows
from experiments.tuning import AXES, best_trials, loss_at, positions, trial_key
from kfac_lib import KFAC
from kfac_lib.coverage import cover
from kfac_lib.curvature import ggn

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = list(product(TASKS, METHODS))
REGRESSION = TASKS["regression"]


@pytest.fixture(scope="module")
def stored(root):
    names = ("tuning", "training")
    return {name: json.loads((root / "book" / f"{name}.json").read_text()) for name in names}


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


# The tasks.


def test_the_transformer_sees_no_future():
    net, (X, _) = CharacterTransformer(len(set(text())), seed=0), windows()[0]
    other = X[:2].clone()
    other[:, 20:] = (other[:, 20:] + 1) % len(set(text()))
    before, after = net(X[:2]), net(other)
    assert before.shape == (2, len(set(text())), LENGTH)
    assert torch.equal(before[:, :, :20], after[:, :, :20])
    assert not torch.equal(before[:, :, 20:], after[:, :, 20:])


@pytest.mark.parametrize("task", TASKS.values(), ids=attrgetter("name"))
def test_every_parameter_of_every_net_is_covered(task):
    net = task.net(0)
    coverage = cover(net)
    assert not coverage.frozen
    assert not coverage.ignored
    layers = [net.get_submodule(name) for name in coverage.layers]
    assert {id(p) for p in net.parameters()} == {
        id(p) for layer in layers for p in layer.parameters()
    }


@pytest.mark.parametrize("task", TASKS.values(), ids=attrgetter("name"))
def test_no_datum_is_both_trained_on_and_held_out(task):
    on, off = task.data()
    same = (on.X.flatten(1)[:, None] == off.X.flatten(1)[None]).all(-1)
    assert not same.any()
    assert len(on.X) == len(on.y) > 3 * len(off.X)


def test_targets_are_the_next_characters():
    on, off = windows()
    characters = sorted(set(text()))
    for data in (on, off):
        assert torch.equal(data.X[:, 1:], data.y[:, :-1])
    first = "".join(characters[i] for i in on.X[0])
    assert text().startswith(first + characters[on.y[0, -1]])
    assert len(on.X) + len(off.X) == (len(text()) - 1) // LENGTH


# The methods.


@pytest.mark.parametrize("method", METHODS.values(), ids=attrgetter("name"))
def test_settings_lie_in_their_ranges_and_fill_them(method):
    for name, values in {**method.space, "batch": OneOf(REGRESSION.batches)}.items():
        drawn = [method.drawn(REGRESSION, trial)[name] for trial in range(300)]
        if isinstance(values, OneOf):
            assert set(drawn) == set(values.values)
            continue
        logs = torch.tensor([1 - x if isinstance(values, Decay) else x for x in drawn]).log()
        low, high = math.log(values.low), math.log(values.high)
        assert low - 0.01 <= logs.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < logs.max() <= high + 0.01
        assert abs(float(logs.mean()) - (low + high) / 2) < 0.1 * (high - low)


def test_what_two_methods_share_is_drawn_alike():
    for trial in range(TRIALS):
        kfac, ekfac, ggn_ = (
            METHODS[name].drawn(REGRESSION, trial) for name in ("KFAC", "EKFAC", "GGN")
        )
        assert kfac == ekfac
        assert all(ggn_[name] == kfac[name] for name in ("lr", "momentum", "delta", "clip"))
        assert all(
            METHODS[name].drawn(REGRESSION, trial)["batch"] == kfac["batch"] for name in METHODS
        )


def test_log_uniform_has_its_middle_at_the_geometric_mean():
    assert LogUniform(1e-3, 1e-1).at(0.5) == 1e-2
    assert Decay(1e-3, 1e-1).at(0.5) == 0.99


def joint(tensors):
    """Weights and biases, as vectors of [W b], layer after layer."""
    tensors = [t.detach() for t in tensors]
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return flat(torch.cat([W, b[:, None]], dim=1) for W, b in pairs)


def stepped(method, setting, task=REGRESSION):
    """Parameters before and after one step on all data, and the net."""
    net, data = task.net(3), task.data()[0]
    before = joint(net.parameters())
    METHODS[method].step(task, net, setting, 0)(data)
    return before, joint(net.parameters())


SETTING = {"lr": 0.3, "momentum": 0.5, "delta": 1e-2, "clip": 1e9, "period": 1, "products": 400}


def of_regression():
    net, data = REGRESSION.net(3), REGRESSION.data()[0]
    g = torch.autograd.grad(REGRESSION.loss_func(net(data.X), data.y), list(net.parameters()))
    return net, data, g


def test_a_step_of_ggn_is_the_damped_solution():
    net, data, g = of_regression()
    G = ggn(net, REGRESSION.loss_func, data, order="rvec")
    before, after = stepped("GGN", SETTING)
    direction = (before - after) / SETTING["lr"]
    residual = G @ direction + SETTING["delta"] * direction - joint(g)
    assert residual.norm() < 1e-2 * joint(g).norm()  # where conjugate gradients stop


@pytest.mark.parametrize("method", ["KFAC", "EKFAC", "GGN"])
def test_steps_are_clipped_to_kappa(method):
    _, _, g = of_regression()
    before, after = stepped(method, SETTING)
    free = before - after  # lr times the direction
    kappa = 1e-4
    before, after = stepped(method, {**SETTING, "clip": kappa})
    clipped = before - after
    assert torch.allclose(clipped * free.norm(), free * clipped.norm(), atol=1e-12)
    # lr² ⟨g, p⟩ times the square of the shortening
    shortening = float(clipped.norm() / free.norm())
    assert 0.3 * shortening**2 * float(joint(g) @ free) == pytest.approx(kappa)


def test_a_step_of_kfac_is_the_damped_inverse_times_the_gradient():
    net, data, g = of_regression()
    kfac = KFAC.compute(net, REGRESSION.loss_func, data)
    G_hat = torch.block_diag(*[K.to_dense("rvec") for K in kfac.values()])
    damped = G_hat + SETTING["delta"] * torch.eye(len(G_hat), dtype=G_hat.dtype)
    before, after = stepped("KFAC", SETTING)
    expected = SETTING["lr"] * torch.linalg.solve(damped, joint(g))
    assert torch.allclose(before - after, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(method):
    """With a middling setting the loss falls to half within 60 steps on all data."""
    space = METHODS[method].space
    setting = {name: values.at(0.5) for name, values in space.items()} | {"batch": 354}
    if method == "SGD":
        setting["lr"] = 0.1
    found = race.race(REGRESSION, method, setting, 0, steps=60)
    assert found["train"][-1] < 0.5 * found["train"][0]


@pytest.mark.parametrize("task", TASKS.values(), ids=attrgetter("name"))
def test_shampoo_preconditions_every_matrix_which_by_default_it_does_not(task, monkeypatch):
    made = []

    class Kept(ScalableShampoo):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(methods, "ScalableShampoo", Kept)
    net = task.net(0)
    X, y = (part[:8] for part in task.data()[0])
    step = METHODS["Shampoo"].step(task, net, METHODS["Shampoo"].drawn(task, 0), 0)
    by_default = Kept(net.parameters())
    step(Data(X, y))
    by_default.step()

    def with_statistics(optimizer):
        states = ((p, optimizer.state[p]["pre_conditioner"]) for p in net.parameters())
        return {id(p) for p, state in states if len(state.statistics)}

    matrices = [p for p in net.parameters() if p.ndim == 2]
    assert with_statistics(made[0]) == {id(p) for p in matrices}
    assert with_statistics(by_default) == {id(p) for p in matrices if p.numel() > 512}


# Runs.


def test_moments_are_dense_and_then_grow_by_a_constant_factor():
    moments = race.moments()
    assert moments[:21] == list(range(21))
    assert {32, 100, 200, 1002} < set(moments)
    assert all(1.2 < b / a < 1.3 for a, b in pairwise(moments[20:]))


def test_a_run_records_what_the_net_does():
    setting = {"lr": 0.1, "momentum": 0.0, "batch": 354}
    found = race.race(REGRESSION, "SGD", setting, 0, steps=2)
    net, (on, off) = REGRESSION.net(0), REGRESSION.data()
    for step in range(3):
        loss = REGRESSION.loss_func(net(on.X), on.y)
        assert found["train"][step] == pytest.approx(loss.item(), rel=1e-12)
        held_out = REGRESSION.loss_func(net(off.X), off.y).item()
        assert found["held_out"][step] == pytest.approx(held_out, rel=1e-12)
        for p, g in zip(
            net.parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True
        ):
            p.data.sub_(0.1 * g)
    assert found["steps"] == [0, 1, 2]
    assert found["seconds"][0] == 0


def test_a_classifier_records_the_share_of_wrong_answers():
    task = TASKS["classifier"]
    found = race.race(task, "Adam", METHODS["Adam"].drawn(task, 3), 0, steps=1)
    net, (_, off) = task.net(0), task.data()
    wrong = (net(off.X).argmax(dim=1) != off.y).double().mean().item()
    assert found["wrong"][0] == wrong
    assert len(found["wrong"]) == 2


def test_time_counts_steps_and_not_what_is_recorded(monkeypatch):
    """With a clock that runs a second at each look, a step takes one second."""
    clock = iter(range(10**6))
    monkeypatch.setattr(race.time, "process_time", lambda: next(clock))
    setting = {"lr": 1e-3, "momentum": 0.0, "batch": 354}
    found = race.race(REGRESSION, "SGD", setting, 0, seconds=30)
    assert found["seconds"] == found["steps"]
    assert found["steps"][-1] == 30


def test_a_run_that_explodes_ends_with_infinity():
    setting = {"lr": 3.0, "momentum": 0.9, "batch": 32}
    found = race.race(REGRESSION, "SGD", setting, 0, steps=200)
    assert found["train"][-1] == math.inf
    assert found["steps"][-1] < 20


def test_an_error_that_is_no_explosion_is_not_swallowed(monkeypatch):
    def make(*_):
        def step(_):
            raise ValueError("a mistake")

        return step

    monkeypatch.setitem(
        race.METHODS, "SGD", type(METHODS["SGD"])("SGD", make, METHODS["SGD"].space)
    )
    with pytest.raises(ValueError, match="a mistake"):
        race.race(REGRESSION, "SGD", {"batch": 32}, 0, steps=5)


# Choice.


def test_the_best_trial_has_the_lowest_loss_at_its_horizon():
    """Four trials that matter: best by steps, by passes, by time, and one that was given up."""
    task = TASKS["autoencoder"]
    data = len(task.data()[0].X)
    big, small = max(task.batches), min(task.batches)
    within = small * 2000 / data  # passes of 2000 small steps
    assert within > task.passes > small * 159 / data

    def made(batch, losses):
        steps = [0, 159, 200, 252, 2000][: len(losses)]
        seconds = [task.seconds * s / 2000 for s in steps]
        return {"setting": {"batch": batch}, "steps": steps, "train": losses, "seconds": seconds}

    trials = {
        0: made(big, [1.0, 0.5, 0.1, 0.4, 0.4]),  # best after 200 steps, by then many passes
        1: made(small, [1.0, 0.6, 0.6, 0.05, 0.3]),  # best within the passes
        2: made(big, [1.0, 0.9, 0.9, 0.9, 0.01]),  # best at the end
        3: made(small, [1.0, 0.001, None]),  # given up
    }
    flat_line = made(small, [1.0] * 5)
    store = {
        trial_key(t, m, trial): trials.get(trial, flat_line)
        for (t, m), trial in product(PAIRS, range(TRIALS))
    }
    assert best_trials(store)["autoencoder"]["KFAC"] == {"steps": 0, "passes": 1, "seconds": 2}
    record = trials[1]
    assert positions(task, record["setting"], record, "passes")[2] == 200 * small / data
    assert loss_at(task, trials[3]["setting"], trials[3], "steps") == math.inf
    assert loss_at(task, record["setting"], record, "steps") == 0.6


def test_final_runs_need_a_finished_search(tmp_path):
    with pytest.raises(ValueError, match=r"lacks 560 trials.*experiments tuning"):
        finals.experiment(tmp_path)


# Memory.


def test_momentum_keeps_one_number_a_parameter_and_adam_two():
    sgd, adam = (weighed("regression", method, 0) for method in ("SGD", "Adam"))
    parameters = sum(p.numel() for p in REGRESSION.net(0).parameters())
    assert sgd["parameters"] == sgd["kept"] == 8 * parameters
    counters = 4 * 6  # of the steps, in float32, of six parameters
    assert adam["kept"] == 16 * parameters + counters
    assert sgd["peak"] > sgd["parameters"] + sgd["kept"]


def test_kfac_keeps_its_sums_and_eigenvectors():
    """In each layer two sums, two eigenbases, and the eigenvalues with and without damping."""
    found = weighed("regression", "KFAC", 0)
    sizes = [(layer.in_features + 1, layer.out_features) for layer in REGRESSION.net(0)[::2]]
    momentum = found["parameters"]
    assert found["kept"] == momentum + 8 * sum(2 * (a * a + b * b) + 2 * a * b for a, b in sizes)


# The store.


def test_two_processes_find_what_one_finds(tmp_path):
    cells = [Cell(f"{x}", partial(math.sqrt, x)) for x in range(5)]
    found = {}
    for jobs in (1, 2):
        (tmp_path / f"{jobs}").mkdir()
        store = run(Experiment("roots", {}, lambda: cells), tmp_path / f"{jobs}", jobs=jobs)
        found[jobs] = [(key, store[key]) for key in store]
    assert found[1] == found[2] == [(f"{x}", rounded(math.sqrt(x))) for x in range(5)]


# The files.


def test_the_files_are_whole_and_of_this_code(stored, root):
    assert stored["tuning"]["settings"] == rounded(tuning.settings())
    assert list(stored["tuning"]["cells"]) == [cell.key for cell in tuning.cells()]
    assert len(stored["tuning"]["cells"]) == stored["tuning"]["settings"]["budget"]["runs"]
    made = finals.experiment(root / "book")
    assert stored["training"]["settings"] == rounded(made.settings)
    assert list(stored["training"]["cells"]) == [cell.key for cell in made.cells()]


@pytest.mark.parametrize("name", ["tuning", "training"])
def test_the_files_are_small(name, root):
    assert (root / "book" / f"{name}.json").stat().st_size < 1_500_000


def test_the_settings_in_the_file_are_drawn_anew(stored):
    for (task, method), trial in product(PAIRS, range(TRIALS)):
        kept = stored["tuning"]["cells"][trial_key(task, method, trial)]["setting"]
        assert kept == METHODS[method].drawn(TASKS[task], trial)


def test_no_run_took_longer_than_its_time(stored):
    for name in stored:
        for key, record in stored[name]["cells"].items():
            if key.startswith(("memory", "first", "steps")):
                continue
            task = TASKS[key.split("/")[1]]
            assert len(record["steps"]) == len(record["train"]) == len(record["seconds"])
            assert record["seconds"][-2] < task.seconds < 30


@pytest.mark.parametrize(("task", "method"), PAIRS)
def test_the_first_20_steps_are_those_in_the_file(task, method, stored):
    """Of one seed, in float64 on one thread; the file keeps ten digits of them."""
    trial = stored["training"]["settings"]["best"][task][method]["seconds"]
    kept = stored["training"]["cells"][first_key(task, method)]
    again = finals.first(task, method, trial)
    for column in ("train", "held_out"):
        assert len(kept[column]) == 21
        assert again[column] == pytest.approx(kept[column], rel=1e-6)


@pytest.mark.parametrize(("task", "method"), PAIRS)
def test_the_runs_in_the_file_begin_with_these_steps(task, method, stored):
    cells = stored["training"]["cells"]
    trial = stored["training"]["settings"]["best"][task][method]["seconds"]
    run, start = (
        cells[final_key(task, method, trial, finals.SEEDS[0])],
        cells[first_key(task, method)],
    )
    for column in ("train", "held_out"):
        assert run[column][:21] == pytest.approx(start[column], rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_memory_in_the_file_is_weighed_anew(method, stored):
    trial = finals.with_middle_batch("classifier")
    assert METHODS[method].drawn(TASKS["classifier"], trial)["batch"] == 128
    kept = stored["training"]["cells"][memory_key("classifier", method)]
    again = weighed("classifier", method, trial)
    assert again["parameters"] == kept["parameters"]
    assert again["kept"] == pytest.approx(kept["kept"], rel=1e-2)
    assert again["peak"] == pytest.approx(kept["peak"], rel=5e-2)


def test_axes_and_seeds_are_as_written_down():
    assert AXES == ("steps", "passes", "seconds")
    assert tuning.SEED not in finals.SEEDS
    assert len(finals.SEEDS) >= 5
    assert WEIGHED_STEPS >= 2
