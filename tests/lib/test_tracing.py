"""Traced functions against hooks where both work, and against autograd where hooks cannot go."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from truth import left_alone, relative_error

from kfac_lib import EKFAC, KFAC, TypeII, tracing
from kfac_lib.accumulate import ExactBlocks
from kfac_lib.capture import Hooks
from kfac_lib.graph_uses import find_uses
from kfac_lib.losses import criterion_of
from kfac_lib.stream import stream
from kfac_lib.tracing import Traced

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature"),
]
MSE, CE = nn.MSELoss(), nn.CrossEntropyLoss()


class To(nn.Module):
    """A function as a module."""

    def __init__(self, f, **modules):
        super().__init__()
        self.f = f
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, X):
        return self.f(self, X)


def named(model):
    return dict(model.named_parameters())


def blocks(source, loss, data):
    """The exact block of each key, by the rows of a source."""
    data = [data] if isinstance(data, tuple) else data
    source.run(data[0][0])
    sums = {}
    for name, rows in stream(source, criterion_of(loss), TypeII(), data):
        sums.setdefault(name, ExactBlocks("rvec")).update(rows)
    return {name: block.finish(criterion_of(loss)) for name, block in sums.items()}


def ggn_of(f, params, X, y, loss, names):
    """R Σ_n J_nᵀ H_n J_n of the parameters with these names, flattened one after the other."""
    params = {name: p.detach() for name, p in params.items()}
    chosen = {name: params[name] for name in names}

    def predict(some):
        return f({**params, **some}, X)

    out = predict(chosen)
    J = torch.autograd.functional.jacobian(
        lambda *tensors: predict(dict(zip(names, tensors, strict=True))), tuple(chosen.values())
    )
    J = torch.cat([block.reshape(out.numel(), -1) for block in J], dim=1)
    H = torch.func.hessian(lambda out: loss(out.reshape(*y.shape[:1], -1), y))(out)
    H = H.reshape(out.numel(), out.numel())
    return J.T @ H @ J


def joint(matrix, rows, columns):
    """Reorder rows and columns from (rvec W, b) to rvec [W b]."""
    D = rows * columns
    index = torch.cat(
        [torch.cat([torch.arange(r * columns, (r + 1) * columns), torch.tensor([D + r])])
         for r in range(rows)]
    )  # fmt: skip
    return matrix[index][:, index]


def check_against_ggn(model, X, y, loss, source=None, pairs=None, f=None):
    """Blocks of a source against autograd; pairs: key -> (weight name, bias name or None)."""
    f = f or (lambda params, X: functional_call(model, params, (X,)))
    params = named(model) if isinstance(model, nn.Module) else model
    source = source or Traced(model, params)
    found = blocks(source, loss, (X, y))
    assert set(found) == set(pairs)
    for key, (weight, bias) in pairs.items():
        names = [n for n in (weight, bias) if n]
        wanted = ggn_of(f, params, X, y, loss, names)
        shape = params[weight].flatten(1).shape
        wanted = joint(wanted, *shape) if bias else wanted
        assert relative_error(found[key], wanted) < 1e-10, key
    return found


# ---------------------------------------------------------------------- against hooks


def tokens(*shape, high=7):
    return torch.randint(high, shape)


def own_attention(self, X):
    q, k, v = self.q(X), self.k(X), self.v(X)
    A = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return self.out(A @ v).mean(1)


def residual(self, X):
    x = self.a(X)
    x = x + self.b(x).tanh()
    x = 1 * x
    x += 0.5 * self.b2(x * 2)
    return self.c(x)


def merged_rows(self, X):
    N, S, D = X.shape
    z = self.a(X.view(N * S, D)).tanh()
    z = z.view(N, S, -1) + z.view(N, S, -1).mean(1, keepdim=True) ** 2
    return self.b(z.flatten(1).unflatten(1, (S, -1))).mean(1)


def tied_linears():
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    b.weight = a.weight
    return nn.Sequential(a, nn.Tanh(), b, nn.Linear(4, 2))


ARCHITECTURES = {
    "MLP": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.ReLU(),
                                  nn.Linear(3, 2)), (4,)),
    "root": (lambda: nn.Linear(4, 2), (4,)),
    "in place": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)),
                 (4,)),
    "shared axis, in place": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.ELU(inplace=True), nn.Flatten(),
                              nn.Linear(15, 2)),
        (3, 4)),
    "CNN": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ReLU(),
            nn.Conv2d(4, 4, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(0, 2)), nn.Tanh(),
            nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(2)), (2, 7, 6)),
    "padding modes": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular", bias=False), nn.Tanh(),
            nn.Conv2d(3, 3, 3, padding=(1, 2), padding_mode="reflect"), nn.Tanh(),
            nn.Conv2d(3, 2, (2, 4), padding="same"), nn.Flatten(2), To(lambda self, z: z.mean(2))),
        (2, 5, 6)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3, stride=2), nn.Tanh(), nn.Conv1d(4, 2, 2),
                                     To(lambda self, z: z.mean(2))), (2, 9)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(1, 2, 2, groups=1), nn.Tanh(),
                                     nn.Conv3d(2, 2, 2, padding="same"),
                                     To(lambda self, z: z.flatten(2).mean(2))), (1, 3, 4, 3)),
    "own attention": (
        lambda: To(own_attention, q=nn.Linear(4, 3), k=nn.Linear(4, 3), v=nn.Linear(4, 3),
                   out=nn.Linear(3, 2)), (3, 4)),
    "residual": (lambda: To(residual, a=nn.Linear(4, 3), b=nn.Linear(3, 3), b2=nn.Linear(3, 3),
                            c=nn.Linear(3, 2)), (4,)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(7, 4, padding_idx=2), nn.Linear(4, 3),
                                        nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)), "tokens"),
    "reused": (lambda: (lambda m: nn.Sequential(m, nn.Tanh(), m, nn.Linear(4, 2)))(nn.Linear(4, 4)),
               (4,)),
    "tied": (tied_linears, (4,)),
    "layer norm without parameters": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3, elementwise_affine=False),
                              nn.Linear(3, 2)), (4,)),
    "batch norm in evaluation": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False),
                              nn.Linear(3, 2)).eval(), (4,)),
}  # fmt: skip


def example(name, N=5):
    make, shape = ARCHITECTURES[name]
    model = make()
    X = tokens(N, 4) if shape == "tokens" else torch.randn(N, *shape)
    model(X)  # lazy layers
    return model, X


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("plain", [False, True], ids=["module", "function"])
def test_tracing_and_hooks_give_the_same_blocks(architecture, plain):
    model, X = example(architecture)
    y = torch.randint(2, (5,))
    expected = blocks(Hooks(model), CE, (X, y))
    params = named(model)
    if plain:
        params = {name: p.detach().clone() for name, p in params.items()}
        source = Traced(lambda params, X: functional_call(model, params, (X,)), params)
        found = blocks(source, CE, (X, y))
    else:
        with left_alone(model):
            found = blocks(Traced(model, params), CE, (X, y))
    keys = {(f"{k}.weight" if k else "weight") if plain else k: k for k in expected}
    assert list(found) == list(keys)
    for key, of_hooks in keys.items():
        assert relative_error(found[key], expected[of_hooks]) < 1e-12


# ---------------------------------------------------------------------- functions


def test_merged_rows_are_taken_apart():
    model = To(merged_rows, a=nn.Linear(4, 3), b=nn.Linear(3, 2))
    X, y = torch.randn(5, 3, 4), torch.randint(2, (5,))
    check_against_ggn(
        model, X, y, CE, pairs={"a": ("a.weight", "a.bias"), "b": ("b.weight", "b.bias")}
    )


MATRIX_FORMS = {
    "x @ W.T": ((3, 4), lambda X, W: X @ W.T),
    "x @ W": ((4, 3), lambda X, W: X @ W),
    "linear": ((3, 4), nn.functional.linear),
    "linear, transposed": ((4, 3), lambda X, W: nn.functional.linear(X, W.t())),
    "mT twice": ((3, 4), lambda X, W: X @ W.mT.mT.transpose(0, 1)),
    "permute, contiguous": ((3, 4), lambda X, W: X @ W.permute(1, 0).contiguous().clone()),
    "einsum": ((3, 4), lambda X, W: torch.einsum("nsi,oi->nso", X, W)),
    "einsum, ellipsis": ((4, 3), lambda X, W: torch.einsum("...i,io->...o", X, W)),
    "einsum, W first": ((3, 4), lambda X, W: torch.einsum("oi,nsi->nso", W, X)),
    "einsum, other order": (
        (3, 4), lambda X, W: torch.einsum("nsi,oi->osn", X, W).permute(2, 1, 0)),
    "W @ x": ((3, 4), lambda X, W: (W @ X.mT).mT),
    "mm of rows": ((3, 4), lambda X, W: torch.mm(X.flatten(0, 1), W.T).view(*X.shape[:2], -1)),
    "mm on the left": ((3, 4), lambda X, W: torch.mm(W, X.flatten(0, 1).T).T.view(-1, 2, 3)),
    "sequence first": ((3, 4), lambda X, W: (X.transpose(0, 1) @ W.T).transpose(0, 1)),
    "sequence first, merged": (
        (3, 4),
        lambda X, W: (X.transpose(0, 1).flatten(0, 1).sin() @ W.T).view(2, -1, 3).transpose(0, 1)),
    "merged axis transposed": (
        (3, 4),
        lambda X, W: (W @ X.transpose(0, 1).reshape(-1, 4).T).view(3, 2, -1).permute(2, 1, 0)),
    "same dtype": ((3, 4), lambda X, W: X @ W.to(X.dtype).T),
}  # fmt: skip


@pytest.mark.parametrize("form", MATRIX_FORMS)
@pytest.mark.parametrize("change", [torch.tanh, torch.Tensor.sigmoid_], ids=["tanh", "in place"])
def test_every_way_to_write_a_linear_map(form, change):
    shape, product = MATRIX_FORMS[form]
    params = {"W": torch.randn(shape), "V": torch.randn(3, 2)}

    def f(params, X):
        z = change(product(X, params["W"]))
        return (z + z.roll(1, 1) ** 2).mean(1) @ params["V"]

    X, y = torch.randn(5, 2, 4), torch.randint(2, (5,))
    found = blocks(Traced(f, params), CE, (X, y))
    wanted = ggn_of(f, params, X, y, CE, ["W"])
    if shape == (4, 3):  # stored as (D_in, D_out)
        swap = torch.arange(12).view(4, 3).T.flatten()
        wanted = wanted[swap][:, swap]
    assert relative_error(found["W"], wanted) < 1e-12


BIASES = {
    "sum": lambda X, W, b: X @ W.T + b,
    "other order": lambda X, W, b: b + X @ W.T,
    "in place": lambda X, W, b: (X @ W.T).add_(b),
    "addmm": lambda X, W, b: torch.addmm(b, X, W.T),
    "linear": nn.functional.linear,
    "einsum": lambda X, W, b: torch.einsum("ni,oi->no", X, W) + b,
    "two batch axes": lambda X, W, b: (X.unsqueeze(1) @ W.T + b.unsqueeze(0)).squeeze(1),
}


@pytest.mark.parametrize("form", BIASES)
def test_a_bias_is_joint_with_the_operation_that_adds_it(form):
    params = {"W": torch.randn(3, 4), "b": torch.randn(3)}
    X, y = torch.randn(5, 4), torch.randint(3, (5,))

    def f(params, X):
        return BIASES[form](X, params["W"], params["b"]).sin()

    check_against_ggn(params, X, y, CE, Traced(f, params), {"W": ("W", "b")}, f)
    assert Traced(f, params, ignore="b").run(X)[1].keys() == {"W"}
    check_against_ggn(params, X, y, CE, Traced(f, params, ignore="b"), {"W": ("W", None)}, f)


def test_a_weight_in_two_places_is_one_layer():
    params = {"W": torch.randn(4, 4), "b": torch.randn(4), "V": torch.randn(2, 4)}

    def f(params, X):
        x = (X @ params["W"].T + params["b"]).tanh()
        x = nn.functional.linear(x, params["W"], params["b"]).tanh()
        return x @ params["V"].T

    X, y = torch.randn(5, 4), torch.randint(2, (5,))
    source = Traced(f, params)
    check_against_ggn(params, X, y, CE, source, {"W": ("W", "b"), "V": ("V", None)}, f)
    assert len(source.run(X)[1]["W"]) == 2


def scale_a_part(z):
    z[..., :2] *= 0.5
    return z


def overwrite_after_use(z):
    y = z + 1
    z.relu_()
    return y * z


def forget(z):
    z.clamp_(min=0)  # its result is not used, but the change is
    return 1 * z


IN_PLACE = {
    "relu": lambda z: z.relu_(),
    "part": scale_a_part,
    "after use": overwrite_after_use,
    "statement": forget,
    "view": lambda z: (z.view(-1).sigmoid_(), z)[1],
}


@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("shared", [(), (3,)])
@pytest.mark.parametrize("bias", [True, False])
def test_changes_in_place_after_an_operation_leave_its_block_exact(change, shared, bias):
    params = {"W": torch.randn(4, 4), "V": torch.randn(2, 4)}
    params |= {"b": torch.randn(4)} if bias else {}

    def f(params, X):
        z = X @ params["W"].T
        z = IN_PLACE[change](z + params["b"] if bias else z)
        return z.flatten(1, -2).sum(1) @ params["V"].T if shared else z @ params["V"].T

    X, y = torch.randn(5, *shared, 4), torch.randn(5, 2)
    pairs = {"W": ("W", "b" if bias else None), "V": ("V", None)}
    check_against_ggn(params, X, y, MSE, Traced(f, params), pairs, f)


def test_a_recurrent_net_written_by_hand_is_one_layer_in_many_places():
    params = {"W": torch.randn(3, 4), "U": torch.randn(3, 3), "b": torch.randn(3)}

    def f(params, X):
        h = X.new_zeros(X.shape[0], 3)
        for x in X.unbind(1):
            h = torch.tanh(x @ params["W"].T + nn.functional.linear(h, params["U"], params["b"]))
        return h

    X, y = torch.randn(5, 3, 4), torch.randint(3, (5,))
    pairs = {"W": ("W", None), "U": ("U", "b")}
    check_against_ggn(params, X, y, CE, Traced(f, params), pairs, f)


def test_transforms_that_leave_nothing_in_the_graph_are_refused():
    def f(params, X):
        return torch.vmap(lambda x: torch.tanh(params["W"] @ x))(X)

    with pytest.raises(NotImplementedError, match=r"cannot be traced.*with W.*vmap.*for a batch"):
        Traced(f, {"W": torch.randn(3, 4)}).run(torch.randn(5, 4))


def test_a_checkpointed_layer_is_recorded():
    a, b = nn.Linear(4, 3), nn.Linear(3, 2)
    model = To(
        lambda self, X: self.b(checkpoint(lambda x: self.a(x).tanh(), X, use_reentrant=False)),
        a=a, b=b,
    )  # fmt: skip
    X, y = torch.randn(5, 4), torch.randint(2, (5,))
    pairs = {"a": ("a.weight", "a.bias"), "b": ("b.weight", "b.bias")}
    check_against_ggn(model, X, y, CE, pairs=pairs)


# ---------------------------------------------------------------------- attention

ATTENTION = {
    "attn.in_proj_weight": ("attn.in_proj_weight", "attn.in_proj_bias"),
    "attn.out_proj": ("attn.out_proj.weight", "attn.out_proj.bias"),
    "head": ("head.weight", "head.bias"),
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("kind", ["self", "cross", "cross, three"])
def test_multihead_attention_has_the_block_of_autograd(batch_first, weights, kind):
    def forward(self, X):
        X, memory = (X, X) if kind == "self" else X
        X, memory = (t if batch_first else t.transpose(0, 1) for t in (X, memory))
        value = memory.sin() if kind == "cross, three" else memory
        z, _ = self.attn(X, memory, value, need_weights=weights)
        return self.head(z.mean(1 if batch_first else 0))

    attn = nn.MultiheadAttention(4, 2, batch_first=batch_first)
    nn.init.normal_(attn.in_proj_bias)
    model = To(forward, attn=attn, head=nn.Linear(4, 2))
    X = torch.randn(5, 3, 4)
    X, y = X if kind == "self" else (X, torch.randn(5, 2, 4)), torch.randint(2, (5,))
    check_against_ggn(model, X, y, CE, pairs=ATTENTION)


def test_attention_with_a_padding_mask_that_comes_with_the_data():
    def forward(self, X):
        x, mask = X["x"], X["mask"]
        z, _ = self.attn(x, x, x, key_padding_mask=mask, need_weights=False)
        return self.head(z[:, 0])

    model = To(forward, attn=nn.MultiheadAttention(4, 2, batch_first=True), head=nn.Linear(4, 2))
    mask = torch.arange(3) >= torch.tensor([3, 1, 2, 3, 2]).unsqueeze(1)
    X, y = {"x": torch.randn(5, 3, 4), "mask": mask}, torch.randint(2, (5,))
    check_against_ggn(model, X, y, CE, pairs=ATTENTION)


def test_projections_of_other_sizes_share_a_bias_that_has_to_be_ignored():
    def forward(self, X):
        return self.attn(X[0], X[1], X[1], need_weights=False)[0].mean(1)

    model = To(forward, attn=nn.MultiheadAttention(4, 2, kdim=3, vdim=3, batch_first=True))
    X, y = (torch.randn(5, 3, 4), torch.randn(5, 2, 3)), torch.randn(5, 4)
    with pytest.raises(NotImplementedError, match=r"in_proj_bias.*ignore=\[.attn.in_proj_bias.\]"):
        Traced(model, named(model)).run(X)
    source = Traced(model, named(model), ignore="attn.in_proj_bias")
    pairs = {f"attn.{k}_proj_weight": (f"attn.{k}_proj_weight", None) for k in "qkv"}
    pairs["attn.out_proj"] = ("attn.out_proj.weight", "attn.out_proj.bias")
    check_against_ggn(model, X, y, MSE, source, pairs)


@pytest.mark.parametrize("layers", [1, 2])
def test_transformer_encoders_have_the_blocks_of_autograd(layers):
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    model = (
        nn.TransformerEncoder(layer, layers, enable_nested_tensor=False) if layers > 1 else layer
    )
    model = nn.Sequential(model, To(lambda self, z: z.mean(1)), nn.Linear(4, 2)).eval()
    X, y = torch.randn(5, 3, 4), torch.randint(2, (5,))
    source = Traced(model, named(model), ignore=["*norm*"])
    stems = ["0"] if layers == 1 else [f"0.layers.{i}" for i in range(layers)]
    pairs = {"2": ("2.weight", "2.bias")}
    for stem in stems:
        attention = f"{stem}.self_attn"
        pairs[f"{attention}.in_proj_weight"] = tuple(
            f"{attention}.in_proj_{kind}" for kind in ("weight", "bias")
        )
        for leaf in ("self_attn.out_proj", "linear1", "linear2"):
            pairs[f"{stem}.{leaf}"] = (f"{stem}.{leaf}.weight", f"{stem}.{leaf}.bias")
    check_against_ggn(model, X, y, CE, source, pairs)


# ---------------------------------------------------------------------- traces


def test_another_batch_size_needs_no_trace_and_another_shape_does():
    model, _ = example("own attention")
    source, loss = Traced(model, named(model)), nn.CrossEntropyLoss()
    sizes = [(5, 3), (2, 3), (1, 3), (61, 3), (5, 4), (3, 4)]
    batches = [(torch.randn(N, S, 4), torch.randint(2, (N,))) for N, S in sizes]
    for batch, traces in zip(batches, [1, 1, 1, 1, 2, 2], strict=True):
        expected, found = (blocks(s, loss, batch) for s in (Hooks(model), source))
        for key, block in expected.items():
            assert relative_error(found[key], block) < 1e-12
        assert source.traces == traces


@pytest.mark.parametrize("first", [1, 4])
def test_a_batch_size_that_the_code_treats_as_special_gives_a_trace_of_its_own(first):
    params = {"W": torch.randn(2, 4)}

    def f(params, X):
        return (X if X.shape[0] > 2 else 2 * X) @ params["W"].T

    source = Traced(f, params)
    for N in (first, 3, 2, 1, 7):
        X, y = torch.randn(N, 4), torch.randint(2, (N,))
        check_against_ggn(params, X, y, CE, source, {"W": ("W", None)}, f)
    assert source.traces <= 3


def test_code_that_insists_on_its_batch_size_is_traced_for_it():
    params = {"W": torch.randn(2, 4)}

    def f(params, X):
        assert X.shape[0] == 5
        return (X.reshape(5, 3, 4).transpose(0, 1).reshape(15, 4) @ params["W"].T).view(3, 5, 2)[0]

    X, y = torch.randn(5, 12), torch.randint(2, (5,))
    check_against_ggn(params, X, y, CE, Traced(f, params), {"W": ("W", None)}, f)


def test_x_may_be_nested_and_hold_constants_and_masks():
    params = {"W": torch.randn(2, 4)}

    def f(params, X):
        x, mask, scale = X["x"], X["more"][0], X["more"][1]
        return (x * mask @ params["W"].T * scale).mean(1)

    X = {"x": torch.randn(5, 3, 4), "more": [torch.randint(2, (3, 1)), 0.5, None]}
    y = torch.randint(2, (5,))
    source = Traced(f, params)
    check_against_ggn(params, X, y, CE, source, {"W": ("W", None)}, f)
    X["more"][1] = 2.0
    check_against_ggn(params, X, y, CE, source, {"W": ("W", None)}, f)
    assert source.traces == 2


def test_strides_of_the_data_do_not_matter():
    model, X = example("CNN")
    source = Traced(model, named(model))
    for given in (X, X.to(memory_format=torch.channels_last), X.mT.contiguous().mT):
        assert relative_error(source.run(given)[0], model(X)) < 1e-12
    assert source.traces == 1


def test_the_parameters_are_those_that_the_caller_holds_and_stay_as_they_are():
    W = torch.randn(2, 4)
    source = Traced(lambda params, X: X @ params["W"].T, {"W": W})
    X = torch.randn(5, 4)
    assert torch.equal(source.run(X)[0], X @ W.T)
    W.mul_(2)
    assert torch.equal(source.run(X)[0], X @ W.T)
    assert not W.requires_grad
    assert W.grad is None


# ---------------------------------------------------------------------- layouts


def test_siamese_branches_stacked_on_the_data_axis():
    params = {"W": torch.randn(3, 4), "V": torch.randn(2, 6)}

    def f(params, X):
        z = torch.cat([X, X.flip(1)]) @ params["W"].T
        return torch.cat(z.tanh().chunk(2), 1) @ params["V"].T

    X, y = torch.randn(5, 4), torch.randint(2, (5,))
    check_against_ggn(params, X, y, CE, Traced(f, params), {"W": ("W", None), "V": ("V", None)}, f)


def test_frames_merged_into_the_batch_of_a_convolution():
    params = {"W": torch.randn(2, 1, 2, 2), "b": torch.randn(2)}

    def frames(first):
        def f(params, X):
            x = X.flatten(0, 1) if first else X.transpose(0, 1).flatten(0, 1)
            z = nn.functional.conv2d(x, params["W"], params["b"]).flatten(2).sin().sum(2)
            z = z.view(5, 3, 2) if first else z.view(3, -1, 2).transpose(0, 1)
            return (z + z.roll(1, 1) ** 2).mean(1)

        return f

    X, y = torch.randn(5, 3, 1, 3, 3), torch.randint(2, (5,))
    for first in (True, False):
        f = frames(first)
        check_against_ggn(params, X, y, CE, Traced(f, params), {"W": ("W", "b")}, f)


def test_a_twin_whose_gradient_is_stopped_does_not_count():
    params = {"W": torch.randn(2, 4)}

    def f(params, X):
        x, target = X @ params["W"].T, (X.sin() @ params["W"].T).detach()
        with torch.no_grad():
            more = X.cos() @ params["W"].T
        return x.tanh() * target + more + X[:, :2] @ params["W"].detach()[:, :2]

    X, y = torch.randn(5, 4), torch.randint(2, (5,))
    source = Traced(f, params)
    check_against_ggn(params, X, y, CE, source, {"W": ("W", None)}, f)
    assert [call.x.allclose(X) for call in source.run(X)[1]["W"]] == [True]


# ---------------------------------------------------------------------- what is covered


def test_frozen_and_ignored_parameters_are_named():
    model, X = example("MLP")
    model[0].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    source = Traced(model, named(model), ignore="4.bias")
    source.run(X)
    coverage = source.coverage
    assert list(coverage.layers) == ["2", "4"]
    assert coverage.biases == frozenset()
    assert coverage.frozen == ("0.weight", "0.bias", "2.bias")
    assert coverage.ignored == ("4.bias",)
    source = Traced(model, named(model), layers=["4"])
    source.run(X)
    assert list(source.coverage.layers) == ["4"]
    assert source.coverage.biases == {"4"}
    assert source.coverage.parameters == {"4": ("4.weight", "4.bias")}


def test_plain_tensors_are_taken_and_integers_are_constants():
    params = {"W": torch.randn(2, 4), "index": torch.tensor([3, 2, 1, 0])}
    source = Traced(lambda params, X: X[:, params["index"]] @ params["W"].T, params)
    assert list(source.run(torch.randn(5, 4))[1]) == ["W"]
    assert source.coverage.frozen == source.coverage.ignored == ()


def test_some_of_a_modules_parameters_and_none_of_its_buffers():
    model, X = example("batch norm in evaluation")
    state = model.state_dict()
    source = Traced(
        model, {"0.weight": torch.randn(3, 4), **{k: state[k] for k in state if "1." in k}}
    )
    with left_alone(model):
        assert list(source.run(X)[1]) == ["0"]
    assert source.coverage.biases == frozenset()


def test_kfac_and_ekfac_of_a_function_have_the_names_of_its_parameters():
    params = {"W": torch.randn(4, 3), "b": torch.randn(3), "V": torch.randn(2, 3)}
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2, bias=False))
    state = {"0.weight": params["W"].T, "0.bias": params["b"], "2.weight": params["V"]}
    net.load_state_dict(state)

    def f(params, X):
        return (X @ params["W"] + params["b"]).tanh() @ params["V"].T

    data = torch.randn(5, 4), torch.randint(2, (5,))
    for bias, names in (("joint", ["W", "V"]), ("separate", ["W", "b", "V"])):
        for kind in (KFAC, EKFAC):
            found = kind.compute(f, CE, data, bias=bias, params=params)
            expected = kind.compute(net, CE, data, bias=bias)
            assert list(found) == names
            assert relative_error(found.to_dense("cvec"), expected.to_dense("cvec")) < 1e-12
        found = KFAC.compute(f, CE, iter([data, data]), bias=bias, params=params)
        expected = KFAC.compute(net, CE, [data, data], bias=bias)
        assert relative_error(found.to_dense("cvec"), expected.to_dense("cvec")) < 1e-12


def test_a_module_with_params_has_the_keys_of_hooks():
    model, X = example("CNN")
    data = X, torch.randint(2, (5,))
    expected = KFAC.compute(model, CE, data)
    found = KFAC.compute(model, CE, data, params=named(model))
    assert list(found) == list(expected)
    assert relative_error(found.to_dense("rvec"), expected.to_dense("rvec")) < 1e-12


# ---------------------------------------------------------------------- refusals


def test_modules_that_are_random_or_couple_the_data_are_refused():
    for layer in (nn.Dropout(0.5), nn.BatchNorm1d(3, affine=False)):
        model = nn.Sequential(nn.Linear(4, 3), layer)
        with pytest.raises(ValueError, match=r"eval\(\)"):
            Traced(model, named(model)).run(torch.randn(5, 4))


def test_names_that_do_not_fit_are_refused():
    model = nn.Linear(4, 2)
    with pytest.raises(ValueError, match=r"the model has no 'scale'"):
        Traced(model, {"weight": model.weight, "scale": torch.ones(2)})
    with pytest.raises(ValueError, match=r"matches no layer or parameter"):
        Traced(model, named(model), ignore="fc")
    with pytest.raises(TypeError, match=r"give f\(params, X\)"):
        Traced(3, {})
    with pytest.raises(ValueError, match=r"call run\(X\) first"):
        _ = Traced(model, named(model)).coverage


W = torch.arange(8.0).view(2, 4).double().sin()
SQUARE, SCALE = torch.arange(16.0).view(4, 4).double().cos(), torch.arange(2.0).double() + 1
X5 = torch.arange(20.0).view(5, 4).double().sin()


def embed(params, X):
    positions = torch.arange(X.shape[1])
    return (X @ params["W"].T + nn.functional.embedding(positions, params["P"])).mean(1)


REFUSED = {
    "scaled": (
        lambda p, X: X @ p["W"].T * p["s"], {"W": W, "s": SCALE}, X5,
        NotImplementedError, r"'s' is used by aten\.mul.*test_tracing.*ignore=\[.s.\]"),
    "function of the weight": (
        lambda p, X: X @ p["W"].T.exp() + p["b"], {"W": W, "b": SCALE}, X5,
        NotImplementedError, r"'W' is used by aten\.exp.*ignore=\[.W., .b.\]"),
    "part of the inputs": (
        lambda p, X: X[:, :2] @ p["W"][:, :2].T, {"W": W}, X5,
        NotImplementedError, r"'W'.*aten\.matmul.*only a part of its inputs"),
    "gram": (
        lambda p, X: X @ (p["W"].T @ p["W"]), {"W": W}, X5, NotImplementedError, r"'W'.*matmul"),
    "batched weight": (
        lambda p, X: torch.bmm(p["W"].expand(5, 2, 4), X.unsqueeze(2)).squeeze(2), {"W": W}, X5,
        NotImplementedError, r"'W'.*aten\.expand"),
    "einsum with a shared letter": (
        lambda p, X: torch.einsum("ni,oi->noi", X, p["W"]).sum(2), {"W": W}, X5,
        NotImplementedError, r"'W'.*einsum 'ni,oi->noi'"),
    "einsum that repeats": (
        lambda p, X: torch.einsum("ni,oi->no", X[:, :1], p["W"]), {"W": W}, X5,
        NotImplementedError, r"'W'.*repeats an axis"),
    "transposed convolution": (
        lambda p, X: nn.functional.conv_transpose1d(
            X.unsqueeze(1), p["W"][:1].unsqueeze(1)).sum(2),
        {"W": W}, X5, NotImplementedError, r"'W'.*conv_transpose1d.*ignore=\[.W.\]"),
    "transposed roles": (
        lambda p, X: X @ p["W"].T @ p["W"], {"W": SQUARE}, X5,
        NotImplementedError, r"'W'.*different roles.*ignore=\[.W.\]"),
    "embedding and linear": (
        lambda p, X: nn.functional.embedding(X, p["W"]).mean(1) @ p["W"].T, {"W": W.repeat(2, 1)},
        X5.abs().round().long(), NotImplementedError, r"'W'.*different roles"),
    "different biases": (
        lambda p, X: ((X @ p["W"] + p["b"]).sin() @ p["W"] + p["c"]),
        {"W": SQUARE, "b": SQUARE[0], "c": SQUARE[1]}, X5,
        NotImplementedError, r"'W'.*different biases.*ignore=\[.b., .c.\]"),
    "bias in one place": (
        lambda p, X: (X @ p["W"] + p["b"]).sin() @ p["W"], {"W": SQUARE, "b": SQUARE[0]}, X5,
        NotImplementedError, r"'W'.*with and without.*ignore=\[.b.\]"),
    "bias of two": (
        lambda p, X: X @ p["W"].T + p["b"] + (X @ p["V"].T + p["b"]).sin(),
        {"W": W, "V": W.cos(), "b": SCALE}, X5,
        NotImplementedError, r"'b'.*bias of V, W|'b' is used by aten\.add"),
    "bias added twice": (
        lambda p, X: X @ p["W"].T + p["b"] + p["b"], {"W": W, "b": SCALE}, X5,
        NotImplementedError, r"'b' is used by aten\.add.*ignore=\[.b.\]"),
    "output used without its bias": (
        lambda p, X: (z := X @ p["W"].T) * (z + p["b"]), {"W": W, "b": SCALE}, X5,
        NotImplementedError, r"'b'.*used elsewhere without it"),
    "bias of a frozen weight": (
        lambda p, X: nn.functional.linear(X, p["W"], p["b"]) @ p["V"],
        {"W": nn.Parameter(W, requires_grad=False), "b": SCALE, "V": torch.eye(2).double()}, X5,
        NotImplementedError, r"'b'.*aten\.linear.*frozen or left out.*ignore=\[.b.\]"),
    "not reached": (
        lambda p, X: X @ p["W"].T, {"W": W, "V": W.cos()}, X5,
        ValueError, r"does not depend on V.*ignore=\[.V.\]"),
    "detached": (
        lambda p, X: X @ p["W"].T + (X @ p["V"].T).detach(), {"W": W, "V": W.cos()}, X5,
        ValueError, r"does not depend on 'V'.*ignore=\[.V.\]"),
    "overwritten input": (
        lambda p, X: (x := X @ p["W"]).add_(x @ p["W"]), {"W": SQUARE}, X5,
        ValueError, r"operation with 'W' was overwritten in place.*x = x \+ f\(x\)"),
    "dropout": (
        lambda p, X: nn.functional.dropout(X @ p["W"].T, 0.5), {"W": W}, X5,
        ValueError, r"aten\.dropout \(.*draws random numbers.*eval"),
    "noise": (
        lambda p, X: X @ p["W"].T + torch.randn(2), {"W": W}, X5,
        ValueError, r"aten\.randn.*draws random numbers"),
    "batch norm": (
        lambda p, X: nn.functional.batch_norm(X @ p["W"].T, None, None, training=True),
        {"W": W}, X5, ValueError, r"aten\.batch_norm.*normalizes over the batch"),
    "rows shuffled": (
        lambda p, X: (X.flip(0) @ p["W"].T).cumsum(0), {"W": W}, X5,
        ValueError, r"depends on the other data"),
    "rows of unknown order": (
        lambda p, X: (X.view(-1, 2, 2).reshape(-1, 2).repeat(2, 1) @ p["V"]).view(2, -1, 4)[0],
        {"V": SQUARE[:2, :2]}, X5, NotImplementedError, r"'V'.*merged into one.*order is not"),
    "rows sorted": (
        lambda p, X: (X.reshape(-1, 2).flip(0) @ p["V"]).flip(0).reshape(-1, 4),
        {"V": SQUARE[:2, :2]}, X5, NotImplementedError, r"'V'.*belong to which datum.*\(N, S, D\)"),
    "positions": (
        embed, {"W": W, "P": SQUARE[:3, :2]}, torch.ones(5, 3, 4).double(),
        NotImplementedError, r"'P' is used.*no axis for the data.*expand\(N"),
    "value of the data": (
        lambda p, X: X @ p["W"].T if X.sum() > 0 else 2 * X @ p["W"].T, {"W": W}, X5,
        NotImplementedError, r"cannot be traced \(Guard.*torch\.where"),
    "item in a shape": (
        lambda p, X: X @ p["W"].T * X.numpy().sum(), {"W": W}, X5,
        NotImplementedError, r"cannot be traced.*numpy"),
    "state": (
        lambda p, X, n=[0]: (n.append(1), X @ p["W"].T * len(n))[1], {"W": W}, X5,
        NotImplementedError, r"another prediction than the function itself"),
    "no datum": (
        lambda p, X: (X @ p["W"].T)[:3], {"W": W}, X5, ValueError, r"3 data, but no tensor of X"),
    "a tuple": (
        lambda p, X: (X @ p["W"].T,), {"W": W}, X5, TypeError, r"returned a tuple"),
    "complex": (
        lambda p, X: (X @ p["W"].T).real, {"W": W + 0j}, X5, NotImplementedError, r"'W'.*complex"),
    "no tensors": (lambda p, X: X, {"W": [1.0]}, X5, TypeError, r"'W' is a list"),
    "X of another kind": (
        lambda p, X: X.x @ p["W"].T, {"W": W}, type("Batch", (), {"x": X5})(),
        TypeError, r"X holds a Batch"),
    "recurrent layer": (
        lambda p, X: torch.rnn_tanh(
            X.unsqueeze(0), torch.zeros(1, 5, 2).double(), [p["W"], p["U"]], False, 1, 0.0, False,
            False, False)[0][0],
        {"W": W, "U": SQUARE[:2, :2]}, X5, NotImplementedError,
        r"'W' is used by aten\.rnn_tanh.*ignore=\[.W., .U.\]"),
    "scaled gradients": (
        lambda p, X: nn.functional.embedding(X, p["W"], scale_grad_by_freq=True).mean(1),
        {"W": W}, X5.round().abs().long(), NotImplementedError, r"scale_grad_by_freq"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_what_to_do(case):
    f, params, X, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        Traced(f, params).run(X)


def test_the_verification_notices_a_wrong_layout(monkeypatch):
    monkeypatch.setattr(tracing, "_before", lambda *args: 1)
    params = {"W": torch.randn(2, 4)}
    with pytest.raises(NotImplementedError, match=r"'W'.*belong to which datum"):
        Traced(lambda p, X: (X.transpose(0, 1) @ p["W"].T).mean(0), params).run(
            torch.randn(5, 3, 4)
        )


def test_the_verification_notices_a_use_that_is_not_seen(monkeypatch):
    def all_but_one(*args):
        uses, obstacles = find_uses(*args)
        return uses[1:], obstacles

    monkeypatch.setattr(tracing, "find_uses", all_but_one)
    params = {"W": torch.randn(4, 4)}
    with pytest.raises(NotImplementedError, match=r"derivative by 'W' is not the sum"):
        Traced(lambda p, X: (X @ p["W"]).sin() @ p["W"], params).run(torch.randn(5, 4))


@pytest.mark.parametrize("mix", [lambda h: h - h.mean(0), lambda h: h + h.cumsum(0)])
def test_data_that_mix_behind_an_operation_are_refused(mix):
    params, X = {"W": torch.randn(2, 4)}, torch.randn(5, 4)
    with pytest.raises(ValueError, match="other data"):
        Traced(lambda p, X: mix(X @ p["W"].T), params).run(X)


def test_a_function_that_changes_is_traced_anew():
    params, X, scale = {"W": torch.randn(2, 4)}, torch.randn(5, 4), [1.0]

    def f(params, X):
        return scale[0] * (X @ params["W"].T)

    first, _ = Traced(f, params).run(X)
    scale[0] = 3.0
    again, _ = Traced(f, params).run(X)
    torch.testing.assert_close(again, 3 * first)


def test_a_second_source_of_a_function_uses_its_trace():
    entered, X = [], torch.randn(5, 4)

    def f(params, X):
        entered.append(len(entered))
        return X @ params["W"].T

    for N in (5, 5, 3):
        params = {"W": torch.randn(2, 4)}
        found, _ = Traced(f, params).run(X[:N])
        torch.testing.assert_close(found.detach(), X[:N] @ params["W"].T)
    # three times to trace and verify; then once each, on two data, to compare
    assert len(entered) == 5


def test_traces_end_with_their_function():
    from kfac_lib.tracing import _KNOWN

    before = len(_KNOWN)
    f = lambda params, X: X @ params["W"].T  # noqa: E731
    Traced(f, {"W": torch.randn(2, 4)}).run(torch.randn(5, 4))
    assert len(_KNOWN) == before + 1
    del f
    assert len(_KNOWN) == before


class StraightThrough(torch.autograd.Function):
    """Round, and pass the gradient on as it is."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


class Tripled(torch.autograd.Function):
    """The identity, with three times its derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 3 * g


@pytest.mark.parametrize("function", [StraightThrough, Tripled])
def test_a_custom_backward_is_refused(function):
    params = {"W": torch.randn(3, 4), "V": torch.randn(2, 3)}

    def f(params, X):
        return function.apply(X @ params["W"].T) @ params["V"].T

    with pytest.raises(NotImplementedError, match=r"'W'.*custom"):
        Traced(f, params).run(torch.randn(5, 4))


@pytest.mark.parametrize(
    "mix",
    [
        lambda h: (h - h.mean(0).detach()) / h.std(0).detach(),
        lambda h: h / h.abs().max().detach(),
        lambda h: torch.where(h.sum(1, keepdim=True) > h.sum(1).max().detach() - 0.1, h, -h),
        lambda h: h.tanh() * h.detach().argsort(0).argsort(0),
    ],
)
def test_statistics_that_gradients_do_not_pass_are_noticed(mix):
    params = {"W": torch.randn(3, 4), "V": torch.randn(2, 3)}
    with pytest.raises(ValueError, match=r"other data"):
        Traced(lambda p, X: mix(X @ p["W"].T) @ p["V"].T, params).run(torch.randn(6, 4))


def test_a_tensor_in_the_closure_that_requires_grad_is_refused():
    params, V = {"W": torch.randn(3, 4)}, torch.randn(2, 3)
    f = lambda p, X: X @ p["W"].T @ V.T  # noqa: E731
    Traced(f, params).run(torch.randn(5, 4))
    V.requires_grad_()
    with pytest.raises(ValueError, match=r"\(2, 3\).*not in params"):
        Traced(lambda p, X: X @ p["W"].T @ V.T, params).run(torch.randn(5, 4))


def test_parameters_of_a_module_that_are_not_given_are_named_as_ignored():
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    data = torch.randn(5, 4), torch.randn(5, 2)
    given = {"0.weight": net[0].weight, "0.bias": net[0].bias}
    kfac = KFAC.compute(net, nn.MSELoss(), data, params=given)
    assert list(kfac) == ["0"]
    assert kfac.ignored == ("1.weight", "1.bias")


def test_buffers_among_the_parameters_are_named():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    params = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    f = lambda p, X: torch.func.functional_call(net, p, (X,))  # noqa: E731
    with pytest.raises(ValueError, match=r"Buffers.*ignore"):
        Traced(f, params, ignore="1.weight").run(torch.randn(5, 4))
