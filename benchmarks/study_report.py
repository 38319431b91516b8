"""What the study found, from its JSON lines: tables for a document, and pictures.

    python benchmarks/study_report.py                      # prints the tables
    python benchmarks/study_report.py --write docs/study.md
    python benchmarks/study_report.py --plots FOLDER

A share is the mean over seeds of the share of right answers; its interval, and that of a difference
between two contenders on the same seeds, is the 95 % bootstrap over seeds. With five seeds there
are 5^5 resamples: all are taken, and nothing is random.
"""

import argparse
import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from lm2_kernels import figures

sys.path.insert(0, str(Path(__file__).parent))
import study

# nats: where the losses of all contenders stay for a while in these blocks; the loss of the others
# is of other words, or of stories with more places
_PLATEAU = 0.9
_OF_PLATEAU = ("learning", "patience", "slots")
# of benchmarks/real_model.py
_REAL_SEEDS = range(3)
_MARKS = "osD^vPX*<>phd8"
_MARKERS = re.compile(r"(<!-- study: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % percentile interval of the mean, over all resamples of a few values.

    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13. Of so few seeds it is
    too narrow: what it leaves out is unlikely, what it has is not all there may be.
    """
    means = sorted(map(statistics.fmean, itertools.product(values, repeat=len(values))))
    last = len(means) - 1
    return means[round(0.025 * last)], means[round(0.975 * last)]


def final_results(block: study.Block) -> dict[study.Contender, dict[int, dict]]:
    """Each contender's results at the rate that its pilots chose, by seed; of whole rows alone."""
    lines = [result for each in study.BLOCKS for result in study.load(each.name)]
    results, found = {study.cell_of(line).key: line for line in lines}, {}
    for contender in block.contenders:
        place, _ = study.tuned(block, contender, results)
        if place is None:
            continue
        rate, theta = place
        cells = {s: study.Cell(block.name, contender, rate, s, theta) for s in study.SEEDS}
        if all(cell.key in results for cell in cells.values()):
            found[contender] = {seed: results[cell.key] for seed, cell in cells.items()}
    return found


def shares(results: dict[int, dict], *tests: str) -> list[float]:
    """Right answers of 1, seed by seed, over these tests together."""
    counts = [[result["answers"][name] for name in tests] for result in results.values()]
    return [sum(r for r, _ in row) / sum(n for _, n in row) for row in counts]


def _percent(values: Sequence[float]) -> str:
    low, high = (100.0 * end for end in bootstrap(values))
    return f"{100.0 * statistics.fmean(values):.0f} ({low:.0f} to {high:.0f})"


def _difference(values: Sequence[float], others: Sequence[float]) -> str:
    low, high = bootstrap([one - other for one, other in zip(values, others, strict=True)])
    mean = statistics.fmean(values) - statistics.fmean(others)
    return f"{100.0 * mean:+.0f} ({100.0 * low:+.0f} to {100.0 * high:+.0f})"


def escaped(results: dict[int, dict], tests: Sequence[str]) -> int:
    """How many seeds answer at least half of the questions of every test."""
    return sum(
        all(right >= study.ESCAPED * total for right, total in map(result["answers"].get, tests))
        for result in results.values()
    )


def left_after(results: dict[int, dict]) -> str:
    """After how many steps the seeds have left the plateau, by their losses: the first hundred
    steps whose mean is below half of what guessing among the places of a story costs.
    """
    ends = []
    for result in results.values():
        below = (place for place, loss in enumerate(result["losses"]) if loss < _PLATEAU / 2)
        ends.append(100 * (next(below, math.inf) + 1))
    names = [f"{end:g}" if end < math.inf else "never" for end in (min(ends), max(ends))]
    return " to ".join(dict.fromkeys(names))


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def learning_table(block: study.Block) -> str:
    """A line a contender: what it answers, with its own memory and with another row's."""
    tests = list(block.task.kinds())
    rows = [["model", "rate, base", "one hop, %", "two hops, %", "shuffled, %", "escaped"]]
    has_plateau = block.name in _OF_PLATEAU
    if has_plateau:
        rows[0].append("left it after, steps")
    for contender, results in final_results(block).items():
        mixed = ["" for _ in tests]
        if contender.kind == "lm2":
            mixed = [f"{name}, shuffled" for name in tests]
        rows.append(
            [
                contender.name,
                "{rate:g}, {theta:g}".format(**next(iter(results.values()))["cell"]),
                _percent(shares(results, tests[0])),
                _percent(shares(results, tests[1])),
                _percent(shares(results, *mixed)) if all(mixed) else "",
                f"{escaped(results, tests)} of {len(results)}",
                *([left_after(results)] if has_plateau else []),
            ]
        )
    return _markdown(rows)


def length_table(block: study.Block) -> str:
    """A line a contender and noise: both kinds of question together, by segments of facts."""
    task = block.task
    rows = [["model", "facts among", *(_segments(s) for s in task.tested)]]
    for contender, results in final_results(block).items():
        for noise in task.noises:
            cells = []
            for segments in task.tested:
                named = task.kinds().items()
                tests = [name for name, kind in named if kind[:2] == (segments, noise)]
                cells.append(_percent(shares(results, *tests)))
            rows.append([contender.name, "noise" if noise == 1.0 else "facts", *cells])
    return _markdown(rows)


def difference_table(block: study.Block) -> str:
    """A line a memory: by how much it answers more than each baseline, trained lengths together."""
    found, task = final_results(block), block.task
    tests = [name for name, kind in task.kinds().items() if kind[0] in task.segments]
    baselines = [contender for contender in found if contender.kind != "lm2"]
    rows = [["model, more than", *(contender.name for contender in baselines), "itself, shuffled"]]
    for contender, results in found.items():
        if contender.kind == "lm2":
            own = shares(results, *tests)
            cells = [_difference(own, shares(found[other], *tests)) for other in baselines]
            mixed = shares(results, *(f"{name}, shuffled" for name in tests))
            rows.append([contender.name, *cells, _difference(own, mixed)])
    return _markdown(rows)


def _segments(count: int) -> str:
    return f"{count} segment, %" if count == 1 else f"{count} segments, %"


def told_table(block: study.Block) -> str:
    """A line a contender: what it answers by segments, and with another row's memory."""
    task = block.task
    rows = [["model", *(_segments(s) for s in task.tested), "shuffled, %"]]
    for contender, results in final_results(block).items():
        known = [name for name, (segments,) in task.kinds().items() if segments in task.segments]
        mixed = [f"{name}, shuffled" for name in known if contender.kind == "lm2"]
        rows.append(
            [
                contender.name,
                *(_percent(shares(results, name)) for name in task.kinds()),
                _percent(shares(results, *mixed)) if mixed else "",
            ]
        )
    return _markdown(rows)


def text_table(block: study.Block) -> str:
    """A line a contender: its loss, and by how much that is more than without a memory."""
    rows = [["model", "rate, base", "nats a byte", "more than no memory", "shuffled"]]
    found = final_results(block)
    losses = {
        contender: [result["loss"]["held out"] for result in results.values()]
        for contender, results in found.items()
    }
    plain = next((own for contender, own in losses.items() if contender.kind == "none"), None)
    for contender, own in losses.items():
        first, *_ = found[contender].values()
        change = mixed = ""
        if plain is not None and contender.kind != "none":
            change = _interval([one - other for one, other in zip(own, plain, strict=True)])
        if contender.kind == "lm2":
            shuffled = [r["loss"]["held out, shuffled"] for r in found[contender].values()]
            mixed = f"{statistics.fmean(shuffled):.4f}"
        place = "{rate:g}, {theta:g}".format(**first["cell"])
        rows.append([contender.name, place, f"{statistics.fmean(own):.4f}", change, mixed])
    return _markdown(rows)


def costs_table(block: study.Block) -> str:
    """A line a contender: parameters, time of a step, memory kept for backward."""
    rows = [["model", "parameters", "ms a step", "times no memory", "kept, MiB"]]
    path = study.FOLDER / "costs.json"
    found = json.loads(path.read_text("utf-8"))["contenders"] if path.exists() else {}
    for contender in block.contenders:
        if contender.name in found:
            own = found[contender.name]
            numbers = f"{own['milliseconds']:.0f}", f"{own['ratio']:.2f}"
            kept = f"{own['kept_bytes'] / 2**20:.0f}"
            rows.append([contender.name, f"{own['parameters']:,}", *numbers, kept])
    return _markdown(rows)


def _real_cells(name: str, part: str) -> dict[int | str, dict]:
    path = study.FOLDER / f"{name}.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return {line["cell"]: line.get(part) for line in map(json.loads, lines)}


def real_table() -> str:
    """A line a task and length: the pretrained model as it came, and with its memory, trained."""
    cells = _real_cells("real", "answers")
    plain, seeds = cells.get("plain"), [cells[seed] for seed in _REAL_SEEDS if seed in cells]
    rows = [
        ["task", "tokens", "last window alone, %", "one window, %", "memory, %", "another's, %"]
    ]
    if plain is not None and len(seeds) == len(_REAL_SEEDS):
        for name in seeds[0]:
            found = [
                _range([one[name][how] for one in group])
                for group, how in (
                    ([plain], "last window"),
                    ([plain], "one window"),
                    (seeds, "memory"),
                    (seeds, "another's"),
                )
            ]
            rows.append([*name.split(), *found])
    return _markdown(rows)


def real_candidates_table() -> str:
    """A line a candidate and rate: losses of the first task trained on, after so many steps."""
    after = (30, 50, 70, 90, 110)
    rows = [["candidate", "rate", "seeds", *(f"{steps} steps" for steps in after)]]
    for candidate, rate, name, seeds in (
        ("token", 0.002, "real", _REAL_SEEDS),
        ("read", 0.002, "real_read", _REAL_SEEDS),
        ("read", 0.0005, "real_read_low", _REAL_SEEDS[:1]),
        ("read", 0.008, "real_read_high", _REAL_SEEDS[:1]),
    ):
        cells = _real_cells(name, "losses")
        # a number is the mean of ten steps
        found = [cells[seed]["place 0"] for seed in seeds if seed in cells]
        if len(found) == len(seeds):
            losses = [[own[steps // 10 - 1] for own in found] for steps in after]
            shown = [f"{min(own):.2f} to {max(own):.2f}" for own in losses]
            if len(seeds) == 1:
                shown = [f"{own[0]:.2f}" for own in losses]
            rows.append([candidate, f"{rate:g}", str(len(seeds)), *shown])
    return _markdown(rows)


def _range(counts: Sequence[tuple[int, int]]) -> str:
    """The mean of shares, and the least and the largest of several."""
    values = [100.0 * right / total for right, total in counts]
    mean = f"{statistics.fmean(values):.0f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.0f} to {max(values):.0f})"


def _interval(values: Sequence[float]) -> str:
    low, high = bootstrap(values)
    return f"{statistics.fmean(values):+.4f} ({low:+.4f} to {high:+.4f})"


_TOLD = [block.name for block in study.BLOCKS if isinstance(block.task, study.Told)]
# by its name in a document: the block, if it is of one, and what makes it
TABLES: dict[str, tuple[str | None, Callable[..., str]]] = {
    "learning": ("learning", learning_table),
    "learning_differences": ("learning", difference_table),
    "patience": ("patience", learning_table),
    "patience_differences": ("patience", difference_table),
    "length": ("length", length_table),
    "length_differences": ("length", difference_table),
    "all_words": ("all_words", learning_table),
    "no_curriculum": ("no_curriculum", length_table),
    "slots": ("slots", learning_table),
    "slots_64": ("slots_64", learning_table),
    **{name: (name, told_table) for name in _TOLD},
    **{f"{name}_differences": (name, difference_table) for name in _TOLD},
    "text": ("text", text_table),
    "text_spread": ("text_spread", text_table),
    "real": (None, real_table),
    "real_candidates": (None, real_candidates_table),
    "costs": ("length", costs_table),
}


def table(name: str) -> str:
    """A table in Markdown by its name in a document."""
    block, make = TABLES[name]
    return make() if block is None else make(study.block_named(block))


def rewritten(text: str) -> str:
    """A document with its tables as the results have them."""
    return _MARKERS.sub(lambda found: f"{found[1]}\n{table(found[2])}\n{found[3]}", text)


def draw_lengths(block: study.Block) -> object:
    """Right answers by segments of facts, a panel a noise, a line a contender with its interval.

    Without other starts and experiments, which the table has.
    """
    task, drawn = block.task, final_results(block)
    drawn = {c: r for c, r in drawn.items() if c.start == "plain" and "query" not in c.write}
    title = "Right answers, by how many segments the facts are in"
    foot = [
        f"Trained on {' and '.join(map(str, task.segments))} segments; mean of both kinds of "
        f"question over {len(study.SEEDS)} seeds, bars are 95 % bootstrap intervals."
    ]
    figure = figures.new_figure((9.0, 4.2), title, foot)
    panels = figure.subplots(1, len(task.noises), sharey=True)
    for axes, noise in zip(panels, task.noises, strict=True):
        axes.set_title("facts among noise" if noise == 1.0 else "facts among other facts")
        for number, (contender, results) in enumerate(drawn.items()):
            values = []
            for segments in task.tested:
                named = task.kinds().items()
                tests = [name for name, kind in named if kind[:2] == (segments, noise)]
                values.append(shares(results, *tests))
            means = [100.0 * statistics.fmean(value) for value in values]
            ends = [[100.0 * end for end in bootstrap(value)] for value in values]
            bars = [[abs(m - e[i]) for m, e in zip(means, ends, strict=True)] for i in (0, 1)]
            # side by side, so that no interval hides another
            aside = 1.04 ** (number - (len(drawn) - 1) / 2)
            axes.errorbar(
                [aside * segments for segments in task.tested],
                means,
                bars,
                label=contender.name,
                color=figures.COLOURS[number % len(figures.COLOURS)],
                marker=_MARKS[number % len(_MARKS)],
                linestyle="-" if contender.kind == "lm2" else ":",
                capsize=2.0,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(task.tested, [str(segments) for segments in task.tested])
        axes.set(xlabel="segments of facts", ylim=(0.0, 103.0))
    panels[0].set_ylabel("right answers, %")
    figures.add_legend(figure, panels[0].get_legend_handles_labels()[0], 3)
    return figure


FIGURES: dict[str, tuple[str, Callable[[study.Block], object]]] = {
    "study_length": ("length", draw_lengths),
}


def draw(name: str, file: IO[str]) -> None:
    """Write a picture as SVG."""
    block, make = FIGURES[name]
    with figures.style():
        make(study.block_named(block)).savefig(file, format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="a document whose tables are made anew")
    parser.add_argument("--plots", type=Path, help="a folder for the pictures")
    options = parser.parse_args()
    if options.write is not None:
        text = options.write.read_text("utf-8")
        options.write.write_text(rewritten(text), encoding="utf-8")
    if options.plots is not None:
        options.plots.mkdir(parents=True, exist_ok=True)
        with figures.style():
            for name, (block, make) in FIGURES.items():
                figures.save(make(study.block_named(block)), options.plots / name)
    if options.write is None and options.plots is None:
        for name in TABLES:
            print(f"{name}\n\n{table(name)}")


if __name__ == "__main__":
    main()
