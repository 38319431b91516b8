"""A pytest plugin for the hardware suite, the tests marked ``gpu``.

Without a CUDA device they are deselected, which one line says. A worker of pytest-xdist leaves once
its GPU context is lost, and pytest-timeout, where it is installed, ends what hangs.
"""

import os
from pathlib import Path

import pytest
import torch

# a kernel that hangs cannot be interrupted: the thread method ends the process
_SECONDS = 60
_DESELECTED = "gpu_tests_deselected"
# names a file that gets each failure as it comes
_FAILURES = "LM2_KERNELS_TEST_FAILURES"

_deselected = 0
_has_failed = False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Those that other options left."""
    global _deselected
    tests = [item for item in items if item.get_closest_marker("gpu")]
    if not tests:
        return
    if torch.cuda.is_available():
        if config.pluginmanager.hasplugin("timeout"):
            for item in tests:
                if item.get_closest_marker("timeout") is None:
                    item.add_marker(pytest.mark.timeout(_SECONDS, method="thread"))
        return
    _deselected = len(tests)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=tests)
    if hasattr(config, "workeroutput"):
        config.workeroutput[_DESELECTED] = _deselected


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Under xdist the workers collect, and the controller alone prints."""
    global _deselected
    _deselected = max(_deselected, getattr(node, "workeroutput", {}).get(_DESELECTED, 0))


def pytest_terminal_summary(terminalreporter):
    if _deselected:
        line = f"{_deselected} tests of the hardware suite deselected: no CUDA device"
        terminalreporter.write_line(line, yellow=True)


def pytest_runtest_logreport(report):
    global _has_failed
    _has_failed = _has_failed or report.failed
    file = os.environ.get(_FAILURES)
    if file and report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        with Path(file).open("a", encoding="utf-8") as failures:
            failures.write(f"{report.nodeid}\n{report.longreprtext[-3000:]}\n\n")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish():
    """After some errors every later CUDA call of the process fails, as would every later test.

    Now xdist has sent what there is to report and does not yet count the test as done: it counts
    this one as crashed, and no other.
    """
    global _has_failed
    if _has_failed and _context_is_lost():
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit("the CUDA context is lost: no later test can pass in this process", 1)
    _has_failed = False


def _context_is_lost() -> bool:
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
