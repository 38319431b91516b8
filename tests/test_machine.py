"""Which device there is to compute on."""

import os
import platform

import pytest
import torch

from lm2_kernels import cli, machine
from tools.interpreter import run_python


@pytest.mark.parametrize(
    ("found", "types", "choices"),
    (
        (None, ("cpu",), ("cpu", "cuda")),
        ("cuda", ("cpu", "cuda"), ("cpu", "cuda")),
        ("xpu", ("cpu", "xpu"), ("cpu", "cuda", "xpu")),
        # has no float64
        ("mps", ("cpu",), ("cpu", "cuda")),
    ),
)
def test_the_accelerator_that_is_here(found, types, choices, monkeypatch):
    device = None if found is None else torch.device(found)

    def current_accelerator(check_available=False):
        assert check_available
        return device

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
    assert machine.device_types() == types and machine.best_device() == types[-1]
    assert machine.device_choices() == choices
    machine.check_device(types[-1])
    with pytest.raises(ValueError, match="'tpu': torch sees no GPU of this type"):
        machine.check_device("tpu")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that learns")
def test_memory_that_a_layer_frees_stays_with_the_process():
    code = """
import torch
import lm2_kernels as lm2

def is_of_the_heap():
    block = torch.empty(30 << 20, dtype=torch.uint8)
    place = block.data_ptr()
    for line in open("/proc/self/maps"):
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= place < last:
            return line.rstrip().endswith("[heap]")

layer, x = lm2.PaperMemory(16, 2), torch.randn(1, 4, 16)
layer(x, x)
print(is_of_the_heap())
"""
    # what the caller has set of it is respected, and so would hide it
    own = {name: None for name in os.environ if name.startswith("MALLOC_")}
    done = run_python(code, GLIBC_TUNABLES=None, LD_PRELOAD=None, **own)
    assert done.stdout == "True\n", done.stderr
    done = run_python(code, GLIBC_TUNABLES="glibc.malloc.trim_threshold=131072", LD_PRELOAD=None)
    assert done.stdout == "False\n", done.stderr


def test_too_little_memory_for_that_is_no_error(monkeypatch):
    monkeypatch.setattr(machine, "_LARGE_BLOCK", 1 << 62)
    machine.keep_freed_pages.__wrapped__()


@pytest.mark.parametrize("command", ("verify", "bench"))
def test_commands_take_the_accelerator_that_is_here(command, monkeypatch, capsys):
    for types in (("cpu",), ("cpu", "xpu")):
        monkeypatch.setattr(machine, "device_types", lambda types=types: types)
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert ("{cpu,cuda,xpu}" in capsys.readouterr().out) == ("xpu" in types)
        assert cli.main([command, "--device", "cuda"]) == 2
        assert "torch sees no GPU" in capsys.readouterr().err


def test_other_accelerators_are_listed(monkeypatch):
    class Module:
        get_device_name = staticmethod(lambda index: f"Arc {index}")

    monkeypatch.setattr(machine, "device_types", lambda: ("cpu", "xpu"))
    monkeypatch.setattr(torch, "get_device_module", lambda kind: Module)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    listed = [(entry["device"], entry["name"]) for entry in machine.devices()[1:]]
    assert listed == [("xpu:0", "Arc 0"), ("xpu:1", "Arc 1")]
