"""What does not shrink with the tensors: import, a process's first call, and a call's overhead."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from lm2_kernels import functional
from lm2_kernels.layers.paper import PaperMemory
from lm2_kernels.layers.release import ReleaseMemory

_ROUNDS = 3
# 256 tokens of width 256: the first large product of a process is timed both ways
_START = """
import json, time
begin = time.perf_counter()
import torch
torch_imported = time.perf_counter()
import lm2_kernels
imported = time.perf_counter()
layer = lm2_kernels.ReleaseMemory(256)
x, memory = torch.randn(1, 256, 256), lm2_kernels.initial_memory(1, 256)
calls = []
for _ in range(3):
    start = time.perf_counter()
    output, _ = layer(x, memory)
    output.sum().backward()
    calls.append(time.perf_counter() - start)
print(json.dumps({
    "import torch": torch_imported - begin,
    "import lm2_kernels after it": imported - torch_imported,
    "first call": calls[0],
    "third call": calls[2],
}))
"""


def test_start(benchmark):
    """A fresh process: the whole is what is timed, its parts are the ``extra_info``."""
    seconds = []

    def start():
        done = subprocess.run(
            [sys.executable, "-c", _START], capture_output=True, text=True, check=True
        )
        seconds.append(json.loads(done.stdout))

    benchmark.group = "start"
    benchmark.pedantic(start, rounds=_ROUNDS)
    benchmark.extra_info |= {
        name: round(min(parts[name] for parts in seconds), 4) for name in seconds[0]
    }


# tensors so small that they cost nothing
_DIM = 16
_X = torch.randn(1, 2, _DIM)
_HEADS = torch.randn(1, 2, 2, _DIM // 2)
_WEIGHT = torch.ones(_DIM)
_LAYERS = {kind.__name__: kind(_DIM, 2) for kind in (PaperMemory, ReleaseMemory)}
_CALLS = {
    "memory_attention": lambda: functional.memory_attention(_HEADS, _HEADS, _HEADS),
    # two heads of two tokens: theirs take heads first, which is as well
    "scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(
        _HEADS, _HEADS, _HEADS, is_causal=True
    ),
    "memory_update": lambda: functional.memory_update(_X, _X, _X, _X, _X, _X),
    "residual_layer_norm": lambda: functional.residual_layer_norm(_X, _X, _WEIGHT, _WEIGHT),
    "layer_norm of a sum": lambda: F.layer_norm(_X + _X, (_DIM,), _WEIGHT, _WEIGHT),
    "pooled_gate": lambda: functional.pooled_gate(_X, _WEIGHT),
    **{name: lambda layer=layer: layer(_X, _X) for name, layer in _LAYERS.items()},
}


@pytest.mark.parametrize("has_grad", (False, True), ids=("no_grad", "grad"))
@pytest.mark.parametrize("name", _CALLS)
def test_call(name, has_grad, benchmark):
    """Checks, choice of backend, autograd, dispatch: a call on a CPU without any work to do."""
    call = _CALLS[name]
    tensors = (_X, _HEADS, _WEIGHT)
    for tensor in tensors:
        tensor.requires_grad_(has_grad)
    benchmark.group = f"overhead {'grad' if has_grad else 'no_grad'}"
    try:
        with torch.set_grad_enabled(has_grad):
            benchmark.pedantic(call, rounds=50, iterations=10, warmup_rounds=5)
    finally:
        for tensor in tensors:
            tensor.requires_grad_(False)
