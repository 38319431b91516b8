"""Figures that all pictures of this package are made of; matplotlib is an extra.

One picture serves light pages and dark ones, as two files would have to be chosen between wherever
one is shown: its ground is transparent, ink and colours lie between white and black. The colours
are those of Okabe and Ito, which the colour-blind tell apart.
"""

import contextlib
import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = [
    "BLUE",
    "COLOURS",
    "GREY",
    "INK",
    "VERMILLION",
    "add_legend",
    "draw_heat",
    "figure_class",
    "new_figure",
    "save",
    "style",
]

INK, GREY = "#777777", "#a6a6a6"
BLUE, VERMILLION, _GREEN, _PURPLE, _SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"
COLOURS = (BLUE, VERMILLION, _GREEN, _PURPLE, _SKY)
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.transparent": True,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    # the same file from the same numbers
    "svg.hashsalt": "lm2_kernels",
}
_DPI = 150
_FOOT_SIZE, _FOOT_INCHES, _FOOT_CHARACTERS = 7, 0.14, 17  # of the foot: a line, those of an inch


def figure_class(extra: str = "bench") -> type:
    """The class Figure of matplotlib: not pyplot, as nothing here asks for a display.

    Args:
        extra: of this package, which brings matplotlib.

    Raises:
        ValueError: matplotlib is not there.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ValueError(f'plots need matplotlib: pip install "lm2_kernels[{extra}]"') from error
    return Figure


def save(figure: object, path: Path) -> list[Path]:
    """Write a figure to ``path`` with ``.png`` and with ``.svg`` at its end. Returns the files."""
    files = [path.with_name(f"{path.name}.{kind}") for kind in ("png", "svg")]
    figure.savefig(files[0], dpi=_DPI)
    figure.savefig(files[1], metadata={"Date": None})
    return files


def style() -> contextlib.AbstractContextManager[None]:
    """What figures are to be made and drawn in."""
    import matplotlib  # noqa: PLC0415 - an extra

    return matplotlib.rc_context(_STYLE)


def new_figure(size: tuple[float, float], title: str, foot: Iterable[str] = ()) -> object:
    """A figure with a title above and small lines below, which wrap; in :func:`style`."""
    lines = [
        line for text in foot for line in textwrap.wrap(text, int(_FOOT_CHARACTERS * size[0] - 2))
    ]
    below = 0.1 + _FOOT_INCHES * len(lines) if lines else 0.0
    height = size[1] + below
    figure = figure_class()(figsize=(size[0], height), layout="constrained")
    share = below / height
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08, rect=(0.0, share, 1.0, 1.0 - share))
    figure.suptitle(title, fontsize=11, fontweight="bold")
    for index, line in enumerate(lines):
        place = (0.1 / size[0], (below - _FOOT_INCHES * index) / height)
        figure.text(*place, line, va="top", fontsize=_FOOT_SIZE)
    return figure


def add_legend(figure, handles: list, columns: int) -> None:
    """Below the panels and above the foot."""
    # "outside" of a legend knows the figure's edge alone
    engine, inches = figure.get_layout_engine(), figure.get_figheight()
    (_, below, *_) = engine.get()["rect"]
    figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, below), ncols=columns)
    below += (0.1 + 0.22 * math.ceil(len(handles) / columns)) / inches
    engine.set(rect=(0.0, below, 1.0, 1.0 - below))


def draw_heat(
    axes,
    values: Sequence[Sequence[float]],  # by row and column; NaN shows as nothing
    *,
    low: float = 0.0,
    high: float = 1.0,
    texts: Sequence[Sequence[str]] | None = None,
) -> object:
    """A heat map in a panel, the first row above; returns what a colour bar is made from.

    Args:
        axes: the panel.
        values: numbers; those beyond ``low`` and ``high`` show as these.
        low: of the scale.
        high: of the scale.
        texts: what is written into each cell.
    """
    image = axes.imshow(
        values, cmap="cividis", vmin=low, vmax=high, aspect="auto", interpolation="nearest"
    )
    axes.spines[:].set_visible(False)
    for row, line in enumerate(texts or ()):
        for column, text in enumerate(line):
            # cividis is dark below
            is_dark = values[row][column] < (low + high) / 2.0
            colour = "white" if is_dark else "black"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    return image
