"""Tables, comparisons and plots of what :mod:`lm2_kernels.bench.suite` measured."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from lm2_kernels.bench import works
from lm2_kernels.bench.suite import FORMAT, GRAPH
from lm2_kernels.terminal import columns

_TITLES = {"forward": "forward", "backward": "backward", "both": "forward and backward"}
_TITLES |= {name + GRAPH: f"{_TITLES[name]} in a CUDA graph" for name in ("forward", "both")}
# beside every number that a row which disagrees with the oracle has a part in
_MARK = "!"
_GRAPHS = "eager launches and replays of a CUDA graph, ms"
_LENGTHS = "attention forward and backward as T grows: time, peak memory beyond the inputs"
_Key = tuple[str, str, str, str]  # work, shape, dtype, pass


def load(path: Path) -> dict:
    """A report from a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no report, or of another format.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        found = report["format"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file that `bench --json` wrote: {error}") from error
    if found != FORMAT:
        raise ValueError(f"{path} has format {found}, this version reads {FORMAT}")
    return report


def render(report: dict) -> str:
    """The text that the command prints: for each pass, our time and how much faster it is."""
    lines = [machine_line(report), _ceiling_line(report)]
    for title, table in tables(report).items():
        lines += ["", title, *(f"  {line}" for line in columns(table))]
    lines += _memory_lines(report)
    graphs = _graph_table(report)
    lines += ["", _GRAPHS, *(f"  {line}" for line in columns(graphs))] if graphs else []
    wrong = wrong_rows(report)
    lines += ["", *(f"{_MARK} {text}" for text in wrong)] if wrong else []
    lines += ["", *(f"left out: {text}" for text in report["skipped"])] if report["skipped"] else []
    return "\n".join(lines)


def wrong_rows(report: dict, is_ours: bool = False) -> list[str]:
    """What is said of rows that disagree with the oracle: of all, or of ours alone."""
    found = [r for r in (*report["results"], *report["lengths"]) if r.get("wrong")]
    return list(dict.fromkeys(r["wrong"] for r in found if r["is_ours"] or not is_ours))


def machine_line(report: dict) -> str:
    """What it was measured on."""
    machine = report["machine"]
    kind = next(
        (entry for entry in machine["devices"] if entry["device"].startswith(report["device"])),
        machine["devices"][0],
    )
    versions = machine["versions"]
    parts = [kind["name"]]
    if report["device"] == "cpu":
        parts += [f"{kind['threads']} threads", machine["cpu_level"]]
    else:
        parts.append(f"driver {versions['gpu driver']}")
    parts += [f"torch {versions['torch']}", f"triton {versions['triton']}"]
    allocator = ", ".join(f"{k}={v}" for k, v in machine["allocator"].items())
    return ", ".join(parts) + f"; allocator: {allocator or 'default'}"


def _ceiling_line(report: dict) -> str:
    ceilings = dict(report["ceilings"])
    copy = ceilings.pop("copy")
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in ceilings.items())
    return f"measured ceilings: copy {copy / 1e9:.1f} GB/s, products {rates}"


def _groups(report: dict) -> dict[_Key, dict[str, dict]]:
    groups: dict[_Key, dict[str, dict]] = {}
    for result in report["results"]:
        key = (result["work"], result["shape"], result["dtype"], result["pass"])
        groups.setdefault(key, {})[result["row"]] = result
    return groups


def tables(report: dict, names: Sequence[str] = ()) -> dict[str, list]:
    """For each work and pass a table: a line a shape and dtype, a column a row.

    The columns of peers say how many times as fast our first backend is, as medians of paired
    rounds; "limit" says which share of its speed we reach.
    """
    groups = _groups(report)
    found = {}
    for work in dict.fromkeys(key[0] for key in groups):
        for pass_name, title in _TITLES.items():
            own = {k: g for k, g in groups.items() if (k[0], k[3]) == (work, pass_name)}
            if not own or (names and work not in names):
                continue
            found[f"{work}, {title}"] = _table(own)
    return found


def _table(groups: dict[_Key, dict[str, dict]]) -> list[list[str]]:
    rows = list(dict.fromkeys(name for group in groups.values() for name in group))
    ours = _ours(groups) or rows[0]
    others = [name for name in rows if name not in (ours, works.LIMIT)]
    limit = [works.LIMIT] if works.LIMIT in rows else []
    light = any(group[ours]["light_share"] for group in groups.values() if ours in group)
    head = ["shape", "dtype", f"{ours}, ms", *others]
    head += ["of limit"] * bool(limit) + ["of light"] * light + ["rounds"]
    table = [head]
    for (_, shape, dtype, _), group in groups.items():
        if ours not in group:
            continue
        line = [shape, dtype, _number(1e3 * group[ours]["seconds"]) + _mark(group, ours)]
        line += [_times(_ratio(group, name)) + _mark(group, name) for name in others]
        if limit:
            line.append(_percent(_ratio(group, works.LIMIT)) + _mark(group, works.LIMIT))
        if light:
            line.append(_percent(group[ours]["light_share"]) + _mark(group, ours))
        table.append([*line, str(group[ours]["rounds"])])
    for dtype in dict.fromkeys(dtype for _, _, dtype, _ in groups):
        own = [group for key, group in groups.items() if key[2] == dtype]
        if len(own) == 1:
            continue
        ratios = [
            [None if _mark(group, name) else _ratio(group, name) for group in own]
            for name in others
        ]
        # a mean over fewer lines than the others' would not be theirs to compare with
        means = [None if None in column else statistics.geometric_mean(column) for column in ratios]
        line = ["geometric mean", dtype, "", *map(_times, means)]
        table.append(line + [""] * (len(head) - len(line)))
    return table


def _ours(groups: dict[_Key, dict[str, dict]]) -> str | None:
    """Our best backend: it comes first."""
    results = (result for group in groups.values() for result in group.values())
    return next((result["row"] for result in results if result["is_ours"]), None)


def _mark(group: dict[str, dict], name: str) -> str:
    """Of a number of this row, which is by ours: nothing where both are right."""
    ours = next((result for result in group.values() if result["is_ours"]), {})
    is_wrong = ours.get("wrong") or group.get(name, {}).get("wrong")
    return _MARK if is_wrong and name in group else ""


def _ratio(group: dict[str, dict], name: str) -> float | None:
    """None where the row, or ours that it is a ratio to, was not measured."""
    return group[name]["ratio"] if name in group else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _times(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio:.2f}x" if ratio < 100.0 else f"{ratio:.0f}x"


def _saved_table(report: dict) -> list[list[str]]:
    """What each row of a layer keeps between forward and backward; empty if not measured."""
    saved: dict[tuple[str, str, str], dict[str, int]] = {}
    for result in report["results"]:
        if "saved_bytes" in result and result["work"].endswith(" layer"):
            key = (result["work"], result["shape"], result["dtype"])
            saved.setdefault(key, {})[result["row"]] = result["saved_bytes"]
    rows = list(dict.fromkeys(name for by_row in saved.values() for name in by_row))
    table = [["layer", "shape", "dtype", *rows]]
    for key, by_row in saved.items():
        table.append([*key, *(_mebibytes(by_row.get(name)) for name in rows)])
    return table if saved else []


def _graph_table(report: dict) -> list[list[str]]:
    """Each row by eager launches and by a graph; empty if no graph was measured."""
    passes = ("forward", "both")
    head = [f"{_TITLES[name]}{how}" for name in passes for how in ("", ", graph")]
    table = [["work", "shape", "dtype", "row", *head]]
    keys = dict.fromkeys(key[:3] for key in _groups(report) if key[3].endswith(GRAPH))
    groups = _groups(report)
    for key in keys:
        own = [groups.get((*key, name + how), {}) for name in passes for how in ("", GRAPH)]
        for row in dict.fromkeys(name for group in own for name in group):
            cells = [
                _number(1e3 * group[row]["seconds"]) + _MARK * bool(group[row].get("wrong"))
                if row in group
                else "-"
                for group in own
            ]
            table.append([*key, row, *cells])
    return table if keys else []


def _memory_lines(report: dict) -> list[str]:
    lines = []
    saved = _saved_table(report)
    if saved:
        lines += ["", "MiB kept for backward", *(f"  {line}" for line in columns(saved))]
    if report["lengths"]:
        lines += ["", _LENGTHS, *(f"  {line}" for line in columns(_lengths_table(report)))]
    return lines


def _lengths_table(report: dict) -> list[list[str]]:
    rows = list(dict.fromkeys(entry["row"] for entry in report["lengths"]))
    table = [["T = N", *(f"{row}, {unit}" for row in rows for unit in ("s", "MiB"))]]
    for tokens in dict.fromkeys(entry["tokens"] for entry in report["lengths"]):
        own = {e["row"]: e for e in report["lengths"] if e["tokens"] == tokens}
        line = [str(tokens)]
        for row in rows:
            entry = own.get(row)
            mark = _MARK if entry and entry.get("wrong") else ""
            line += [_number(entry["seconds"]) + mark if entry else "-"]
            line += [_mebibytes(entry["peak_bytes"]) if entry else "-"]
        table.append(line)
    return table


def _mebibytes(count: int | None) -> str:
    return "-" if count is None else _number(count / 2**20)


def _number(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def markdown(table: list[list[str]]) -> list[str]:
    """A table in Markdown."""
    lines = [f"| {' | '.join(line)} |" for line in table]
    return [lines[0], "|" + "---|" * len(table[0]), *lines[1:]]


def compare(first: dict, second: dict) -> str:
    """How many times as fast the second report is, row by row.

    What changes in the rows of peers too is the machine's doing.
    """
    before, after = _groups(first), _groups(second)
    table = [["work", "shape", "dtype", "pass", "row", "before, ms", "after, ms", "faster"]]
    for key in before:
        for name, result in before[key].items():
            other = after.get(key, {}).get(name)
            if other is None:
                continue
            times = (result["seconds"], other["seconds"])
            marks = [_MARK * bool(r.get("wrong")) for r in (result, other)]
            cells = [_number(1e3 * t) + mark for t, mark in zip(times, marks, strict=True)]
            table.append([*key, name, *cells, _times(times[0] / times[1])])
    if len(table) == 1:
        raise ValueError("the two files have no measurement in common")
    lines = [f"before: {machine_line(first)}", f"after:  {machine_line(second)}", *columns(table)]
    return "\n".join(lines)


# --- README ------------------------------------------------------------------------------------


def readme(report: dict, layers: Sequence[str] = ("release layer", "paper layer")) -> str:
    """README's tables and charts in Markdown: the layers, forward alone and with backward."""
    lines = [f"{machine_line(report)}; {_ceiling_line(report)}.", ""]
    for title, table in tables(report, layers).items():
        if not title.endswith(", backward"):
            lines += [f"**{title}**", "", *markdown(table), ""]
    for layer in layers:
        lines += _chart(report, layer)
    saved = _saved_table(report)
    if saved:
        title = "**MiB kept for backward, beside inputs and parameters**"
        lines += [title, "", *markdown(saved), ""]
    if report["lengths"]:
        lines += [f"**{_LENGTHS}**", "", *markdown(_lengths_table(report)), ""]
    lines += [f"{_MARK} {text}." for text in wrong_rows(report)]
    lines += [f"Left out: {text}." for text in report["skipped"]]
    return "\n".join(lines).rstrip() + "\n"


def _chart(report: dict, layer: str) -> list[str]:
    """Forward and backward of a layer by each peer, ours being 1, for Mermaid to draw."""
    groups = {k: g for k, g in _groups(report).items() if (k[0], k[3]) == (layer, "both")}
    rows = {name: result for group in groups.values() for name, result in group.items()}
    series = {
        name: [None if _mark(group, name) else _ratio(group, name) for group in groups.values()]
        for name in rows
    }
    ours = _ours(groups)
    # a chart has no gaps, and what is ours but not our best is no peer
    peers = [
        name
        for name in rows
        if not rows[name]["is_ours"] and name != works.LIMIT and None not in series[name]
    ]
    dtypes = {dtype for _, _, dtype, _ in groups}
    if not peers or ours is None or None in series[ours] or len(dtypes) != 1:
        return []
    top = math.ceil(2.0 * max(max(series[name]) for name in (*peers, ours))) / 2.0
    drawn = [("bar", peers[0]), *(("line", name) for name in (*peers[1:], ours))]
    label = ", ".join(f"{kind}: {name}" for kind, name in drawn)
    return [
        "```mermaid",
        "xychart-beta",
        f'    title "{layer}, forward and backward"',
        f"    x-axis [{', '.join(shape for _, shape, _, _ in groups)}]",
        f'    y-axis "{label}" 0 --> {top:g}',
        *(f"    {kind} [{', '.join(f'{r:.2f}' for r in series[name])}]" for kind, name in drawn),
        "```",
        "",
    ]


# --- plots -------------------------------------------------------------------------------------


def figure_class() -> type:
    """The class Figure of matplotlib: not pyplot, as nothing here asks for a display.

    Raises:
        ValueError: matplotlib is not there.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ValueError('plots need matplotlib: pip install "lm2_kernels[demo]"') from error
    return Figure


def plot(report: dict, folder: Path) -> list[Path]:
    """Draw speed-up bars, the roofline, and time and memory against T. Returns the files.

    Rows that disagree with the oracle, and what is a ratio to one, are left out.

    Raises:
        ValueError: matplotlib is not there.
    """
    figure_type, report = figure_class(), _right(report)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []

    def save(figure, name: str) -> None:
        drawn.append(folder / name)
        figure.savefig(drawn[-1], dpi=150)

    if any(result["pass"] in ("forward", "both") for result in report["results"]):
        save(_bars(figure_type, report), "speedup.png")
    if any(map(_has_intensity, report["results"])):
        save(_roofline(figure_type, report), "roofline.png")
    if report["lengths"]:
        save(_lengths(figure_type, report), "lengths.png")
    return drawn


def _right(report: dict) -> dict:
    """The report without what is not to be drawn: rows that disagree, or are a ratio to one."""
    groups = _groups(report).values()
    results = [r for group in groups for name, r in group.items() if not _mark(group, name)]
    lengths = [entry for entry in report["lengths"] if not entry.get("wrong")]
    return report | {"results": results, "lengths": lengths}


def _bars(figure_type: type, report: dict):
    groups = {k: g for k, g in _groups(report).items() if k[3] in ("forward", "both")}
    count = len(groups)
    figure = figure_type(figsize=(8, 1.5 + 0.6 * count), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    names = [name for name in names if name != works.LIMIT]
    height = 0.8 / len(names)
    for index, name in enumerate(names):
        places = [p for p, group in enumerate(groups.values()) if name in group]
        ratios = [group[name]["ratio"] or 0.0 for group in groups.values() if name in group]
        axes.barh([p + index * height for p in places], ratios, height, label=name)
    labels = [f"{work} {shape} {dtype} {pass_name}" for work, shape, dtype, pass_name in groups]
    axes.set_yticks([p + 0.4 for p in range(count)], labels)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set(xlabel="time, ours = 1", xscale="log")
    axes.invert_yaxis()
    axes.legend()
    return figure


def _has_intensity(result: dict) -> bool:
    return bool(result["flops"] and result["bytes"])


def _roofline(figure_type: type, report: dict):
    figure = figure_type(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    copy = report["ceilings"]["copy"]
    intensities = [2.0**power for power in range(-2, 13)]
    for dtype, rate in report["ceilings"].items():
        if dtype != "copy":
            roof = [min(rate, copy * intensity) / 1e9 for intensity in intensities]
            axes.plot(intensities, roof, label=f"{dtype} ceiling")
    points = [r for r in report["results"] if r["is_ours"] and _has_intensity(r)]
    for work in dict.fromkeys(result["work"] for result in points):
        own = [result for result in points if result["work"] == work]
        axes.scatter(
            [result["flops"] / result["bytes"] for result in own],
            [result["flops"] / result["seconds"] / 1e9 for result in own],
            label=work,
            s=14,
        )
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="GFLOP/s")
    axes.legend()
    return figure


def _lengths(figure_type: type, report: dict):
    figure = figure_type(figsize=(9, 4), layout="constrained")
    by_time, by_memory = figure.subplots(1, 2)
    for row in dict.fromkeys(entry["row"] for entry in report["lengths"]):
        own = [entry for entry in report["lengths"] if entry["row"] == row]
        tokens = [entry["tokens"] for entry in own]
        by_time.plot(tokens, [entry["seconds"] for entry in own], marker="o", label=row)
        known = [entry for entry in own if entry["peak_bytes"]]
        by_memory.plot(
            [entry["tokens"] for entry in known],
            [entry["peak_bytes"] / 2**20 for entry in known],
            marker="o",
            label=row,
        )
    for axes, label in ((by_time, "seconds"), (by_memory, "MiB beyond the inputs")):
        axes.set(xscale="log", yscale="log", xlabel="tokens = slots", ylabel=label)
        axes.legend()
    return figure
