"""How near is near enough: no test has a tolerance of its own.

In float64 two ways to compute the same are equal to round-off (:func:`assert_round_off`). In other
dtypes a result is held to the float64 oracle by the rule of :mod:`lm2_kernels.testing`, over
several draws where a failure may be luck (:func:`assert_rule`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lm2_kernels import testing

# ulps of a tensor's largest element, or of 1: gradients whose true value is 0 are sums of terms of
# order 1, and the order of operations is free
ROUND_OFF_ULPS = 512


def assert_round_off(got: Tensor, want: Tensor, name: str = "") -> None:
    """Equal to round-off, in float64."""
    assert got.dtype == want.dtype == torch.float64, name
    assert got.shape == want.shape, name
    if want.numel() == 0:
        return
    error = (got - want).abs().max().item()
    bound = ROUND_OFF_ULPS * torch.finfo(torch.float64).eps * max(1.0, want.abs().max().item())
    # a NaN is not <= anything
    assert error <= bound, f"{name}: {error} of {bound}"


def tf32_comparisons(case: testing.Case, seed: int, device: str) -> list[testing.Comparison]:
    """float32 by TF32 tensor cores: the rule, with twice what eager float16 is off by. That has as
    many bits as TF32 has, and rounds where tensor cores cut off.
    """
    inputs = testing.make_inputs(case, torch.float32, device, seed=seed)
    results = testing.run_case(case, inputs, "triton", seed=seed)
    oracle = testing.run_reference(case, inputs, torch.float64, seed=seed)
    eager = testing.run_reference(case, inputs, torch.float16, seed=seed)
    compared = []
    for name, got in results.items():
        off_by = 2.0 * (eager[name].double() - oracle[name])
        # what is 0, terms that cancel, is 0 to round-off: kernels differ in their instruction
        off_by = torch.where(off_by == 0.0, 2.0**-20, off_by)
        compared.append(testing.compare(name, got, oracle[name], oracle[name] + off_by))
    return compared


def assert_rule(
    run: Callable[[int], list[testing.Comparison]], seed: int = 0, **options: float
) -> None:
    """Every comparison that ``run`` returns for a seed passes, as ``testing.judge`` sees it."""
    worst = [c for c in testing.judge(run, seed, **options) if not c.passed]
    assert not worst, worst
