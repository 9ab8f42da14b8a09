"""The preconditioner against dense solves, averages by hand, and its own interrupted self."""

import io

import pytest
import torch
from torch import nn
from truth import To, data_for, left_alone, mlp, relative_error

import kfac_lib.curvature as curvature
from kfac_lib import (
    KFAC,
    Empirical,
    Exact,
    Expand,
    Factored,
    InputOnly,
    KFACPreconditioner,
    LevenbergMarquardt,
    MonteCarlo,
    Plain,
    Reduce,
    exact_blocks,
)
from kfac_lib.examples import digits
from kfac_lib.examples import mlp as seeded_mlp
from kfac_lib.optim import predicted_decrease

pytestmark = pytest.mark.usefixtures("float64")
MSE, CE = nn.MSELoss(), nn.CrossEntropyLoss()
reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])
dampings = pytest.mark.parametrize("damping", [Exact(0.1), Factored(0.1), Plain(0.1)], ids=repr)


def backward(model, loss, data):
    model.zero_grad()
    loss(model(data[0]), data[1]).backward()


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def step(pre, loss, data, optimizer=None):
    backward(pre.model, loss, data)
    pre.update(*data)
    pre.precondition()
    if optimizer is not None:
        optimizer.step()


def joint(grads, layer, bias=True):
    W = grads[f"{layer}.weight"]
    return torch.cat([W, grads[f"{layer}.bias"].unsqueeze(1)], 1) if bias else W


def solve(K, damping, gradient):
    """The definition, with dense matrices: (K damped)⁻¹ g in rvec order."""
    A, B, delta = K.A, K.B, damping.delta
    eye_A, eye_B = torch.eye(len(A)), torch.eye(len(B))
    if isinstance(damping, Exact):
        dense = torch.kron(B, A) + delta * torch.eye(len(A) * len(B))
    elif isinstance(damping, Factored):
        pi = ((A.trace() / len(A)) / (B.trace() / len(B))) ** 0.5
        dense = torch.kron(B + delta**0.5 / pi * eye_B, A + pi * delta**0.5 * eye_A)
    else:
        dense = torch.kron(B + delta * eye_B, A + delta * eye_A)
    return torch.linalg.solve(dense, gradient.reshape(-1)).reshape(gradient.shape)


@dampings
@pytest.mark.parametrize("loss", [MSE, CE, nn.CrossEntropyLoss(reduction="sum")], ids=range(3))
@pytest.mark.parametrize("frozen_bias", [False, True])
def test_gradients_become_the_dense_solve(damping, loss, frozen_bias):
    net, data = mlp(4, 3, 3), data_for(loss, 7)
    net[2].bias.requires_grad_(not frozen_bias)
    pre = KFACPreconditioner(net, loss, damping=damping)
    backward(net, loss, data)
    before = gradients(net)
    tensors = {name: id(p.grad) for name, p in net.named_parameters()}
    pre.update(*data)
    assert all(torch.equal(p, before[name]) for name, p in gradients(net).items())
    pre.precondition()
    kfac = KFAC.compute(net, loss, data)
    assert kfac["2"].A.shape == ((3, 3) if frozen_bias else (4, 4))
    for layer, bias in (("0", True), ("2", not frozen_bias)):
        expected = solve(kfac[layer], damping, joint(before, layer, bias))
        assert relative_error(joint(gradients(net), layer, bias), expected) < 1e-10
    assert tensors == {name: id(p.grad) for name, p in net.named_parameters()}
    assert (net[2].bias.grad is None) == frozen_bias


def test_one_datum_is_the_exact_newton_step_of_the_exact_blocks():
    net, data = mlp(4, 3, 3), data_for(CE, 1)
    backward(net, CE, data)
    before = gradients(net)
    pre = KFACPreconditioner(net, CE, damping=Exact(0.01))
    pre.update(*data)
    pre.precondition()
    for layer, block in exact_blocks(net, CE, data, order="rvec").items():
        damped = block + 0.01 * torch.eye(len(block))
        expected = torch.linalg.solve(damped, joint(before, layer).reshape(-1))
        assert relative_error(joint(gradients(net), layer).reshape(-1), expected) < 1e-10


@reductions
@pytest.mark.parametrize("sharing", [Expand(), Reduce()], ids=repr)
@pytest.mark.parametrize("fisher", [Empirical(), InputOnly()], ids=repr)
def test_equal_batches_give_the_bias_corrected_average_of_factors(reduction, sharing, fisher):
    loss, beta = nn.MSELoss(reduction=reduction), 0.7
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), To(lambda z: z.movedim(-1, 1)))
    pre = KFACPreconditioner(net, loss, fisher=fisher, sharing=sharing, ema=beta)
    each = []
    for t in range(1, 5):
        batch = data_for(loss, 6, 2)
        pre.update(*batch)
        each.append(KFAC.compute(net, loss, batch, fisher, sharing))
        for name, K in pre.factors().items():
            for factor in ("A", "B"):
                weighted = sum(
                    (1 - beta) * beta ** (t - i) * getattr(kfac[name], factor)
                    for i, kfac in enumerate(each, start=1)
                )
                expected = weighted / (1 - beta**t)
                assert relative_error(getattr(K, factor), expected) < 1e-12


@reductions
def test_unequal_batches_count_by_their_size(reduction):
    loss, beta = nn.MSELoss(reduction=reduction), 0.7
    net, sizes = mlp(4, 3), (2, 9, 5)
    pre = KFACPreconditioner(net, loss, fisher=Empirical(), ema=beta)
    weights = [(1 - beta) * beta**i for i in (2, 1, 0)]
    xx, gg, N = 0, 0, 0
    for size, weight in zip(sizes, weights, strict=True):
        X, y = data_for(loss, size)
        pre.update(X, y)
        x = torch.cat([X, torch.ones(size, 1)], 1)
        g = (net(X) - y).detach()
        xx, gg, N = xx + weight * x.T @ x, gg + weight * g.T @ g, N + weight * size
    K = pre.factors()["0"]
    scale = 2 / (3 * N) if reduction == "mean" else 2 / sum(weights)
    assert relative_error(K.A, scale * xx) < 1e-12
    assert relative_error(K.B, gg / N) < 1e-12


@reductions
def test_the_same_batch_again_and_again_gives_the_factors_of_one(reduction):
    loss = nn.CrossEntropyLoss(reduction=reduction)
    net, data = mlp(4, 3, 3), data_for(loss, 6)
    pre = KFACPreconditioner(net, loss)
    for _ in range(4):
        pre.update(*data)
    for name, K in KFAC.compute(net, loss, data).items():
        assert relative_error(pre.factors()[name].A, K.A) < 1e-12
        assert relative_error(pre.factors()[name].B, K.B) < 1e-12


def test_without_memory_the_newest_batch_stands_alone():
    net = mlp(4, 3, 3)
    pre = KFACPreconditioner(net, MSE, ema=0)
    for _ in range(2):
        data = data_for(MSE, 6)
        pre.update(*data)
    for name, K in KFAC.compute(net, MSE, data).items():
        assert relative_error(pre.factors()[name].A, K.A) < 1e-14
        assert relative_error(pre.factors()[name].B, K.B) < 1e-14


def test_ignored_data_change_no_factor_and_leave_the_refresh_due():
    loss = nn.CrossEntropyLoss(ignore_index=1, reduction="sum")
    net, (X, _) = mlp(4, 3, 3), data_for(loss, 6)
    y, none = torch.tensor([0, 2, 1, 0, 2, 1]), torch.ones(6).long()
    pre, reference = (KFACPreconditioner(net, loss, factor_every=2) for _ in range(2))
    pre.update(X, none)
    with pytest.raises(ValueError, match=r"no factors yet.*update\(X, y\)"):
        pre.precondition()
    pre.update(X, y)
    reference.update(X, y)
    for _ in range(3):
        pre.update(X, none)
    assert pre.steps == 5
    pre.update(2 * X, y)
    reference.update(X, y)
    reference.update(2 * X, y)
    for name, K in reference.factors().items():
        assert torch.equal(pre.factors()[name].A, K.A)
        assert torch.equal(pre.factors()[name].B, K.B)


# What is computed when


def count_calls(monkeypatch, owner, name):
    calls, function = [], getattr(owner, name)

    def counted(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.mark.parametrize(("period", "times"), [(1, 7), (2, 4), (3, 3), (lambda t: 1 + t // 3, 4)])
def test_factors_are_refreshed_every_so_many_updates(period, times, monkeypatch):
    net, data = mlp(4, 3, 3), data_for(MSE, 5)
    calls = count_calls(monkeypatch, torch.autograd, "grad")
    pre = KFACPreconditioner(net, MSE, factor_every=period)
    for _ in range(7):
        pre.update(*data)
    assert len(calls) == times
    assert pre.steps == 7


@pytest.mark.parametrize(("period", "times"), [(1, 7), (2, 4), (3, 3), (lambda t: 1 + t // 3, 4)])
@pytest.mark.parametrize(("form", "routine"), [(Exact, "eigh"), (Factored, "cholesky_ex")])
def test_inverses_are_made_anew_every_so_many_calls(period, times, form, routine, monkeypatch):
    net, data = mlp(4, 3), data_for(MSE, 5)
    calls = count_calls(monkeypatch, torch.linalg, routine)
    pre = KFACPreconditioner(net, MSE, inverse_every=period, damping=form(0.1))
    for _ in range(7):
        step(pre, MSE, data)
    assert len(calls) == 2 * times


def test_inverses_of_unchanged_factors_are_not_made_anew(monkeypatch):
    net, data = mlp(4, 3), data_for(MSE, 5)
    calls = count_calls(monkeypatch, torch.linalg, "eigh")
    pre = KFACPreconditioner(net, MSE, factor_every=3)
    for _ in range(7):
        step(pre, MSE, data)
    assert len(calls) == 2 * 3


@pytest.mark.parametrize("form", [Exact, Factored, Plain])
def test_a_changed_delta_acts_at_once_on_the_factors_last_taken(form, monkeypatch):
    net, loss = mlp(4, 3), MSE
    pre = KFACPreconditioner(
        net, loss, damping=lambda t: form(0.1 * 2.0**t), inverse_every=10, ema=0
    )
    first = data_for(loss, 5)
    calls = count_calls(monkeypatch, torch.linalg, "eigh")
    for t, data in enumerate([first, data_for(loss, 5), data_for(loss, 5)]):
        backward(net, loss, data)
        before = joint(gradients(net), "0")
        pre.update(*data)
        pre.precondition()
        K = KFAC.compute(net, loss, first)["0"]
        expected = solve(K, form(0.1 * 2.0**t), before)
        assert relative_error(joint(gradients(net), "0"), expected) < 1e-10
    assert len(calls) == (2 if form is Exact else 0)


def test_another_form_of_damping_takes_the_newest_factors():
    net, data = mlp(4, 3), data_for(MSE, 5)
    forms = [Exact(0.1), Factored(0.1)]
    pre = KFACPreconditioner(net, MSE, damping=lambda t: forms[t], inverse_every=10, ema=0)
    step(pre, MSE, data_for(MSE, 5))
    backward(net, MSE, data)
    before = joint(gradients(net), "0")
    pre.update(*data)
    pre.precondition()
    expected = solve(KFAC.compute(net, MSE, data)["0"], forms[1], before)
    assert relative_error(joint(gradients(net), "0"), expected) < 1e-10


def test_schedules_see_the_step_from_zero():
    seen = {}

    def schedule(option, value):
        return lambda t: seen.setdefault(option, []).append(t) or value

    options = {"factor_every": 1, "inverse_every": 1, "ema": 0.5, "kl_clip": 1.0, "lr": 0.1}
    options = {o: schedule(o, v) for o, v in {**options, "damping": Exact(0.1)}.items()}
    net = mlp(4, 3)
    pre = KFACPreconditioner(net, MSE, **options)
    for _ in range(3):
        step(pre, MSE, data_for(MSE, 5))
    assert seen == {option: [0, 1, 2] for option in options}


def test_a_schedule_of_the_average_changes_its_weights():
    betas = [0.9, 0.5, 0.2]
    net, batches = mlp(4, 3), [data_for(MSE, 5) for _ in betas]
    pre = KFACPreconditioner(net, MSE, fisher=Empirical(), ema=lambda t: betas[t])
    for batch in batches:
        pre.update(*batch)
    weights = torch.tensor([0.1 * 0.5 * 0.2, 0.5 * 0.2, 0.8])
    factors = [KFAC.compute(net, MSE, batch, Empirical())["0"] for batch in batches]
    expected = sum(w * K.B for w, K in zip(weights, factors, strict=True)) / weights.sum()
    assert relative_error(pre.factors()["0"].B, expected) < 1e-12


def test_adaptive_damping_acts_at_the_next_step():
    net, data = mlp(4, 3), data_for(MSE, 5)
    damping = LevenbergMarquardt(Exact(0.1), factor=3.0)
    pre = KFACPreconditioner(net, MSE, damping=damping, inverse_every=10)
    step(pre, MSE, data)
    damping.update(-1.0, 1.0)
    backward(net, MSE, data)
    before = joint(gradients(net), "0")
    pre.precondition()
    expected = solve(KFAC.compute(net, MSE, data)["0"], Exact(0.1 * 3.0), before)
    assert relative_error(joint(gradients(net), "0"), expected) < 1e-10


# KL clipping


@pytest.mark.parametrize("kappa", [1e-3, 1e9])
def test_kl_clip_is_the_formula_and_bounds_the_step(kappa):
    net, data, lr, delta = mlp(4, 3, 3), data_for(CE, 7), 0.3, 1e-3
    plain, clipped = (
        KFACPreconditioner(net, CE, damping=Exact(delta), kl_clip=k, lr=lr) for k in (None, kappa)
    )
    backward(net, CE, data)
    g = gradients(net)
    step(plain, CE, data)
    p = gradients(net)
    step(clipped, CE, data)
    found = gradients(net)
    product = sum(float((g[name] * p[name]).sum()) for name in g)
    nu = min(1.0, (kappa / (lr**2 * product)) ** 0.5)
    assert (nu < 1) == (kappa < 1)
    for name in g:
        assert relative_error(found[name], nu * p[name]) < 1e-12
    length = 0
    for layer, K in KFAC.compute(net, CE, data).items():
        u = joint(found, layer).reshape(-1)
        length += float(u @ (K.to_dense("rvec") + delta * torch.eye(len(u))) @ u)
    assert lr**2 * length <= kappa * (1 + 1e-10)
    if nu < 1:
        assert abs(lr**2 * length / kappa - 1) < 1e-10


def test_kl_clip_leaves_zero_gradients_and_a_zero_learning_rate_alone():
    net, (X, y) = mlp(4, 3), data_for(MSE, 5)
    pre = KFACPreconditioner(net, MSE, kl_clip=1e-3, lr=lambda t: 0.0 if t == 0 else 0.1)
    plain = KFACPreconditioner(net, MSE)
    step(plain, MSE, (X, y))
    expected = gradients(net)
    step(pre, MSE, (X, y))
    assert all(torch.equal(p, expected[name]) for name, p in gradients(net).items())
    step(pre, MSE, (X, net(X).detach()))
    assert all(not p.any() for p in gradients(net).values())


# What is left alone


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 3)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.b(self.norm(self.a(x))) + self.head(x[:, :3])


def test_frozen_and_ignored_parameters_pass_through_and_are_named():
    net, data = Mixed(), data_for(MSE, 5)
    net.head.requires_grad_(False)
    net.a.bias.requires_grad_(False)
    pre = KFACPreconditioner(net, MSE, ignore=["norm", "b.bias"])
    backward(net, MSE, data)
    before, frozen = gradients(net), [net.head.weight, net.head.bias, net.a.bias]
    pre.update(*data)
    pre.precondition()
    after = gradients(net)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"a.weight", "b.weight"}
    assert all(p.grad is None for p in frozen)
    expected = solve(pre.factors()["b"], Exact(1e-3), before["b.weight"])
    assert relative_error(after["b.weight"], expected) < 1e-10
    text = repr(pre)
    for part in (
        "damping=Exact(delta=0.001)",
        "a: A (4, 4), B (3, 3)",
        "b: A (3, 3), B (3, 3)",
        "frozen: a.bias, head.weight, head.bias",
        "ignored: norm.weight, norm.bias, b.bias",
    ):
        assert part in text


def test_a_layer_without_gradient_is_left_without():
    net, data = mlp(4, 3, 3), data_for(MSE, 5)
    pre = KFACPreconditioner(net, MSE)
    backward(net, MSE, data)
    before = joint(gradients(net), "2")
    net[0].zero_grad()
    pre.update(*data)
    pre.precondition()
    assert net[0].weight.grad is None
    assert net[0].bias.grad is None
    expected = solve(KFAC.compute(net, MSE, data)["2"], Exact(1e-3), before)
    assert relative_error(joint(gradients(net), "2"), expected) < 1e-10


def test_an_update_leaves_model_gradients_and_random_numbers_alone():
    net, data = mlp(4, 3, 3), data_for(CE, 5)
    pre = KFACPreconditioner(net, CE)
    backward(net, CE, data)
    state = torch.get_rng_state()
    with left_alone(net), torch.no_grad():
        pre.update(*data)
    before = {n: (id(p), p._version, p.requires_grad) for n, p in net.named_parameters()}
    with torch.no_grad():
        pre.precondition()
    assert before == {n: (id(p), p._version, p.requires_grad) for n, p in net.named_parameters()}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not p.grad.requires_grad for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@dampings
def test_dtype_is_kept(dtype, damping):
    net, (X, y) = mlp(4, 3, 3), data_for(MSE, 5)
    backward(net, MSE, (X, y))
    pre = KFACPreconditioner(net, MSE, damping=damping, kl_clip=0.1, lr=0.1)
    pre.update(X, y)
    pre.precondition()
    expected = gradients(net)
    net = net.to(dtype)
    pre = KFACPreconditioner(net, MSE, damping=damping, kl_clip=0.1, lr=0.1)
    step(pre, MSE, (X.to(dtype), y.to(dtype)))
    for name, p in net.named_parameters():
        assert p.grad.dtype == dtype
        assert relative_error(p.grad.double(), expected[name]) < 30 * torch.finfo(dtype).eps ** 0.9


def test_a_layer_whose_factor_has_no_inverse_is_named_and_nothing_changes():
    net, (X, y) = mlp(4, 3, 3), data_for(MSE, 9)
    X[:, 1] = 0
    pre = KFACPreconditioner(net, MSE, damping=Exact(0))
    backward(net, MSE, (X, y))
    pre.update(X, y)
    with left_alone(net), pytest.raises(ValueError, match=r"Layer '0': Factor A.*singular"):
        pre.precondition()
    pre.damping = Exact(0.1)
    pre.precondition()


def test_an_update_that_fails_changes_nothing():
    net, data = mlp(4, 3, 3), data_for(MSE, 9)
    pre = KFACPreconditioner(net, MSE)
    pre.update(*data)
    before = pre.factors()
    with pytest.raises(ValueError, match="NaN or inf"):
        pre.update(data[0] * float("nan"), data[1])
    with pytest.raises(ValueError, match="overflow"):
        pre.update(data[0] * 1e200, data[1])
    with pytest.raises(ValueError, match="S for all data"):
        pre.update(torch.randn(2, 5, 4), torch.randn(2, 5, 3))
    assert pre.steps == 1
    assert all(torch.equal(K.A, before[name].A) for name, K in pre.factors().items())


# Save and load


def train(net, pre, optimizer, batches):
    for batch in batches:
        step(pre, CE, batch, optimizer)
        if isinstance(pre.damping, LevenbergMarquardt):
            pre.damping.update(float(batch[0][0, 0]), 1.0)


def preconditioned(form, generator=None, sizes=(4, 5, 3)):
    torch.manual_seed(3)
    net = mlp(*sizes)
    pre = KFACPreconditioner(
        net,
        CE,
        fisher=MonteCarlo(2, generator) if generator else Empirical(),
        damping=LevenbergMarquardt(form(0.1), factor=2.0),
        factor_every=2,
        inverse_every=3,
        kl_clip=1e-2,
        lr=0.1,
    )
    return net, pre, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("form", [Exact, Factored, Plain])
@pytest.mark.parametrize("draws", [False, True])
@pytest.mark.parametrize("first", [0, 1, 4, 5])
def test_training_goes_on_bit_for_bit_after_saving_and_loading(form, draws, first):
    batches = [data_for(CE, 6) for _ in range(10)]
    generator = torch.Generator().manual_seed(1) if draws else None
    net, pre, optimizer = preconditioned(form, generator)
    train(net, pre, optimizer, batches[:first])
    file = io.BytesIO()
    parts = {"pre": pre, "optimizer": optimizer, "net": net}
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    train(net, pre, optimizer, batches[first:])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    generator = torch.Generator().manual_seed(2) if draws else None
    new_net, new, new_optimizer = preconditioned(form, generator)
    for name, part in {"pre": new, "optimizer": new_optimizer, "net": new_net}.items():
        part.load_state_dict(saved[name])
    train(new_net, new, new_optimizer, batches[first:])
    assert new.damping.delta == pre.damping.delta
    for found, expected in zip(new_net.parameters(), net.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_a_saved_state_is_not_changed_by_going_on():
    net, pre, optimizer = preconditioned(Exact)
    batches = [data_for(CE, 6) for _ in range(6)]
    train(net, pre, optimizer, batches[:3])
    state = pre.state_dict()
    kept = state["sums"]["0"]["xx"].clone()
    other = preconditioned(Exact)[1]
    other.load_state_dict(state)
    train(net, pre, optimizer, batches[3:])
    assert torch.equal(state["sums"]["0"]["xx"], kept)
    assert state["steps"] == other.steps == 3


def test_a_state_of_another_net_or_other_options_is_refused_and_changes_nothing():
    _, pre, _ = preconditioned(Exact, torch.Generator())
    pre.update(*data_for(CE, 6))
    state = pre.state_dict()
    fresh = preconditioned(Exact, torch.Generator(), (4, 7, 3))[1]
    deeper = preconditioned(Exact, torch.Generator(), (4, 5, 3, 3))[1]
    fixed = KFACPreconditioner(mlp(4, 5, 3), CE, fisher=MonteCarlo(2, torch.Generator()))
    reduced = KFACPreconditioner(
        mlp(4, 5, 3), CE, fisher=MonteCarlo(2), sharing=Reduce(), damping=pre.damping
    )
    without = KFACPreconditioner(mlp(4, 5, 3), CE, fisher=MonteCarlo(2), damping=pre.damping)
    for other, words in (
        (fresh, r"another net: layer '0'.*\(5, 5\).*\(7, 7\)"),
        (deeper, r"another net: layer '4' is in the net, but not in the state"),
        (preconditioned(Exact)[1], r"flavour MonteCarlo.*Empirical"),
        (preconditioned(Factored, torch.Generator())[1], r"Exact damping.*Factored"),
        (fixed, r"damping adaptive.*fixed"),
        (reduced, r"sharing Expand.*Reduce"),
        (without, r"generator in the flavour, here there is none"),
    ):
        with pytest.raises(ValueError, match=words):
            other.load_state_dict(state)
        assert other.steps == 0
    pre2 = preconditioned(Exact, torch.Generator(), (4, 5, 3, 3))[1]
    with pytest.raises(ValueError, match=r"layer '4' is in the state, but not in the net"):
        pre.load_state_dict(pre2.state_dict())
    with pytest.raises(ValueError, match=r"lacks.*'sums'.*state_dict\(\)"):
        pre.load_state_dict({})


# The quadratic model


@reductions
@pytest.mark.parametrize("kind", [nn.MSELoss, nn.CrossEntropyLoss])
@pytest.mark.parametrize("delta", [0.0, 0.3])
def test_predicted_decrease_is_that_of_the_dense_ggn(reduction, kind, delta):
    loss = kind(reduction=reduction)
    net, data = mlp(4, 3, 3), data_for(loss, 5)
    backward(net, loss, data)
    moves = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    g = torch.cat([joint(gradients(net), layer).reshape(-1) for layer in ("0", "2")])
    s = torch.cat([joint(moves, layer).reshape(-1) for layer in ("0", "2")])
    G = curvature.ggn(net, loss, data, order="rvec")
    expected = -(g @ s + 0.5 * s @ (G + delta * torch.eye(len(s))) @ s)
    with left_alone(net), torch.no_grad():
        found = predicted_decrease(net, loss, data, moves, delta)
    assert abs(found / float(expected) - 1) < 1e-10
    del moves["0.weight"]
    s[: 3 * 5] = torch.cat([torch.zeros(3, 4), moves["0.bias"].unsqueeze(1)], 1).reshape(-1)
    expected = -(g @ s + 0.5 * s @ (G + delta * torch.eye(len(s))) @ s)
    assert abs(predicted_decrease(net, loss, data, moves, delta) / float(expected) - 1) < 1e-10


def test_predicted_decrease_is_exact_for_a_linear_model():
    net, data = mlp(4, 3), data_for(MSE, 5)
    backward(net, MSE, data)
    moves = {name: -0.1 * p.grad for name, p in net.named_parameters()}
    predicted = predicted_decrease(net, MSE, data, moves)
    before = float(MSE(net(data[0]), data[1]).detach())
    with torch.no_grad():
        for name, p in net.named_parameters():
            p += moves[name]
    actual = before - float(MSE(net(data[0]), data[1]).detach())
    assert predicted > 0
    assert abs(actual / predicted - 1) < 1e-10


def test_a_parameter_that_the_loss_does_not_reach_enters_by_the_damping():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.spare = nn.Linear(4, 3), nn.Linear(2, 2)

        def forward(self, x):
            return self.fc(x)

    moves = {"spare.weight": torch.ones(2, 2)}
    data = data_for(MSE, 5)
    both = {**moves, "fc.bias": torch.ones(3)}
    found = predicted_decrease(Spare(), MSE, data, moves, 0.5)
    assert found == -0.5 * 0.5 * 4
    torch.manual_seed(1)
    net = Spare()
    assert predicted_decrease(net, MSE, data, both, 0.5) == pytest.approx(
        found + predicted_decrease(net, MSE, data, {"fc.bias": torch.ones(3)}, 0.5)
    )


# Does it help?


def losses_of_training(steps, with_kfac, lr=0.3):
    (X, y), net, loss = digits(512), seeded_mlp(64, 16, 10), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    pre = KFACPreconditioner(net, loss, damping=Exact(1e-2)) if with_kfac else None
    losses = []
    for i in range(steps):
        batch = slice(128 * (i % 4), 128 * (i % 4) + 128)
        optimizer.zero_grad()
        loss(net(X[batch]), y[batch]).backward()
        if pre is not None:
            pre.update(X[batch], y[batch])
            pre.precondition()
        optimizer.step()
        losses.append(float(loss(net(X), y).detach()))
    return losses


def test_digits_are_learnt_in_fewer_steps():
    plain, kfac = losses_of_training(30, False), losses_of_training(30, True)
    assert kfac[-1] < 0.2 * plain[-1]
    assert kfac[9] < plain[-1]
