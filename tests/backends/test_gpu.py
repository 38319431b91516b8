"""The hardware suite: what only a GPU can show. Run with ``pytest -m gpu``.

For the Triton and the CUDA C++ kernels: the numerics of every case, at every dtype; sizes past 2^31
elements; bitwise repeats; CUDA graphs, streams, inductor, and training beside the oracle.
compute-sanitizer looks over the CUDA C++ kernels where the toolkit has it.
"""

import concurrent.futures
import copy
import functools
import math
import shutil
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointError, checkpoint

import lm2_kernels as lm2
from lm2_kernels import backends, functional, reference, testing
from tools import curves, norms
from tools.rounding import assert_rule

pytestmark = pytest.mark.gpu

BACKENDS = ("triton", "cpp")

DTYPES = ("float32", "bfloat16", "float16")
GPU_CASES = (
    testing.Case("memory_attention", 2, 2048, 2048, 8, 256),
    testing.Case("memory_attention", 1, 2048, 2048, 16, 128),
    testing.Case("memory_attention", 4, 512, 512, 8, 64),
    testing.Case("memory_attention", 60, 77, 130, 4, 96, (("slot_mask", "random"),)),
    testing.Case("memory_attention", 2, 515, 1027, 4, 192, (("dropout_p", 0.9),)),
    testing.Case("memory_attention", 2, 1, 2048, 8, 256, (("slot_offset", 2047),)),
    testing.Case("memory_attention", 2, 2048, 64, 16, 128, (("causal", False),)),
    testing.Case("memory_attention", 1, 4096, 5, 2, 64, (("causal", False),)),
    testing.Case("memory_update", 8, 2048, 0, 0, 2048),
    testing.Case("memory_update", 8, 2048, 0, 0, 2048, (("output_gate", True),)),
    testing.Case("memory_update", 70_000, 1, 0, 0, 64),
    testing.Case(
        *("memory_update", 8, 2048, 0, 0, 2048),
        (("tokens_per_slot", 32), ("output_gate", True), ("read", True)),
    ),
    testing.Case(
        *("memory_update", 3, 515, 0, 0, 1027),
        (("tokens_per_slot", 9), ("gate_bias", "prefix"), ("gates", "slots")),
    ),
    testing.Case("residual_layer_norm", 8, 2048, 0, 0, 2048),
    testing.Case("residual_layer_norm", 2, 33, 0, 0, 16_384),
    testing.Case("residual_layer_norm", 70_000, 1, 0, 0, 24),
    testing.Case("pooled_gate", 8, 2048, 0, 0, 2048),
    testing.Case("pooled_gate", 8, 2048, 0, 0, 2048, (("prefix", True),)),
)


@pytest.fixture(params=BACKENDS)
def backend(request, record_property):
    device = torch.device("cuda", torch.cuda.current_device())
    reason = backends.unsupported_reason(
        request.param, "memory_update", torch.empty(1, 1, 1, device=device)
    )
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    record_property("backend", f"{request.param} (GPU)")
    return request.param


@pytest.fixture(autouse=True)
def _exact_float32():
    """The oracle's float32 runs must not use TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def _assert_rule(backend, case, dtype, *, seed=0, layout=None):
    with lm2.recording() as ran:
        comparisons = testing.check_case(
            case, testing.DTYPES[dtype], backend, "cuda", seed=seed, layout=layout
        )
    assert {name.partition("/")[0] for _, name in ran} == {backend}
    assert all(comparison.passed for comparison in comparisons), comparisons


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case", testing.CASES + testing.SHAPE_CASES + GPU_CASES, ids=lambda case: case.id
)
def test_op_matches_oracle_on_gpu(backend, case, dtype):
    _assert_rule(backend, case, dtype)


def test_memory_update_past_2_31_elements(backend):
    rows, width = 2**20 + 3, 2048
    hidden = torch.randn(1, 1, width, device="cuda", dtype=torch.bfloat16).expand(1, rows, width)
    candidate = torch.randn(1, rows, width, device="cuda", dtype=torch.bfloat16)
    gate = torch.randn(1, 1, width, device="cuda", dtype=torch.bfloat16)
    out, new = lm2.memory_update(hidden, candidate, candidate, gate, gate, backend=backend)
    tail = candidate[:, -5:]
    want, want_new = lm2.memory_update(hidden[:, -5:], tail, tail, gate, gate, backend=backend)
    assert torch.equal(out[:, -5:], want)
    assert torch.equal(new[:, -5:], want_new)


def test_memory_attention_past_2_31_elements(backend):
    tokens, slots = 2**21 + 7, 64
    query = torch.randn(1, tokens, 8, 128, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, 1, slots, 8, 128, device="cuda", dtype=torch.bfloat16)
    out = lm2.memory_attention(query, key, value, causal=False, backend=backend)
    # fewer rows take other tiles, and round elsewhere
    tail = query[:, -9:], key, value
    plain = reference.memory_attention(*tail, causal=False)
    exact = reference.memory_attention(*(t.double() for t in tail), causal=False)
    comparison = testing.compare("output", out[:, -9:], exact, plain)
    # one draw: more would take too long
    assert comparison.share < testing.NARROW, comparison


def _layers(seed=0, **options):
    torch.manual_seed(seed)
    yield lm2.PaperMemory(512, 4, device="cuda", **options)
    yield lm2.ReleaseMemory(512, 4, pooled_gate="prefix", num_blocks=2, device="cuda", **options)
    # as one Function
    yield lm2.ReleaseMemory(512, 4, device="cuda", **options)


def test_layers_in_cuda_graph(backend):
    for layer in _layers(dtype=torch.bfloat16, backend=backend):
        x = torch.randn(2, 64, 512, device="cuda", dtype=torch.bfloat16)
        memory = lm2.initial_memory(2, 128, 512, device="cuda", dtype=torch.bfloat16)
        x.requires_grad_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        captured = functools.partial(_step, layer, x, memory)
        with torch.cuda.stream(stream):
            # all of what is captured: a kernel's first call loads it, which a capture forbids
            for _ in range(3):
                captured()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = captured()
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        for name, got, want in zip(("output", "memory", "dx"), results, captured(), strict=True):
            assert torch.equal(got, want), name


def _step(layer, x, memory):
    output, new_memory = layer(x, memory)
    (grad,) = torch.autograd.grad(output.sum() + new_memory.sum(), x)
    return output, new_memory, grad


def test_dropout_differs_between_graph_replays(backend):
    query, key, value = torch.randn(3, 2, 64, 4, 64, device="cuda").unbind(0)

    def read():
        return lm2.memory_attention(query, key, value, dropout_p=0.5, backend=backend)

    read()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = read()
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)


def test_layers_on_a_side_stream(backend):
    for layer in _layers(backend=backend):
        x = torch.randn(2, 64, 512, device="cuda")
        memory = lm2.initial_memory(2, 64, 512, device="cuda")
        want, _ = layer(x, memory)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # the launches must follow this stream's own work
            delayed = x + torch.zeros_like(x)
            got, _ = layer(delayed, memory)
        stream.synchronize()
        assert torch.equal(got, want)


def test_layers_without_synchronisation(backend):
    for layer in _layers(dropout=0.1, backend=backend):
        x = torch.randn(2, 64, 512, device="cuda", requires_grad=True)
        memory = lm2.initial_memory(2, 64, 512, device="cuda")
        layer(x, memory)
        torch.cuda.set_sync_debug_mode("error")
        try:
            output, new_memory = layer(x, memory)
            (output.sum() + new_memory.sum()).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_layers_checkpointed(backend):
    """A thread of autograd's computes them again, on the same backend or not at all."""

    def gradients(layer, call):
        x = torch.linspace(-1.0, 1.0, 2 * 64 * 512, device="cuda").view(2, 64, 512)
        outputs = call(x.requires_grad_(), lm2.initial_memory(2, 64, 512, device="cuda"))
        return torch.autograd.grad([each.sum() for each in outputs], [x, *layer.parameters()])

    for layer in (*_layers(backend=backend), *_layers()):
        again = functools.partial(checkpoint, layer, use_reentrant=False)
        with lm2.use_backend(backend):
            wanted = gradients(layer, layer)
            try:
                found = gradients(layer, again)
            except CheckpointError:
                # such a thread does not know what is in force for its caller
                assert layer.backend is None and backend != backends.NAMES[0]
                assert torch.__version__.startswith("2.11.")
            else:
                assert all(map(torch.equal, found, wanted))


def test_layers_of_fake_tensors(backend):
    """No kernel reads what has no memory."""
    with FakeTensorMode(), lm2.recording() as ran:
        for layer in _layers(backend=backend):
            x = torch.randn(2, 64, 512, device="cuda")
            outputs = layer(x, lm2.initial_memory(2, 64, 512, device="cuda"))
            assert all((each.shape, each.device) == (x.shape, x.device) for each in outputs)
            torch.autograd.grad([each.sum() for each in outputs], [*layer.parameters()])
    torch.cuda.synchronize()
    # the operators of the compiled backend are PyTorch's to fake
    assert not ran or backend == "cpp"


@pytest.mark.timeout(180, method="thread")
def test_layers_compiled_by_inductor(backend):
    for layer in _layers(backend=backend):
        compiled = torch.compile(layer, fullgraph=True)
        exact, plain = copy.deepcopy(layer).double(), copy.deepcopy(layer)
        exact.backend = plain.backend = "eager"
        dtypes = (torch.float32, torch.float64, torch.float32)

        def run(seed, layers=(compiled, exact, plain), dtypes=dtypes):
            torch.manual_seed(seed)
            inputs = torch.randn(2, 64, 512, device="cuda")
            memory = lm2.initial_memory(2, 96, 512, device="cuda")
            found = []
            for each, dtype in zip(layers, dtypes, strict=True):
                x = inputs.to(dtype, copy=True).requires_grad_()
                output, _ = each(x, memory.to(dtype))
                (dx,) = torch.autograd.grad(output.sum(), x)
                found.append({"output": output, "dx": dx})
            return [testing.compare(name, *(each[name] for each in found)) for name in found[0]]

        assert_rule(run)


@pytest.mark.parametrize(
    ("dtype", "residual_dtype"),
    (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ),
)
@pytest.mark.parametrize("width", (2048, 16_384))
@pytest.mark.parametrize("name", norms.NAMES)
def test_optional_norms(backend, name, width, dtype, residual_dtype):
    if not hasattr(backends.get(backend), f"{name}_forward"):
        pytest.skip(f"{backend} has no {name}")

    def run(seed: int) -> list[testing.Comparison]:
        shape = (4, 600, width)
        return norms.comparisons(backend, name, shape, dtype, residual_dtype, seed, "cuda")

    assert_rule(run)
    norms.assert_bits_of_the_op(backend, name, (4, 600, width), dtype, residual_dtype, "cuda")


@pytest.mark.parametrize("autocast_dtype", (torch.bfloat16, torch.float16))
def test_layers_under_autocast(backend, autocast_dtype):
    for layer in _layers(backend=backend):
        x = torch.randn(2, 64, 512, device="cuda", requires_grad=True)
        memory = lm2.initial_memory(2, 64, 512, device="cuda")
        with torch.autocast("cuda", autocast_dtype):
            output, new_memory = layer(x, memory)
        assert output.dtype == new_memory.dtype == torch.float32
        (output.sum() + new_memory.sum()).backward()
        assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_follows_the_oracle(backend, dtype):
    dtype = testing.DTYPES[dtype]

    def run(seed, index):
        models = [
            list(_layers(seed, dtype=dtype, backend=name))[index]
            for name in ("eager", "eager", backend)
        ]
        models[0].double()

        def loss(layer, step):
            generator = torch.Generator("cuda").manual_seed(1000 * seed + step)
            x = torch.randn(2, 32, 512, device="cuda", generator=generator).to(dtype)
            x = x.to(next(layer.parameters()).dtype)
            memory = lm2.initial_memory(2, 32, 512, device="cuda", dtype=x.dtype)
            output, new_memory = layer(x, memory)
            loss = (output - x.roll(1, 1)).square().mean() + new_memory.square().mean()
            return loss if loss.dtype == torch.float64 else loss.float()

        oracle, eager, fused = curves.losses(models, loss, lr=0.05)
        return [testing.compare("losses", fused, oracle, eager)]

    for index in range(3):
        # a ReLU may be off in one that is on in the other
        assert_rule(functools.partial(run, index=index), narrow=math.inf)


def test_ops_in_threads(backend):
    case = testing.SMALL_CASES[1]
    inputs = testing.make_inputs(case, torch.float32, "cuda")
    want = testing.run_case(case, inputs, backend)
    function = functional.memory_attention

    def work(_):
        return function(**inputs.tensors, **inputs.constants, backend=backend)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for out in pool.map(work, range(40)):
            assert torch.equal(out, want["output 0"])


# the many of the same kind last: a run may be stopped


@pytest.mark.parametrize("seed", range(1, 20))
@pytest.mark.parametrize("case", testing.SMALL_CASES, ids=lambda case: case.id)
def test_op_more_seeds(backend, case, seed):
    _assert_rule(backend, case, "bfloat16", seed=seed)


@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.id)
def test_op_bitwise_repeats(backend, case):
    inputs = testing.make_inputs(case, torch.bfloat16, "cuda")
    first = testing.run_case(case, inputs, backend)
    for _ in range(50):
        again = testing.run_case(case, inputs, backend)
        for name, tensor in first.items():
            assert torch.equal(again[name], tensor), name


_SANITIZED = """
import torch
from lm2_kernels import testing

for case in testing.SMALL_CASES:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        testing.run_case(case, testing.make_inputs(case, dtype, "cuda"), "cpp")
torch.cuda.synchronize()
"""


# our kernels alone, by what their mangled names have of the namespace lm2::cuda: torch's are not
# ours to judge, and checking them takes most of the time
_OURS = "kns=3lm24cuda"
_SANITIZER_SECONDS = 150


@pytest.mark.timeout(2 * _SANITIZER_SECONDS, method="thread")
@pytest.mark.parametrize("tool", ("memcheck", "racecheck", "synccheck"))
def test_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer on PATH: it is part of the CUDA toolkit")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-name", _OURS]
    # whatever libraries try and find missing is no error of a kernel's
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []
    command += [sys.executable, "-c", _SANITIZED]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_SANITIZER_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"")[-4000:].decode(errors="replace")
        pytest.fail(f"{tool} took more than {_SANITIZER_SECONDS} s; so far:\n{output}")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
