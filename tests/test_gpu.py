"""The hardware suite: what only a GPU can show. Run with ``pytest -m gpu``.

The numerics of every case, at every dtype; sizes past 2^31 elements; bitwise repeats; CUDA graphs,
streams, inductor, and training against the eager backend.
"""

import concurrent.futures

import pytest
import torch

import lm2_kernels as lm2
from lm2_kernels import functional, testing

pytestmark = pytest.mark.gpu

DTYPES = ("float32", "bfloat16", "float16")
GPU_CASES = (
    testing.Case("memory_attention", 2, 2048, 2048, 8, 256),
    testing.Case("memory_attention", 1, 2048, 2048, 16, 128),
    testing.Case("memory_attention", 4, 512, 512, 8, 64),
    testing.Case("memory_attention", 60, 77, 130, 4, 96, (("slot_mask", "random"),)),
    testing.Case("memory_attention", 2, 515, 1027, 4, 192, (("dropout_p", 0.9),)),
    testing.Case("memory_attention", 2, 1, 2048, 8, 256, (("slot_offset", 2047),)),
    testing.Case("memory_update", 8, 2048, 0, 0, 2048),
    testing.Case("memory_update", 8, 2048, 0, 0, 2048, (("output_gate", True),)),
    testing.Case("memory_update", 70_000, 1, 0, 0, 64),
    testing.Case("residual_layer_norm", 8, 2048, 0, 0, 2048),
    testing.Case("residual_layer_norm", 2, 33, 0, 0, 16_384),
    testing.Case("residual_layer_norm", 70_000, 1, 0, 0, 24),
    testing.Case("pooled_gate", 8, 2048, 0, 0, 2048),
    testing.Case("pooled_gate", 8, 2048, 0, 0, 2048, (("prefix", True),)),
)


@pytest.fixture(autouse=True)
def _exact_float32():
    """The oracle's float32 runs must not use TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def _assert_rule(case, dtype, *, seed=0, layout=None):
    inputs = testing.make_inputs(case, testing.DTYPES[dtype], "cuda", seed=seed, layout=layout)
    with lm2.recording() as ran:
        results = testing.run_case(case, inputs, "triton", seed=seed)
    assert {name for _, name in ran} <= {"triton", "triton/composite"}
    failed = [c for c in testing.compare_case(case, inputs, results, seed=seed) if not c.passed]
    assert not failed, failed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", testing.CASES + GPU_CASES, ids=lambda case: case.id)
def test_op_matches_oracle_on_gpu(case, dtype, record_property):
    record_property("backend", "triton (GPU)")
    _assert_rule(case, dtype)


@pytest.mark.parametrize("seed", range(1, 20))
@pytest.mark.parametrize("case", testing.SMALL_CASES, ids=lambda case: case.id)
def test_op_more_seeds(case, seed, record_property):
    record_property("backend", "triton (GPU)")
    _assert_rule(case, "bfloat16", seed=seed)


@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.id)
def test_op_bitwise_repeats(case):
    inputs = testing.make_inputs(case, torch.bfloat16, "cuda")
    first = testing.run_case(case, inputs, "triton")
    for _ in range(50):
        again = testing.run_case(case, inputs, "triton")
        for name, tensor in first.items():
            assert torch.equal(again[name], tensor), name


def test_memory_update_past_2_31_elements():
    rows, width = 2**20 + 3, 2048
    hidden = torch.randn(1, 1, width, device="cuda", dtype=torch.bfloat16).expand(1, rows, width)
    candidate = torch.randn(1, rows, width, device="cuda", dtype=torch.bfloat16)
    gate = torch.randn(1, 1, width, device="cuda", dtype=torch.bfloat16)
    out, new = lm2.memory_update(hidden, candidate, candidate, gate, gate, backend="triton")
    tail = candidate[:, -5:]
    want, want_new = lm2.memory_update(hidden[:, -5:], tail, tail, gate, gate, backend="triton")
    assert torch.equal(out[:, -5:], want)
    assert torch.equal(new[:, -5:], want_new)


def test_memory_attention_past_2_31_elements():
    tokens, slots = 2**21 + 7, 64
    query = torch.randn(1, tokens, 8, 128, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, 1, slots, 8, 128, device="cuda", dtype=torch.bfloat16)
    out = lm2.memory_attention(query, key, value, causal=False, backend="triton")
    tail = lm2.memory_attention(query[:, -9:], key, value, causal=False, backend="triton")
    torch.testing.assert_close(out[:, -9:], tail)


def _layers(**options):
    torch.manual_seed(0)
    yield lm2.PaperMemory(512, 4, device="cuda", **options)
    yield lm2.ReleaseMemory(512, 4, pooled_gate="prefix", num_blocks=2, device="cuda", **options)


def test_layers_in_cuda_graph():
    for layer in _layers(dtype=torch.bfloat16, backend="triton"):
        x = torch.randn(2, 64, 512, device="cuda", dtype=torch.bfloat16)
        memory = lm2.initial_memory(2, 128, 512, device="cuda", dtype=torch.bfloat16)
        x.requires_grad_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                torch.autograd.grad(layer(x, memory)[0].sum(), x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output, new_memory = layer(x, memory)
            (grad,) = torch.autograd.grad(output.sum() + new_memory.sum(), x)
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        want, want_memory = layer(x, memory)
        (want_grad,) = torch.autograd.grad(want.sum() + want_memory.sum(), x)
        assert torch.equal(output, want)
        assert torch.equal(new_memory, want_memory)
        assert torch.equal(grad, want_grad)


def test_dropout_differs_between_graph_replays():
    query, key, value = torch.randn(3, 2, 64, 4, 64, device="cuda").unbind(0)

    def read():
        return lm2.memory_attention(query, key, value, dropout_p=0.5, backend="triton")

    read()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = read()
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)


def test_layers_on_a_side_stream():
    for layer in _layers(backend="triton"):
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


def test_layers_without_synchronisation():
    for layer in _layers(dropout=0.1, backend="triton"):
        x = torch.randn(2, 64, 512, device="cuda", requires_grad=True)
        memory = lm2.initial_memory(2, 64, 512, device="cuda")
        layer(x, memory)
        torch.cuda.set_sync_debug_mode("error")
        try:
            output, new_memory = layer(x, memory)
            (output.sum() + new_memory.sum()).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_layers_compiled_by_inductor():
    for layer in _layers(backend="triton"):
        compiled = torch.compile(layer, fullgraph=True)
        x = torch.randn(2, 64, 512, device="cuda", requires_grad=True)
        memory = lm2.initial_memory(2, 96, 512, device="cuda")
        output, _ = compiled(x, memory)
        want, _ = layer(x, memory)
        torch.testing.assert_close(output, want)
        torch.testing.assert_close(
            torch.autograd.grad(output.sum(), x), torch.autograd.grad(want.sum(), x)
        )


@pytest.mark.parametrize("autocast_dtype", (torch.bfloat16, torch.float16))
def test_layers_under_autocast(autocast_dtype):
    for layer in _layers(backend="triton"):
        x = torch.randn(2, 64, 512, device="cuda", requires_grad=True)
        memory = lm2.initial_memory(2, 64, 512, device="cuda")
        with torch.autocast("cuda", autocast_dtype):
            output, new_memory = layer(x, memory)
        assert output.dtype == new_memory.dtype == torch.float32
        (output.sum() + new_memory.sum()).backward()
        assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_follows_eager(dtype):
    losses = {}
    for backend in ("eager", "triton"):
        for layer in _layers(dtype=testing.DTYPES[dtype], backend=backend):
            optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
            generator = torch.Generator("cuda").manual_seed(0)
            for _ in range(100):
                x = torch.randn(2, 32, 512, device="cuda", generator=generator).to(
                    testing.DTYPES[dtype]
                )
                memory = lm2.initial_memory(2, 32, 512, device="cuda", dtype=x.dtype)
                output, new_memory = layer(x, memory)
                loss = (output - x.roll(1, 1)).square().mean() + new_memory.square().mean()
                optimizer.zero_grad()
                loss.float().backward()
                optimizer.step()
            losses.setdefault(backend, []).append(loss.detach().double())
    for eager, triton in zip(losses["eager"], losses["triton"], strict=True):
        # both paths round at every one of 100 steps: a few ulps of the dtype apart at the end
        eps = torch.finfo(testing.DTYPES[dtype]).eps
        assert abs(eager - triton) <= 100 * eps * abs(eager)


def test_ops_in_threads():
    case = testing.SMALL_CASES[1]
    inputs = testing.make_inputs(case, torch.float32, "cuda")
    want = testing.run_case(case, inputs, "triton")
    function = functional.memory_attention

    def work(_):
        return function(**inputs.tensors, **inputs.constants, backend="triton")

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for out in pool.map(work, range(40)):
            assert torch.equal(out, want["output 0"])
