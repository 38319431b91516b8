"""The compiled operators called directly: whatever they are handed, memory stays safe.

Python checks its inputs first; ``torch.ops.lm2_kernels_cpp`` can be reached without it.
"""

import re

import pytest
import torch

import lm2_kernels as lm2
from lm2_kernels import backends, functional, operators, reference, testing
from lm2_kernels.backends.contract import RESULTS
from tools.interpreter import run_python
from tools.native import needs_cpp
from tools.rounding import assert_rule

pytestmark = needs_cpp

B, T, N, H, K, D = 2, 3, 5, 2, 4, 6


def _run(function, **arguments):
    return getattr(torch.ops.lm2_kernels_cpp, function)(**arguments)


def _attention(**changes):
    read, bank = torch.randn(B, T, H, K), torch.randn(B, N, H, K)
    arguments = {
        "query": read,
        "key": bank,
        "value": bank.clone(),
        "slot_mask": torch.ones(B, N, dtype=torch.bool),
        "seed": None,
        "causal": True,
        "slot_offset": 1,
        "scale": 0.5,
        "top_k": None,
        "dropout_p": 0.0,
    }
    return arguments | changes


def _attention_backward(**changes):
    arguments = _attention() | {
        "dout": torch.randn(B, T, H, K),
        "out": torch.randn(B, T, H, K),
        "statistics": torch.randn(B, H, 2, T),
        "needs_dquery": True,
        "needs_dkey_value": True,
    }
    return arguments | changes


# of memory_update: no number of rows that a tensor may have is one more than another
TOKENS, TOKENS_PER_SLOT, ROWS = 7, 3, 3


def _update(**changes):
    rows = torch.randn(B, TOKENS, D)
    arguments = {
        "hidden": rows,
        "candidate": rows,
        "memory": torch.randn(B, ROWS, D),
        "input_gate": rows,
        "forget_gate": torch.randn(B, 1, D),
        "output_gate": torch.randn(B, ROWS, D),
        "gate_bias": torch.randn(B, 1, 2 * D),
        "read": rows,
        "output": "read",
        "tokens_per_slot": TOKENS_PER_SLOT,
    }
    return arguments | changes


def _update_backward(**changes):
    arguments = _update() | {
        "doutput": torch.randn(B, TOKENS, D),
        "dnew_memory": torch.randn(B, ROWS, D),
        "needs_dcandidate": True,
        "needs_dmemory": True,
        "needs_dgates": True,
        "needs_dslot_gates": True,
        "needs_dread": True,
    }
    arguments.pop("hidden")
    return arguments | changes


def _norm(**changes):
    arguments = {
        "x": torch.randn(B, T, D),
        "residual": torch.randn(B, T, D),
        "weight": torch.randn(D),
        "bias": torch.randn(D),
        "eps": 1e-5,
    }
    return arguments | changes


def _norm_backward(**changes):
    arguments = _norm() | {
        "dout": torch.randn(B, T, D),
        "mean": torch.randn(B, T),
        "rstd": torch.randn(B, T),
        "needs_dx": True,
        "needs_dparams": True,
    }
    arguments.pop("bias")
    arguments.pop("eps")
    return arguments | changes


def _pool(**changes):
    arguments = {
        "x": torch.randn(B, T, D),
        "weight": torch.randn(D),
        "pooled_sum": torch.randn(B, D),
        "prefix": True,
        "num_pooled": 3,
    }
    return arguments | changes


def _pool_backward(**changes):
    arguments = _pool() | {
        "dpooled": torch.randn(B, T, D),
        "dnew_sum": torch.randn(B, D),
        "needs_dx": True,
        "needs_dweight": True,
        "needs_dpooled_sum": True,
    }
    arguments.pop("pooled_sum")
    return arguments | changes


ARGUMENTS = {
    "memory_attention_forward": _attention,
    "memory_attention_backward": _attention_backward,
    "memory_update_forward": _update,
    "memory_update_backward": _update_backward,
    "residual_layer_norm_forward": _norm,
    "residual_layer_norm_backward": _norm_backward,
    "pooled_gate_forward": _pool,
    "pooled_gate_backward": _pool_backward,
}


def _tensors(arguments):
    return {name: a for name, a in arguments.items() if isinstance(a, torch.Tensor)}


def _freed(tensor, share=0.0):
    tensor = tensor.clone(memory_format=torch.preserve_format)
    storage = tensor.untyped_storage()
    storage.resize_(int(storage.nbytes() * share))
    return tensor


# what can be wrong with a tensor
FAULTS = {
    "rank": lambda t: t[None],
    "rank_below": lambda t: t.flatten() if t.dim() > 1 else t[0],
    "batch": lambda t: torch.cat([t, t[:1]]),
    "last_axis": lambda t: t[..., :-1],
    "longer_last_axis": lambda t: torch.cat([t, t[..., :1]], dim=-1),
    "middle_axis": lambda t: torch.cat([t, t[:, :1]], dim=1) if t.dim() > 2 else None,
    "no_rows": lambda t: t[:, :0] if t.dim() > 2 else None,
    "integer": lambda t: t.int(),
    "complex": lambda t: t.to(torch.complex64),
    "float64": lambda t: t.double(),
    "freed": _freed,
    "cut_short": lambda t: _freed(t, 0.9),
    # copied to be dense, but not before it is known that it can be read
    "freed_and_strided": lambda t: _freed(t.transpose(0, -1).contiguous().transpose(0, -1), 0.9),
}
# Not every fault is one for every tensor: a last axis of another size in the tensor that defines
# the size shows as a fault of the others. What the message names is checked, not which tensor.


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("function", ARGUMENTS)
def test_a_wrong_tensor_is_refused(function, fault):
    op = function.removesuffix("_forward").removesuffix("_backward")
    for name, tensor in _tensors(ARGUMENTS[function]()).items():
        wrong = FAULTS[fault](tensor)
        # nothing else has the tokens' axis: another length is as good
        is_free = fault == "middle_axis" and function.endswith("forward") and name in ("query", "x")
        if wrong is None or (is_free and op in ("memory_attention", "pooled_gate")):
            continue
        with pytest.raises(RuntimeError) as raised:
            _run(function, **ARGUMENTS[function](**{name: wrong}))
        assert op in str(raised.value), (name, str(raised.value))


@pytest.mark.parametrize("function", ARGUMENTS)
def test_the_arguments_are_right(function):
    for result in _run(function, **ARGUMENTS[function]()):
        assert torch.isfinite(result).all()


@pytest.mark.parametrize(
    ("function", "changes", "text"),
    [
        ("memory_attention_forward", {"slot_offset": -1}, "slot_offset"),
        ("memory_attention_forward", {"top_k": 0}, "top_k"),
        ("memory_attention_forward", {"top_k": N + 1}, "top_k"),
        ("memory_attention_forward", {"dropout_p": 1.0}, "dropout_p"),
        ("memory_attention_forward", {"dropout_p": float("nan")}, "dropout_p"),
        ("memory_attention_forward", {"dropout_p": 0.5}, "seed"),
        ("memory_attention_forward", {"seed": torch.zeros(2, dtype=torch.int64)}, "seed"),
        ("memory_attention_forward", {"seed": torch.zeros(())}, "seed"),
        ("memory_update_forward", {"output": "both"}, "output"),
        ("memory_update_forward", {"output": "memory"}, "read needs"),
        ("memory_update_forward", {"output_gate": None}, "read needs"),
        ("memory_update_forward", {"tokens_per_slot": 0}, "tokens_per_slot"),
        ("memory_update_forward", {"tokens_per_slot": -(2**63)}, "tokens_per_slot"),
        ("memory_update_forward", {"tokens_per_slot": 1}, "memory"),
        ("memory_update_backward", {"doutput": None, "dnew_memory": None}, "doutput"),
        ("memory_update_backward", {"read": None}, "needs_dread"),
        ("pooled_gate_forward", {"num_pooled": -1}, "num_pooled"),
        ("pooled_gate_forward", {"num_pooled": 2**63 - 2}, "num_pooled"),
        ("pooled_gate_forward", {"prefix": False}, "pooled_sum"),
        ("pooled_gate_backward", {"dpooled": None, "dnew_sum": None}, "dpooled"),
    ],
)
def test_a_wrong_option_is_refused(function, changes, text):
    op = function.removesuffix("_forward").removesuffix("_backward")
    with pytest.raises(RuntimeError, match=f"^{op}: .*{re.escape(text)}"):
        _run(function, **ARGUMENTS[function](**changes))


@pytest.mark.parametrize("function", ARGUMENTS)
def test_misaligned_memory_is_refused(function):
    op = function.removesuffix("_forward").removesuffix("_backward")
    tried = 0
    for name, tensor in _tensors(ARGUMENTS[function]()).items():
        size = tensor.numel() * tensor.element_size()
        if tensor.element_size() == 1:
            continue
        wrong = torch.frombuffer(bytearray(2 * size + 1), dtype=tensor.dtype, offset=1)
        tried += 1
        strided = wrong.view(*tensor.shape, 2)[..., 0]
        for view in (wrong[: tensor.numel()].view(tensor.shape), strided):
            with pytest.raises(RuntimeError, match=f"^{op}: .*aligned"):
                _run(function, **ARGUMENTS[function](**{name: view}))
    assert tried


@pytest.mark.parametrize("function", ARGUMENTS)
def test_any_strides_are_taken(function):
    """Expanded, transposed and strided tensors give what their contiguous copies give."""
    arguments = ARGUMENTS[function]()
    strided = {}
    for index, (name, tensor) in enumerate(_tensors(arguments).items()):
        if index % 3 == 0:
            strided[name] = tensor.repeat_interleave(2, dim=-1)[..., ::2]
        elif index % 3 == 1:
            strided[name] = tensor[:1].expand(tensor.shape)
        else:
            strided[name] = tensor.transpose(0, -1).contiguous().transpose(0, -1)
    dense = {name: tensor.contiguous() for name, tensor in strided.items()}
    got, want = (_run(function, **arguments | changed) for changed in (strided, dense))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
        assert a.is_contiguous()


@pytest.mark.parametrize("function", ["memory_update_forward", "memory_update_backward"])
def test_any_number_of_tokens_per_slot_is_taken_by_an_operator(function):
    """More than there are is all of them."""
    arguments = ARGUMENTS[function](
        memory=torch.randn(B, 1, D), output_gate=torch.randn(B, 1, D), tokens_per_slot=TOKENS
    )
    if "dnew_memory" in arguments:
        arguments["dnew_memory"] = torch.randn(B, 1, D)
    want = _run(function, **arguments)
    got = _run(function, **arguments | {"tokens_per_slot": 2**63 - 1})
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_out_of_memory_is_an_error_and_no_more():
    """It names the op, and the next call works: no buffer is left half allocated."""
    code = """
import resource, torch
from lm2_kernels.backends import extension
attend = torch.ops.lm2_kernels_cpp.memory_attention_forward
query, bank = torch.ones(1, 5, 1, 64), torch.ones(1, 1, 1, 64)
options = dict(causal=False, slot_offset=0, scale=1.0, top_k=None, dropout_p=0.0)
before = attend(query, bank, bank, None, None, **options)[0]
resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))
huge = bank.expand(1, 2**31 - 1, 1, 64)
try:
    attend(query, huge, huge, None, None, **options)
except RuntimeError as error:
    print(error)
assert torch.equal(attend(query, bank, bank, None, None, **options)[0], before)
"""
    run = run_python(code)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "memory_attention: out of memory\n"


def test_no_long_chain_of_roundings():
    """A sum over very many rows is as exact as torch's own."""

    def run(seed):
        torch.manual_seed(seed)
        x, weight = torch.rand(2**17, 1, 4), torch.ones(4)
        gradient = torch.rand(2**17, 1, 4)
        _, dweight, _ = _run(
            "pooled_gate_backward",
            **_pool_backward(x=x, weight=weight, dpooled=gradient, dnew_sum=None, prefix=False)
            | {"num_pooled": 0, "needs_dx": False, "needs_dpooled_sum": False},
        )
        exact = (x.double() * gradient.double()).sum((0, 1))
        # few queries and many slots
        bank = torch.rand(1, 2**17, 1, 4)
        options = {"slot_mask": None, "causal": False, "scale": 0.0}
        read = _attention(query=torch.rand(1, 2, 1, 4), key=bank, value=bank) | options
        out, _ = _run("memory_attention_forward", **read)
        # all scores are 0
        mean = bank.double().mean(1, keepdim=True).expand(1, 2, 1, 4)
        plain = reference.memory_attention(read["query"], bank, bank, causal=False, scale=0.0)
        # a slot of many tokens whose gates are open
        opened = torch.full((1, 1, 4), 100.0)
        tokens = torch.rand(1, 2**17, 4)
        shut = {"output_gate": None, "gate_bias": None, "read": None}
        write = {"hidden": tokens, "candidate": tokens, "memory": torch.zeros(1, 1, 4)} | shut
        write |= {"input_gate": opened, "forget_gate": opened, "tokens_per_slot": 2**17}
        _, row = _run("memory_update_forward", **_update(**write))
        proposals = tokens.tanh()
        exact_row = tokens.double().tanh().mean(1, keepdim=True)
        return [
            testing.compare("dweight", dweight, exact, (x * gradient).sum((0, 1))),
            testing.compare("output", out, mean, plain),
            testing.compare("output", row, exact_row, proposals.mean(1, keepdim=True)),
        ]

    assert_rule(run)


def test_every_operator_is_here():
    names = {f"{op}_{way}" for op in backends.OPS for way in ("forward", "backward")}
    assert set(ARGUMENTS) == names


@pytest.mark.parametrize("function", RESULTS)
def test_the_extension_has_the_schema(function):
    """csrc/schemas.h says the same as the signature that all other schemas are made from."""
    compiled = getattr(torch.ops.lm2_kernels_cpp, function).default._schema
    assert str(compiled) == f"lm2_kernels_cpp::{function}{operators.schema(function)}"


# --- what torch.compile makes of the ops --------------------------------------------------------

# one tensor, or views of one, in several places
REPEATED = {
    "attention, key is value": lambda x, w: lm2.memory_attention(x, w, w),
    "attention, one tensor": lambda x, w: lm2.memory_attention(x, x, x),
    "attention, views": lambda x, w: lm2.memory_attention(x[:, :2], x[:, 1:], x.flip(1)[:, 1:]),
    "update, twice": lambda x, w: lm2.memory_update(
        x[..., 0], x[..., 0], x[..., 0], w[..., 1], w[..., 1]
    ),
    "update, one tensor": lambda x, w: lm2.memory_update(
        *(x[..., 0],) * 6, gate_bias=x.flatten(2)[..., :6]
    ),
    "norm, twice": lambda x, w: functional.residual_layer_norm(
        x[..., 0], x[..., 0], w[0, 0, :, 0], w[0, 0, :, 0]
    ),
    "norm, one tensor": lambda x, w: functional.residual_layer_norm(
        x[..., 0], x[..., 0], x[0, 0, :, 0], x[0, 0, :, 1]
    ),
    "pool, one tensor": lambda x, w: functional.pooled_gate(
        x[..., 0], x[0, 0, :, 0], prefix=True, pooled_sum=x[:, 0, :, 0], num_pooled=2
    ),
}


def _results(function, *tensors):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(output.square().sum() for output in outputs)
    return [*outputs, *torch.autograd.grad(loss, leaves, allow_unused=True)]


# inductor takes seconds for each, and is given the graph that aot_eager is
@pytest.mark.parametrize(
    ("name", "how"),
    [*((name, "aot_eager") for name in REPEATED), ("attention, key is value", "inductor")],
)
def test_compiled_with_one_tensor_in_several_places(name, how):
    """Outputs and gradients are those of eager mode, for other sizes too."""
    torch._dynamo.reset()
    function = REPEATED[name]
    compiled = torch.compile(function, fullgraph=True, backend=how, dynamic=True)
    for batch in (2, 3):
        x, w = torch.randn(2, batch, 5, 3, 4, dtype=torch.float64)
        for got, want in zip(_results(compiled, x, w), _results(function, x, w), strict=True):
            # None for a tensor that is not used
            assert got is want is None or torch.allclose(got, want, rtol=1e-12, atol=1e-12)
