"""Attention in float32 where PyTorch was asked for TF32 products, and where it was not."""

import pytest
import torch

from lm2_kernels import testing
from lm2_kernels.backends.triton import tables
from lm2_kernels.testing import verify
from tools import launches
from tools.rounding import assert_rule, tf32_comparisons

SM_TARGETS = ("sm_80", "sm_90", "sm_100", "sm_89", "sm_120")


def _read(batch, tokens, slots, heads, width, **options) -> testing.Case:
    options = tuple(options.items())
    return testing.Case("memory_attention", batch, tokens, slots, heads, width, options)


@pytest.fixture
def tf32():
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


CASES = (
    _read(2, 33, 45, 2, 16, slot_offset=3),
    _read(1, 70, 80, 1, 64, causal=False),
    _read(1, 40, 70, 1, 128),
    _read(1, 40, 70, 1, 256),
    _read(2, 33, 12, 2, 16, causal=False),
    _read(2, 17, 19, 2, 32, slot_mask="random"),
    _read(2, 33, 45, 2, 16, dropout_p=0.5),
)


@pytest.mark.parametrize("target", ("sm_80", "sm_90"))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_tf32_is_as_near_as_its_bits_allow(tf32, case, target):
    with launches.interpreted(target):
        assert_rule(lambda seed: tf32_comparisons(case, seed, "cpu"))
        # by the float32 rule it is far off: what is compared are TF32 products
        exact = testing.check_case(case, torch.float32, "triton")
    assert max(comparison.share for comparison in exact) > 10.0


@pytest.mark.parametrize("precision", ("highest", "a ragged layout", "gfx942"))
def test_exact_otherwise(precision, request):
    width = 17 if precision == "a ragged layout" else 16
    if precision != "highest":
        request.getfixturevalue("tf32")
    with launches.interpreted("gfx942" if precision == "gfx942" else "sm_90"):
        case = _read(2, 33, 45, 2, width, slot_offset=3)
        assert_rule(lambda seed: testing.check_case(case, torch.float32, "triton", seed=seed))


@pytest.mark.parametrize("name", ("dout", "query"))
def test_forward_and_backward_agree_on_tf32(tf32, name):
    """A gradient with odd rows does not make an exact backward of a TF32 forward."""
    case = _read(2, 40, 40, 2, 16, scale=2.0)

    def run(seed):
        inputs = testing.make_inputs(case, torch.float32, seed=seed)
        if name == "dout":
            inputs = inputs._replace(cotangents=(_odd_rows(inputs.cotangents[0]),))
        else:
            inputs = inputs._replace(
                tensors=inputs.tensors | {"query": _odd_rows(inputs.tensors["query"])}
            )
        return testing.run_case(case, inputs, "triton", seed=seed)

    with launches.interpreted("sm_90"):
        plain = testing.make_inputs(case, torch.float32)
        by_tf32 = testing.run_case(case, plain, "triton")
        got = run(0)
        torch.set_float32_matmul_precision("highest")
        exact = testing.run_case(case, plain, "triton")
    want, other = (by_tf32, exact) if name == "dout" else (exact, by_tf32)
    # of other tiles, so that the order of terms differs
    for key, tensor in got.items():
        assert (tensor - want[key]).norm() < 0.01 * (tensor - other[key]).norm(), key


def test_what_was_launched_is_not_taken_for_the_other(tf32):
    case = CASES[0]
    with launches.interpreted("sm_90"):
        inputs = testing.make_inputs(case, torch.float32)
        by_tf32 = testing.run_case(case, inputs, "triton")
        torch.set_float32_matmul_precision("highest")
        exact = testing.run_case(case, inputs, "triton")
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        again = testing.run_case(case, inputs, "triton")
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert all(torch.equal(by_tf32[name], again[name]) for name in exact)
    assert not any(torch.equal(by_tf32[name], exact[name]) for name in exact)


@pytest.mark.parametrize("asked", ("highest", "high", "medium", "newer"))
def test_verify_computes_in_float32_whatever_was_asked_for(asked):
    """By the older way or by the newer, after which PyTorch refuses to answer for the older."""
    matmuls = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    try:
        if asked == "newer":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision(asked)
        before = [matmul.fp32_precision for matmul in matmuls]
        with verify._steady_arithmetic():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_tf32
            assert [matmul.fp32_precision for matmul in matmuls] == ["ieee", "ieee"]
        assert [matmul.fp32_precision for matmul in matmuls] == before
        if asked != "newer":
            assert torch.get_float32_matmul_precision() == asked
    finally:
        torch.set_float32_matmul_precision("highest")


def _odd_rows(tensor):
    wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1, dtype=tensor.dtype)
    wide[..., :-1] = tensor
    return wide[..., :-1]


def _compile(case, target):
    with launches.compiled(target) as gpu:
        testing.run_case(case, testing.make_inputs(case, torch.float32), "triton")
    assert all(launch.tf32 and launch.tensor_cores for launch in gpu.launches)


_FULL = {"slot_mask": "random", "dropout_p": 0.1}


@pytest.mark.parametrize("width", (64, 128, 256))
def test_kernels_on_tensor_cores(tf32, width):
    _compile(_read(1, 512, 512, 2, width), "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("options", ({}, _FULL), ids=("", "full"))
@pytest.mark.parametrize("slots", (12, 24, 48, 512))
@pytest.mark.parametrize("width", (16, 32, 64, 80, 128, 256))
@pytest.mark.parametrize("target", SM_TARGETS)
def test_kernels_on_tensor_cores_exhaustive(tf32, target, width, slots, options):
    _compile(_read(1, 512, slots, 2, width, causal=slots == 512, **options), target)


def test_tables_have_every_target():
    for table in (tables.FORWARD_TF32, tables.DKEY_VALUE_TF32, tables.DQUERY_TF32):
        assert {*table} == {"sm_80", "sm_90", "sm_100", "small"}
        assert all({*of_target} == {64, 128, 256} for of_target in table.values())
