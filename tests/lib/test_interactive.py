"""Figures with controls: what is stored, what is said, and what is refused."""

from __future__ import annotations

import base64
import io

import pytest

from kfac_lib.interactive import WIDGET_VIEW, Choice, Slider, explore

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("ipywidgets")


def draw(n, order="rvec"):
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(2, 1))
    ax.set_title(f"{n} {order}")
    return figure


N = Slider("n", "Data points", [1, 2, 4])
ORDER = Choice("order", "Order", ["rvec", "cvec"])


def one(**changes):
    arguments = {"alt": lambda n: "A number.", "caption": "A number changes."}
    return explore(draw, N, **(arguments | changes))


def two():
    return explore(
        draw, N, ORDER, alt=lambda n, order: f"Order {order}.", caption="Two things change."
    )


def links(figure):
    from ipywidgets.widgets import widget
    from ipywidgets.widgets.widget_link import Link

    assert figure.widget  # make it
    return [w for w in widget._instances.values() if isinstance(w, Link)]


def test_there_is_one_frame_for_each_position():
    assert len(one().frames) == 3
    assert len(two().frames) == 6


def test_the_alt_text_names_the_position_of_every_control():
    assert one().frames[2].alt == "A number. (Data points 4)"
    alts = [frame.alt for frame in two().frames]
    assert alts[0] == "Order rvec. (Data points 1)"
    assert alts[5] == "Order cvec. (Data points 4)"
    assert len(set(alts)) == 6


def test_the_alt_text_is_left_alone_when_it_names_the_position():
    figure = one(alt=lambda n: f"A number, with data points {n}.")
    assert figure.frames[0].alt == "A number, with data points 1."


def test_draw_gets_the_values_and_the_reader_the_formatted_texts():
    seen = []

    def remember(delta):
        seen.append(delta)
        return draw(delta)

    figure = explore(
        remember,
        Slider("delta", "Damping", [0.1, 0.01], format="{:.0e}".format),
        alt=lambda delta: "x",
        caption="c",
    )
    assert seen == [0.1, 0.01]
    assert figure.frames[1].alt == "x (Damping 1e-02)"
    slider = figure.widget.children[0].children[0]
    assert [text for text, _ in slider.options] == ["1e-01", "1e-02"]


def test_the_same_figure_has_the_same_bytes():
    assert [f.png for f in two().frames] == [f.png for f in two().frames]


def test_frames_hold_no_metadata_and_few_colours():
    from PIL import Image

    with Image.open(io.BytesIO(one().frames[0].png)) as image:
        assert image.mode == "P"
        assert image.info.keys() <= {"transparency"}
        assert image.size == (288, 144)


def test_different_positions_have_different_pictures():
    assert len({frame.png for frame in two().frames}) == 6


def test_no_figure_is_left_open():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    two()
    assert plt.get_fignums() == before


def test_no_figure_is_left_open_when_drawing_fails():
    import matplotlib.pyplot as plt

    def fail(n):
        plt.figure()
        raise RuntimeError("no")

    before = plt.get_fignums()
    with pytest.raises(RuntimeError, match="no"):
        explore(fail, N, alt=lambda n: "x", caption="c")
    assert plt.get_fignums() == before


def test_a_figure_of_the_caller_stays_open():
    import matplotlib.pyplot as plt

    mine = plt.figure()
    one()
    assert plt.fignum_exists(mine.number)
    plt.close(mine)


def test_one_output_carries_the_widget_a_still_and_a_stable_text():
    figure = two()
    bundle = figure._repr_mimebundle_()
    assert bundle.keys() == {"text/plain", "image/png", WIDGET_VIEW}
    assert bundle["text/plain"] == (
        "Interactive figure: Two things change. "
        "Controls: Data points (1, 2, 4) × Order (rvec, cvec)"
    )
    assert base64.b64decode(bundle["image/png"]) == figure.frames[0].png
    assert bundle[WIDGET_VIEW]["model_id"] == figure.widget.model_id


def test_the_start_position_is_the_still_and_the_shown_frame():
    figure = explore(
        draw,
        Slider("n", "Data points", [1, 2, 4], start=2),
        Choice("order", "Order", ["rvec", "cvec"], start=1),
        alt=lambda n, order: "x",
        caption="c",
    )
    assert figure.start.alt == "x (Data points 4, Order cvec)"
    outer = figure.widget.children[1]
    assert outer.selected_index == 2
    assert [inner.selected_index for inner in outer.children] == [1, 1, 1]


def test_every_stack_is_linked_to_its_control_in_the_browser():
    figure = two()
    controls = {control.model_id for control in figure.widget.children[0].children}
    outer = figure.widget.children[1]
    stacks = {stack.model_id for stack in [outer, *outer.children]}
    ends = [(link.source, link.target) for link in links(figure)]
    linked = {t[0].model_id for s, t in ends if s[0].model_id in controls}
    assert stacks <= linked
    assert all(s[1] == "index" for s, _ in ends if s[0].model_id in controls)


def test_alt_text_and_caption_are_escaped():
    figure = one(alt=lambda n: 'a "b" <c>', caption="<b>")
    assert 'alt="a &quot;b&quot; &lt;c&gt; (' in figure.frames[0].html()
    assert "&lt;b&gt;" in figure.widget.children[2].value


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Slider("n", "N", [1]), ValueError, "two or more positions, got 1"),
        (lambda: Slider("n", " ", [1, 2]), ValueError, "needs a label"),
        (lambda: Slider("n o", "N", [1, 2]), ValueError, "must be a Python name"),
        (lambda: Slider("n", "N", [1, 2], start=2), ValueError, r"start must be in 0\.\.1"),
        (lambda: Slider("n", "N", [0.11, 0.12], format="{:.1f}".format), ValueError, "read"),
        (lambda: Choice("o", "Order", ["a", "a"]), ValueError, "cannot tell positions apart"),
        (lambda: explore(draw, alt=str, caption="c"), ValueError, "one or two controls, got 0"),
        (lambda: explore(draw, N, N, N, alt=str, caption="c"), ValueError, "got 3"),
        (lambda: explore(draw, N, N, alt=str, caption="c"), ValueError, "name of its own"),
        (
            lambda: explore(draw, N, Slider("m", N.label, [1, 2]), alt=str, caption="c"),
            ValueError,
            "label of its own",
        ),
        (lambda: explore(draw, 3, alt=str, caption="c"), TypeError, "a Slider or a Choice"),
        (lambda: one(caption=" "), ValueError, "caption is empty"),
        (lambda: one(alt=lambda n: ""), ValueError, "is empty: say in words"),
        (lambda: one(alt=lambda n: n), TypeError, "must return a str, got int"),
        (
            lambda: explore(lambda n: None, N, alt=lambda n: "x", caption="c"),
            TypeError,
            "must return a matplotlib Figure, got NoneType",
        ),
        (
            lambda: explore(
                draw, Slider("n", "N", range(8)), Slider("m", "M", range(5)), alt=str, caption="c"
            ),
            ValueError,
            "8 × 5 positions are 40 frames; a figure has at most 39",
        ),
    ],
)
def test_bad_input_is_refused_with_a_reason(make, error, message):
    with pytest.raises(error, match=message):
        make()
