"""The benchmarks: every row of every work is right, reports are whole, and comparisons are fair."""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lm2_kernels import cli, reference
from lm2_kernels.bench import measure, plots, report, suite, works
from lm2_kernels.bench.pairs import seen_pairs
from lm2_kernels.bench.peers import SDPA_KERNELS
from lm2_kernels.testing.cases import ALL_SHAPES, GPU_SHAPES, Shape
from tools.interpreter import run_python

TINY = Shape("tiny", 2, 16, 16, 2, 32, "these tests")
PIECE = Shape("piece", 2, 3, 16, 2, 32, "these tests")
READ = Shape("read", 1, 24, 16, 2, 32, "these tests")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(suite, "ALL_SHAPES", (TINY, PIECE))
    monkeypatch.setattr(suite, "LENGTHS", (TINY,))
    monkeypatch.setattr(measure, "_MIN_SECONDS", 0.0)
    monkeypatch.setattr(measure, "ceilings", lambda dtypes, device: CEILINGS)
    monkeypatch.setitem(works.MODEL, "vocab_size", 50)
    monkeypatch.setitem(works.MODEL, "num_hidden_layers", 1)
    monkeypatch.setitem(works.MODEL, "num_attention_heads", 2)


CEILINGS = {"copy": 1e10, "float32": 1e11, "bfloat16": 1e11}


def _without_compiled(work):
    # torch.compile is for the command itself to try: it takes seconds a row
    work.rows = {name: make for name, make in work.rows.items() if "compiled" not in name}
    return work


# torch says why a forced kernel does not take dropout
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("shape", (TINY, PIECE, READ), ids=lambda shape: shape.name)
@pytest.mark.parametrize("name", works.WORKS)
def test_rows_agree(name, shape, dtype, tiny):
    if not works.fits(name, shape):
        return
    work = _without_compiled(works.WORKS[name](shape, dtype, "cpu"))
    skipped = []
    rows = suite.build_rows(work, (), skipped)
    # torch has no other kernel that takes a mask on a CPU
    assert not [text for text in skipped if "SDPA" not in text]
    agreements = measure.check(work, rows)
    assert not [agreement for agreement in agreements.values() if agreement.wrong]
    assert set(work.rows) <= set(works.row_names())
    assert set(agreements) == {row for row in rows if rows[row].is_checked}
    assert set(rows) - set(agreements) <= {works.LIMIT, *SDPA_KERNELS}
    assert any(row.is_ours for row in rows.values())
    for pass_name in work.passes:
        times = measure.measure(rows, pass_name, work.cotangents, "cpu", 0.0, fewest=2)
        assert all(len(row) == 2 and min(row) > 0.0 for row in times.values())


def _with_wrong_row(monkeypatch, op, name, factor=1.001):
    """The op's work with a row whose results are 0.1 % off."""

    def wrong(shape, dtype, device):
        work = made(shape, dtype, device)
        row = work.rows[name]()
        scaled = row._replace(forward=lambda: tuple(factor * output for output in row.forward()))
        work.rows[name] = lambda: scaled
        return work

    made = works.WORKS[op]
    monkeypatch.setitem(works.WORKS, op, wrong)


@pytest.mark.parametrize("name", ("eager", "oracle"))
def test_a_wrong_row_is_timed_and_marked(tiny, monkeypatch, tmp_path, capsys, name):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    _with_wrong_row(monkeypatch, "memory_update", name)
    monkeypatch.setattr(works, "our_backends", lambda device: ["eager"])
    if name == "oracle":
        # then something else has to be what plain PyTorch may be off by
        monkeypatch.setattr(measure, "_yardstick", lambda work, rows: rows["eager"])
    path = tmp_path / "a.json"
    command = ["bench", "memory_update", "--shape", "256", "--dtype", "float32", "--row", "eager"]
    command += ["--row", "oracle", "--pass", "forward", "--json", str(path)]
    monkeypatch.setattr(suite, "ALL_SHAPES", (TINY._replace(name="256"),))
    # a peer's mistake is not ours
    assert cli.main(command) == int(name == "eager")
    shown = capsys.readouterr()
    reason = f"memory_update 256 float32: row '{name}' is wrong: "
    assert (f"bench: {reason}" in shown.err) == (name == "eager")
    assert f"\n! {reason}" in shown.out
    measured = report.load(path)
    results = {result["row"]: result for result in measured["results"]}
    assert all(result["seconds"] > 0.0 for result in results.values())
    assert results[name]["wrong"].startswith(reason)
    assert [row for row, result in results.items() if "wrong" in result] == [name]
    # nothing is compared with what is wrong but under the mark
    (table,) = report.tables(measured).values()
    assert [cell.endswith("!") for cell in table[1][2:4]] == [name == "eager", True]
    assert f"! {reason}" in report.markdown(measured)
    assert report.compare(measured, measured).count("!") == 2
    # with ours or the only peer wrong, nothing is left to draw
    assert not plots.plot(measured, tmp_path)


def test_a_row_of_nan_is_wrong_and_still_json(tiny, monkeypatch):
    _with_wrong_row(monkeypatch, "memory_update", "eager", torch.nan)
    selection = suite.Selection(("memory_update",), ("tiny",), ("float32",), ("eager",))
    measured = suite.run(selection, 100.0)
    assert all("has inf times" in result["wrong"] for result in measured["results"])
    json.dumps(measured, allow_nan=False)


def test_graphs_need_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "memory_update", "--graphs"]) != 0
    assert "--graphs needs a GPU" in capsys.readouterr().err


def test_shapes_for_gpus_alone():
    (large,) = {shape.name for shape in GPU_SHAPES}

    def names(**options):
        pieces = suite.Selection(("paper layer",), dtypes=("float32",), **options).jobs()
        return [shape.name for _, shape, _ in pieces]

    assert large not in names()
    assert large in names(device="cuda")
    # what is no size of a kernel has to be asked for
    assert suite.TINY.name not in (*names(), *names(device="cuda"))
    assert names(shapes=(suite.TINY.name,)) == [suite.TINY.name]
    mine = TINY._replace(name="mine")
    assert names(shapes=(large, "mine"), more_shapes=(mine, READ)) == [large, "mine"]


def test_graphs_beside_eager_launches(tiny, monkeypatch):
    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        def replay(self):
            replays.append(self)

    replays = []
    fakes = {"Stream": Stream, "current_stream": Stream, "CUDAGraph": Graph}
    fakes |= {"stream": contextlib.nullcontext, "graph": contextlib.nullcontext}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    x = torch.randn(8, requires_grad=True)
    row = works.Row(lambda: (x * x,), (x,), is_ours=True)
    before = x.detach().clone()
    # this graph gives what was there at its capture, which of a square is right ...
    replayed, is_equal = measure.captured(row, "forward", ())
    assert is_equal and len(replays) == 1
    replayed.forward()
    assert len(replays) == 2 and replayed.is_ours
    assert torch.equal(x, before)
    # ... and of its gradient is not
    assert not measure.captured(row, "both", (torch.ones(8),))[1]

    # the same in a report: ours is marked, a peer not, and what cannot be captured is said
    def fails():
        raise RuntimeError("operation not permitted when stream is capturing\n...")

    def captured(row, pass_name, cotangents):
        return works.Row(row.forward, (), row.is_ours) if row.is_checked else fails(), False

    monkeypatch.setattr(measure, "captured", captured)
    monkeypatch.setattr(measure, "_event_seconds", measure._clock_seconds)
    monkeypatch.setattr(works, "our_backends", lambda device: ["eager"])
    made = works.WORKS["paper layer"]

    def on_cpu(shape, dtype, device):
        return dataclasses.replace(made(shape, dtype, "cpu"), device="cuda")

    monkeypatch.setitem(works.WORKS, "paper layer", on_cpu)
    rows = ("eager", works.SDPA, works.LIMIT)
    selection = suite.Selection(("paper layer",), ("tiny",), ("float32",), rows, graphs=True)
    measured = suite.run(selection, 1.0)
    found = {(r["pass"], r["row"]): r for r in measured["results"]}
    assert set(found) >= {(f"{name}, graph", works.SDPA) for name in ("forward", "both")}
    assert ("backward, graph", works.SDPA) not in found and (
        "both, graph",
        works.LIMIT,
    ) not in found
    assert "gives other bits" in found["both, graph", "eager"]["wrong"]
    assert "wrong" not in found["both", "eager"] and "wrong" not in found["both, graph", works.SDPA]
    assert any("limit, both in a CUDA graph: RuntimeError" in t for t in measured["skipped"])
    text = report.render(measured)
    assert "paper layer, forward in a CUDA graph" in text
    assert "eager launches and replays of a CUDA graph" in text


def test_wrong_rows_of_attention_as_it_grows(tiny, monkeypatch):
    _with_wrong_row(monkeypatch, "memory_attention", "eager")
    monkeypatch.setattr(works, "our_backends", lambda device: ["eager"])
    monkeypatch.setattr(suite, "peak_apart", lambda *args: 2**20)
    measured = suite.run(suite.Selection(works=(suite.GROWTH,)), 100.0)
    assert [e["row"] for e in measured["lengths"] if "wrong" in e] == ["eager"]
    (reason,) = report.wrong_rows(measured, is_ours=True)
    assert "row 'eager' is wrong" in reason
    assert report._lengths_table(measured)[1][1].endswith("!")


@pytest.mark.parametrize(
    ("tokens", "slots", "offset"),
    [(5, 5, 0), (3, 9, 2), (3, 9, 6), (7, 4, 0), (7, 4, 2), (2, 4, 9), (1, 8, 7), (6, 4, None)],
)
def test_seen_pairs_are_those_of_the_reference(tokens, slots, offset):
    seen = torch.ones(tokens, slots)
    if offset is not None:
        seen = reference.visible_slots(tokens, slots, slot_offset=offset)
    assert seen_pairs(tokens, slots, offset) == int(seen.sum())


def test_flops_of_the_layers():
    for name, products in (("paper layer", 6), ("release layer", 7)):
        work = works.WORKS[name](TINY, torch.float32, "cpu")
        dense = 2 * products * TINY.batch * TINY.tokens * TINY.dim**2
        pairs = TINY.tokens * (TINY.tokens + 1) // 2
        attention = 4 * TINY.batch * TINY.dim * pairs
        assert work.flops["forward"] == dense + attention
        assert work.flops["both"] == 3 * dense + attention * 7 / 2
    piece = works.WORKS["memory_attention"](PIECE, torch.float32, "cpu")
    assert piece.flops["forward"] == 4 * PIECE.batch * PIECE.dim * (14 + 15 + 16)


def test_flops_of_the_model(tiny):
    work = works.WORKS["prefill"](TINY, torch.float32, "cpu")
    row = work.rows[works.RELEASED]()
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        row.forward()
    products = counted.get_flop_counts()["Global"]
    products = products[torch.ops.aten.mm] + products[torch.ops.aten.addmm]
    # of the pooled rows, which are too few to count
    products -= 2 * TINY.batch * TINY.dim * 2 * TINY.dim
    # of a block's two attentions, each over the 136 pairs that 16 tokens see
    product = 2 * 2 * TINY.batch * TINY.dim * 136
    assert work.flops["forward"] == products + 2 * product
    assert work.flops["both"] == 3 * products + 7 * product


def test_measurements_take_turns():
    order = []

    def row(name):
        return works.Row(lambda: order.append(name), ())

    rows = {name: row(name) for name in "ab"}
    times = measure.measure(rows, "forward", (), "cpu", 0.0, fewest=4)
    rounds = order[-(len(order) // 2) :]
    assert {len(row) for row in times.values()} == {4}
    assert rounds.count("a") > 0 and rounds.count("b") > 0
    assert measure.ratio([2.0, 3.0, 40.0], [1.0, 1.0, 10.0]) == 3.0


def test_saved_and_peak_memory(tiny):
    x = torch.randn(1000, 1000, requires_grad=True)
    row = works.Row(lambda: ((x.exp() * 2.0).sin(),), (x,))
    # exp keeps its result, sin its argument
    assert measure.saved_bytes(row) == 2 * 4_000_000
    # in a process of its own, as the benchmark measures it: here, what earlier tests freed may
    # be used again, where glibc cannot return it
    code = (
        "import torch; from lm2_kernels.bench import measure; "
        "print(measure.peak_bytes(lambda: torch.ones(8_000_000).add(1.0), 'cpu'))"
    )
    peak = run_python(code).stdout.strip()
    assert peak == "None" or 60e6 < int(peak) < 80e6


def test_a_report_and_what_is_shown_of_it(tiny, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    selection = suite.Selection(
        works=("memory_attention", "release layer", suite.GROWTH),
        rows=("cpp", "eager", "oracle"),
        dtypes=("float32",),
    )
    monkeypatch.setattr(suite, "peak_apart", lambda *args: 2**20)
    seen = []
    measured = suite.run(selection, 100.0, lambda *args: seen.append(args))
    assert [args[0] for args in seen] == list(range(5))
    assert not measured["skipped"]
    keys = {(r["work"], r["shape"], r["pass"], r["row"]) for r in measured["results"]}
    assert len(keys) == len(measured["results"]) >= 2 * 2 * 3 * 2
    ours = measured["results"][0]
    assert ours["is_ours"] and ours["ratio"] == 1.0 and ours["light_share"] > 0.0
    assert {entry["row"] for entry in measured["lengths"]} >= {"oracle", "SDPA"}

    path = tmp_path / "a.json"
    path.write_text(json.dumps(measured))
    assert cli.main(["bench", "--from", str(path), "--plots", str(tmp_path / "plots")]) == 0
    text = capsys.readouterr().out
    for part in ("release layer, forward and backward", "geometric mean", "MiB kept", "T = N"):
        assert part in text
    drawn = {path.stem for path in (tmp_path / "plots").glob("*.png")}
    layers = {"speedup_memory_attention", "speedup_release_layer"}
    assert drawn == {*layers, "roofline", "lengths"}

    for result in measured["results"]:
        result["seconds"] /= 2.0
    faster = tmp_path / "b.json"
    faster.write_text(json.dumps(measured))
    assert cli.main(["bench", "--compare", str(path), str(faster)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + len(measured["results"])
    assert all(line.endswith("2.00x") for line in lines[3:])


def test_ceilings_are_the_better_of_two_measurements(tiny, monkeypatch):
    # the first was disturbed in its products, the second in its copy
    found = iter([CEILINGS | {"float32": 1e10}, CEILINGS | {"copy": 1e9}])
    monkeypatch.setattr(measure, "ceilings", lambda dtypes, device: next(found))
    selection = suite.Selection(("memory_update",), ("tiny",), ("float32",), ("eager",))
    measured = suite.run(selection, 100.0)
    assert measured["ceilings"] == CEILINGS
    for r in measured["results"]:
        least = max(r["flops"] / CEILINGS["float32"], r["bytes"] / CEILINGS["copy"])
        assert r["light_share"] == pytest.approx(least / r["seconds"])


def test_numbers_have_three_digits_or_all():
    assert [report.number(value) for value in (0.01234, 17.0, 512.0, 999.6, 1093.7)] == [
        "0.0123",
        "17",
        "512",
        "1000",
        "1094",
    ]


def test_our_second_row_alone(tiny):
    # recomputing has no forward of its own to time, so nothing there is what others are held to
    rows = (works.RECOMPUTE, works.LIMIT)
    measured = suite.run(suite.Selection(("paper layer",), ("tiny",), ("float32",), rows), 100.0)
    ratios = {(r["row"], r["pass"]): r["ratio"] for r in measured["results"]}
    assert (works.RECOMPUTE, "forward") not in ratios
    assert ratios[works.LIMIT, "forward"] is None
    assert ratios[works.RECOMPUTE, "both"] == 1.0


def test_lengths_alone(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "peak_apart", lambda *args: 2**20)
    path = tmp_path / "a.json"
    assert cli.main(["bench", "lengths", "--budget", "50", "--json", str(path)]) == 0
    measured = report.load(path)
    assert measured["lengths"] and not measured["results"]
    assert measured["selection"]["works"] == ["lengths"]
    assert measured["selection"]["budget"] == 50.0
    assert "| T = N |" in report.markdown(measured)


def test_means_and_charts_take_no_gaps():
    def result(shape, dtype, row, ratio):
        return {
            "work": "paper layer",
            "shape": shape,
            "dtype": dtype,
            "pass": "both",
            "row": row,
            "is_ours": row == "cpp",
            "seconds": 1.0,
            "ratio": ratio,
            "rounds": 5,
            "light_share": None,
        }

    sizes = {"256": 1.0, "512": 4.0}
    results = [result(s, "float32", "cpp", 1.0) for s in sizes]
    results += [result(s, "float32", "eager + SDPA", ratio) for s, ratio in sizes.items()]
    results += [result("256", "float32", "eager + SDPA, compiled", 1.5)]
    measured = {"results": results, "lengths": [], "skipped": ["this"], "device": "cpu"}
    measured |= {"machine": suite.conditions(), "ceilings": CEILINGS}
    (table,) = report.tables(measured).values()
    assert table[-1][:5] == ["geometric mean", "float32", "", "2.00x", "-"]
    text = report.markdown(measured)
    assert 'x-axis ["paper 256", "paper 512"]' in text
    assert "    bar [1.00, 4.00]\n    line [1.00, 1.00]\n```" in text
    assert 'title "forward and backward in float32: time of eager + SDPA"' in text
    assert '"time, cpp = 1 (the line)" 0 --> 4' in text
    assert "Left out: this." in text
    # another dtype is not in the same mean, nor in the same chart
    measured["results"] = [*results, result("256", "bfloat16", "cpp", 1.0)]
    (table,) = report.tables(measured).values()
    assert [line[1] for line in table if line[0] == "geometric mean"] == ["float32"]
    assert report.markdown(measured).count("mermaid") == 1
    # the headline says where its peer was not measured, and what is not to be believed
    measured["results"] = [*results, result("1024", "float32", "cpp", 1.0)]
    line = "| paper layer | float32 | eager + SDPA | - | - | 1.00x to 4.00x (without 1024) | - |"
    text = report.headline([measured])
    assert line in text and "1024" not in text.partition("x-axis")[2]
    results[2]["wrong"] = "this is wrong"
    text = report.headline([measured])
    assert "1.00x to 4.00x! (without 1024)" in text and "! this is wrong" in text
    assert 'x-axis ["paper 512"]' in text


def test_headline_is_of_one_machine(tmp_path, capsys):
    path = ROOT / "benchmarks/results/cpu_avx2_float32.json"
    measured = report.load(path)
    measured["machine"]["cpu_level"] = "avx512"
    (tmp_path / "other.json").write_text(json.dumps(measured))
    assert cli.main(["bench", "--headline", str(path), str(tmp_path / "other.json")]) == 2
    assert "a headline is of one machine" in capsys.readouterr().err


def test_faster_peers_are_listed():
    measured = report.load(ROOT / "benchmarks/results/cpu_avx2_ops.json")
    (head, *lines) = report._slower_table(measured)
    ratios = [float(line[-1].rstrip("x")) for line in lines]
    assert ratios == sorted(ratios) and max(ratios) <= 1.0
    slower = [r for r in measured["results"] if r["ratio"] < 1.0 and not r["is_ours"]]
    assert len(lines) == len(slower) > 0 and len(head) == len(lines[0])
    for result in measured["results"]:
        result["ratio"] = 1.0 + result["ratio"]
    assert not report._slower_table(measured)


class _ReluInputs(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.nearest = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name.startswith("aten::relu"):
            self.nearest.append(args[0].abs().min().item())
        return function(*args, **(kwargs or {}))


def test_no_relu_of_the_mlp_is_at_its_kink():
    """There float32 and the oracle may differ by whole gradients."""
    work = works.WORKS["release layer"](TINY._replace(tokens=512, slots=512), torch.float32, "cpu")
    row = work.rows["eager"]()
    with torch.no_grad(), _ReluInputs() as seen:
        row.forward()
    # the MLP's two, and the pool's, whose sign is that of x
    assert sum(nearest > 0.1 for nearest in seen.nearest) == 2


def test_out_of_time_is_said(tiny):
    measured = suite.run(suite.Selection(works=("memory_update",)), 1e-9)
    assert len(measured["skipped"]) == 4 and not measured["results"]
    assert "memory_update tiny float32: out of time" in measured["skipped"]


def test_a_row_that_cannot_be_made_is_said(tiny):
    work = works.WORKS["memory_update"](TINY, torch.float32, "cpu")

    def fails():
        raise RuntimeError("no compiler\nand more")

    work.rows["oracle, compiled"] = fails
    skipped = []
    rows = suite.build_rows(work, (), skipped)
    assert "oracle, compiled" not in rows
    expected = "memory_update tiny float32, oracle, compiled: RuntimeError: no compiler"
    assert skipped == [expected]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nothing"], "unknown works"),
        (["memory_update", "--budget", "0"], "--budget must be above 0"),
        (["training step", "--shape", "16 of 512"], "no work"),
        (["--from", "{missing}"], "No such file"),
        (["--from", "{broken}"], "is no file that `bench --json` wrote"),
        (["--compare", "{other}", "{other}"], "has format 0"),
        (["--headline", "{lengths}"], "these files have none"),
    ],
)
def test_bad_requests(arguments, text, tmp_path, capsys):
    files = {"missing": tmp_path / "missing", "broken": tmp_path / "b", "other": tmp_path / "o"}
    files["lengths"] = ROOT / "benchmarks/results/cpu_avx2_lengths.json"
    files["broken"].write_text("{")
    files["other"].write_text('{"format": 0}')
    assert cli.main(["bench", *(argument.format(**files) for argument in arguments)]) == 2
    assert text in capsys.readouterr().err


def test_plots_say_where_matplotlib_is_from(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path = ROOT / "benchmarks/results/cpu_avx2_lengths.json"
    assert cli.main(["bench", "--from", str(path), "--plots", str(tmp_path)]) == 2
    assert 'pip install "lm2_kernels[bench]"' in capsys.readouterr().err


def test_committed_results_can_be_read():
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert files
    for path in files:
        measured = report.load(path)
        assert {"versions", "devices", "allocator"} <= set(measured["machine"])
        assert report.render(measured)


@pytest.mark.parametrize("document", ("README.md", "benchmarks/README.md"))
def test_documents_have_the_committed_tables(document, monkeypatch, capsys):
    text = (ROOT / document).read_text(encoding="utf-8")
    block = re.compile(r"<!-- (bench [^>]+) -->\n\n(.*?)\n<!-- end -->", re.DOTALL)
    blocks = block.findall(text)
    assert blocks and text.count("<!-- end -->") == len(blocks)
    monkeypatch.chdir(ROOT)
    for command, shown in blocks:
        assert cli.main(command.split()) == 0
        assert shown == capsys.readouterr().out
    # nor is there a result in a table of its own
    assert not re.search(r"^\|.*\d(x| %) \|", block.sub("", text), re.MULTILINE)


def test_all_committed_results_are_shown():
    text = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert f"<!-- bench --from benchmarks/results/{path.name} --markdown -->" in text


def test_shapes_say_where_they_come_from():
    assert all(shape.source for shape in ALL_SHAPES)
    assert len({shape.name for shape in ALL_SHAPES}) == len(ALL_SHAPES)


def test_benchmarks_run():
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    selected = "memory_update-odd-float32-forward"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "--benchmark-only",
        "-q",
        "-k",
        selected,
    ]
    # in a worker of pytest-xdist, it would think that it is one
    environment = {k: v for k, v in os.environ.items() if "XDIST" not in k}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "memory_update odd float32 forward" in done.stdout
