"""Layers, attention and the model against their peers: works of ``lm2_kernels.bench``."""

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from entries import Context, Entry, save

from lm2_kernels import backends
from lm2_kernels.backends import triton  # noqa: F401 - once, before entries are forked
from lm2_kernels.bench import suite, works
from lm2_kernels.testing.cases import ALL_SHAPES, TINY, Shape

_SHAPES = {shape.name: shape for shape in ALL_SHAPES}
# A kernel of cuDNN's may fail at some sizes, and take its process with it: an entry of its own.
_PLAIN = (works.SDPA, works.RELEASED)
_KERNELS, _CUDNN = ("SDPA", "SDPA flash", "SDPA efficient"), "SDPA cudnn"
# the layers, and what of each is compiled
_LAYERS = {
    "paper layer": (works.SDPA, works.SDPA_CUDNN),
    "release layer": (works.RELEASED, works.SDPA, works.SDPA_CUDNN),
}
# of a phase: seconds of an entry's rounds, and its limit
_SECONDS = {"headline": (3.0, 45.0), "graphs": (4.0, 45.0), "model": (5.0, 45.0)}
_SECONDS |= {"attention": (2.0, 30.0), "where": (2.0, 30.0), "peers": (3.0, 150.0)}

_Piece = tuple[str, Shape, tuple[str, ...]]


def entries(context: Context, phase: str) -> list[Entry]:
    """Pieces of ``python -m lm2_kernels bench`` in bfloat16."""
    seconds, limit = _SECONDS[phase]
    # Triton's interpreter is no row
    pieces = _pieces(phase, "cpp" if context.is_rehearsal else "triton")
    if context.is_rehearsal:
        seconds = 0.1
        pieces = [(work, TINY, rows) for work, _, rows in itertools.islice(pieces, 1)]
    found = []
    for work, shape, rows in pieces:
        selection = suite.Selection(
            *((work,), (shape.name,), ("bfloat16",), rows),
            device=context.device,
            graphs=phase == "graphs",
            more_shapes=() if shape.name in _SHAPES else (shape,),
        )
        # ours, and one peer
        key = f"{work} {shape.name}" + (f" {rows[-1]}" if len(rows) == 2 else "")
        found.append(Entry(key, functools.partial(_bench, selection, seconds), limit))
    return found


def _pieces(phase: str, ours: str) -> Iterator[_Piece]:
    """Works, shapes and rows (none are all) of a phase, the most valuable first."""
    layers = list(itertools.product(("2048x8", "2048", "512"), _LAYERS))
    if phase == "headline":
        for rows in ((ours, works.RECOMPUTE, *_PLAIN, works.LIMIT), (ours, works.SDPA_CUDNN)):
            for name, layer in layers[:2]:
                yield layer, _SHAPES[name], rows
        for name, layer in layers[2:]:
            yield layer, _SHAPES[name], (ours, *_PLAIN, works.LIMIT)
    elif phase == "graphs":
        for name, layer in layers[::-1]:
            yield layer, _SHAPES[name], (ours, *_PLAIN)
    elif phase == "peers":
        for how, (name, layer) in itertools.product(("compiled", "max-autotune"), layers[:2]):
            for row in _LAYERS[layer]:
                yield layer, _SHAPES[name], (ours, f"{row}, {how}")
        for row, (name, layer) in itertools.product(("cpp", "eager"), layers):
            yield layer, _SHAPES[name], (ours, row)
        for how, (name, layer) in itertools.product(("compiled", "max-autotune"), layers[2:]):
            for row in _LAYERS[layer]:
                yield layer, _SHAPES[name], (ours, f"{row}, {how}")
    elif phase == "model":
        for work, name in (("decode step", "2048"), ("training step", "1024"), ("prefill", "1024")):
            yield work, _SHAPES[name], ()
    else:
        # attention alone, T = N: with dropout too, or at more sizes, where a peer may be faster
        names, sizes = ("memory_attention", works.DROPOUT), ((8, 2048), (1, 2048))
        if phase == "where":
            names, sizes = names[:1], itertools.product((8, 1), (512, 1024, 4096))
            # few slots under many tokens, bound by the queries' and the output's way through memory
            for slots, width in itertools.product((256, 64, 16), (256, 128)):
                title = f"K={width} B=8 T=2048 N={slots}"
                shape = Shape(title, 8, 2048, slots, 2048 // width, 2048, "a sweep")
                yield from _attention(names[0], shape, ours)
        for name, (batch, tokens), width in itertools.product(names, sizes, (256, 128, 64)):
            title = f"K={width} B={batch} T={tokens}"
            shape = Shape(title, batch, tokens, tokens, 2048 // width, 2048, "a sweep")
            yield from _attention(name, shape, ours)


def _attention(name: str, shape: Shape, ours: str) -> Iterator[_Piece]:
    if shape.dim // shape.heads <= 128:
        yield name, shape, (ours, *_KERNELS, _CUDNN)
    else:
        yield name, shape, (ours, *_KERNELS)
        yield name, shape, (ours, _CUDNN)


def _bench(selection: suite.Selection, seconds: float, end: float) -> dict:
    report = suite.run(selection, seconds)
    results = report["results"]
    shown = []
    for result in results:
        mark = "!" if "wrong" in result else ""
        shown.append(f"{result['row']} {result['pass']} {1e6 * result['seconds']:.0f}{mark} us")
    wrong = [result["wrong"] for result in results if "wrong" in result and result["is_ours"]]
    line = "; ".join([*dict.fromkeys(wrong), ", ".join(shown) or str(report["skipped"])])
    # a row of ours that cannot be made is no success, and perhaps can be when more is built
    own = set(selection.rows) & {*backends.NAMES, works.RECOMPUTE}
    own = own or set(works.our_backends(selection.device))
    missing = sorted(own - {result["row"] for result in results})
    if missing:
        line = f"without {missing}: {report['skipped']}; {line}"
    ok = not missing and not wrong
    return {"ok": ok, "again": bool(missing), "line": line, "report": report}


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
        joined = joined or report | {"skipped": [], "results": []}
        joined["skipped"] += report["skipped"]
        for result in report["results"]:
            key = tuple(result[name] for name in ("work", "shape", "dtype", "pass", "row"))
            found.setdefault(key, result)
        joined["results"] = list(found.values())
        suite.raise_ceilings(joined, report["ceilings"])
    if joined:
        save(folder / "bench.json", joined)
