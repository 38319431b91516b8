"""``python -m lm2_kernels plan``: what a model takes, before anything is run."""

import argparse
import dataclasses
from pathlib import Path

import torch

from lm2_kernels.bench import measure
from lm2_kernels.bench.plan import CEILINGS, Ceiling, Plan, plan
from lm2_kernels.machine import best_device, memory_bytes
from lm2_kernels.model.config import LM2Config
from lm2_kernels.state import files
from lm2_kernels.terminal import check_json, columns, write_json

# by which a report is known
_KEYS = ("config", "plan", "bounds")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HERE = "here"


def add_plan(commands: argparse._SubParsersAction) -> None:
    """The ``plan`` command's arguments."""
    parser = commands.add_parser(
        "plan", help="parameters, operations and memory of a model, before anything is run"
    )
    parser.add_argument(
        "--config",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON with LM2Config's options, or a saved model's folder",
    )
    parser.add_argument("--batch", type=int, default=1, help="rows (1)")
    parser.add_argument(
        "--tokens", type=int, help="of a row in training; four segments unless given"
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(_DTYPES),
        default="float32",
        help="bfloat16 is autocast in training, and of the weights in decoding (float32)",
    )
    parser.add_argument(
        "--device",
        nargs="+",
        choices=(*CEILINGS, _HERE),
        default=list(CEILINGS),
        help="bounds for these by their data sheets, or for this machine as measured now "
        f"({' '.join(CEILINGS)})",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    parser.set_defaults(run=run_plan)


def run_plan(options: argparse.Namespace) -> int:
    """Print what the model takes."""
    check_json(options.json, _KEYS)
    config = _configuration(options.config)
    dtype = _DTYPES[options.dtype]
    tokens = 4 * config.segment_length if options.tokens is None else options.tokens
    found = plan(config, batch=options.batch, tokens=tokens, dtype=dtype)
    ceilings = {
        name: _measured(dtype) if name == _HERE else CEILINGS[name]
        for name in dict.fromkeys(options.device)
    }
    print(render(config, found, ceilings))
    report = {
        "config": config.to_dict(),
        "plan": dataclasses.asdict(found),
        "bounds": {
            name: {"ceiling": dataclasses.asdict(ceiling), "seconds": found.seconds(ceiling)}
            for name, ceiling in ceilings.items()
        },
    }
    write_json(options.json, report, _KEYS)
    return 0


def _configuration(path: Path) -> LM2Config:
    path = path / "config.json" if path.is_dir() else path
    try:
        values = files.read_json(path)
        is_saved = bool(values.pop("format", None))
        return LM2Config.from_saved(values) if is_saved else LM2Config.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--config {path}: {error}") from None


def _measured(dtype: torch.dtype) -> Ceiling:
    device = best_device()
    found = measure.ceilings([dtype], device)
    memory = memory_bytes()
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    bandwidth = found.pop("copy")
    return Ceiling(found, bandwidth, memory)


def render(config: LM2Config, found: Plan, ceilings: dict[str, Ceiling]) -> str:
    """The text that ``plan`` prints."""
    lines = [
        f"{config.num_hidden_layers} blocks, {config.hidden_size} wide, a memory of "
        f"{config.memory_slots} slots in {len(config.memory_layers)} of them "
        f"({config.formulation}, {config.flow}, {config.write}, {config.candidate})",
        "",
        f"a training step of {found.batch} x {found.tokens} tokens in segments of "
        f"{config.segment_length}, {found.dtype}",
    ]
    rows = [["", "parameters", "GFLOP forward", "GFLOP backward", "MiB kept for backward"]]
    for name, part in found.parts.items():
        rows.append([name, *_numbers(part.parameters, part.forward, part.backward, part.kept)])
    totals = (found.total(name) for name in ("parameters", "forward", "backward", "kept"))
    rows.append(["together", *_numbers(*totals)])
    lines += [f"  {line}" for line in columns(rows)]
    lines += ["", "memory, GiB"]
    rows = []
    for name, of in (("training", found.training), ("decoding", found.decoding)):
        each = ", ".join(f"{what} {count / 2**30:.3f}" for what, count in of.items())
        rows.append([name, f"{sum(of.values()) / 2**30:.3f}", each])
    lines += [f"  {line}" for line in columns(rows)]
    token = "none: this model cannot go on within a segment"
    if found.decode_flops is not None:
        token = f"{found.decode_flops / 1e9:.3f} GFLOP, all rows together"
    lines += [f"  the last token of a segment: {token}", "", "time, at least"]
    rows = [["", "training step, ms", "last token, us", "training fits"]]
    for name, ceiling in ceilings.items():
        step, token = found.seconds(ceiling).values()
        is_over = sum(found.training.values()) > ceiling.memory
        shown = "-" if token is None else f"{1e6 * token:,.3g}"
        rows.append([name, f"{1e3 * step:,.3g}", shown, "no" if is_over else "perhaps"])
    lines += [f"  {line}" for line in columns(rows)]
    return "\n".join(lines)


def _numbers(parameters: float, forward: float, backward: float, kept: float) -> list[str]:
    return [
        f"{parameters:,.0f}",
        *(f"{f / 1e9:.3f}" for f in (forward, backward)),
        f"{kept / 2**20:.1f}",
    ]
