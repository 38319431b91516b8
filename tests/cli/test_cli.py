"""``python -m lm2_kernels``: what it prints and writes, and that a wrong backend cannot pass."""

import io
import json
import math
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

from lm2_kernels import backends, cli, testing
from lm2_kernels.backends import eager
from lm2_kernels.testing import verify
from lm2_kernels.version import __version__

# the first case of each op
CASES = [next(case for case in testing.SMALL_CASES if case.op == op) for op in backends.OPS]
RESULTS = Path(__file__).parents[2] / "benchmarks/results/cpu_avx2_lengths.json"
EAGER = ["verify", "--backend", "eager"]


def run_verify(*arguments, cases=CASES) -> int:
    return cli.main([*EAGER, *arguments], cases=cases)


def scaled(function, factor):
    """A backend function with its first result off by a factor."""

    def wrong(*args):
        first, *others = function(*args)
        return first * factor, *others

    return wrong


def test_module_runs():
    run = [sys.executable, "-m", "lm2_kernels", "--version"]
    done = subprocess.run(run, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == f"lm2_kernels {__version__}"


@pytest.mark.parametrize(
    ("arguments", "unbuffered"),
    ((["--from", str(RESULTS)], ""), (["--from", str(RESULTS)], "1"), (["--help"], "")),
    ids=("buffered", "unbuffered", "help"),
)
def test_a_reader_that_stops_is_no_error(arguments, unbuffered):
    """As of `| head -0`: nothing is said, neither by us nor by the interpreter at exit."""
    reads, writes = os.pipe()
    os.close(reads)
    run = [sys.executable, "-m", "lm2_kernels", "bench", *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    try:
        done = subprocess.run(
            run,
            stdout=writes,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=300,
            env=environment,
        )
    finally:
        os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("redirection", "code", "said"), ((">&-", 0, ""), (">/dev/full", 2, "No space left"))
)
def test_no_place_for_the_output(redirection, code, said):
    command = f'"{sys.executable}" -m lm2_kernels --version {redirection}'
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == code and said in done.stderr
    assert "Traceback" not in done.stderr


def test_info(capsys, tmp_path):
    file = tmp_path / "info.json"
    assert cli.main(["info", "--json", str(file)]) == 0
    text, report = capsys.readouterr().out, json.loads(file.read_text())
    for word in (*backends.NAMES, *backends.OPS, __version__, torch.__version__, "numpy", "cpu"):
        assert word in text
    assert f"  {backends.requested_backend()}" in text
    assert report["unsupported"]["cpu"]["eager"] == dict.fromkeys(backends.OPS)
    for by_op in report["unsupported"]["cpu"].values():
        for reason in by_op.values():
            assert reason is None or reason in text


def test_info_default_backend_from_environment(capsys, monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "eager")
    with backends.use_backend("eager"):
        assert cli.main(["info"]) == 0
    assert f"eager (from {backends.ENVIRONMENT_VARIABLE})" in capsys.readouterr().out


def test_verify_passes(capsys, tmp_path):
    file = tmp_path / "verify.json"
    # cuda's float64 is not what this is about
    assert run_verify("--device", "cpu", "--seed", "3", "--json", str(file)) == 0
    printed, report = capsys.readouterr(), json.loads(file.read_text())
    num_checks = (len(CASES) + len(verify.packaged_golden())) * len(testing.DTYPES)
    assert f"verify: {num_checks} checks passed" in printed.out
    assert "FAILED" not in printed.out
    for word in (*backends.OPS, "PaperMemory", "ReleaseMemory", *testing.DTYPES):
        assert word in printed.out
    # no terminal: one line of progress for each dtype
    assert len(printed.err.splitlines()) == len(testing.DTYPES)

    assert report["passed"] is True
    assert (report["num_checks"], report["num_failed"], report["seed"]) == (num_checks, 0, 3)
    assert {"torch", "triton", "gpu driver"} <= set(report["versions"])
    assert report["devices"][0]["device"] == "cpu"
    assert {(check["case"], check["dtype"]) for check in report["checks"]} == {
        (id, dtype)
        for id in [case.id for case in CASES] + [path.stem for path in verify.packaged_golden()]
        for dtype in testing.DTYPES
    }
    update = next(check for check in report["checks"] if check["subject"] == "memory_update")
    assert (update["backend"], update["device"], update["error"]) == ("eager", "cpu", None)
    names = {comparison["tensor"] for comparison in update["comparisons"]}
    assert {"output 0", "output 1", "dhidden", "dforget_gate"} <= names
    assert all(comparison["max_share"] <= 1.0 for comparison in update["comparisons"])


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_verify_finds_wrong_backend(capsys, monkeypatch, tmp_path, direction, dtype):
    function = f"memory_update_{direction}"
    monkeypatch.setattr(eager, function, scaled(getattr(eager, function), 1.01))
    file = tmp_path / "verify.json"
    assert run_verify("--device", "cpu", "--dtype", dtype, "--json", str(file)) == 1
    text, report = capsys.readouterr().out, json.loads(file.read_text())
    case = next(case for case in CASES if case.op == "memory_update")
    # both layers write with it
    failed = {check["case"] for check in report["checks"] if not check["passed"]}
    assert failed == {case.id, *(path.stem for path in verify.packaged_golden())}
    assert f"verify: {len(failed)} of {report['num_checks']} checks FAILED" in text
    assert f"{case.id} on eager, {dtype}, cpu" in text
    assert ("output 0: max error" if direction == "forward" else "dcandidate: max error") in text


def test_verify_reports_what_a_backend_raises(capsys, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("out of order")

    monkeypatch.setattr(eager, "pooled_gate_backward", broken)
    assert run_verify("--device", "cpu", "--dtype", "float32") == 1
    text = capsys.readouterr().out
    assert "ZeroDivisionError: out of order" in text
    assert "inf FAILED" in text


def test_verify_fails_where_another_backend_ran(capsys, monkeypatch):
    record = backends.record
    monkeypatch.setattr(backends, "record", lambda function, name: record(function, "cpp"))
    assert run_verify("--device", "cpu", "--dtype", "float32") == 1
    text = capsys.readouterr().out
    assert "backend 'eager' was asked for" in text
    assert f"{len(CASES) + len(verify.packaged_golden())} of" in text


def test_verify_fails_without_checks(capsys, monkeypatch):
    monkeypatch.setattr(verify, "packaged_golden", list)
    assert run_verify("--device", "cpu", cases=[]) == 1
    assert "no check ran" in capsys.readouterr().out


def test_verify_default_lists_skipped_backends(capsys, monkeypatch):
    unsupported_reason = backends.unsupported_reason

    def reason(name, op, *tensors):
        if name != "eager":
            return f"{name} is on holiday"
        if op == "pooled_gate":
            return "eager is tired"
        return unsupported_reason(name, op, *tensors)

    monkeypatch.setattr(backends, "unsupported_reason", reason)
    assert cli.main(["verify", "--dtype", "float32"], cases=CASES) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "skipped triton: triton is on holiday" in lines
    assert "skipped cpp: cpp is on holiday" in lines
    num_release = sum("release" in path.stem for path in verify.packaged_golden())
    skipped = f"pooled_gate/ReleaseMemory ({1 + num_release} cases)"
    assert f"skipped eager float32 {skipped}: eager is tired" in lines


def test_verify_explicit_unavailable(capsys, monkeypatch):
    monkeypatch.setattr(backends, "unsupported_reason", lambda *args: "it is on holiday")
    assert run_verify() == 2
    printed = capsys.readouterr()
    assert "backend 'eager' cannot run: it is on holiday" in printed.err
    assert printed.out == ""


def test_verify_device_without_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_verify("--device", "cuda") == 2
    assert "torch sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "--dtype", "int8"],
        ["verify", "--backend", "auto"],
        ["verify", "--device", "tpu"],
        ["prove"],
        [],
    ],
)
def test_bad_arguments(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: python -m lm2_kernels" in capsys.readouterr().err


def test_unwritable_json(capsys, tmp_path):
    assert cli.main(["info", "--json", str(tmp_path / "absent" / "file")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_triton_on_cpu_starts_the_interpreter(capsys, monkeypatch):
    calls = []

    def call(command, env):
        calls.append((command, env["TRITON_INTERPRET"]))
        return 7

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("lm2_kernels.cli.verify.subprocess", types.SimpleNamespace(call=call))
    arguments = ["verify", "--backend", "triton", "--device", "cpu"]
    assert cli.main(arguments) == 7
    assert calls == [([sys.executable, "-m", "lm2_kernels", *arguments], "1")]
    assert "interpreter" in capsys.readouterr().out


def test_interpreted_triton_runs_small_cases(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert verify.interpreted("triton") and not verify.interpreted("eager")
    assert verify._default_cases("triton") == testing.SMALL_CASES
    assert verify._default_cases("eager") == testing.CASES


def test_progress_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert run_verify("--device", "cpu", "--dtype", "float32") == 0
    shown = capsys.readouterr().err
    assert "\n" not in shown
    assert shown.count("\r\033[K[") == len(CASES) + len(verify.packaged_golden())
    assert shown.endswith("\r\033[K")


def test_verify_restores_torch_settings():
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    verify.verify(("eager",), ("float32",), "cpu", cases=CASES[:1])
    assert torch.get_num_threads() == threads
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize("path", verify.packaged_golden(), ids=lambda path: path.stem)
def test_golden_check_finds_each_wrong_tensor(monkeypatch, path):
    golden, differentiate = verify.load_golden(path), verify._differentiate
    for name in [*golden.group("outputs"), *golden.group("grads")]:
        # the true gradient of the keys' bias is 0, and so is any multiple of it
        if name == "key_proj.bias":
            continue

        def wrong(function, leaves, cotangents, keys=(f"output {name}", f"d{name}")):
            results = differentiate(function, leaves, cotangents)
            if function.__name__ == "run_layer":
                results |= {key: results[key] * 1.001 for key in keys if key in results}
            return results

        monkeypatch.setattr(verify, "_differentiate", wrong)
        for dtype in (torch.float32, torch.float64):
            with verify._steady_arithmetic():
                comparisons = verify._compare_golden("eager", dtype, "cpu", golden)
            assert not all(comparison.passed for comparison in comparisons), (name, dtype)


def test_report_survives_infinite_errors():
    infinite = testing.Comparison("dx", math.inf, math.nan)
    check = verify.Check("eager", "pooled_gate", "case", "float32", "cpu", [infinite], None)
    report = verify.Report([check], [], 0, 1.0)
    assert not report.passed
    text = json.dumps(verify.to_json(report), allow_nan=False)
    assert json.loads(text)["checks"][0]["comparisons"][0]["max_share"] is None


@pytest.mark.parametrize("command", (["info"], [*EAGER, "--dtype", "float32"], ["bench"]))
def test_json_replaces_json_alone(command, capsys, monkeypatch, tmp_path):
    """What somebody named by mistake is there still, and it is said before the work."""
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    for where, message in (
        (path, "holds no JSON"),
        (tmp_path, "is a folder"),
        ("/proc/report.json", "cannot write"),
    ):
        assert cli.main([*command, "--json", str(where)], cases=[]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert path.read_text() == "mine"
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]
    # what another program wrote, or another command
    for content in (
        {"name": "package", "versions": {}},
        {"format": "lm2_kernels"},
        [],
        {},
        {"a": 1},
    ):
        path.write_text(json.dumps(content))
        assert cli.main([*command, "--json", str(path)], cases=[]) == 2
        assert "JSON of something else" in capsys.readouterr().err
        assert json.loads(path.read_text()) == content


def test_json_of_an_earlier_run_is_replaced(capsys, tmp_path):
    path, link = tmp_path / "info.json", tmp_path / "link.json"
    link.symlink_to(path)
    for where in (path, path, link):
        assert cli.main(["info", "--json", str(where)]) == 0
        assert json.loads(path.read_text())["versions"]
    assert link.is_symlink()
    path.write_text("")
    assert cli.main(["info", "--json", str(path)]) == 0
    assert cli.main(["info", "--json", "/dev/full"]) == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert Path("/dev/full").is_char_device()


def test_json_goes_into_a_pipe():
    reader, writer = os.pipe()
    content = []

    def read():
        with open(reader, "rb") as file:
            content.append(file.read())

    thread = threading.Thread(target=read)
    thread.start()
    assert cli.main(["info", "--json", f"/dev/fd/{writer}"]) == 0
    os.close(writer)
    thread.join()
    assert json.loads(content[0])["versions"]


def test_a_terminal_without_unicode_ends_nothing(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr("lm2_kernels.cli.info.render", lambda _: "modèle")
    assert cli.main(["info"]) == 0
    assert out.buffer.getvalue() == b"mod\\xe8le\n"


def test_plots_need_a_folder(capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (tmp_path / "file").write_text("mine")
    assert cli.main(["bench", "--plots", str(tmp_path / "file")]) == 2
    assert "is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("text", ("-1", "x", str(2**63)))
def test_a_seed_that_no_generator_takes(capsys, text):
    with pytest.raises(SystemExit):
        cli.main(["verify", "--seed", text])
    assert "no integer from 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    (
        (ValueError("one\n  two"), 2),
        (MemoryError(), 2),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9"), 2),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 2),
        (KeyboardInterrupt(), 130),
    ),
)
def test_expected_failures_are_one_line(capsys, monkeypatch, error, code):
    def fail():
        raise error

    monkeypatch.setattr("lm2_kernels.cli.info.collect", fail)
    assert cli.main(["info"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m lm2_kernels info: error: ")
    assert len(line) > len("python -m lm2_kernels info: error: ")


def test_other_errors_are_not_hidden(monkeypatch):
    def fail():
        raise RuntimeError("a fault of the package")

    monkeypatch.setattr("lm2_kernels.cli.info.collect", fail)
    with pytest.raises(RuntimeError, match="a fault of the package"):
        cli.main(["info"])
