"""Layers and model against their peers: the works of ``lm2_kernels.bench``, a piece an entry."""

import functools
import json
from pathlib import Path

from entries import Context, Entry, save

from lm2_kernels.backends import triton  # noqa: F401 - once, before entries are forked
from lm2_kernels.bench import suite, works
from lm2_kernels.testing import GPU_SHAPES, SHAPES, Shape

LAYERS = ("paper layer", "release layer")
PLAIN = (works.RECOMPUTE, works.SDPA, works.SDPA_CUDNN, works.RELEASED, works.LIMIT)
_COMPILED = (works.SDPA, works.SDPA_CUDNN, works.RELEASED)
TINY = Shape("tiny", 1, 32, 32, 2, 32, "a rehearsal")


def shapes(context: Context, *names: str) -> list[Shape]:
    """Those of ``testing.py`` by name; in a rehearsal a tiny one."""
    by_name = {shape.name: shape for shape in (*SHAPES, *GPU_SHAPES)}
    return [TINY] if context.is_rehearsal else [by_name[name] for name in names]


def ours(context: Context) -> str:
    # Triton's interpreter is no row
    return "cpp" if context.is_rehearsal else "triton"


def entries(context: Context, what: str) -> list[Entry]:
    """Plain rows by work; or their "peers" that take long, a row an entry; or the "model"."""
    first, large = ours(context), shapes(context, "2048x8", "2048", "512")
    if what == "model":
        named = (("decode step", "2048"), ("training step", "1024"), ("prefill", "1024"))
        pairs = [(work, shape) for work, name in named for shape in shapes(context, name)]
        return [bench_entry(context, work, shape, (), seconds=5.0) for work, shape in pairs]
    pieces = [(layer, shape) for shape in large for layer in LAYERS]
    if what == "plain":
        return [bench_entry(context, *piece, (first, *PLAIN)) for piece in pieces]
    # what takes minutes to compile comes last
    slow = [f"{row}, {how}" for how in ("compiled", "max-autotune") for row in _COMPILED]
    rows = ["eager"] if context.is_rehearsal else ["cpp", "eager", *slow]
    return [
        bench_entry(context, *piece, (first, row), row, limit=150.0)
        for row in rows
        for piece in pieces
        if (works.RELEASED in row) <= (piece[0] == "release layer")
        and (works.SDPA in row) <= (piece[0] == "paper layer")
    ]


def bench_entry(
    context: Context,
    work: str,
    shape: Shape,
    rows: tuple[str, ...],
    title: str = "",
    seconds: float = 3.0,
    limit: float = 45.0,
    graphs: bool = False,
) -> Entry:
    """A piece of ``python -m lm2_kernels bench`` in bfloat16; ``seconds`` are its rounds'."""
    known = shape in (*SHAPES, *GPU_SHAPES)
    selection = suite.Selection(
        *((work,), (shape.name,), ("bfloat16",), rows),
        device=context.device,
        graphs=graphs,
        more_shapes=() if known else (shape,),
    )
    work_of = functools.partial(_bench, selection, 0.1 if context.is_rehearsal else seconds)
    return Entry(f"{work} {shape.name} {title}".strip(), work_of, limit)


def _bench(selection: suite.Selection, seconds: float, end: float) -> dict:
    report = suite.run(selection, seconds)
    results = report["results"]
    shown = []
    for result in results:
        mark = "!" if "wrong" in result else ""
        shown.append(f"{result['row']} {result['pass']} {1e6 * result['seconds']:.0f}{mark} us")
    wrong = [result["wrong"] for result in results if "wrong" in result and result["is_ours"]]
    line = "; ".join([*dict.fromkeys(wrong), ", ".join(shown) or str(report["skipped"])])
    measured = any(result["is_ours"] for result in results)
    return {"ok": measured and not wrong, "line": line, "report": report}


def join_reports(folder: Path) -> None:
    """All that was measured, as one file for ``python -m lm2_kernels bench --from``."""
    joined: dict = {}
    found: dict[tuple, dict] = {}
    # what is measured in several phases is taken from the headline
    files = sorted(folder.glob("*/*.json"), key=lambda f: (f.parent.name != "headline", str(f)))
    for file in files:
        report = json.loads(file.read_text(encoding="utf-8")).get("report")
        if report is None:
            continue
        del report["selection"]
        joined = joined or report | {"skipped": []}
        joined["skipped"] += report["skipped"]
        for result in report["results"]:
            key = tuple(result[name] for name in ("work", "shape", "dtype", "pass", "row"))
            found.setdefault(key, result)
        suite.raise_ceilings(joined | {"results": list(found.values())}, report["ceilings"])
    if joined:
        save(folder / "bench.json", joined | {"results": list(found.values())})
