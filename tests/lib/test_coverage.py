import pytest
from torch import nn
from truth import mlp

from kfac_lib.coverage import check_per_datum, cover
from kfac_lib.layers import is_supported


def net():
    return nn.Sequential(
        nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)),
        nn.Linear(3, 3),
        nn.Linear(3, 3, bias=False),
    )


def test_all_trainable_layers_are_taken_in_the_models_order():
    found = cover(mlp(4, 3, 2, 3))
    assert list(found.layers) == ["0", "2", "4"]
    assert found.biases == {"0", "2", "4"}
    assert (found.frozen, found.ignored) == ((), ())


@pytest.mark.parametrize(
    ("layers", "ignore", "taken", "biases"),
    [
        (None, "0.1", ["0.0", "1", "2"], {"0.0", "1"}),
        (None, ["0"], ["1", "2"], {"1"}),
        (None, ["0*", "1.bias"], ["1", "2"], set()),
        (["2", "1"], (), ["1", "2"], {"1"}),
        ("[12]", (), ["1", "2"], {"1"}),
        (["0.0.weight"], (), ["0.0"], set()),
        ("*.weight", "0.1.weight", None, None),
    ],
)
def test_patterns_select_layers_parameters_and_modules_around_them(layers, ignore, taken, biases):
    if taken is None:
        with pytest.raises(ValueError, match=r"both.*0\.1\.weight"):
            cover(net(), layers, ignore)
        return
    found = cover(net(), layers, ignore)
    assert list(found.layers) == taken
    assert found.biases == biases


def test_what_is_left_out_is_named():
    model = net()
    model[2].requires_grad_(False)
    found = cover(model, ignore="0")
    assert found.frozen == ("2.weight",)
    assert found.ignored == ("0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias")
    assert cover(model, layers="1").ignored == found.ignored


def test_an_unsupported_layer_gives_the_list_to_paste():
    with pytest.raises(NotImplementedError) as error:
        cover(nn.Sequential(net(), nn.Bilinear(2, 2, 2)))
    paste = str(error.value).partition("ignore=")[2].partition(" to leave")[0]
    assert paste == '["0.0.1", "1"]'
    assert list(cover(nn.Sequential(net(), nn.Bilinear(2, 2, 2)), ignore=eval(paste)).layers) == [
        "0.0.0",
        "0.1",
        "0.2",
    ]


def test_a_frozen_unsupported_layer_is_no_obstacle():
    model = net()
    model[0][1].requires_grad_(False)
    assert cover(model).frozen == ("0.1.weight", "0.1.bias")


def test_subclasses_are_supported_and_others_not():
    assert is_supported(type("Own", (nn.Linear,), {})(2, 3))
    assert not is_supported(nn.Bilinear(2, 2, 2))
    assert not is_supported(nn.ConvTranspose2d(1, 1, 1))


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Dropout(0.1), "Dropout"),
        (nn.AlphaDropout(0.1), "AlphaDropout"),
        (nn.RReLU(), "RReLU"),
        (nn.BatchNorm1d(3), "BatchNorm1d"),
        (nn.LSTM(3, 3, 2, dropout=0.1), "LSTM"),
        (nn.MultiheadAttention(4, 2, dropout=0.1), "MultiheadAttention"),
    ],
)
def test_what_is_random_or_couples_the_batch_is_refused_in_training_mode_only(module, kind):
    model = nn.Sequential(nn.Linear(4, 3), module)
    with pytest.raises(ValueError, match=rf"'1' \({kind}\).*model\.eval"):
        check_per_datum(model)
    check_per_datum(model.eval())


def test_what_is_not_random_may_stay_in_training_mode():
    check_per_datum(nn.Sequential(nn.Dropout(0.0), nn.LayerNorm(3), nn.LSTM(3, 3)))


def test_batch_norm_without_running_statistics_is_refused_in_either_mode():
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match="batch"):
        check_per_datum(model)
