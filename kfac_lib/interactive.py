"""Figures with controls that work with no kernel: on the static page, in JupyterLab, offline.

Explained in :ref:`how-to-read`. Every frame is drawn ahead and held as a picture with an
alternative text; the controls are linked to the frames in the browser. Needs the ``book`` extra
(matplotlib, pillow, ipywidgets), which is imported only when a figure is made.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_FRAMES = 39
DPI = 144
COLOURS = 256
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


@dataclass(frozen=True)
class Slider:
    """A control that moves along ordered values.

    Explained in :ref:`how-to-read`.

    Args:
        name: The keyword under which ``draw`` and ``alt`` get the value.
        label: What the reader sees before the slider, plain text.
        values: The values, in order; two or more.
        format: Turns a value into the text shown beside the slider.
        start: Index of the value to start at.

    Raises:
        ValueError: There are fewer than two values, two values read alike, the label is empty,
            ``name`` is no Python name, or ``start`` is no index.

    Example:
        >>> Slider("n", "Data points", [1, 2, 4]).texts
        ('1', '2', '4')
    """

    name: str
    label: str
    values: Sequence[Any]
    format: Callable[[Any], str] = str
    start: int = 0

    def __post_init__(self) -> None:
        _check_control(self)

    @property
    def texts(self) -> tuple[str, ...]:
        """The positions in words."""
        return tuple(self.format(value) for value in self.values)

    def widget(self) -> Any:
        """The ipywidget; its ``index`` is the position."""
        import ipywidgets

        return ipywidgets.SelectionSlider(
            options=[(text, i) for i, text in enumerate(self.texts)],
            value=self.start,
            description=self.label,
            style={"description_width": "initial"},
            layout={"width": "auto", "max_width": "34em"},
        )


@dataclass(frozen=True)
class Choice:
    """A control that picks one of a few named options.

    Explained in :ref:`how-to-read`.

    Args:
        name: The keyword under which ``draw`` and ``alt`` get the option.
        label: What the reader sees before the control, plain text.
        options: The options, two or more; ``draw`` gets one of these strings.
        start: Index of the option to start at.

    Raises:
        ValueError: There are fewer than two options, two are alike, the label is empty, ``name``
            is no Python name, or ``start`` is no index.

    Example:
        >>> Choice("order", "Order", ["rvec", "cvec"]).texts
        ('rvec', 'cvec')
    """

    name: str
    label: str
    options: Sequence[str]
    start: int = 0

    def __post_init__(self) -> None:
        _check_control(self)

    @property
    def values(self) -> Sequence[str]:
        """The options themselves."""
        return self.options

    @property
    def texts(self) -> tuple[str, ...]:
        """The positions in words."""
        return tuple(str(option) for option in self.options)

    def widget(self) -> Any:
        """The ipywidget, buttons or a menu; its ``index`` is the position."""
        import ipywidgets

        few = len(self.texts) <= 4 and sum(map(len, self.texts)) <= 40
        kind = ipywidgets.ToggleButtons if few else ipywidgets.Dropdown
        return kind(
            options=list(self.texts),
            index=self.start,
            description=self.label,
            style={"description_width": "initial"} | ({"button_width": "auto"} if few else {}),
        )


Control: TypeAlias = Slider | Choice


@dataclass(frozen=True)
class Frame:
    """One drawn position of the controls: PNG data, its alternative text, its size in inches."""

    png: bytes
    alt: str
    width: float
    height: float

    def html(self) -> str:
        """The frame as one image element, on a white card in any theme."""
        data = base64.b64encode(self.png).decode()
        return (
            f'<img src="data:image/png;base64,{data}" alt="{html.escape(self.alt)}" '
            f'width="{96 * self.width:.0f}" height="{96 * self.height:.0f}" '
            'style="max-width:100%;height:auto;background:#fff">'
        )


class InteractiveFigure:
    """Frames, controls, and the links between them. Made by :func:`explore`.

    Explained in :ref:`how-to-read`. As the last expression of a cell it shows itself: the widget
    where widgets live, the still picture of the start position elsewhere (print, GitHub).

    Example:
        >>> from matplotlib.figure import Figure
        >>> figure = explore(
        ...     lambda side: Figure(figsize=(side, side)),
        ...     Slider("side", "Side", [1, 2]),
        ...     alt=lambda side: f"An empty square with side {side}.",
        ...     caption="A square grows.",
        ... )
        >>> figure.frames[1].alt
        'An empty square with side 2.'
    """

    def __init__(self, controls: Sequence[Control], frames: Sequence[Frame], caption: str) -> None:
        self.controls = tuple(controls)
        self.frames = tuple(frames)
        self.caption = caption
        self._widget: Any = None

    @property
    def start(self) -> Frame:
        """The frame that is shown first."""
        index = 0
        for control in self.controls:
            index = index * len(control.texts) + control.start
        return self.frames[index]

    @property
    def widget(self) -> Any:
        """The ipywidget: controls above stacked frames, and a caption. Made once, when needed."""
        if self._widget is None:
            self._widget = self._build()
        return self._widget

    def __repr__(self) -> str:
        """What the figure shows and how it can be moved."""
        moves = " × ".join(f"{c.label} ({', '.join(c.texts)})" for c in self.controls)
        return f"Interactive figure: {self.caption} Controls: {moves}"

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return {
            "text/plain": repr(self),
            "image/png": base64.b64encode(self.start.png).decode(),
            WIDGET_VIEW: self.widget._repr_mimebundle_()[WIDGET_VIEW],
        }

    def _build(self) -> Any:
        import ipywidgets as w

        layout, style = w.Layout(margin="0"), w.HTML().style  # shared: a third of the state
        images = [w.HTML(value=f.html(), layout=layout, style=style) for f in self.frames]
        controls = [control.widget() for control in self.controls]
        stacks, last = images, len(controls) - 1
        for depth in range(last, -1, -1):  # innermost control first
            size, start = len(self.controls[depth].texts), self.controls[depth].start
            stacks = [
                w.Stack(stacks[i : i + size], selected_index=start)
                for i in range(0, len(stacks), size)
            ]
            for stack in stacks:
                w.jslink((controls[depth], "index"), (stack, "selected_index"))
        caption = w.HTML(value=f'<p class="explore-caption">{html.escape(self.caption)}</p>')
        bar = w.VBox(controls)
        bar.add_class("explore-controls")
        stacks[0].add_class("explore-frame")
        box = w.VBox([bar, stacks[0], caption])
        box.add_class("explore")
        return box


def explore(
    draw: Callable[..., Figure],
    *controls: Control,
    alt: Callable[..., str],
    caption: str,
    dpi: int = DPI,
) -> InteractiveFigure:
    """Draw a figure for every position of one or two controls and link the two in the browser.

    Explained in :ref:`how-to-read`. Every frame has an alternative text that names the position of
    each control; what the author's text does not name as ``label value`` is appended.

    Args:
        draw: Called as ``draw(**{name: value})`` for every position; returns a matplotlib figure,
            which is closed afterwards. Keep the size the same for all positions.
        *controls: One or two of :class:`Slider` and :class:`Choice`.
        alt: Called like ``draw``; says in words what this frame shows.
        caption: The one message of the figure, plain text.
        dpi: Pixels of a frame to the inch. The figure is shown at 96, so more is sharper on fine
            screens, and less makes a page of very detailed frames smaller.

    Returns:
        The figure; as the last expression of a cell it shows itself.

    Raises:
        TypeError: A control is neither a slider nor a choice, ``draw`` returns no figure, or
            ``alt`` no text.
        ValueError: There are no controls or more than two, two have one name, there are 40 frames
            or more, or the caption or an alternative text is empty.

    Example:
        >>> from matplotlib.figure import Figure
        >>> explore(
        ...     lambda side: Figure(figsize=(side, 1)),
        ...     Slider("side", "Side", [1, 2], format="{} cm".format),
        ...     alt=lambda side: "An empty box.",
        ...     caption="A box grows.",
        ... )
        Interactive figure: A box grows. Controls: Side (1 cm, 2 cm)
    """
    _check_figure(controls, caption)
    frames = []
    for position in itertools.product(*(range(len(c.texts)) for c in controls)):
        values = {c.name: c.values[i] for c, i in zip(controls, position, strict=True)}
        text = alt(**values)
        if not isinstance(text, str):
            raise TypeError(f"alt({values}) must return a str, got {type(text).__name__}")
        if not text.strip():
            raise ValueError(f"alt({values}) is empty: say in words what this frame shows")
        names = [(c.label, c.texts[i]) for c, i in zip(controls, position, strict=True)]
        frames.append(_frame(draw, values, _name_position(text.strip(), names), dpi))
    return InteractiveFigure(controls, frames, caption)


def _check_control(control: Control) -> None:
    what = f"{type(control).__name__} {control.name!r}"
    if not control.name.isidentifier():
        raise ValueError(f"{what}: the name must be a Python name, a keyword of draw and alt")
    if not control.label.strip():
        raise ValueError(f"{what} needs a label in words")
    texts = control.texts
    if len(texts) < 2:
        raise ValueError(f"{what} needs two or more positions, got {len(texts)}")
    twice = sorted({text for text in texts if texts.count(text) > 1})
    if twice:
        raise ValueError(f"{what}: the reader cannot tell positions apart that read {twice}")
    if not 0 <= control.start < len(texts):
        raise ValueError(f"{what}: start must be in 0..{len(texts) - 1}, got {control.start}")


def _check_figure(controls: Sequence[Control], caption: str) -> None:
    for control in controls:
        if not isinstance(control, Slider | Choice):
            raise TypeError(f"a control is a Slider or a Choice, got {type(control).__name__}")
    if len(controls) not in (1, 2):
        raise ValueError(f"explore takes one or two controls, got {len(controls)}")
    names = [control.name for control in controls]
    if len(set(names)) < len(names):
        raise ValueError(f"each control needs a name of its own, got {names}")
    labels = [control.label for control in controls]
    if len(set(labels)) < len(labels):
        raise ValueError(f"each control needs a label of its own, got {labels}")
    if not caption.strip():
        raise ValueError("the caption is empty: say the one message of the figure")
    sizes = [len(control.texts) for control in controls]
    if math.prod(sizes) > MOST_FRAMES:
        frames = " × ".join(map(str, sizes))
        raise ValueError(
            f"{frames} positions are {math.prod(sizes)} frames; a figure has at most "
            f"{MOST_FRAMES}, so that its page stays small. Use fewer values."
        )


def _name_position(alt: str, names: Sequence[tuple[str, str]]) -> str:
    """Append every ``label value`` that the text does not say by itself."""
    folded = alt.casefold()
    missing = [
        f"{label} {value}" for label, value in names if f"{label} {value}".casefold() not in folded
    ]
    return alt + f" ({', '.join(missing)})" * bool(missing)


def _frame(draw: Callable[..., Figure], values: dict[str, Any], alt: str, dpi: int) -> Frame:
    """Draw one frame, close every figure that drawing opened."""
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    before = set(plt.get_fignums())
    try:
        figure = draw(**values)
        if not isinstance(figure, Figure):
            raise TypeError(
                f"draw({values}) must return a matplotlib Figure, got {type(figure).__name__}"
            )
        buffer = io.BytesIO()
        figure.savefig(
            buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None}
        )
        width, height = figure.get_size_inches()
    finally:
        for number in set(plt.get_fignums()) - before:
            plt.close(number)
    return Frame(_shrink(buffer), alt, float(width), float(height))


def _shrink(buffer: io.BytesIO) -> bytes:
    """The same picture with few colours: less than half the size, the same bytes every time."""
    from PIL import Image

    with Image.open(buffer) as image:
        small = image.convert("RGB").quantize(
            COLOURS, method=Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE
        )
    out = io.BytesIO()
    small.save(out, format="png", optimize=True)
    return out.getvalue()
