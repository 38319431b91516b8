"""Every kernel of a backend in every dtype, under the error rule of ``lm2_kernels.testing``."""

import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

from entries import Context, Entry

import lm2_kernels as lm2
from lm2_kernels import testing
from lm2_kernels.backends import triton  # noqa: F401 - once, before entries are forked

# how the suite checks what is no op of its own
sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "tests"))
from tools import norms

_Comparisons = Callable[[], list[testing.Comparison]]

# of norms that take along what lies beside them: the released model's, too wide for registers
_NORM_SHAPES = ((2, 2048, 2048), (1, 33, 16_384))
# of a memory_update with several tokens a slot
_CHUNKS = (
    (("tokens_per_slot", 32), ("output_gate", True), ("read", True)),
    (("tokens_per_slot", 9), ("gate_bias", "prefix"), ("gates", "slots")),
)


def entries(context: Context, phase: str) -> list[Entry]:
    backend = "cpp" if phase == "smoke_cpp" else "triton"
    dtypes, cases, shapes = ("bfloat16", "float32", "float16"), _cases(), _NORM_SHAPES
    if context.is_rehearsal:
        # one of each op
        dtypes, cases = ("float32",), {case.op: case for case in testing.SMALL_CASES}.values()
        shapes = norms.SHAPES[:1]
    device, checks = context.device, {}
    for dtype in dtypes:
        for case in cases:
            check = functools.partial(testing.check_case, case, testing.DTYPES[dtype], backend)
            checks[f"{dtype} {case.id}"] = functools.partial(check, device)
        for name, shape in itertools.product(norms.NAMES, shapes):
            pair = 2 * (testing.DTYPES[dtype],)
            check = functools.partial(norms.comparisons, backend, name, shape, *pair, 0, device)
            checks[f"{dtype} {name}-B{shape[0]}-T{shape[1]}-D{shape[2]}"] = check
    return [
        Entry(key, functools.partial(_check, check, backend), 45.0) for key, check in checks.items()
    ]


def _cases() -> list[testing.Case]:
    """The layers' shapes with eight segments cut to two, and what the kernels have branches for."""
    attention = functools.partial(testing.Case, "memory_attention")
    _, update, norm, pool = testing.GPU_SHAPES[0]._replace(batch=2).cases()
    return [
        *(attention(2, 2048, 2048, 2048 // width, width) for width in (256, 128, 64)),
        attention(2, 515, 1027, 4, 192, (("dropout_p", 0.9),)),
        attention(6, 77, 130, 4, 96, (("slot_mask", "random"),)),
        attention(2, 1, 2048, 8, 256, (("slot_offset", 2047),)),
        attention(1, 33, 40, 2, 17, (("slot_offset", 7),)),
        attention(2, 2048, 64, 16, 128, (("causal", False),)),
        *(update, update._replace(options=(("gate_bias", "segment"),))),
        *(update._replace(options=options) for options in _CHUNKS),
        *(norm, norm._replace(tokens=33, width=16_384)),
        *(pool, pool._replace(options=(("prefix", True),))),
    ]


def _check(check: _Comparisons, backend: str, end: float) -> dict:
    with lm2.recording() as ran:
        comparisons = check()
    names = {name for _, name in ran}
    worst = max(comparisons, key=lambda comparison: comparison.share)
    passed = all(comparison.passed for comparison in comparisons)
    return {
        "ok": passed and {name.partition("/")[0] for name in names} == {backend},
        "line": f"{worst.name} has {worst.share:.2f} of the allowed error, by {sorted(names)}",
        "comparisons": [repr(comparison) for comparison in comparisons],
    }
