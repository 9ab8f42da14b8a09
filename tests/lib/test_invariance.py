"""What holds for every net: nearest products, traces, affine maps of a layer, the KL divergence."""

import pytest
import torch
from torch import nn
from truth import To, data_for, ggn_blocks, mlp, relative_error

from kfac_lib import KFAC, Exact, Kronecker
from kfac_lib.kronecker import nearest_kronecker, rearrange

pytestmark = pytest.mark.usefixtures("float64")
orders = pytest.mark.parametrize("order", ["cvec", "rvec"])
losses = pytest.mark.parametrize(
    "loss", [nn.MSELoss(), nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()], ids=repr
)


def spd(size):
    root = torch.randn(size, size)
    return root @ root.T + 0.3 * torch.eye(size)


@orders
def test_rearranged_a_product_is_an_outer_product_and_norms_stay(order):
    K = Kronecker(spd(4), spd(3))
    R = rearrange(K.to_dense(order), K.shape, order)
    assert relative_error(R, torch.outer(K.A.flatten(), K.B.flatten())) < 1e-12
    other = "rvec" if order == "cvec" else "cvec"
    assert torch.linalg.matrix_rank(R) == 1
    assert torch.linalg.matrix_rank(rearrange(K.to_dense(order), K.shape, other)) > 1
    noise = torch.randn(12, 12)
    assert abs(rearrange(noise, (3, 4), order).norm() - noise.norm()) < 1e-12


@orders
@losses
def test_the_nearest_product_leaves_the_other_singular_values_and_is_never_worse_than_kfac(
    order, loss
):
    model, data = mlp(4, 6, 5, 3), data_for(loss, 8)
    kfac = KFAC.compute(model, loss, data)
    gains = []
    for name, G in ggn_blocks(model, loss, data, order).items():
        nearest = nearest_kronecker(G, kfac[name].shape, order)
        sigma = torch.linalg.svdvals(rearrange(G, kfac[name].shape, order))
        error = (G - nearest.to_dense(order)).norm()
        assert abs(error**2 - (sigma[1:] ** 2).sum()) < 1e-10 * G.norm() ** 2
        assert error <= (G - kfac[name].to_dense(order)).norm() + 1e-12 * G.norm()
        gains.append(float((G - kfac[name].to_dense(order)).norm() / G.norm() - error / G.norm()))
        for factor in (nearest.A, nearest.B):
            assert torch.linalg.eigvalsh(factor).min() > -1e-10 * factor.norm()
        assert abs(nearest.A.norm() - nearest.B.norm()) < 1e-12 * nearest.A.norm()
    assert max(gains) > 1e-4


@orders
def test_the_nearest_product_of_a_product_is_the_product(order):
    K = Kronecker(spd(4), spd(3))
    nearest = nearest_kronecker(K.to_dense(order), K.shape, order)
    assert relative_error(nearest.to_dense(order), K.to_dense(order)) < 1e-12
    negative = nearest_kronecker(-K.to_dense(order), K.shape, order)
    assert negative.A.trace() > 0 > negative.B.trace()


def test_bad_matrices_have_no_nearest_product():
    with pytest.raises(ValueError, match=r"shape \(12, 12\); a weight of shape \(3, 5\) needs"):
        nearest_kronecker(torch.eye(12), (3, 5), "cvec")
    with pytest.raises(ValueError, match="not symmetric, or holds NaN"):
        nearest_kronecker(torch.randn(12, 12), (3, 4), "cvec")
    with pytest.raises(ValueError, match="not symmetric, or holds NaN"):
        nearest_kronecker(torch.eye(12) / 0, (3, 4), "rvec")
    with pytest.raises(ValueError, match="order"):
        nearest_kronecker(torch.eye(12), (3, 4), "C")


@losses
def test_the_trace_of_the_block_is_the_mean_of_products_and_kfac_has_the_product_of_means(loss):
    """tr G = R Σ_n ‖x̃_n‖² Σ_v ‖g_nv‖²; KFAC keeps it for one datum, and not for several."""
    model, (X, y) = mlp(4, 6, 5, 3), data_for(loss, 6)
    G = ggn_blocks(model, loss, (X, y), "cvec")
    kfac = KFAC.compute(model, loss, (X, y))
    parts = [KFAC.compute(model, loss, (X[n : n + 1], y[n : n + 1])) for n in range(6)]
    off = []
    for name in kfac:
        mean = sum(part[name].trace() for part in parts) / 6
        assert abs(mean - G[name].trace()) < 1e-10 * mean
        off.append(float(abs(kfac[name].trace() / G[name].trace() - 1)))
    assert max(off) > 0.01


def steps(model, loss, data, inverse):
    """KFAC's inverse times the gradient, for every layer, on [W b]."""
    params = list(model.parameters())
    gradients = torch.autograd.grad(loss(model(data[0]), data[1]), params)
    kfac = KFAC.compute(model, loss, data)
    result = {}
    for i, name in enumerate(kfac):
        W, b = gradients[2 * i : 2 * i + 2]
        result[name] = inverse(kfac[name]) @ torch.cat([W, b.unsqueeze(1)], 1)
    return result


INVERSES = {
    "undamped": lambda K: K.inverse(),
    "damped": lambda K: K.inverse(Exact(0.1)),
}


def affine(D):
    """An invertible affine map x ↦ M x + m, as a function and as a matrix on [x; 1]."""
    M, m = torch.randn(D, D) + 2 * torch.eye(D), torch.randn(D)
    T = torch.zeros(D + 1, D + 1)
    T[:D, :D], T[:D, D], T[D, D] = M, m, 1
    return To(lambda x: x @ M.T + m), T


@pytest.mark.parametrize("damping", ["undamped", "damped"])
@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.BCEWithLogitsLoss()], ids=repr)
def test_the_undamped_step_does_not_depend_on_affine_coordinates_and_the_damped_one_does(
    loss, damping
):
    """Inputs in other coordinates, weights changed so that the function stays the same."""
    model, data = mlp(3, 4, 5, 3), data_for(loss, 40, D_in=3)
    step = steps(model, loss, data, INVERSES[damping])
    for name, D in (("0", 3), ("2", 4), ("4", 5)):
        into, T = affine(D)
        changed = mlp(3, 4, 5, 3)
        changed.load_state_dict(model.state_dict())
        layer = changed[int(name)]
        joint = torch.cat([layer.weight, layer.bias.unsqueeze(1)], 1) @ torch.linalg.inv(T)
        with torch.no_grad():
            layer.weight.copy_(joint[:, :-1])
            layer.bias.copy_(joint[:, -1])
        modules = list(changed)
        modules.insert(int(name), into)
        net = nn.Sequential(*modules)
        assert relative_error(net(data[0]), model(data[0])) < 1e-10
        there = steps(net, loss, data, INVERSES[damping])
        key = str(int(name) + 1)
        error = relative_error(there[key] @ T, step[name])
        assert error < 1e-8 if damping == "undamped" else error > 0.01


@losses
def test_with_a_separate_bias_a_shift_of_the_input_changes_the_step(loss):
    """[W b] together follow a shift of the input; W and b apart do not."""
    D, data = 3, data_for(loss, 40, D_in=3)
    model, shift = mlp(D, 3), torch.tensor([1.0, -2.0, 0.5])
    shifted = nn.Sequential(To(lambda x: x + shift), mlp(D, 3)[0])
    with torch.no_grad():
        shifted[1].weight.copy_(model[0].weight)
        shifted[1].bias.copy_(model[0].bias - model[0].weight @ shift)

    def changes(net, bias):
        """By how much the step changes the prediction, to first order: linear in [W b]."""
        key = next(n for n, m in net.named_modules() if isinstance(m, nn.Linear))
        params = dict(net.named_parameters())
        W, b = torch.autograd.grad(loss(net(data[0]), data[1]), list(params.values()))
        kfac = KFAC.compute(net, loss, data, bias=bias)
        if bias == "joint":
            step = kfac[key].inverse(Exact(1e-12)) @ torch.cat([W, b.unsqueeze(1)], 1)
            dW, db = step[:, :-1], step[:, -1]
        else:
            dW = kfac[f"{key}.weight"].inverse(Exact(1e-12)) @ W
            db = (kfac[f"{key}.bias"].inverse(Exact(1e-12)) @ b.unsqueeze(1)).squeeze(1)
        x = data[0] if key == "0" and net is model else data[0] + shift
        change = x @ dW.T + db
        # The softmax does not see a change of all logits alike, along which B is singular.
        return change - change.mean(1, keepdim=True)

    assert relative_error(changes(shifted, "joint"), changes(model, "joint")) < 1e-6
    assert relative_error(changes(shifted, "separate"), changes(model, "separate")) > 0.01


def test_twice_the_kl_divergence_over_the_quadratic_form_goes_to_one_linearly():
    """Of a regression: 2 KL(ε) / (ε² dᵀ F d) = 1 + O(ε), with KL = R Σ_n ½ ‖f_n(ε) − f_n‖²."""
    loss = nn.MSELoss()
    model, data = mlp(4, 5, 3), data_for(loss, 6)
    params = {n: p.detach() for n, p in model.named_parameters()}
    d = {n: torch.randn_like(p) for n, p in params.items()}

    def f(eps):
        moved = {n: p + eps * d[n] for n, p in params.items()}
        return torch.func.functional_call(model, moved, (data[0],))

    R = 2 / f(0.0).numel()
    _, slope = torch.func.jvp(f, (torch.tensor(0.0),), (torch.tensor(1.0),))
    quadratic = R * (slope**2).sum()
    off = [
        float(R * ((f(e) - f(0.0)) ** 2).sum() / (e**2 * quadratic) - 1) for e in (1e-2, 1e-3, 1e-4)
    ]
    assert abs(off[0]) < 0.5
    assert abs(off[0] / off[1] - 10) < 1
    assert abs(off[1] / off[2] - 10) < 0.1


def test_of_an_indefinite_matrix_the_nearest_product_still_has_symmetric_factors():
    J = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    dense = torch.kron(J, J) + 0.1 * torch.kron(torch.eye(2), torch.diag(torch.tensor([1.0, -2.0])))
    nearest = nearest_kronecker(dense, (2, 2), "cvec")
    assert torch.allclose(nearest.A, nearest.A.T)
    assert torch.allclose(nearest.B, nearest.B.T)
