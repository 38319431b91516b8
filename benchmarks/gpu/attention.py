"""Attention alone against each kernel of ``scaled_dot_product_attention``; T = N, width 2048."""

from entries import Context, Entry
from headline import bench_entry, ours

from lm2_kernels.bench import works
from lm2_kernels.bench.peers import SDPA_KERNELS
from lm2_kernels.testing import Shape

_WIDTH = 2048
_HEAD_WIDTHS = (256, 128, 64)


def entries(context: Context, what: str) -> list[Entry]:
    """With and without dropout at 2048; or "where" a kernel of torch's is faster than ours."""
    sizes = [(batch, tokens) for batch in (8, 1) for tokens in (512, 1024, 4096)]
    if what == "plain":
        sizes = [(1, 2048), (8, 2048)]
    names = (works.DROPOUT,) if what == "plain" else ()
    if context.is_rehearsal:
        sizes = [(1, 32)]
    shapes = [
        Shape(f"K={k} B={batch} T={tokens}", batch, tokens, tokens, _WIDTH // k, _WIDTH, "a sweep")
        for batch, tokens in sizes
        for k in (_HEAD_WIDTHS[:1] if context.is_rehearsal else _HEAD_WIDTHS)
    ]
    rows = (ours(context), *SDPA_KERNELS)
    return [
        bench_entry(context, work, shape, rows, seconds=2.0, limit=30.0)
        for work in ("memory_attention", *names)
        for shape in shapes
    ]
