"""The kit passes what is right, fails what is wrong, and says so without a traceback."""

import copy

import pytest
import torch
from adapters import ADAPTERS
from torch import nn
from wrong_kfacs import RIGHT

from kfac_lib import KFAC, InputOnly, MonteCarlo, RandomSigns, conformance, exact_blocks
from kfac_lib.conformance import check_kfac
from kfac_lib.exact_cases import exact_cases


def factors(change):
    """A KFAC whose factors are changed by a function of (name, A, B, case arguments)."""

    def fn(model, loss_func, data, fisher, sharing):
        kfac = KFAC.compute(model, loss_func, data, fisher, sharing)
        return {name: changed(name, K, change) for name, K in kfac.items()}

    return fn


def changed(name, K, change):
    blocks = getattr(K, "blocks", [K])
    pairs = [change(name, dense_A(one), one.B) for one in blocks]
    return pairs[0] if len(pairs) == 1 else pairs


def dense_A(K):
    return K.A.diag() if K.A.ndim == 1 else K.A


@pytest.fixture
def few_cases(monkeypatch):
    """One case in ten: enough where every case would say the same."""
    monkeypatch.setattr(conformance, "exact_cases", lambda: exact_cases()[::10])


def families(outcomes):
    return {outcome.case.family for outcome in outcomes}


@pytest.mark.parametrize("right", RIGHT, ids=lambda right: right.name)
def test_a_kfac_written_from_the_formulas_alone_passes_in_every_form(right):
    report = check_kfac(right.fn, output=right.output, order=right.order, bias=right.bias)
    assert report.passed, report
    assert report.explanation is None
    for outcome in report.refusals:
        case = outcome.case
        unknown = isinstance(case.fisher, InputOnly | RandomSigns)
        assert unknown or ("shared" not in right.name and is_new(case)), case


def is_new(case):
    """Does it take more than Linear layers that are called once?"""
    return case.kind != "Linear" or "called" in case.family


@pytest.mark.parametrize("order", ["cvec", "rvec"])
@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.parametrize("output", ["factors", "dense"])
def test_the_library_passes_and_refuses_nothing(order, bias, output):
    def fn(*case):
        return KFAC.compute(*case, bias=bias)

    report = check_kfac(fn, output=output, order=order, bias=bias)
    assert report.passed, report
    assert not report.refusals
    assert report.diagnosis == "nothing is wrong"


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_adapters_of_other_libraries_pass(name):
    fn, bias = ADAPTERS[name]
    report = check_kfac(fn, bias=bias)
    assert report.passed, report


def test_an_exact_block_is_not_a_kfac_and_fails_where_kfac_is_an_approximation():
    def fn(model, loss_func, data, fisher, sharing):
        return exact_blocks(model, loss_func, data, fisher, order="rvec")

    report = check_kfac(fn, output="dense", order="rvec")
    assert "definition" in families(report.failures)
    assert not families(report.failures) & {"one datum", "deep linear regression"}


def test_cases_are_the_same_every_time_and_independent_of_the_global_generator():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = [outcome.error for outcome in check_kfac(KFAC.compute).outcomes]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    second = [outcome.error for outcome in check_kfac(KFAC.compute).outcomes]
    assert first == second
    own = check_kfac(KFAC.compute, generator=torch.Generator().manual_seed(5))
    drawn = [o.error for o in own.outcomes if isinstance(o.case.fisher, MonteCarlo)]
    assert drawn != [o for o in first if o in drawn]
    assert own.passed


def test_the_default_dtype_of_the_caller_does_not_matter():
    assert torch.get_default_dtype() == torch.float32
    assert check_kfac(KFAC.compute).passed


def test_what_is_refused_is_not_passed():
    def refuses(*_):
        raise NotImplementedError("only on Tuesdays")

    report = check_kfac(refuses)
    assert not report.passed
    assert not report.failures
    assert len(report.refusals) == len(exact_cases())
    assert "only on Tuesdays" in repr(report)
    assert report.diagnosis == "nothing was computed"

    def only_regression(model, loss_func, *rest):
        if not isinstance(loss_func, nn.MSELoss):
            raise NotImplementedError
        return KFAC.compute(model, loss_func, *rest)

    report = check_kfac(only_regression)
    assert report.passed
    assert len(report.refusals) > len(exact_cases()) / 3


def raises(*_):
    raise KeyError("fc")


def misses_a_layer(*case):
    return dict(list(KFAC.compute(*case).items())[:1])


def moves_the_weights(model, *rest):
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    return KFAC.compute(model, *rest)


def leaves_gradients(model, loss_func, data, *rest):
    loss_func(model(data[0]), data[1]).backward()
    return KFAC.compute(model, loss_func, data, *rest)


def leaves_a_hook(model, *rest):
    model.register_forward_hook(lambda *_: None)
    return KFAC.compute(model, *rest)


def changes_the_mode(model, *rest):
    return KFAC.compute(model.eval(), *rest)


def freezes(model, *rest):
    kfac = KFAC.compute(model, *rest)
    next(model.parameters()).requires_grad_(False)
    return kfac


def changes_the_data(model, loss_func, data, *rest):
    kfac = KFAC.compute(model, loss_func, data, *rest)
    data[0].mul_(2)
    return kfac


def swaps_a_parameter(model, *rest):
    kfac = KFAC.compute(model, *rest)
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
    layer.extra = nn.Parameter(torch.ones(1))
    return kfac


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (raises, "raised KeyError: 'fc'"),
        (lambda *_: 1 / 0, "raised ZeroDivisionError"),
        (lambda: None, "raised TypeError"),
        (lambda *_: None, "returns a NoneType, not a mapping"),
        (lambda *_: {}, "misses ['0', '2']"),
        (misses_a_layer, "misses ['2'"),
        (factors(lambda n, A, B: A), "is a Tensor, not a pair"),
        (factors(lambda n, A, B: (A, B, B)), "is a tuple, not a pair"),
        (factors(lambda n, A, B: (A, B.tolist())), "factor B of '0' is a list"),
        (factors(lambda n, A, B: (A[:, :1], B)), "factor A of '0' has shape (4, 1)"),
        (factors(lambda n, A, B: (A[0], B)), "factor A of '0' has shape (4,)"),
        (factors(lambda n, A, B: (A / 0, B)), "factor A of '0' holds NaN or inf"),
        (factors(lambda n, A, B: (A, B * float("nan"))), "factor B of '0' holds NaN or inf"),
        (factors(lambda n, A, B: (A.to(torch.complex128), B)), "not a dense real tensor"),
        (factors(lambda n, A, B: (A.to_sparse(), B)), "not a dense real tensor"),
        (factors(lambda n, A, B: (torch.eye(2), B)), "has shape"),
        (factors(lambda n, A, B: (torch.eye(20_000), B)), "has shape (20000, 20000)"),
        (moves_the_weights, "changes the model: values of '0.weight'"),
        (leaves_gradients, "changes the model: .grad of '0.weight'"),
        (leaves_a_hook, "changes the model: _forward_hooks"),
        (changes_the_mode, "changes the model: mode of ''"),
        (freezes, "changes the model: requires_grad of '0.weight'"),
        (swaps_a_parameter, "changes the model: it has other modules or parameters"),
        (changes_the_data, "changes the data in place"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_bad_callable_is_reported_and_nothing_is_raised(few_cases, fn, message):
    report = check_kfac(fn)
    assert not report.passed
    first = report.failures[0]
    assert message in f"{first.message}"
    assert message[:40] in repr(report)
    assert "Traceback" not in repr(report)
    assert report._repr_html_().count("<tr>") == 1 + len(families(report.outcomes))


def test_a_dense_callable_with_bad_blocks_is_reported(few_cases):
    for block, message in (
        (torch.eye(3), "block '0' has shape (3, 3), not (16, 16)"),
        (torch.ones(3, 4), "block '0' has shape (3, 4), not that of a square matrix"),
        ([1.0], "block '0' is a list, not a tensor"),
    ):
        report = check_kfac(
            lambda model, *_, block=block: {
                n: block for n, m in model.named_modules() if isinstance(m, nn.Linear)
            },
            output="dense",
        )
        assert report.failures[0].message == message


def test_side_effects_are_reported_and_do_not_hide_the_numbers():
    def off_by_N(model, loss_func, data, *rest):
        kfac = leaves_gradients(model, loss_func, data, *rest)
        return {name: len(data[0]) * K for name, K in kfac.items()}

    report = check_kfac(off_by_N)
    assert report.explanation.hypothesis == "scale N"
    assert "(N: data)" in report.diagnosis
    assert report.diagnosis.endswith("also, it changes the model: .grad of '0.weight'")
    clean_numbers = check_kfac(leaves_gradients)
    assert not clean_numbers.passed
    assert clean_numbers.diagnosis.startswith("the numbers are right, but it changes the model")


def test_leaving_the_program_and_settings_of_torch_stay_inside(few_cases):
    def leaves(*_):
        raise SystemExit(3)

    assert "raised SystemExit: 3" in check_kfac(leaves).failures[0].message

    def changes_settings(*case):
        kfac = KFAC.compute(*case)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        return kfac

    assert check_kfac(changes_settings).passed
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


def test_a_tensor_without_numbers_is_a_failure_and_no_refusal(few_cases):
    report = check_kfac(factors(lambda n, A, B: (A.to("meta"), B)))
    assert not report.refusals
    assert "not a dense real tensor with numbers" in report.failures[0].message


def test_draws_that_are_all_the_same_are_named():
    def seeded(model, loss_func, data, fisher, sharing):
        if isinstance(fisher, MonteCarlo):
            fisher = MonteCarlo(fisher.samples, torch.Generator().manual_seed(0))
        return KFAC.compute(model, loss_func, data, fisher, sharing)

    report = check_kfac(seeded)
    assert all("draws are the same" in outcome.message for outcome in report.failures)
    assert report.failures


def test_with_two_mistakes_the_diagnosis_names_the_one_that_explains_most():
    def two(model, loss_func, data, fisher, sharing):
        kfac = KFAC.compute(model, loss_func, data, fisher, sharing)
        swap = isinstance(loss_func, nn.BCEWithLogitsLoss)
        N = len(data[0])
        return {
            name: changed(name, K, lambda _, A, B: (B, A) if swap else (N * A, B))
            for name, K in kfac.items()
        }

    report = check_kfac(two)
    assert report.explanation is None
    assert "none explains the numbers" in report.diagnosis
    assert "nearest is scale N" in report.diagnosis


def test_the_model_that_the_callable_gets_is_a_copy():
    seen = []

    def spoils(model, *rest):
        seen.append(copy.deepcopy(model))
        return moves_the_weights(model, *rest)

    check_kfac(spoils)
    first = seen[0].state_dict()
    check_kfac(spoils)
    again = seen[len(seen) // 2].state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert check_kfac(KFAC.compute).passed


def test_wrong_arguments_are_errors():
    with pytest.raises(TypeError, match="give a callable"):
        check_kfac({"0": (1, 2)})
    with pytest.raises(ValueError, match="output='blocks': use 'factors' or 'dense'"):
        check_kfac(KFAC.compute, output="blocks")
    with pytest.raises(ValueError, match="bias='none': use 'joint' or 'separate'"):
        check_kfac(KFAC.compute, bias="none")
    with pytest.raises(ValueError, match="order"):
        check_kfac(KFAC.compute, order="F")


def test_the_report_says_what_is_wrong_where_and_what_comes_next():
    def halves_regression(model, loss_func, data, fisher, sharing):
        kfac = KFAC.compute(model, loss_func, data, fisher, sharing)
        half = 0.5 if isinstance(loss_func, nn.MSELoss) else 1.0
        return {name: half * K for name, K in kfac.items()}

    report = check_kfac(halves_regression)
    assert report.explanation.hypothesis == "scale 1/2"
    assert report.explanation.where == "only with MSELoss"
    assert len(report.failures) > 20
    assert report.explanation.explained == report.explanation.wrong
    assert report.runner_up.explained < report.explanation.explained
    text = repr(report)
    assert "Diagnosis: scale 1/2, only with MSELoss (explains" in text
    assert "Runner-up: " in text
    assert "Diagnosis:" in report._repr_html_()


def test_none_explains_is_an_answer():
    report = check_kfac(factors(lambda n, A, B: (A + 0.01 * torch.eye(len(A)), B)))
    assert report.explanation is None
    assert report.diagnosis.startswith("none explains the numbers")
    assert not check_kfac(factors(lambda n, A, B: (1.1 * A, B))).explanation


def test_a_constant_that_is_right_by_chance_in_one_branch_does_not_explain():
    """N too much, but for even N alone: right blocks with odd N speak against 'scale N'."""

    def fn(model, loss_func, data, fisher, sharing):
        N = len(data[0])
        kfac = KFAC.compute(model, loss_func, data, fisher, sharing)
        return {name: (N if N % 2 == 0 else 1) * K for name, K in kfac.items()}

    report = check_kfac(fn)
    assert report.explanation is None
    assert report.runner_up.hypothesis == "scale N"
    assert "contradicted" in str(report.runner_up)


def shared(returns, **options):
    """Ours, with what it returns for a layer of one kind put in another form."""

    def fn(*case):
        return {name: returns(K) for name, K in KFAC.compute(*case).items()}

    return check_kfac(fn, **options)


@pytest.mark.parametrize(
    "form",
    [
        lambda K: [(b.A, b.B) for b in K.blocks] if hasattr(K, "blocks") else (K.A, K.B),
        lambda K: (
            tuple([b.A, b.B] for b in K.blocks) if hasattr(K, "blocks") else [dense_A(K), K.B]
        ),
        lambda K: list(K.blocks) if hasattr(K, "blocks") else K,
    ],
    ids=["list of pairs", "tuple of lists, A dense", "list of products"],
)
def test_groups_and_embeddings_can_be_given_in_several_forms(form):
    assert shared(form).passed


def test_a_diagonal_in_place_of_a_matrix_is_an_embeddings_only():
    report = shared(lambda K: (K.A.diagonal(), K.B) if hasattr(K, "A") and K.A.ndim == 2 else K)
    assert "factor A of '0' has shape (4,)" in report.failures[0].message


def test_a_wrong_number_of_groups_is_reported():
    report = shared(lambda K: K.blocks[:1] * 3 if hasattr(K, "blocks") else K)
    assert "has 3 pairs of factors" in report.failures[0].message
    assert {outcome.case.family for outcome in report.failures} >= {"grouped convolution"}


def test_what_a_kfac_of_linear_layers_refuses_takes_one_row_for_each_kind():
    report = check_kfac(RIGHT[0].fn)
    rows = [line.split("  ")[1] for line in repr(report).splitlines()[1:-1]]
    kinds = ["nets with Conv1d", "nets with Conv2d", "nets with Conv3d", "nets with Embedding"]
    assert [row for row in rows if row.startswith("nets")] == kinds
    assert "convolution at one position" not in rows
    refused = [o for o in report.refusals if o.case.kind == "Conv2d"]
    assert f"{len(refused):>2} refused  a layer of the kind Conv2d" in repr(report)
