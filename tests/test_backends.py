"""The common suite: every op on every backend against the float64 oracle, forward and gradients.

Triton's kernels run on the CPU: each launch is compiled for a GPU target as the launcher asks for
it, its resources are checked, and it is then interpreted with every address checked and the
programs in shuffled order.
"""

import contextlib

import pytest
import torch

import lm2_kernels as lm2
from lm2_kernels import testing
from tools import launches

CPU_DTYPES = ("float32", "bfloat16", "float16", "float64")
TRITON_DTYPES = ("float32", "bfloat16", "float16")


@contextlib.contextmanager
def _on(backend: str, index: int = 0):
    """The backend made runnable on this machine, and a check of which one ran."""
    environment = contextlib.nullcontext()
    if backend == "triton":
        # the numerics of a case do not depend on the target, its tiles do: take turns
        targets = tuple(launches.TARGETS)
        environment = launches.checked(targets[index % len(targets)], shuffle=index)
    with lm2.recording() as ran, environment:
        yield
    names = {name for _, name in ran}
    assert names and names <= {backend, f"{backend}/composite"}, names


def _check(case, inputs, backend, *, seed=0):
    results = testing.run_case(case, inputs, backend, seed=seed)
    worst = [c for c in testing.compare_case(case, inputs, results, seed=seed) if not c.passed]
    assert not worst, "\n".join(f"{c.name}: {c.max_share:.2f}, {c.rms_share:.2f}" for c in worst)


def _parameters():
    for index, case in enumerate(testing.CASES):
        for dtype in CPU_DTYPES:
            yield pytest.param("eager", case, dtype, 0, id=f"eager-{dtype}-{case.id}")
        if case in testing.SMALL_CASES:
            for dtype in TRITON_DTYPES:
                name = f"triton-{dtype}-{case.id}"
                yield pytest.param("triton", case, dtype, index, id=name)


@pytest.mark.parametrize(("backend", "case", "dtype", "index"), _parameters())
def test_op_matches_oracle(backend, case, dtype, index, record_property):
    record_property("backend", backend)
    inputs = testing.make_inputs(case, testing.DTYPES[dtype])
    with _on(backend, index):
        _check(case, inputs, backend)


@pytest.mark.parametrize("scale", (5.0, 30.0))
@pytest.mark.parametrize("case", testing.SMALL_CASES, ids=lambda case: case.id)
def test_op_large_values(case, scale, record_property):
    record_property("backend", "eager")
    _check(case, testing.make_inputs(case, torch.float32, seed=1, scale=scale), "eager", seed=1)


def _transposed(tensor):
    return tensor.transpose(0, 1).contiguous().transpose(0, 1) if tensor.dim() > 1 else tensor


def _last_axis_strided(tensor):
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def _column_slice(tensor):
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 13), float("nan"))
    wide = wide.to(tensor.dtype)
    wide[..., 5 : 5 + tensor.shape[-1]] = tensor
    return wide[..., 5 : 5 + tensor.shape[-1]]


def _offset_by_one(tensor):
    return torch.cat([tensor.new_full((1,), float("nan")), tensor.reshape(-1)])[1:].view(
        tensor.shape
    )


def _expanded(tensor):
    return tensor[:1].expand(tensor.shape) if tensor.dim() > 1 else tensor


LAYOUTS = (_transposed, _last_axis_strided, _column_slice, _offset_by_one, _expanded)


def _layout_parameters():
    smallest_first = sorted(testing.SMALL_CASES, key=lambda case: case.batch * case.tokens)
    one_each = {case.op: case for case in smallest_first if case.batch == 2}
    for backend in ("eager", "triton"):
        for case in one_each.values():
            for layout in LAYOUTS:
                name = f"{backend}-{case.op}{layout.__name__}"
                yield pytest.param(backend, case, layout, id=name)


@pytest.mark.parametrize(("backend", "case", "layout"), _layout_parameters())
def test_op_strided(backend, case, layout, record_property):
    record_property("backend", backend)
    inputs = testing.make_inputs(case, torch.float32, layout=layout)
    copies = [tensor.clone() for tensor in (*inputs.tensors.values(), *inputs.cotangents)]
    with _on(backend):
        _check(case, inputs, backend)
    for copy, tensor in zip(copies, (*inputs.tensors.values(), *inputs.cotangents), strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ("eager", "triton"))
@pytest.mark.parametrize("case", testing.SMALL_CASES[::3], ids=lambda case: case.id)
def test_op_deterministic(backend, case, record_property):
    record_property("backend", backend)
    inputs = testing.make_inputs(case, torch.float32)
    runs = []
    for index in (0, 4):
        # the same target, another order of programs
        with _on(backend, index):
            runs.append(testing.run_case(case, inputs, backend))
    for name in runs[0]:
        assert torch.equal(runs[0][name], runs[1][name]), name


@pytest.mark.parametrize("backend", ("eager", "triton"))
@pytest.mark.parametrize("op", lm2.backends.OPS)
def test_op_empty_batch(backend, op, record_property):
    record_property("backend", backend)
    case = next(case for case in testing.SMALL_CASES if case.op == op)._replace(batch=0)
    inputs = testing.make_inputs(case, torch.float32)
    with _on(backend):
        results = testing.run_case(case, inputs, backend)
    for name, tensor in inputs.tensors.items():
        assert results[f"d{name}"].shape == tensor.shape
        assert not results[f"d{name}"].any()


@pytest.mark.parametrize("backend", ("eager", "triton"))
def test_residual_layer_norm_large_mean(backend, record_property):
    """Rows that are nearly constant: E[x^2] - E[x]^2 would have no digits left."""
    record_property("backend", backend)
    case = testing.Case("residual_layer_norm", 2, 9, 0, 0, 96)
    inputs = testing.make_inputs(case, torch.float32)
    ramp = 1e3 + 1e-3 * torch.arange(96.0).expand(2, 9, 96)
    inputs = inputs._replace(tensors={**inputs.tensors, "x": ramp, "residual": ramp.flip(1)})
    with _on(backend):
        _check(case, inputs, backend)
