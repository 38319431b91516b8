"""Attention forward by one of PyTorch's kernels, backward by ours: as a table may say of a GPU."""

import contextlib
from unittest import mock

import pytest
import torch

import lm2_kernels as lm2
from lm2_kernels import testing
from lm2_kernels.backends.triton import launch, library, tables
from tools import launches
from tools.rounding import assert_rule


def _on_cpu(query, key, value, causal, scale):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, scale=scale
    )


@contextlib.contextmanager
def _chosen(width, *, least_tokens=0, least_pairs=0, takes=True):
    """As if a GPU had PyTorch's kernel of CPUs, and had found it to be faster."""
    found = tables.Library("flash", least_tokens, least_pairs)
    with (
        launches.interpreted("sm_90"),
        mock.patch.dict(tables.LIBRARY, {("sm_90", width): found}),
        mock.patch.dict(library.KERNELS, flash=_on_cpu),
        mock.patch.dict(library._TAKES, flash=lambda params: takes),
        lm2.recording() as ran,
    ):
        launch.forget()
        yield ran


def _read(batch, tokens, slots, heads, width, **options) -> testing.Case:
    options = tuple(options.items())
    return testing.Case("memory_attention", batch, tokens, slots, heads, width, options)


@pytest.mark.parametrize(
    "case",
    (
        _read(2, 45, 45, 3, 16),
        _read(1, 70, 70, 2, 64),
        _read(2, 33, 33, 2, 32, causal=False),
        _read(2, 33, 33, 2, 16, scale=2.0),
        # the sign goes to the query
        _read(2, 33, 33, 2, 16, scale=-0.3),
    ),
    ids=lambda case: case.id,
)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_matches_oracle(case, dtype):
    with _chosen(case.width) as ran:
        assert_rule(lambda seed: testing.check_case(case, dtype, "triton", seed=seed))
    assert {name for op, name in ran if op == "memory_attention_backward"} == {"triton"}
    assert ("memory_attention_forward", "triton/flash") in ran


@pytest.mark.parametrize(
    ("case", "dtype", "options"),
    (
        (_read(2, 33, 40, 2, 16), torch.float16, {}),
        (_read(2, 33, 33, 2, 16, slot_offset=7), torch.float16, {}),
        (_read(2, 33, 33, 2, 16, slot_mask="random"), torch.float16, {}),
        (_read(2, 33, 33, 2, 16, dropout_p=0.5), torch.float16, {}),
        (_read(2, 33, 33, 2, 16, scale=2.0**-30), torch.float16, {}),
        (_read(2, 33, 33, 2, 16), torch.float32, {}),
        (_read(2, 33, 33, 2, 16), torch.float16, {"least_tokens": 34}),
        (_read(2, 33, 33, 2, 16), torch.float16, {"least_pairs": 5}),
        (_read(2, 33, 33, 2, 16), torch.float16, {"takes": False}),
    ),
    ids=("slots", "offset", "mask", "dropout", "scale", "float32", "short", "few", "refused"),
)
def test_what_it_does_not_serve_goes_by_our_kernel(case, dtype, options):
    with _chosen(16, **options) as ran:
        assert_rule(lambda seed: testing.check_case(case, dtype, "triton", seed=seed))
    assert {name for _, name in ran} == {"triton"}


@pytest.mark.parametrize("options", ({"least_tokens": 33}, {"least_pairs": 4}))
def test_from_which_sizes_on(options):
    with _chosen(16, **options) as ran:
        testing.check_case(_read(2, 33, 33, 2, 16), torch.float16, "triton")
    assert ("memory_attention_forward", "triton/flash") in ran


@pytest.mark.parametrize("name", ("cudnn", "flash"))
def test_kernels_are_those_of_this_pytorch(name):
    """What is called exists, and takes what it is given: only CUDA tensors are missing."""
    x = torch.zeros(1, 2, 4, 16, dtype=torch.float16, device="meta")
    out, log_sum = library.KERNELS[name](x, x, x, True, 0.25)
    assert out.shape == x.shape
    assert log_sum.numel() == 8 and log_sum.dtype == torch.float32
    # a build for CUDA asks the driver first
    if torch.cuda.is_available() or torch.version.cuda is None:
        assert not library.serves(name, *(torch.zeros(1, 4, 2, 16),) * 3, True, 0.25)


def test_nothing_is_chosen_that_no_hardware_has_run():
    assert not tables.LIBRARY
