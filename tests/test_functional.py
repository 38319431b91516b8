"""The public ops and layers at their edges: what is refused, with which words, and what is not."""

import math
import re
from typing import NamedTuple

import pytest
import torch

import lm2_kernels as lm2
from lm2_kernels import functional, testing
from tools.native import needs_cpp

BACKENDS = ("eager", pytest.param("cpp", marks=needs_cpp))
B, T, N, H, K, D = 2, 3, 5, 2, 4, 8

# --- refusals ---------------------------------------------------------------------------------
# Bad inputs of other libraries that have no counterpart here, and so no case below:
# - T != N and D != N: every T <= N and every D runs;
# - an `out=` tensor that overlaps an input: no op takes one;
# - an attention mask (B, H, T, N): ours is the slot_mask (B, N), whose shape is checked;
# - an extension built for another torch: there is no compiled extension.
# What the triton backend refuses is tested with its kernels; a missing triton and a CPU tensor, in
# test_selection.py.


class Refusal(NamedTuple):
    op: str
    changes: dict[str, object]  # over the good arguments; a function maps the good argument
    error: type[Exception]
    message: str  # after the op's name; a regular expression


def good_arguments(op: str) -> dict[str, object]:
    torch.manual_seed(0)
    rows, bank = torch.randn(B, T, D), torch.randn(B, N, D)
    if op == "memory_attention":
        heads = (H, K)
        return {
            "query": torch.randn(B, T, *heads),
            "key": torch.randn(B, N, *heads),
            "value": torch.randn(B, N, *heads),
        }
    if op == "memory_update":
        names = ("hidden", "candidate", "memory", "input_gate", "forget_gate", "output_gate")
        return {name: torch.randn(B, T, D) for name in names} | {
            "gate_bias": torch.randn(B, 1, 2 * D)
        }
    if op == "residual_layer_norm":
        return {"x": rows, "residual": rows + 1, "weight": torch.ones(D), "bias": torch.zeros(D)}
    if op == "pooled_gate":
        return {"x": rows, "weight": torch.ones(D)}
    if op == "initial_memory":
        return {"batch": B, "slots": N, "dim": D}
    if op in ("PaperMemory", "ReleaseMemory"):
        return {"dim": D, "num_heads": H}
    return {"x": rows, "memory": bank}


def call(op: str, **arguments):
    """An op, a constructor, or (as "<Layer>.forward") a layer's forward."""
    if hasattr(functional, op):
        return getattr(functional, op)(**arguments)
    if op in ("PaperMemory", "ReleaseMemory"):
        return getattr(lm2, op)(**arguments)
    options = {"pooled_gate": "prefix"} if "prefix" in op else {}
    if "top_k" in arguments:
        options["top_k"] = arguments.pop("top_k")
    return getattr(lm2, op.partition(".")[0])(D, H, **options)(**arguments)


def to_sparse(tensor):
    return tensor.to_sparse()


def to_nested(tensor):
    return torch.nested.nested_tensor(list(tensor), layout=torch.jagged)


def to_strided_nested(tensor):
    return torch.nested.nested_tensor(list(tensor), layout=torch.strided)


def to_quantized(tensor):
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def to_meta(tensor):
    return tensor.to("meta")


def to_integer(tensor):
    return tensor.long()


def to_bool(tensor):
    return tensor > 0


def to_complex(tensor):
    return tensor.to(torch.complex64)


def to_bfloat16(tensor):
    return tensor.bfloat16()


def to_double(tensor):
    return tensor.double()


def wider(tensor):
    return torch.cat((tensor, tensor), dim=-1)


def longer(tensor):
    return torch.cat((tensor, tensor), dim=1)


def first_row(tensor):
    return tensor[:, :1]


def more_batches(tensor):
    return torch.cat((tensor, tensor[:1]))


def flatter(tensor):
    return tensor[0]


def without_tokens(tensor):
    return tensor[:, :0]


def slot_mask(shape=(B, N), dtype=torch.bool):
    return torch.ones(shape, dtype=dtype)


def tensor_refusals(op: str, first: str, second: str, expected_dtype: str) -> list[Refusal]:
    """What every op refuses of its tensors."""
    dense = r"{} must be a dense strided tensor, got layout .*; convert it with \.to_dense\(\)"
    floating = "{} must be float32, bfloat16, float16 or float64, got torch.{}"
    return [
        Refusal(
            op,
            {first: lambda t: t.tolist()},
            TypeError,
            f"{first} must be a torch.Tensor, got list",
        ),
        Refusal(op, {second: None}, TypeError, f"{second} must be a torch.Tensor, got NoneType"),
        Refusal(op, {first: to_integer}, TypeError, floating.format(first, "int64")),
        Refusal(op, {second: to_bool}, TypeError, floating.format(second, "bool")),
        Refusal(op, {first: to_complex}, TypeError, floating.format(first, "complex64")),
        Refusal(op, {first: to_nested}, TypeError, dense.format(first)),
        Refusal(op, {first: to_strided_nested}, TypeError, dense.format(first)),
        Refusal(op, {second: to_sparse}, TypeError, dense.format(second)),
        Refusal(op, {first: to_quantized}, TypeError, dense.format(first)),
        Refusal(op, {second: to_double}, TypeError, expected_dtype),
        Refusal(
            op,
            {second: to_meta},
            ValueError,
            f"{second} is on meta but {first} is on cpu; move them to one device",
        ),
    ]


def slot_mask_refusals(op: str) -> list[Refusal]:
    expected = rf"slot_mask must be \(B, N\) = \({B}, {N}\), got "
    return [
        Refusal(op, {"slot_mask": [True]}, TypeError, "slot_mask must be a torch.Tensor, got list"),
        Refusal(
            op,
            {"slot_mask": slot_mask(dtype=torch.float32)},
            TypeError,
            r"slot_mask must be bool \(True = takes part\), got torch.float32",
        ),
        Refusal(
            op,
            {"slot_mask": slot_mask().to_sparse()},
            TypeError,
            r"slot_mask must be a dense strided tensor, .*\.to_dense\(\)",
        ),
        Refusal(op, {"slot_mask": slot_mask((B, N + 1))}, ValueError, expected),
        Refusal(op, {"slot_mask": slot_mask((B + 1, N))}, ValueError, expected),
        Refusal(
            op,
            {"slot_mask": slot_mask((B, 1, 1, N))},
            ValueError,
            r"slot_mask must have 2 dimensions \(B, N\), got shape \(2, 1, 1, 5\)",
        ),
        Refusal(
            op,
            {"slot_mask": slot_mask().to("meta")},
            ValueError,
            "slot_mask is on meta but the other tensors are on cpu; move them to one device",
        ),
    ]


ATTENTION = "memory_attention"
ATTENTION_REFUSALS = [
    *tensor_refusals(ATTENTION, "query", "value", "value is torch.float64 but torch.float32 was"),
    *slot_mask_refusals(ATTENTION),
    Refusal(ATTENTION, {"key": to_bfloat16}, TypeError, "key is torch.bfloat16 but .* cast one or"),
    Refusal(
        ATTENTION,
        {"query": flatter},
        ValueError,
        r"query must have 4 dimensions \(B, T, H, K\), got shape \(3, 2, 4\)",
    ),
    Refusal(ATTENTION, {"key": flatter}, ValueError, r"key must have 4 dimensions \(B, N, H, K\)"),
    Refusal(
        ATTENTION,
        {"key": more_batches},
        ValueError,
        r"key must be \(B, N, H, K\) = \(2, \*, 2, 4\), got \(3, 5, 2, 4\)",
    ),
    Refusal(ATTENTION, {"key": wider}, ValueError, r"key must be .*, got \(2, 5, 2, 8\)"),
    Refusal(
        ATTENTION,
        {"value": longer},
        ValueError,
        r"value must be \(B, N, H, K\) = \(2, 5, 2, 4\), got \(2, 10, 2, 4\)",
    ),
    Refusal(
        ATTENTION,
        {"query": without_tokens},
        ValueError,
        r"query must have at least one of tokens T, got shape \(2, 0, 2, 4\)",
    ),
    Refusal(
        ATTENTION,
        {"key": without_tokens, "value": without_tokens},
        ValueError,
        r"key must have at least one of slots N, got shape \(2, 0, 2, 4\)",
    ),
    Refusal(ATTENTION, {"slot_offset": -1}, ValueError, "slot_offset must be at least 0, got -1"),
    Refusal(ATTENTION, {"slot_offset": 0.0}, TypeError, "slot_offset must be an int, got float"),
    Refusal(ATTENTION, {"top_k": 0}, ValueError, "top_k must be between 1 and 5, got 0"),
    Refusal(ATTENTION, {"top_k": N + 1}, ValueError, "top_k must be between 1 and 5, got 6"),
    Refusal(ATTENTION, {"top_k": True}, TypeError, "top_k must be an int, got bool"),
    Refusal(ATTENTION, {"top_k": [1]}, TypeError, "top_k must be an int, got list"),
    Refusal(ATTENTION, {"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    Refusal(ATTENTION, {"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\), got -0.1"),
    Refusal(ATTENTION, {"dropout_p": math.nan}, ValueError, r"dropout_p must be .*, got nan"),
    Refusal(ATTENTION, {"dropout_p": "0.1"}, TypeError, "dropout_p must be a float, got str"),
    Refusal(ATTENTION, {"scale": math.inf}, ValueError, "scale must be finite, got inf"),
    Refusal(ATTENTION, {"scale": math.nan}, ValueError, "scale must be finite, got nan"),
    Refusal(ATTENTION, {"scale": torch.ones(())}, TypeError, "scale must be a float, got Tensor"),
]

UPDATE = "memory_update"
GATE = r"\(B, T or 1, D\) = \(2, 3, 8\)"
UPDATE_REFUSALS = [
    *tensor_refusals(UPDATE, "hidden", "candidate", "hidden is torch.float32 but torch.float64"),
    Refusal(
        UPDATE,
        {"memory": to_double},
        TypeError,
        "memory is torch.float64 but torch.float32 was expected",
    ),
    Refusal(
        UPDATE,
        {"input_gate": to_bfloat16},
        TypeError,
        "input_gate is torch.bfloat16 but torch.float32 was expected, .* cast one or use",
    ),
    Refusal(UPDATE, {"hidden": flatter}, ValueError, r"hidden must have 3 dimensions \(B, T, D\)"),
    Refusal(
        UPDATE,
        {"memory": more_batches},
        ValueError,
        r"memory must be \(B, T, D\) = \(2, 3, 8\), got \(3, 3, 8\)",
    ),
    Refusal(UPDATE, {"candidate": longer}, ValueError, r"candidate must be .*, got \(2, 6, 8\)"),
    Refusal(UPDATE, {"input_gate": wider}, ValueError, f"input_gate must be {GATE}, got "),
    Refusal(UPDATE, {"forget_gate": longer}, ValueError, f"forget_gate must be {GATE}, got "),
    Refusal(
        UPDATE,
        {"output_gate": flatter},
        ValueError,
        r"output_gate must have 3 dimensions \(B, T or 1, D\), got shape \(3, 8\)",
    ),
    Refusal(
        UPDATE,
        {"gate_bias": wider},
        ValueError,
        r"gate_bias must be \(B, T or 1, 2 \* D\) = \(2, 1, 16\), got \(2, 1, 32\)",
    ),
    Refusal(
        UPDATE,
        {"hidden": without_tokens},
        ValueError,
        r"hidden must have at least one of tokens T, got shape \(2, 0, 8\)",
    ),
    Refusal(
        UPDATE, {"output": "both"}, ValueError, "output must be 'read' or 'memory', got 'both'"
    ),
    Refusal(
        UPDATE, {"tokens_per_slot": 0}, ValueError, "tokens_per_slot must be at least 1, got 0"
    ),
    Refusal(
        UPDATE, {"tokens_per_slot": 2.0}, TypeError, "tokens_per_slot must be an int, got float"
    ),
    Refusal(
        UPDATE,
        {"tokens_per_slot": 2},
        ValueError,
        r"memory must be \(B, R = ceil\(T / tokens_per_slot\), D\) = \(2, 2, 8\), got \(2, 3, 8\)",
    ),
    Refusal(
        UPDATE,
        {"tokens_per_slot": 3, "memory": first_row, "forget_gate": longer},
        ValueError,
        r"forget_gate must be \(B, T or R or 1, D\) = \(2, 3, 8\), got \(2, 6, 8\)",
    ),
    Refusal(
        UPDATE,
        {"tokens_per_slot": 2, "memory": longer},
        ValueError,
        r"memory must be .* = \(2, 2, 8\), got \(2, 6, 8\)",
    ),
    Refusal(
        UPDATE,
        {"read": torch.zeros(B, 1, D)},
        ValueError,
        r"read must be \(B, T, D\) = \(2, 3, 8\), got \(2, 1, 8\)",
    ),
    Refusal(
        UPDATE,
        {"read": torch.zeros(B, T, D, dtype=torch.float16)},
        TypeError,
        "read is torch.float16 but torch.float32 was expected",
    ),
    *(
        Refusal(
            UPDATE,
            {"read": torch.zeros(B, T, D)} | changes,
            ValueError,
            "read is what an output gate shows with output='read'; without an output_gate, or "
            "with output='memory', leave it out",
        )
        for changes in ({"output": "memory"}, {"output_gate": None})
    ),
]

NORM = "residual_layer_norm"
NORM_REFUSALS = [
    *tensor_refusals(NORM, "x", "residual", "x is torch.float32 but residual is torch.float64"),
    Refusal(NORM, {"bias": to_bfloat16}, TypeError, "bias is torch.bfloat16 but torch.float32 was"),
    Refusal(NORM, {"weight": to_double}, TypeError, "x is .* but weight is torch.float64; they"),
    Refusal(NORM, {"x": flatter}, ValueError, r"x must have 3 dimensions \(B, T, D\), got shape"),
    Refusal(NORM, {"residual": longer}, ValueError, r"residual must be \(B, T, D\) = \(2, 3, 8\)"),
    Refusal(NORM, {"weight": wider}, ValueError, r"weight must be \(D,\) = \(8\), got \(16,\)"),
    Refusal(NORM, {"bias": wider}, ValueError, r"bias must be \(D,\) = \(8\), got \(16,\)"),
    Refusal(
        NORM, {"x": without_tokens}, ValueError, "x must have at least one of tokens T, got shape"
    ),
    Refusal(NORM, {"eps": 0.0}, ValueError, "eps must be a float above 0, got 0.0"),
    Refusal(NORM, {"eps": -1e-5}, ValueError, "eps must be a float above 0, got -1e-05"),
    Refusal(NORM, {"eps": math.nan}, ValueError, "eps must be a float above 0, got nan"),
]

POOL = "pooled_gate"
A_SUM = {"prefix": True, "num_pooled": 1}
POOL_REFUSALS = [
    *tensor_refusals(POOL, "x", "weight", "x is torch.float32 but weight is torch.float64; they"),
    Refusal(POOL, {"x": flatter}, ValueError, r"x must have 3 dimensions \(B, T, D\), got shape"),
    Refusal(POOL, {"weight": wider}, ValueError, r"weight must be \(D,\) = \(8\), got \(16,\)"),
    Refusal(
        POOL, {"x": without_tokens}, ValueError, "x must have at least one of tokens T, got shape"
    ),
    Refusal(
        POOL,
        {"pooled_sum": torch.zeros(B, D)},
        ValueError,
        "pooled_sum needs prefix=True: the mean of a whole segment cannot be continued",
    ),
    Refusal(
        POOL,
        A_SUM | {"pooled_sum": torch.zeros(B, 1, D)},
        ValueError,
        r"pooled_sum must have 2 dimensions \(B, D\), got shape \(2, 1, 8\)",
    ),
    Refusal(
        POOL,
        A_SUM | {"pooled_sum": torch.zeros(B, D, dtype=torch.bfloat16)},
        TypeError,
        "pooled_sum must be torch.float32 for x of torch.float32, got torch.bfloat16",
    ),
    Refusal(POOL, A_SUM, ValueError, "num_pooled is 1 but no pooled_sum was given"),
    Refusal(
        POOL,
        {"prefix": True, "num_pooled": -1, "pooled_sum": torch.zeros(B, D)},
        ValueError,
        "num_pooled must be at least 0, got -1",
    ),
]

INITIAL = "initial_memory"
INITIAL_REFUSALS = [
    Refusal(INITIAL, {"batch": -1}, ValueError, "batch must be at least 0, got -1"),
    Refusal(INITIAL, {"slots": 0}, ValueError, "slots must be at least 1, got 0"),
    Refusal(INITIAL, {"dim": 0}, ValueError, "dim must be at least 1, got 0"),
    Refusal(INITIAL, {"slots": 5.0}, TypeError, "slots must be an int, got float"),
    Refusal(
        INITIAL,
        {"kind": "learned"},
        ValueError,
        "kind must be 'identity' or 'zeros', got 'learned'",
    ),
]


def constructor_refusals(op: str) -> list[Refusal]:
    return [
        Refusal(op, {"num_heads": 3}, ValueError, r"num_heads \(3\) must divide dim \(8\)"),
        Refusal(op, {"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
        Refusal(op, {"num_heads": 2.0}, TypeError, "num_heads must be an int, got float"),
        Refusal(op, {"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        Refusal(op, {"dim": "8"}, TypeError, "dim must be an int, got str"),
        Refusal(op, {"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        Refusal(op, {"dropout": 1.5}, ValueError, r"dropout_p must be in \[0, 1\), got 1.5"),
        Refusal(op, {"dropout": math.nan}, ValueError, r"dropout_p must be in \[0, 1\), got nan"),
        Refusal(op, {"scale": math.nan}, ValueError, "scale must be finite, got nan"),
        Refusal(op, {"scale": "auto"}, TypeError, "scale must be a float, got str"),
        Refusal(op, {"write": "nearest"}, ValueError, r"write must be one of .*, got 'nearest'"),
    ]


CONSTRUCTOR_REFUSALS = [
    *constructor_refusals("PaperMemory"),
    *constructor_refusals("ReleaseMemory"),
    Refusal(
        "PaperMemory", {"output": "x"}, ValueError, "output must be 'read' or 'memory', got 'x'"
    ),
    Refusal("ReleaseMemory", {"num_blocks": 0}, ValueError, "num_blocks must be at least 1, got 0"),
    Refusal(
        "ReleaseMemory", {"num_blocks": 1.0}, TypeError, "num_blocks must be an int, got float"
    ),
    Refusal(
        "ReleaseMemory",
        {"attention_mlp_layers": 0},
        ValueError,
        "attention_mlp_layers must be at least 1, got 0",
    ),
    Refusal("ReleaseMemory", {"eps": 0.0}, ValueError, "eps must be a float above 0, got 0.0"),
    Refusal(
        "ReleaseMemory",
        {"pooled_gate": "token"},
        ValueError,
        "pooled_gate must be 'segment' or 'prefix', got 'token'",
    ),
]


def forward_refusals(op: str) -> list[Refusal]:
    return [
        *tensor_refusals(op, "x", "memory", "memory must be torch.float32, the dtype of x, or"),
        *slot_mask_refusals(op),
        Refusal(
            op,
            {"x": to_bfloat16},
            TypeError,
            "x is torch.bfloat16 but the parameters are torch.float32; cast one or use torch.auto",
        ),
        Refusal(op, {"x": flatter}, ValueError, r"x must have 3 dimensions \(B, T, D\), got shape"),
        Refusal(op, {"x": wider}, ValueError, r"x must be \(B, T, D\) = \(\*, \*, 8\), got"),
        Refusal(op, {"x": without_tokens}, ValueError, "x must have at least one of tokens T, got"),
        Refusal(op, {"memory": flatter}, ValueError, r"memory must have 3 dimensions \(B, N, D\)"),
        Refusal(
            op,
            {"memory": more_batches},
            ValueError,
            r"memory must be \(B, N, D\) = \(2, \*, 8\), got \(3, 5, 8\)",
        ),
        Refusal(op, {"memory": wider}, ValueError, r"memory must be .*, got \(2, 5, 16\)"),
        Refusal(
            op, {"memory": without_tokens}, ValueError, "memory must have at least one of slots"
        ),
        Refusal(op, {"slot_offset": -1}, ValueError, "slot_offset must be at least 0, got -1"),
        Refusal(op, {"slot_offset": 1.0}, TypeError, "slot_offset must be an int, got float"),
        Refusal(
            op,
            {"slot_offset": 3},
            ValueError,
            r"slot_offset \+ T must be at most N = 5, got 3 \+ 3; feed longer inputs in segments",
        ),
        Refusal(op, {"top_k": 6}, ValueError, "top_k must be between 1 and N = 5, got 6"),
    ]


FORWARD_REFUSALS = [
    *forward_refusals("PaperMemory.forward"),
    *forward_refusals("ReleaseMemory.forward"),
    Refusal(
        "ReleaseMemory.forward",
        {"pooled_sum": torch.zeros(B, D)},
        ValueError,
        "pooled_sum needs pooled_gate='prefix': the gate of a whole segment cannot be continued",
    ),
]
# checked by the op that takes it, before anything runs
PREFIX_REFUSALS = [
    Refusal(
        "ReleaseMemory.forward, prefix",
        {"pooled_sum": torch.zeros(B + 1, D)},
        ValueError,
        r"pooled_sum must be \(B, D\) = \(2, 8\), got \(3, 8\)",
    ),
    Refusal(
        "ReleaseMemory.forward, prefix",
        {"pooled_sum": torch.zeros(B, D).double()},
        TypeError,
        "pooled_sum must be torch.float32 for x of torch.float32, got torch.float64",
    ),
]
REFUSALS = [
    *ATTENTION_REFUSALS,
    *UPDATE_REFUSALS,
    *NORM_REFUSALS,
    *POOL_REFUSALS,
    *INITIAL_REFUSALS,
    *CONSTRUCTOR_REFUSALS,
    *FORWARD_REFUSALS,
    *PREFIX_REFUSALS,
]


def op_name(refusal: Refusal) -> str:
    """The op that the message names."""
    return refusal.op.partition(".")[0]


def refusal_id(refusal: Refusal) -> str:
    def word(value):
        if isinstance(value, torch.Tensor):
            return f"tensor{tuple(value.shape)}"
        return getattr(value, "__name__", repr(value))

    changes = ",".join(f"{name}={word(value)}" for name, value in refusal.changes.items())
    return f"{refusal.op}-{changes}".replace(" ", "")


@pytest.mark.filterwarnings("ignore:.*prototype stage", "ignore:.*deprecated")
@pytest.mark.parametrize("refusal", REFUSALS, ids=refusal_id)
def test_bad_input_is_refused_before_anything_runs(refusal):
    arguments = good_arguments(refusal.op)
    # what has been checked once is checked for another call all the same
    call(refusal.op, **arguments)
    for name, change in refusal.changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    before = {
        name: (value.clone(), value._version)
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_nested
    }
    for _ in range(2):
        with (
            lm2.recording() as recorded,
            pytest.raises(refusal.error, match=f"^{op_name(refusal)}: {refusal.message}"),
        ):
            call(refusal.op, **arguments)
        assert recorded == []
    for name, (value, version) in before.items():
        assert arguments[name]._version == version
        assert value.is_meta or torch.equal(arguments[name], value)


@pytest.mark.parametrize("op", ["memory_attention", "memory_update", NORM, POOL])
def test_good_arguments_of_the_refusals_run(op):
    call(op, **good_arguments(op))


@pytest.mark.parametrize("layer", [lm2.PaperMemory, lm2.ReleaseMemory])
@pytest.mark.parametrize("name", ["x", "memory"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_layer_refuses_a_third_dtype_under_autocast(layer, name, dtype):
    arguments = good_arguments("forward")
    arguments[name] = arguments[name].to(dtype)
    message = (
        rf"^{layer.__name__}: {name} is {dtype}, but under autocast it must be one of .*float32"
    )
    with (
        torch.autocast("cpu", torch.bfloat16),
        lm2.recording() as recorded,
        pytest.raises(TypeError, match=message),
    ):
        layer(D, H)(**arguments)
    assert recorded == []


@pytest.mark.parametrize("op", ["memory_attention", "memory_update", NORM, POOL])
def test_unknown_backend_is_refused_with_the_choices(op):
    with pytest.raises(ValueError, match=r"backend must be one of .*'eager'.*, got 'cudnn'"):
        call(op, **good_arguments(op), backend="cudnn")


@pytest.mark.parametrize("layer", [lm2.PaperMemory, lm2.ReleaseMemory])
def test_unknown_backend_is_refused_by_the_constructors(layer):
    with pytest.raises(ValueError, match=r"backend must be one of .*'eager'.*, got 'cudnn'"):
        layer(D, H, backend="cudnn")


# --- not errors -------------------------------------------------------------------------------

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_case = pytest.mark.parametrize("case", testing.SMALL_CASES, ids=lambda case: case.id)


@every_backend
@every_case
def test_empty_batch_gives_empty_results_and_zero_gradients(case, backend):
    case = case._replace(batch=0)
    inputs = testing.make_inputs(case, torch.float32)
    results = testing.run_case(case, inputs, backend)
    expected = testing.run_reference(case, inputs)
    for name, result in results.items():
        assert result.shape == expected[name].shape
        assert result.dtype == expected[name].dtype
        assert not result.any()


@pytest.mark.parametrize(
    "layer",
    [
        lm2.PaperMemory(D, H),
        lm2.ReleaseMemory(D, H),
        lm2.ReleaseMemory(D, H, pooled_gate="prefix", num_blocks=2),
    ],
    ids=["paper", "release", "release-prefix"],
)
@pytest.mark.parametrize("slots", [T, N])
def test_empty_batch_through_a_layer(layer, slots):
    x = torch.randn(0, T, D, requires_grad=True)
    memory = torch.randn(0, slots, D, requires_grad=True)
    output, new_memory = layer(x, memory)
    assert output.shape == x.shape
    assert new_memory.shape == memory.shape
    inputs = [x, memory, *layer.parameters()]
    for tensor, grad in zip(
        inputs, torch.autograd.grad(output.sum() + new_memory.sum(), inputs), strict=True
    ):
        assert grad.shape == tensor.shape
        assert not grad.any()


def transposed(tensor):
    """The first two axes stored in the other order."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1) if tensor.dim() > 1 else tensor


def sliced(tensor):
    """Every second element of a wider row: the last axis is not contiguous."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), math.nan, dtype=tensor.dtype)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def inside_a_wider_row(tensor):
    """A chunk of a packed projection."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), math.nan, dtype=tensor.dtype)
    wide[..., 2:-1] = tensor
    return wide[..., 2:-1]


def offset_by_one(tensor):
    """Contiguous, but its storage begins one element early."""
    storage = torch.full((tensor.numel() + 1,), math.nan, dtype=tensor.dtype)
    storage[1:] = tensor.reshape(-1)
    return storage[1:].view(tensor.shape)


def expanded(tensor):
    """Stride 0 along the batch (other values, the same for the oracle)."""
    return tensor[:1].expand_as(tensor)


LAYOUTS = (transposed, sliced, inside_a_wider_row, offset_by_one, expanded)


@every_backend
@every_case
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_strides_do_not_change_the_values(case, layout, backend):
    inputs = testing.make_inputs(case, torch.float64, layout=layout)
    results = testing.run_case(case, inputs, backend)
    for comparison in testing.compare_case(case, inputs, results):
        assert comparison.passed, comparison


# one poisoned element each; a value of a slot that only `causal` hides is apart (docstring)
POISONED = {
    "memory_attention": ("query", "key", "value"),
    "memory_update": ("hidden", "candidate", "memory", "input_gate", "forget_gate", "output_gate"),
    "memory_update of several tokens": ("hidden", "candidate", "memory", "forget_gate", "read"),
    "residual_layer_norm": ("x", "residual", "weight", "bias"),
    "pooled_gate": ("x", "weight"),
}
POISON_CASES = {
    "memory_attention": testing.Case("memory_attention", 2, 4, 5, 2, 3, (("causal", False),)),
    "memory_update": testing.Case("memory_update", 2, 4, 0, 0, 6, (("output_gate", True),)),
    # more than are added up in one go
    "memory_update of several tokens": testing.Case(
        *("memory_update", 2, 40, 0, 0, 6),
        (("output_gate", True), ("read", True), ("tokens_per_slot", 37)),
    ),
    "residual_layer_norm": testing.Case("residual_layer_norm", 2, 4, 0, 0, 6),
    "pooled_gate": testing.Case("pooled_gate", 2, 4, 0, 0, 6, (("prefix", True),)),
}


@every_backend
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, names in POISONED.items() for name in names]
)
def test_non_finite_values_go_where_the_oracle_puts_them(op, name, poison, backend):
    case = POISON_CASES[op]
    inputs = testing.make_inputs(case, torch.float64)
    inputs.tensors[name].view(-1)[1] = poison
    results = testing.run_case(case, inputs, backend)
    expected = testing.run_reference(case, inputs)
    for result in results:
        if result.startswith("output"):
            assert torch.equal(results[result].isnan(), expected[result].isnan()), result
            assert torch.equal(results[result].isinf(), expected[result].isinf()), result
        else:
            # whether a gradient overflows to inf or to NaN is left to the order of operations
            assert torch.equal(results[result].isfinite(), expected[result].isfinite()), result


MASKED_CASES = [
    testing.Case("memory_attention", 2, 4, 6, 2, 3, options)
    for options in (
        (("slot_mask", "random"),),
        (("slot_mask", "random"), ("causal", False)),
        (("slot_mask", "prefix"), ("slot_offset", 1)),
        (("slot_mask", "random"), ("top_k", 2)),
        (("slot_mask", "random"), ("dropout_p", 0.4)),
    )
] + [
    # slots enough for runs of neighbours that take part, to a few rows and to a block of them
    testing.Case(
        "memory_attention", 2, tokens, 70, 2, 9, (("slot_mask", "random"), ("slot_offset", 60))
    )
    for tokens in (4, 9)
]


@every_backend
@pytest.mark.parametrize("case", MASKED_CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_a_masked_slot_holds_does_not_matter(case, poison, backend):
    inputs = testing.make_inputs(case, torch.float32)
    hidden = ~inputs.constants["slot_mask"]
    assert hidden.any()
    # what a kernel keeps from call to call: nothing of the next call's
    nowhere = testing.make_inputs(case, torch.float32)
    nowhere.constants.pop("slot_mask")
    nowhere.tensors["key"].fill_(poison)
    testing.run_case(case, nowhere, backend)
    clean = testing.run_case(case, inputs, backend)
    for name in ("key", "value"):
        inputs.tensors[name][hidden] = poison
    poisoned = testing.run_case(case, inputs, backend)
    for name, result in poisoned.items():
        assert torch.equal(result, clean[name]), name
    assert not poisoned["dkey"][hidden].any()
    assert not poisoned["dvalue"][hidden].any()


@every_backend
def test_any_number_of_tokens_per_slot_is_taken(backend):
    """More than there are is all of them, and takes no more memory or time."""
    case = testing.Case("memory_update", 2, 5, 0, 0, 8, (("output_gate", True),))
    results = []
    for tokens_per_slot in (5, 2**62):
        options = (*case.options, ("tokens_per_slot", tokens_per_slot))
        inputs = testing.make_inputs(case._replace(options=options), torch.float32)
        leaves = {name: tensor.requires_grad_() for name, tensor in inputs.tensors.items()}
        outputs = lm2.memory_update(**leaves, **inputs.constants, backend=backend)
        gradients = torch.autograd.grad(outputs, list(leaves.values()), inputs.cotangents)
        results.append([*outputs, *gradients])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_row_that_sees_no_slot_reads_and_passes_zero(dtype, backend):
    # slots 0 and 1 are hidden: tokens 0 and 1 see nothing
    case = testing.Case("memory_attention", 2, 4, 6, 2, 3, (("slot_mask", "prefix"),))
    inputs = testing.make_inputs(case, dtype)
    blind = slice(0, 2)
    inputs.cotangents[0][:, 2:] = 0.0
    results = testing.run_case(case, inputs, backend)
    assert not results["output 0"][:, blind].any()
    assert results["output 0"][:, 2:].all()
    for name in ("dquery", "dkey", "dvalue"):
        assert not results[name].any(), name


@every_backend
def test_all_slots_hidden_reads_and_passes_zero(backend):
    case = testing.Case("memory_attention", 2, 4, 6, 2, 3, (("slot_mask", "random"),))
    inputs = testing.make_inputs(case, torch.float32)
    inputs.constants["slot_mask"][1] = False
    for name in ("key", "value"):
        inputs.tensors[name][1] = math.nan
    for name, result in testing.run_case(case, inputs, backend).items():
        assert not result[1].any(), name


def test_initial_memory_is_the_identity_repeated():
    memory = lm2.initial_memory(2, 5, 3)
    rows = torch.eye(3)[torch.tensor([0, 1, 2, 0, 1])]
    assert torch.equal(memory, rows.expand(2, 5, 3))
    assert memory.is_contiguous()


def test_initial_memory_is_square_unless_told():
    assert torch.equal(lm2.initial_memory(1, 4), torch.eye(4)[None])


def test_initial_memory_of_zeros_in_a_dtype():
    memory = lm2.initial_memory(2, 3, 4, kind="zeros", dtype=torch.bfloat16, device="cpu")
    assert torch.equal(memory, torch.zeros(2, 3, 4, dtype=torch.bfloat16))


def test_initial_memory_with_fewer_slots_than_width():
    assert torch.equal(lm2.initial_memory(1, 2, 4)[0], torch.eye(4)[:2])


def test_initial_memory_of_an_empty_batch():
    assert lm2.initial_memory(0, 3, 4).shape == (0, 3, 4)


def test_error_text_keeps_its_parts_together():
    """One message in full, as a user sees it."""
    text = (
        "memory_attention: value is torch.float64 but torch.float32 was expected, the dtype of "
        "the other tensors; cast one or use torch.autocast"
    )
    arguments = good_arguments("memory_attention")
    arguments["value"] = arguments["value"].double()
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        functional.memory_attention(**arguments)
