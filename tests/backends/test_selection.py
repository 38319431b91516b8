"""Which backend runs: who decides, what the refusals say, and what importing the package needs."""

import asyncio
import collections
import concurrent.futures
import contextlib
import contextvars
import functools
import itertools
import os
import threading
import types
import warnings

import pytest
import torch
from torch.utils.checkpoint import CheckpointError, checkpoint

import lm2_kernels as lm2
from lm2_kernels import backends, functional, testing
from lm2_kernels.backends import eager, extension
from lm2_kernels.backends.contract import RESULTS
from tools.interpreter import run_python
from tools.native import cpu_default

# what "auto" takes for CPU tensors here
DEFAULT = cpu_default()


@pytest.fixture(autouse=True)
def _default_backend_afterwards():
    before = backends.requested_backend()
    lm2.use_backend("auto")
    yield
    lm2.use_backend(before)


@pytest.fixture
def second_backend(monkeypatch):
    """A stand-in for cpp that computes what eager does, so that there are two to choose from."""
    names = (*RESULTS, "unsupported_reason", "DEVICES")
    module = types.SimpleNamespace(**{name: getattr(eager, name) for name in names})
    monkeypatch.setitem(backends._modules, "cpp", module)
    monkeypatch.delitem(backends._import_errors, "cpp", raising=False)
    return module


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(extension, "_cpu_reason", "its C++ kernels were not built: no compiler")


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


OPS = {
    "memory_attention": lambda **options: functional.memory_attention(
        rows(2, 3, 2, 4), rows(2, 5, 2, 4), rows(2, 5, 2, 4), **options
    ),
    "memory_update": lambda **options: functional.memory_update(
        *(rows(2, 3, 4) for _ in range(5)), **options
    )[1],
    "residual_layer_norm": lambda **options: functional.residual_layer_norm(
        rows(2, 3, 4), rows(2, 3, 4), rows(4), rows(4), **options
    ),
    "pooled_gate": lambda **options: functional.pooled_gate(rows(2, 3, 4), rows(4), **options)[0],
}
every_op = pytest.mark.parametrize("op", OPS)


def backends_used(op: str, **options) -> list[str]:
    """The backend of every call that the op's forward and backward make."""
    with lm2.recording() as recorded:
        OPS[op](**options).sum().backward()
    assert [function for function, _ in recorded] == [f"{op}_forward", f"{op}_backward"]
    return [backend for _, backend in recorded]


@every_op
def test_auto_takes_the_first_that_can(op, second_backend):
    assert backends_used(op) == ["cpp", "cpp"]


@every_op
def test_auto_falls_through_a_refusal(op, second_backend):
    second_backend.unsupported_reason = lambda op, *tensors: "it is a Tuesday"
    assert backends_used(op) == ["eager", "eager"]


def test_auto_takes_a_cpu_backend_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends_used("memory_update", backend="auto") == [DEFAULT] * 2


def test_auto_takes_eager_without_the_extension(no_extension):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends_used("memory_update", backend="auto") == ["eager", "eager"]


def test_auto_warns_once_where_an_accelerator_is_not_used(monkeypatch):
    monkeypatch.setattr(backends, "_warned", set())
    tensors = (torch.empty(2, 3, 2, 4, device="meta"),)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert backends.select("memory_attention", tensors) == "eager"
        assert backends.select("memory_attention", tensors) == "eager"
    texts = [str(warning.message) for warning in caught]
    for name in ("triton", "cpp"):
        start = f"memory_attention: backend '{name}' is not used on meta"
        assert sum(text.startswith(start) for text in texts) == 1


def _layer(kind):
    def call(dtype, backend):
        layer = kind(4, 2, backend=backend, dtype=dtype)
        return layer(*torch.randn(2, 2, 3, 4, dtype=dtype))

    return call


IN_DTYPE = {
    "memory_attention": lambda dtype, backend: functional.memory_attention(
        *torch.randn(3, 2, 3, 2, 4, dtype=dtype), backend=backend
    ),
    "memory_update": lambda dtype, backend: functional.memory_update(
        *torch.randn(5, 2, 3, 4, dtype=dtype), backend=backend
    ),
    "PaperMemory": _layer(lm2.PaperMemory),
    "ReleaseMemory": _layer(lm2.ReleaseMemory),
}


def _without(dtype):
    def unsupported_reason(op, *tensors):
        return f"it has no {dtype}" if any(t.dtype == dtype for t in tensors) else None

    return unsupported_reason


@pytest.mark.parametrize("name", IN_DTYPE)
def test_autocast_comes_before_the_choice(name, second_backend):
    """A backend is judged by what it will be given, which float64 tensors are as they are."""
    second_backend.unsupported_reason = _without(torch.bfloat16)
    call = IN_DTYPE[name]
    with torch.autocast("cpu", torch.bfloat16):
        with lm2.recording() as ran, pytest.raises(RuntimeError, match=r"^memory_.*no torch.bfloa"):
            call(torch.float32, "cpp")
        assert not ran
        with lm2.recording() as ran:
            call(torch.float32, "auto")
        assert {b for f, b in ran if "attention" in f or "update" in f} == {"eager"}
        with lm2.recording() as ran:
            call(torch.float64, "cpp")
        assert {backend for _, backend in ran} == {"cpp"}


def test_autocast_may_cast_to_what_a_backend_has(second_backend):
    second_backend.unsupported_reason = _without(torch.float16)
    with torch.autocast("cpu", torch.bfloat16), lm2.recording() as ran:
        assert IN_DTYPE["memory_attention"](torch.float16, "cpp").dtype == torch.bfloat16
    assert ran == [("memory_attention_forward", "cpp")]


@every_op
def test_argument_beats_use_backend(op, second_backend):
    with lm2.use_backend("cpp"):
        assert backends_used(op, backend="eager") == ["eager", "eager"]
        assert backends_used(op) == ["cpp", "cpp"]


@every_op
def test_use_backend_beats_auto(op, second_backend):
    with lm2.use_backend("eager"):
        assert backends_used(op) == ["eager", "eager"]


def test_argument_auto_beats_use_backend(second_backend):
    with lm2.use_backend("eager"):
        assert backends_used("memory_update", backend="auto") == ["cpp", "cpp"]


def test_use_backend_is_a_setter(second_backend):
    lm2.use_backend("eager")
    assert backends_used("memory_update") == ["eager", "eager"]
    lm2.use_backend("cpp")
    assert backends_used("memory_update") == ["cpp", "cpp"]


def test_use_backend_nests_and_restores(second_backend):
    with lm2.use_backend("eager"):
        with lm2.use_backend("cpp"):
            assert backends.requested_backend() == "cpp"
        assert backends.requested_backend() == "eager"
    assert backends.requested_backend() == "auto"


def test_use_backend_restores_after_an_exception():
    with pytest.raises(KeyError), lm2.use_backend("eager"), lm2.use_backend("auto"):
        raise KeyError
    assert backends.requested_backend() == "auto"


def test_use_backend_refuses_an_unknown_name_and_changes_nothing():
    with pytest.raises(ValueError, match="one of 'triton', 'cpp', 'eager', 'auto', got 'cudnn'"):
        lm2.use_backend("cudnn")
    assert backends.requested_backend() == "auto"


@pytest.mark.parametrize("entered", [False, True])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_use_backend_ends_in_any_order(order, entered):
    """As threads, tasks and generators end theirs: what is still open counts, and nothing stays."""
    names = ["eager", "cpp", "eager"]
    settings = [lm2.use_backend(name) for name in names]
    if entered:
        for setting in settings:
            setting.__enter__()
    for count, index in enumerate(order):
        settings[index].__exit__(None, None, None)
        left = [names[i] for i in range(3) if i not in order[: count + 1]]
        assert backends.requested_backend() == (left[-1] if left else "auto")


def test_a_setter_in_a_block_ends_with_it():
    with lm2.use_backend("eager"):
        for name in ("cpp", "auto", "cpp"):
            lm2.use_backend(name)
            assert backends.requested_backend() == name
    assert backends.requested_backend() == "auto"
    for _ in range(10):
        lm2.use_backend("eager")
    assert len(backends._settings.get()) < 3


def test_threads_do_not_see_one_anothers_default():
    inside = threading.Barrier(2, timeout=60)
    seen = {}

    def work(name):
        seen["start " + name] = backends.requested_backend()
        with lm2.use_backend(name):
            inside.wait()
            seen[name] = backends.requested_backend()
            inside.wait()
        seen["end " + name] = backends.requested_backend()

    with lm2.use_backend("triton"):
        threads = [threading.Thread(target=work, args=(name,)) for name in ("eager", "cpp")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert backends.requested_backend() == "triton"
    expected = {name: name for name in ("eager", "cpp")}
    expected |= {f"{when} {name}": "auto" for when in ("start", "end") for name in expected}
    assert seen == expected


def test_tasks_do_not_see_one_anothers_default():
    async def work(name):
        with lm2.use_backend(name):
            for _ in range(3):
                await asyncio.sleep(0)
                assert backends.requested_backend() == name

    async def main():
        with lm2.use_backend("triton"):
            await asyncio.gather(work("eager"), work("cpp"))
            assert backends.requested_backend() == "triton"

    asyncio.run(main())
    assert backends.requested_backend() == "auto"


def test_generators_leave_nothing_behind():
    def work(name):
        with lm2.use_backend(name):
            yield backends.requested_backend()

    first, second = work("eager"), work("cpp")
    assert (next(first), next(second)) == ("eager", "cpp")
    first.close()
    assert backends.requested_backend() == "cpp"
    second.close()
    assert backends.requested_backend() == "auto"


def test_backward_in_another_thread_runs_where_forward_ran(second_backend):
    with lm2.use_backend("cpp"):
        loss = OPS["memory_update"]().sum()
    with lm2.recording() as recorded:
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert recorded == [("memory_update_backward", "cpp")]


def _of_a_layer(kind):
    return kind(8, 2)(torch.randn(2, 3, 8), torch.randn(2, 3, 8))[0]


_CHECKPOINTED = {
    "memory_attention": OPS["memory_attention"],
    "PaperMemory": functools.partial(_of_a_layer, lm2.PaperMemory),
    "ReleaseMemory": functools.partial(_of_a_layer, lm2.ReleaseMemory),
}


@pytest.mark.parametrize("where", ("another thread", "after the block"))
@pytest.mark.parametrize("name", _CHECKPOINTED)
def test_what_another_backend_makes_again_is_refused(name, where, second_backend):
    """As a backward of a GPU recomputes in a thread of autograd's; and not if it is the same."""
    errors = []

    def forward(**options):
        return checkpoint(_CHECKPOINTED[name], use_reentrant=False, **options).sum()

    def backward(loss):
        try:
            loss.backward()
        except Exception as error:
            errors.append(error)

    for options in ({}, {"determinism_check": "none"}):
        with lm2.use_backend("eager"):
            loss = forward(**options)
            if where == "another thread":
                thread = threading.Thread(target=backward, args=(loss,))
                thread.start()
                thread.join()
        if where == "after the block":
            backward(loss)
    by_torch, by_us = errors
    assert isinstance(by_torch, CheckpointError) and "different metadata" in str(by_torch)
    assert "was made again by" in str(by_us) and "use_backend" in str(by_us)
    # the process's default
    lm2.use_backend("eager")
    backward(forward())
    assert len(errors) == 2


_FOLLOWS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)


class _InAnotherContext(torch.autograd.Function):
    """Its backward calls a function as a thread of autograd's does, which has its own context."""

    @staticmethod
    def forward(ctx, x, context, function):
        ctx.call = context, function
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        context, function = ctx.call
        context.run(function)
        return dy, None, None


def _backward_of_a_thread(context, function):
    x = torch.ones(1, requires_grad=True)
    _InAnotherContext.apply(x, context, function).backward()


def test_a_thread_of_autograds_has_the_default_of_its_caller():
    """What it computes again, for checkpointing, also after a block of its own."""
    found, context = [], contextvars.Context()

    def ask():
        found.append(backends.requested_backend())

    def ask_in_a_block():
        with lm2.use_backend("cpp"):
            ask()

    _backward_of_a_thread(context, ask)
    with lm2.use_backend("eager"):
        for function in (ask, ask_in_a_block, ask):
            _backward_of_a_thread(context, function)
        # not in a backward
        context.run(ask)
    followed = "eager" if _FOLLOWS else "auto"
    assert found == ["auto", followed, "cpp", followed, "auto"]


def test_code_that_is_compiled_follows_its_caller_too(second_backend):
    torch._dynamo.reset()

    @torch.compile(backend="eager")
    def pool(x, weight):
        return functional.pooled_gate(x, weight)[0]

    def run():
        with torch.no_grad():
            pool(torch.ones(2, 3, 4), torch.ones(4))

    with lm2.recording() as recorded:
        for name in ("eager", "cpp"):
            with lm2.use_backend(name):
                run()
                _backward_of_a_thread(contextvars.Context(), run)
    names = [name for _, name in recorded]
    # "auto" takes cpp
    assert names == ["eager", "eager" if _FOLLOWS else "cpp", "cpp", "cpp"]


def test_a_call_in_inference_mode_leaves_no_mark_of_its_own(monkeypatch):
    monkeypatch.setattr(backends, "_marks", {})
    layer, x = lm2.PaperMemory(8, 2), torch.randn(2, 3, 8)
    with torch.inference_mode(), torch.enable_grad(), contextlib.suppress(RuntimeError):
        layer(x, x)
    layer(x, x)[0].sum().backward()


def test_concurrent_backwards_that_recompute_leave_nothing_behind(second_backend):
    """The second run of the forward takes the backend of the first, in each thread its own."""
    layer = lm2.PaperMemory(8, 2, recompute=True)
    start = threading.Barrier(4, timeout=60)
    seen = []

    def work(name):
        for _ in range(5):
            with lm2.use_backend(name):
                output, _ = layer(rows(1, 3, 8), rows(1, 3, 8))
            start.wait()
            output.sum().backward()
            seen.append(backends.requested_backend())

    with lm2.recording() as recorded:
        names = ("eager", "cpp", "eager", "cpp")
        threads = [threading.Thread(target=work, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == ["auto"] * 20
    assert backends.requested_backend() == "auto"
    counts = collections.Counter(recorded)
    for function in ("memory_attention_forward", "memory_attention_backward"):
        assert counts[function, "eager"] == counts[function, "cpp"] > 0


def test_backward_runs_where_forward_ran(second_backend):
    with lm2.use_backend("cpp"):
        result = OPS["memory_attention"]()
    with lm2.use_backend("eager"), lm2.recording() as recorded:
        result.sum().backward()
    assert recorded == [("memory_attention_backward", "cpp")]


@pytest.mark.parametrize("layer", [lm2.PaperMemory, lm2.ReleaseMemory])
def test_a_layer_uses_its_own_backend_everywhere(layer, second_backend):
    with lm2.use_backend("eager"), lm2.recording() as recorded:
        output, memory = layer(8, 2, backend="cpp")(rows(2, 3, 8), rows(2, 5, 8))
        (output.sum() + memory.sum()).backward()
    assert {backend for _, backend in recorded} == {"cpp"}
    assert {"memory_attention_forward", "memory_update_backward"} <= {name for name, _ in recorded}


@every_op
def test_a_request_that_cannot_be_met_says_why(op, second_backend):
    second_backend.unsupported_reason = lambda op, *tensors: "it is a Tuesday"
    message = (
        f"^{op}: backend 'cpp' cannot run this call: it is a Tuesday. "
        f"Use backend='auto' or another backend$"
    )
    with lm2.recording() as recorded:
        with pytest.raises(RuntimeError, match=message):
            OPS[op](backend="cpp")
        with pytest.raises(RuntimeError, match=message), lm2.use_backend("cpp"):
            OPS[op]()
    assert recorded == []


def test_a_backend_that_was_not_built_says_so(no_extension):
    message = (
        "^memory_update: backend 'cpp' cannot run this call: its C\\+\\+ kernels were not built"
    )
    with pytest.raises(RuntimeError, match=message):
        OPS["memory_update"](backend="cpp")


def test_recordings_nest_and_end():
    with lm2.recording() as outer:
        OPS["pooled_gate"]()
        with lm2.recording() as inner:
            OPS["memory_update"]()
    OPS["residual_layer_norm"]()
    assert inner == [("memory_update_forward", DEFAULT)]
    assert outer == [("pooled_gate_forward", DEFAULT), ("memory_update_forward", DEFAULT)]


def test_recording_ends_after_an_exception():
    with pytest.raises(KeyError), lm2.recording() as recorded:
        raise KeyError
    OPS["memory_update"]()
    assert recorded == []


def test_recordings_of_threads_end_alone():
    """As one ends while another starts, neither is lost or kept."""

    def work():
        for _ in range(200):
            with lm2.recording() as recorded:
                backends.record("nothing", "nowhere")
            assert ("nothing", "nowhere") in recorded

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work) for _ in range(4)]:
            future.result()
    assert not backends._recordings


def test_recording_sees_compiled_calls():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def update(*tensors):
        return functional.memory_update(*tensors)[1]

    tensors = [rows(2, 3, 4) for _ in range(5)]
    for _ in range(2):
        with lm2.recording() as recorded:
            update(*tensors).sum().backward()
        assert recorded == [
            ("memory_update_forward", DEFAULT),
            ("memory_update_backward", DEFAULT),
        ]


def test_compiled_code_follows_use_backend(second_backend):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def pool(x, weight):
        return functional.pooled_gate(x, weight)[0]

    for name in ("eager", "cpp"):
        with lm2.use_backend(name), lm2.recording() as recorded:
            pool(rows(2, 3, 4), rows(4)).sum().backward()
        assert recorded == [("pooled_gate_forward", name), ("pooled_gate_backward", name)]


def test_compiled_code_follows_use_backend_in_every_thread(second_backend):
    """Compiled once a name: what was compiled for one serves every thread that asks for it."""
    torch._dynamo.reset()
    compiled = []

    def counting(module, _):
        compiled.append(module)
        return module

    pool = torch.compile(functional.pooled_gate, fullgraph=True, backend=counting)
    x, weight = torch.ones(2, 3, 4), torch.ones(4)

    def ran_by():
        with lm2.recording() as recorded:
            pool(x, weight)
        return [name for _, name in recorded]

    for _ in range(2):
        assert ran_by() == ["cpp"]
        with lm2.use_backend("eager"):
            assert ran_by() == ["eager"]
            with lm2.use_backend("auto"):
                assert ran_by() == ["cpp"]
            with concurrent.futures.ThreadPoolExecutor(1) as executor:
                assert executor.submit(ran_by).result() == ["cpp"]
            assert ran_by() == ["eager"]
    assert ran_by() == ["cpp"]
    assert len(compiled) == 3


@pytest.mark.parametrize("breaks", [False, True])
def test_use_backend_inside_of_compiled_code(breaks, second_backend):
    torch._dynamo.reset()

    @torch.compile(fullgraph=not breaks, backend="aot_eager")
    def pool(x, weight):
        with lm2.use_backend("cpp"), lm2.use_backend("eager"):
            inner = functional.pooled_gate(x, weight)[0]
            if breaks:
                torch._dynamo.graph_break()
        return inner + functional.pooled_gate(x, weight)[0]

    for _ in range(2):
        with lm2.recording() as recorded:
            pool(torch.ones(2, 3, 4), torch.ones(4))
        assert [name for _, name in recorded] == ["eager", "cpp"]
        assert backends.requested_backend() == "auto"


def test_use_backend_around_graph_breaks_leaves_nothing_behind(second_backend):
    """Also where torch.compile gave up on compiling one more setting."""
    torch._dynamo.reset()

    @torch.compile(backend="eager")
    def pool(x, weight, names):
        with lm2.use_backend(names[0]), lm2.use_backend(names[1]), lm2.use_backend(names[2]):
            inner = functional.pooled_gate(x, weight)[0]
            torch._dynamo.graph_break()
        return inner + functional.pooled_gate(x, weight)[0]

    for names in itertools.product(("eager", "cpp"), repeat=3):
        with lm2.recording() as recorded:
            pool(torch.ones(2, 3, 4), torch.ones(4), names)
        assert [name for _, name in recorded] == [names[-1], "cpp"]
        assert backends.requested_backend() == "auto"
        assert backends._traced == ()


@every_op
def test_compiled_without_a_gradient(op):
    torch._dynamo.reset()
    case = next(case for case in testing.SMALL_CASES if case.op == op)
    inputs = testing.make_inputs(case, torch.float32)
    function = functools.partial(getattr(functional, op), **inputs.tensors, **inputs.constants)
    got, want = torch.compile(function, fullgraph=True, backend="aot_eager")(), function()
    got, want = ((r,) if isinstance(r, torch.Tensor) else r for r in (got, want))
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


# --- in a fresh process -----------------------------------------------------------------------

USE = (
    f"DEFAULT = {[DEFAULT] * 2}"
    + """
import torch, lm2_kernels as lm2
def use(**options):
    tensors = [torch.ones(1, 2, 3, requires_grad=True) for _ in range(5)]
    with lm2.recording() as recorded:
        lm2.memory_update(*tensors, **options)[0].sum().backward()
    return [backend for _, backend in recorded]
def refused(error, *parts, **options):
    try:
        use(**options)
    except error as refusal:
        assert all(part in str(refusal) for part in parts), refusal
    else:
        raise AssertionError("not refused")
"""
)


def run(code: str, **environment: str | None) -> None:
    """Run code in a new interpreter, where it must not fail."""
    unset = dict.fromkeys(("LM2_KERNELS_BACKEND", "TRITON_INTERPRET"))
    result = run_python(code, "-W", "error::UserWarning:lm2_kernels", **unset | environment)
    assert result.returncode == 0, result.stderr


def test_environment_beats_auto_and_yields_to_the_others():
    run(
        USE
        + """
refused(RuntimeError, "memory_update", "'triton'")
assert use(backend="eager") == ["eager", "eager"]
with lm2.use_backend("eager"):
    assert use() == ["eager", "eager"]
with lm2.use_backend("auto"):
    assert use() == DEFAULT
refused(RuntimeError, "'triton'")
""",
        LM2_KERNELS_BACKEND="triton",
    )


def test_environment_with_an_unknown_name_is_refused_at_first_use():
    run(
        USE
        + """
refused(ValueError, "LM2_KERNELS_BACKEND must be one of", "'eager'", "got 'cudnn'")
assert use(backend="eager") == ["eager", "eager"]
""",
        LM2_KERNELS_BACKEND="cudnn",
    )


def test_only_torch_is_needed():
    """Without triton, safetensors and numpy the package imports, runs, and says what is missing."""
    run(
        """
import sys
for name in ("triton", "safetensors", "numpy", "pytest", "transformers"):
    sys.modules[name] = None
"""
        + USE
        + """
assert use() == DEFAULT
refused(RuntimeError, "memory_update", "'triton'", "import", "backend='auto'", backend="triton")
layer = lm2.PaperMemory(4, 2)
layer(torch.ones(1, 2, 4), lm2.initial_memory(1, 4))
"""
    )


def test_triton_on_a_cpu_tensor_is_refused_with_the_reason():
    pytest.importorskip("triton")
    # and an empty variable is as good as none
    run(
        USE
        + """
refused(RuntimeError, "memory_update", "'triton'", "cpu", backend="triton")
assert use() == DEFAULT
""",
        LM2_KERNELS_BACKEND="",
    )


def test_import_imports_neither_dynamo_nor_triton():
    run(
        """
import sys
import lm2_kernels
assert not {"triton", "torch._dynamo", "safetensors"} & set(sys.modules)
"""
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_cpu_use_starts_no_driver_and_survives_a_fork():
    run(
        USE
        + """
import os, sys
assert not torch.cuda.is_initialized()
assert use() == DEFAULT
assert not torch.cuda.is_initialized()
if "triton" in sys.modules:
    from triton.runtime import driver
    assert driver._active is None
child = os.fork()
if child == 0:
    os._exit(0 if use() == DEFAULT else 1)
assert os.waitpid(child, 0)[1] == 0
assert use() == DEFAULT
"""
    )


def test_import_and_use_in_a_thread():
    run(
        """
import threading
results = []
def work():
    import torch, lm2_kernels as lm2
    x = torch.ones(1, 2, 4, requires_grad=True)
    output, memory = lm2.PaperMemory(4, 2)(x, lm2.initial_memory(1, 4))
    output.sum().backward()
    results.append(x.grad)
thread = threading.Thread(target=work)
thread.start()
thread.join()
assert results[0].shape == (1, 2, 4)
"""
    )


def test_threads_agree():
    """Four threads at once compute what one does."""
    inputs = [torch.randn(2, 9, 2, 4) for _ in range(3)]
    expected = lm2.memory_attention(*inputs)
    results = [None] * 4

    def work(index):
        results[index] = [lm2.memory_attention(*inputs) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, expected) for each in results for result in each)
