"""Bad input: a clear error that says what to do, and nothing changed."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from truth import To, data_for, left_alone, mlp

from kfac_lib import KFAC, Exact, Expand, KFACPreconditioner, MonteCarlo, TypeII, exact_blocks
from kfac_lib.optim import predicted_decrease

pytestmark = pytest.mark.usefixtures("float64")
MSE, CE, BCE = nn.MSELoss(), nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()
X, Y = torch.ones(5, 4).double(), torch.ones(5, 3).double()


def refused(model, error, words, data=None, loss=MSE, **options):
    """Both entry points raise, and the model, with hooks and gradients of its own, is the same."""
    if isinstance(model, nn.Module):
        module = next(m for m in model.modules() if not list(m.children()))
        module.register_forward_hook(lambda layer, args, z: None)
        module.register_forward_pre_hook(lambda layer, args: None)
        for p in model.parameters():
            if p.is_floating_point():
                p.grad = torch.ones_like(p)
    data = data_for(loss, 5) if data is None else data
    exact = {key: value for key, value in options.items() if key not in ("bias", "sharing")}
    for compute in (
        lambda: KFAC.compute(model, loss, data, **options),
        lambda: exact_blocks(model, loss, data, order="cvec", **exact),
    ):
        before = left_alone(model) if isinstance(model, nn.Module) else nullcontext()
        with before, pytest.raises(error, match=words):
            compute()


class Net(nn.Module):
    """Two layers, run by a function given from outside."""

    def __init__(self, run, D=4):
        super().__init__()
        self.a, self.b, self.run = nn.Linear(4, D), nn.Linear(D, 3), run

    def forward(self, x):
        return self.run(self, x)


def test_an_unsupported_layer_with_parameters():
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    words = r'layer \'1\' \(LayerNorm\).*Supported: Linear.*ignore=\["1"\]'
    refused(model, NotImplementedError, words)


def test_a_parameter_of_the_model_itself():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.fc = nn.Parameter(torch.ones(3)), nn.Linear(4, 3)

        def forward(self, x):
            return self.scale * self.fc(x)

    refused(Scaled(), NotImplementedError, r'own parameter.*\'scale\'.*ignore=\["scale"\]')
    assert list(KFAC.compute(Scaled(), MSE, data_for(MSE, 5), ignore=["scale"])) == ["fc"]


@pytest.mark.parametrize(
    ("run", "error", "words"),
    [
        (lambda m, x: m.b(x), ValueError, r"'a' did not run.*ignore"),
        (lambda m, x: m.b(x) + 0 * m.a(x).detach()[:, :3], ValueError, r"not depend.*'a'.*ignore"),
        (
            lambda m, x: m.b(m.a(x) + x @ m.a.weight.T),
            NotImplementedError,
            r"weight of layer 'a' is used 2 times.*ignore",
        ),
        (lambda m, x: m.b(m.a(x)).detach(), ValueError, r"no graph.*detach"),
        (lambda m, x: m.b(m.a(x)).sum(1), ValueError, r"\(5,\).*axis 0.*unsqueeze"),
        (lambda m, x: (m.b(m.a(x)), x), TypeError, r"tuple.*one tensor"),
        (lambda m, x: m.b(m.a(x)) / 0, ValueError, r"NaN or inf"),
        (lambda m, x: m.b(m.a(x)).repeat(2, 1), ValueError, r"10 data.*5|5.*10 data"),
    ],
    ids=["not run", "detached", "outside", "no grad", "1d", "tuple", "inf", "length"],
)
def test_a_forward_pass_that_gives_no_factors(run, error, words):
    refused(Net(run), error, words)


def test_a_layer_or_a_prediction_without_grad():
    def layer_without_grad(m, x):
        with torch.no_grad():
            z = m.a(x)
        return m.b(z)

    def all_without_grad(m, x):
        with torch.no_grad():
            return m.b(m.a(x))

    refused(Net(layer_without_grad), ValueError, r"'a' ran without a graph.*grad")
    refused(Net(all_without_grad), ValueError, r"without a graph.*grad")


def test_inference_mode():
    model, data = mlp(4, 3), data_for(MSE, 5)
    with torch.inference_mode():
        refused(model, ValueError, r"inference_mode", data)


def test_an_input_that_is_overwritten_after_the_layer_read_it():
    def residual_in_place(m, x):
        h = x * 1.0
        h += m.a(h)
        return m.b(h)

    refused(Net(residual_in_place), ValueError, r"input of layer 'a' was overwritten.*x = x \+")


def test_shared_positions_merged_into_the_data():
    model = nn.Sequential(
        To(lambda x: x.flatten(0, 1)), nn.Linear(4, 3), To(lambda z: z.unflatten(0, (5, 2)))
    )
    data = torch.randn(5, 2, 4), torch.randn(5, 2, 3)
    refused(model, ValueError, r"\(10, 4\).*5 data.*\(N, S, D\)", data)


def test_tied_weights_whose_biases_differ():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    words = r'0\.weight, 1\.weight.*tied.*biases.*ignore=\["0.bias", "1.bias"\]'
    refused(model, NotImplementedError, words, (torch.randn(5, 3), torch.randn(5, 3)))


@pytest.mark.parametrize(
    "module", [nn.Dropout(0.5), nn.BatchNorm1d(3, affine=False).double(), nn.RReLU()]
)
def test_dropout_and_batch_norm_in_training_mode(module):
    model = nn.Sequential(nn.Linear(4, 3), module)
    refused(model, ValueError, r"Layer '1'.*model\.eval\(\)")
    assert model.training
    assert list(KFAC.compute(model.eval(), MSE, data_for(MSE, 5))) == ["0"]


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (nn.CrossEntropyLoss(weight=torch.ones(4)), ValueError, "4 class weights for 3"),
        (nn.CrossEntropyLoss(weight=-torch.ones(3)), ValueError, "weight holds negative"),
        (nn.MSELoss(reduction="none"), ValueError, "mean.*sum"),
        (nn.L1Loss(), NotImplementedError, "L1Loss.*Supported"),
        (nn.functional.mse_loss, TypeError, "not a loss object"),
    ],
    ids=["weights", "negative", "none", "L1", "function"],
)
def test_a_loss_or_option_that_is_not_supported(loss, error, words):
    refused(mlp(4, 2, 3), error, words, data_for(CE, 5), loss)


@pytest.mark.parametrize(
    ("loss", "y", "error", "words"),
    [
        (MSE, torch.zeros(5, 1), ValueError, r"\(5, 3\).*\(5, 1\).*broadcast"),
        (MSE, torch.zeros(5), ValueError, r"\(5, 3\).*\(5,\)"),
        (MSE, torch.zeros(5, 3).long(), TypeError, r"int64.*floating"),
        (MSE, torch.zeros(4, 3), ValueError, r"5 data.*4"),
        (CE, torch.zeros(5).long() + 3, ValueError, r"3\.\.3.*3 classes.*0\.\.2"),
        (CE, torch.zeros(5).long() - 1, ValueError, r"-1.*3 classes"),
        (CE, torch.zeros(5).long() - 100, ValueError, r"mean is over nothing|No datum counts"),
        (CE, torch.zeros(5), TypeError, r"float32.*long"),
        (CE, torch.zeros(5).bool(), TypeError, r"bool.*long"),
        (CE, torch.zeros(5, 1).long(), ValueError, r"\(5,\).*\(5, 1\).*axis 1"),
        (CE, torch.ones(5, 3) - 2, ValueError, r"negative.*not logits"),
        (BCE, torch.ones(5, 3) + 1, ValueError, r"outside 0\.\.1"),
    ],
    ids=range(12),
)
def test_targets_that_do_not_fit(loss, y, error, words):
    refused(mlp(4, 2, 3), error, words, (torch.randn(5, 4), y), loss)


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ([], ValueError, r"no batch.*pair \(X, y\)"),
        (iter([]), ValueError, r"no batch"),
        ((X[:0], Y[:0]), ValueError, r"Batch 1 is empty"),
        ([(X, Y), (X[:0], Y[:0])], ValueError, r"Batch 2 is empty"),
        (X, TypeError, r"Tensor.*pair \(X, y\)"),
        (None, TypeError, r"NoneType.*pair"),
        ({"X": 1}, TypeError, r"dict.*pair"),
        ([X], TypeError, r"Batch 1 is a Tensor.*pair"),
        ([(X, 3)], TypeError, r"Batch 1 is a tuple.*pair"),
        ((X, torch.tensor(3.0)), ValueError, r"no axis for the data.*unsqueeze\(0\)"),
        ((X.to_sparse(), Y), NotImplementedError, r"sparse.*X\.to_dense\(\)"),
    ],
    ids=range(11),
)  # fmt: skip
def test_data_that_are_empty_or_no_pairs(data, error, words):
    model = mlp(4, 2, 3)
    for compute in (KFAC.compute, lambda *args: exact_blocks(*args, order="cvec")):
        with left_alone(model), pytest.raises(error, match=words):
            compute(model, MSE, data)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_named_with_their_place(bad):
    model, (X, y) = mlp(4, 2, 3), data_for(MSE, 5)
    bad_X, bad_y = X.clone(), y.clone()
    bad_X[2, 1] = bad_y[0, 0] = bad
    refused(model, ValueError, r"inputs X of batch 2.*NaN or inf", [(X, y), (bad_X, y)])
    refused(model, ValueError, r"targets y of batch 1.*NaN or inf", (X, bad_y))
    with torch.no_grad():
        model[2].weight[0, 0] = bad
    refused(model, ValueError, r"prediction.*NaN or inf.*parameters", (X, y))


def test_factors_that_overflow():
    model, (X, y) = mlp(4, 3).float(), data_for(MSE, 5)
    words = r"layer '0' hold NaN or inf.*overflow in torch\.float32"
    refused(model, ValueError, words, ((1e25 * X).float(), y.float()))


def test_finite_factors_whose_trace_overflows_are_no_mistake():
    data = torch.full((1, 4), 1e19, dtype=torch.float32), torch.zeros(1, 3, dtype=torch.float32)
    A = KFAC.compute(mlp(4, 3).float(), nn.MSELoss(reduction="sum"), data)["0"].A
    assert A.isfinite().all()
    assert A.trace().isinf()


def test_a_generator_on_another_device():
    elsewhere = SimpleNamespace(device=torch.device("cuda:0"))
    words = r"cuda:0.*cpu.*torch\.Generator\(device='cpu'\)"
    refused(mlp(4, 3), ValueError, words, fisher=MonteCarlo(generator=elsewhere))


def test_different_numbers_of_positions():
    model = mlp(4, 3)
    data = [(torch.randn(2, S, 4), torch.randn(2, S, 3)) for S in (2, 3)]
    with left_alone(model), pytest.raises(ValueError, match=r"2 positions.*3.*pad"):
        KFAC.compute(model, MSE, data)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": "9"}, r"layers: '9' matches no.*0\.weight"),
        ({"ignore": ["conv*"]}, r"ignore: 'conv\*' matches no.*0\.weight"),
        ({"layers": ["0", "2"], "ignore": "2.*"}, r"both layers and ignore: 2\.bias, 2\.weight"),
        ({"ignore": "*"}, r"No trainable parameter is left"),
        ({"layers": ["0.bias"]}, r"0\.bias.*weight is frozen or left out.*ignore"),
        ({"ignore": ["2.weight"]}, r'2\.bias.*ignore=\["2.bias"\]'),
        ({"chunk_size": 0}, r"chunk_size=0.*positive integer"),
        ({"chunk_size": 1.5}, r"chunk_size=1.5.*positive integer"),
    ],
    ids=str,
)
def test_patterns_and_options_that_do_not_fit(options, words):
    refused(mlp(4, 2, 3), ValueError, words, **options)


def test_a_pattern_that_names_frozen_parameters_alone():
    model = mlp(4, 2, 3)
    model[0].requires_grad_(False)
    words = r"layers: '0' names frozen parameters alone \(0\.bias, 0\.weight\)"
    refused(model, ValueError, words, layers=["0", "2"])
    model[0].bias.requires_grad_(True)
    refused(model, ValueError, r"weight is frozen", layers=["0", "2"])


def test_a_name_with_brackets_is_itself():
    model = nn.Sequential()
    model.add_module("block[0]", nn.Linear(4, 3))
    model.add_module("block0", nn.Linear(3, 3))
    kfac = KFAC.compute(model, MSE, data_for(MSE, 5), layers="block[0]")
    assert list(kfac) == ["block[0]"]


def test_autocast_and_complex_numbers():
    model, data = mlp(4, 3), data_for(MSE, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refused(model, ValueError, r"autocast.*bfloat16\(\)", data)
    imaginary = nn.Sequential(nn.Linear(4, 3), To(lambda z: z * 1j))
    refused(imaginary, TypeError, r"complex128.*view_as_real", data)


def test_instance_norm_with_running_statistics():
    norm = nn.InstanceNorm1d(2, track_running_stats=True).double()
    model = nn.Sequential(nn.Linear(4, 3), norm)
    data = torch.randn(5, 2, 4), torch.randn(5, 2, 3)
    refused(model, ValueError, r"Layer '1'.*running statistics.*model\.eval\(\)", data)
    assert list(KFAC.compute(model.eval(), MSE, data)) == ["0"]


def test_minus_infinity_in_a_mask_is_no_mistake():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc((x["x"] + x["mask"]).softmax(1))

    X, y = data_for(MSE, 5)
    mask = torch.zeros(5, 4)
    mask[:, 0] = -torch.inf
    kfac = KFAC.compute(Masked(), MSE, ({"x": X, "mask": mask}, y))
    assert kfac["fc"].A.isfinite().all()


def test_an_unknown_bias_option():
    model = mlp(4, 3)
    with left_alone(model), pytest.raises(ValueError, match=r"'no'.*joint.*separate"):
        KFAC.compute(model, MSE, data_for(MSE, 5), bias="no")


def test_a_frozen_net_and_a_model_that_is_no_module():
    refused(mlp(4, 2, 3).requires_grad_(False), ValueError, r"No trainable.*frozen: 0\.weight")
    refused(lambda x: x, TypeError, r"function.*torch\.nn\.Module")


def test_a_frozen_layer_is_left_out_and_named():
    model = mlp(4, 2, 3)
    model[0].requires_grad_(False)
    with left_alone(model):
        kfac = KFAC.compute(model, MSE, data_for(MSE, 5))
    assert list(kfac) == ["2"]
    assert "frozen: 0.weight, 0.bias" in repr(kfac)


def test_an_error_inside_the_models_own_forward_leaves_no_hook():
    def fails(m, x):
        m.a(x)
        raise KeyError("from the model")

    refused(Net(fails), KeyError, "from the model")


# The preconditioner

NONSENSE = [
    ("damping", 1e-3, TypeError, r"damping=0\.001.*Exact\(1e-3\)"),
    ("damping", Exact, TypeError, r"damping=<class.*an object such as"),
    ("factor_every", 0, ValueError, r"factor_every=0.*positive integer"),
    ("inverse_every", 1.5, ValueError, r"inverse_every=1\.5.*positive integer"),
    ("inverse_every", True, ValueError, r"inverse_every=True"),
    ("ema", 1.0, ValueError, r"ema=1\.0.*from 0 up to, but not, 1"),
    ("ema", -0.1, ValueError, r"ema=-0\.1"),
    ("ema", float("nan"), ValueError, r"ema=nan"),
    ("kl_clip", 0.0, ValueError, r"kl_clip=0\.0.*positive"),
    ("lr", -1.0, ValueError, r"lr=-1\.0.*not negative"),
    ("lr", float("inf"), ValueError, r"lr=inf"),
]


@pytest.mark.parametrize(("option", "value", "error", "words"), NONSENSE, ids=range(11))
def test_options_of_the_preconditioner_that_are_nonsense(option, value, error, words):
    model, data = mlp(4, 2, 3), data_for(MSE, 5)
    with pytest.raises(error, match=words):
        KFACPreconditioner(model, MSE, **{"lr": 0.1, "kl_clip": 1.0, option: value})
    options = {"lr": 0.1, "kl_clip": 1.0, option: lambda t: value if t else OPTIONS[option]}
    pre = KFACPreconditioner(model, MSE, **options)
    MSE(model(data[0]), data[1]).backward()

    def next_step():
        pre.update(*data)
        pre.precondition()

    next_step()
    with left_alone(model), pytest.raises(error, match=words.split(".*")[0] + r".* at step 1"):
        next_step()


OPTIONS = {
    "damping": Exact(0.1),
    "factor_every": 1,
    "inverse_every": 1,
    "ema": 0.5,
    "kl_clip": 1.0,
    "lr": 0.1,
}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"kl_clip": 1e-3}, ValueError, r"kl_clip=0\.001 needs the learning rate.*lr="),
        ({"fisher": TypeII}, TypeError, r"fisher=.*TypeII\(\)"),
        ({"sharing": Expand}, TypeError, r"sharing=.*Expand\(\)"),
        ({"ignore": "9"}, ValueError, r"ignore: '9' matches no"),
        ({"loss_func": nn.L1Loss()}, NotImplementedError, r"L1Loss.*Supported"),
        ({"model": nn.LayerNorm(3)}, NotImplementedError, r"LayerNorm.*Supported: Linear"),
        ({"model": mlp(4, 3).requires_grad_(False)}, ValueError, r"No trainable"),
    ],
    ids=range(7),
)
def test_a_preconditioner_that_cannot_be_made(options, error, words):
    with pytest.raises(error, match=words):
        KFACPreconditioner(**{"model": mlp(4, 2, 3), "loss_func": MSE, **options})


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ((X, 3), TypeError, r"pair \(X, y\)"),
        ((X[:0], Y[:0]), ValueError, r"is empty"),
        ((X, Y[:4]), ValueError, r"5 data.*4"),
        ((X, Y[:, :1]), ValueError, r"broadcast"),
        ((X * float("inf"), Y), ValueError, r"inputs X.*NaN or inf"),
    ],
    ids=range(5),
)
def test_an_update_with_bad_data(data, error, words):
    model = mlp(4, 2, 3)
    pre = KFACPreconditioner(model, MSE)
    with left_alone(model), pytest.raises(error, match=words):
        pre.update(*data)
    assert pre.steps == 0


@pytest.mark.parametrize("module", [nn.Dropout(0.5), nn.BatchNorm1d(3, affine=False).double()])
def test_an_update_with_active_dropout_or_batch_norm(module):
    model, data = nn.Sequential(nn.Linear(4, 3), module), data_for(MSE, 5)
    pre = KFACPreconditioner(model, MSE)
    with left_alone(model), pytest.raises(ValueError, match=r"Layer '1'.*model\.eval\(\)"):
        pre.update(*data)
    with left_alone(model), pytest.raises(ValueError, match=r"Layer '1'.*model\.eval\(\)"):
        predicted_decrease(model, MSE, data, {"0.bias": torch.ones(3)})
    model.eval()
    pre.update(*data)


def test_preconditioning_too_early_or_without_gradients():
    model, data = mlp(4, 2, 3), data_for(MSE, 5)
    pre = KFACPreconditioner(model, MSE)
    MSE(model(data[0]), data[1]).backward()
    with left_alone(model), pytest.raises(ValueError, match=r"no factors yet.*update\(X, y\)"):
        pre.precondition()
    pre.update(*data)
    model[2].bias.grad = None
    with left_alone(model), pytest.raises(ValueError, match=r"Layer '2'.*alone.*requires_grad_"):
        pre.precondition()
    model.zero_grad()
    with left_alone(model), pytest.raises(ValueError, match=r"No covered layer.*backward\(\)"):
        pre.precondition()


def test_a_model_that_changed_under_the_preconditioner():
    model, data = mlp(4, 2, 3), data_for(MSE, 5)
    pre = KFACPreconditioner(model, MSE)
    model[0].bias.requires_grad_(False)
    with left_alone(model), pytest.raises(ValueError, match=r"have changed.*Make a new one"):
        pre.update(*data)
    model[0].bias.requires_grad_(True)
    model[2] = nn.Linear(2, 3)
    with left_alone(model), pytest.raises(ValueError, match=r"have changed.*Make a new one"):
        pre.update(*data)


@pytest.mark.parametrize(
    ("step", "delta", "words"),
    [
        ({"fc": torch.ones(3, 4)}, 0.0, r"no trainable parameter 'fc'.*0\.weight"),
        ({"0.bias": torch.ones(4)}, 0.0, r"'0\.bias' has shape \(4,\), the parameter \(3,\)"),
        ({"0.bias": torch.ones(3)}, -1.0, r"delta=-1\.0.*zero or more"),
        ({"0.weight": torch.ones(3, 4)}, 0.0, r"no trainable parameter '0\.weight'"),
    ],
    ids=range(4),
)
def test_a_step_that_does_not_fit_the_model(step, delta, words):
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].weight.requires_grad_("0.weight" not in step)
    with left_alone(model), pytest.raises(ValueError, match=words):
        predicted_decrease(model, MSE, data_for(MSE, 5), step, delta)


def test_positions_that_are_looked_up_once_for_all_data():
    class Positions(nn.Module):
        def __init__(self, own):
            super().__init__()
            self.tokens, self.places = nn.Embedding(7, 3), nn.Embedding(5, 3)
            self.fc, self.own = nn.Linear(3, 2), own

        def forward(self, x):
            places = torch.arange(5)
            z = self.tokens(x) + self.places(places.expand(len(x), -1) if self.own else places)
            return self.fc(z).mean(1)

    data = torch.randint(7, (5, 5)), torch.randn(5, 2)  # as many data as positions
    refused(Positions(False), ValueError, r"'places'.*positions, not data.*expand\(N", data)
    assert len(KFAC.compute(Positions(True), MSE, data)) == 3


def test_one_index_a_datum_is_taken():
    net = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 2))
    assert len(KFAC.compute(net, MSE, (torch.randint(7, (5,)), torch.randn(5, 2)))) == 2
