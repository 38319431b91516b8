"""Both layers by all that can do them: eager launches and replays of a CUDA graph side by side."""

from entries import Context, Entry
from headline import LAYERS, PLAIN, bench_entry, ours, shapes

from lm2_kernels.bench import works


def entries(context: Context, what: str) -> list[Entry]:
    rows = (ours(context), *(row for row in PLAIN if row != works.LIMIT))
    return [
        bench_entry(context, layer, shape, rows, "graphs", seconds=4.0, graphs=True)
        for shape in shapes(context, "512", "2048", "2048x8")
        for layer in LAYERS
    ]
