"""Tables and comparisons of what :mod:`lm2_kernels.bench.suite` measured."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from lm2_kernels.bench import works
from lm2_kernels.bench.suite import FORMAT, GRAPH
from lm2_kernels.terminal import columns

TITLES = {"forward": "forward", "backward": "backward", "both": "forward and backward"}
TITLES |= {name + GRAPH: f"{TITLES[name]} in a CUDA graph" for name in ("forward", "both")}
# beside every number that a row which disagrees with the oracle has a part in
_MARK = "!"
_GRAPHS = "eager launches and replays of a CUDA graph, ms"
_LENGTHS = "attention forward and backward as T grows: time, peak memory beyond the inputs"
# as wide as the names of eight bars take; the bars' colour and the line's, for light and dark pages
_CHART_CONFIG = (
    "xyChart: {width: 900, height: 450}, "
    'themeVariables: {xyChart: {plotColorPalette: "#0072b2, #d55e00"}}'
)
# of all names together, which fit side by side
_CHART_CHARACTERS = 100
_HEADLINE_PASSES = ("forward", "both")
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
    lines = [machine_line(report), ceiling_line(report)]
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


def ceiling_line(report: dict) -> str:
    """The rates that nothing here can go above, as measured."""
    ceilings = dict(report["ceilings"])
    copy = ceilings.pop("copy")
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in ceilings.items())
    return f"measured ceilings: copy {copy / 1e9:.1f} GB/s, products {rates}"


def group_results(report: dict) -> dict[_Key, dict[str, dict]]:
    """The results by (work, shape, dtype, pass), each time by row."""
    groups: dict[_Key, dict[str, dict]] = {}
    for result in report["results"]:
        key = (result["work"], result["shape"], result["dtype"], result["pass"])
        groups.setdefault(key, {})[result["row"]] = result
    return groups


def tables(report: dict) -> dict[str, list]:
    """For each work and pass a table: a line a shape and dtype, a column a row.

    The columns of peers say how many times as fast our first backend is, as medians of paired
    rounds; "limit" says which share of its speed we reach.
    """
    groups = group_results(report)
    found = {}
    for work in dict.fromkeys(key[0] for key in groups):
        for pass_name, title in TITLES.items():
            own = {k: g for k, g in groups.items() if (k[0], k[3]) == (work, pass_name)}
            if own:
                found[f"{work}, {title}"] = _table(own)
    return found


def _table(groups: dict[_Key, dict[str, dict]]) -> list[list[str]]:
    rows = list(dict.fromkeys(name for group in groups.values() for name in group))
    ours = our_row(groups) or rows[0]
    others = [name for name in rows if name not in (ours, works.LIMIT)]
    limit = [works.LIMIT] if works.LIMIT in rows else []
    light = any(group[ours]["light_share"] for group in groups.values() if ours in group)
    head = ["shape", "dtype", f"{ours}, ms", *others]
    head += ["of limit"] * bool(limit) + ["of light"] * light + ["rounds"]
    table = [head]
    for (_, shape, dtype, _), group in groups.items():
        if ours not in group:
            continue
        line = [shape, dtype, number(1e3 * group[ours]["seconds"]) + mark(group, ours)]
        line += [times(_ratio(group, name)) + mark(group, name) for name in others]
        if limit:
            line.append(_percent(_ratio(group, works.LIMIT)) + mark(group, works.LIMIT))
        if light:
            line.append(_percent(group[ours]["light_share"]) + mark(group, ours))
        table.append([*line, str(group[ours]["rounds"])])
    for dtype in dict.fromkeys(dtype for _, _, dtype, _ in groups):
        own = [group for key, group in groups.items() if key[2] == dtype]
        if len(own) == 1:
            continue
        ratios = [
            [None if mark(group, name) else _ratio(group, name) for group in own] for name in others
        ]
        # a mean over fewer lines than the others' would not be theirs to compare with
        means = [None if None in column else statistics.geometric_mean(column) for column in ratios]
        line = ["geometric mean", dtype, "", *map(times, means)]
        table.append(line + [""] * (len(head) - len(line)))
    return table


def our_row(groups: dict[_Key, dict[str, dict]]) -> str | None:
    """Our best backend: it comes first."""
    results = (result for group in groups.values() for result in group.values())
    return next((result["row"] for result in results if result["is_ours"]), None)


def mark(group: dict[str, dict], name: str) -> str:
    """What stands beside a ratio of this row to ours: nothing where both are right."""
    ours = next((result for result in group.values() if result["is_ours"]), {})
    is_wrong = ours.get("wrong") or group.get(name, {}).get("wrong")
    return _MARK if is_wrong and name in group else ""


def _ratio(group: dict[str, dict], name: str) -> float | None:
    """None where the row, or ours that it is a ratio to, was not measured."""
    return group[name]["ratio"] if name in group else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def times(ratio: float | None) -> str:
    """A ratio as text, a dash where there is none."""
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
    head = [f"{TITLES[name]}{how}" for name in passes for how in ("", ", graph")]
    table = [["work", "shape", "dtype", "row", *head]]
    keys = dict.fromkeys(key[:3] for key in group_results(report) if key[3].endswith(GRAPH))
    groups = group_results(report)
    for key in keys:
        own = [groups.get((*key, name + how), {}) for name in passes for how in ("", GRAPH)]
        for row in dict.fromkeys(name for group in own for name in group):
            cells = [
                number(1e3 * group[row]["seconds"]) + _MARK * bool(group[row].get("wrong"))
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
            line += [number(entry["seconds"]) + mark if entry else "-"]
            line += [_mebibytes(entry["peak_bytes"]) if entry else "-"]
        table.append(line)
    return table


def _mebibytes(count: int | None) -> str:
    return "-" if count is None else number(count / 2**20)


def number(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def compare(first: dict, second: dict) -> str:
    """How many times as fast the second report is, row by row.

    What changes in the rows of peers too is the machine's doing.
    """
    before, after = group_results(first), group_results(second)
    table = [["work", "shape", "dtype", "pass", "row", "before, ms", "after, ms", "faster"]]
    for key in before:
        for name, result in before[key].items():
            other = after.get(key, {}).get(name)
            if other is None:
                continue
            cells = [
                number(1e3 * r["seconds"]) + _MARK * bool(r.get("wrong")) for r in (result, other)
            ]
            table.append([*key, name, *cells, times(result["seconds"] / other["seconds"])])
    if len(table) == 1:
        raise ValueError("the two files have no measurement in common")
    lines = [f"before: {machine_line(first)}", f"after:  {machine_line(second)}", *columns(table)]
    return "\n".join(lines)


# --- Markdown ----------------------------------------------------------------------------------


def markdown(report: dict) -> str:
    """All of a report, for ``benchmarks/README.md``."""
    lines = [f"{machine_line(report)}; {ceiling_line(report)}.", ""]
    titled = tables(report) | {
        "MiB kept for backward, beside inputs and parameters": _saved_table(report),
        _LENGTHS: _lengths_table(report) if report["lengths"] else [],
        _GRAPHS: _graph_table(report),
        "A peer is faster": _slower_table(report),
    }
    for dtype in _dtypes(report):
        lines += _chart(report, dtype)
    for title, table in titled.items():
        lines += [f"**{title}**", "", *_markdown_table(table)] if table else []
    lines += [f"- {_MARK} {text}." for text in wrong_rows(report)]
    lines += [f"- Left out: {text}." for text in report["skipped"]]
    return "\n".join(lines).rstrip() + "\n"


def headline(reports: Sequence[dict]) -> str:
    """The layers beside their plainest peers, for README: a table and a chart.

    Args:
        reports: of one machine, say one for each dtype. The chart is of the first one.

    Raises:
        ValueError: they are of several machines, or no layer is in them.
    """
    machines = sorted(set(map(machine_line, reports)))
    if len(machines) > 1:
        raise ValueError(f"a headline is of one machine, these files are of {machines}")
    head = ["", "dtype", "beside"]
    for name in _HEADLINE_PASSES:
        head += [TITLES[name], "of limit"]
    table = [head, *(line for report in reports for line in _headline_lines(report))]
    if len(table) == 1:
        raise ValueError("a headline is of the layers, and these files have none")
    lines = [f"{machines[0]}.", "", *_markdown_table(table)]
    lines += _chart(reports[0], table[1][1])
    lines += [f"- {_MARK} {text}." for report in reports for text in wrong_rows(report)]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_table(table: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(line)} |" for line in table]
    return [lines[0], "|" + "---|" * len(table[0]), *lines[1:], ""]


def _dtypes(report: dict) -> list[str]:
    return list(dict.fromkeys(result["dtype"] for result in report["results"]))


def _slower_table(report: dict) -> list[list[str]]:
    """Where ours is not the fastest, the worst first; empty if it always is."""
    found = [
        (result["ratio"], [*key[:3], TITLES[key[3]], name, times(result["ratio"])])
        for key, group in group_results(report).items()
        for name, result in group.items()
        if _is_peer(result) and result["ratio"] and result["ratio"] < 1.0 and not mark(group, name)
    ]
    lines = [line for _, line in sorted(found)]
    return [["work", "shape", "dtype", "pass", "peer", "its time, ours = 1"], *lines] * bool(lines)


def _is_peer(result: dict) -> bool:
    return not result["is_ours"] and result["row"] != works.LIMIT


def _layers(report: dict, dtype: str) -> dict[str, dict[_Key, dict[str, dict]]]:
    """The results of each layer in a dtype, where ours was measured, as of group_results."""
    layers: dict[str, dict[_Key, dict[str, dict]]] = {}
    for key, group in group_results(report).items():
        is_layer = key[0].endswith(" layer") and key[2] == dtype
        if is_layer and any(result["is_ours"] for result in group.values()):
            layers.setdefault(key[0], {})[key] = group
    return layers


def _plainest_peer(groups: dict[_Key, dict[str, dict]]) -> str | None:
    """It comes first."""
    results = (result for group in groups.values() for result in group.values())
    return next((result["row"] for result in results if _is_peer(result)), None)


def _headline_lines(report: dict) -> list[list[str]]:
    lines = []
    for dtype in _dtypes(report):
        for layer, groups in _layers(report, dtype).items():
            peer = _plainest_peer(groups)
            line = [layer, dtype, peer or "-"]
            for pass_name in _HEADLINE_PASSES:
                own = {key[1]: group for key, group in groups.items() if key[3] == pass_name}
                line += [_span(own, peer, times), _span(own, works.LIMIT, _percent)]
            lines.append(line)
    return lines


def _span(
    by_shape: dict[str, dict[str, dict]], name: str | None, text: Callable[[float | None], str]
) -> str:
    """A row's least and largest ratio, and the shapes that it was not measured at."""
    ratios = [group[name]["ratio"] for group in by_shape.values() if name in group]
    if not ratios:
        return "-"
    shown = " to ".join(dict.fromkeys(map(text, (min(ratios), max(ratios)))))
    marked = _MARK if any(mark(group, name) for group in by_shape.values()) else ""
    missing = [shape for shape, group in by_shape.items() if name not in group]
    return shown + marked + (f" (without {', '.join(missing)})" if missing else "")


def _chart(report: dict, dtype: str) -> list[str]:
    """Forward and backward of the layers by their plainest peers, for Mermaid to draw.

    Its charts have no legend and no gaps: one kind of bar, and only where there is a number.
    """
    bars, peers = {}, {}
    for layer, groups in _layers(report, dtype).items():
        peer = _plainest_peer(groups)
        for (_, shape, _, pass_name), group in groups.items():
            if pass_name == "both" and peer in group and not mark(group, peer):
                bars[f"{layer.removesuffix(' layer')} {shape}"] = group[peer]["ratio"]
                peers[peer] = None
    if not bars:
        return []
    top = math.ceil(2.0 * max(1.0, *bars.values())) / 2.0
    ours = our_row(group_results(report))
    # others stand one below the other
    is_long = sum(map(len, bars)) > _CHART_CHARACTERS
    return [
        "```mermaid",
        "---",
        f"config: {{{_CHART_CONFIG}}}",
        "---",
        "xychart-beta horizontal" if is_long else "xychart-beta",
        f'    title "{TITLES["both"]} in {dtype}: time of {" and ".join(peers)}"',
        f"    x-axis [{', '.join(json.dumps(name) for name in bars)}]",
        f'    y-axis "time, {ours} = 1 (the line)" 0 --> {top:g}',
        f"    bar [{', '.join(f'{ratio:.2f}' for ratio in bars.values())}]",
        f"    line [{', '.join(['1.00'] * len(bars))}]",
        "```",
        "",
    ]
