"""The hyperbolic tangent by the compiled backend's kernel."""

import functools
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import lm2_kernels as lm2
from lm2_kernels import backends
from lm2_kernels import tanh as module
from lm2_kernels.backends import cpp
from lm2_kernels.backends import eager as eager_backend
from lm2_kernels.tanh import apply_tanh, tanh
from tools.emulated_avx512 import every_level
from tools.layers import made_of_ops
from tools.native import needs_cpp
from tools.rounding import assert_round_off

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WAYS = tuple(functools.partial(way, backend="auto") for way in (apply_tanh, tanh))
# what csrc/cpu/simd.h says of float32; in 16 bits that is little, and rounding is half
_MOST_ULPS = {
    dtype: 2.21
    if dtype == torch.float32
    else 0.5 + 2.21 * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}


def _layouts(x):
    """The same values, as a tensor can have them."""
    batch, rows, width = x.shape
    wider = torch.full((batch, rows + 2, width + 3), float("nan"), dtype=x.dtype)
    inside = wider[:, 1:-1, 2:-1]
    inside.copy_(x)
    return x, inside, x.transpose(0, 2).contiguous().transpose(0, 2)


def _grid(dtype):
    """Every value from 2^-20 to 16 or enough of them, and their opposites: no draw."""
    if dtype == torch.float64:
        half = torch.linspace(2.0**-20, 16.0, 100_003, dtype=dtype)
    else:
        first, last = (torch.tensor([2.0**-20, 16.0]).view(torch.int32)).tolist()
        half = torch.arange(first, last, 809, dtype=torch.int32).view(torch.float32).to(dtype)
    return torch.stack((half, -half), dim=1).flatten()


def _ulps(got, want) -> float:
    """The largest error, in steps from one value to the next where it lies."""
    limits = torch.finfo(got.dtype)
    size = torch.clamp(want.abs(), min=limits.smallest_normal)
    step = limits.eps * torch.exp2(size.log2().floor())
    return ((got.double() - want).abs() / step).max().item()


@needs_cpp
@every_level
@pytest.mark.parametrize("threads", (1, 3))
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(dtype, threads, environment, request):
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(threads)

    values = _grid(dtype)
    # rows of a part, of a whole piece and more; enough for several threads
    for shape in ((2, 3, 37), (3, -1, 1025)):
        count = shape[0] * shape[2] * (1 if shape[1] < 0 else shape[1])
        x = (
            values[: values.numel() // count * count].view(shape)
            if -1 in shape
            else (values[:: values.numel() // count][:count].view(shape))
        )
        for layout in _layouts(x):
            with environment():
                got = cpp.tanh(layout)
            assert got.is_contiguous()
            assert got.dtype == dtype
            if dtype == torch.float64:
                assert_round_off(got, x.tanh())
            else:
                assert _ulps(got, x.double().tanh()) <= _MOST_ULPS[dtype]


@needs_cpp
@every_level
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_at_the_edges(dtype, environment):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, -0.0, inf, -inf, nan, 50.0, -50.0, 30000.0], dtype=dtype)
    with environment():
        got = cpp.tanh(x.view(1, 1, -1)).flatten()
    want = torch.tensor([0.0, -0.0, 1.0, -1.0, nan, 1.0, -1.0, 1.0], dtype=dtype)
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
    assert torch.equal(got.signbit()[:4], want.signbit()[:4])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", ((0, 3, 5), (2, 0, 5), (2, 3, 0)))
def test_nothing(way, shape):
    assert way(torch.ones(shape)).shape == shape


def test_derivatives():
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    differentiable, plain = WAYS
    assert torch.autograd.gradcheck(differentiable, x)
    assert torch.autograd.gradgradcheck(differentiable, x)
    assert not plain(x.detach()).requires_grad


@needs_cpp
def test_who_computes_it(monkeypatch):
    """The kernel, but where somebody watches operators or there is none."""
    x, calls, original = torch.randn(1, 3, 5), [], cpp.tanh
    monkeypatch.setattr(cpp, "tanh", lambda x: calls.append(x) or original(x))

    def is_by_kernel(x=x, backend="auto") -> bool:
        found = []
        for way in (apply_tanh, tanh):
            calls.clear()
            torch.testing.assert_close(way(x, backend), torch.tanh(x))
            found.append(bool(calls))
        assert found[0] == found[1]
        return found[0]

    class Other(torch.Tensor):
        pass

    assert is_by_kernel()
    assert is_by_kernel(backend="cpp")
    assert not is_by_kernel(backend="eager")
    assert not is_by_kernel(x[0])
    with FlopCounterMode(display=False):
        assert not is_by_kernel()
    assert not is_by_kernel(x.as_subclass(Other))
    assert tanh(x.to("meta"), "auto").is_meta
    monkeypatch.setattr(module, "_HAS_KERNEL", False)
    assert not is_by_kernel()


@needs_cpp
@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_compiled_it_is_the_same(backend):
    """Bit for bit, with its gradient."""
    x = torch.randn(2, 3, 5, requires_grad=True)
    compiled = torch.compile(apply_tanh, fullgraph=True, backend=backend)
    results = []
    for way in (apply_tanh, compiled):
        y = way(x, "cpp")
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("backend", ("auto", "eager"))
def test_a_layer_goes_by_its_backend(backend, monkeypatch):
    """As one, as ops and as a graph: another backend has PyTorch's tanh."""
    is_by_kernel = backend == "auto" and module._HAS_KERNEL
    calls, original = [], cpp.tanh
    monkeypatch.setattr(cpp, "tanh", lambda x: calls.append(x) or original(x))
    inputs = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    for asked in ("of the layer", "of the block"):
        layer = lm2.ReleaseMemory(8, 2, backend=backend if asked == "of the layer" else None)
        with lm2.use_backend(backend):
            one = layer(*inputs)
            # the norm's kernel takes it along, or it is PyTorch's
            assert not calls
            with made_of_ops():
                of_ops = layer(*inputs)
            assert bool(calls) == is_by_kernel
            calls.clear()
            assert all(map(torch.equal, one, of_ops))
            code = torch.export.export(layer, inputs).graph_module.code
            assert ("lm2_kernels.tanh" in code) == is_by_kernel
    if backend == "auto":
        # whoever is chosen: what was asked for decides
        with backends.register("mine", eager_backend):
            one = layer(*inputs)
            with made_of_ops():
                assert all(map(torch.equal, one, layer(*inputs)))
    with torch.no_grad():
        eager = lm2.ReleaseMemory(8, 2, backend="eager")
        graph = str(torch.jit.trace(eager, inputs).inlined_graph)
        assert "aten::tanh" in graph
        assert "lm2_kernels::" not in graph
        assert "lm2_kernels_cpp::" not in graph


@needs_cpp
def test_the_operators():
    x = torch.randn(2, 3, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.lm2_kernels.tanh.default, (x,))
    # a graph may be taken to another device
    assert torch.ops.lm2_kernels.tanh(x.to("meta")).is_meta
    with FakeTensorMode():
        fake = torch.ones(2, 3, 5)
    assert cpp.tanh(fake).shape == (2, 3, 5)


@needs_cpp
def test_what_the_operator_refuses():
    for x, message in (
        (torch.ones(3, 5), "(B, R, D)"),
        (torch.ones(1, 3, 5).int(), "x must be float32"),
    ):
        with pytest.raises(RuntimeError, match=f"tanh: .*{re.escape(message)}"):
            cpp.tanh(x)
    resized = torch.ones(1, 3, 5)
    resized.untyped_storage().resize_(4)
    with pytest.raises(RuntimeError, match=r"tanh: .*storage"):
        cpp.tanh(resized)
