"""The benchmarks: every row of every work is right, reports are whole, and comparisons are fair."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lm2_kernels import __main__ as cli
from lm2_kernels.bench import measure, report, suite, works
from lm2_kernels.testing import SHAPES, Shape

TINY = Shape("tiny", 2, 16, 16, 2, 32, "these tests")
PIECE = Shape("piece", 2, 3, 16, 2, 32, "these tests")
READ = Shape("read", 1, 24, 16, 2, 32, "these tests")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(suite, "SHAPES", (TINY, PIECE))
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
    shares = measure.check(work, rows)
    assert set(shares) == {row for row in rows if row != works.LIMIT}
    assert any(row.is_ours for row in rows.values())
    for pass_name in work.passes:
        times = measure.measure(rows, pass_name, work.cotangents, "cpu", 0.0, fewest=2)
        assert all(len(row) == 2 and min(row) > 0.0 for row in times.values())


def test_a_wrong_row_is_refused(tiny):
    work = works.WORKS["memory_update"](TINY, torch.float32, "cpu")
    rows = {name: work.rows[name]() for name in ("eager", "oracle")}
    rows["eager"] = rows["eager"]._replace(
        forward=lambda: tuple(output * 1.001 for output in rows["oracle"].forward()),
        leaves=rows["oracle"].leaves,
    )
    with pytest.raises(measure.DisagreementError, match="memory_update tiny float32: row 'eager'"):
        measure.check(work, rows)


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
    peak = measure.peak_bytes(lambda: torch.ones(8_000_000).add(1.0), "cpu")
    assert peak is None or 60e6 < peak < 80e6


def test_a_report_and_what_is_shown_of_it(tiny, tmp_path, capsys, monkeypatch):
    selection = suite.Selection(
        works=("memory_attention", "release layer"),
        rows=("cpp", "eager", "oracle"),
        dtypes=("float32",),
        has_lengths=True,
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
    assert len(list((tmp_path / "plots").glob("*.png"))) == 3

    for result in measured["results"]:
        result["seconds"] /= 2.0
    faster = tmp_path / "b.json"
    faster.write_text(json.dumps(measured))
    assert cli.main(["bench", "--compare", str(path), str(faster)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + len(measured["results"])
    assert all(line.endswith("2.00x") for line in lines[3:])


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
        (["release layer", "--shape", "few slots"], "no work"),
        (["--from", "{missing}"], "No such file"),
        (["--from", "{broken}"], "is no file that `bench --json` wrote"),
        (["--compare", "{other}", "{other}"], "has format 0"),
    ],
)
def test_bad_requests(arguments, text, tmp_path, capsys):
    files = {"missing": tmp_path / "missing", "broken": tmp_path / "b", "other": tmp_path / "o"}
    files["broken"].write_text("{")
    files["other"].write_text('{"format": 0}')
    assert cli.main(["bench", *(argument.format(**files) for argument in arguments)]) == 2
    assert text in capsys.readouterr().err


def test_committed_results_can_be_read():
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert files
    for path in files:
        measured = report.load(path)
        assert {"versions", "devices", "allocator"} <= set(measured["machine"])
        assert report.render(measured)


def test_readme_has_the_committed_tables():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- bench --from (\S+) -->\n\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert blocks
    for path, shown in blocks:
        assert shown == report.readme(report.load(ROOT / path))


def test_shapes_say_where_they_come_from():
    assert all(shape.source for shape in SHAPES)
    assert len({shape.name for shape in SHAPES}) == len(SHAPES)


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
