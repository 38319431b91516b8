"""Backends from outside the package."""

import argparse
import types
import warnings

import pytest
import torch

import lm2_kernels as lm2
from lm2_kernels import backends, functional, testing
from lm2_kernels.backends import eager
from lm2_kernels.backends.contract import RESULTS
from lm2_kernels.bench import works
from lm2_kernels.cli import main
from tools.native import cpu_default

CASES = [next(case for case in testing.SMALL_CASES if case.op == op) for op in backends.OPS]


class Counting:
    """Eager's functions, and how often each was called."""

    DEVICES = None

    def __init__(self):
        self.calls = dict.fromkeys(RESULTS, 0)
        for function in RESULTS:
            setattr(self, function, self._counted(function))

    def _counted(self, function):
        def call(*args):
            self.calls[function] += 1
            return getattr(eager, function)(*args)

        return call

    def unsupported_reason(self, op, *tensors):
        return None


@pytest.fixture
def counting():
    before, backend = backends.requested_backend(), Counting()
    lm2.use_backend("auto")
    with backends.register("counting", backend):
        yield backend
    lm2.use_backend(before)


def pool(**options):
    x, weight = (torch.randn(*shape, requires_grad=True) for shape in ((2, 3, 4), (4,)))
    with lm2.recording() as recorded:
        functional.pooled_gate(x, weight, **options)[0].sum().backward()
    return [backend for _, backend in recorded]


def test_by_name_by_default_and_by_auto(counting):
    assert pool() == pool(backend="counting") == ["counting"] * 2
    assert pool(backend="eager") == ["eager"] * 2
    with lm2.use_backend("counting"):
        assert pool() == ["counting"] * 2
    assert counting.calls["pooled_gate_forward"] == counting.calls["pooled_gate_backward"] == 3


def test_auto_takes_it_at_its_place():
    before = backends.NAMES
    with backends.register("late", Counting(), before="eager"):
        assert (*before[:-1], "late", "eager") == backends.NAMES
        with backends.register("first", Counting()):
            assert ("first", *before[:-1], "late", "eager") == backends.NAMES
        assert pool() == [cpu_default() if cpu_default() == "cpp" else "late"] * 2
        assert pool(backend="late") == ["late"] * 2
    assert before == backends.NAMES
    assert pool() == [cpu_default()] * 2


def test_auto_goes_on_where_it_refuses(counting):
    counting.unsupported_reason = lambda op, *tensors: "it is a Tuesday"
    assert pool() == [cpu_default()] * 2
    with pytest.raises(RuntimeError, match="'counting' cannot run this call: it is a Tuesday"):
        pool(backend="counting")


def test_it_gets_no_tensors_of_other_devices(counting):
    counting.DEVICES = {"xpu": "Intel GPUs", "mps": "Apple GPUs"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pool() == [cpu_default()] * 2
    text = "the tensors are on cpu, it runs on Intel GPUs and Apple GPUs"
    with pytest.raises(RuntimeError, match=text):
        pool(backend="counting")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_it_passes_the_common_check(case, counting):
    testing.check_case(case, torch.float32, "counting")
    assert counting.calls[f"{case.op}_forward"] and counting.calls[f"{case.op}_backward"]


def test_the_commands_see_it(counting, capsys):
    assert main(["info"]) == 0
    assert "\n  counting " in capsys.readouterr().out
    assert main(["verify", "--backend", "counting", "--dtype", "float32"], cases=CASES) == 0
    assert "counting" in capsys.readouterr().out
    assert min(counting.calls.values()) > 0
    assert "counting" in works.row_names()
    assert works.our_backends("cpu")[0] == "counting"


def test_compiled(counting):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def update(*tensors):
        return functional.memory_update(*tensors)[1]

    def run():
        tensors = [torch.randn(2, 3, 4, requires_grad=True) for _ in range(5)]
        with lm2.recording() as recorded:
            update(*tensors).sum().backward()
        return [backend for _, backend in recorded]

    assert run() == ["counting"] * 2
    with lm2.use_backend("eager"):
        assert run() == ["eager"] * 2
    with backends.register("another", Counting()):
        assert run() == ["another"] * 2
    assert run() == ["counting"] * 2
    assert counting.calls["memory_update_forward"] == 2


def test_a_module_will_do():
    module = types.ModuleType("mine")
    names = (*RESULTS, "unsupported_reason", "DEVICES")
    vars(module).update({name: getattr(eager, name) for name in names})
    with backends.register("mine", module):
        assert backends.get("mine") is module and pool() == ["mine"] * 2


def test_without_with_it_stays_until_unregistered():
    backends.register("mine", Counting())
    lm2.use_backend("mine")
    assert pool() == ["mine"] * 2
    backends.unregister("mine")
    assert backends.requested_backend() == "auto" and pool() == [cpu_default()] * 2
    with pytest.raises(ValueError, match=r"one of .*'eager', 'auto', got 'mine'"):
        lm2.use_backend("mine")
    # a graph that it made cannot go backward
    with backends.register("mine", Counting()):
        loss = functional.pooled_gate(torch.ones(1, 2, 3, requires_grad=True), torch.ones(3))[0]
    with pytest.raises(RuntimeError, match="'mine' is not available: it is not registered"):
        loss.sum().backward()
    for name in ("mine", "eager"):
        with pytest.raises(ValueError, match=f"no registered backend '{name}'"):
            backends.unregister(name)


def test_it_is_taken_out_in_any_order():
    backend = Counting()
    backends.register("mine", backend)
    with lm2.use_backend("mine"), lm2.use_backend("eager"):
        backends.unregister("mine")
    # what was the default before is gone
    assert pool() == [cpu_default()] * 2
    with pytest.raises(KeyError), backends.register("mine", backend):
        backends.unregister("mine")
        raise KeyError
    handle = backends.register("mine", backend)
    backends.unregister("mine")
    other = Counting()
    with backends.register("mine", other):
        handle.__exit__(None, None, None)
        assert backends.get("mine") is other
    lm2.use_backend("auto")


@pytest.mark.parametrize(
    ("name", "options", "text"),
    (
        ("eager", {}, "there is a backend 'eager' already"),
        ("counting", {}, "there is a backend 'counting' already"),
        ("auto", {}, "already"),
        ("my backend", {}, "identifier"),
        ("mine", {"before": "yours"}, "before must be one of .*'counting', 'triton'.*'yours'"),
    ),
)
def test_names_that_are_refused(name, options, text, counting):
    before = backends.NAMES
    with pytest.raises(ValueError, match=text):
        backends.register(name, Counting(), **options)
    assert before == backends.NAMES


def test_some_ops_will_do(counting):
    """Of the others "auto" asks the next, and who asks for it by name is told."""
    del counting.pooled_gate_forward
    assert pool() == [cpu_default()] * 2
    with pytest.raises(RuntimeError, match="'counting' cannot run this call: it has no pool"):
        pool(backend="counting")
    testing.check_case(CASES[0], torch.float32, "counting")


def test_what_is_missing_is_listed():
    backend = Counting()
    del backend.pooled_gate_backward
    backend.DEVICES = {}
    text = "lacks pooled_gate_backward, DEVICES .a dict, or None.;"
    with pytest.raises(TypeError, match=text):
        backends.register("mine", backend)
    text = "lacks unsupported_reason, every op, as memory_attention_forward, DEVICES"
    with pytest.raises(TypeError, match=text):
        backends.register("mine", argparse)
    assert "mine" not in backends.NAMES
