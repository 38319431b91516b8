"""benchmarks/gpu: the whole programme on a CPU, all well and with kernels broken on purpose."""

import argparse
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from lm2_kernels.backends.triton import launch, tables
from lm2_kernels.bench import report
from tools.native import needs_cpp

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "gpu"

# Python imports this before all else: it changes modules of the package as they are imported.
# Ceilings, as they take seconds of a CPU; and if asked for, of each backend a kernel that is wrong,
# one that hangs, and one that kills its process.
_CUSTOMIZE = """
import importlib.abc, importlib.machinery, os, signal, sys, time

def ceilings(module):
    module.ceilings = lambda dtypes, device: {"copy": 1e10} | {str(d)[6:]: 1e11 for d in dtypes}

def broken(module):
    right = module.memory_update_forward
    module.memory_update_forward = lambda *args: tuple(1.05 * t for t in right(*args))
    module.pooled_gate_forward = lambda *args: time.sleep(1000)
    module.residual_layer_norm_forward = lambda *args: os.kill(os.getpid(), signal.SIGKILL)

CHANGES = {"lm2_kernels.bench.measure": ceilings}
if BROKEN:
    CHANGES |= {f"lm2_kernels.backends.{name}": broken for name in ("cpp", "triton")}

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in CHANGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            CHANGES[name](module)

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""
# in place of the hardware suite
_SUITE = """
import pytest

pytestmark = pytest.mark.gpu
OPS = ("memory_attention", "memory_update", "residual_layer_norm", "pooled_gate")

@pytest.mark.parametrize("op", OPS)
def test_op(op):
    import torch
    from lm2_kernels import testing
    case = next(case for case in testing.SMALL_CASES if case.op == op)
    assert all(c.passed for c in testing.check_case(case, torch.float32, "cpp"))

def test_past_2_31(): pass
def test_inductor(): pass
def test_sanitizer(): pass
"""
# as far as it is called here: it runs what it would profile
_NCU = """#!/bin/sh
while :; do case "$1" in */python*) exec "$@";; *) shift;; esac; done
"""
_PHASES = ("smoke", "headline", "attention", "smoke_cpp", "suite", "big", "sanitizer", "compile")
_PHASES += ("sweep", "ncu", "graphs", "peers", "model")


@pytest.fixture
def rehearse(tmp_path):
    """Runs phases of the programme; returns the exit code and the rows of each."""

    def run(*arguments, out, phases, broken=False):
        scratch = tmp_path / f"broken {broken}"
        scratch.mkdir(exist_ok=True)
        (scratch / "sitecustomize.py").write_text(_CUSTOMIZE.replace("BROKEN", str(broken)))
        (scratch / "test_tiny.py").write_text(_SUITE)
        (scratch / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs a GPU\n")
        (scratch / "ncu").write_text(_NCU)
        (scratch / "ncu").chmod(0o755)
        command = [sys.executable, str(FOLDER / "run.py"), "--rehearse", "--out", str(out)]
        command += ["--tests", str(scratch / "test_tiny.py"), *arguments]
        for phase in phases:
            command += ["--only", phase]
        # in a worker of pytest-xdist, the suite would think that it is one
        environment = {k: v for k, v in os.environ.items() if "XDIST" not in k}
        environment |= {"PYTHONPATH": str(scratch), "OMP_NUM_THREADS": "1"}
        # plugins whose import takes longer than these tests
        unused = ("hypothesispytest", "benchmark", "anyio")
        environment["PYTEST_ADDOPTS"] = " ".join(f"-p no:{name}" for name in unused)
        environment["PATH"] = f"{scratch}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert not done.stderr
        assert len(list(out.iterdir())) <= 8
        rows = {phase: {} for phase in phases}
        with tarfile.open(out / "results.tgz") as archive:
            for name in archive.getnames():
                if name.endswith(".json") and name.count("/") == 3:
                    row = json.load(archive.extractfile(name))
                    rows.setdefault(name.split("/")[2], {})[row["key"]] = row
                elif name.endswith("/bench.json"):
                    (out.parent / "bench.json").write_bytes(archive.extractfile(name).read())
        return done.returncode, rows, done.stdout

    return run


@needs_cpp
def test_all_of_it_and_going_on(rehearse, tmp_path):
    code, rows, output = rehearse(
        "--limit", "300", "--budget", "1500", out=tmp_path / "a", phases=_PHASES
    )
    failed = [row for found in rows.values() for row in found.values() if not row["ok"]]
    assert (code, failed) == (0, []), output
    assert all(rows[phase] for phase in _PHASES)
    assert {key.split()[1].split("-")[0] for key in rows["smoke"]} == {
        *("memory_attention", "memory_update", "residual_layer_norm", "pooled_gate")
    }
    assert rows["suite"]["suite"]["line"] == "4 passed (exit code 0)"
    joined = report.load(tmp_path / "bench.json")
    text = report.render(joined)
    for work in ("paper layer", "release layer", "memory_attention", "decode step"):
        assert f"{work}, forward" in text
    # from another folder, as on another machine of the same kind
    arguments = ("--earlier", str(tmp_path / "a"))
    again = rehearse(*arguments, out=tmp_path / "b", phases=("headline", "suite"))
    assert again[:2] == (0, rows)


@needs_cpp
def test_broken_kernels_cost_their_own_cases_alone(rehearse, tmp_path):
    pytest.importorskip("xdist")
    pytest.importorskip("pytest_timeout")
    phases = ("smoke", "headline", "suite")
    code, rows, output = rehearse("--limit", "20", out=tmp_path / "a", phases=phases, broken=True)
    assert code == 1
    lines = {op: [] for op in ("memory_attention", "memory_update", "residual", "pooled_gate")}
    for key, row in rows["smoke"].items():
        next(found for op, found in lines.items() if f" {op}" in key).append(row)
    assert all(row["ok"] for row in lines["memory_attention"]), output
    assert not any(row["ok"] or "again" in row for row in lines["memory_update"])
    assert {row["line"] for row in lines["residual"]} == {"killed by SIGKILL"}
    assert all(row["line"].startswith("stopped after") for row in lines["pooled_gate"])
    assert all(lines.values())
    # what disagrees is timed and marked, all else beside it is as it would be
    row = rows["headline"]["paper layer tiny"]
    marked = {r["row"] for r in row["report"]["results"] if "wrong" in r}
    assert not row["ok"] and marked == {"cpp", "recompute"}
    assert {"eager + SDPA", "limit"} < {r["row"] for r in row["report"]["results"]}
    assert "!" in report.render(report.load(tmp_path / "bench.json"))
    assert not rows["headline"]["release layer tiny"]["ok"]
    outcomes = rows["suite"]["suite"]["outcomes"]
    assert {test.split("[")[1]: outcome for test, outcome in outcomes.items()} == {
        "memory_attention]": "PASSED",
        "memory_update]": "FAILED",
        "residual_layer_norm]": "FAILED",
        "pooled_gate]": "FAILED",
    }


def test_without_a_gpu(tmp_path):
    command = [sys.executable, str(FOLDER / "run.py"), "--out", str(tmp_path / "out")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert "it needs an NVIDIA GPU" in done.stdout


_ENTRIES = """
import os, subprocess, sys, time
from pathlib import Path
import entries

folder, until = Path(sys.argv[1]), time.time() + float(sys.argv[2])

def good(end):
    return {"line": "1 us"}

def bad(end):
    raise ValueError("an odd thing")

def dies(end):
    os._exit(9)

def hangs(end):
    (folder / "pid").write_text(str(subprocess.Popen(["sleep", "1000"]).pid))
    time.sleep(1000)

def wrong(end):
    return {"ok": False, "line": "differs"}

found = [entries.Entry(work.__name__, work, 1.0) for work in (hangs, bad, dies, wrong, good)]
print(entries.run(found, folder, until, int(sys.argv[3])), "left")
"""


@pytest.mark.parametrize("at_once", ("1", "3"))
def test_entries(tmp_path, at_once):
    (tmp_path / "script.py").write_text(_ENTRIES)
    results = tmp_path / "results"

    def run(seconds):
        command = [sys.executable, "-S", str(tmp_path / "script.py"), str(results), seconds]
        return subprocess.run(
            [*command, at_once],
            env=os.environ | {"PYTHONPATH": str(FOLDER)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()

    assert run("0") == ["5 left"]
    lines = run("100")
    assert lines[-1] == "0 left"
    shown = {line.split(":")[0]: line.split(": ", 1)[1].rsplit(" (", 1)[0] for line in lines[:-1]}
    assert shown.pop("FAIL hangs").startswith("stopped after")
    assert shown == {
        "FAIL bad": "ValueError: an odd thing",
        "FAIL dies": "exit code 9",
        "FAIL wrong": "differs",
        "ok   good": "1 us",
    }
    # what an entry started is gone too
    state = Path("/proc", (results / "pid").read_text(), "stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
    # what ended is not run again, right or wrong
    again = {line.split(":")[0] for line in run("100")}
    assert again == {"FAIL hangs", "FAIL bad", "FAIL dies", "0 left"}


@pytest.fixture
def modules(monkeypatch):
    """Modules of the folder, by name."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name):
        before = set(sys.modules)
        __import__(name)
        for other in set(sys.modules) - before:
            if str(FOLDER) in str(getattr(sys.modules[other], "__file__", "")):
                loaded[other] = sys.modules.pop(other)
        return loaded[name]

    loaded = {}
    return load


_ALL_ENTRIES = """
import importlib, sys
from pathlib import Path
import entries, run
import torch, triton

def touched(*args, **kwargs):
    raise AssertionError("the GPU is touched before entries are forked")

torch.cuda._lazy_init = torch._C._cuda_getDeviceCount = torch.cuda.is_available = touched
context = entries.Context(False, Path("results"), {"target": "sm_90"}, "tests/test_gpu.py", None)
for name, phase in run.PHASES.items():
    found = importlib.import_module(phase.module).entries(context, phase.what)
    assert len({entries.file_of(Path(), entry.key) for entry in found}) == len(found), name
    print(name, len(found))
assert triton.runtime.driver._default is None
"""


def test_what_a_gpu_would_be_given(tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "script.py").write_text(_ALL_ENTRIES)
    paths = os.pathsep.join((str(FOLDER), str(ROOT)))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")],
        env=environment | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts = dict(line.split() for line in done.stdout.splitlines())
    assert counts["smoke"] == counts["smoke_cpp"] == "39"
    assert counts["headline"] == counts["graphs"] == "6"
    assert int(counts["compile"]) == int(counts["sweep"]) > 70


def test_outcomes_of_pytest(modules):
    output = (
        "[gw1] [  3%] PASSED tests/test_gpu.py::test_op[triton-B1-x=2] \n"
        "tests/test_gpu.py::test_layer[cpp] FAILED      [ 50%]\nSKIPPED [3] tests/a.py:1: no\n"
        "[gw0] [100%] FAILED tests/test_gpu.py::test_op[of two words] \n"
    )
    assert modules("suite").outcomes_of(output) == {
        "tests/test_gpu.py::test_op[triton-B1-x=2]": "PASSED",
        "tests/test_gpu.py::test_layer[cpp]": "FAILED",
        "tests/test_gpu.py::test_op[of two words]": "FAILED",
    }


def test_candidates_of_the_sweep(modules):
    sweep = modules("sweep")
    for kernel in sweep.KERNELS:
        for target in launch.TARGETS:
            for width in (64, 128, 256):
                own = sweep.own_config(kernel, target, width, 8)
                assert isinstance(own, tables.AttentionConfig)
                found = sweep.neighbours(own)
                assert found[0] == own and 8 <= len(found) == len(set(found))
                for config in found:
                    assert config.num_warps in (4, 8, 16) and config.num_stages >= 1
                    assert min(config[:2]) >= 16


_SETUP = """
import os, sys
from pathlib import Path
assert sys.argv[1:] == ["build_ext", "--inplace"]
assert int(os.environ["MAX_JOBS"]) >= 1
Path("lm2_kernels/_C.so").write_text("for " + os.environ["TORCH_CUDA_ARCH_LIST"])
Path("lm2_kernels/_build.json").write_text("{}")
"""


def test_extension_and_cache_of_an_earlier_sitting(modules, tmp_path, monkeypatch):
    run = modules("run")
    tree = tmp_path / "tree"
    (tree / "lm2_kernels").mkdir(parents=True)
    (tree / "setup.py").write_text(_SETUP)
    monkeypatch.setattr(run, "ROOT", tree)
    monkeypatch.setattr(run, "_PIECE", 1500)

    def programme(name, out, earlier=None):
        options = argparse.Namespace(out=out, earlier=earlier, budget=100.0, rehearse=False)
        (tmp_path / name).mkdir()
        found = run.Programme(options, tmp_path / name)
        folder = found.results / "H100 of one kind"
        folder.mkdir(exist_ok=True)
        machine = {"devices": [{"device": "cpu"}, {"capability": "9.0"}]}
        (folder / "machine.json").write_text(json.dumps(machine))
        found.start_build(folder)
        return found, folder

    first, folder = programme("first", tmp_path / "out")
    assert first.build is not None
    first.end_build(folder)
    assert "exit code 0" in first.said[-1]
    kernels = {f"kernels/{index}.cubin": os.urandom(500) for index in range(6)}
    (first.cache / "kernels").mkdir(parents=True)
    for name, code in kernels.items():
        (first.cache / name).write_bytes(code)
    first.pack(and_cache=True)
    pieces = sorted(path.name for path in (tmp_path / "out").glob("cache*"))
    assert 2 < len(pieces) <= run._PIECES and len(list((tmp_path / "out").iterdir())) <= 8

    library = tree / "lm2_kernels" / "_C.so"
    library.unlink()
    second, _ = programme("second", tmp_path / "other", tmp_path / "out")
    assert second.build is None and library.read_text() == "for 9.0"
    assert all((second.cache / name).read_bytes() == code for name, code in kernels.items())

    # half a cache is none, and no reason not to begin
    (tmp_path / "out" / pieces[-1]).unlink()
    third, _ = programme("third", tmp_path / "more", tmp_path / "out")
    assert not third.cache.exists() and third.build is None
    assert [line for line in third.said if line.startswith("nothing of cache")]


def test_phases_and_sittings(modules):
    run = modules("run")
    assert {name for phases in run.SITTINGS.values() for name in phases} == set(run.PHASES)
    assert set(_PHASES) | {"sweep_one", "where"} == set(run.PHASES)
    for phases in run.SITTINGS.values():
        assert len(set(phases)) == len(phases)
    # proven before it is tuned, the headline before what may be left over
    assert run.SITTINGS["first"][:3] == ("smoke", "headline", "attention")
