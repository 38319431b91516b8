"""What this machine has and which backend runs here, for ``python -m lm2_kernels info``."""

import importlib
import os
import platform
import subprocess

import torch
from torch import Tensor

from lm2_kernels import backends, extension, products, testing
from lm2_kernels.version import __version__


def collect() -> dict:
    """Versions, devices and the backend x op table, ready for JSON."""
    return {
        "versions": versions(),
        "devices": devices(),
        "default_backend": {
            "request": backends.requested_backend(),
            "from_environment": bool(os.environ.get(backends.ENVIRONMENT_VARIABLE)),
        },
        "compiled": extension.build_info(),
        "cpu_products": products.report(),
        # device -> backend -> op -> why not, None where it runs
        "unsupported": {
            device: {
                name: {
                    op: unsupported_reason(name, op, torch.float32, device) for op in backends.OPS
                }
                for name in backends.NAMES
            }
            for device in (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
        },
    }


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


def devices() -> list[dict]:
    """The CPU and every GPU that torch sees."""
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
    return found


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def example_tensors(op: str, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """The tensors of the op's first case, to ask a backend about a dtype on a device."""
    case = next(case for case in testing.SMALL_CASES if case.op == op)
    return tuple(testing.make_inputs(case, dtype, device).tensors.values())


def unsupported_reason(name: str, op: str, dtype: torch.dtype, device: str) -> str | None:
    """Why a backend cannot run an op in a dtype on a device, or None if it can."""
    return backends.unsupported_reason(name, op, *example_tensors(op, dtype, device))


def render(report: dict) -> str:
    """The text that ``info`` prints."""
    lines = ["versions", *_table(report["versions"]), "devices"]
    width = max(map(len, report["versions"]))
    for entry in report["devices"]:
        device, name, *rest = entry.values()
        details = [f"{key} {value}" for key, value in zip(list(entry)[2:], rest, strict=True)]
        lines.append(f"  {device:<{width}}  {name} ({', '.join(details)})")
    default = report["default_backend"]
    source = f" (from {backends.ENVIRONMENT_VARIABLE})" if default["from_environment"] else ""
    lines += ["default backend", f"  {default['request']}{source}"]
    lines.append("compiled backend (cpp)")
    lines += _table(report["compiled"])
    lines += ["matrix products on cpu", *_table(report["cpu_products"])]
    for device, table in report["unsupported"].items():
        reasons: list[str] = []
        rows = [["", *backends.OPS]]
        for name, by_op in table.items():
            rows.append([name])
            for reason in by_op.values():
                if reason is not None and reason not in reasons:
                    reasons.append(reason)
                cell = "available" if reason is None else f"no [{reasons.index(reason) + 1}]"
                rows[-1].append(cell)
        lines.append(f"float32 tensors on {device}")
        lines += [f"  {line}" for line in columns(rows)]
        lines += [f"  [{index}] {reason}" for index, reason in enumerate(reasons, start=1)]
    return "\n".join(lines)


def _table(entries: dict[str, str]) -> list[str]:
    return [f"  {line}" for line in columns([list(entry) for entry in entries.items()])]


def columns(rows: list[list[str]]) -> list[str]:
    """The rows as lines of left-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
