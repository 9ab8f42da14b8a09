"""Draw the picture of the landing page, from real matrices: what KFAC does to a curvature matrix.

Run it after a change of the library's colours or of the example: python scripts/draw_hero.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.patches import Rectangle

from kfac_lib import KFAC
from kfac_lib.curvature import ggn, ggn_blocks
from kfac_lib.examples import little_sister
from kfac_lib.plotting import EXACT, GRAD_OUTPUT, INPUT, draw_matrix, style

TARGET = Path(__file__).parent.parent / "book" / "_static" / "hero.png"


def tinted(matrix: torch.Tensor, colour: str) -> object:
    """Colours of one factor: white at zero, the factor's hue at its largest entry."""
    ramp = LinearSegmentedColormap.from_list(colour, ["#ffffff", colour])
    size = matrix.abs() / matrix.abs().max()
    return ramp(Normalize(0, 1)(size.sqrt().numpy()))


def main() -> None:
    """Write the picture."""
    model, loss_func, X, y = little_sister(N=8)
    whole = ggn(model, loss_func, (X, y), order="cvec").detach()
    blocks = [b.detach() for b in ggn_blocks(model, loss_func, (X, y), order="cvec").values()]
    kfac = KFAC.compute(model, loss_func, (X, y))
    sizes = [len(b) for b in blocks]
    total = sum(sizes)
    with style(), mpl.rc_context({"font.size": 15, "axes.titlesize": 17}):
        figure, axes = plt.subplots(1, 3, figsize=(13, 4.9), layout="constrained")
        scale = 0.45 * float(whole.abs().max())
        draw_matrix(axes[0], whole, scale=scale, blocks=sizes)
        axes[0].set_title("all parameters at once", pad=10)
        draw_matrix(axes[1], torch.block_diag(*blocks), scale=scale, blocks=sizes)
        axes[1].set_title("one block for each layer", pad=10)
        ax = axes[2]
        ax.set_title("two small factors for each block", pad=10)
        ax.set(xlim=(-0.5, total - 0.5), ylim=(total - 0.5, -0.5), aspect="equal")
        ax.set_xticks([])
        ax.set_yticks([])
        for spine in ax.spines.values():
            spine.set_visible(True)
            spine.set_edgecolor("#999999")
        start = 0.0
        for size, K in zip(sizes, kfac.values(), strict=True):
            ax.add_patch(
                Rectangle((start - 0.5, start - 0.5), size, size, fill=False, edgecolor=EXACT)
            )
            a, b = len(K.A) * 1.15, len(K.B) * 1.15
            gap = (size - a - b - 4) / 2
            middle = start + size / 2 - 0.5
            for factor, colour, left, width in (
                (K.A, INPUT, start + gap, a),
                (K.B, GRAD_OUTPUT, start + gap + a + 4, b),
            ):
                extent = (left - 0.5, left + width - 0.5, middle + width / 2, middle - width / 2)
                ax.imshow(tinted(factor.detach(), colour), extent=extent, zorder=2)
                ax.add_patch(
                    Rectangle(
                        (extent[0], extent[3]), width, width, fill=False, edgecolor=colour, lw=1.5
                    )
                )
            ax.text(start + gap + a + 1.5, middle, "⊗", ha="center", va="center", fontsize=15)
            start += size
        ax.set(xlim=(-0.5, total - 0.5), ylim=(total - 0.5, -0.5))
        ax.text(total - 2, 3.5, "A from the inputs", color=INPUT, ha="right", va="center")
        ax.text(total - 2, 9, "B from the gradients", color="#B34700", ha="right", va="center")
        figure.savefig(TARGET, dpi=110, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    main()
