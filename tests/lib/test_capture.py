import pytest
import torch
from torch import nn
from truth import To, data_for, left_alone, mlp, relative_error, truth

from kfac_lib import KFAC, TypeII, exact_blocks
from kfac_lib.capture import capture, check_calls, require_graph
from kfac_lib.curvature import ggn_blocks

pytestmark = pytest.mark.usefixtures("float64")
MSE = nn.MSELoss()


def same(first, second):
    for one, other in zip(first.values(), second.values(), strict=True):
        assert relative_error(one.A, other.A) < 1e-12
        assert relative_error(one.B, other.B) < 1e-12
    return True


def test_calls_are_recorded_and_hooks_removed():
    net, X = mlp(4, 2, 3), torch.randn(5, 4)
    with left_alone(net), capture({"0": net[0], "2": net[2]}) as calls:
        f = net(X)
        net[0](X)
    assert {name: len(of_layer) for name, of_layer in calls.items()} == {"0": 2, "2": 1}
    assert torch.equal(calls["0"][0].x, X)
    (g,) = torch.autograd.grad(f, [calls["2"][0].edge], torch.ones(5, 3))
    assert torch.equal(g, torch.ones(5, 3))


def test_hooks_are_removed_after_an_exception_inside():
    net = mlp(4, 2, 3)
    with left_alone(net), pytest.raises(KeyError), capture({"0": net[0]}):
        raise KeyError


def test_an_input_by_keyword_is_seen():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(input=x)

    net, data = ByKeyword(), data_for(MSE, 5)
    found = KFAC.compute(net, MSE, data)
    block = truth(net, MSE, data, "type-II", "cvec")["fc"]
    assert relative_error(found["fc"].to_dense("cvec"), block) < 1e-10


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Hardtanh, nn.ELU, nn.LeakyReLU])
def test_an_activation_in_place_gives_the_factors_of_the_one_that_copies(activation):
    layers, data = [nn.Linear(4, 6), nn.Linear(6, 3)], data_for(MSE, 5)
    nets = [nn.Sequential(layers[0], activation(inplace=i), layers[1]) for i in (False, True)]
    for name in same(*(KFAC.compute(net, MSE, data) for net in nets)) and "0":
        one = (data[0][:1], data[1][:1])
        block = truth(nets[0], MSE, one, "type-II", "cvec")[name]
        found = KFAC.compute(nets[1], MSE, one)[name].to_dense("cvec")
        assert relative_error(found, block) < 1e-10


def scale_a_part(z):
    z[..., :2] *= 0.5
    return z


def overwrite_after_use(z):
    y = z + 1
    z.relu_()
    return y * z


def centre(z):
    z -= z.mean(-1, keepdim=True)
    return z


IN_PLACE = {
    "relu": lambda z: z.relu_(),
    "add": lambda z: z.add_(1),
    "part": scale_a_part,
    "after use": overwrite_after_use,
    "centre": centre,
}


@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("shared", [(), (3,), (3, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_changes_in_place_after_a_layer_leave_its_block_exact(change, shared, bias):
    # With a bias and shared axes torch returns a view, which takes a change in place differently.
    net = nn.Sequential(nn.Linear(4, 6, bias=bias), To(IN_PLACE[change]), nn.Linear(6, 3))
    data = torch.randn(5, *shared, 4), torch.randn(5, *shared, 3)
    exact = ggn_blocks(net, MSE, data, order="cvec")
    found = exact_blocks(net, MSE, data, order="cvec")
    for name, block in exact.items():
        assert relative_error(found[name], block) < 1e-10


def test_hooks_of_the_caller_may_replace_the_output_and_stay():
    inner, data = mlp(4, 2, 3), data_for(MSE, 5)
    scaled = nn.Sequential(inner[0], To(lambda z: 3 * z), inner[1], inner[2])
    expected = list(KFAC.compute(scaled, MSE, data).values())
    inner[0].register_forward_hook(lambda layer, args, z: 3 * z)
    inner[0].register_forward_pre_hook(lambda layer, args: None)
    inner[2].register_full_backward_hook(lambda layer, grad_in, grad_out: None)
    with left_alone(inner):
        found = KFAC.compute(inner, MSE, data)
    same(dict(enumerate(found.values())), dict(enumerate(expected)))


@pytest.mark.parametrize("training", [True, False])
def test_a_run_without_error_leaves_the_model_alone(training):
    net, data = (
        nn.Sequential(mlp(4, 2, 3), nn.LayerNorm(3, elementwise_affine=False)),
        data_for(MSE, 5),
    )
    net.train(training)
    net[0][0].bias.requires_grad_(False)
    net(data[0]).sum().backward()
    with left_alone(net):
        KFAC.compute(net, MSE, data)
    with left_alone(net), torch.no_grad():
        KFAC.compute(net, MSE, data)


def test_compute_works_under_no_grad():
    net, data = mlp(4, 2, 3), data_for(MSE, 5)
    expected = KFAC.compute(net, MSE, data)
    with torch.no_grad():
        found = KFAC.compute(net, MSE, data)
    same(found, expected)


def test_other_modules_between_layers_are_simply_part_of_the_graph():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(x + self.a(x).tanh()) * 2

    net, data = Residual(), data_for(MSE, 1)
    found = KFAC.compute(net, MSE, data)
    for name, block in truth(net, MSE, data, "type-II", "rvec").items():
        assert relative_error(found[name].to_dense("rvec"), block) < 1e-10


def test_a_linear_subclass_with_the_same_map_works_and_another_map_is_refused():
    class Named(nn.Linear):
        pass

    class SameMap(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    class OtherMap(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    data = data_for(MSE, 5)
    for kind in (Named, SameMap):
        net = nn.Sequential(kind(4, 3))
        block = truth(net, MSE, data, "type-II", "cvec")["0"]
        found = KFAC.compute(net, MSE, data, TypeII())["0"].to_dense("cvec")
        assert relative_error(found, block) < 1e-10
    net = nn.Sequential(OtherMap(4, 3), nn.Linear(3, 3))
    with left_alone(net), pytest.raises(NotImplementedError, match=r"'0' \(OtherMap\).*ignore"):
        KFAC.compute(net, MSE, data)
    assert list(KFAC.compute(net, MSE, data, ignore="0")) == ["1"]


def test_the_parts_refuse_by_themselves():
    net = mlp(4, 2, 3)
    with capture({"0": net[0]}) as calls:
        f = net(torch.randn(5, 4))
    check_calls(calls, f)
    with pytest.raises(ValueError, match=r"\(4, 5, 4\)|data"):
        check_calls(calls, f.unsqueeze(0))
    with pytest.raises(TypeError, match="tuple"):
        require_graph((f, f))


class Masked(nn.Linear):
    """The right output, as its weight is masked already, and the wrong derivative."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("mask", torch.arange(self.weight.numel()).reshape_as(self.weight) % 2)
        self.weight.data *= self.mask

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


class Renamed(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


def test_a_subclass_with_the_right_output_and_another_derivative_is_refused():
    net = nn.Sequential(Masked(4, 6), nn.Tanh(), nn.Linear(6, 3))
    with left_alone(net), pytest.raises(NotImplementedError, match=r"'0' .Masked.*x Wᵀ"):
        KFAC.compute(net, MSE, data_for(MSE, 5))


def test_a_subclass_that_computes_the_same_in_its_own_words_is_taken():
    net, plain = nn.Sequential(Renamed(4, 3)), nn.Sequential(nn.Linear(4, 3))
    plain.load_state_dict(net.state_dict())
    data = data_for(MSE, 5)
    same(*(KFAC.compute(model, MSE, data) for model in (net, plain)))


def test_a_forward_pass_replaced_on_the_instance_is_refused():
    net = mlp(4, 6, 3)
    layer = net[0]
    layer.forward = lambda x: nn.functional.linear(x, 2 * layer.weight, layer.bias)
    with pytest.raises(NotImplementedError, match=r"'0'.*x Wᵀ"):
        KFAC.compute(net, MSE, data_for(MSE, 5))


def test_a_hook_on_all_modules_that_changes_outputs_is_refused():
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, z: 2 * z if isinstance(module, nn.Linear) else None
    )
    try:
        with pytest.raises(NotImplementedError, match=r"'0'.*x Wᵀ"):
            KFAC.compute(mlp(4, 6, 3), MSE, data_for(MSE, 5))
    finally:
        handle.remove()
