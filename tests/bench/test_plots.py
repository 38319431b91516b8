"""The benchmarks' pictures: whole, true to scale, named throughout, and no text on another."""

import itertools
from pathlib import Path

import pytest

from lm2_kernels.bench import plots, report, works
from lm2_kernels.figures import style
from lm2_kernels.testing import GPU_SHAPES, SHAPES

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.image import imread
from matplotlib.text import Text

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
# one of each kind: the others differ in their numbers
COMMITTED = ("cpu_avx2_bfloat16", "cpu_avx2_lengths", "cpu_avx2_ops", "cpu_avx512_few_slots")
PAGES = ("#ffffff", "#0d1117")  # GitHub's


def _load(name):
    return report.load(RESULTS / f"{name}.json")


def _extreme():
    """All at once: a fast machine, each shape in two dtypes, ratios from 0.01 to 1000."""
    measured = _load("cpu_avx2_ops")
    kinds = ("bfloat16", "float16")
    measured["ceilings"] |= dict.fromkeys(kinds, 989e12) | {"copy": 3.3e12}
    plain = [r for r in measured["results"] if (r["shape"], r["dtype"]) == ("256", "float32")]
    ratios = itertools.cycle((0.01, 1.0, 1000.0, 1.003, 123.4))
    measured["results"] = [
        result
        | {"shape": shape.name, "dtype": dtype, "seconds": result["seconds"] / 1000.0}
        | ({} if result["ratio"] == 1.0 else {"ratio": next(ratios)})
        for shape in (*SHAPES, *GPU_SHAPES)
        for dtype in kinds
        for result in plain
    ]
    return measured


def _drawn(measured):
    with style():
        for name, figure in plots.figures(measured):
            FigureCanvasAgg(figure).draw()
            yield name, figure


@pytest.fixture(scope="module", params=(*COMMITTED, "extreme"))
def drawn(request):
    measured = _extreme() if request.param == "extreme" else _load(request.param)
    return measured, dict(_drawn(measured))


def _texts(figure):
    """The texts that can be seen: no ticks beyond the ends of an axis, no axes that are off."""
    hidden = set()
    for axes in figure.axes:
        if not axes.axison:
            hidden.update(axes.findobj(Text))
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                if not low <= tick.get_loc() <= high:
                    hidden |= {tick.label1, tick.label2}
    texts = (text for text in figure.findobj(Text) if text not in hidden and text.get_visible())
    return [text for text in texts if text.get_text().strip()]


def _speedups(figures):
    return {name: figure for name, figure in figures.items() if name.startswith("speedup")}


def test_there_is_a_figure_of_everything(drawn):
    measured, figures = drawn
    names = {f"speedup_{r['work'].replace(' ', '_')}" for r in measured["results"]}
    names |= {"roofline"} if any(r["flops"] and r["bytes"] for r in measured["results"]) else set()
    names |= {"lengths"} if measured["lengths"] else set()
    assert set(figures) == names


def test_no_text_lies_on_another_or_outside(drawn):
    for name, figure in drawn[1].items():
        boxes = [(text.get_text(), text.get_window_extent()) for text in _texts(figure)]
        for text, box in boxes:
            assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1, (name, text)
            assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1, (name, text)
        for (text, box), (other, other_box) in itertools.combinations(boxes, 2):
            assert not box.overlaps(other_box), (name, text, other)


def _contrast(colour, page):
    def luminance(colour):
        channels = [
            c / 12.92 if c <= 0.04 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)
        ]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), channels, strict=True))

    low, high = sorted((luminance(colour), luminance(page)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", PAGES)
def test_light_and_dark_pages(drawn, page):
    for name, figure in drawn[1].items():
        assert all(_contrast(text.get_color(), page) > 4.0 for text in _texts(figure)), name
        for axes in figure.axes:
            marks = [patch.get_facecolor() for patch in axes.patches]
            marks += [line.get_color() for line in axes.lines]
            assert all(_contrast(mark, page) > 2.0 for mark in marks), name


def test_files_are_transparent(tmp_path):
    paths = plots.plot(_load("cpu_avx2_lengths"), tmp_path / "new")
    assert [path.name for path in paths] == ["lengths.png", "lengths.svg"]
    assert imread(paths[0])[0, 0, 3] == 0.0
    # the same again, without a date
    again = plots.plot(_load("cpu_avx2_lengths"), tmp_path / "again")
    assert paths[1].read_text("utf-8") == again[1].read_text("utf-8")


def test_the_foot_says_what_it_was_measured_on(drawn):
    measured, figures = drawn
    for name, figure in figures.items():
        foot = " ".join(text.get_text() for text in figure.texts)
        assert report.machine_line(measured) in foot, name
        assert report.ceiling_line(measured) in foot, name
        shapes = {result["shape"] for result in measured["results"]}
        if name != "lengths" and not all(" of " in shape for shape in shapes):
            assert "tokens = slots = width" in foot, name


def test_the_foot_says_what_the_shapes_are():
    (figure,) = (f for n, f in _drawn(_load("cpu_avx2_ops")) if n == "speedup_memory_update")
    foot = [text.get_text() for text in figure.texts]
    sizes = "decode: batch 1, 1 token, 2048 slots, width 2048"
    assert f"256: tokens = slots = width; {sizes}" in foot


def test_bars_start_at_0_and_say_their_number(drawn):
    measured, figures = drawn
    bars = 0
    for figure in _speedups(figures).values():
        for axes in figure.axes:
            assert axes.get_xscale() == "linear" and axes.get_xlim()[0] == 0.0
            lines = axes.get_yticks()
            for bar in axes.patches:
                bars += 1
                middle = bar.get_y() + bar.get_height() / 2.0
                assert bar.get_x() == 0.0 and min(abs(lines - middle)) < 1e-9
                beside = [t for t in axes.texts if abs(t.get_position()[1] - middle) < 1e-9]
                assert [t.get_text().strip() for t in beside] == [report.times(bar.get_width())]
                # clear of the bar and of the reference line
                assert beside[0].get_position()[0] >= max(bar.get_width(), 1.0)
                assert beside[0].get_window_extent().x1 <= axes.bbox.x1
            assert all((line.get_segments()[0][:, 0] == 1.0).all() for line in axes.collections)
            assert len(axes.collections) == len(axes.patches)
    rows = ("cpp", works.LIMIT)
    shown = [r for r in measured["results"] if r["row"] not in rows and r["pass"] != "backward"]
    assert bars == len(shown)


def test_a_bars_colour_says_who_is_faster():
    measured = _load("cpu_avx2_ops")
    (figure,) = (f for n, f in _drawn(measured) if n == "speedup_residual_layer_norm")
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    meaning = {
        patch.get_facecolor(): name
        for patch, name in zip(legend.get_patches(), names, strict=False)
    }
    assert len(meaning) == 3
    assert names.pop() == "cpp = 1"
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    for axes in figure.axes:
        for bar, name in zip(axes.patches, names, strict=True):
            kind = "faster than cpp" if bar.get_width() < 1.0 else "slower than cpp"
            kind = "another of ours" if name == "eager" else kind
            assert meaning[bar.get_facecolor()] == kind


def test_what_is_wrong_is_not_drawn():
    measured = _load("cpu_avx2_float32")
    peer = [r for r in measured["results"] if (r["work"], r["row"]) == ("paper layer", works.SDPA)]
    peer[0]["wrong"] = "this peer"
    whole = dict(_drawn(_load("cpu_avx2_float32")))
    figures = dict(_drawn(measured))

    def bars(figures, name):
        return [bar.get_width() for axes in figures[name].axes for bar in axes.patches]

    missing = bars(whole, "speedup_paper_layer")
    missing.remove(peer[0]["ratio"])
    assert sorted(bars(figures, "speedup_paper_layer")) == sorted(missing)
    # what is by ours is as wrong as ours
    for result in measured["results"]:
        if (result["work"], result["row"]) == ("paper layer", "cpp"):
            result["wrong"] = "ours"
    figures = dict(_drawn(measured))
    assert set(figures) == {"speedup_release_layer", "roofline"}
    titles = [axes.get_title("left") for axes in figures["roofline"].axes]
    assert titles == ["release layer, float32"]
    measured = _load("cpu_avx2_lengths")
    for entry in measured["lengths"]:
        entry["wrong"] = "all"
    assert not list(plots.figures(measured))


def test_what_was_not_measured_has_a_dash():
    measured = _load("cpu_avx2_bfloat16")
    (figure,) = (f for n, f in _drawn(measured) if n == "speedup_release_layer")
    rows, missing = [], []
    for axes in figure.axes:
        labels = (label.get_text() for label in axes.get_yticklabels())
        rows.append(dict(zip(axes.get_yticks(), labels, strict=True)))
        dashes = [t.get_position()[1] for t in axes.texts if t.get_text() == " -"]
        missing.append([rows[-1][place] for place in dashes])
    # from 1024 on compiled, and at 2048 itself with backward
    compiled = f"{works.RELEASED}, compiled"
    assert missing == [[compiled] * 2, [compiled, works.RELEASED, compiled]]
    # a row has one place in both panels, but for what has no forward of its own
    forward, both = rows
    assert forward.items() < both.items()
    assert set(both.values()) - set(forward.values()) == {works.RECOMPUTE}


def test_rooflines_have_their_corner_at_the_ridge(drawn):
    measured, figures = drawn
    if "roofline" not in figures:
        return
    ceilings = measured["ceilings"]
    for axes in figures["roofline"].axes:
        if not axes.axison:
            continue
        rate = ceilings[axes.get_title("left").split(", ")[1]]
        (roof,) = (line for line in axes.lines if line.get_linestyle() != "None")
        first, corner, last = roof.get_xydata()
        unit = {"GFLOP/s": 1e9, "TFLOP/s": 1e12}[axes.get_ylabel().removesuffix(", logarithmic")]
        # it is to be seen that it is: by three labels or more
        bottom, top = axes.get_ylim()
        assert sum(bottom <= tick <= top for tick in axes.get_yticks()) >= 3
        assert corner == pytest.approx((rate / ceilings["copy"], rate / unit))
        assert corner[1] < 10_000.0
        assert first[1] == pytest.approx(first[0] * ceilings["copy"] / unit)
        assert last[1] == corner[1]
        low, high = axes.get_xlim()
        assert low == first[0] < corner[0] < last[0] == high


def test_every_point_of_a_roofline_is_named(drawn):
    measured, figures = drawn
    if "roofline" not in figures:
        return
    (legend,) = figures["roofline"].legends
    names = [text.get_text() for text in legend.get_texts()]
    handles = list(zip(legend.legend_handles, names, strict=True))
    passes = {to_rgba(h.get_color()): name for h, name in handles if h.get_marker() == "None"}
    shapes = {h.get_marker(): name for h, name in handles if h.get_marker() != "None"}
    assert len(passes) + len(shapes) == len(handles)
    found = set()
    for axes in figures["roofline"].axes:
        low, high = axes.get_ylim()
        for point in axes.lines:
            if point.get_linestyle() == "None":
                pass_name = passes[to_rgba(point.get_color())]
                found.add((axes.get_title("left"), pass_name, shapes[point.get_marker()]))
                assert low < point.get_ydata()[0] < high
    assert found == {
        (f"{r['work']}, {r['dtype']}", report.TITLES[r["pass"]], r["shape"])
        for r in measured["results"]
        if r["row"] == "cpp" and r["flops"] and r["bytes"]
    }


def test_growth_has_its_lengths_as_ticks():
    measured = _load("cpu_avx2_lengths")
    ((_, figure),) = _drawn(measured)
    tokens = sorted({entry["tokens"] for entry in measured["lengths"]})
    for axes in figure.axes:
        assert list(axes.get_xticks()) == tokens
        assert [t.get_text() for t in axes.get_xticklabels()] == list(map(str, tokens))
        assert sum(len(line.get_xdata()) for line in axes.lines) == len(measured["lengths"])
        looks = {(line.get_color(), line.get_marker()) for line in axes.lines}
        assert len(looks) == len(axes.lines) == len(figure.legends[0].get_texts())
    # where no peak could be measured, time alone is drawn
    for entry in measured["lengths"]:
        entry["peak_bytes"] = None
    ((_, figure),) = _drawn(measured)
    assert [sum(len(line.get_xdata()) for line in axes.lines) for axes in figure.axes][1] == 0
