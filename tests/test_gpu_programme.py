"""benchmarks/gpu_programme.py: what of it runs without a GPU."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from lm2_kernels.backends.triton import launch, tables
from lm2_kernels.bench import report
from lm2_kernels.bench import suite as bench_suite

_SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_programme.py"


@pytest.fixture(scope="module")
def programme():
    spec = importlib.util.spec_from_file_location("gpu_programme", _SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def started(programme, monkeypatch):
    """Pieces "good", "bad" and "slow" instead of the real ones; yields which were started."""
    names = []
    code = {
        "good": "",
        "bad": "raise SystemExit('no such kernel')",
        "slow": "import time; time.sleep(60)",
    }

    def command(name, run):
        names.append(name)
        record = programme.load(run.out, name) | {"status": "done"}
        record["rows"] = {"one": {"ok": True, "line": f"{name} is measured"}}
        if name == "good":
            programme.save(run.out, record)
        return [sys.executable, "-S", "-c", code[name]]

    pieces = {name: programme.Piece(f"about {name}", 0.5, lambda: iter(())) for name in code}
    monkeypatch.setattr(programme, "PIECES", pieces)
    monkeypatch.setattr(programme, "missing_gpu", lambda: None)
    monkeypatch.setattr(programme, "child_command", command)
    return names


def _record(out, name):
    return json.loads((out / f"{name}.json").read_text())


def test_without_a_gpu(programme, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert programme.main(["--out", str(tmp_path / "out")]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_list(programme, capsys):
    assert programme.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(programme.PIECES)
    assert sum(piece.share for piece in programme.PIECES.values()) == pytest.approx(1.0)


def test_selection_and_resuming(programme, started, tmp_path, capsys):
    run = ["--out", str(tmp_path), "--only", "good"]
    assert programme.main(run) == 0
    assert programme.main(run) == 0
    assert started == ["good"]
    assert "good: done before" in capsys.readouterr().out
    assert programme.main([*run, "--again"]) == 0
    assert started == ["good", "good"]
    assert "good is measured" in capsys.readouterr().out
    assert {"versions", "devices"} <= set(_record(tmp_path, "good")["environment"])
    with pytest.raises(SystemExit, match="2"):
        programme.main(["--only", "neither"])


def test_another_machine_starts_again(programme, started, tmp_path):
    run = ["--out", str(tmp_path), "--only", "good"]
    assert programme.main(run) == 0
    record = _record(tmp_path, "good")
    record["environment"]["versions"]["triton"] = "2.0.0"
    programme.save(tmp_path, record)
    assert programme.main(run) == 0
    assert started == ["good", "good"]


def test_failure_is_recorded_and_the_rest_goes_on(programme, started, tmp_path, capsys):
    run = ["--out", str(tmp_path), "--only", "bad", "--only", "good"]
    assert programme.main(run) == 1
    assert started == ["bad", "good"]
    assert _record(tmp_path, "bad")["status"] == "failed"
    assert "exit code 1\nno such kernel" in _record(tmp_path, "bad")["error"]
    assert _record(tmp_path, "good")["status"] == "done"
    assert "no such kernel" in capsys.readouterr().out
    # what failed is tried again
    assert programme.main(run) == 1
    assert started == ["bad", "good", "bad"]


def test_time_limit(programme, started, tmp_path):
    record = programme.start_piece("slow", tmp_path, 0.3)
    assert record["status"] == "failed"
    assert "stopped after" in record["error"]


def _run_entries(programme, monkeypatch, tmp_path, until=float("inf"), **works):
    entries = [programme.Entry(key, work) for key, work in works.items()]
    monkeypatch.setitem(programme.PIECES, "graphs", programme.Piece("", 1.0, lambda: iter(entries)))
    programme.run_piece("graphs", programme.Run(tmp_path, until))
    return _record(tmp_path, "graphs")


def test_entries(programme, monkeypatch, tmp_path):
    monkeypatch.setattr(programme, "_gpu_works", lambda: True)
    calls = []

    def good(run):
        calls.append("good")
        return {"line": "1 us"}

    def bad(run):
        calls.append("bad")
        raise RuntimeError("an odd thing")

    def wrong(run):
        calls.append("wrong")
        return {"ok": False, "line": "differs"}

    record = _run_entries(programme, monkeypatch, tmp_path, until=0.0, good=good)
    assert (record["status"], record["rows"], calls) == ("unfinished", {}, [])
    record = _run_entries(programme, monkeypatch, tmp_path, bad=bad, good=good)
    assert record["status"] == "failed"
    assert "an odd thing" in record["rows"]["bad"]["error"]
    assert record["rows"]["good"] == {"ok": True, "line": "1 us"}
    # new ones, then those that failed; none that is done
    calls.clear()
    record = _run_entries(programme, monkeypatch, tmp_path, bad=bad, good=good, wrong=wrong)
    assert (record["status"], calls) == ("failed", ["wrong", "bad"])
    record = _run_entries(programme, monkeypatch, tmp_path, bad=good, good=bad, wrong=good)
    assert record["status"] == "done"


def test_a_broken_gpu_ends_the_piece(programme, monkeypatch, tmp_path):
    monkeypatch.setattr(programme, "_gpu_works", lambda: False)

    def fault(run):
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        _run_entries(programme, monkeypatch, tmp_path, first=fault, second=fault)
    assert set(_record(tmp_path, "graphs")["rows"]) == {"first"}


def test_outcomes_of_pytest(programme):
    workers = "[gw1] [  3%] PASSED tests/test_gpu.py::test_op[triton-B1-x=2] \n"
    alone = "tests/test_gpu.py::test_layer[cpp] FAILED      [ 50%]\nSKIPPED [3] tests/a.py:1: no\n"
    assert programme.pytest_outcomes(workers + alone) == {
        "tests/test_gpu.py::test_op[triton-B1-x=2]": "PASSED",
        "tests/test_gpu.py::test_layer[cpp]": "FAILED",
    }


def test_bench(programme, monkeypatch, tmp_path):
    for name, shape, dtype in programme.BENCH:
        assert len(bench_suite.Selection((name,), (shape,), (dtype,)).pieces()) == 1
    # as on a GPU, by the rows that a CPU has
    monkeypatch.setattr(programme, "DEVICE", "cpu")
    pieces = [("memory_update", "odd", "float32"), ("memory_update", "odd", "bfloat16")]
    monkeypatch.setattr(programme, "BENCH", pieces)
    programme.run_piece("bench", programme.Run(tmp_path, float("inf")))
    assert _record(tmp_path, "bench")["status"] == "done"
    joined = report.load(tmp_path / "bench_report.json")
    assert {r["dtype"] for r in joined["results"]} == set(joined["ceilings"]) - {"copy"}
    assert "memory_update, forward and backward" in report.render(joined)


def _places(programme):
    return itertools.product(
        programme.KERNELS, launch.TARGETS, programme.HEAD_WIDTHS, programme.SWEEP_BATCHES
    )


def test_candidates(programme):
    for kernel, target, width, batch in _places(programme):
        own = programme.own_config(kernel, target, width, batch)
        found = programme.candidates(kernel, width, own)
        assert found[0] == own
        assert 8 <= len(found) == len(set(found)) <= programme.CANDIDATES
        for config in found:
            for size in (config.block_tokens, config.block_slots):
                assert size >= 16
                assert size & (size - 1) == 0
            assert config.num_warps in (4, 8, 16)
            assert config.num_stages >= 1


def test_swapped_takes_effect_and_restores(programme):
    other = tables.AttentionConfig(16, 16, 4, 1)
    for kernel, target, width, batch in _places(programme):
        own = programme.own_config(kernel, target, width, batch)
        with pytest.raises(KeyError), programme.swapped(kernel, target, width, other):
            assert programme.own_config(kernel, target, width, batch) == other
            raise KeyError
        assert programme.own_config(kernel, target, width, batch) == own


def test_swapped_is_taken_at_every_shape(programme):
    # 128 rows a program are few programs here, for which the tables have another entry
    config = tables.AttentionConfig(128, 64, 8, 1)
    with programme.swapped("forward", "sm_90", 256, config):
        assert programme.own_config("forward", "sm_90", 256, 1) == config


def test_better_than_table(programme):
    def row(speedup, agrees=True, is_table=False):
        return {"speedup": speedup, "agrees": agrees, "is_table": is_table}

    rows = {"a": row(1.05), "b": row(1.02), "c": row(2.0, agrees=False), "d": row(1.2)}
    rows |= {"own": row(1.04, is_table=True), "refused": {"refused": "", "is_table": False}}
    assert programme.better_than_table(rows) == ["d: 1.200 x", "a: 1.050 x"]
