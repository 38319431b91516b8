"""What a result is held to: the rule, the cases, and the promises of any model.

For tests, benchmarks and ``python -m lm2_kernels verify``, whose work is :mod:`.verify`.
"""

from lm2_kernels.testing.cases import (
    CASES,
    DTYPES,
    GPU_SHAPES,
    LARGE_CASES,
    SHAPE_CASES,
    SHAPES,
    SMALL_CASES,
    Case,
    Inputs,
    Shape,
    example_tensors,
    make_inputs,
    unsupported_reason,
)
from lm2_kernels.testing.invariants import (
    InvariantError,
    check_batch_independence,
    check_causality,
    check_padding,
    check_streaming,
)
from lm2_kernels.testing.rule import (
    DRAWS,
    FLOAT64_ULPS,
    NARROW,
    ZERO_FLOOR,
    Comparison,
    check_case,
    compare,
    compare_case,
    drawn_keep_mask,
    judge,
    run_case,
    run_reference,
)

__all__ = [
    "CASES",
    "DRAWS",
    "DTYPES",
    "FLOAT64_ULPS",
    "GPU_SHAPES",
    "LARGE_CASES",
    "NARROW",
    "SHAPES",
    "SHAPE_CASES",
    "SMALL_CASES",
    "ZERO_FLOOR",
    "Case",
    "Comparison",
    "Inputs",
    "InvariantError",
    "Shape",
    "check_batch_independence",
    "check_case",
    "check_causality",
    "check_padding",
    "check_streaming",
    "compare",
    "compare_case",
    "drawn_keep_mask",
    "example_tensors",
    "judge",
    "make_inputs",
    "run_case",
    "run_reference",
    "unsupported_reason",
]
