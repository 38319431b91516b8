"""The common suite: every op on every backend against the float64 oracle, forward and gradients.

Triton's kernels run on the CPU: the launches of the cases are compiled for a GPU target as the
launcher asks for it, and their resources are checked; all are interpreted with every address
checked and the programs in shuffled order. The CUDA C++ kernels run on the CPU as "cpp-cuda", in an
emulator that takes blocks and threads in random order; "cpp-avx512" emulates what this processor
may lack.
"""

import contextlib
import functools
import itertools
import math

import pytest
import torch

import lm2_kernels as lm2
from lm2_kernels import backends, testing
from lm2_kernels.backends.contract import NORM
from tools import launches, norms
from tools.emulated_avx512 import avx512_reason, emulated_avx512
from tools.emulated_cuda import emulated_cuda, emulation_reason
from tools.interpreter import run_python
from tools.native import cpp_reason, needs_cpp
from tools.rounding import assert_rule

CPU_DTYPES = ("float32", "bfloat16", "float16", "float64")
GPU_DTYPES = ("float32", "bfloat16", "float16")
# which dtypes each backend is tested in here, and why it cannot be
BACKENDS = {
    "eager": (CPU_DTYPES, None),
    "cpp": (CPU_DTYPES, cpp_reason()),
    "triton": (GPU_DTYPES, None),
    "cpp-avx512": (CPU_DTYPES, avx512_reason()),
    "cpp-cuda": (GPU_DTYPES, emulation_reason()),
}
CPU_LEVELS = ("base", "avx2", "avx512", "avx512_bf16")
# Triton compiles every case in bfloat16 and float32; in float16 attention once a target, and the
# other ops once: the rest is numbers
_FLOAT16_COMPILED = {case.op: case for case in reversed(testing.SMALL_CASES)}.values()
_FLOAT16_COMPILED = (*testing.SMALL_CASES[2:6], *_FLOAT16_COMPILED)
# these run in an emulator or interpreter
SLOW_BACKENDS = ("triton", "cpp-cuda")


def _param(backend, *values, id):
    reason = BACKENDS[backend][1]
    marks = pytest.mark.skipif(reason is not None, reason=f"{backend}: {reason}")
    return pytest.param(backend, *values, id=f"{backend}-{id}", marks=marks)


def _every_backend():
    params = [_param(backend, id="") for backend in BACKENDS]
    return pytest.mark.parametrize("backend", params)


@contextlib.contextmanager
def _on(backend: str, op: str, index: int = 0, compiled: bool = False):
    """The backend made runnable on this machine, and a check of which one ran.

    Skips where the backend has no such op: one may be there in eager first, and a backend may have
    some ops alone.
    """
    environment = contextlib.nullcontext()
    if backend == "triton":
        # the numerics of a case do not depend on the target, its tiles do: take turns
        targets = tuple(launches.TARGETS)
        run = launches.checked if compiled else launches.interpreted
        environment = run(targets[index % len(targets)], shuffle=index)
    elif backend == "cpp-avx512":
        environment = emulated_avx512()
    elif backend == "cpp-cuda":
        environment = emulated_cuda(seed=index)
    with lm2.recording() as ran, environment:
        absent = f"it has no {op}"
        if backends.unsupported_reason(_name(backend), op) == absent:
            pytest.skip(f"{backend}: {absent}")
        yield
    names = {name for _, name in ran}
    assert names and names <= {_name(backend), f"{_name(backend)}/composite"}, names


def _name(backend):
    return backend.split("-")[0]


def _check(case, dtype, backend, **options):
    comparisons = testing.check_case(case, dtype, _name(backend), **options)
    worst = [c for c in comparisons if not c.passed]
    assert not worst, "\n".join(f"{c.name}: {c.max_share:.2f}, {c.rms_share:.2f}" for c in worst)


@pytest.mark.parametrize(
    ("shares", "passed", "draws"),
    (
        ([0.5], True, 1),
        ([1.1] + 8 * [0.8], True, 9),
        (4 * [1.1] + 5 * [0.8], True, 9),
        (5 * [1.1] + 4 * [0.8], False, 9),
        # luck does not explain a factor of two
        ([2.5], False, 1),
        ([1.1] + 7 * [0.8] + [2.5], False, 9),
        ([1.1] + 7 * [0.8] + [float("inf")], False, 9),
    ),
)
def test_narrow_failure_is_judged_by_the_median(monkeypatch, shares, passed, draws):
    taken = iter(shares)

    def compare_case(*_, **__):
        return [testing.Comparison("output", 0.5, next(taken))]

    monkeypatch.setattr(testing.rule, "compare_case", compare_case)
    (comparison,) = testing.check_case(testing.SMALL_CASES[0], torch.float32, "eager")
    assert comparison.passed == passed
    assert len(shares) - len(list(taken)) == draws


def _parameters():
    for backend, (dtypes, _) in BACKENDS.items():
        for index, case in enumerate(testing.CASES):
            if backend in SLOW_BACKENDS and case not in testing.SMALL_CASES:
                continue
            for dtype in dtypes:
                yield _param(backend, case, dtype, index, id=f"{dtype}-{case.id}")


@pytest.mark.parametrize(("backend", "case", "dtype", "index"), list(_parameters()))
def test_op_matches_oracle(backend, case, dtype, index, record_property):
    with _on(backend, case.op, index, compiled=dtype != "float16" or case in _FLOAT16_COMPILED):
        record_property("backend", backend)
        _check(case, testing.DTYPES[dtype], backend)


def _optional_norms():
    pairs = [(dtype, dtype) for dtype in CPU_DTYPES] + [("bfloat16", "float32")]
    for backend, (dtypes, _) in BACKENDS.items():
        for name, pair, shape in itertools.product(norms.NAMES, pairs, norms.SHAPES):
            # what eager has is the op's
            if backend != "eager" and set(pair) <= set(dtypes):
                sizes = "x".join(map(str, shape))
                yield _param(backend, name, pair, shape, id=f"{name}-{'-'.join(pair)}-{sizes}")


@pytest.mark.parametrize(("backend", "name", "dtypes", "shape"), list(_optional_norms()))
def test_optional_norms(backend, name, dtypes, shape):
    """They are those of the oracle, and where both compute the same, those of the op."""
    pair = [testing.DTYPES[dtype] for dtype in dtypes]

    def run(seed: int) -> list[testing.Comparison]:
        with _on(backend, NORM, seed):
            return norms.comparisons(_name(backend), name, shape, *pair, seed)

    assert_rule(run)
    with _on(backend, NORM):
        norms.assert_bits_of_the_op(_name(backend), name, shape, *pair)


@pytest.mark.parametrize("backend", [_param("cpp", id=""), _param("cpp-avx512", id="")])
def test_a_mean_beside_which_lanes_that_are_not_there_are_far(backend):
    """Of a row that is no whole number of vectors: deviations are 0, and so are gradients of x."""
    x, weight = torch.full((1, 2, 17), 1e36), torch.ones(17)
    mean, rstd = x[..., 0], torch.full((1, 2), 1e4)
    with _on(backend, NORM):
        given = (torch.ones_like(x), x, torch.zeros_like(x), weight, mean, rstd)
        dx, dweight, _ = backends.call("cpp", f"{NORM}_backward", *given, True, True)
    assert not dx.any() and not dweight.any()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize("case", testing.SHAPE_CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("backend", [_param(name, id="") for name in ("eager", "cpp")])
def test_op_matches_oracle_as_benchmarked(backend, case, dtype, record_property):
    record_property("backend", backend)
    with _on(backend, case.op):
        _check(case, testing.DTYPES[dtype], backend)


@pytest.mark.parametrize("scale", (5.0, 30.0))
@pytest.mark.parametrize("case", testing.SMALL_CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("backend", [_param(name, id="") for name in ("eager", "cpp")])
def test_op_large_values(backend, case, scale, record_property):
    record_property("backend", backend)
    # in a few nearly one-hot rows, who rounds better is luck, and no factor is too large for it
    _check(case, torch.float32, backend, scale=scale, narrow=math.inf)


# fewer slots than threads
LONG_SLOT = testing.Case("memory_update", 1, 150, 0, 0, 517, (("tokens_per_slot", 150),))


@needs_cpp
@pytest.mark.parametrize("case", (*testing.LARGE_CASES, LONG_SLOT), ids=lambda case: case.id)
def test_op_same_bits_for_any_number_of_threads(case, record_property):
    record_property("backend", "cpp")
    # enough batch rows and heads that the work is shared out
    case = case._replace(batch=2 * case.batch)
    inputs = testing.make_inputs(case, torch.float32)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            runs.append(testing.run_case(case, inputs, "cpp"))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        for name, tensor in runs[0].items():
            assert torch.equal(run[name], tensor), name


@needs_cpp
@pytest.mark.parametrize("level", CPU_LEVELS)
def test_every_simd_level(level, record_property):
    """The level is chosen once a process; a processor without it runs the best it has."""
    record_property("backend", "cpp")
    code = """
import torch
from lm2_kernels import backends, testing
from lm2_kernels.backends import extension
for case in testing.SMALL_CASES:
    for dtype in testing.DTYPES.values():
        worst = [c for c in testing.check_case(case, dtype, "cpp") if not c.passed]
        assert not worst, (case.id, dtype, worst)
print(extension.build_info()["SIMD level"])
"""
    result = run_python(code, LM2_KERNELS_CPU_LEVEL=level)
    assert result.returncode == 0, result.stderr
    assert CPU_LEVELS.index(result.stdout.strip()) <= CPU_LEVELS.index(level)


@needs_cpp
def test_unknown_simd_level_is_refused():
    code = "import torch, lm2_kernels as lm2; x = torch.ones(1, 1, 4); "
    code += "lm2.memory_update(x, x, x, x, x, backend='cpp')"
    result = run_python(code, LM2_KERNELS_CPU_LEVEL="neon")
    assert result.returncode == 1
    assert (
        "LM2_KERNELS_CPU_LEVEL must be base, avx2, avx512 or avx512_bf16, got neon" in result.stderr
    )


def _transposed(tensor):
    return tensor.transpose(0, 1).contiguous().transpose(0, 1) if tensor.dim() > 1 else tensor


def _last_axis_strided(tensor):
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def _column_slice(tensor):
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 13), float("nan"))
    wide = wide.to(tensor.dtype)
    wide[..., 5 : 5 + tensor.shape[-1]] = tensor
    return wide[..., 5 : 5 + tensor.shape[-1]]


def _offset_by_one(tensor):
    return torch.cat([tensor.new_full((1,), float("nan")), tensor.reshape(-1)])[1:].view(
        tensor.shape
    )


def _expanded(tensor):
    return tensor[:1].expand(tensor.shape) if tensor.dim() > 1 else tensor


LAYOUTS = (_transposed, _last_axis_strided, _column_slice, _offset_by_one, _expanded)


def _layout_parameters():
    smallest_first = sorted(testing.SMALL_CASES, key=lambda case: case.batch * case.tokens)
    one_each = {case.op: case for case in smallest_first if case.batch == 2}
    for backend in BACKENDS:
        for case in one_each.values():
            for layout in LAYOUTS:
                yield _param(backend, case, layout, id=f"{case.op}{layout.__name__}")


@pytest.mark.parametrize(("backend", "case", "layout"), list(_layout_parameters()))
def test_op_strided(backend, case, layout, record_property):
    record_property("backend", backend)
    given = []

    def remembered(tensor):
        tensor = layout(tensor)
        given.append((tensor, tensor.clone()))
        return tensor

    with _on(backend, case.op):
        _check(case, torch.float32, backend, layout=remembered)
    for tensor, copy in given:
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0)


def _same_along(axis):
    def layout(tensor):
        return tensor.narrow(axis, 0, 1).expand(tensor.shape)

    layout.__name__ = f"_same_along_{axis}"
    return layout


def _overlapping(tensor):
    return tensor.contiguous().as_strided(tensor.shape, (1,) * tensor.dim())


def _reversed_axes(tensor):
    axes = tuple(reversed(range(tensor.dim())))
    return tensor.permute(axes).contiguous().permute(axes)


ONE_OPERAND = (
    ("memory_attention", (("slot_mask", "random"), ("dropout_p", 0.25)), "query key value"),
    ("memory_attention", (("top_k", 2),), "query key value"),
    (
        "memory_update",
        (("output_gate", True), ("gate_bias", "prefix")),
        "hidden candidate memory input_gate forget_gate output_gate gate_bias",
    ),
    (
        "memory_update",
        (
            ("tokens_per_slot", 2),
            ("output_gate", True),
            ("read", True),
            ("gates", "slots"),
            ("gate_bias", "prefix"),
        ),
        "candidate memory read input_gate forget_gate output_gate gate_bias",
    ),
    ("residual_layer_norm", (), "x residual weight bias"),
    ("pooled_gate", (("prefix", True), ("num_pooled", 3)), "x weight pooled_sum"),
)


def _one_operand_parameters():
    for backend in BACKENDS:
        for op, options, names in ONE_OPERAND:
            attends = op == "memory_attention"
            sizes = (2, 5, 7, 2, 8) if attends else (2, 5, 0, 0, 8)
            case = testing.Case(op, *sizes, options)
            outputs = 2 if op in ("memory_update", "pooled_gate") else 1
            gradients = [f"gradient {index}" for index in range(outputs)]
            masks = ["slot_mask"] if case.option("slot_mask") else []
            for operand in (*names.split(), *gradients, *masks):
                label = "".join(
                    f"{name}-" for name in ("top_k", "tokens_per_slot") if case.option(name)
                )
                yield _param(backend, case, operand, id=f"{op}-{label}{operand}")


@pytest.mark.parametrize(("backend", "case", "operand"), list(_one_operand_parameters()))
def test_op_with_one_strided_operand(backend, case, operand, record_property):
    """Each tensor that an op is given, the small ones too, with strides of its own."""
    record_property("backend", backend)

    def laid_out(inputs, layout):
        if operand == "slot_mask":
            mask = layout(inputs.constants["slot_mask"])
            return inputs._replace(constants={**inputs.constants, "slot_mask": mask})
        if operand.startswith("gradient"):
            gradients = list(inputs.cotangents)
            place = int(operand.split()[1])
            gradients[place] = layout(gradients[place])
            return inputs._replace(cotangents=tuple(gradients))
        tensor = layout(inputs.tensors[operand])
        return inputs._replace(tensors={**inputs.tensors, operand: tensor})

    def run(seed, layout):
        inputs = testing.make_inputs(case, torch.float32, seed=seed)
        results, copies = (
            testing.run_case(case, laid_out(inputs, way), _name(backend), seed=seed)
            for way in (layout, lambda tensor: layout(tensor).contiguous())
        )
        if all(torch.equal(result, copies[name]) for name, result in results.items()):
            return [testing.Comparison("all", 0.0, 0.0)]
        # another order of sums
        return testing.compare_case(case, laid_out(inputs, layout), results, seed=seed)

    layouts = [_last_axis_strided, _overlapping, _reversed_axes]
    layouts += [_same_along(0), _same_along(-1)]
    with _on(backend, case.op):
        for layout in layouts:
            # of a few equal rows, who rounds better is luck, and no factor is too large for it
            assert_rule(functools.partial(run, layout=layout), narrow=math.inf)


@_every_backend()
@pytest.mark.parametrize("gate_bias", (None, "prefix"))
def test_gradient_of_a_shared_gate_is_rounded_once(backend, gate_bias, record_property):
    # not token by token before it is summed, which half of the elements would show
    record_property("backend", backend)
    options = {"tokens_per_slot": 8, "gates": "slots", "gate_bias": gate_bias}
    case = testing.Case("memory_update", 2, 40, 0, 0, 64, tuple(options.items()))
    same = []
    for seed in range(4):
        inputs = testing.make_inputs(case, torch.bfloat16, seed=seed)
        with _on(backend, case.op):
            grad = testing.run_case(case, inputs, _name(backend))["dinput_gate"]
        exact = testing.run_reference(case, inputs, torch.float64)["dinput_gate"]
        same.append(grad == exact.to(torch.bfloat16))
    assert torch.cat(same).double().mean() > 0.95


@_every_backend()
@pytest.mark.parametrize("tensor", ("memory", "output", "new memory"))
def test_infinities_of_a_slot_are_eagers(backend, tensor, record_property):
    """Nor does what a long sum has lost make a NaN of them."""
    record_property("backend", backend)
    options = {"tokens_per_slot": 70, "output_gate": True, "output": "memory", "gates": "slots"}
    case = testing.Case("memory_update", 2, 133, 0, 0, 20, tuple(options.items()))
    inputs = testing.make_inputs(case, torch.float32)
    output, new_memory = inputs.cotangents
    named = {**inputs.tensors, "output": output, "new memory": new_memory}
    named[tensor][0, 1, 3] = math.inf
    with _on(backend, case.op):
        results = testing.run_case(case, inputs, _name(backend))
    wanted = testing.run_case(case, inputs, "eager")
    assert any(x.isinf().any() for x in wanted.values())
    for name, x in results.items():
        for of in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(of(x), of(wanted[name])), name


@_every_backend()
@pytest.mark.parametrize("case", testing.SMALL_CASES[::3], ids=lambda case: case.id)
def test_op_deterministic(backend, case, record_property):
    record_property("backend", backend)
    inputs = testing.make_inputs(case, torch.float32)
    runs = []
    for index in (0, 4):
        # the same target, another order of programs
        with _on(backend, case.op, index):
            runs.append(testing.run_case(case, inputs, _name(backend)))
    for name in runs[0]:
        assert torch.equal(runs[0][name], runs[1][name]), name


@_every_backend()
@pytest.mark.parametrize("op", lm2.backends.OPS)
def test_op_empty_batch(backend, op, record_property):
    record_property("backend", backend)
    case = next(case for case in testing.SMALL_CASES if case.op == op)._replace(batch=0)
    inputs = testing.make_inputs(case, torch.float32)
    with _on(backend, op):
        results = testing.run_case(case, inputs, _name(backend))
    for name, tensor in inputs.tensors.items():
        assert results[f"d{name}"].shape == tensor.shape
        assert not results[f"d{name}"].any()


@_every_backend()
def test_residual_layer_norm_large_mean(backend, record_property):
    """Rows that are nearly constant: E[x^2] - E[x]^2 would have no digits left."""
    record_property("backend", backend)
    case = testing.Case("residual_layer_norm", 2, 9, 0, 0, 96)
    ramp = 1e3 + 1e-3 * torch.arange(96.0).expand(2, 9, 96)

    def run(seed):
        inputs = testing.make_inputs(case, torch.float32, seed=seed)
        inputs = inputs._replace(tensors={**inputs.tensors, "x": ramp, "residual": ramp.flip(1)})
        results = testing.run_case(case, inputs, _name(backend))
        return testing.compare_case(case, inputs, results)

    with _on(backend, "residual_layer_norm"):
        assert_rule(run)


@_every_backend()
def test_scores_of_minus_infinity_are_no_hidden_slots(backend, record_property):
    """A row that sees slots whose scores overflow is NaN, as in any softmax; one that sees no slot
    is 0. To confuse them would hide a divergence."""
    record_property("backend", backend)
    query, key = torch.full((1, 2, 1, 16), 1e20), torch.full((1, 4, 1, 16), -1e20)
    value = torch.ones(1, 4, 1, 16)
    with _on(backend, "memory_attention"):
        seen = lm2.memory_attention(query, key, value, causal=False, backend=_name(backend))
        hidden = lm2.memory_attention(
            query,
            key,
            value,
            causal=False,
            slot_mask=torch.zeros(1, 4, dtype=torch.bool),
            backend=_name(backend),
        )
    assert seen.isnan().all()
    assert not hidden.any()


@_every_backend()
@pytest.mark.parametrize("tokens", (3, 9))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_what_masked_slots_hold_does_not_matter(backend, tokens, dtype, record_property):
    record_property("backend", backend)
    options = (("slot_mask", "random"), ("slot_offset", 28))
    case = testing.Case("memory_attention", 2, tokens, 40, 2, 16, options)
    inputs = testing.make_inputs(case, testing.DTYPES[dtype])
    runs = []
    for poison in (0.0, float("nan")):
        for name in ("key", "value"):
            inputs.tensors[name][~inputs.constants["slot_mask"]] = poison
        with _on(backend, "memory_attention"):
            runs.append(testing.run_case(case, inputs, _name(backend)))
    for name, result in runs[0].items():
        assert torch.equal(result, runs[1][name]), name


@pytest.mark.parametrize("backend", [_param("cpp", id=""), _param("cpp-avx512", id="")])
def test_few_rows_reach_only_the_slots_they_see(backend, record_property):
    """Not a finite gradient times a weight of 0: 0 * NaN is NaN."""
    record_property("backend", backend)
    options = (("slot_mask", "prefix"),)
    case = testing.Case("memory_attention", 1, 4, 6, 2, 8, options)
    inputs = testing.make_inputs(case, torch.float32)
    first = int(inputs.constants["slot_mask"][0].int().argmax())
    assert 0 < first < 3
    inputs.tensors["query"][0, 0] = float("nan")  # sees nothing
    inputs.cotangents[0][0, first] = float("nan")  # sees the first slot that takes part
    with _on(backend, "memory_attention"):
        results = testing.run_case(case, inputs, _name(backend))
    for name in ("dkey", "dvalue"):
        assert results[name][0, first].isnan().all(), name
        assert results[name][0, :first].isfinite().all(), name
        assert results[name][0, first + 1 :].isfinite().all(), name


@_every_backend()
def test_strong_dropout_does_not_overflow_float16(backend, record_property):
    """The factor of what stays comes last: it is larger than any float16."""
    record_property("backend", backend)
    # one slot, all of whose weight is seen; so many tokens that kernels may sum in parts
    case = testing.Case("memory_attention", 1, 512, 1, 8, 16, (("dropout_p", 0.99999),))
    inputs = testing.make_inputs(case, torch.float16)
    small = inputs._replace(
        tensors={name: x / 256 for name, x in inputs.tensors.items()},
        cotangents=tuple(x / 256 for x in inputs.cotangents),
    )
    seed = next(s for s in range(1000) if testing.drawn_keep_mask(small, 0.99999, s).any())
    with _on(backend, case.op):
        results = testing.run_case(case, small, _name(backend), seed=seed)
    for name, x in results.items():
        assert x.isfinite().all(), name
    assert results["output 0"].any() and results["dvalue"].any()


def _with_a_key(value):
    def change(tensors):
        tensors["query"] = tensors["query"].abs()
        tensors["key"][:, 1] = value

    return change


def _scaled(factor):
    def change(tensors):
        tensors["query"] *= factor

    return change


EXTREMES = {
    "logits of 1e4": _scaled(1e4),
    "logits of 1e5": _scaled(1e5),
    "logits of 1e6": _scaled(1e6),
    "logits of 1e8": _scaled(1e8),
    "logits of -1e8": _scaled(-1e8),
    "logits of 1e15": _scaled(1e15),
    "logits of 1e30": _scaled(1e30),
    "a key of -inf": _with_a_key(-math.inf),
    "a key of -1e37": _with_a_key(-1e37),
}


@_every_backend()
@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize(
    "options", ((), (("slot_mask", "prefix"),), (("dropout_p", 0.3),)), ids=str
)
@pytest.mark.parametrize("tokens", (3, 20))
def test_extreme_logits(backend, extreme, options, tokens, record_property):
    """The read, and what reaches the values, by the rule; every gradient finite where eager's is.

    Tokens that see nothing are there too. Nothing more can be asked where scores round by more than
    they differ: the next test has scores that do not round.
    """
    record_property("backend", backend)
    case = testing.Case("memory_attention", 1, tokens, 24, 2, 16, options)

    def run(seed):
        inputs = testing.make_inputs(case, torch.float32, seed=seed)
        EXTREMES[extreme](inputs.tensors)
        eager = testing.run_reference(case, inputs, seed=seed)
        got = testing.run_case(case, inputs, _name(backend), seed=seed)
        for name, result in got.items():
            assert result.isfinite().logical_or(~eager[name].isfinite()).all(), name
        results = {name: got[name] for name in ("output 0", "dvalue")}
        return testing.compare_case(case, inputs, results, seed=seed)

    with _on(backend, "memory_attention"):
        assert_rule(run, narrow=math.inf)


def _whole_numbers(case, dtype, size, seed):
    """Inputs whose products q k are exact in float32, whatever the order: many scores of a row tie.

    The mean of up to six values is exact too, in 16 bits as well.
    """
    inputs = testing.make_inputs(case, dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, unit in (("query", size), ("key", size), ("value", 60 / 256)):
        tensor = inputs.tensors[name]
        tensor.copy_(torch.randint(-2, 3, tensor.shape, generator=generator) * unit)
    return inputs


def _compare_with_float32(case, inputs, backend, seed, units):
    """The rule for results in these units, beside the oracle in float32.

    In 16 bits the scores of the oracle's own arithmetic would overflow.
    """
    plain = testing.run_reference(case, inputs, torch.float32, seed=seed)
    oracle = testing.run_reference(case, inputs, torch.float64, seed=seed)
    got = testing.run_case(case, inputs, _name(backend), seed=seed)
    return [
        testing.compare(
            name, got[name] / unit, oracle[name] / unit, plain[name].to(got[name].dtype) / unit
        )
        for name, unit in units.items()
    ]


def _every_dtype(dtypes):
    return pytest.mark.parametrize(
        ("backend", "dtype"),
        [
            _param(backend, dtype, id=dtype)
            for backend, (known, _) in BACKENDS.items()
            for dtype in dtypes
            if dtype in known
        ],
    )


ATTENTION_OPTIONS = ((), (("slot_mask", "prefix"),), (("dropout_p", 0.5),))


@_every_dtype(GPU_DTYPES)
@pytest.mark.parametrize("size", (2.0**6, 2.0**13, 2.0**40))
def test_extreme_logits_that_tie(backend, dtype, size, record_property):
    """Every result and gradient by the rule: what is one-hot stays so, equal slots share."""
    record_property("backend", backend)
    if dtype == "float16" and size > torch.finfo(torch.float16).max:
        size = 2.0**10
    for options, scale, tokens in itertools.product(ATTENTION_OPTIONS, (0.5, -0.5, 0.0), (3, 20)):
        # rows so few have tiles of their own, which differ by no sign of the scale
        if options and tokens == 3 and scale != 0.5:
            continue
        case = testing.Case("memory_attention", 1, tokens, 24, 2, 8, (*options, ("scale", scale)))

        def run(seed, case=case):
            inputs = _whole_numbers(case, testing.DTYPES[dtype], size, seed)
            units = {"dquery": size, "dkey": size, "output 0": 1.0, "dvalue": 1.0}
            return _compare_with_float32(case, inputs, backend, seed, units)

        with _on(backend, "memory_attention"):
            # the mean of seven is not exact: such a row may be in one draw or another
            assert_rule(run, narrow=math.inf)


@_every_dtype(GPU_DTYPES)
@pytest.mark.parametrize("power", (0, 3, 5))
def test_extreme_logits_that_nearly_tie(backend, dtype, power, record_property):
    """Units of the last place apart, and exact: the difference counts as it is."""
    record_property("backend", backend)
    case = testing.Case("memory_attention", 2, 20, 6, 2, 16, (("scale", 1.0), ("causal", False)))

    def run(seed):
        inputs = testing.make_inputs(case, testing.DTYPES[dtype], seed=seed)
        query, key = inputs.tensors["query"].zero_(), inputs.tensors["key"].zero_()
        generator = torch.Generator().manual_seed(seed)
        query[..., 0], key[..., 0] = 1024.0, 1024.0 * 2**power
        query[..., 1] = torch.randint(-2, 3, query.shape[:3], generator=generator)
        key[..., 1] = torch.randint(0, 6, key.shape[:3], generator=generator) * max(
            2 ** (power - 3), 1
        )
        units = {"output 0": 1.0, "dvalue": 1.0}
        return _compare_with_float32(case, inputs, backend, seed, units)

    with _on(backend, "memory_attention"):
        assert_rule(run)


@_every_backend()
def test_scale_of_zero_reads_the_mean_of_any_slots(backend, record_property):
    """Products may be as large as they can be."""
    record_property("backend", backend)
    options = (("scale", 0.0), ("causal", False))
    case = testing.Case("memory_attention", 1, 5, 24, 2, 8, options)

    def run(seed):
        inputs = testing.make_inputs(case, torch.float32, seed=seed)
        for name in ("query", "key"):
            inputs.tensors[name].clamp_(-2.0, 2.0).mul_(3e18)
        results = testing.run_case(case, inputs, _name(backend), seed=seed)
        assert not results["dquery"].any() and not results["dkey"].any()
        read = {"output 0": results["output 0"]}
        return testing.compare_case(case, inputs, read, seed=seed)

    with _on(backend, "memory_attention"):
        assert_rule(run)


@_every_dtype(("bfloat16", "float16"))
@pytest.mark.parametrize("size", (1e2, 1e4))
@pytest.mark.parametrize("ties", (False, True), ids=("", "ties"))
def test_extreme_logits_are_finite_in_16_bits(backend, dtype, size, ties, record_property):
    """Wherever they are in eager, up to the largest numbers there are."""
    record_property("backend", backend)
    for seed, options in enumerate((*ATTENTION_OPTIONS, (("scale", 0.0),)) * 3):
        case = testing.Case("memory_attention", 1, 20, 24, 2, 16, options)
        inputs = testing.make_inputs(case, testing.DTYPES[dtype], seed=seed)
        for name in ("query", "key"):
            inputs.tensors[name] *= size
        if ties:
            inputs.tensors["key"][:, 1::2] = inputs.tensors["key"][:, ::2]
        eager = testing.run_case(case, inputs, "eager", seed=seed)
        with _on(backend, "memory_attention"):
            got = testing.run_case(case, inputs, _name(backend), seed=seed)
        for name, result in got.items():
            assert result.isfinite().logical_or(~eager[name].isfinite()).all(), (seed, name)


@_every_backend()
@pytest.mark.parametrize("size", (1e4, -1e4, 1e20, -1e20, 1e30, -1e30))
def test_extreme_inputs_of_the_other_ops(backend, size, record_property):
    """Results and gradients are finite where those of the oracle in float32 are, and nowhere else.

    The square of 1e20 overflows.
    """
    record_property("backend", backend)
    cases = {
        "input_gate": testing.Case("memory_update", 1, 3, 0, 0, 8, (("output_gate", True),)),
        "forget_gate": testing.Case("memory_update", 1, 3, 0, 0, 8),
        "output_gate": testing.Case("memory_update", 1, 3, 0, 0, 8, (("output_gate", True),)),
        "gate_bias": testing.Case("memory_update", 1, 3, 0, 0, 8, (("gate_bias", "segment"),)),
        "candidate": testing.Case("memory_update", 1, 3, 0, 0, 8),
        "x": testing.Case("residual_layer_norm", 1, 3, 0, 0, 8),
        "weight": testing.Case("pooled_gate", 1, 3, 0, 0, 8, (("prefix", True),)),
    }
    for name, case in cases.items():
        inputs = testing.make_inputs(case, torch.float32)
        tensor = inputs.tensors[name]
        tensor.copy_(torch.full_like(tensor, size) * tensor.sign() if name == "x" else size)
        want = testing.run_reference(case, inputs)
        with _on(backend, case.op):
            got = testing.run_case(case, inputs, _name(backend))
        for result in want:
            assert torch.equal(got[result].isfinite(), want[result].isfinite()), (name, result)


# queries and keys whose scores tie: in every row all slots, or all but one
TIES = {
    "zero queries": lambda query, key: (torch.zeros_like(query), key),
    "zeros of both signs": lambda query, key: (query * 0.0, key),
    "equal keys": lambda query, key: (query, key[:, :1].expand(key.shape)),
    "one larger": lambda query, key: (
        query.abs(),
        torch.where(torch.arange(key.shape[1])[:, None, None] == 7, 1.0, -torch.ones_like(key)),
    ),
}


@_every_backend()
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("tokens", (3, 9))
def test_of_equal_scores_top_k_keeps_the_lower_slots(backend, ties, dtype, tokens, record_property):
    """Forward and backward, and in the oracle: what reads the values tells which were kept."""
    if testing.unsupported_reason(_name(backend), "memory_attention", testing.DTYPES[dtype], "cpu"):
        dtype = "float32"
    record_property("backend", backend)
    dtype = testing.DTYPES[dtype]
    query, key = TIES[ties](torch.randn(1, tokens, 1, 8), torch.randn(1, 40, 1, 8))
    mask = torch.arange(40)[None] != 1
    options = {"top_k": 5, "slot_mask": mask, "slot_offset": 30, "causal": tokens == 9}
    expected = [0, 2, 3, 4, 7] if ties == "one larger" else [0, 2, 3, 4, 5]

    def kept(function):
        leaves = [x.to(dtype) for x in (query, key)]
        value = torch.eye(40).view(1, 40, 1, 40).to(dtype)
        # head widths are equal
        leaves = [torch.nn.functional.pad(x, (0, 32)).requires_grad_() for x in leaves]
        value.requires_grad_()
        read = function(*leaves, value, **options)
        read.sum().backward()
        read, flows = read[0, :, 0] != 0, value.grad[0, :, 0, 0] != 0
        assert (read == read[:1]).all()
        return read[0].nonzero().flatten().tolist(), flows.nonzero().flatten().tolist()

    with _on(backend, "memory_attention"):
        got = kept(functools.partial(lm2.memory_attention, backend=_name(backend)))
    assert got == kept(lm2.reference.memory_attention) == (expected, expected)
