"""What is particular to the Triton backend: resources on every target, addresses, launches."""

import contextlib
import copy
import functools
import importlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy
import pytest
import torch
import triton
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from triton.runtime.jit import JITFunction

import lm2_kernels as lm2
from lm2_kernels import backends, functional, testing, unchecked
from lm2_kernels.backends import dropout
from lm2_kernels.backends.contract import NORM_AND_TANH
from lm2_kernels.backends.triton import launch as launch_module
from lm2_kernels.backends.triton import tables
from tools import launches, norms
from tools.fake_gpu import fake_gpu, ptxas_log
from tools.rounding import assert_rule

TARGETS = tuple(launches.TARGETS)
DTYPES = ("bfloat16", "float32")

# one case for each row of the launch tables, with every optional input once
HEAD_WIDTHS = (16, 32, 64, 128, 256)
PLAIN_ATTENTION = tuple(
    testing.Case("memory_attention", 1, 512, 512, 2, width) for width in HEAD_WIDTHS
)
FULL_ATTENTION = tuple(
    case._replace(options=(("slot_mask", "random"), ("dropout_p", 0.1)))
    for case in (*PLAIN_ATTENTION, testing.Case("memory_attention", 1, 512, 512, 2, 80))
)
FEW_SLOTS = tuple(
    testing.Case("memory_attention", 1, 512, slots, 2, width, (("causal", False), *options))
    for slots, width in ((12, 64), (24, 64), (48, 64), (12, 128), (24, 128), (12, 256), (12, 80))
    for options in ((), FULL_ATTENTION[0].options)
)
# heads of every day; those of 128 columns are for the default of the largest GPUs alone
EVERYDAY_ATTENTION = (PLAIN_ATTENTION[2], PLAIN_ATTENTION[4])
LARGE_ATTENTION = tuple(case._replace(batch=64) for case in PLAIN_ATTENTION)
ROWS = (
    testing.Case("memory_update", 2, 1, 0, 0, 512),
    testing.Case("memory_update", 2, 64, 0, 0, 96, (("output_gate", True),)),
    testing.Case("memory_update", 2, 64, 0, 0, 2048, (("output_gate", True),)),
    testing.Case(
        "memory_update", 2, 64, 0, 0, 2048, (("gate_bias", "segment"), ("memory", "float32"))
    ),
    *(
        testing.Case(
            "memory_update", 1, 2 * most + 1, 0, 0, width, (("tokens_per_slot", most), *rest)
        )
        for most, width, rest in (
            (2, 512, (("output_gate", True), ("gates", "slots"))),
            (4, 515, (("gate_bias", "prefix"), ("gates", "slots"))),
            (8, 512, (("output_gate", True), ("read", True))),
            (16, 515, (("gate_bias", "prefix"), ("gates", "slots"))),
            (32, 512, (("output_gate", True), ("output", "memory"), ("gates", "slots"))),
            (32, 515, (("gate_bias", "segment"), ("memory", "float32"))),
            (80, 512, (("output_gate", True), ("read", True))),
            (80, 515, (("gate_bias", "prefix"), ("gates", "slots"))),
            (16, 515, (("gate_bias", "segment"), ("output_gate", True), ("read", True))),
        )
    ),
    *(
        testing.Case("residual_layer_norm", 1, 16, 0, 0, width)
        for width in (100, 200, 512, 1000, 2048, 4096, 8192, 16_384)
    ),
    testing.Case("pooled_gate", 2, 600, 0, 0, 48),
    testing.Case("pooled_gate", 2, 600, 0, 0, 512, (("prefix", True), ("num_pooled", 3))),
)
FIRST_CASES = tuple(
    next(case for case in testing.SMALL_CASES if case.op == op) for op in backends.OPS
)
CHUNKED = testing.Case(
    *("memory_update", 2, 4, 0, 0, 16),
    (("tokens_per_slot", 3), ("output_gate", True), ("read", True), ("gates", "slots")),
)


def _compile(case, dtype, target):
    with launches.compiled(target) as gpu:
        testing.run_case(case, testing.make_inputs(case, testing.DTYPES[dtype]), "triton")
    assert gpu.launches
    return gpu.launches


def _everyday():
    """Attention for every target (heads of 128 columns for sm_90 alone); of the kernels of rows,
    which are much the same on all, each row of their tables for one of NVIDIA's and for AMD's. The
    exhaustive sweep has the others."""
    wide = [*((case, "bfloat16", target) for case in EVERYDAY_ATTENTION for target in TARGETS)]
    wide += [(PLAIN_ATTENTION[3], "bfloat16", "sm_90")]
    wide += [(case, "float32", "sm_90") for case in EVERYDAY_ATTENTION]
    wide += [(FEW_SLOTS[6], "bfloat16", target) for target in TARGETS]
    wide += [(case, "bfloat16", "sm_90") for case in ROWS]
    wide += [(case, "float32", "gfx942") for case in (*EVERYDAY_ATTENTION, *ROWS)]
    return [pytest.param(*entry, id="-".join([entry[0].id, *entry[1:]])) for entry in wide]


@pytest.mark.parametrize(("case", "dtype", "target"), _everyday())
def test_kernel_resources(case, dtype, target):
    _compile(case, dtype, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", (*TARGETS, "sm_89", "sm_120"))
@pytest.mark.parametrize("dtype", (*DTYPES, "float16"))
@pytest.mark.parametrize(
    "case",
    (*PLAIN_ATTENTION, *FULL_ATTENTION, *FEW_SLOTS, *LARGE_ATTENTION, *ROWS),
    ids=lambda case: case.id,
)
def test_kernel_resources_exhaustive(case, dtype, target):
    _compile(case, dtype, target)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "target", ("sm_90", *(pytest.param(t, marks=pytest.mark.slow) for t in TARGETS if t != "sm_90"))
)
@pytest.mark.parametrize("width", (100, 512, 2048, 8192, 10_000))
@pytest.mark.parametrize("name", norms.NAMES)
def test_optional_norms_resources(name, width, target, dtype):
    x, residual = torch.zeros(2, 1, 16, width, dtype=testing.DTYPES[dtype])
    weight, statistic = x[0, 0], torch.zeros(1, 16)
    more = (x, residual) if name == NORM_AND_TANH else ()
    with launches.compiled(target) as gpu:
        backends.call("triton", f"{name}_forward", x, residual, weight, weight, 1e-5)
        given = (x, x, residual, weight, statistic, statistic)
        backends.call("triton", f"{name}_backward", *given, *more, True)
    # of wide rows the backward takes its means first
    assert len(gpu.launches) == (2 if width <= 4096 else 3)


# where `pip install --no-deps --target` has put another release
OTHER_TRITON = os.environ.get("LM2_KERNELS_TEST_TRITON")


@pytest.mark.skipif(not OTHER_TRITON, reason="LM2_KERNELS_TEST_TRITON names no other Triton")
def test_compile_checks_with_another_triton():
    path = [OTHER_TRITON, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "LM2_KERNELS_TEST_TRITON": ""}

    def run(*arguments):
        command = [sys.executable, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    found = Path(run("-c", "import triton; print(triton.__file__)").strip())
    assert found.is_relative_to(Path(OTHER_TRITON).resolve())
    # on one target in one dtype: all of them are a minute more
    everyday = "test_kernel_resources and not exhaustive and bfloat16-sm_90"
    checks = f"({everyday}) or (candidate_compiles and (forward-256 or dkey_value-256))"
    checks += " or (few_slots_compiles and 256) or (optional_norms_resources and 2048)"
    checks += " or tritons_launcher"
    others = [str(Path(__file__).with_name(f"test_{name}.py")) for name in ("forms", "launcher")]
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, *others, "-k", checks)


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("sm_80", "mma.sync"),
        ("sm_90", "wgmma.mma_async"),
        ("sm_100", "tcgen05.mma"),
        ("gfx942", "v_mfma"),
    ],
)
def test_attention_uses_tensor_cores(target, kind):
    with launches.compiled(target) as gpu:
        for case in PLAIN_ATTENTION[2:] if target == "sm_90" else EVERYDAY_ATTENTION:
            testing.run_case(case, testing.make_inputs(case, torch.bfloat16), "triton")
    for launch in gpu.launches:
        if "delta" in launch.kernel:
            continue
        assert launch.tensor_cores, launch
        assert all(found.startswith(kind) for found in launch.tensor_cores), launch
        if launch.warpgroup_ptx:
            # products that wait for one another, for whatever reason, lose half of their rate
            log = ptxas_log(launch.warpgroup_ptx, "sm_90a")
            assert "registers" in log
            assert "serialized" not in log, f"{launch}\n{log}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_norm_wait_once_and_the_next_are_on_their_way(dtype):
    case = testing.Case("residual_layer_norm", 1, 16, 0, 0, 2048)
    *_, backward = _compile(case, dtype, "sm_90")
    # one sum over a row takes two; in 16 bits the sums over rows at the end take four more, as
    # they are stored in another layout than rows are read in. Before triton 3.8 there is one more
    most = 4 if triton.__version__.startswith(("3.6.", "3.7.")) else 3
    assert backward.barriers <= (most if dtype == "float32" else 7)
    assert backward.async_copies


def _huge_stride(*shape):
    """A view whose batch stride passes 2^31 elements within three entries; few pages are touched.

    Virtual memory: the storage is 6 GiB, of which the view's elements are kilobytes.
    """
    stride_b = 2**30 + 64
    storage = torch.UntypedStorage(shape[0] * stride_b * 2)
    tensor = torch.tensor([], dtype=torch.bfloat16).set_(storage)
    inner = torch.empty(shape[1:]).stride()
    view = tensor.as_strided(shape, (stride_b, *inner))
    view.copy_(torch.randn(shape))
    return view


@pytest.mark.parametrize(
    "case",
    (
        testing.Case("memory_attention", 3, 4, 5, 1, 16),
        testing.Case("memory_update", 3, 4, 0, 0, 16),
        CHUNKED._replace(batch=3),
        testing.Case("residual_layer_norm", 3, 4, 0, 0, 16),
        testing.Case("pooled_gate", 3, 4, 0, 0, 16),
    ),
    ids=lambda case: case.id,
)
def test_offsets_past_2_31(case):
    """A 32-bit product of index and stride overflows here, which the interpreter refuses."""

    def huge(tensor):
        if tensor.dim() < 3 or tensor.dtype != torch.bfloat16:
            return tensor
        view = _huge_stride(*tensor.shape)
        view.copy_(tensor)
        return view

    def run(seed, name):
        inputs = testing.make_inputs(case, torch.bfloat16, seed=seed)
        tensors = {**inputs.tensors, name: huge(inputs.tensors[name])}
        strided = inputs._replace(tensors=tensors)
        return testing.compare_case(case, strided, testing.run_case(case, strided, "triton"))

    # one tensor at a time: several would not fit into the address space CI allows
    with launches.interpreted("sm_90"):
        for name in testing.make_inputs(case, torch.bfloat16).tensors:
            assert_rule(functools.partial(run, name=name))


# those whose results are the kernels' alone: torch without CUDA computes with no fake GPU's tensor
_BY_KERNELS = [
    case
    for case in testing.SMALL_CASES
    if case.width <= 256 and not case.option("top_k")
    if case.op != "pooled_gate" or case.option("prefix")
]


@pytest.mark.parametrize("case", _BY_KERNELS[1::4], ids=lambda case: case.id)
def test_launch_under_device_guard(case):
    """Tensors on cuda:1 while cuda:0 is current: the fake driver refuses a launch elsewhere."""
    # without a GPU they are fakes, here with an address, of a mode that nobody sees
    no_mode = mock.patch.object(torch._C, "_len_torch_dispatch_stack", lambda: 0)
    address = mock.patch.object(FakeTensor, "data_ptr", lambda self: 16)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with fakes, launches.compiled("sm_90") as gpu, no_mode, address:
        inputs = testing.make_inputs(case, torch.float16)
        tensors = {
            name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda:1")
            for name, t in inputs.tensors.items()
        }
        constants = {
            name: value.to("cuda:1") if isinstance(value, torch.Tensor) else value
            for name, value in inputs.constants.items()
        }
        # the second time nothing is looked at
        for _ in range(2):
            getattr(functional, case.op)(**tensors, **constants, backend="triton")
    assert gpu.launches
    for launch in gpu.launches:
        assert {str(device) for device in launch.devices} == {"cuda:1"}


@pytest.mark.parametrize("case", _BY_KERNELS, ids=lambda case: case.id)
def test_a_mode_sees_operators(case):
    """Who fakes tensors gets fakes without a launch, who counts operators sees ours."""
    inputs = testing.make_inputs(case, torch.float16)

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.add(func.__name__.partition(".")[0])
            return func(*args, **(kwargs or {}))

    names: set[str] = set()
    with launches.interpreted("sm_90"):
        wanted = testing.run_case(case, inputs, "triton")
        with Seen():
            seen = testing.run_case(case, inputs, "triton")
    assert {f"{case.op}_forward", f"{case.op}_backward"} <= names
    assert all(torch.equal(seen[name], tensor) for name, tensor in wanted.items())
    with launches.grids("sm_90") as grids, FakeTensorMode() as mode:
        fakes = tree_map_only(torch.Tensor, mode.from_tensor, inputs)
        found = testing.run_case(case, fakes, "triton")
    assert not grids
    for name, want in wanted.items():
        fake = found[name]
        assert isinstance(fake, FakeTensor) and fake.dtype == want.dtype
        assert (fake.shape, fake.stride()) == (want.shape, want.stride())


@pytest.mark.parametrize("autocast", (False, True))
@pytest.mark.parametrize("kind", (lm2.PaperMemory, lm2.ReleaseMemory))
def test_a_layer_of_fakes_launches_nothing(kind, autocast):
    with launches.grids("sm_90") as grids, FakeTensorMode():
        layer = kind(32, num_heads=2, backend="triton")
        x, memory = torch.randn(2, 2, 6, 32)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = layer(x, memory)
        gradients = torch.autograd.grad([o.float().sum() for o in outputs], [*layer.parameters()])
    assert not grids
    assert all(isinstance(each, FakeTensor) for each in (*outputs, *gradients))
    # what a fake tensor has for an address is no kernel's to read
    with (
        launches.interpreted("sm_90"),
        pytest.raises(RuntimeError, match="a tensor has no memory: it is fake"),
    ):
        layer(x, memory)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fakes_of_a_gpu_that_is_not_there(monkeypatch):
    """As who plans for one has them: PyTorch computes their shapes."""
    monkeypatch.setattr(backends, "_warned", set())
    with FakeTensorMode():
        tensors = 3 * [torch.empty(1, 3, 2, 16, device="cuda:0")]
        with pytest.warns(match="torch sees no GPU"):
            assert backends.select("memory_attention", tensors, "auto") == "eager"


@pytest.mark.parametrize(
    "error",
    (
        RuntimeError("Failed to find C compiler"),
        subprocess.CalledProcessError(1, ["gcc"]),
        AssertionError("libcuda.so cannot found!"),
        FileNotFoundError("/sbin/ldconfig"),
    ),
    ids=lambda error: type(error).__name__,
)
def test_a_driver_that_does_not_start_is_a_reason(error, monkeypatch):
    """Where there is a GPU, but not what Triton makes its driver with."""

    class Driver:
        @property
        def active(self):
            raise error

    with FakeTensorMode():
        tensors = 3 * [torch.empty(1, 3, 2, 16, device="cuda:0")]
    monkeypatch.setattr(launch_module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launch_module.triton.runtime, "driver", Driver())
    launch_module.driver_reason.cache_clear()
    try:
        reason = backends.unsupported_reason("triton", "memory_attention", *tensors)
        assert reason.startswith(f"Triton's driver does not start: {type(error).__name__}: ")
    finally:
        launch_module.driver_reason.cache_clear()


_BOUND = (
    *(case for case in FIRST_CASES if case.op != "memory_attention"),
    testing.Case(
        *("memory_attention", 1, 5, 6, 2, 16),
        (("slot_mask", "random"), ("dropout_p", 0.3), ("slot_offset", 2)),
    ),
    testing.Case("memory_attention", 1, 520, 4, 1, 16, (("causal", False),)),
    CHUNKED,
    testing.Case("residual_layer_norm", 1, 2, 0, 0, 9000),
    testing.Case("pooled_gate", 1, 70, 0, 0, 16, (("prefix", True), ("num_pooled", 3))),
)


@contextlib.contextmanager
def _triton_launches():
    """How often Triton itself looks at the arguments of a launch."""
    seen = []
    run = JITFunction.run

    def counted(self, *args, **options):
        seen.append(self.__name__)
        return run(self, *args, **options)

    with mock.patch.object(JITFunction, "run", counted):
        yield seen


@pytest.mark.parametrize("case", _BOUND, ids=lambda case: case.id)
def test_later_launches_are_the_first_with_other_tensors(case):
    with fake_gpu("sm_90") as gpu, _triton_launches() as seen:
        for seed in (0, 1):
            gpu.current_stream = seed
            inputs = testing.make_inputs(case, torch.float32, seed=seed)
            results = testing.run_case(case, inputs, "triton", seed=seed)
    # Triton looked at the first half of them
    assert gpu.launches == 2 * gpu.launches[: len(seen)]
    assert gpu.streams == [0] * len(seen) + [1] * len(seen)
    with fake_gpu("sm_90", compile=False):
        want = testing.run_case(case, inputs, "triton", seed=seed)
    assert results.keys() == want.keys()
    for name, result in results.items():
        assert torch.equal(result, want[name]), name


def test_amds_launches_are_all_tritons_own():
    case = FIRST_CASES[-1]
    with launches.compiled("gfx942") as gpu, _triton_launches() as seen:
        for _ in range(2):
            testing.run_case(case, testing.make_inputs(case, torch.float32), "triton")
    assert len(seen) == len(gpu.launches)


def test_what_changes_from_call_to_call_is_not_remembered():
    """1 and 16 are the numbers that Triton would compile another kernel for; 2^31 has 64 bits."""
    cases = {
        number: (
            testing.Case(*("memory_attention", 1, 5, 24, 1, 16), (("slot_offset", number % 32),)),
            testing.Case(
                *("pooled_gate", 1, 70, 0, 0, 16), (("prefix", True), ("num_pooled", number))
            ),
        )
        for number in (1, 16, 3, 2**31)
    }

    def run(seed, case):
        inputs = testing.make_inputs(case, torch.float32, seed=seed)
        results = testing.run_case(case, inputs, "triton", seed=seed)
        return testing.compare_case(case, inputs, results, seed=seed)

    with fake_gpu("sm_90"), _triton_launches() as seen:
        for number, pair in cases.items():
            for case in pair:
                assert_rule(functools.partial(run, case=case))
            if number == 1:
                launched = len(seen)
    assert len(seen) == launched


def _called(op, tensors, *options):
    """A backend function, its results in a list."""
    results = getattr(backends.get("triton"), op)(*tensors, *options)
    return [result for result in results if result.numel()]


# what an op is called with beside its tensors, each option once more with another value
_UPDATE_NEEDS = (True, True, True, False, True)
_OPTIONS = {
    "memory_attention_forward": (
        ("qkkms", True, 0, 0.3, None, 0.2),
        (False, 0, 0.3, None, 0.2),
        (True, 0, 0.5, None, 0.2),
        (True, 0, 0.3, None, 0.4),
    ),
    "memory_attention_backward": (
        ("qqkkmsqt", True, 0, 0.3, None, 0.2, True, True),
        (False, 0, 0.3, None, 0.2, True, True),
        (True, 0, 0.5, None, 0.2, True, True),
        (True, 0, 0.3, None, 0.4, True, True),
        (True, 0, 0.3, None, 0.2, True, False),
        (True, 0, 0.3, None, 0.2, False, True),
    ),
    "memory_update_forward": (
        ("xxrggg-x", "read", 2),
        ("memory", 2),
        ("read", 3),
    ),
    "memory_update_backward": (
        ("xrxrggg-x", "read", 2, True, True, True, False, True),
        ("memory", 2, True, True, True, False, False),
        ("read", 3, True, True, True, False, True),
        *(
            ("read", 2, *(need != (place == other) for place, need in enumerate(_UPDATE_NEEDS)))
            for other in range(5)
        ),
    ),
    "residual_layer_norm_forward": (("xxww", 1e-5), (1e-2,)),
    "residual_layer_norm_backward": (("xxxwmm", True, True), (True, False), (False, True)),
    "pooled_gate_forward": (("xw-", False, 0), (True, 0)),
    "pooled_gate_backward": (
        ("psxw", True, 0, True, True, True),
        (True, 0, False, True, True),
        (True, 0, True, False, True),
        (True, 0, True, True, False),
    ),
}


@pytest.mark.parametrize("op", _OPTIONS)
def test_each_option_tells_launches_apart(op):
    """Same tensors, one option another: as if nothing had been launched before."""
    (kinds, *first), *others = _OPTIONS[op]
    torch.manual_seed(0)
    shapes = {
        **dict.fromkeys("qk", (1, 6, 2, 16)),
        **dict.fromkeys("xgp", (1, 6, 16)),
        **{"r": (1, 3, 16), "w": (16,), "m": (1, 6), "s": (1, 16), "t": (1, 2, 2, 6)},
    }
    tensors = [None if kind == "-" else torch.randn(shapes[kind]) for kind in kinds]
    if op.startswith("memory_attention"):
        tensors[kinds.index("m")] = torch.tensor([[True, False, True, True, True, True]])
        tensors[kinds.index("s")] = torch.tensor(7)
    with fake_gpu("sm_90"):
        _called(op, tensors, *first)
        for options in others:
            # the rows of three tokens a slot are others
            rows = [
                t[:, :2] if kind == "r" and 3 in options else t
                for kind, t in zip(kinds, tensors, strict=True)
            ]
            got = _called(op, rows, *options)
            again = _called(op, rows, *options)
            launch_module.forget()
            want = _called(op, rows, *options)
            launch_module.forget()
            _called(op, tensors, *first)
            assert len(got) == len(want)
            for mine, other, fresh in zip(got, again, want, strict=True):
                assert torch.equal(mine, fresh) and torch.equal(other, fresh), options


def _moved(tensor, elements):
    """The same, so many elements behind the begin of its storage."""
    storage = tensor.new_zeros(tensor.numel() + elements)
    return storage[elements:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize(
    "change",
    ["x 4 bytes on", "x 8 bytes on", "weight", "sum", "stride", "dtype", "shape", "missing"],
)
def test_other_layouts_are_looked_at(change):
    x, weight, pooled_sum = torch.randn(2, 4, 16), torch.randn(16), torch.randn(2, 16)
    given = {"x": x, "weight": weight, "pooled_sum": pooled_sum, "num_pooled": 3, "prefix": True}
    other = {
        "x 4 bytes on": {"x": _moved(x, 1)},
        "x 8 bytes on": {"x": _moved(x, 2)},
        "weight": {"weight": _moved(weight, 1)},
        "sum": {"pooled_sum": _moved(pooled_sum, 1)},
        "stride": {"x": x.transpose(0, 1).contiguous().transpose(0, 1)},
        "dtype": {"x": x.half()},
        "shape": {"x": x[:, :3].contiguous()},
        "missing": {"pooled_sum": None, "num_pooled": 0},
    }[change]
    with fake_gpu("sm_90"), _triton_launches() as seen:
        functional.pooled_gate(**given, backend="triton")
        launched = len(seen)
        functional.pooled_gate(**given, backend="triton")
        assert len(seen) == launched
        got = functional.pooled_gate(**given | other, backend="triton")
        assert len(seen) > launched
    want = functional.pooled_gate(**given | other, backend="eager")
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_hook_is_told_of_each_launch_and_leaves_nothing(name, monkeypatch):
    x, weight = torch.randn(1, 4, 16), torch.randn(16)
    hook = getattr(triton.knobs.runtime, name)
    with fake_gpu("sm_90"), _triton_launches() as seen:
        for calls, looked_at in (([print], True), ([], True), ([], False), ([print], True)):
            monkeypatch.setattr(hook, "calls", calls)
            launched = len(seen)
            functional.pooled_gate(x, weight, backend="triton")
            assert (len(seen) > launched) == looked_at


def test_layouts_are_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr(launch_module, "_MOST_LAYOUTS", 3)
    with fake_gpu("sm_90", execute=False, compile=False):
        for num_tokens in range(1, 10):
            x, weight = torch.zeros(1, num_tokens, 16), torch.zeros(16)
            functional.pooled_gate(x, weight, backend="triton")
            assert 0 < len(launch_module._layouts) <= 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    (
        testing.Case("memory_attention", 2, 600, 12, 1, 16, (("causal", False),)),
        testing.Case("memory_attention", 1, 515, 40, 1, 17, (("slot_offset", 3),)),
        testing.Case("memory_attention", 1, 512, 20, 1, 16, FULL_ATTENTION[0].options),
        # the last slots are seen by tokens of the last parts alone
        testing.Case("memory_attention", 1, 600, 300, 1, 16),
    ),
    ids=lambda case: case.id,
)
def test_gradients_of_few_slots_are_summed_in_parts(case, dtype, target="sm_90"):
    with launches.grids(target) as grids:
        testing.run_case(case, testing.make_inputs(case, testing.DTYPES[dtype]), "triton")
    # the backward's kernel of dK and dV is the last
    config = tables.attention_dkey_value(
        *(target, testing.DTYPES[dtype], max(16, case.width), case.width % 16 != 0, case.slots),
        takes_descriptors=False,
        has_dropout="dropout_p" in dict(case.options),
        tf32=False,
    )
    alone = case.batch * case.heads * triton.cdiv(case.slots, config.block_slots)
    assert grids[-1][0] == 4 * alone
    with launches.interpreted(target):
        for comparison in testing.check_case(case, testing.DTYPES[dtype], "triton"):
            assert comparison.passed, comparison


@pytest.mark.parametrize(
    ("num_programs", "num_tokens", "num_parts"),
    ((8, 2048, 16), (8, 512, 4), (8, 600, 4), (1, 511, 1), (1, 1, 1), (33, 4097, 4), (34, 4096, 1)),
)
def test_parts_fill_a_gpu_and_have_enough_to_do(num_programs, num_tokens, num_parts):
    size = tables.attention_part(num_programs, num_tokens, 64)
    assert size % 64 == 0
    assert triton.cdiv(num_tokens, size) == num_parts


def test_dropout_mask_is_the_shared_one():
    """Forward and backward of the kernels use the mask that backends.dropout defines."""
    batch, tokens, slots, heads, width = 2, 19, 35, 2, 35
    query = torch.zeros(batch, tokens, heads, width)
    key = torch.zeros(batch, slots, heads, width)
    # equal scores and the identity as values: the read is the kept probabilities themselves
    value = torch.eye(slots)[None, :, None, :].expand(batch, slots, heads, width)
    value = value.clone().requires_grad_()
    torch.manual_seed(7)
    with launches.interpreted("sm_90"):
        out = lm2.memory_attention(query, key, value, causal=False, dropout_p=0.4, backend="triton")
        (dvalue,) = torch.autograd.grad(out[..., 0].sum(), value)
    torch.manual_seed(7)
    seed = unchecked.draw_seed(torch.device("cpu"))
    rows = torch.arange(batch * heads * tokens).view(batch, heads, tokens)
    keep = dropout.keep_mask(seed, 0.4, rows, slots)
    assert torch.equal(out.permute(0, 2, 1, 3) != 0, keep)
    # dV sums the kept probabilities of a slot over tokens
    assert torch.equal(dvalue[..., 0].permute(0, 2, 1) != 0, keep.any(dim=2))


@pytest.mark.parametrize("seed", (0, 1, -1, 2**40 + 5, -(2**62)))
def test_dropout_bits_match(seed):
    """The hash in Triton and in torch agree for seeds of any sign and rows past 2^32."""
    from tools import dropout_kernel

    rows = torch.tensor([0, 1, 2**31, 2**32 + 3, 2**40])
    with launches.interpreted("sm_90"):
        got = dropout_kernel.keep_mask(torch.tensor(seed), 0.3, rows, 64)
    assert torch.equal(got, dropout.keep_mask(torch.tensor(seed), 0.3, rows, 64))


def test_nothing_launches_for_an_empty_batch():
    with launches.checked("sm_90") as gpu:
        for case in (*FIRST_CASES, CHUNKED):
            empty = case._replace(batch=0)
            testing.run_case(empty, testing.make_inputs(empty, torch.float32), "triton")
    assert not gpu.launches


def test_only_needed_gradients_are_computed():
    case = testing.SMALL_CASES[1]
    inputs = testing.make_inputs(case, torch.float32)
    query = inputs.tensors["query"].requires_grad_()
    with launches.checked("sm_90") as gpu:
        out = lm2.memory_attention(
            query, inputs.tensors["key"], inputs.tensors["value"], backend="triton"
        )
        torch.autograd.grad(out.sum(), query)
    assert not any("dkey_value" in launch.kernel for launch in gpu.launches)
    assert any("dquery" in launch.kernel for launch in gpu.launches)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", testing.SMALL_CASES, ids=lambda case: case.id)
def test_grid_axes(case, target):
    """Only the first axis of a grid may be long: the others end at 65535."""
    large = case._replace(batch=case.batch * 50)
    with launches.grids(target) as grids:
        testing.run_case(large, testing.make_inputs(large, torch.bfloat16), "triton")
    # the composite path has no launch of ours
    assert grids or case.option("top_k") or case.width > tables.MAX_HEAD_WIDTH
    for grid in grids:
        assert math.prod(grid[1:]) <= max(1, case.width)


def test_source_is_capture_safe():
    """No synchronisation, no autotuning, no float atomics in the backend's source."""
    folder = Path(backends.get("triton").__file__).parent
    forbidden = re.compile(r"\.item\(|\.cpu\(|\.tolist\(|synchronize|@triton\.autotune|tl\.atomic_")
    for path in folder.glob("*.py"):
        assert not forbidden.search(path.read_text()), path.name


def _num_compiled(op):
    module = importlib.import_module(f"lm2_kernels.backends.triton.{op}")
    kernels = [value for value in vars(module).values() if isinstance(value, triton.JITFunction)]
    caches = [cache for kernel in kernels for cache, *_ in kernel.device_caches.values()]
    return sum(map(len, caches))


@pytest.mark.parametrize("case", (*FIRST_CASES, CHUNKED), ids=lambda case: case.id)
def test_new_sizes_compile_nothing(case):
    """Batch and lengths are no part of a kernel's key, whatever divides them.

    But for the classes of the tables: the next power of two of few slots, whether dK and dV are
    summed in parts, the tile for so many tokens per slot.
    """
    counts = []
    with launches.compiled("sm_90"):
        for batch, tokens, slots, tokens_per_slot in (
            (2, 35, 51, 6),
            (2, 36, 52, 5),
            (3, 48, 64, 8),
            (1, 37, 64, 7),
            (5, 16, 40, 5),
        ):
            sized = case._replace(batch=batch, tokens=tokens, slots=slots, width=32)
            if case is CHUNKED:
                options = dict(case.options) | {"tokens_per_slot": tokens_per_slot}
                sized = sized._replace(options=tuple(options.items()))
            testing.run_case(sized, testing.make_inputs(sized, torch.bfloat16), "triton")
            counts.append(_num_compiled(case.op))
    assert counts[0] > 0
    assert set(counts) == {counts[0]}


def test_a_slot_of_very_many_tokens_is_no_long_chain():
    """The rounding of equal terms goes one way: it would add up from tile to tile."""
    options = (("tokens_per_slot", 8192), ("output_gate", True), ("gates", "slots"))
    case = testing.Case("memory_update", 2, 8192, 0, 0, 16, options)
    with launches.interpreted("sm_90"):
        assert all(c.passed for c in testing.check_case(case, torch.float32, "triton"))


def test_refuses_what_it_cannot_run():
    tensor = torch.randn(1, 2, 8)
    with pytest.raises(RuntimeError, match=r"memory_update: backend 'triton' .* cpu"):
        lm2.memory_update(tensor, tensor, tensor, tensor, tensor, backend="triton")
    with launches.compiled("sm_90"), pytest.raises(RuntimeError, match="float64"):
        double = tensor.double()
        lm2.memory_update(double, double, double, double, double, backend="triton")


def test_composite_is_recorded():
    query = torch.randn(1, 3, 1, 264)
    with lm2.recording() as ran, launches.checked("sm_90") as gpu:
        lm2.memory_attention(query, query, query, backend="triton")
    assert ran == [
        ("memory_attention_forward", "triton"),
        ("memory_attention_forward", "triton/composite"),
    ]
    assert not gpu.launches


def test_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(launch_module, "driver_reason", lambda: None)
    monkeypatch.setattr(launch_module, "target", lambda index: "sm_75")
    monkeypatch.setitem(launch_module.DEVICES, "cpu", "CPUs")
    tensor = torch.randn(1, 2, 8)
    with pytest.raises(RuntimeError, match=r"memory_update: .* the GPU is sm_75, it needs sm_80"):
        lm2.memory_update(tensor, tensor, tensor, tensor, tensor, backend="triton")
    # auto goes on to the next backend
    with lm2.recording() as ran:
        lm2.memory_update(tensor, tensor, tensor, tensor, tensor)
    assert [name for _, name in ran] in (["cpp"], ["eager"])


def test_interpreter_that_fails_beside_numpy_says_so(monkeypatch):
    monkeypatch.setattr(launch_module, "interpreted", lambda: True)
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(numpy, "__version__", "2.4.6")
    monkeypatch.setitem(launch_module.DEVICES, "cpu", "CPUs")
    for tensors in ((), (torch.zeros(1, 1, 8),)):
        reason = backends.unsupported_reason("triton", "memory_update", *tensors)
        assert "triton 3.6.0 fails beside numpy 2.4.6" in reason
    monkeypatch.setattr(numpy, "__version__", "2.3.5")
    assert launch_module.interpreter_reason() is None


def test_interpreter_refuses_autocast_to_bfloat16(monkeypatch):
    """Triton's own interpreter computes with the bits of bfloat16 as if they were integers."""
    monkeypatch.setattr(launch_module, "interpreted", lambda: True)
    monkeypatch.setattr(launch_module, "target", lambda index: "sm_80")
    monkeypatch.setitem(launch_module.DEVICES, "cpu", "CPUs")
    x = torch.randn(1, 2, 1, 8)
    rows = x[:, :, 0]
    for call in (
        lambda: lm2.memory_attention(x, x, x, backend="triton"),
        lambda: lm2.memory_update(rows, rows, rows, rows, rows, backend="triton"),
        lambda: lm2.PaperMemory(8, 1, backend="triton")(rows, rows),
        lambda: lm2.ReleaseMemory(8, 1, backend="triton")(rows, rows),
    ):
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(RuntimeError, match="interpreter computes bfloat16 wrongly"),
        ):
            call()


def test_kernel_that_does_not_fit_is_explained(monkeypatch):
    too_large = tables.AttentionConfig(128, 128, 8, 4)
    monkeypatch.setattr(tables, "attention_forward", lambda *_: too_large)
    query = torch.randn(1, 8, 1, 256, dtype=torch.bfloat16)
    message = r"memory_attention_forward: .* sm_90 .*\(1, 8, 1, 256\) torch.bfloat16.*shared memory"
    with launches.compiled("sm_90"), pytest.raises(RuntimeError, match=message):
        lm2.memory_attention(query, query, query, backend="triton")


def test_auto_leaves_cpu_tensors_to_the_others():
    tensor = torch.randn(1, 2, 8)
    with lm2.recording() as ran, launches.checked("sm_90") as gpu:
        lm2.memory_update(tensor, tensor, tensor, tensor, tensor)
    assert [name for _, name in ran] in (["cpp"], ["eager"])
    assert not gpu.launches


@pytest.mark.parametrize("name", ("PaperMemory", "ReleaseMemory"))
def test_layers_compile_and_train(name):
    """Both layers traced in one graph, at most two frames over three batch sizes; results and
    gradients by the rule."""
    layers = {
        backend: getattr(lm2, name)(24, 3, backend=backend) for backend in ("eager", "triton")
    }
    layers["triton"].load_state_dict(layers["eager"].state_dict())
    layers["exact"] = copy.deepcopy(layers["eager"]).double()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layers["triton"], fullgraph=True, backend=counter)

    def run(batch, seed):
        torch.manual_seed(seed)
        inputs = torch.randn(batch, 3, 24), torch.randn(batch, 5, 24)
        found = []
        for layer in (compiled, layers["exact"], layers["eager"]):
            wide = [tensor.double() if layer is layers["exact"] else tensor for tensor in inputs]
            x = wide[0].clone().requires_grad_()
            output, new_memory = layer(x, wide[1], slot_offset=1)
            (dx,) = torch.autograd.grad(output.sum() + new_memory.square().sum(), x)
            found.append({"output": output, "new memory": new_memory, "dx": dx})
        return [testing.compare(name, *(each[name] for each in found)) for name in found[0]]

    with lm2.recording() as ran, launches.checked("sm_90"):
        # the second size has the graph made for any
        for batch in (2, 3, 5):
            assert_rule(functools.partial(run, batch))
    assert counter.frame_count <= 2
    assert {backend for _, backend in ran} == {"eager", "triton"}
