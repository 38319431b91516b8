"""What a result can depend on: versions of software, and the devices of this machine."""

import contextlib
import functools
import importlib
import os
import platform
import subprocess

import torch

from lm2_kernels.version import __version__

# the largest that teaches glibc something is 32 MB, with what it adds to a block
_LARGE_BLOCK = 31 << 20


def versions() -> dict[str, str]:
    """Of everything a result can depend on; what is absent says why."""
    toolkit = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    return {
        "lm2_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch built for": next((f"{k} {v}" for k, v in toolkit.items() if v), "CPU"),
        "gpu driver": _driver(),
        "triton": _module_version("triton"),
        "numpy": _module_version("numpy"),
    }


def _module_version(name: str) -> str:
    try:
        return importlib.import_module(name).__version__
    except ImportError as error:
        return f"absent: {error}"


def _driver() -> str:
    if not torch.cuda.is_available():
        return "absent: torch sees no GPU"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
        return answer.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return f"unknown: {error}"


@functools.cache
def keep_freed_pages() -> None:
    """Have glibc keep the memory of a layer's temporaries from one call to the next.

    It maps blocks above a threshold apart, and returns what is free at the end of a heap as soon as
    that is more than twice the threshold, which follows the largest block that was mapped and
    freed, up to 32 MB. Pages that come back are cleared by the kernel first: of a layer of 512
    columns up to a fifth of the time. So one block of nearly as much is asked for here, once, and
    freed; nobody touches it. Afterwards blocks below 31 MB are of the heap, and up to 62 MB stay
    free at its end (and what lies below a block that is in use, as ever). A process that frees a
    large tensor of its own has the same. Thresholds set by the environment stay as they are, and
    other allocators do what they do.
    """
    # where memory is too short for that, the layer may yet have what it needs
    with contextlib.suppress(RuntimeError):
        torch.UntypedStorage(_LARGE_BLOCK, device="cpu")


def device_types() -> tuple[str, ...]:
    """Where this machine can compute: "cpu", then the type of the accelerator if there is one.

    MPS does not count: it has no float64, which positions and the oracle are computed in.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    return ("cpu",) if found is None or found.type == "mps" else ("cpu", found.type)


def best_device() -> str:
    """The accelerator's type, or "cpu"."""
    return device_types()[-1]


def device_choices() -> tuple[str, ...]:
    """What ``--device`` takes: "cuda" everywhere, so that asking without a GPU says so."""
    return tuple(dict.fromkeys(("cpu", "cuda", *device_types())))


def check_device(device: str) -> None:
    """Raise ValueError if there is no such device here."""
    if device not in device_types():
        raise ValueError(f"device '{device}': torch sees no GPU of this type")


def memory_bytes() -> int:
    """The memory of the CPU, whoever uses it."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def devices() -> list[dict]:
    """The CPU and every accelerator that torch sees."""
    found = [{"device": "cpu", "name": _cpu_name(), "threads": torch.get_num_threads()}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    kind = best_device()
    if kind not in ("cpu", "cuda"):
        # what else they tell differs from type to type
        name_of = torch.get_device_module(kind).get_device_name
        indices = range(torch.accelerator.device_count())
        found += [{"device": f"{kind}:{index}", "name": name_of(index)} for index in indices]
    return found


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
