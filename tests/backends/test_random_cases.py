"""Random mixes of shapes, options and layouts, the same in every run."""

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lm2_kernels import testing
from lm2_kernels.chunks import num_rows
from tools import launches
from tools.native import needs_cpp

_settings = settings(
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@st.composite
def _attention_cases(draw, largest=40, most_slots=None):
    options = {
        "causal": draw(st.booleans()),
        "slot_offset": draw(st.integers(0, 12) | st.integers(0, most_slots or largest)),
        "scale": draw(st.sampled_from((None, -0.5, 0.0, 1.0))),
        "slot_mask": draw(st.sampled_from((None, "random", "prefix"))),
    }
    slots = draw(st.integers(1, most_slots or largest))
    if draw(st.booleans()):
        options["top_k"] = draw(st.integers(1, slots))
    if draw(st.booleans()):
        options["dropout_p"] = draw(st.sampled_from((0.1, 0.5, 0.9)))
    return testing.Case(
        "memory_attention",
        draw(st.integers(0, 3)),
        # often so few that a kernel may take another way
        draw(st.integers(1, 4) | st.integers(1, largest)),
        slots,
        draw(st.integers(1, 3)),
        draw(st.integers(1, 20)),
        tuple(options.items()),
    )


@st.composite
def _row_cases(draw):
    op = draw(st.sampled_from(("memory_update", "residual_layer_norm", "pooled_gate")))
    # few numbers normalise to nearly the same whatever they are: their gradient is rounding errors
    narrowest = 16 if op == "residual_layer_norm" else 1
    width = draw(st.integers(narrowest, 70))
    sizes = (draw(st.integers(0, 3)), draw(st.integers(1, 40)), 0, 0, width)
    options = {}
    if op == "memory_update":
        options["output_gate"] = draw(st.booleans())
        options["output"] = draw(st.sampled_from(("read", "memory")))
        options["broadcast"] = draw(st.booleans())
        options["gate_bias"] = draw(st.sampled_from((None, "segment", "prefix")))
        options["gates"] = draw(st.sampled_from((None, "slots")))
        # often one, and often more than there are tokens, or than are added up in one run
        options["tokens_per_slot"] = draw(st.just(1) | st.integers(1, 5) | st.integers(1, 45))
        shows_read = options["output_gate"] and options["output"] == "read"
        options["read"] = shows_read and draw(st.booleans())
    if op == "pooled_gate":
        options["prefix"] = draw(st.booleans())
        options["num_pooled"] = draw(st.integers(0, 5)) if options["prefix"] else 0
    return testing.Case(op, *sizes, tuple(options.items()))


def _transposed(tensor):
    return tensor.transpose(0, 1).contiguous().transpose(0, 1) if tensor.dim() > 1 else tensor


_layouts = st.sampled_from((None, _transposed))


def _check(backend, case, layout, dtype):
    comparisons = testing.check_case(case, dtype, backend, layout=layout)
    assert all(comparison.passed for comparison in comparisons), comparisons


@settings(_settings, max_examples=200)
@given(case=st.one_of(_attention_cases(), _row_cases()), layout=_layouts)
def test_random_case_eager(case, layout):
    _check("eager", case, layout, torch.float64)


@settings(_settings, max_examples=200)
@given(case=st.one_of(_attention_cases(most_slots=200), _row_cases()), layout=_layouts)
@needs_cpp
def test_random_case_cpp(case, layout):
    # with a scale of 0 all scores tie, and which of them top-k keeps is each backend's own
    assume(case.option("top_k") is None or case.option("scale") != 0.0)
    _check("cpp", case, layout, torch.float64)
    # in a handful of numbers, who rounds better is luck; of several tokens a slot there are fewer
    rows = num_rows(case.tokens, case.option("tokens_per_slot", 1))
    if case.batch * rows * case.width >= 100:
        _check("cpp", case, layout, torch.float16)


@settings(_settings, max_examples=25)
@given(case=st.one_of(_attention_cases(largest=25), _row_cases()), layout=_layouts)
def test_random_case_triton(case, layout):
    # float16, whose yardstick is less a matter of luck in tiny tensors than float32's
    with launches.interpreted("sm_90"):
        _check("triton", case, layout, torch.float16)
