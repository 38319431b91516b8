"""``python -m lm2_kernels info``: what this machine has and which backend runs here."""

import argparse
import os
from pathlib import Path

import torch

from lm2_kernels import backends
from lm2_kernels.backends import cpu_products, extension
from lm2_kernels.machine import device_types, devices, versions
from lm2_kernels.terminal import check_json, columns, write_json
from lm2_kernels.testing.cases import unsupported_reason

# by which a report is known
_KEYS = ("versions", "devices", "unsupported")


def add_info(commands: argparse._SubParsersAction) -> None:
    """The ``info`` command's arguments."""
    parser = commands.add_parser("info", help="versions, devices, and which backend runs what")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    parser.set_defaults(run=run_info)


def run_info(options: argparse.Namespace) -> int:
    """Print what is here."""
    check_json(options.json, _KEYS)
    report = collect()
    print(render(report))
    write_json(options.json, report, _KEYS)
    return 0


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
        "cpu_products": cpu_products.report(),
        # device -> backend -> op -> why not, None where it runs
        "unsupported": {
            device: {
                name: {
                    op: unsupported_reason(name, op, torch.float32, device) for op in backends.OPS
                }
                for name in backends.NAMES
            }
            for device in device_types()
        },
    }


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
