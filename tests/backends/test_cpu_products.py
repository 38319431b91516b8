"""Matrix products of CPU tensors: right by either way, chosen by measurement."""

import concurrent.futures
import copy
import functools
import re
import time

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import lm2_kernels as lm2
from lm2_kernels import testing
from lm2_kernels.backends import cpp, cpu_products
from lm2_kernels.linear import apply_linear
from tools.emulated_avx512 import every_level
from tools.layers import made_of_ops, make_inputs, make_layer
from tools.native import needs_cpp
from tools.rounding import assert_rule


def _no_minimum(monkeypatch):
    for dtype in cpu_products._MIN_MULTIPLICATIONS:
        monkeypatch.setitem(cpu_products._MIN_MULTIPLICATIONS, dtype, 0)
    monkeypatch.setattr(cpu_products, "_MIN_ROWS", 0)


@pytest.fixture(params=("torch", "onednn"))
def library(request, monkeypatch):
    monkeypatch.setenv(cpu_products.FLOAT32_VARIABLE, request.param)
    _no_minimum(monkeypatch)
    return request.param


def _onednn_calls(monkeypatch):
    calls = []
    original = cpu_products._onednn

    def counted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(cpu_products, "_onednn", counted)
    return calls


@pytest.mark.parametrize("transposed_a", (False, True))
@pytest.mark.parametrize("transposed_b", (False, True))
@pytest.mark.parametrize("has_bias", (False, True))
@pytest.mark.parametrize("relu", (False, True))
def test_product(library, transposed_a, transposed_b, has_bias, relu, monkeypatch):
    calls = _onednn_calls(monkeypatch)

    def run(seed):
        torch.manual_seed(seed)
        a = torch.randn(33, 65).t() if transposed_a else torch.randn(65, 33)
        b = torch.randn(17, 33).t() if transposed_b else torch.randn(33, 17)
        bias = torch.randn(17) if has_bias else None
        calls.clear()
        with torch.no_grad():
            got = cpu_products.product(a, b, bias, relu=relu)
        assert len(calls) == (library == "onednn")
        want = a.double() @ b.double() + (0.0 if bias is None else bias.double())
        eager = a @ b + (0.0 if bias is None else bias)
        if relu:
            want, eager = want.relu(), eager.relu()
        return [testing.compare("product", got, want, eager)]

    assert_rule(run)


def _plain(x):
    return x


def _turned(x):
    return x.t().contiguous().t()


def _every_second(x):
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def _part_of_a_row(x):
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 5), float("nan"))
    wide[..., 3 : 3 + x.shape[-1]] = x
    return wide[..., 3 : 3 + x.shape[-1]]


def _same_rows(x):
    return x[:1].expand(x.shape)


def _overlapping_rows(x):
    return x.contiguous().as_strided(x.shape, (1,) * x.dim())


LAYOUTS = (_plain, _turned, _every_second, _part_of_a_row, _same_rows, _overlapping_rows)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("layout_b", LAYOUTS)
@pytest.mark.parametrize("layout_a", LAYOUTS)
def test_product_of_any_strides(library, layout_a, layout_b, dtype, monkeypatch):
    """Of every operand, the bias too. Small whole numbers: exact by either way."""
    monkeypatch.setenv(cpu_products._16_BIT_VARIABLE, library.replace("onednn", "float32"))
    draw = torch.Generator().manual_seed(0)
    a, b, bias = (
        torch.randint(-2, 3, shape, generator=draw).to(dtype) for shape in ((9, 8), (8, 5), (5,))
    )
    a, b = layout_a(a), layout_b(b)
    for layout_bias in LAYOUTS:
        if layout_bias is not _turned:
            c = layout_bias(bias)
            with torch.no_grad():
                got = cpu_products.product(a, b, c)
            assert torch.equal(got.double(), a.double() @ b.double() + c.double())


def test_a_bias_of_another_dtype_is_refused(library):
    """By the same words whatever the size."""
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        cpu_products.product(torch.ones(9, 8), torch.ones(8, 5), torch.ones(5).bfloat16())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_relu_keeps_nan(library, dtype, monkeypatch):
    """A diverged weight has to show."""
    monkeypatch.setenv(cpu_products._16_BIT_VARIABLE, "float32")
    layer = nn.Linear(32, 32).to(dtype)
    with torch.no_grad():
        layer.weight[3] = float("nan")
    x = torch.randn(40, 32, dtype=dtype, requires_grad=True)
    y = apply_linear(x, layer, relu=True)
    y.sum().backward()
    assert torch.equal(y.isnan().nonzero()[:, 1], torch.full((40,), 3))
    assert x.grad.isnan().all()


@needs_cpp
@every_level
@pytest.mark.parametrize("threads", (1, 3))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_transposed(dtype, threads, environment, request):
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(threads)
    # of more than 2048 rows and columns a thread takes 16 columns, or several
    sizes = ((1, 1), (1, 40), (40, 1), (16, 16), (35, 50), (64, 129), (2100, 2085))
    with environment():
        for rows, columns in sizes:
            # small whole numbers, whose sums are exact in any order
            matrix = torch.arange(rows * columns, dtype=dtype).view(rows, columns) % 1021
            for layout in (_plain, _part_of_a_row):
                for needs_sums in (False, True):
                    got, sums = cpp.transposed(layout(matrix), needs_sums)
                    assert got.is_contiguous()
                    assert torch.equal(got, matrix.t())
                    assert torch.equal(sums, matrix.sum(0) if needs_sums else sums.new_empty(0))
        nothing, sums = cpp.transposed(torch.ones(0, 3, dtype=dtype), True)
        assert nothing.shape == (3, 0)
        assert sums.tolist() == [0.0] * 3
        nothing, sums = cpp.transposed(torch.ones(3, 0, dtype=dtype), True)
        assert nothing.shape == (0, 3)
        assert sums.shape == (0,)


@needs_cpp
@every_level
def test_sums_of_many_rows(environment):
    """In steps, as sums one after the other of so many rows would be wrong by much more."""

    def run(seed):
        draw = torch.Generator().manual_seed(seed)
        matrix = torch.rand(30000, 21, generator=draw)
        with environment():
            _, sums = cpp.transposed(matrix, True)
        return [testing.compare("sums", sums, matrix.double().sum(0), matrix.sum(0))]

    assert_rule(run)


@needs_cpp
def test_what_transposed_refuses():
    for matrix, message in (
        (torch.ones(4), "(I, J)"),
        (torch.ones(4, 3).t(), "contiguous rows"),
        (torch.ones(4, 3).bfloat16(), "float32 or float64"),
        (torch.ones(4, 3).int(), "float"),
    ):
        with pytest.raises(RuntimeError, match=f"transposed_and_sums: .*{re.escape(message)}"):
            cpp.transposed(matrix)
    with pytest.raises(RuntimeError, match=r"transposed_and_sums: .*storage"):
        resized = torch.ones(4, 3)
        resized.untyped_storage().resize_(4)
        cpp.transposed(resized)


@needs_cpp
def test_products_transpose_by_the_kernel(monkeypatch):
    """And by PyTorch's own copy where there is none, or a mode would not know it."""
    _no_minimum(monkeypatch)
    monkeypatch.setenv(cpu_products.FLOAT32_VARIABLE, "onednn")
    calls = []
    monkeypatch.setattr(
        cpp,
        "transposed",
        lambda matrix, needs_sums=False: (
            calls.append(matrix) or (matrix.t().clone(), matrix.sum(0))
        ),
    )
    dy, x = torch.randn(20, 9), torch.randn(20, 5)

    @torch.no_grad()
    def count(a, b):
        calls.clear()
        torch.testing.assert_close(cpu_products.product(a, b), torch.mm(a, b))
        return len(calls)

    assert count(dy.t(), x) == 1
    assert count(torch.randn(20, 9), torch.randn(7, 9).t()) == 0
    with FlopCounterMode(display=False):
        assert count(dy.t(), x) == 0
    monkeypatch.setattr(cpp, "has", lambda function: False)
    assert count(dy.t(), x) == 0


@pytest.mark.parametrize("needs_sums", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_product_and_sums(library, dtype, needs_sums, monkeypatch):
    """Small whole numbers: exact by either way."""
    monkeypatch.setenv(cpu_products._16_BIT_VARIABLE, library.replace("onednn", "float32"))
    draw = torch.Generator().manual_seed(0)
    dy, x = (torch.randint(-2, 3, (20, n), generator=draw).to(dtype) for n in (9, 5))
    for layout in LAYOUTS:
        with torch.no_grad():
            product, sums = cpu_products.product_and_sums(layout(dy), x, needs_sums=needs_sums)
        assert torch.equal(product.double(), layout(dy).double().t() @ x.double())
        assert product.dtype == dtype
        assert (sums is None) == (not needs_sums)
        if needs_sums:
            assert torch.equal(sums, layout(dy).float().sum(0))


@needs_cpp
def test_sums_come_with_the_transposed_copy(monkeypatch):
    _no_minimum(monkeypatch)
    monkeypatch.setenv(cpu_products.FLOAT32_VARIABLE, "onednn")
    calls, original = [], cpp.transposed
    monkeypatch.setattr(cpp, "transposed", lambda *args: calls.append(args) or original(*args))
    dy, x = torch.randn(20, 18), torch.randn(20, 5)
    with torch.no_grad():
        _, sums = cpu_products.product_and_sums(dy, x, needs_sums=True)
        assert [needs_sums for _, needs_sums in calls] == [True]
        assert torch.equal(sums, original(dy, True)[1])
        # a mode does not know the kernel
        with FlopCounterMode(display=False):
            cpu_products.product_and_sums(dy, x, needs_sums=True)
    assert len(calls) == 1


@needs_cpp
def test_transposed_of_fake_tensors():
    """A layer takes them without their mode, too."""
    with FakeTensorMode():
        matrix = torch.ones(3, 5)
    for needs_sums in (False, True):
        got, sums = cpp.transposed(matrix, needs_sums)
        assert got.shape == (5, 3) and got.is_contiguous()
        assert sums.shape == (5 if needs_sums else 0,)


def test_layers_and_gradients(monkeypatch):
    _no_minimum(monkeypatch)
    calls = _onednn_calls(monkeypatch)

    def gradients(layer, x, memory):
        x = x.clone().requires_grad_()
        output, new_memory = layer(x, memory, slot_offset=2)
        loss = output.square().sum() + new_memory.square().sum()
        leaves = {"x": x, **dict(layer.named_parameters())}
        found = torch.autograd.grad(loss, list(leaves.values()))
        # a scalar's error is a matter of luck
        return {f"d{n}": d for n, d in zip(leaves, found, strict=True) if d.numel() > 1}

    for layer in (lm2.PaperMemory(24, 3, bias=True), lm2.ReleaseMemory(24, 3)):
        exact = copy.deepcopy(layer).double()

        def run(seed, layer=layer, exact=exact):
            torch.manual_seed(seed)
            # whole tiles of what is transposed, and parts
            x, memory = torch.randn(2, 10, 24), torch.randn(2, 13, 24)
            found = {}
            for library in ("torch", "onednn"):
                monkeypatch.setenv(cpu_products.FLOAT32_VARIABLE, library)
                calls.clear()
                found[library] = gradients(layer, x, memory)
                assert bool(calls) == (library == "onednn")
            oracle = gradients(exact, x.double(), memory.double())
            return [
                testing.compare(name, got, oracle[name], found["torch"][name])
                for name, got in found["onednn"].items()
            ]

        assert_rule(run)


@pytest.mark.parametrize("kind", (lm2.PaperMemory, lm2.ReleaseMemory))
def test_a_frozen_layer_takes_the_faster_products(kind, monkeypatch):
    """Without ``no_grad`` too; the same bits as its ops."""
    _no_minimum(monkeypatch)
    monkeypatch.setenv(cpu_products.FLOAT32_VARIABLE, "onednn")
    calls = _onednn_calls(monkeypatch)
    layer = make_layer(kind).float().requires_grad_(False)
    inputs = [tensor.detach().float() for tensor in make_inputs()]
    with torch.no_grad():
        want = layer(*inputs)
    count = len(calls)
    assert count > 0
    got = layer(*inputs)
    assert len(calls) == 2 * count
    with made_of_ops():
        of_ops = layer(*inputs)
    for results in (got, of_ops):
        assert all(map(torch.equal, results, want))


def test_three_dimensions_and_double_backward(library):
    linear = nn.Linear(24, 16)
    exact = copy.deepcopy(linear).double()

    def derivatives(y, x, weight):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return {"y": y, "dx": dx, "ddx": torch.autograd.grad(dx.sum(), weight)[0]}

    def run(seed):
        torch.manual_seed(seed)
        x = torch.randn(2, 3, 24, requires_grad=True)
        wide = x.detach().double().requires_grad_()
        y = apply_linear(x, linear)
        found = derivatives(y, x, linear.weight)
        plain = derivatives(linear(x), x, linear.weight)
        oracle = derivatives(exact(wide), wide, exact.weight)
        return [testing.compare(n, found[n], oracle[n], plain[n]) for n in found]

    assert_rule(run)


def test_other_dtypes_and_small_products_are_torchs_own(monkeypatch):
    monkeypatch.setenv(cpu_products.FLOAT32_VARIABLE, "onednn")
    calls = _onednn_calls(monkeypatch)
    with torch.no_grad():
        cpu_products.product(torch.randn(4, 4), torch.randn(4, 4))
        large = torch.randn(512, 512, dtype=torch.float64)
        cpu_products.product(large, large)
    assert not calls


@pytest.mark.parametrize("error", (AttributeError, RuntimeError))
def test_without_the_operator(error, monkeypatch):
    def absent(*args):
        raise error("no such operator")

    monkeypatch.delenv(cpu_products.FLOAT32_VARIABLE, raising=False)
    monkeypatch.setattr(cpu_products, "_ratios", {})
    monkeypatch.setattr(cpu_products, "_onednn", absent)
    a = torch.randn(512, 512)
    with torch.no_grad():
        assert torch.equal(cpu_products.product(a, a), a @ a)


def test_a_wrong_operator_is_not_taken(monkeypatch):
    monkeypatch.setattr(
        cpu_products, "_onednn", lambda a, b, *_: torch.zeros(a.shape[0], b.shape[1])
    )
    assert cpu_products._measure(torch.float32, True, False, 256) == 0.0


def test_measured_once_for_each_layout_and_size(monkeypatch):
    monkeypatch.delenv(cpu_products.FLOAT32_VARIABLE, raising=False)
    monkeypatch.setattr(cpu_products, "_ratios", {})
    measured = []
    monkeypatch.setattr(cpu_products, "_measure", lambda *layout: measured.append(layout) or 2.0)
    # 512 x 512 x 511 multiplications are fewer than those of 512
    a, b = torch.randn(512, 512), torch.randn(512, 511)
    with torch.no_grad():
        for _ in range(2):
            cpu_products.product(a, a)
            cpu_products.product(a, a.t())
            cpu_products.product(a, b)
    layouts = [(True, True, 512), (True, False, 512), (True, True, 256)]
    assert measured == [(torch.float32, *layout) for layout in layouts]


def test_few_rows_are_a_class_of_their_own(monkeypatch):
    """From fewer multiplications on; and few terms, as a gradient of few rows is a sum of."""
    monkeypatch.delenv(cpu_products.FLOAT32_VARIABLE, raising=False)
    monkeypatch.setattr(cpu_products, "_ratios", {})
    measured = []
    monkeypatch.setattr(cpu_products, "_measure", lambda *layout: measured.append(layout) or 2.0)
    few, x, weight = torch.randn(16, 128), torch.randn(4, 512), torch.randn(512, 128)
    with torch.no_grad():
        for a, b in (
            (few, weight.t()),
            (x, weight),
            (x.t(), torch.randn(4, 128)),
        ):
            cpu_products.product(a, b)
    few_of = [
        (torch.float32, *layout, cpu_products._FEW)
        for layout in ((True, False), (True, True), (False, True))
    ]
    assert measured == few_of
    for rows, columns, is_large in (
        (16, 512, True),
        # one row too many; too short a walk
        (17, 512, False),
        (16, 511, False),
        # just enough multiplications, and one too few
        (1, 2048, True),
        (1, 2047, False),
    ):
        a = torch.randn(rows, 128)
        assert cpu_products.is_large(torch.float32, a, columns) == is_large


@pytest.mark.parametrize("layout", ((True, False), (True, True), (False, True), (False, False)))
def test_what_is_measured_of_few_rows(layout, monkeypatch):
    """Products of those layouts, and nothing else."""
    given, seconds = [], cpu_products._seconds

    def watched(way, a, b):
        given.append((a.shape, b.shape, a.stride(1) == 1, b.stride(1) == 1))
        return seconds(way, a, b)

    monkeypatch.setattr(cpu_products, "_seconds", watched)
    assert cpu_products._measure(torch.float32, *layout, cpu_products._FEW) > 0.0
    (a, b, *dense), *others = set(given)
    assert not others
    assert tuple(dense) == layout
    assert (a[0] if layout[0] else a[1]) <= cpu_products._FEW
    assert a[1] == b[0]


def test_threads_measure_once(monkeypatch):
    monkeypatch.delenv(cpu_products.FLOAT32_VARIABLE, raising=False)
    monkeypatch.setattr(cpu_products, "_ratios", {})
    measured = []

    def measure(*key):
        time.sleep(0.05)
        measured.append(key)
        return float(len(measured))

    monkeypatch.setattr(cpu_products, "_measure", measure)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(cpu_products._ratio, torch.float32, True, True, 256) for _ in range(4)]
        assert [call.result() for call in calls] == [1.0] * 4
    assert len(measured) == 1


def test_the_report_says_what_was_measured(monkeypatch):
    known = {256: 1.0, 512: 2.0, 1024: 0.5}
    few = {cpu_products._FEW: 3.0}
    for variable in (cpu_products.FLOAT32_VARIABLE, cpu_products._16_BIT_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    ratios = {"float32": known | few, "bfloat16": {256: 5.0}, "float16": dict.fromkeys(known, 0.0)}
    monkeypatch.setattr(
        cpu_products,
        "_ratio",
        lambda dtype, dense_a, dense_b, size: ratios[str(dtype).removeprefix("torch.")][size],
    )
    report = cpu_products.report()
    first = (
        "x W^T oneDNN (3.00x of few, 2.00x at 512) and torch's own (1.00x at 256, 0.50x at 1024), "
        "dy W "
    )
    assert report["float32"].startswith(first)
    assert report["bfloat16"].startswith("x W^T float32 (5.00x at 256, and above), dy W ")
    assert report["float16"] == "x W^T torch's own, dy W torch's own, dy^T x torch's own"


def test_a_size_has_its_own_way(monkeypatch):
    monkeypatch.delenv(cpu_products.FLOAT32_VARIABLE, raising=False)
    known = {256: 1.0, 512: 2.0, 1024: 0.5}
    ratios = {(torch.float32, True, True, size): ratio for size, ratio in known.items()}
    monkeypatch.setattr(cpu_products, "_ratios", ratios)
    calls = _onednn_calls(monkeypatch)
    with torch.no_grad():
        for rows, taken in ((256, 0), (1024, 1), (4096, 1)):
            a, b = torch.randn(rows, 512), torch.randn(512, 512)
            cpu_products.product(a, b)
            assert len(calls) == taken


@pytest.mark.parametrize(("ratio", "rounds"), [(5.0, 2), (2.0, 8), (0.2, 8)])
def test_what_is_clear_of_a_size_is_not_measured_of_larger_ones(ratio, rounds, monkeypatch):
    monkeypatch.delenv(cpu_products._16_BIT_VARIABLE, raising=False)
    # what is widened is a float32 product, of which nothing is to be measured
    monkeypatch.setenv(cpu_products.FLOAT32_VARIABLE, "torch")
    monkeypatch.setattr(cpu_products, "_ratios", {})
    seconds = iter([ratio, 1.0] * rounds)
    monkeypatch.setattr(cpu_products, "_seconds", lambda *args: next(seconds))
    assert cpu_products._ratio(torch.bfloat16, True, False, 1024) == ratio
    assert next(seconds, None) is None


def test_unknown_choice(monkeypatch):
    monkeypatch.setenv(cpu_products.FLOAT32_VARIABLE, "blas")
    a = torch.randn(512, 512)
    with torch.no_grad(), pytest.raises(ValueError, match=cpu_products.FLOAT32_VARIABLE):
        cpu_products.product(a, a)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("way", ("torch", "float32"))
@pytest.mark.parametrize("has_bias", (False, True))
@pytest.mark.parametrize("relu", (False, True))
def test_16_bit(dtype, way, has_bias, relu, monkeypatch):
    monkeypatch.setenv(cpu_products._16_BIT_VARIABLE, way)
    _no_minimum(monkeypatch)
    widened = []
    original = cpu_products._widened
    monkeypatch.setattr(
        cpu_products, "_widened", lambda *args: widened.append(args) or original(*args)
    )

    def run(seed):
        torch.manual_seed(seed)
        a, b = torch.randn(2, 40, 65).to(dtype), torch.randn(17, 65).to(dtype).t()
        bias = torch.randn(17).to(dtype) if has_bias else None
        widened.clear()
        with torch.no_grad():
            got = cpu_products.product(a, b, bias, relu=relu)
        assert got.dtype == dtype
        assert len(widened) == (way == "float32")
        want = a.double() @ b.double() + (0.0 if bias is None else bias.double())
        want = want.relu() if relu else want
        return [testing.compare("product", got, want, want.to(dtype))]

    assert_rule(run)


def test_16_bit_way_is_measured(monkeypatch):
    monkeypatch.delenv(cpu_products._16_BIT_VARIABLE, raising=False)
    monkeypatch.setattr(cpu_products, "_ratios", {})
    assert cpu_products._ratio(torch.bfloat16, True, False, 256) > 0.0
    seconds = iter((1.0, 0.1, 1.0, 0.1))
    monkeypatch.setattr(cpu_products, "_seconds", lambda *args: next(seconds))
    # two rounds are enough where it is clear
    assert cpu_products._measure(torch.bfloat16, True, False, 256) == pytest.approx(10.0)


def test_nothing_is_measured_of_fake_tensors(monkeypatch):
    monkeypatch.delenv(cpu_products._16_BIT_VARIABLE, raising=False)
    monkeypatch.setattr(cpu_products, "_ratios", {})
    with FakeTensorMode(), torch.no_grad():
        a = torch.randn(512, 512, dtype=torch.bfloat16)
        assert cpu_products.product(a, a).shape == (512, 512)
    assert not cpu_products._ratios


def test_autocast_does_not_narrow_again(monkeypatch):
    monkeypatch.setenv(cpu_products._16_BIT_VARIABLE, "float32")
    _no_minimum(monkeypatch)
    a = torch.randn(40, 65).bfloat16()
    dtypes = []
    original = cpu_products._torch
    monkeypatch.setattr(
        cpu_products, "_torch", lambda a, *args: dtypes.append(a.dtype) or original(a, *args)
    )
    monkeypatch.setenv(cpu_products.FLOAT32_VARIABLE, "torch")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = cpu_products.product(a, a.t())
    assert dtypes == [torch.float32]
    torch.testing.assert_close(got, (a.float() @ a.float().t()).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("way", ("torch", "float32"))
def test_autocast_layers(way, monkeypatch):
    monkeypatch.setenv(cpu_products._16_BIT_VARIABLE, way)
    _no_minimum(monkeypatch)
    layer = lm2.ReleaseMemory(24, 3, pooled_gate="prefix")
    x, memory = torch.randn(2, 9, 24, requires_grad=True), torch.randn(2, 9, 24)
    with torch.autocast("cpu", torch.bfloat16):
        output, new_memory = layer(x, memory)
    (output.float().square().sum() + new_memory.square().sum()).backward()
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
