"""How the hardware suite is run: deselected without a GPU, and left by workers that lost theirs."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

# torch itself, as far as the plugin asks it: importing it takes seconds a worker
_TORCH = """
import types

is_lost = False

def synchronize():
    if is_lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

cuda = types.SimpleNamespace(
    is_available=lambda: {available}, is_initialized=lambda: {available}, synchronize=synchronize
)
"""
_TESTS = """
import pytest
import torch

@pytest.mark.gpu
@pytest.mark.parametrize("index", range(40))
def test_kernel(index):
    torch.is_lost = torch.is_lost or index == 7
    torch.cuda.synchronize()

def test_other():
    pass
"""


@pytest.fixture
def session(tmp_path):
    """Runs pytest on 40 tests of kernels, of which one loses the GPU context, and another test."""

    def run(*arguments, available=True):
        (tmp_path / "torch.py").write_text(_TORCH.format(available=available))
        (tmp_path / "test_it.py").write_text(textwrap.dedent(_TESTS))
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs a GPU\n")
        command = [sys.executable, "-m", "pytest", "-p", "tools.hardware", "-p", "no:cacheprovider"]
        environment = {k: v for k, v in os.environ.items() if "XDIST" not in k}
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        paths = (str(tmp_path), str(Path(__file__).parent))
        done = subprocess.run(
            [*command, *arguments],
            cwd=tmp_path,
            env=environment | {"PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return run


def test_a_lost_context_costs_one_test(session):
    pytest.importorskip("xdist")
    code, output = session("-p", "xdist", "-n2", "-v")
    assert code == 1
    assert output.count("] PASSED") == 40, output
    # its own report, and that its worker has left
    failed = {line.split()[-1] for line in output.splitlines() if "] FAILED" in line}
    assert failed == {"test_it.py::test_kernel[7]"}
    assert "crashed while running 'test_it.py::test_kernel[7]'" in output


def test_a_lost_context_ends_a_run_without_workers(session):
    code, output = session()
    assert code == 1
    assert "the CUDA context is lost" in output
    assert "1 failed, 7 passed" in output


def test_without_a_gpu_workers_say_it_once(session):
    pytest.importorskip("xdist")
    code, output = session("-p", "xdist", "-n2", available=False)
    line = "40 tests of the hardware suite deselected: no CUDA device"
    assert (code, output.count(line)) == (0, 1), output
    assert "1 passed" in output and "skipped" not in output


def test_without_a_gpu_nothing_passes_that_was_asked_for(session):
    # what other options leave out is not this line's to count
    code, output = session("-m", "gpu", "-k", "kernel and 1", available=False)
    assert code == pytest.ExitCode.NO_TESTS_COLLECTED
    assert "13 tests of the hardware suite deselected" in output
