"""The compiled operators called directly: whatever they are handed, memory stays safe.

Python checks its inputs first; ``torch.ops.lm2_kernels_cpp`` can be reached without it.
"""

import re

import pytest
import torch

from lm2_kernels import backends
from tools.native import needs_cpp

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
        "lse": torch.randn(B, H, T),
        "needs_dquery": True,
        "needs_dkey_value": True,
    }
    return arguments | changes


def _update(**changes):
    rows = torch.randn(B, T, D)
    arguments = {
        "hidden": rows,
        "candidate": rows,
        "memory": rows,
        "input_gate": rows,
        "forget_gate": torch.randn(B, 1, D),
        "output_gate": rows,
        "gate_bias": torch.randn(B, 1, 2 * D),
        "output": "read",
    }
    return arguments | changes


def _update_backward(**changes):
    arguments = _update() | {
        "doutput": torch.randn(B, T, D),
        "dnew_memory": torch.randn(B, T, D),
        "needs_dcandidate": True,
        "needs_dmemory": True,
        "needs_dgates": True,
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


def _freed(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
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
        ("memory_update_backward", {"doutput": None, "dnew_memory": None}, "doutput"),
        ("pooled_gate_forward", {"num_pooled": -1}, "num_pooled"),
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
        wrong = torch.frombuffer(
            bytearray(size + 1), dtype=tensor.dtype, offset=1, count=tensor.numel()
        )
        tried += 1
        with pytest.raises(RuntimeError, match=f"^{op}: .*aligned"):
            _run(function, **ARGUMENTS[function](**{name: wrong.view(tensor.shape)}))
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


def test_every_operator_is_here():
    names = {f"{op}_{way}" for op in backends.OPS for way in ("forward", "backward")}
    assert set(ARGUMENTS) == names
