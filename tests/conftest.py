"""What every test gets: fixed seeds, poisoned memory, and a count of what each backend ran."""

import collections
import os
import warnings

import pytest
import torch

from tools import hardware
from tools.emulated_avx512 import avx512_reason
from tools.emulated_cuda import emulation_reason
from tools.native import cpp_reason

# the backends that the common suite (backends/test_backends.py) must have run on a machine without
# a GPU, but for what was not built here, whose reason every skipped test prints
REQUIRED_BACKENDS = [
    name
    for name, reason in (
        ("eager", None),
        ("triton", None),
        ("cpp", cpp_reason()),
        ("cpp-avx512", avx512_reason()),
        ("cpp-cuda", emulation_reason()),
    )
    if reason is None
]

# what takes longest by itself begins first: begun last, one worker would end the run alone
_LONGEST = ("test_sanitizers", "test_nvcc", "test_gpu_programme", "test_build", "test_commands")

_cases: collections.Counter[str] = collections.Counter()

# the suite's tensors are small: waking a second thread costs more than it does, and the cores are
# for the workers of `pytest -n`
torch.set_num_threads(int(os.environ.get("LM2_KERNELS_TEST_THREADS", "1")))


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty gives NaN, so that a result which nobody wrote cannot pass."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have a deterministic.*")
        yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed:
        _cases.update(value for name, value in report.user_properties if name == "backend")


def _whole_run(config) -> bool:
    is_filtered = config.option.keyword or any("::" in arg for arg in config.args)
    return not is_filtered and config.option.markexpr in ("", "not slow")


def pytest_sessionfinish(session, exitstatus):
    # under xdist the workers run the tests, and the controller alone sees all reports
    if hasattr(session.config, "workerinput") or not _cases or not _whole_run(session.config):
        return
    if any(_cases[name] == 0 for name in REQUIRED_BACKENDS):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_configure(config):
    config.pluginmanager.register(hardware)


def pytest_terminal_summary(terminalreporter, config):
    if not _cases:
        return
    counts = ", ".join(f"{name} {count}" for name, count in sorted(_cases.items()))
    terminalreporter.write_line(f"cases per backend: {counts}")
    for name in REQUIRED_BACKENDS:
        if _cases[name] == 0 and _whole_run(config):
            terminalreporter.write_line(f"FAILED: backend {name} ran no case", red=True)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in _LONGEST)
