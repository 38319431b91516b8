"""The rule every backend is held to, and the cases it is held to: for tests, benchmarks, `verify`.

**The rule.** For a tensor k (an output or a gradient) against the float64 oracle r::

    max|k - r| <= m * max|e - r| + 2 * max|round(r) - r|        m = 2 for outputs, 3 for gradients
    rms(k - r) <= 1.5 * rms(e - r) + rms(round(r) - r)

where e is the oracle's code run in k's dtype on the same inputs, and round() rounds to k's dtype.
So a kernel may be about as wrong as plain PyTorch is, and no literal tolerance is needed. Gradients
whose true value is 0 are apart: a softmax over one slot passes no gradient, plain PyTorch finds an
exact 0 there, and a kernel that works from what the forward pass has rounded a rounding error.
These elements get the one absolute floor of the package, :data:`ZERO_FLOOR` ulps of 1 (inputs and
cotangents are of order 1). In float64 the oracle is its own yardstick, so k may be
:data:`FLOAT64_ULPS` ulps of max|r| away from it.

Eager's error in a tensor of a few hundred elements is partly luck, and differs from processor to
processor. So :func:`judge` takes the median of several draws where one fails narrowly.
"""

import functools
import inspect
import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lm2_kernels import functional, reference, unchecked
from lm2_kernels.backends import dropout
from lm2_kernels.testing.cases import Case, Inputs, Layout, make_inputs

ZERO_FLOOR = 16
FLOAT64_ULPS = 64
# how many draws of inputs judge a narrow failure, and what no draw may exceed
DRAWS = 9
NARROW = 2.0


def run_case(case: Case, inputs: Inputs, backend: str, *, seed: int = 0) -> dict[str, Tensor]:
    """Outputs and gradients of the public op on a backend, by name."""
    function = functools.partial(getattr(functional, case.op), backend=backend)
    torch.manual_seed(seed)
    return _differentiate(function, inputs, inputs.constants)


def run_reference(
    case: Case, inputs: Inputs, dtype: torch.dtype | None = None, *, seed: int = 0
) -> dict[str, Tensor]:
    """Outputs and gradients of the oracle, in ``dtype`` or the inputs' own dtypes."""
    constants = dict(inputs.constants)
    dropout_p = constants.get("dropout_p")
    if dropout_p is not None:
        constants["keep_mask"] = drawn_keep_mask(inputs, dropout_p, seed)
    if dtype is not None:
        inputs = Inputs(
            {name: tensor.detach().to(dtype) for name, tensor in inputs.tensors.items()},
            constants,
            tuple(cotangent.to(dtype) for cotangent in inputs.cotangents),
        )
    return _differentiate(getattr(reference, case.op), inputs, constants)


def drawn_keep_mask(inputs: Inputs, dropout_p: float, seed: int) -> Tensor:
    """The dropout mask that ``run_case`` with this seed uses. (B, H, T, N)"""
    batch, tokens, heads, _ = inputs.tensors["query"].shape
    device = inputs.tensors["query"].device
    torch.manual_seed(seed)
    drawn = unchecked.draw_seed(device)
    rows = torch.arange(batch * heads * tokens, device=device).view(batch, heads, tokens)
    return dropout.keep_mask(drawn, dropout_p, rows, inputs.tensors["key"].shape[1])


def _differentiate(
    function: Callable, inputs: Inputs, constants: dict[str, object]
) -> dict[str, Tensor]:
    # detach keeps strides, so a layout survives; the caller's tensors stay as they are
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.tensors.items()}
    positional = [
        leaves.pop(name)
        for name, parameter in inspect.signature(_unwrapped(function)).parameters.items()
        if name in leaves and parameter.kind == parameter.POSITIONAL_OR_KEYWORD
    ]
    outputs = function(*positional, **leaves, **constants)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    tensors = positional + list(leaves.values())
    gradients = torch.autograd.grad(outputs, tensors, inputs.cotangents)
    names = [name for name in inputs.tensors if name not in leaves] + list(leaves)
    results = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    results.update({f"d{name}": grad for name, grad in zip(names, gradients, strict=True)})
    return results


def _unwrapped(function: Callable) -> Callable:
    return function.func if isinstance(function, functools.partial) else function


class Comparison(NamedTuple):
    """How one tensor fares under the rule: its errors as a share of what is allowed."""

    name: str
    max_share: float
    rms_share: float

    @property
    def share(self) -> float:
        return max(self.max_share, self.rms_share)

    @property
    def passed(self) -> bool:
        # a NaN is not <= 1
        return self.share <= 1.0


@torch.no_grad()
def compare(name: str, got: Tensor, oracle: Tensor, eager: Tensor) -> Comparison:
    """Apply the rule of this module's docstring to one tensor."""
    if got.shape != oracle.shape:
        return Comparison(f"{name}: shape {tuple(got.shape)}", math.inf, math.inf)
    if got.numel() == 0:
        return Comparison(name, 0.0, 0.0)
    oracle = oracle.double()
    factor = 3.0 if name.startswith("d") else 2.0
    eps = torch.finfo(got.dtype).eps
    error = (got.double() - oracle).abs()
    if got.dtype == torch.float64:
        share = _share(error.max(), FLOAT64_ULPS * eps * oracle.abs().max())
        return Comparison(name, share, share)
    eager_error = (eager.double() - oracle).abs()
    rounding = (oracle.to(got.dtype).double() - oracle).abs()
    bound = factor * eager_error.max() + 2.0 * rounding.max()
    rms_bound = 1.5 * _rms(eager_error) + _rms(rounding)
    zero_share = 0.0
    if name.startswith("d"):
        zero = (oracle == 0.0) & (eager_error == 0.0)
        zero_share = _share(torch.where(zero, error, 0.0).max(), torch.tensor(ZERO_FLOOR * eps))
        error = torch.where(zero, 0.0, error)
    return Comparison(
        name, max(zero_share, _share(error.max(), bound)), _share(_rms(error), rms_bound)
    )


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _share(error: Tensor, bound: Tensor) -> float:
    error, bound = float(error), float(bound)
    if math.isnan(error):
        return math.inf
    if error == 0.0:
        return 0.0
    return error / bound if bound > 0.0 else math.inf


def compare_case(
    case: Case, inputs: Inputs, results: dict[str, Tensor], *, seed: int = 0
) -> list[Comparison]:
    """The rule for every output and gradient of a case."""
    oracle = run_reference(case, inputs, torch.float64, seed=seed)
    is_float64 = inputs.cotangents[0].dtype == torch.float64
    eager = oracle if is_float64 else run_reference(case, inputs, seed=seed)
    return [compare(name, got, oracle[name], eager[name]) for name, got in results.items()]


def check_case(
    case: Case,
    dtype: torch.dtype,
    backend: str,
    device: torch.device | str = "cpu",
    *,
    seed: int = 0,
    scale: float = 1.0,
    layout: Layout | None = None,
    narrow: float = NARROW,
) -> list[Comparison]:
    """The rule for a case on a backend, as :func:`judge` applies it to draws of its inputs."""

    def run(seed: int) -> list[Comparison]:
        inputs = make_inputs(case, dtype, device, seed=seed, scale=scale, layout=layout)
        results = run_case(case, inputs, backend, seed=seed)
        return compare_case(case, inputs, results, seed=seed)

    return judge(run, seed, narrow)


def judge(
    run: Callable[[int], list[Comparison]], seed: int = 0, narrow: float = NARROW
) -> list[Comparison]:
    """The rule for what ``run`` compares, given a seed: one draw, or the median of several.

    The first draw decides unless it fails by a factor below ``narrow``. Then others are run,
    :data:`DRAWS` in all, and each share is the median's, or the largest if that is a factor of
    ``narrow``: luck does not explain so much.
    """
    first = run(seed)
    if not 1.0 < max(comparison.share for comparison in first) < narrow:
        return first
    draws = [first, *(run(seed + 1000 + index) for index in range(1, DRAWS))]

    def together(shares: list[float]) -> float:
        return max(shares) if max(shares) >= narrow else statistics.median(shares)

    return [
        Comparison(
            tensor[0].name,
            together([comparison.max_share for comparison in tensor]),
            together([comparison.rms_share for comparison in tensor]),
        )
        for tensor in zip(*draws, strict=True)
    ]
