"""Self tests of tests/tools: each planted bug must be caught, and clean code must pass."""

# constexpr parameters are upper case by Triton's custom

import os
import sys
import types
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as driver_config
from triton.runtime.errors import InterpreterError, OutOfResources

from lm2_kernels import testing
from tools import fake_gpu as fake_gpu_module
from tools import interpreter_bf16, interpreter_sanitizer
from tools.fake_gpu import TARGETS, LaunchError, fake_gpu
from tools.interpreter_sanitizer import (
    FalseHintError,
    IntegerOverflowError,
    OutOfBoundsError,
    ProgramRaceError,
    sanitize,
)
from tools.rounding import assert_rule

BLOCK = 16
SCALE = tl.constexpr(2.0)


@pytest.fixture(autouse=True, scope="module")
def _triton_cache(tmp_path_factory):
    # a fresh cache, unless the environment already names one
    with pytest.MonkeyPatch.context() as patch:
        if "TRITON_CACHE_DIR" not in os.environ:
            patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture
def bf16():
    interpreter_bf16.install()
    yield
    interpreter_bf16.uninstall()


@triton.jit
def _double(x):
    return x * SCALE


@triton.jit
def _copy_kernel(x_ptr, out_ptr, size, mask_size, stride, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < mask_size
    x = tl.load(x_ptr + offs * stride, mask=mask, other=0.0)
    tl.store(out_ptr + offs, _double(x), mask=mask)


@triton.jit
def _f64_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs).to(tl.float64)
    tl.store(out_ptr + offs, (x * x + 1.5).to(tl.float32))


@triton.jit
def _atomic_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    rows = tl.arange(0, N)[:, None]
    cols = tl.arange(0, N)[None, :]
    a = tl.load(a_ptr + rows * N + cols)
    b = tl.load(b_ptr + rows * N + cols)
    acc = tl.zeros((N, N), tl.float32)
    acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(out_ptr + rows * N + cols, acc)


@triton.jit
def _philox_round(seed, offs):
    key = tl.mul(offs, 0x9E3779B1, sanitize_overflow=False)
    key = tl.add(key, seed.to(tl.uint32), sanitize_overflow=False)
    key = key ^ (key >> 16)
    return tl.mul(key, key, sanitize_overflow=False)


@triton.jit
def _features_kernel(
    x_ptr,
    bias_ptr,
    seed_ptr,
    out_ptr,
    bits_ptr,
    eps: tl.float32,
    N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NEGATE: tl.constexpr,
):
    rows = tl.arange(0, N)[:, None]
    cols = tl.arange(0, N)[None, :]
    offs = rows * N + cols
    x = tl.load(x_ptr + offs).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + cols).to(tl.float32)
    x = tl.exp2(x - tl.max(x, axis=1, keep_dims=True))
    x = x / (tl.sum(x, axis=1)[:, None] + eps)
    x = tl.cumsum(x, axis=0, reverse=True)
    if NEGATE:
        x = -x
    gram = tl.dot(x, tl.trans(x), input_precision="ieee")
    tl.store(out_ptr + offs, _double(gram).to(out_ptr.dtype.element_ty))
    seed = tl.load(seed_ptr)
    tl.store(bits_ptr + offs, _philox_round(seed, offs.to(tl.uint32)).to(tl.int64))


def _features_reference(x, bias, seed, eps, negate):
    if bias is not None:
        x = x + bias.to(x.dtype)
    x = torch.exp2(x - x.amax(1, keepdim=True))
    x = x / (x.sum(1, keepdim=True) + eps)
    x = x.flip(0).cumsum(0).flip(0)
    x = -x if negate else x
    key = np.arange(x.numel(), dtype=np.uint64) * np.uint64(0x9E3779B1) + np.uint64(seed)
    key &= np.uint64(0xFFFFFFFF)
    key ^= key >> np.uint64(16)
    bits = (key * key) & np.uint64(0xFFFFFFFF)
    return 2 * x @ x.T, torch.from_numpy(bits.astype(np.int64)).view(x.shape)


def _run_copy(size, *, mask_size=None, stride=1, x=None):
    x = torch.randn(size * stride) if x is None else x
    out = torch.full((size,), -1.0)
    grid = (triton.cdiv(size, BLOCK),)
    mask_size = size if mask_size is None else mask_size
    _copy_kernel[grid](x, out, size, mask_size, stride, BLOCK=BLOCK)
    return x, out


# fake_gpu


@pytest.mark.parametrize("target", TARGETS)
def test_fake_gpu_records_and_executes(target):
    with fake_gpu(target) as gpu:
        x, out = _run_copy(37)
    assert torch.equal(out, 2 * x)
    (launch,) = gpu.launches
    assert launch.kernel == "_copy_kernel"
    assert launch.target == f"{TARGETS[target].backend}:{TARGETS[target].arch}"
    assert launch.signature["x_ptr"] == "*fp32"
    assert launch.signature["mask_size"] == "i32"
    assert launch.signature["stride"] == "constexpr"
    assert (launch.num_warps, launch.grid) == (4, (3, 1, 1))
    assert launch.registers > 0
    assert launch.devices == {torch.device("cpu")}
    assert (launch.spills, launch.shared) == (0, 0)
    assert (launch.f64, launch.tf32, launch.atomics) == (0, 0, 0)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_fake_gpu_counts_instructions(target):
    x = torch.randn(BLOCK)
    out = torch.zeros(BLOCK)
    with fake_gpu(target) as gpu:
        _f64_kernel[(1,)](x, out, BLOCK=BLOCK)
        assert torch.equal(out, (x.double() * x.double() + 1.5).float())
        out.zero_()
        _atomic_kernel[(1,)](x, out, BLOCK=BLOCK)
        assert torch.equal(out, x)
        _atomic_kernel[(1,)](x.int(), out.int(), BLOCK=BLOCK)
    double, float_atomic, int_atomic = gpu.launches
    assert double.f64 > 0
    assert (double.tf32, double.atomics) == (0, 0)
    assert float_atomic.atomics > 0
    assert float_atomic.f64 == 0
    assert int_atomic.atomics == 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_fake_gpu_counts_tf32(target):
    a, b, out = torch.randn(3, 16, 16)
    with fake_gpu(target, execute=False) as gpu:
        _dot_kernel[(1,)](a, b, out, N=16, PRECISION="tf32", num_warps=2)
        _dot_kernel[(1,)](a, b, out, N=16, PRECISION="ieee", num_warps=2)
    tf32, ieee = gpu.launches
    assert tf32.tf32 > 0
    assert ieee.tf32 == 0
    assert tf32.num_warps == 2


def test_fake_gpu_opcodes():
    ptx = """
.version 8.0 // tf32 .f64
$L__BB0_1:
	@%p1 ld.global.b32 { %r2 }, [ %rd1 + 0 ];
	{ @!%p2 mma.sync.m16n8k8.f32.tf32.tf32.f32 {%r1}; add.f64 %fd1, %fd2; }
"""
    assert fake_gpu_module._OPCODE.findall(ptx) == [
        "ld.global.b32",
        "mma.sync.m16n8k8.f32.tf32.tf32.f32",
        "add.f64",
    ]


def test_fake_gpu_execute_false_only_compiles():
    with fake_gpu(execute=False) as gpu:
        _, out = _run_copy(5)
    assert len(gpu.launches) == 1
    assert (out == -1).all()


def test_fake_gpu_compiles_and_inspects_once(monkeypatch):
    inspect_cuda = mock.Mock(wraps=fake_gpu_module._inspect_cuda)
    monkeypatch.setattr(fake_gpu_module, "_inspect_cuda", inspect_cuda)
    monkeypatch.setattr(fake_gpu_module, "_reports", {})
    compiled = mock.Mock(return_value=None)
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", compiled)
    for target in ("sm_80", "sm_90", "sm_80"):
        with fake_gpu(target) as gpu:
            for _ in range(3):
                _copy_kernel[(1,)](*torch.zeros(2, 64), 64, 64, 1, BLOCK=64)
        assert len({launch.registers for launch in gpu.launches}) == 1
    assert inspect_cuda.call_count == 2
    assert compiled.call_count == 2


def test_fake_gpu_refuses_bad_grids():
    x = torch.randn(4)
    args = (x, x, 4, 4, 1)
    with fake_gpu() as gpu:
        with pytest.raises(LaunchError, match="exceeds"):
            _copy_kernel[(1, 65_536)](*args, BLOCK=BLOCK)
        with pytest.raises(LaunchError, match="negative"):
            _copy_kernel[(-1,)](*args, BLOCK=BLOCK)
    assert len(gpu.launches) == 2


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_fake_gpu_checks_the_current_device():
    with fake_gpu() as gpu, FakeTensorMode():
        x = torch.empty(BLOCK, device="cuda:1")
        with pytest.raises(LaunchError, match="cuda:1"):
            _run_copy_on(x)
        with torch.cuda.device(x.device):
            assert torch.cuda.current_device() == 1
            _run_copy_on(x)
        assert torch.cuda.current_device() == 0
        with pytest.raises(LaunchError, match="several"):
            _copy_kernel[(1,)](x, torch.empty(BLOCK), BLOCK, BLOCK, 1, BLOCK=BLOCK)
    assert gpu.launches[1].devices == {torch.device("cuda:1")}


def _run_copy_on(x):
    _copy_kernel[(1,)](x, torch.empty_like(x), BLOCK, BLOCK, 1, BLOCK=BLOCK)


def test_fake_gpu_reports_out_of_shared_memory():
    a, b, out = torch.randn(3, 128, 128)
    target = GPUTarget("cuda", 86, 32)
    with fake_gpu(target, execute=False), pytest.raises(OutOfResources, match="shared memory"):
        # ieee would be as large, and take half a minute to assemble
        _dot_kernel[(1,)](a, b, out, N=128, PRECISION="tf32")


def test_fake_gpu_restores_everything():
    before = (driver_config._active, triton.JITFunction.__call__, torch.cuda.device, tl.load)
    with pytest.raises(ZeroDivisionError), fake_gpu():
        _run_copy(5)
        _ = 1 / 0
    after = (driver_config._active, triton.JITFunction.__call__, torch.cuda.device, tl.load)
    assert after == before


def test_fake_gpu_lets_the_package_accept_cpu_tensors(monkeypatch):
    cleared = []
    launcher = types.ModuleType("lm2_kernels.backends.triton.launch")
    launcher.DEVICES = {}
    launcher.target = types.SimpleNamespace(cache_clear=lambda: cleared.append(True))
    for name in ("lm2_kernels", "lm2_kernels.backends", "lm2_kernels.backends.triton"):
        package = types.ModuleType(name)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, launcher.__name__, launcher)
    with fake_gpu():
        assert "cpu" in launcher.DEVICES
        assert len(cleared) == 1
    assert not launcher.DEVICES
    assert len(cleared) == 2


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_all_tools_together(target, dtype, has_bias, bf16):

    def run(seed):
        torch.manual_seed(seed)
        x = torch.randn(16, 16).to(dtype)
        bias = torch.randn(16).to(dtype) if has_bias else None
        out = torch.empty(16, 16, dtype=dtype)
        bits = torch.empty(16, 16, dtype=torch.int64)
        with fake_gpu(target) as gpu, sanitize(shuffle=1):
            _features_kernel[(1,)](
                *(x, bias, torch.tensor(12345), out, bits, 1e-5),
                *(16, has_bias, not has_bias),
            )
        options = (bias, 12345, 1e-5, not has_bias)
        expected, expected_bits = _features_reference(x.double(), *options)
        plain, _ = _features_reference(x.float(), *options)
        assert torch.equal(bits, expected_bits)
        (launch,) = gpu.launches
        assert (launch.spills, launch.f64, launch.tf32, launch.atomics) == (0, 0, 0, 0)
        return [testing.compare("features", out, expected, plain.to(dtype))]

    assert_rule(run)


# interpreter_bf16


def test_bf16_rounding_matches_torch():
    upper = np.arange(2**16, dtype=np.uint32) << 16
    for lower in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (upper | np.uint32(lower)).view(np.float32)
        expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
        actual = interpreter_bf16.f32_to_bf16(values)
        is_nan = np.isnan(values)
        np.testing.assert_array_equal(actual[~is_nan], expected.view(np.uint16)[~is_nan])
        np.testing.assert_array_equal(np.isnan(interpreter_bf16.bf16_to_f32(actual)), is_nan)
        assert is_nan.sum() >= 2 * 127
    bits = np.arange(2**16, dtype=np.uint16)
    widened = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float()
    actual = interpreter_bf16.bf16_to_f32(bits).view(np.uint32)
    np.testing.assert_array_equal(actual, widened.numpy().view(np.uint32))


@triton.jit
def _cast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs).to(out_ptr.dtype.element_ty))


def test_bf16_cast_in_a_kernel_matches_torch(bf16):
    size = 2**16
    values = (torch.arange(size, dtype=torch.int32) << 16) | 0x8000
    x = values.view(torch.float32)
    narrow = torch.empty(size, dtype=torch.bfloat16)
    wide = torch.empty(size)
    with fake_gpu():
        _cast_kernel[(1,)](x, narrow, BLOCK=size, num_warps=32)
        _cast_kernel[(1,)](narrow, wide, BLOCK=size, num_warps=32)
    is_nan = x.isnan()
    expected = x.bfloat16()
    assert torch.equal(narrow.isnan(), is_nan)
    assert torch.equal(narrow[~is_nan].view(torch.int16), expected[~is_nan].view(torch.int16))
    assert torch.equal(wide.view(torch.int32), narrow.float().view(torch.int32))


def _dot_share(dtype, precision):
    """The error as a share of what float32 may make of it, in whatever order it adds."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 32, 32).to(dtype)
    out = torch.empty(32, 32)
    with fake_gpu():
        _dot_kernel[(1,)](a, b, out, N=32, PRECISION=precision)
    a, b = a.double(), b.double()
    # 32 products and sums, each off by half an ulp at most
    bound = 32 * torch.finfo(torch.float32).eps * (a.abs() @ b.abs())
    return ((out - a @ b).abs() / bound).max().item()


def test_bf16_dot_accumulates_in_fp32(bf16):
    assert _dot_share(torch.bfloat16, "ieee") <= 1.0
    assert _dot_share(torch.bfloat16, "tf32") <= 1.0
    assert _dot_share(torch.float16, "tf32") <= 1.0


def test_tf32_dot_is_visible(bf16):
    assert _dot_share(torch.float32, "ieee") <= 1.0
    assert _dot_share(torch.float32, "tf32x3") <= 1.0
    # operands of 10 bits in place of 23
    assert 1.0 < _dot_share(torch.float32, "tf32") < 2**13
    interpreter_bf16.uninstall()
    interpreter_bf16.install(emulate_tf32=False)
    assert _dot_share(torch.float32, "tf32") <= 1.0


@triton.jit
def _bf16_arithmetic_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    y = tl.load(y_ptr + offs)
    tl.store(out_ptr + offs, x + y)
    tl.store(out_ptr + BLOCK + offs, x * y - 1.5)
    tl.store(out_ptr + 2 * BLOCK + offs, tl.where(x < y, x, -y))
    tl.store(out_ptr + 3 * BLOCK + offs, tl.maximum(tl.abs(x), y))
    tl.store(out_ptr + 4 * BLOCK + offs, tl.cumsum(x, axis=0, reverse=True))
    tl.store(out_ptr + 5 * BLOCK, tl.sum(x))
    tl.store(out_ptr + 5 * BLOCK + 1, tl.max(x))


def test_bf16_arithmetic(bf16):
    torch.manual_seed(0)
    x, y = torch.randint(-4, 5, (2, BLOCK)).bfloat16() / 2
    out = torch.empty(5 * BLOCK + 2, dtype=torch.bfloat16)
    with fake_gpu(), sanitize():
        _bf16_arithmetic_kernel[(1,)](x, y, out, BLOCK=BLOCK)
    expected = [x + y, x * y - 1.5, torch.where(x < y, x, -y), torch.maximum(x.abs(), y)]
    expected += [x.flip(0).cumsum(0).flip(0), x.sum()[None], x.max()[None]]
    assert torch.equal(out, torch.cat(expected))


def test_bf16_install_is_idempotent_and_reversible():
    builder = triton.runtime.interpreter.InterpreterBuilder
    before = dict(vars(builder))
    interpreter_bf16.install()
    once = dict(vars(builder))
    interpreter_bf16.install()
    assert dict(vars(builder)) == once != before
    interpreter_bf16.uninstall()
    assert dict(vars(builder)) == before


# interpreter_sanitizer


@pytest.mark.parametrize("shuffle", [None, 0, 1])
@pytest.mark.parametrize("size", [1, 16, 37])
def test_sanitizer_passes_clean_kernel(size, shuffle):
    with fake_gpu(), sanitize(shuffle=shuffle):
        x, out = _run_copy(size)
    assert torch.equal(out, 2 * x)


def test_sanitizer_finds_mask_off_by_one():
    with fake_gpu(), sanitize(), pytest.raises(OutOfBoundsError, match="x_ptr"):
        _run_copy(37, mask_size=38)


def test_sanitizer_finds_missing_mask():
    with fake_gpu(), sanitize(), pytest.raises(OutOfBoundsError):
        _run_copy(37, mask_size=10_000)


def test_sanitizer_finds_neighbours_of_a_slice():
    storage = torch.zeros(37, 4)
    with fake_gpu(), sanitize():
        _run_copy(37, stride=4, x=storage[:, 1])
        with pytest.raises(OutOfBoundsError):
            _run_copy(37, stride=3, x=storage[:, 1])


@triton.jit
def _sum_rows_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < size)
    tl.store(out_ptr, tl.sum(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_sanitizer_poisons_masked_lanes(dtype, bf16):
    x = torch.ones(10, dtype=dtype)
    out = torch.zeros(1, dtype=dtype)
    with fake_gpu():
        _sum_rows_kernel[(1,)](x, out, 10, BLOCK=BLOCK)
        assert out == 10
        with sanitize(overflow=False):
            _sum_rows_kernel[(1,)](x, out, 10, BLOCK=BLOCK)
    assert out != 10


@triton.jit
def _colliding_store_kernel(out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.program_id(0) + tl.zeros((BLOCK,), tl.float32))


@triton.jit
def _read_previous_kernel(x_ptr):
    pid = tl.program_id(0)
    if pid > 0:
        tl.store(x_ptr + pid, tl.load(x_ptr + pid - 1))


@triton.jit
def _duplicate_lanes_kernel(out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs // 2, offs)


@triton.jit
def _read_then_write_first_kernel(x_ptr, out_ptr, last):
    pid = tl.program_id(0)
    tl.store(out_ptr + pid, tl.load(x_ptr))
    if pid == last:
        tl.store(x_ptr, 1.0)


@triton.jit
def _atomic_then_load_kernel(x_ptr, out_ptr, LOAD: tl.constexpr):
    pid = tl.program_id(0)
    tl.atomic_add(x_ptr, 1.0)
    if LOAD:
        tl.store(out_ptr + pid, tl.load(x_ptr))


@pytest.mark.parametrize("shuffle", [None, 0, 1, 2])
def test_sanitizer_finds_races(shuffle):
    x = torch.zeros(BLOCK)
    out = torch.zeros(BLOCK)
    with fake_gpu(), sanitize(shuffle=shuffle):
        _colliding_store_kernel[(1,)](out, BLOCK=BLOCK)
        with pytest.raises(ProgramRaceError, match="out_ptr"):
            _colliding_store_kernel[(2,)](out, BLOCK=BLOCK)
        with pytest.raises(ProgramRaceError):
            _read_previous_kernel[(4,)](x)
        with pytest.raises(ProgramRaceError):
            _read_then_write_first_kernel[(4,)](x, out, 3)
        with pytest.raises(ProgramRaceError, match="twice"):
            _duplicate_lanes_kernel[(1,)](out, BLOCK=BLOCK)
        _atomic_then_load_kernel[(4,)](x, out, LOAD=False)
        with pytest.raises(ProgramRaceError):
            _atomic_then_load_kernel[(4,)](x, out, LOAD=True)


@triton.jit
def _record_order_kernel(order_ptr, counter_ptr):
    tl.store(order_ptr + tl.program_id(0), tl.atomic_add(counter_ptr, 1))


def test_sanitizer_shuffles_by_seed():
    def order(shuffle):
        result = torch.full((32,), -1, dtype=torch.int32)
        with sanitize(shuffle=shuffle):
            _record_order_kernel[(32,)](result, torch.zeros(1, dtype=torch.int32))
        return result.tolist()

    with fake_gpu():
        assert order(None) == list(range(32))
        assert sorted(order(0)) == list(range(32))
        assert order(0) == order(0) != order(1)


@triton.jit
def _large_stride_kernel(x_ptr, out_ptr, stride, N: tl.constexpr, USE_INT64: tl.constexpr):
    pid = tl.program_id(0)
    row = pid.to(tl.int64) if USE_INT64 else pid
    cols = tl.arange(0, N)
    tl.store(out_ptr + pid * N + cols, tl.load(x_ptr + row * stride + cols))


def _virtual(shape, stride):
    """A bfloat16 view whose pages are not touched until they are written.

    torch.empty would fill them all with NaN here.
    """
    storage = torch.UntypedStorage(2 * shape[0] * stride[0])
    return torch.tensor([], dtype=torch.bfloat16).set_(storage).as_strided(shape, stride)


@pytest.mark.parametrize("is_gpu_inside", [False, True])
def test_sanitizer_finds_int32_overflow(is_gpu_inside):
    stride = 2**30 + 64
    x = _virtual((3, BLOCK), (stride, 1))
    x.copy_(torch.arange(3 * BLOCK).view(3, BLOCK))
    out = torch.zeros(3, BLOCK, dtype=torch.bfloat16)
    contexts = [fake_gpu(), sanitize()]
    first, second = reversed(contexts) if is_gpu_inside else contexts
    with first, second:
        with pytest.raises(IntegerOverflowError, match="int32"):
            _large_stride_kernel[(3,)](x, out, stride, N=BLOCK, USE_INT64=False)
        _large_stride_kernel[(3,)](x, out, stride, N=BLOCK, USE_INT64=True)
    assert torch.equal(out, x)


@triton.jit
def _uint32_kernel(x_ptr, IS_CHECKED: tl.constexpr):
    x = tl.load(x_ptr).to(tl.uint32)
    y = tl.mul(x, x, sanitize_overflow=IS_CHECKED)
    tl.store(x_ptr, y.to(tl.int64))


def test_sanitizer_checks_uint32_unless_told_not_to():
    with fake_gpu(), sanitize():
        x = torch.tensor(2**16 - 1)
        _uint32_kernel[(1,)](x, IS_CHECKED=True)
        assert x == (2**16 - 1) ** 2
        for value in (2**16, 2**32 - 1):
            x = torch.tensor(value)
            with pytest.raises(IntegerOverflowError, match="uint32"):
                _uint32_kernel[(1,)](x, IS_CHECKED=True)
            _uint32_kernel[(1,)](x, IS_CHECKED=False)
            assert x == value**2 % 2**32


@triton.jit
def _assert_kernel(x_ptr):
    tl.device_assert(tl.load(x_ptr) > 0, "x must be positive")


def test_sanitizer_activates_device_assert():
    with fake_gpu(), sanitize():
        _assert_kernel[(1,)](torch.tensor(1))
        with pytest.raises(InterpreterError, match="x must be positive"):
            _assert_kernel[(1,)](torch.tensor(0))


@triton.jit
def _hint_kernel(x_ptr, start, N: tl.constexpr, MULTIPLE: tl.constexpr, STEP: tl.constexpr):
    start = tl.multiple_of(start, MULTIPLE)
    offs = start + tl.arange(0, N) * STEP
    offs = tl.max_contiguous(offs, N)
    tl.store(x_ptr + offs, 1.0)


def test_sanitizer_checks_hints():
    x = torch.zeros(64)
    with fake_gpu(), sanitize():
        _hint_kernel[(1,)](x, 24, N=16, MULTIPLE=8, STEP=1)
        with pytest.raises(FalseHintError, match="multiple_of"):
            _hint_kernel[(1,)](x, 20, N=16, MULTIPLE=8, STEP=1)
        with pytest.raises(FalseHintError, match="max_contiguous"):
            _hint_kernel[(1,)](x, 24, N=16, MULTIPLE=8, STEP=2)


@triton.jit
def _global_constant_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr, FLAG: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    mask = offs < size
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    # a constexpr on the left of a tensor, and of another constexpr
    scaled = SCALE * x
    half: tl.constexpr = BLOCK // 2
    if FLAG and half == 8:
        scaled = scaled + half
    for i in tl.static_range(2):
        scaled += i
    for _ in range(0, size, half):
        scaled += 1.0
    tl.store(out_ptr + offs, scaled, mask=mask)


def test_global_constants_and_loops():
    x = torch.randn(10)
    out = torch.empty(10)
    with fake_gpu(), sanitize():
        _global_constant_kernel[(1,)](x, out, 10, BLOCK=BLOCK, FLAG=True)
    # integers add up without rounding
    assert torch.equal(out, 2 * x + 8 + 1 + 2)


@triton.jit
def _two_views_kernel(k_ptr, v_ptr, stride, BLOCK: tl.constexpr):
    offs = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)) * stride
    tl.store(k_ptr + offs, tl.load(v_ptr + offs) + 1.0)


def test_sanitizer_accepts_interleaved_views():
    packed = torch.zeros(2, 32, 2)
    k, v = packed.view(64, 2).unbind(1)
    with fake_gpu(), sanitize(shuffle=0):
        _two_views_kernel[(4,)](k, v, 2, BLOCK=BLOCK)
    assert (k == 1).all()
    assert (v == 0).all()


def test_sanitizer_sees_a_race_through_overlapping_views():
    x = torch.zeros(65)
    with fake_gpu(), sanitize():
        # in place: each program loads what it stores itself
        _two_views_kernel[(4,)](x, x, 1, BLOCK=BLOCK)
        with pytest.raises(ProgramRaceError):
            _two_views_kernel[(4,)](x[:-1], x[1:], 1, BLOCK=BLOCK)


def _offsets_of(tensor):
    index = torch.arange(tensor.untyped_storage().nbytes() // tensor.element_size())
    return index.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@pytest.mark.parametrize(
    "view",
    [
        torch.zeros(3, 4, 5),
        torch.zeros(3, 4, 5).permute(2, 0, 1),
        torch.zeros(3, 4, 5)[:, 1:3, ::2],
        torch.zeros(3, 4, 5)[1:, :, 2],
        torch.zeros(4, 1).expand(4, 3),
        torch.zeros(20).as_strided((5, 4), (3, 2)),
        torch.zeros(20).as_strided((5, 4), (1, 1)),
        torch.zeros(()),
        torch.zeros(0, 3),
    ],
    ids=lambda view: f"{tuple(view.shape)}-{view.stride()}",
)
def test_sanitizer_region_is_exact(view):
    region = interpreter_sanitizer._Region("x", view)
    offsets = np.arange(-5, view.untyped_storage().nbytes() // 4 + 5)
    addresses = view.untyped_storage().data_ptr() + 4 * offsets
    is_element, numbers = region.locate(addresses)
    expected = np.unique(_offsets_of(view).numpy())
    np.testing.assert_array_equal(offsets[is_element], expected)
    assert region.num_elements == expected.size
    np.testing.assert_array_equal(np.sort(numbers[is_element]), np.arange(expected.size))
    is_element, _ = region.locate(addresses + 2)
    assert not is_element.any()


def test_sanitizer_region_of_a_large_view_is_cheap():
    stride = 2**30 + 64
    huge = _virtual((3, 4, 16), (stride, 16, 1))
    large = torch.empty(1024, 1024)
    for view in (huge, large, large.T, large[:, ::2], large[::2, 1:]):
        region = interpreter_sanitizer._Region("x", view)
        assert region._offsets is None
        assert region.num_elements == view.numel()
