"""Pictures in one language: a colour means the same thing in every chapter.

Input-based is blue, grad-output-based is vermillion, exact is grey, an approximation is green.
Matrices share one diverging map centred at zero, one scale for what is to be compared, and lines
between blocks. First used in the section :ref:`kfac-promise`. Needs the ``book`` extra
(matplotlib).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

INPUT = "#0072B2"
"""Colour of the input-based factor A and of all that belongs to inputs."""
GRAD_OUTPUT = "#D55E00"
"""Colour of the grad-output-based factor B and of all that belongs to pseudo-gradients."""
EXACT = "#4A4A4A"
"""Colour of what is exact."""
APPROXIMATION = "#00805F"
"""Colour of an approximation."""
DIVERGING = "RdBu_r"
"""Colour map of matrices, centred at zero."""


LOOK = {
    "figure.dpi": 110,
    "figure.facecolor": "white",
    "font.size": 13.5,
    "axes.titlesize": 16,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "lines.linewidth": 2.0,
    "legend.frameon": False,
}
"""Matplotlib settings of the book's figures."""


@contextmanager
def style() -> Iterator[None]:
    """The fonts, sizes and lines of the book, for a ``with`` block (:ref:`kfac-promise`).

    Example:
        >>> with style():
        ...     pass
    """
    import matplotlib as mpl

    # Not mpl.rc_context: it would also undo what a notebook sets when its first figure is made.
    settings: Any = mpl.rcParams
    saved = {key: settings[key] for key in LOOK}
    settings.update(LOOK)
    try:
        yield
    finally:
        settings.update(saved)


def draw_matrix(
    axes: Any,
    matrix: Tensor,
    *,
    scale: float | None = None,
    blocks: Sequence[int] = (),
    title: str = "",
) -> Any:
    """Draw one matrix on given axes (:ref:`kfac-promise`).

    Args:
        axes: Matplotlib axes.
        matrix: Tensor of shape (rows, columns).
        scale: Absolute value that gets the full colour; the largest when not given.
        blocks: Sizes of the diagonal blocks, to draw lines between them.
        title: Words above the picture.

    Returns:
        The matplotlib image.

    Raises:
        ValueError: If it is no matrix.

    Example:
        >>> from matplotlib.figure import Figure
        >>> image = draw_matrix(Figure().subplots(), torch.eye(3), title="identity")
        >>> image.get_clim()
        (-1.0, 1.0)
    """
    if matrix.ndim != 2:
        raise ValueError(f"A tensor of shape {tuple(matrix.shape)} is no matrix to draw.")
    values = matrix.detach().cpu()
    scale = float(values.abs().max()) if scale is None else scale
    scale = scale or 1.0
    image = axes.imshow(values.numpy(), cmap=DIVERGING, vmin=-scale, vmax=scale)
    edge = -0.5
    for size in list(blocks)[:-1]:
        edge += size
        axes.axhline(edge, color="black", linewidth=0.8)
        axes.axvline(edge, color="black", linewidth=0.8)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_edgecolor("#999999")
    axes.set_title(title)
    return image


def compare_matrices(
    matrices: Mapping[str, Tensor], *, blocks: Sequence[int] = (), scale: float | None = None
) -> Any:
    """Draw matrices side by side on one scale (:ref:`kfac-promise`).

    Args:
        matrices: Title → matrix.
        blocks: Sizes of the diagonal blocks, to draw lines between them.
        scale: Absolute value that gets the full colour; the largest of all when not given.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: If there is nothing to draw.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("agg")
        >>> figure = compare_matrices({"exact": torch.eye(3), "zero": torch.zeros(3, 3)})
        >>> len(figure.axes)
        3
    """
    import matplotlib.pyplot as plt

    if not matrices:
        raise ValueError("There is no matrix to draw.")
    if scale is None:
        scale = max(float(matrix.abs().max()) for matrix in matrices.values())
    with style():
        width = 2.3 * len(matrices) + 0.8
        figure, axes = plt.subplots(
            1, len(matrices), figsize=(width, 2.8), layout="constrained", squeeze=False
        )
        for ax, (title, matrix) in zip(axes[0], matrices.items(), strict=True):
            image = draw_matrix(ax, matrix, scale=scale, blocks=blocks, title=title)
        figure.colorbar(image, ax=list(axes[0]), shrink=0.8, pad=0.02)
    return figure


def relative_error(approximation: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of the exact matrix (:ref:`kfac-promise`).

    Args:
        approximation: Tensor of the shape of ``exact``.
        exact: The truth.

    Returns:
        A number; 0 for a perfect approximation, 1 for one that is as far off as zero.

    Raises:
        ValueError: If the shapes differ, which broadcasting would hide.

    Example:
        >>> relative_error(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0]))
        1.0
    """
    if approximation.shape != exact.shape:
        raise ValueError(
            f"Shapes {tuple(approximation.shape)} and {tuple(exact.shape)} cannot be compared."
        )
    difference, exact = (approximation - exact).detach(), exact.detach()
    return float(torch.linalg.norm(difference) / torch.linalg.norm(exact))
