"""benchmarks/gpu: the whole programme on a CPU, all well and with kernels broken on purpose."""

import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import triton

from lm2_kernels.backends.triton import launch, tables
from lm2_kernels.bench import report
from tools import norms
from tools.fake_gpu import fake_gpu
from tools.native import needs_cpp

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "gpu"

# Python imports this before all else: it changes modules as they are imported. Ceilings, as they
# take seconds of a CPU; the file of the hardware suite, and seconds of an entry; and if asked for,
# of each backend a kernel that is wrong, one that hangs, and one that kills its process.
_CUSTOMIZE = """
import importlib.abc, importlib.machinery, os, signal, sys, time

def ceilings(module):
    module.ceilings = lambda dtypes, device: {"copy": 1e10} | {str(d)[6:]: 1e11 for d in dtypes}

def suite(module):
    module.TESTS = TESTS

def limits(module):
    right = module.run
    def limit(entry):
        # what hangs is not worth waiting for
        if BROKEN and any(name in entry.key for name in ("pooled_gate", "release layer")):
            return 3
        # without pytest-timeout, what hangs is waited for to the end
        return 16 if BROKEN and entry.key == "suite" else LIMIT
    module.run = lambda found, *args: right([e._replace(limit=limit(e)) for e in found], *args)

def broken(module):
    right = module.memory_update_forward
    module.memory_update_forward = lambda *args: tuple(1.05 * t for t in right(*args))
    module.pooled_gate_forward = lambda *args: time.sleep(1000)
    for name in ("", "_and_tanh", "_of_relu"):
        name = f"residual_layer_norm{name}_forward"
        setattr(module, name, lambda *args: os.kill(os.getpid(), signal.SIGKILL))

CHANGES = {"lm2_kernels.bench.measure": ceilings, "suite": suite, "entries": limits}
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
# in place of the hardware suite: its tests do what tests of such kernels would
_SUITE = """
import os, signal, time
import pytest
import triton

pytestmark = pytest.mark.gpu
OPS = ("memory_attention", "memory_update", "residual_layer_norm", "pooled_gate")

@pytest.mark.parametrize("op", OPS)
def test_op(op):
    if BROKEN:
        assert op != "memory_update"
        if op == "residual_layer_norm":
            os.kill(os.getpid(), signal.SIGKILL)
        if op == "pooled_gate":
            time.sleep(1000)

def test_past_2_31(): pass
def test_inductor(): pass
def test_sanitizer(): pass
"""
_PYTEST = """[pytest]
markers =
    gpu: needs a GPU
timeout = 5
timeout_method = thread
"""
_PHASES = ("smoke", "headline", "attention", "smoke_cpp", "suite", "big", "forms", "sanitizer")
_PHASES += ("sweep", "ncu", "graphs", "sweep_one", "where", "peers", "model")
# one sweep is enough of a rehearsal, whose batches are of one segment anyway
_REHEARSED = tuple(phase for phase in _PHASES if phase != "sweep_one")


@pytest.fixture
def rehearse(tmp_path):
    """Runs phases of the programme; returns the exit code and the rows of each."""

    def run(*, out, phases, limit, broken=False):
        scratch = tmp_path / f"broken {broken}"
        scratch.mkdir(exist_ok=True)
        tests = scratch / "test_tiny.py"
        values = f"BROKEN, LIMIT, TESTS = {broken}, {limit}, {str(tests)!r}\n"
        (scratch / "sitecustomize.py").write_text(values + _CUSTOMIZE)
        tests.write_text(values + _SUITE)
        (scratch / "pytest.ini").write_text(_PYTEST)
        command = [sys.executable, str(FOLDER / "run.py"), "--rehearse", "--out", str(out)]
        command += ["--budget", "1500"]
        for phase in phases:
            command += ["--only", phase]
        # in a worker of pytest-xdist, the suite would think that it is one
        environment = {k: v for k, v in os.environ.items() if "XDIST" not in k}
        environment |= {"PYTHONPATH": str(scratch), "OMP_NUM_THREADS": "1"}
        # plugins whose import takes longer than these tests
        unused = ("hypothesispytest", "benchmark", "anyio")
        environment["PYTEST_ADDOPTS"] = " ".join(f"-p no:{name}" for name in unused)
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert not done.stderr
        assert len(list(out.iterdir())) <= 6
        rows = {phase: {} for phase in phases}
        for name, content in _packed(out).items():
            if name.endswith(".json") and name.count("/") == 3:
                row = json.loads(content)
                rows.setdefault(name.split("/")[2], {})[row["key"]] = row
            elif name.endswith("/bench.json"):
                (out.parent / "bench.json").write_bytes(content)
        return done.returncode, rows, done.stdout

    return run


def _packed(out):
    """What is in the results, by path."""
    with tarfile.open(out / "results.tar.xz") as archive:
        files = [member for member in archive.getmembers() if member.isfile()]
        return {file.name: archive.extractfile(file).read() for file in files}


@needs_cpp
def test_all_of_it_and_going_on(rehearse, tmp_path):
    code, rows, output = rehearse(out=tmp_path / "a", phases=_REHEARSED, limit=300)
    failed = [row for found in rows.values() for row in found.values() if not row["ok"]]
    assert (code, failed) == (0, []), output
    assert all(rows[phase] for phase in _REHEARSED)
    assert {key.split()[1].split("-")[0] for key in rows["smoke"]} == {
        *("memory_attention", "memory_update", "residual_layer_norm", "pooled_gate"),
        *norms.NAMES,
    }
    assert rows["suite"]["suite"]["line"] == "4 passed (exit code 0)"
    joined = report.load(tmp_path / "bench.json")
    text = report.render(joined)
    for work in ("paper layer", "release layer", "memory_attention", "decode step"):
        assert f"{work}, forward" in text
    # from a copy, as on another machine of the same kind
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    again = rehearse(out=tmp_path / "b", phases=("headline", "suite"), limit=300)
    assert again[:2] == (0, rows)


@needs_cpp
def test_broken_kernels_cost_their_own_cases_alone(rehearse, tmp_path):
    pytest.importorskip("xdist")
    phases = ("smoke", "headline", "graphs", "suite")
    code, rows, output = rehearse(out=tmp_path / "a", phases=phases, limit=15, broken=True)
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
    assert not rows["graphs"]["release layer tiny"]["ok"]
    outcomes = rows["suite"]["suite"]["outcomes"]
    outcomes = {test.split("[")[1]: outcome for test, outcome in outcomes.items()}
    # without pytest-timeout all of it is stopped, and what is known by then is kept
    has_timeout = importlib.util.find_spec("pytest_timeout") is not None
    assert outcomes.pop("pooled_gate]", None) == ("FAILED" if has_timeout else None)
    assert outcomes == {
        "memory_attention]": "PASSED",
        "memory_update]": "FAILED",
        "residual_layer_norm]": "FAILED",
    }


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

sys.stdout.reconfigure(line_buffering=True)
found = [entries.Entry(work.__name__, work, 2.0) for work in (hangs, bad, dies, wrong, good)]
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

print("without a GPU:", run.machine(False, Path()))

def touched(*args, **kwargs):
    raise AssertionError("the GPU is touched before entries are forked")

torch.cuda._lazy_init = torch._C._cuda_getDeviceCount = torch.cuda.is_available = touched
for name in run.PRELOADED:
    importlib.import_module(name)
context = entries.Context(False, Path("results"), "sm_90")
for name, phase in run.PHASES.items():
    found = importlib.import_module(phase.module).entries(context, name)
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
        env=environment | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    without, how, *lines = done.stdout.splitlines()
    assert without.startswith("it needs an NVIDIA GPU") and how == "without a GPU: 2"
    counts = dict(line.split() for line in lines)
    assert counts["smoke"] == counts["smoke_cpp"] == "60"
    assert (counts["headline"], counts["graphs"]) == ("8", "6")
    assert int(counts["sweep_one"]) == int(counts["sweep"]) > 70
    assert int(counts["ncu"]) == 2


def test_a_row_of_ours_that_is_missing_is_tried_again(modules, monkeypatch):
    timings = modules("timings")
    row = {"row": "triton", "pass": "forward", "seconds": 1.0, "is_ours": True}
    report = {"results": [row], "skipped": ["cpp: it does not compile"]}
    monkeypatch.setattr(timings.suite, "run", lambda *_: report)
    for rows, ok in ((("triton", "SDPA"), True), (("triton", "cpp"), False)):
        found = timings._bench(timings.suite.Selection(rows=rows), 1.0, 0.0)
        assert (found["ok"], found["again"]) == (ok, not ok)
    assert "without ['cpp']" in found["line"] and "it does not compile" in found["line"]


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
                own = sweep.own_config(kernel, target, width, 8, None)
                assert isinstance(own, tables.AttentionConfig)
                found = sweep.neighbours(own)
                assert found[0] == own and 8 <= len(found) == len(set(found))
                for config in found:
                    assert config.num_warps in (4, 8, 16) and config.num_stages >= 1
                    assert min(config[:2]) >= 16
                forms = sweep.candidates(kernel, target, width, None)
                assert bool(forms) == (target == "sm_90") and not {*forms} & {*found}
                few = sweep.candidates(kernel, target, width, 16)
                assert bool(few) == (target == "sm_90" and kernel != "dkey_value")
                assert all(config.block_slots == 16 for config in few)


@pytest.mark.parametrize("phase", ("sweep", "sweep_one"))
def test_every_sweep_has_its_entries(modules, phase):
    sweep, entries = modules("sweep"), modules("entries")
    found = sweep.entries(entries.Context(False, FOLDER, "sm_90"), phase)
    keys = [entry.key for entry in found]
    assert len(set(keys)) == len(keys) > 100
    # what is predicted to be fast comes first, and the table's own is no candidate beside itself
    predicted = sum(
        candidate.is_for(triton.__version__)
        for several in tables.CANDIDATES.values()
        for candidate in several
    )
    assert all(key.endswith(("descriptors", "specialized")) for key in keys[:predicted])
    own = sweep.own_config("forward", "sm_90", 256, 8, None)
    name = f"forward K=256 {own.block_tokens}x{own.block_slots} warps {own.num_warps}"
    assert f"{name} stages {own.num_stages}" not in keys
    few = {key for key in keys if " N=256 " in key and "resident" in key}
    assert few and all("x256 " in key for key in few)


@pytest.mark.parametrize(("release", "compiled"), (("3.6.0", True), ("3.8.1", False)))
def test_a_form_is_tried_by_the_releases_that_compile_it(modules, monkeypatch, release, compiled):
    sweep = modules("sweep")
    monkeypatch.setattr(sweep.triton, "__version__", release)
    (only,) = (c.config for c in tables.CANDIDATES["forward", 256] if c.releases)
    assert (only in sweep.candidates("forward", "sm_90", 256, None)) == compiled


def test_the_sweep_launches_what_it_is_asked_to(modules):
    sweep = modules("sweep")
    with fake_gpu("sm_90", execute=False) as gpu:
        for kernel in sweep.KERNELS:
            own = sweep.own_config(kernel, "sm_90", 64, 1, None)
            call = sweep._attention("cpu", kernel, 64, None, 1, 32)
            for warps in (4, 8, 4):
                gpu.launches.clear()
                call(own._replace(num_warps=warps))
                assert gpu.launches[-1].num_warps == warps
            by_descriptors, *_ = sweep.candidates(kernel, "sm_90", 64, None)
            call(by_descriptors)
            assert gpu.launches[-1].signature["key_ptr"].startswith("tensordesc")
            for config in sweep.candidates(kernel, "sm_90", 64, 16):
                sweep._attention("cpu", kernel, 64, 16, 1, 32)(config)
                assert gpu.launches[-1].kernel.startswith("few_slots_")


_SETUP = """
import os, sys
from pathlib import Path
assert sys.argv[1:] == ["build_ext", "--inplace"]
assert int(os.environ["MAX_JOBS"]) >= 1
Path("lm2_kernels/_C.so").write_text("for " + os.environ["TORCH_CUDA_ARCH_LIST"])
Path("lm2_kernels/_build.json").write_text("{}")
"""
# the scheduler as it is, over entries that need neither torch nor a GPU
_PROGRAMME = """
import os, subprocess, sys, time, types
from pathlib import Path
import entries, run

tree, pids, how = Path(sys.argv.pop(1)), Path(sys.argv.pop(1)), sys.argv.pop(1)

def machine(is_rehearsal, folder):
    if how == "has no GPU":
        return 2
    found = {"key": "H100 of one kind", "target": "sm_90", "devices": [{"capability": "9.0"}]}
    found["built_from"] = "one"
    entries.save(folder / "machine.json", found)

def good(end):
    assert Path("lm2_kernels/_C.so").exists()
    for index in range(6):
        kernel = Path(os.environ["TRITON_CACHE_DIR"], str(index), "kernel.cubin")
        kernel.parent.mkdir(parents=True)
        kernel.write_bytes(bytes([index]) * 500)
    return {"line": "well"}

def last(end):
    if how == "hangs":
        pids.with_suffix(".part").write_text(f"{os.getppid()} {os.getpid()}")
        pids.with_suffix(".part").replace(pids)
        time.sleep(1000)
    kernels = Path(os.environ["TRITON_CACHE_DIR"]).glob("*/*.cubin")
    print(sorted(kernel.read_bytes()[0] for kernel in kernels))
    return {"line": "well"}

def found(context, phase):
    return [entries.Entry("good", good), entries.Entry("last", last)]

run.ROOT, run.PRELOADED, run.machine = tree, (), machine
run.PHASES = {"tiny": run.Phase("tiny", 100.0, needs_build=True)}
run.importlib.import_module = lambda name: types.SimpleNamespace(entries=found)
sys.exit(run.main())
"""


def test_going_on_after_a_stop(tmp_path):
    (tmp_path / "script.py").write_text(_PROGRAMME)
    tree, out, pids = (tmp_path / name for name in ("tree", "out", "pids"))
    (tree / "lm2_kernels").mkdir(parents=True)
    (tree / "setup.py").write_text(_SETUP)

    def start(how):
        command = [sys.executable, "-S", str(tmp_path / "script.py"), str(tree), str(pids), how]
        return subprocess.Popen(
            [*command, "--out", str(out), "--only", "tiny"],
            env=os.environ | {"PYTHONPATH": str(FOLDER)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def packed():
        return {name.split("/", 2)[-1]: content for name, content in _packed(out).items()}

    def stop(number):
        """Send it a signal in the entry that hangs, of which nothing goes on."""
        pids.unlink(missing_ok=True)
        with start("hangs") as process:
            _wait_for(pids.exists)
            process.send_signal(number)
            output = process.stdout.read()
        for pid in pids.read_text().split():
            _wait_for(functools.partial(_is_gone, pid))
        return process.returncode, output

    with start("has no GPU") as process:
        process.communicate()
    assert process.returncode == 2

    # asked to end: what there is by then is packed
    code, output = stop(signal.SIGTERM)
    assert code == 1 and "ok   good: well" in output and "build: exit code 0" in output
    assert json.loads(packed()["tiny/good.json"])["ok"] and "tiny/last.json" not in packed()
    assert packed()["_C.so"] == b"for 9.0"
    caches = sorted(out.glob("cache*"))
    assert len(caches) == 4 and len(list(out.iterdir())) == 6
    # what it goes on from, where it finds nothing in the folder that it is given
    kept = tree / "benchmarks" / "results" / "gpu"
    for file in out.iterdir():
        assert file.read_bytes() == (kept / file.name).read_bytes()
    shutil.rmtree(out)

    # it goes on with what was built, which it could not build now; killed, it leaves no process
    (tree / "setup.py").unlink()
    library = tree / "lm2_kernels" / "_C.so"
    library.unlink()
    code, output = stop(signal.SIGKILL)
    assert code == -signal.SIGKILL and "good" not in output
    assert library.read_text() == "for 9.0"

    caches = sorted(out.glob("cache*"))
    # a cache of which a part is spoilt serves as far as it goes
    for cache in (caches[0], kept / caches[0].name):
        cache.write_bytes(cache.read_bytes()[:100])
    with start("ends") as process:
        output = process.stdout.read()
    assert process.returncode == 0 and "cache0.tar.xz is of no use" in output
    assert packed()["tiny/last.txt"].decode().splitlines()[-1] == "[1, 2, 3, 5]"


def test_the_newest_whole_archives_are_gone_on_from(modules, tmp_path):
    run = modules("run")
    places = [tmp_path / "given", tmp_path / "kept"]

    def pack(place, text, age):
        (tmp_path / "results").mkdir(exist_ok=True)
        (tmp_path / "results" / "a").write_text(text)
        place.mkdir(exist_ok=True)
        file = place / "results.tar.xz"
        file.write_bytes(run._archive([tmp_path / "results"], tmp_path))
        os.utime(file, (time.time() - age,) * 2)
        return file

    def found(name):
        work = tmp_path / name
        work.mkdir()
        run.Programme(places, work, 1.0, True)
        return (work / "results" / "a").read_text()

    given, kept = pack(places[0], "older", 100), pack(places[1], "newer", 50)
    assert found("first") == "newer"
    given = pack(places[0], "newest", 0)
    given.write_bytes(given.read_bytes()[:50])
    assert found("second") == "newer" and given.read_bytes() == kept.read_bytes()


def _wait_for(condition):
    end = time.time() + 60.0
    while not condition():
        assert time.time() < end
        time.sleep(0.02)


def _is_gone(pid):
    """Ended, if perhaps nobody asked for its exit code yet."""
    state = Path("/proc", pid, "stat")
    try:
        return state.read_text().split()[2] == "Z"
    except OSError:
        return True


def test_phases_and_sittings(modules):
    run = modules("run")
    sittings = run.SITTINGS.values()
    assert {name for sitting in sittings for name in sitting.phases} == set(run.PHASES)
    assert tuple(run.PHASES) == _PHASES
    for sitting in sittings:
        assert len(set(sitting.phases)) == len(sitting.phases)
    # proven before it is tuned, the headline before what may be left over
    assert run.SITTINGS["first"].phases[:3] == ("smoke", "headline", "attention")
