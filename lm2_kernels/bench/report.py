"""Tables and comparisons of what :mod:`lm2_kernels.bench.suite` measured."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from lm2_kernels.bench import works
from lm2_kernels.bench.suite import FORMAT, GRAPH
from lm2_kernels.info import columns

TITLES = {"forward": "forward", "backward": "backward", "both": "forward and backward"}
TITLES |= {name + GRAPH: f"{TITLES[name]} in a CUDA graph" for name in ("forward", "both")}
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


def group_results(report: dict) -> dict[_Key, dict[str, dict]]:
    """The results by (work, shape, dtype, pass), each time by row."""
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
    groups = group_results(report)
    found = {}
    for work in dict.fromkeys(key[0] for key in groups):
        for pass_name, title in TITLES.items():
            own = {k: g for k, g in groups.items() if (k[0], k[3]) == (work, pass_name)}
            if not own or (names and work not in names):
                continue
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


def markdown(table: list[list[str]]) -> list[str]:
    """A table in Markdown."""
    lines = [f"| {' | '.join(line)} |" for line in table]
    return [lines[0], "|" + "---|" * len(table[0]), *lines[1:]]


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
    groups = {k: g for k, g in group_results(report).items() if (k[0], k[3]) == (layer, "both")}
    rows = {name: result for group in groups.values() for name, result in group.items()}
    series = {
        name: [None if mark(group, name) else _ratio(group, name) for group in groups.values()]
        for name in rows
    }
    ours = our_row(groups)
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
