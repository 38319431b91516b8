"""What autograd promises for every op: which gradients, what is saved, and what is refused."""

import functools
import itertools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.utils.checkpoint import checkpoint

import lm2_kernels as lm2
from lm2_kernels import functional, reference, testing
from lm2_kernels.testing.cases import Case
from tools.native import needs_cpp

BACKENDS = ("eager", pytest.param("cpp", marks=needs_cpp))
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def attention(**options) -> Case:
    return Case("memory_attention", 2, 5, 7, 2, 4, tuple(options.items()))


def update(**options) -> Case:
    return Case("memory_update", 2, 5, 0, 0, 4, tuple(options.items()))


def norm(**options) -> Case:
    return Case("residual_layer_norm", 2, 5, 0, 0, 6, tuple(options.items()))


def pool(**options) -> Case:
    return Case("pooled_gate", 2, 5, 0, 0, 4, tuple(options.items()))


# one case an op, with as many inputs as it takes
FULL = [
    attention(slot_mask="random", slot_offset=1),
    update(output_gate=True, gate_bias="segment", read=True, tokens_per_slot=2),
    norm(),
    pool(prefix=True, num_pooled=3),
]
# every option of every op
EVERY_OPTION = [
    attention(),
    attention(causal=False),
    attention(slot_offset=2),
    attention(slot_mask="random"),
    attention(slot_mask="prefix", slot_offset=1),
    attention(scale=-0.7),
    attention(top_k=2),
    attention(dropout_p=0.4),
    attention(top_k=3, dropout_p=0.3, slot_mask="random", causal=False),
    update(),
    update(output_gate=True),
    update(output_gate=True, output="memory"),
    update(broadcast=True),
    update(output_gate=True, broadcast=True),
    update(gate_bias="segment"),
    update(gate_bias="prefix", output_gate=True),
    update(output_gate=True, read=True),
    update(tokens_per_slot=2),
    update(tokens_per_slot=2, output_gate=True),
    update(tokens_per_slot=2, output_gate=True, read=True),
    update(tokens_per_slot=2, gate_bias="prefix", gates="slots"),
    update(tokens_per_slot=9, output_gate=True, output="memory", gate_bias="segment"),
    norm(),
    pool(),
    pool(prefix=True),
    pool(prefix=True, num_pooled=3),
]


def case_id(case: Case) -> str:
    return case.id


every_op = pytest.mark.parametrize("case", FULL, ids=case_id)
every_option = pytest.mark.parametrize("case", EVERY_OPTION, ids=case_id)


def run_op(case: Case, inputs: testing.Inputs, backend: str, tensors=None) -> tuple:
    """The op's outputs as a tuple, on the inputs' tensors or those given."""
    torch.manual_seed(0)
    function = getattr(functional, case.op)
    outputs = function(**(tensors or inputs.tensors), **inputs.constants, backend=backend)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def make_leaves(inputs: testing.Inputs, needed=None) -> dict[str, torch.Tensor]:
    """The tensors anew, taking gradients: all of them, or those named."""
    return {
        name: tensor.detach().clone().requires_grad_(needed is None or name in needed)
        for name, tensor in inputs.tensors.items()
    }


def all_gradients(case: Case, inputs: testing.Inputs, backend: str) -> dict[str, torch.Tensor]:
    leaves = make_leaves(inputs)
    outputs = run_op(case, inputs, backend, leaves)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), inputs.cotangents)
    return dict(zip(leaves, gradients, strict=True))


def subsets(names: list[str]) -> list[tuple[str, ...]]:
    """All subsets of up to 4 names; of more, each alone and each one missing."""
    sizes = range(1, len(names)) if len(names) <= 4 else (1, len(names) - 1)
    return [subset for size in sizes for subset in itertools.combinations(names, size)]


SUBSETS = [
    (case, needed)
    for case in FULL
    for needed in subsets(list(testing.make_inputs(case, torch.float32).tensors))
]


@every_backend
@pytest.mark.parametrize(
    ("case", "needed"), SUBSETS, ids=[f"{case.op}-{'+'.join(n)}" for case, n in SUBSETS]
)
def test_gradients_of_a_subset_are_those_of_all(case, needed, backend):
    """Bit for bit, and None for the others."""
    inputs = testing.make_inputs(case, torch.float32)
    expected = all_gradients(case, inputs, backend)
    leaves = make_leaves(inputs, needed)
    outputs = run_op(case, inputs, backend, leaves)
    returned = []
    outputs[0].grad_fn.register_hook(lambda gradients, _: returned.append(gradients))
    torch.autograd.backward(outputs, inputs.cotangents)
    assert sum(gradient is not None for gradient in returned[0]) == len(needed)
    for name, leaf in leaves.items():
        if name in needed:
            assert torch.equal(leaf.grad, expected[name]), name
        else:
            assert leaf.grad is None, name


@every_backend
@pytest.mark.parametrize(
    "case", [case for case in FULL if case.op in ("memory_update", "pooled_gate")], ids=case_id
)
@pytest.mark.parametrize("used", [0, 1])
def test_an_unused_output_counts_as_zero(case, used, backend):
    inputs = testing.make_inputs(case, torch.float64)
    leaves, zeroed = make_leaves(inputs), make_leaves(inputs)
    output = run_op(case, inputs, backend, leaves)[used]
    got = torch.autograd.grad(
        output, list(leaves.values()), inputs.cotangents[used], allow_unused=True
    )
    cotangents = [torch.zeros_like(cotangent) for cotangent in inputs.cotangents]
    cotangents[used] = inputs.cotangents[used]
    outputs = run_op(case, inputs, backend, zeroed)
    expected = torch.autograd.grad(outputs, list(zeroed.values()), cotangents)
    for name, gradient, zero in zip(leaves, got, expected, strict=True):
        # None where nothing depends on the input
        assert not zero.any() if gradient is None else torch.equal(gradient, zero), name


def inputs_without_gradient(case: Case, function, used, wrap=lambda step: step) -> set[str]:
    """Which inputs a loss on the outputs ``used`` leaves without a gradient."""
    inputs = testing.make_inputs(case, torch.float32)
    leaves = make_leaves(inputs)
    constants = {n: value for n, value in inputs.constants.items() if n != "dropout_p"}

    def loss():
        outputs = function(**leaves, **constants)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum(outputs[index].sum() for index in used)

    wrap(loss)().backward()
    return {name for name, leaf in leaves.items() if leaf.grad is None}


USED = [
    (case, used)
    for case in EVERY_OPTION
    for used in ([(0,), (1,), (0, 1)] if case.op in ("memory_update", "pooled_gate") else [(0,)])
]


@every_backend
@pytest.mark.parametrize(("case", "used"), USED, ids=[f"{c.id}-{u}" for c, u in USED])
def test_no_gradient_where_nothing_flows(case, used, backend):
    """None as the oracle's, not zeros, which an optimiser would decay weights by."""
    function = functools.partial(getattr(functional, case.op), backend=backend)
    want = inputs_without_gradient(case, getattr(reference, case.op), used)
    assert inputs_without_gradient(case, function, used) == want


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("output", ["read", "memory"])
def test_compiled_has_no_gradient_where_nothing_flows(output, used):
    torch._dynamo.reset()
    case = update(output_gate=True, gate_bias="segment", output=output)
    want = inputs_without_gradient(case, reference.memory_update, (used,))
    compiled = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    assert inputs_without_gradient(case, lm2.memory_update, (used,), compiled) == want


@every_backend
def test_no_kernel_runs_for_what_nothing_flows_to(backend):
    inputs = testing.make_inputs(update(output_gate=True), torch.float32)
    leaves = make_leaves(inputs, ("hidden", "input_gate", "forget_gate", "memory"))
    output, _ = lm2.memory_update(**leaves, backend=backend)
    with lm2.recording() as recorded:
        output.sum().backward()
    assert not recorded
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == {"hidden"}


@every_backend
@every_op
def test_gradient_of_a_sum(case, backend):
    """Stride 0 along every axis of the incoming gradient."""
    inputs = testing.make_inputs(case, torch.float32)
    ones = inputs._replace(cotangents=tuple(torch.ones_like(c) for c in inputs.cotangents))
    expected = all_gradients(case, ones, backend)
    leaves = make_leaves(inputs)
    sum(output.sum() for output in run_op(case, inputs, backend, leaves)).backward()
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, expected[name]), name


def turned(tensor):
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def every_second(tensor):
    return torch.stack((tensor, tensor.new_full(tensor.shape, float("nan"))), -1).flatten(-2)[
        ..., ::2
    ]


@every_backend
@every_op
@pytest.mark.parametrize("layout", [turned, every_second], ids=lambda layout: layout.__name__)
def test_strided_incoming_gradients(case, layout, backend):
    inputs = testing.make_inputs(case, torch.float64)
    strided = inputs._replace(cotangents=tuple(layout(c) for c in inputs.cotangents))
    results = testing.run_case(case, strided, backend)
    for comparison in testing.compare_case(case, inputs, results):
        assert comparison.passed, comparison


@every_backend
@every_option
def test_nothing_is_written_to(case, backend):
    """Inputs, saved tensors and incoming gradients keep their values and versions."""
    inputs = testing.make_inputs(case, torch.float32)
    leaves = make_leaves(inputs)
    before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run_op(case, inputs, backend, leaves)
    for name, leaf in leaves.items():
        assert leaf._version == 0
        assert torch.equal(leaf, before[name])
    tensors = [*leaves.values(), *inputs.cotangents, *inputs.constants.values(), *outputs, *saved]
    kept = [(t, t._version, t.detach().clone()) for t in tensors if torch.is_tensor(t)]
    torch.autograd.backward(outputs, inputs.cotangents)
    assert saved
    for tensor, version, copy in kept:
        assert tensor._version == version
        assert torch.equal(tensor, copy)


@every_backend
@every_op
def test_changing_a_saved_tensor_is_noticed(case, backend):
    saved = {
        "memory_attention": ("query", "key", "value"),
        "memory_update": (
            *("candidate", "memory", "read"),
            *("input_gate", "forget_gate", "output_gate", "gate_bias"),
        ),
        "residual_layer_norm": ("x", "residual", "weight"),
        "pooled_gate": ("x", "weight"),
    }
    inputs = testing.make_inputs(case, torch.float32)
    for name in saved[case.op]:
        leaves = make_leaves(inputs)
        # a leaf that takes gradients cannot be changed in place
        changed = leaves[name] * 1.0
        outputs = run_op(case, inputs, backend, leaves | {name: changed})
        with torch.no_grad():
            changed.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.backward(outputs, inputs.cotangents)


@every_backend
def test_changing_the_read_result_is_noticed(backend):
    inputs = testing.make_inputs(FULL[0], torch.float32)
    (output,) = run_op(FULL[0], inputs, backend, make_leaves(inputs))
    with torch.no_grad():
        output.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


# --- second derivatives, forward mode, vmap ----------------------------------------------------


def first_gradient(case: Case, inputs: testing.Inputs, backend: str):
    """The gradient of the first input under create_graph=True, and the loss."""
    leaves = make_leaves(inputs)
    outputs = run_op(case, inputs, backend, leaves)
    loss = sum(output.square().sum() for output in outputs)
    leaf = leaves["candidate" if "candidate" in leaves else next(iter(leaves))]
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    return leaf, gradient, loss


@every_backend
@every_op
def test_create_graph_alone_is_no_error(case, backend):
    inputs = testing.make_inputs(case, torch.float32)
    _, gradient, _ = first_gradient(case, inputs, backend)
    assert gradient.requires_grad


@every_backend
@every_op
def test_double_backward_is_refused(case, backend):
    leaf, gradient, _ = first_gradient(case, testing.make_inputs(case, torch.float32), backend)
    message = (
        f"^{case.op}: double backward is not supported; for second derivatives use .*reference"
    )
    with pytest.raises(NotImplementedError, match=message):
        torch.autograd.grad(gradient.sum(), leaf)


@every_backend
@every_op
def test_gradient_penalty_is_refused(case, backend):
    """The gradient's own gradient is asked for beside the loss's: it must not be left out.

    The incoming gradient needs no gradient itself, which is where once_differentiable stays silent.
    """
    inputs = testing.make_inputs(case, torch.float32)
    leaves = make_leaves(inputs)
    leaf = leaves["candidate" if "candidate" in leaves else next(iter(leaves))]

    def loss():
        return sum(output.sum() for output in run_op(case, inputs, backend, leaves))

    (gradient,) = torch.autograd.grad(loss(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match=rf"^{case.op}: double backward is not supported"):
        (gradient.square().sum() + loss()).backward()


@every_backend
@every_op
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_forward_mode_is_refused(case, mode, backend):
    inputs = testing.make_inputs(case, torch.float32)
    with forward_ad.dual_level(), mode():
        duals = {
            name: forward_ad.make_dual(tensor, torch.ones_like(tensor))
            for name, tensor in inputs.tensors.items()
        }
        with pytest.raises(
            NotImplementedError, match=r"^lm2_kernels: forward-mode differentiation"
        ):
            run_op(case, inputs, backend, duals)


@every_backend
@every_op
def test_jvp_is_refused(case, backend):
    inputs = testing.make_inputs(case, torch.float32)

    def function(tensors):
        return run_op(case, inputs, backend, tensors)

    with pytest.raises(NotImplementedError, match=r"^lm2_kernels: forward-mode differentiation"):
        torch.func.jvp(function, (inputs.tensors,), (inputs.tensors,))


@every_backend
@every_op
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_vmap_is_refused(case, mode, backend):
    inputs = testing.make_inputs(case, torch.float32)
    stacked = {name: torch.stack((tensor,) * 2) for name, tensor in inputs.tensors.items()}
    with mode(), pytest.raises(NotImplementedError, match=r"^lm2_kernels: vmap is not supported"):
        torch.func.vmap(
            lambda tensors: run_op(case, inputs, backend, tensors), randomness="different"
        )(stacked)


@every_backend
@every_op
def test_jacrev_is_refused(case, backend):
    """It maps over the backward."""
    inputs = testing.make_inputs(case, torch.float32)
    with pytest.raises(NotImplementedError, match=r"^lm2_kernels: vmap is not supported"):
        torch.func.jacrev(lambda tensors: run_op(case, inputs, backend, tensors))(inputs.tensors)


def batched_gradient(function, x):
    """As ``torch.autograd.grad(is_grads_batched=True)`` takes it."""
    x = x.clone().requires_grad_()
    output = function(x)
    cotangents = torch.stack((torch.ones_like(output),) * 2)
    return torch.autograd.grad(output, x, cotangents, is_grads_batched=True)


def forward_gradient(function, x):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, torch.ones_like(x)))


VMAP, FORWARD = "vmap is not supported", "forward-mode differentiation is not supported"
DOUBLE = "double backward is not supported"
TRANSFORMS = {
    "jacobian": (
        VMAP,
        functools.partial(torch.autograd.functional.jacobian, vectorize=True),
    ),
    "jacobian, forward": (
        f"{FORWARD}|{VMAP}",
        functools.partial(
            torch.autograd.functional.jacobian, vectorize=True, strategy="forward-mode"
        ),
    ),
    "batched gradient": (VMAP, batched_gradient),
    "forward gradient": (FORWARD, forward_gradient),
    "hessian": (
        DOUBLE,
        lambda f, x: torch.autograd.functional.hessian(lambda x: f(x).square().sum(), x),
    ),
    "jvp": (FORWARD, lambda f, x: torch.func.jvp(f, (x,), (x,))),
    "jacrev": (VMAP, lambda f, x: torch.func.jacrev(f)(x)),
    "jacfwd": (f"{FORWARD}|{VMAP}", lambda f, x: torch.func.jacfwd(f)(x)),
    "vmap": (VMAP, lambda f, x: torch.func.vmap(f)(torch.stack((x, x)))),
    "compiled jvp": (
        FORWARD,
        lambda f, x: torch.compile(lambda x: torch.func.jvp(f, (x,), (x,))[1], backend="eager")(x),
    ),
}


def layer_output(kind, **options):
    layer = kind(8, 2, **options)
    bank = torch.randn(1, 5, 8)
    return lambda x: layer(x, bank)[0]


OF_ONE_TENSOR = {
    "memory_attention": lambda x: lm2.memory_attention(*(x[..., None],) * 3),
    "memory_update": lambda x: lm2.memory_update(x, x, x, x, x)[1],
    "residual_layer_norm": lambda x: functional.residual_layer_norm(x, x, x[0, 0], x[0, 0]),
    "pooled_gate": lambda x: functional.pooled_gate(x, x[0, 0])[0],
    "PaperMemory": layer_output(lm2.PaperMemory),
    "ReleaseMemory": layer_output(lm2.ReleaseMemory),
    "ReleaseMemory, prefix": layer_output(lm2.ReleaseMemory, pooled_gate="prefix"),
}


@every_backend
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", OF_ONE_TENSOR)
def test_what_is_refused_is_refused_by_every_way(name, transform, backend):
    torch._dynamo.reset()
    text, run = TRANSFORMS[transform]
    with lm2.use_backend(backend), pytest.raises(NotImplementedError, match=text):
        run(OF_ONE_TENSOR[name], torch.randn(1, 3, 8))


@every_backend
@every_op
def test_functional_grad_is_the_same(case, backend):
    inputs = testing.make_inputs(case, torch.float32)
    expected = all_gradients(case, inputs, backend)

    def loss(tensors):
        outputs = run_op(case, inputs, backend, tensors)
        return sum((o * c).sum() for o, c in zip(outputs, inputs.cotangents, strict=True))

    for name, gradient in torch.func.grad(loss)(inputs.tensors).items():
        assert torch.equal(gradient, expected[name]), name


# --- modes ------------------------------------------------------------------------------------


@every_backend
@every_op
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(case, mode, backend):
    """The same values, and nothing saved."""
    inputs = testing.make_inputs(case, torch.float32)
    leaves = make_leaves(inputs)
    expected = run_op(case, inputs, backend, leaves)
    saved = []
    with mode(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        outputs = run_op(case, inputs, backend, leaves)
    assert not saved
    for got, with_gradients in zip(outputs, expected, strict=True):
        assert not got.requires_grad
        assert torch.equal(got, with_gradients)


@every_backend
@every_op
def test_saved_tensors_elsewhere(case, backend):
    """Hooks that hand back copies: the same gradients."""
    inputs = testing.make_inputs(case, torch.float32)
    expected = all_gradients(case, inputs, backend)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        got = all_gradients(case, inputs, backend)
    assert all(torch.equal(got[name], gradient) for name, gradient in expected.items())


@every_backend
@every_op
def test_the_default_dtype_does_not_matter(case, backend):
    inputs = testing.make_inputs(case, torch.float32)
    expected = testing.run_case(case, inputs, backend)
    torch.set_default_dtype(torch.float64)
    try:
        got = testing.run_case(case, inputs, backend)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, result in expected.items():
        assert got[name].dtype == result.dtype
        assert torch.equal(got[name], result), name


@every_backend
@pytest.mark.parametrize("case", [*FULL, attention(dropout_p=0.5)], ids=case_id)
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "hooks"])
def test_checkpointing_recomputes_the_same(case, use_reentrant, backend):
    """Bit for bit, the dropout mask included."""
    inputs = testing.make_inputs(case, torch.float32)
    expected = all_gradients(case, inputs, backend)
    leaves = make_leaves(inputs)
    function = getattr(functional, case.op)

    def op(*tensors):
        named = dict(zip(leaves, tensors, strict=True))
        return function(**named, **inputs.constants, backend=backend)

    torch.manual_seed(0)
    with lm2.recording() as recorded:
        outputs = checkpoint(op, *leaves.values(), use_reentrant=use_reentrant)
        torch.manual_seed(1)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, inputs.cotangents)
    assert [function for function, _ in recorded].count(f"{case.op}_forward") == 2
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, expected[name]), name


@every_backend
@every_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_two_runs_are_bit_equal(case, dtype, backend):
    inputs = testing.make_inputs(case, dtype)
    first, second = (testing.run_case(case, inputs, backend) for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


@every_backend
@every_op
def test_backward_twice_with_a_retained_graph(case, backend):
    inputs = testing.make_inputs(case, torch.float32)
    leaves = make_leaves(inputs)
    outputs = run_op(case, inputs, backend, leaves)
    first, second = (
        torch.autograd.grad(outputs, list(leaves.values()), inputs.cotangents, retain_graph=True)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_one_tensor_in_two_roles():
    """Key and value from one tensor: its gradient is the sum of both."""
    inputs = testing.make_inputs(attention(), torch.float64)
    query, bank = inputs.tensors["query"], inputs.tensors["key"].requires_grad_()
    lm2.memory_attention(query, bank, bank).backward(inputs.cotangents[0])
    key, value = (bank.detach().clone().requires_grad_() for _ in range(2))
    lm2.memory_attention(query, key, value).backward(inputs.cotangents[0])
    assert torch.equal(bank.grad, key.grad + value.grad)


@every_option
def test_gradcheck(case):
    """Eager's hand-derived backward against finite differences, in float64."""
    sizes = {"tokens": 3, "slots": 4 if case.slots else 0, "width": 2}
    inputs = testing.make_inputs(case._replace(**sizes), torch.float64)
    leaves = make_leaves(inputs)

    def function(*tensors):
        return run_op(case, inputs, "eager", dict(zip(leaves, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, list(leaves.values()), nondet_tol=0.0)


# --- what is kept for backward ----------------------------------------------------------------


def saved_tensors(case: Case, inputs: testing.Inputs, backend: str):
    """What one forward saves, and the leaves it was given."""
    saved, leaves = [], make_leaves(inputs)

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run_op(case, inputs, backend, leaves)
    return saved, leaves, outputs


def own_bytes(saved, shared) -> int:
    """Bytes of the saved tensors that share no storage with the tensors given."""
    known = {tensor.untyped_storage().data_ptr() for tensor in shared}
    return sum(
        tensor.numel() * tensor.element_size()
        for tensor in saved
        if tensor.untyped_storage().data_ptr() not in known
    )


# T * N is more than any input has
B, T, N, H, D = 2, 128, 128, 3, 32


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 4}, {"dropout_p": 0.5}, {"slot_mask": "random"}],
    ids=["plain", "top_k", "dropout", "slot_mask"],
)
def test_memory_attention_saves_no_scores(options, dtype, backend):
    """query, key, value, out, mask by reference; of its own 8 B H T bytes, and 8 for the seed."""
    case = Case("memory_attention", B, T, N, H, 8, tuple(options.items()))
    inputs = testing.make_inputs(case, dtype)
    saved, leaves, outputs = saved_tensors(case, inputs, backend)
    assert all(tensor.numel() < T * N for tensor in saved)
    masks = [inputs.constants[name] for name in ("slot_mask",) if name in inputs.constants]
    own = own_bytes(saved, [*leaves.values(), *outputs, *masks])
    assert own == 8 * B * H * T + (8 if "dropout_p" in options else 0)


@every_backend
@pytest.mark.parametrize(
    "case",
    [
        Case("memory_update", B, T, 0, 0, D, (("output_gate", True), ("gate_bias", "prefix"))),
        Case(
            *("memory_update", B, T, 0, 0, D),
            (("output_gate", True), ("read", True), ("tokens_per_slot", 8)),
        ),
        Case("pooled_gate", B, T, 0, 0, D),
        Case("pooled_gate", B, T, 0, 0, D, (("prefix", True), ("num_pooled", 2))),
    ],
    ids=case_id,
)
def test_elementwise_ops_save_nothing_of_their_own(case, backend):
    saved, leaves, _ = saved_tensors(case, testing.make_inputs(case, torch.bfloat16), backend)
    assert own_bytes(saved, leaves.values()) == 0


@every_backend
def test_memory_update_does_not_keep_hidden(backend):
    case = Case("memory_update", B, T, 0, 0, D)
    saved, leaves, _ = saved_tensors(case, testing.make_inputs(case, torch.float32), backend)
    hidden = leaves["hidden"].data_ptr()
    assert saved
    assert all(tensor.data_ptr() != hidden for tensor in saved)


@every_backend
def test_residual_layer_norm_saves_two_statistics_a_row(backend):
    case = Case("residual_layer_norm", B, T, 0, 0, D)
    saved, leaves, _ = saved_tensors(case, testing.make_inputs(case, torch.bfloat16), backend)
    assert own_bytes(saved, leaves.values()) == 8 * B * T
