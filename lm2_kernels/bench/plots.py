"""Pictures of what :mod:`lm2_kernels.bench.suite` measured: speed-ups, rooflines, growth with T."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from lm2_kernels.bench import works
from lm2_kernels.bench.report import (
    TITLES,
    ceiling_line,
    group_results,
    machine_line,
    mark,
    number,
    our_row,
    times,
)
from lm2_kernels.figures import (
    BLUE,
    COLOURS,
    GREY,
    INK,
    VERMILLION,
    add_legend,
    figure_class,
    new_figure,
    save,
    style,
)
from lm2_kernels.testing.cases import ALL_SHAPES

_MARKERS = "osD^vPX*<>phd8"
_PASSES = ("forward", "both")  # those that users wait for
_LINE_INCHES = 0.2  # of a bar, and of what stands above a shape's bars
# the line at 1 crosses coloured bars, and pages of any colour
_ONE = {"color": INK, "linewidth": 1.0}


def check_folder(folder: Path) -> None:
    """Raise ValueError unless :func:`plot` may draw into a folder, as far as can be told before."""
    figure_class()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--plots {folder} is no folder")


def plot(report: dict, folder: Path) -> list[Path]:
    """Draw :func:`figures` into files of a folder, which is made if need be. Returns the files.

    Of each there is a ``.png`` and a ``.svg``.

    Raises:
        ValueError: matplotlib is not there.
    """
    figure_class()
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with style():
        for name, figure in figures(report):
            drawn += save(figure, folder / name)
    return drawn


def figures(report: dict) -> Iterator[tuple[str, object]]:
    """Names and figures: of each work the speed-ups, the rooflines, time and memory against T.

    Rows that disagree with the oracle, and what is a ratio to one, are left out. There is no figure
    of what was not measured.

    Raises:
        ValueError: matplotlib is not there.
    """
    groups = group_results(report).values()
    results = [r for group in groups for name, r in group.items() if not mark(group, name)]
    right = report | {"results": results}
    for work in dict.fromkeys(result["work"] for result in results):
        ours, compared = _compared(right, work)
        if compared:
            foot = _foot(report, (shape for _, shape, _ in compared))
            yield f"speedup_{work.replace(' ', '_')}", _speedup(work, ours, compared, foot)
    panels = _roofline_panels(right)
    if panels:
        foot = _foot(report, (r["shape"] for panel in panels.values() for r in panel))
        yield "roofline", _rooflines(report["ceilings"], panels, foot)
    lengths = [entry for entry in report["lengths"] if not entry.get("wrong")]
    if lengths:
        yield "lengths", _lengths(lengths, _foot(report, ()))


def _foot(report: dict, shapes: Iterable[str]) -> list[str]:
    """What it was measured on, and what the names of shapes stand for."""
    shapes = dict.fromkeys(shapes)
    known = [shape for shape in ALL_SHAPES if shape.name in shapes]
    square = [s for s in known if s.name == str(s.tokens) and s.tokens == s.slots == s.dim]
    sizes = [f"{', '.join(s.name for s in square)}: tokens = slots = width"] if square else []
    sizes += [
        f"{s.name}: batch {s.batch}, {s.tokens} token{'s' * (s.tokens > 1)}, {s.slots} slots, "
        f"width {s.dim}"
        for s in known
        if s not in square
    ]
    return [machine_line(report), ceiling_line(report), *(["; ".join(sizes)] if sizes else [])]


# --- speed-ups ---------------------------------------------------------------------------------


_Groups = dict[tuple[str, str, str], dict[str, dict]]  # by dtype, shape and pass; each by row


def _compared(report: dict, work: str) -> tuple[str | None, _Groups]:
    """Our row of a work, and the groups that have others beside it."""
    groups = {key: group for key, group in group_results(report).items() if key[0] == work}
    ours = our_row(groups)
    return ours, {
        (dtype, shape, pass_name): group
        for (_, shape, dtype, pass_name), group in groups.items()
        if pass_name in _PASSES and ours in group and _others(group, ours)
    }


def _others(group: dict[str, dict], ours: str) -> list[str]:
    # a limit is nothing that could be used in place of ours
    return [name for name in group if name not in (ours, works.LIMIT)]


def _speedup(work: str, ours: str, groups: _Groups, foot: list[str]) -> object:
    """A line of panels a dtype, a column a pass: each with an axis of its own, from 0."""
    passes = [name for name in _PASSES if any(key[2] == name for key in groups)]
    places = {dtype: _places(groups, dtype, ours) for dtype, _, _ in groups}
    heights = [_LINE_INCHES * (1.0 + max(lines.values())) for lines in places.values()]
    size = (5.2 * len(passes), 1.1 + sum(0.75 + height for height in heights))
    figure = new_figure(size, f"{work}: how long others take", foot)
    grid = figure.subplots(len(places), len(passes), squeeze=False, height_ratios=heights)
    for (dtype, lines), panels in zip(places.items(), grid, strict=True):
        for pass_name, axes in zip(passes, panels, strict=True):
            axes.set_title(f"{TITLES[pass_name]}, {dtype}")
            own = {key[1]: g for key, g in groups.items() if key[::2] == (dtype, pass_name)}
            _draw_bars(axes, own, ours, lines)
    for axes in grid[-1]:
        axes.set_xlabel(f"time, {ours} = 1")
    _bar_legend(figure, ours, groups)
    return figure


def _places(groups: _Groups, dtype: str, ours: str) -> dict[tuple[str, str | None], float]:
    """Where a dtype's bars stand, by shape and row, and the headings of shapes, by None.

    Each row has a place at every shape: where it was not measured, that is to be seen.
    """
    own = [(shape, group) for (of, shape, _), group in groups.items() if of == dtype]
    names = dict.fromkeys(name for _, group in own for name in _others(group, ours))
    places, line = {}, 0.0
    for shape in dict.fromkeys(shape for shape, _ in own):
        for name in (None, *names):
            places[shape, name] = line
            line += 1.0
        line += 0.3
    return places


def _draw_bars(
    axes, by_shape: dict[str, dict[str, dict]], ours: str, places: dict[tuple, float]
) -> None:
    def write(place: float, start: float, text: str, **options: object) -> None:
        axes.text(start, place, f" {text}", va="center", fontsize=8, **options)

    longest, bars = 1.0, {}
    measured = {name for group in by_shape.values() for name in group}
    for (shape, name), place in places.items():
        group = by_shape.get(shape, {})
        if name is None:
            took = f": {ours} takes {number(1e3 * group[ours]['seconds'])} ms" if group else ""
            write(place, 0.0, shape + took, fontweight="bold")
            continue
        # a row without a pass has no place in its panel, but the other panel's stay beside it
        if name not in measured:
            continue
        bars[place] = name
        if name not in group:
            write(place, 0.0, "-")
            continue
        ratio = group[name]["ratio"]
        longest = max(longest, ratio)
        axes.barh(place, ratio, 0.72, color=_bar_colour(group[name]))
        axes.vlines(1.0, place - 0.5, place + 0.5, path_effects=_white_edge(), **_ONE)
        # clear of the line at 1
        write(place, max(ratio, 1.0), times(ratio))
    axes.set_yticks(list(bars), bars.values(), fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(max(places.values()) + 0.6, -0.6)
    # the rest is for the number beside the longest bar
    axes.set_xlim(0.0, 1.2 * longest)
    axes.locator_params(axis="x", nbins=5)


def _bar_colour(other: dict) -> str:
    if other["is_ours"]:
        return GREY
    return VERMILLION if other["ratio"] < 1.0 else BLUE


def _white_edge() -> list:
    from matplotlib.patheffects import withStroke  # noqa: PLC0415 - an extra

    return [withStroke(linewidth=2.0, foreground="white")]


def _bar_legend(figure, ours: str, groups: _Groups) -> None:
    from matplotlib.lines import Line2D  # noqa: PLC0415 - an extra
    from matplotlib.patches import Patch  # noqa: PLC0415 - an extra

    labels = {
        BLUE: f"slower than {ours}",
        VERMILLION: f"faster than {ours}",
        GREY: "another of ours",
    }
    used = {_bar_colour(g[name]) for g in groups.values() for name in _others(g, ours)}
    handles = [Patch(color=colour, label=labels[colour]) for colour in labels if colour in used]
    edge = _white_edge()
    handles.append(
        Line2D(
            [],
            [],
            linestyle="",
            marker="|",
            markersize=10,
            markeredgewidth=_ONE["linewidth"],
            color=_ONE["color"],
            path_effects=edge,
            label=f"{ours} = 1",
        )
    )
    add_legend(figure, handles, len(handles))


# --- rooflines ---------------------------------------------------------------------------------


def _roofline_panels(report: dict) -> dict[tuple[str, str], list[dict]]:
    """What our best backend reached, by work and dtype, where FLOPs and bytes are known."""
    panels: dict[tuple[str, str], list[dict]] = {}
    for work in dict.fromkeys(result["work"] for result in report["results"]):
        own = [result for result in report["results"] if result["work"] == work]
        ours = next((result["row"] for result in own if result["is_ours"]), None)
        for result in own:
            # a replayed graph has the place of what is launched, all but
            is_plain = result["row"] == ours and result["pass"] in works.PASSES
            if is_plain and result["flops"] and result["bytes"]:
                panels.setdefault((work, result["dtype"]), []).append(result)
    return panels


def _rooflines(
    ceilings: dict[str, float], panels: dict[tuple[str, str], list[dict]], foot: list[str]
) -> object:
    """A panel a work and dtype; a point's colour is its pass, its marker its shape."""
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    results = [result for panel in panels.values() for result in panel]
    ours = " and ".join(dict.fromkeys(result["row"] for result in results))
    title = f"{ours} below the measured ceilings"
    figure = new_figure((4.6 * columns, 1.2 + 3.2 * lines), title, foot)
    grid = figure.subplots(lines, columns, squeeze=False).flat
    colours = dict(zip(works.PASSES, COLOURS, strict=False))
    shapes = dict.fromkeys(result["shape"] for result in results)
    markers = {shape: _MARKERS[index % len(_MARKERS)] for index, shape in enumerate(shapes)}
    for axes, ((work, dtype), panel) in zip(grid, panels.items(), strict=False):
        axes.set_title(f"{work}, {dtype}")
        _draw_roof(axes, ceilings["copy"], ceilings[dtype], panel)
        for result in panel:
            style = {"color": colours[result["pass"]], "marker": markers[result["shape"]]}
            point = _point(result, _unit(ceilings[dtype])[0])
            axes.plot(*point, linestyle="", markersize=7, alpha=0.9, **style)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    _point_legend(figure, {result["pass"]: colours[result["pass"]] for result in results}, markers)
    return figure


def _unit(rate: float) -> tuple[float, str]:
    """What a panel with this ceiling counts FLOPs a second in."""
    return (1e12, "TFLOP/s") if rate >= 1e13 else (1e9, "GFLOP/s")


def _point(result: dict, unit: float) -> tuple[float, float]:
    """FLOPs a byte and a second."""
    return result["flops"] / result["bytes"], result["flops"] / result["seconds"] / unit


def _draw_roof(axes, copy: float, rate: float, panel: list[dict]) -> None:
    unit, unit_name = _unit(rate)
    ridge, slope, top = rate / copy, copy / unit, rate / unit
    xs, ys = zip(*(_point(result, unit) for result in panel), strict=True)
    # the slope begins in the corner, or left of all points
    low = min(*ys, top / 2.0) / 1.2
    first, last = min(min(xs) / 1.5, low / slope), 2.0 * max(*xs, ridge)
    low, high = min(low, slope * first), max(*ys, top)
    axes.plot([first, ridge, last], [slope * first, top, top], color=INK, linewidth=1.5)
    axes.text(last, 1.05 * top, f"{number(top)} {unit_name}", ha="right", va="bottom")
    middle = math.sqrt(first * ridge)
    axes.text(
        middle,
        1.1 * slope * middle,
        f"{number(copy / 1e9)} GB/s",
        rotation=math.degrees(math.atan(slope)),
        rotation_mode="anchor",
        transform_rotates_text=True,
        ha="center",
        va="bottom",
    )
    _logarithmic(axes)
    axes.set(xlabel="FLOPs per byte", ylabel=f"{unit_name}, logarithmic", xlim=(first, last))
    # the rest is for the number above the roof
    axes.set_ylim(low, high * (high / low) ** 0.15)
    if high < 10.0 * low:
        _more_ticks(axes.yaxis, (1, 1.5, 2, 3, 4, 5, 6, 8) if high < 4.0 * low else (1, 2, 3, 5, 7))


def _logarithmic(axes) -> None:
    """Both axes, with plain numbers that are few enough to stand apart."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter  # noqa: PLC0415

    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _more_ticks(axis, labelled: tuple[float, ...]) -> None:
    """Of an axis that is a decade long or less: so that it is seen to be logarithmic."""
    from matplotlib.ticker import LogLocator, NullFormatter  # noqa: PLC0415 - an extra

    axis.set_major_locator(LogLocator(subs=labelled))
    axis.set_minor_locator(LogLocator(subs=sorted(set(range(2, 10)) - set(labelled))))
    axis.set_minor_formatter(NullFormatter())


def _point_legend(figure, colours: dict[str, str], markers: dict[str, str]) -> None:
    from matplotlib.lines import Line2D  # noqa: PLC0415 - an extra

    handles = [Line2D([], [], color=c, linewidth=5, label=TITLES[n]) for n, c in colours.items()]
    handles += [
        Line2D([], [], color=INK, linestyle="", marker=marker, label=shape)
        for shape, marker in markers.items()
    ]
    add_legend(figure, handles, len(handles) if len(handles) <= 7 else 5)


# --- growth ------------------------------------------------------------------------------------


def _lengths(entries: list[dict], foot: list[str]) -> object:
    figure = new_figure((9.0, 4.2), "memory_attention, forward and backward", foot)
    panels = figure.subplots(1, 2)
    rows = dict.fromkeys(entry["row"] for entry in entries)
    tokens = list(dict.fromkeys(entry["tokens"] for entry in entries))
    for axes, key, unit, title in zip(
        panels,
        ("seconds", "peak_bytes"),
        (1.0, 2**20),
        ("time, s", "peak memory beyond the inputs, MiB"),
        strict=True,
    ):
        axes.set_title(title)
        _logarithmic(axes)
        for index, row in enumerate(rows):
            # a peak that could not be measured is None
            own = {e["tokens"]: e[key] / unit for e in entries if e["row"] == row and e[key]}
            style = {"color": COLOURS[index % 5], "marker": _MARKERS[index % len(_MARKERS)]}
            axes.plot(own.keys(), own.values(), label=row, **style)
        axes.set_xticks(tokens)
        axes.set_xlabel("tokens = slots")
    add_legend(figure, panels[0].get_legend_handles_labels()[0], 5)
    return figure
