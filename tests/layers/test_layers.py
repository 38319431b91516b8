"""The two layers: against the oracle and the golden tensors, in time, as modules, compiled."""

import contextlib
import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import lm2_kernels as lm2
from lm2_kernels import backends, reference, testing
from tools import golden
from tools.emulated_avx512 import every_level
from tools.interpreter import run_python
from tools.layers import B, D, H, N, T, draw, every_layer, make_inputs, make_layer, options_id
from tools.native import cpu_default, needs_cpp
from tools.products import large_products
from tools.rounding import assert_round_off, assert_rule

both_layers = pytest.mark.parametrize("kind", [lm2.PaperMemory, lm2.ReleaseMemory])


def oracle(layer, parameters, x, memory, **arguments):
    """The reference of a layer's options: output, memory and (release) the pooled sum."""
    shared = {
        "num_heads": layer.num_heads,
        "causal": layer.causal,
        "scale": layer.scale,
        "top_k": layer.top_k,
        "tokens_per_slot": layer.tokens_per_slot,
    }
    if isinstance(layer, lm2.PaperMemory):
        options = shared | {"output": layer.output} | arguments
        return reference.paper_memory(x, memory, parameters, **options)
    options = shared | {
        "num_blocks": layer.num_blocks,
        "attention_mlp_layers": len(layer.attention_mlp),
        "prefix": layer.pooled_gate == "prefix",
        "eps": layer.attended_memory_layernorm.eps,
    }
    return reference.release_memory(x, memory, parameters, **options, **arguments)


def own_parameters(layer) -> dict[str, torch.Tensor]:
    """Copies of the parameters that take gradients, the shared Linear once."""
    return {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal to float64 round-off."""
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert_round_off(tensor.detach(), expected[name].detach(), name)


def results(outputs, leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs and the gradients of the leaves, for drawn cotangents."""
    cotangents = [draw(*output.shape, seed=7 + i) for i, output in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    found = {f"output {index}": output for index, output in enumerate(outputs)}
    return found | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


# --- against the oracle -----------------------------------------------------------------------

ARGUMENTS = [
    {},
    {"slot_offset": 2},
    {"slot_mask": "random"},
    {"slot_offset": 1, "slot_mask": "random"},
]


@every_layer
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=options_id)
def test_layer_is_the_oracle(kind, options, arguments):
    """Outputs and the gradients of inputs and of every parameter."""
    layer, (x, memory) = make_layer(kind, **options), make_inputs()
    if "slot_mask" in arguments:
        mask = torch.rand(B, N, generator=torch.Generator().manual_seed(3)) < 0.6
        arguments = arguments | {"slot_mask": mask}
    leaves = dict(layer.named_parameters()) | {"x": x, "memory": memory}
    got = results(layer(x, memory, **arguments), leaves)
    parameters = own_parameters(layer)
    expected = oracle(layer, parameters, x, memory, **arguments)[:2]
    assert_same(got, results(expected, parameters | {"x": x, "memory": memory}))


@every_layer
@pytest.mark.parametrize(("tokens", "slots"), [(1, 1), (1, 5), (6, 6), (6, 13)])
def test_layer_is_the_oracle_at_any_shape(kind, options, tokens, slots):
    options = {**options, "top_k": min(options.get("top_k") or 1, slots)}
    layer, (x, memory) = make_layer(kind, **options), make_inputs(tokens, slots)
    got = layer(x, memory)
    expected = oracle(layer, layer.state_dict(), x, memory)
    for result, wanted in zip(got, expected, strict=False):
        assert_round_off(result, wanted, "output")


@pytest.mark.parametrize("path", golden.FILES, ids=lambda path: path.stem)
def test_golden_forward_and_gradients(path):
    case = golden.load(path)
    dim, options = case.inputs["x"].shape[-1], {"top_k": case.top_k, "dtype": torch.float64}
    if case.formulation == "paper":
        layer = lm2.PaperMemory(dim, case.num_heads, output=case.output, **options)
    else:
        layer = lm2.ReleaseMemory(dim, case.num_heads, num_blocks=case.num_blocks, **options)
    layer.load_state_dict(case.weights)
    leaves = dict(layer.named_parameters())
    leaves |= {name: tensor.requires_grad_() for name, tensor in case.inputs.items()}
    assert leaves.keys() == case.gradients.keys()
    outputs = layer(**case.inputs, slot_offset=case.slot_offset, slot_mask=case.slot_mask)
    assert_round_off(outputs[0], case.outputs[0], "y")
    assert_round_off(outputs[1], case.outputs[1], "memory")
    gradients = torch.autograd.grad(outputs, list(leaves.values()), case.cotangents)
    for name, gradient in zip(leaves, gradients, strict=True):
        # the released biases have no dimension
        assert_round_off(gradient, case.gradients[name].reshape(gradient.shape), f"d{name}")


@pytest.mark.parametrize("path", golden.FILES, ids=lambda path: path.stem)
def test_state_dict_goes_in_and_out_key_for_key(path):
    case = golden.load(path)
    kind = lm2.PaperMemory if case.formulation == "paper" else lm2.ReleaseMemory
    layer = kind(case.inputs["x"].shape[-1], case.num_heads, dtype=torch.float64)
    layer.load_state_dict(case.weights, strict=True)
    state = layer.state_dict()
    assert state.keys() == case.weights.keys()
    for name, weight in case.weights.items():
        # the released biases have no dimension, which torch takes ours for too
        assert torch.equal(state[name], weight.reshape(state[name].shape))


@both_layers
@pytest.mark.parametrize("kind_of_memory", ["identity", "zeros"])
def test_layer_takes_initial_memory(kind, kind_of_memory):
    layer = make_layer(kind)
    memory = lm2.initial_memory(B, N, D, kind=kind_of_memory, dtype=torch.float64)
    x = draw(B, T, D)
    assert_round_off(
        layer(x, memory)[1].detach(),
        oracle(layer, layer.state_dict(), x, memory)[1].detach(),
        "memory",
    )


# --- in time ----------------------------------------------------------------------------------

STREAMING = [
    (lm2.PaperMemory, {}),
    (lm2.PaperMemory, {"output": "memory", "top_k": 3}),
    (lm2.ReleaseMemory, {"pooled_gate": "prefix"}),
    (lm2.ReleaseMemory, {"pooled_gate": "prefix", "top_k": 3, "attention_mlp_layers": 3}),
]
SPLITS = [(7,), (3, 4), (1, 5, 1), (1,) * 7]


def in_pieces(layer, x, memory, split, **arguments):
    """The layer over pieces of x, each given the same incoming memory; results joined."""
    outputs, rows, start, pooled_sum = [], [], 0, None
    for length in split:
        end = start + length
        piece = dict(arguments, slot_offset=start)
        if isinstance(layer, lm2.ReleaseMemory) and layer.pooled_gate == "prefix":
            piece |= {"pooled_sum": pooled_sum, "return_pooled_sum": True}
        output, new_memory, *rest = layer(x[:, start:end], memory, **piece)
        pooled_sum = rest[0] if rest else None
        outputs.append(output)
        rows.append(new_memory[:, start:end])
        # the other rows pass through
        assert torch.equal(new_memory[:, :start], memory[:, :start])
        assert torch.equal(new_memory[:, end:], memory[:, end:])
        start = end
    return torch.cat(outputs, dim=1), torch.cat([*rows, memory[:, start:]], dim=1)


@pytest.mark.parametrize(("kind", "options"), STREAMING, ids=options_id)
@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_a_segment_in_pieces_is_one_pass(kind, options, split, masked):
    """Outputs, new rows and all gradients."""
    layer, (x, memory) = make_layer(kind, **options), make_inputs(tokens=7, slots=9)
    mask = torch.rand(B, 9, generator=torch.Generator().manual_seed(3)) < 0.6
    arguments = {"slot_mask": mask} if masked else {}
    leaves = dict(layer.named_parameters()) | {"x": x, "memory": memory}
    whole = results(layer(x, memory, **arguments), leaves)
    assert_same(results(in_pieces(layer, x, memory, split, **arguments), leaves), whole)


@pytest.mark.parametrize(
    "options", [{}, {"pooled_gate": "prefix", "num_blocks": 2}], ids=options_id
)
def test_a_segment_gate_or_a_second_block_does_not_stream(options):
    """The pooled gate of a segment, and a second block's bank, hold what later pieces lack."""
    layer, (x, memory) = make_layer(lm2.ReleaseMemory, **options), make_inputs(7, 9)
    whole, _ = layer(x, memory)
    pieces, _ = in_pieces(layer, x, memory, (3, 4))
    with pytest.raises(AssertionError):
        assert_round_off(pieces, whole, "output")


CAUSAL = [*STREAMING, (lm2.ReleaseMemory, {"pooled_gate": "prefix", "num_blocks": 2})]


@pytest.mark.parametrize(("kind", "options"), CAUSAL, ids=options_id)
@pytest.mark.parametrize("token", [1, 3, 6])
def test_a_token_changes_nothing_before_it(kind, options, token):
    layer, (x, memory) = make_layer(kind, **options), make_inputs(7, 9)
    changed = x.detach().clone()
    changed[:, token:] += 1.0
    before, after = layer(x, memory), layer(changed, memory)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[:, :token], new[:, :token])
    assert not torch.equal(before[0][:, token:], after[0][:, token:])


@pytest.mark.parametrize(("kind", "options"), CAUSAL, ids=options_id)
def test_a_slot_changes_nothing_before_it(kind, options):
    layer, (x, memory) = make_layer(kind, **options), make_inputs(4, 9)
    changed = memory.detach().clone()
    # token t sees slots <= 2 + t: from slot 4 on, nothing before token 2
    changed[:, 4:] += 1.0
    before = layer(x, memory, slot_offset=2)
    after = layer(x, changed, slot_offset=2)
    assert torch.equal(before[0][:, :2], after[0][:, :2])
    assert torch.equal(before[1][:, :4], after[1][:, :4])
    assert not torch.equal(before[0][:, 2:], after[0][:, 2:])


def test_the_segment_gate_reads_the_future():
    layer, (x, memory) = make_layer(lm2.ReleaseMemory), make_inputs()
    changed = x.detach().clone()
    changed[:, -1] += 1.0
    assert not torch.equal(layer(x, memory)[0][:, 0], layer(changed, memory)[0][:, 0])


@every_layer
def test_memory_carried_over_segments_with_gradients_through_time(kind, options):
    layer, (x, memory) = make_layer(kind, **options), make_inputs(tokens=3 * T)
    leaves = dict(layer.named_parameters()) | {"x": x, "memory": memory}
    parameters = own_parameters(layer)
    outputs, expected = [], []
    state, oracle_state = memory, memory
    for segment in x.split(T, dim=1):
        output, state = layer(segment, state)
        wanted, oracle_state, *_ = oracle(layer, parameters, segment, oracle_state)
        outputs.append(output)
        expected.append(wanted)
    got = results([torch.cat(outputs, dim=1), state], leaves)
    oracle_leaves = parameters | {"x": x, "memory": memory}
    assert_same(got, results([torch.cat(expected, dim=1), oracle_state], oracle_leaves))
    assert got["dmemory"].any()


@both_layers
def test_training_follows_the_oracle(kind):
    """50 steps of SGD with momentum, the memory carried and detached: the same losses."""
    layer = make_layer(kind)
    parameters = own_parameters(layer)

    def train(step, tensors):
        optimizer = torch.optim.SGD(tensors, lr=0.05, momentum=0.9)
        memory, losses = lm2.initial_memory(B, N, D, dtype=torch.float64), []
        for index in range(50):
            output, memory, *_ = step(draw(B, T, D, seed=index % 5), memory.detach())
            loss = output.square().mean() + memory.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    got = train(layer, list(layer.parameters()))
    expected = train(
        lambda x, memory: oracle(layer, parameters, x, memory), list(parameters.values())
    )
    assert got[-1] < got[0]
    assert_round_off(got, expected, "loss")
    assert_same(dict(layer.named_parameters()), parameters)


# --- dtypes -----------------------------------------------------------------------------------


MIXED = [
    (lm2.PaperMemory, {}),
    (lm2.ReleaseMemory, {}),
    (lm2.ReleaseMemory, {"pooled_gate": "prefix", "num_blocks": 2}),
]


@pytest.mark.parametrize(("kind", "options"), MIXED, ids=options_id)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_dtype", [torch.float32, None], ids=["memory32", "memory16"])
def test_16_bit_layer_keeps_the_dtype_of_its_memory(kind, options, dtype, memory_dtype):
    layer = make_layer(kind, dtype, **options)
    x, memory = make_inputs(dtype=dtype)
    memory = memory.detach().to(memory_dtype or dtype).requires_grad_()
    output, new_memory = layer(x, memory, slot_offset=1)
    assert output.dtype == dtype
    assert new_memory.dtype == memory.dtype
    (output.sum() + new_memory.sum()).backward()
    for tensor in (x, memory, *layer.parameters()):
        assert tensor.grad.dtype == tensor.dtype
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize(("kind", "options"), MIXED, ids=options_id)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=["x32", "x16"])
@every_level
def test_autocast(kind, options, x_dtype, environment):
    """float32 parameters and memory: as near to the oracle as the reference under autocast is."""
    # an RMS over the 12 elements of a small layer's bias would be left to chance
    layer = make_layer(kind, torch.float32, dim=96, **options)

    def found(outputs, leaves):
        cotangents = [draw(*o.shape, seed=i).to(o.dtype) for i, o in enumerate(outputs)]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
        named = dict(zip((f"d{name}" for name in leaves), gradients, strict=True))
        return named | {f"output {i}": o.detach() for i, o in enumerate(outputs)}

    def run(seed):
        x, memory = make_inputs(tokens=24, slots=32, dim=96, seed=seed)
        x = x.detach().to(x_dtype).requires_grad_()
        memory = memory.detach().float().requires_grad_()
        parameters = own_parameters(layer)
        with torch.autocast("cpu", torch.bfloat16):
            with lm2.recording() as ran:
                outputs = layer(x, memory)
            assert {name for _, name in ran} == {cpu_default()}
            yardstick = oracle(layer, parameters, x, memory)[:2]
        assert [output.dtype for output in outputs] == [x_dtype, torch.float32]
        inputs = {"x": x, "memory": memory}
        got = found(outputs, dict(layer.named_parameters()) | inputs)
        eager = found(yardstick, parameters | inputs)
        exact = {name: p.detach().double().requires_grad_() for name, p in parameters.items()}
        exact_inputs = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
        expected = found(oracle(layer, exact, **exact_inputs)[:2], exact | exact_inputs)
        for name, leaf in (dict(layer.named_parameters()) | inputs).items():
            assert got[f"d{name}"].dtype == leaf.dtype
            assert got[f"d{name}"].isfinite().all()
        return [
            testing.compare(name, result, expected[name], eager[name])
            for name, result in got.items()
            # the errors of one number compare by chance; its parts are in the projector's bias
            if result.numel() > 1
        ]

    with environment():
        assert_rule(run)


# --- as a module ------------------------------------------------------------------------------


@both_layers
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "hooks"])
def test_checkpointing_a_layer(kind, use_reentrant):
    """The same gradients bit for bit, with dropout."""
    layer, (x, memory) = make_layer(kind, dropout=0.3), make_inputs()
    leaves = [x, memory, *layer.parameters()]

    def gradients(run):
        layer.zero_grad()
        x.grad = memory.grad = None
        torch.manual_seed(5)
        output, new_memory = run()
        (output.square().sum() + new_memory.sum()).backward()
        return [leaf.grad.clone() for leaf in leaves]

    plain = gradients(lambda: layer(x, memory))
    again = gradients(lambda: checkpoint(layer, x, memory, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@both_layers
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same_and_are_apart(kind, duplicate):
    layer, (x, memory) = make_layer(kind, top_k=3), make_inputs()
    twin = duplicate(layer)
    assert torch.equal(twin(x, memory)[1], layer(x, memory)[1])
    assert len(list(twin.parameters())) == len(list(layer.parameters()))
    with torch.no_grad():
        next(twin.parameters()).add_(1.0)
    assert not torch.equal(twin(x, memory)[1], layer(x, memory)[1])


@both_layers
def test_saved_weights_load_safely(kind):
    layer, twin = make_layer(kind), kind(D, H, dtype=torch.float64)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    x, memory = make_inputs()
    assert torch.equal(twin(x, memory)[0], layer(x, memory)[0])


@both_layers
def test_assigned_weights_are_taken_as_they_are(kind):
    layer, twin = make_layer(kind), kind(D, H, device="meta", dtype=torch.float64)
    state = layer.state_dict()
    twin.load_state_dict(state, assign=True)
    x, memory = make_inputs()
    assert torch.equal(twin(x, memory)[0], layer(x, memory)[0])
    assert twin.query_proj.weight.data_ptr() == state["query_proj.weight"].data_ptr()


def test_released_mlp_linear_is_one_under_every_name():
    layer = lm2.ReleaseMemory(D, H, attention_mlp_layers=3)
    names = [name for name, _ in layer.named_parameters()]
    assert [name for name in names if "attention_mlp" in name] == [
        "attention_mlp.0.weight",
        "attention_mlp.0.bias",
    ]
    state = layer.state_dict()
    shared = layer.attention_mlp[0].weight.data_ptr()
    assert [state[f"attention_mlp.{i}.weight"].data_ptr() for i in range(3)] == [shared] * 3


@pytest.mark.parametrize("move", [nn.Module.double, nn.Module.bfloat16, nn.Module.float])
def test_the_shared_linear_stays_shared(move):
    layer = move(lm2.ReleaseMemory(D, H))
    assert layer.attention_mlp[0].weight is layer.attention_mlp[1].weight
    assert len({parameter.dtype for parameter in layer.parameters()}) == 1


@pytest.mark.parametrize("bias", [False, True])
def test_paper_state_dict_names(bias):
    projections = ("query", "key", "value", "output_gate", "input_gate", "forget_gate")
    tensors = ("weight", "bias") if bias else ("weight",)
    names = {f"{name}_proj.{tensor}" for name in projections for tensor in tensors}
    assert lm2.PaperMemory(D, H, bias=bias).state_dict().keys() == names


@both_layers
def test_a_layer_has_no_buffers(kind):
    assert list(kind(D, H).buffers()) == []


@both_layers
def test_meta_construction_and_reset(kind):
    """No parameter is left as it came from memory."""
    layer = kind(D, H, device="meta", dtype=torch.float64)
    assert all(parameter.is_meta for parameter in layer.parameters())
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(float("nan"))
    torch.manual_seed(3)
    layer.reset_parameters()
    other = kind(D, H, dtype=torch.float64)
    torch.manual_seed(3)
    other.reset_parameters()
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


def test_initial_parameters_of_the_release():
    layer = lm2.ReleaseMemory(D, H)
    assert layer.input_bias == 0.0
    assert layer.forget_bias == 1.0
    assert torch.equal(layer.input_gate_projector.w, torch.ones(D))
    assert torch.equal(layer.attended_memory_layernorm.weight, torch.ones(D))
    assert not layer.memory_gate_projector.linear.bias.any()


@both_layers
def test_every_parameter_gets_one_gradient(kind):
    """As DistributedDataParallel needs: each hook fires once a backward."""
    layer, (x, memory) = make_layer(kind), make_inputs()
    fired = []
    for name, parameter in layer.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    output, new_memory = layer(x, memory)
    (output.sum() + new_memory.sum()).backward()
    assert sorted(fired) == sorted(name for name, _ in layer.named_parameters())


@both_layers
def test_frozen_parameters(kind):
    """The gradients of x and memory are the same, and no parameter gets one."""
    layer, (x, memory) = make_layer(kind), make_inputs()
    leaves = {"x": x, "memory": memory}
    expected = results(layer(x, memory), leaves)
    layer.requires_grad_(False)
    assert_same(results(layer(x, memory), leaves), expected)


@both_layers
def test_a_layer_writes_to_none_of_its_inputs(kind):
    layer, (x, memory) = make_layer(kind), make_inputs()
    tensors = [x, memory, *layer.parameters()]
    before = [(tensor._version, tensor.detach().clone()) for tensor in tensors]
    output, new_memory = layer(x, memory)
    (output.sum() + new_memory.sum()).backward()
    for tensor, (version, copied) in zip(tensors, before, strict=True):
        assert tensor._version == version
        assert torch.equal(tensor, copied)


@every_layer
def test_repr_shows_the_options_that_differ(kind, options):
    text = repr(kind(D, H, **options))
    assert text.startswith(f"{kind.__name__}(\n  dim=12, num_heads=3")
    for name in ("causal", "scale", "top_k"):
        assert (f"{name}=" in text) == (name in options)


# --- compiled ---------------------------------------------------------------------------------

COMPILED = [(lm2.PaperMemory, {}), (lm2.ReleaseMemory, {})]
COMPILED_SLOWLY = [*COMPILED, (lm2.ReleaseMemory, {"num_blocks": 2, "pooled_gate": "prefix"})]


def check_compiled(layer, compiled, batch):
    x, memory = draw(batch, T, D).requires_grad_(), draw(batch, N, D, seed=1).requires_grad_()
    leaves = dict(layer.named_parameters()) | {"x": x, "memory": memory}
    mask = torch.arange(N).expand(batch, N) != 1
    got = results(compiled(x, memory, slot_offset=1, slot_mask=mask), leaves)
    assert_same(got, results(layer(x, memory, slot_offset=1, slot_mask=mask), leaves))


@pytest.mark.parametrize(("kind", "options"), COMPILED, ids=options_id)
def test_compiled_in_one_graph_for_any_batch(kind, options):
    """At most two frames for six batch sizes, forward and gradients equal to eager mode's."""
    torch._dynamo.reset()
    layer, counter = make_layer(kind, **options), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with warnings.catch_warnings():
        # what torch.compile says of our code
        warnings.filterwarnings("error", message="Dynamo")
        for batch in (2, 3, 4, 5, 7, 8):
            check_compiled(layer, compiled, batch)
    assert counter.frame_count <= 2


@both_layers
def test_compiled_for_any_number_of_tokens(kind):
    """Sizes that are symbols, of tokens that share a slot and its gates."""
    torch._dynamo.reset()
    layer = make_layer(kind, write="chunk", tokens_per_slot=3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    memory = draw(B, N, D, seed=1).requires_grad_()
    for tokens in (5, 7, 4, 9):
        x = draw(B, tokens, D).requires_grad_()
        leaves = dict(layer.named_parameters()) | {"x": x, "memory": memory}
        assert_same(results(compiled(x, memory), leaves), results(layer(x, memory), leaves))
    assert counter.frame_count <= 2


@both_layers
@pytest.mark.parametrize("how", ("no_grad", "inference_mode", "frozen"))
def test_compiled_where_no_gradient_is_wanted(kind, how):
    torch._dynamo.reset()
    layer, (x, memory) = make_layer(kind), make_inputs()
    layer.requires_grad_(how != "frozen")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    without = contextlib.nullcontext() if how == "frozen" else getattr(torch, how)()
    with without:
        got, want = compiled(x, memory), layer(x, memory)
    for one, other in zip(got, want, strict=True):
        assert_round_off(one, other)


@both_layers
def test_compiled_first_of_all(kind):
    """In a process that has called nothing of ours before, with gradients and without."""
    done = run_python(
        "import torch, lm2_kernels as lm2\n"
        f"layer, x = lm2.{kind.__name__}(8, 2), torch.randn(1, 4, 8)\n"
        "run = torch.compile(layer, fullgraph=True, backend='eager')\n"
        "run(x, x)[0].sum().backward()\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(run(x, x)[0], layer(x, x)[0])\n"
    )
    assert done.returncode == 0, done.stderr


@both_layers
def test_compiled_with_dropout(kind):
    """Each call draws its own mask, as in eager mode."""
    torch._dynamo.reset()
    layer, (x, memory) = make_layer(kind, dropout=0.5), make_inputs()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    first, second = compiled(x, memory)[0], compiled(x, memory)[0]
    assert not torch.equal(first, second)
    first.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options"), COMPILED_SLOWLY, ids=options_id)
def test_compiled_by_inductor(kind, options):
    torch._dynamo.reset()
    layer = make_layer(kind, **options)
    check_compiled(layer, torch.compile(layer, fullgraph=True), B)


def to_strided(tensor):
    """Other strides, the last axis contiguous: a chunk of a wider row."""
    if not torch.is_tensor(tensor) or tensor.dim() < 2:
        return tensor
    return torch.cat((tensor, tensor), dim=-1)[..., : tensor.shape[-1]]


OPERATOR_CALLS = (
    "memory_attention_forward",
    "memory_attention_forward plain",
    "memory_attention_backward",
    "memory_attention_backward query",
    "memory_attention_backward bank",
    "memory_update_forward",
    "memory_update_forward release",
    "memory_update_forward slots",
    "memory_update_backward",
    "memory_update_backward some",
    "memory_update_backward release",
    "memory_update_backward slots",
    "residual_layer_norm_forward",
    "residual_layer_norm_backward",
    "residual_layer_norm_backward dx",
    "residual_layer_norm_backward mixed",
    "pooled_gate_forward",
    "pooled_gate_forward segment",
    "pooled_gate_backward",
    "pooled_gate_backward segment",
)


def operator_arguments(call: str) -> tuple:
    """Arguments of an operator, named with what is special about them."""
    rows, other = draw(B, T, D), draw(B, T, D, seed=1)
    query, key, value = (draw(B, length, H, 4, seed=length) for length in (T, N, N + 1))
    value = value[:, :N].contiguous()
    mask = torch.arange(N).expand(B, N).contiguous() != 1
    seed, gates = torch.tensor(5), (other, rows, other)
    bias = draw(B, 1, 2 * D)
    weight, total = draw(D), draw(B, D)
    options = (True, 1, 0.5)
    backends.get("eager")
    read, statistics = torch.ops.lm2_kernels.memory_attention_forward(
        query, key, value, mask, seed, *options, None, 0.25, "eager"
    )
    _, mean, rstd = torch.ops.lm2_kernels.residual_layer_norm_forward(
        rows, other, weight, weight, 1e-5, "eager"
    )
    attention = (query, key, value, mask, seed)
    update = (rows, other, *gates, bias, None, "read", 1)
    # rows of slots, three tokens each: of the bank, of two gates
    bank = draw(B, 2, D, seed=2)
    slots = (rows, bank, bank, other, other, None, rows, "read", 3)
    calls = {
        "memory_attention_forward": (*attention, *options, None, 0.25),
        "memory_attention_forward plain": (query, key, value, None, None, *options, 2, 0.0),
        "memory_attention_backward": (
            *(read, *attention, read, statistics, *options, None, 0.25, True, True),
        ),
        "memory_attention_backward query": (
            *(read, *attention, read, statistics, *options, None, 0.25, True, False),
        ),
        "memory_attention_backward bank": (
            *(read, *attention, read, statistics, *options, None, 0.25, False, True),
        ),
        "memory_update_forward": (rows, *update),
        "memory_update_forward release": (rows, *update[:4], None, None, None, "read", 1),
        "memory_update_forward slots": (rows, *slots),
        "memory_update_backward": (rows, other, *update, True, True, True, False, False),
        "memory_update_backward some": (None, other, *update, True, False, False, False, False),
        "memory_update_backward release": (
            *(rows, None, *update[:4], None, None, None, "read", 1),
            *(False, True, True, False, False),
        ),
        "memory_update_backward slots": (rows, bank, *slots, True, True, True, True, True),
        "residual_layer_norm_forward": (rows, other, weight, weight, 1e-5),
        "residual_layer_norm_backward": (rows, rows, other, weight, mean, rstd, True, True),
        "residual_layer_norm_backward dx": (rows, rows, other, weight, mean, rstd, True, False),
        "residual_layer_norm_backward mixed": (
            *(rows.bfloat16(), rows.bfloat16(), other.float(), weight.float()),
            *(mean.float(), rstd.float(), True, True),
        ),
        "pooled_gate_forward": (rows, weight, total, True, 3),
        "pooled_gate_forward segment": (rows, weight, None, False, 0),
        "pooled_gate_backward": (other, total, rows, weight, True, 3, True, True, True),
        "pooled_gate_backward segment": (
            *(draw(B, 1, D), None, rows, weight, False, 0, True, False, False),
        ),
    }
    assert calls.keys() == set(OPERATOR_CALLS)
    return calls[call]


@pytest.mark.parametrize("layout", [None, to_strided], ids=["contiguous", "strided"])
@pytest.mark.parametrize("call", OPERATOR_CALLS)
@pytest.mark.parametrize("backend", ("eager", pytest.param("cpp", marks=needs_cpp)))
def test_operator_opcheck(call, layout, backend):
    arguments = operator_arguments(call)
    if layout is not None:
        arguments = tuple(layout(argument) for argument in arguments)
    operator = getattr(torch.ops.lm2_kernels, call.partition(" ")[0]).default
    torch.library.opcheck(operator, (*arguments, backend))


@needs_cpp
@pytest.mark.parametrize("layout", [None, to_strided], ids=["contiguous", "strided"])
@pytest.mark.parametrize("call", OPERATOR_CALLS)
def test_compiled_operator_opcheck(call, layout):
    arguments = operator_arguments(call)
    if layout is not None:
        arguments = tuple(layout(argument) for argument in arguments)
    operator = getattr(torch.ops.lm2_kernels_cpp, call.partition(" ")[0]).default
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("call", [call for call in OPERATOR_CALLS if "forward" in call])
@pytest.mark.parametrize("namespace", ("lm2_kernels", pytest.param("cpp", marks=needs_cpp)))
def test_operator_has_autograd(call, namespace):
    """Called directly, an operator passes gradients: opcheck does not miss a formula."""
    arguments = [
        a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in operator_arguments(call)
    ]
    function = call.partition(" ")[0]
    if namespace == "cpp":
        operator = getattr(torch.ops.lm2_kernels_cpp, function).default
    else:
        operator, arguments = (
            getattr(torch.ops.lm2_kernels, function).default,
            [*arguments, "eager"],
        )
    outputs = [output for output in operator(*arguments) if output.requires_grad]
    leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    for grad in torch.autograd.grad(sum(o.sum() for o in outputs), leaves):
        assert torch.isfinite(grad).all()


def test_every_operator_is_checked():
    checked = {call.partition(" ")[0] for call in OPERATOR_CALLS}
    assert checked == {f"{op}_{way}" for op in backends.OPS for way in ("forward", "backward")}


@pytest.mark.parametrize("name", ("PaperMemory", "ReleaseMemory"))
def test_compiled_with_permuted_input(name):
    """A time-major batch: the operators' results must have the strides their fakes promise."""
    layer = getattr(lm2, name)(12, 3, backend="eager", dtype=torch.float64)
    x = draw(5, 2, 12).transpose(0, 1)
    memory = draw(7, 2, 12, seed=1).transpose(0, 1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x, memory), layer(x, memory), strict=True):
        assert_round_off(got, want)


class _Cast(torch.nn.Module):
    """In a projection's place."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


def _norm(**changes):
    norm = torch.nn.LayerNorm(D, dtype=torch.float64)
    for name, value in changes.items():
        is_tensor = isinstance(value, torch.Tensor)
        setattr(norm, name, torch.nn.Parameter(value, False) if is_tensor else value)
    return norm


_NORM = "attended_memory_layernorm2"
_ONES = torch.ones(D, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "changes", "error", "text"),
    (
        (lm2.PaperMemory, {"output": "other"}, ValueError, "output must be 'read' or 'memory'"),
        (lm2.PaperMemory, {"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        (lm2.PaperMemory, {"dropout": 1.0}, ValueError, r"dropout_p must be in \[0, 1\)"),
        (lm2.ReleaseMemory, {"scale": math.nan}, ValueError, "scale must be finite"),
        (lm2.ReleaseMemory, {"pooled_gate": "other"}, ValueError, "pooled_gate must be 'segment'"),
        (lm2.ReleaseMemory, {_NORM: _norm(eps=-1.0)}, ValueError, "eps must be a float above 0"),
        (
            lm2.ReleaseMemory,
            {_NORM: _norm(bias=torch.ones(D + 1, dtype=torch.float64))},
            ValueError,
            rf"{_NORM}.bias must be \(D,\) = \({D}\), got \({D + 1},\)",
        ),
        (
            lm2.ReleaseMemory,
            {_NORM: _norm(weight=_ONES.float(), bias=_ONES.float())},
            TypeError,
            f"{_NORM}.weight is torch.float32",
        ),
        (
            lm2.ReleaseMemory,
            {_NORM: _norm(weight=_ONES.int(), bias=_ONES.int())},
            TypeError,
            f"{_NORM}.weight must be float32, bfloat16",
        ),
        (
            lm2.ReleaseMemory,
            {_NORM: _norm(weight=_ONES.to("meta"))},
            ValueError,
            f"{_NORM}.weight is on meta but x is on cpu",
        ),
        (lm2.PaperMemory, {"key_proj": _Cast(torch.float32)}, TypeError, "key_proj: result is"),
        (lm2.PaperMemory, {"key_proj": _Cast(torch.int64)}, TypeError, "key_proj: result must be"),
        (
            lm2.PaperMemory,
            {"output_gate_proj": torch.nn.Linear(D, D + 1, dtype=torch.float64)},
            ValueError,
            r"output_gate_proj: result must be \(B, T, width\)",
        ),
        (
            lm2.PaperMemory,
            {"value_proj": torch.nn.Linear(D, D, device="meta", dtype=torch.float64)},
            (ValueError, RuntimeError),
            "meta",
        ),
    ),
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_was_put_in_is_checked(kind, changes, error, text):
    """The ops take options, vectors and projections as they are: the layer has to look at them."""
    layer, (x, memory) = make_layer(kind), make_inputs()
    for name, value in changes.items():
        setattr(layer, name, value)
    with pytest.raises(error, match=text):
        layer(x, memory)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float16, torch.int32))
def test_autocast_casts_no_other_projection(dtype):
    layer = lm2.PaperMemory(D, H)
    x, memory = make_inputs(dtype=torch.float32)
    layer.key_proj = _Cast(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x, memory)
        layer.key_proj = _Cast(dtype)
        with pytest.raises(TypeError, match="key_proj: result"):
            layer(x, memory)


class _Quantised(nn.Module):
    """Keeps its weight in 8 bits, and computes with it in its own way."""

    def __init__(self, linear, kind):
        super().__init__()
        weight = (linear.weight.detach() * 50 + 128).to(torch.uint8)
        if kind == "buffer":
            self.register_buffer("weight", weight)
        else:
            self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, (self.weight.to(x.dtype) - 128) / 50)


@both_layers
@pytest.mark.parametrize("of", ("buffer", "parameter"))
def test_quantised_projection(kind, of):
    layer, (x, memory) = make_layer(kind), make_inputs()
    names = ("query_proj", "key_proj", "value_proj")
    for name in names:
        setattr(layer, name, _Quantised(getattr(layer, name), of))
    plain = copy.deepcopy(layer)
    for name in names:
        linear = nn.Linear(D, D, bias=False, dtype=x.dtype)
        with torch.no_grad():
            linear.weight.copy_((getattr(layer, name).weight.to(x.dtype) - 128) / 50)
        setattr(plain, name, linear)
    for got, want in zip(layer(x, memory), plain(x, memory), strict=True):
        assert_round_off(got, want)


def test_a_layer_without_parameters():
    layer, (x, memory) = make_layer(lm2.PaperMemory), make_inputs()
    for name, _ in list(layer.named_children()):
        setattr(layer, name, nn.Identity())
    assert layer.any_parameter() is None
    output, _ = layer(x, memory)
    want = reference.memory_attention(*(t.unflatten(-1, (H, -1)) for t in (x, memory, memory)))
    read = want.flatten(-2)
    assert_round_off(output, x + torch.sigmoid(read) * read)


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize(
    ("index", "output", "unused"),
    (
        (0, "read", {"input_gate_proj", "forget_gate_proj"}),
        (0, "memory", {"input_gate_proj", "forget_gate_proj"}),
        (1, "read", {"output_gate_proj"}),
    ),
)
def test_no_gradient_where_nothing_flows(index, output, unused, recompute):
    """None, not zeros, which an optimiser would decay; also where our own Linear Function runs."""
    for products in (contextlib.nullcontext, large_products):
        with products():
            layer = lm2.PaperMemory(D, 3, output=output, recompute=recompute)
            before = copy.deepcopy(layer.state_dict())
            x, memory = torch.randn(2, 5, D, requires_grad=True), torch.randn(2, 7, D)
            layer(x, memory)[index].square().sum().backward()
            children = layer.named_children()
            assert {name for name, child in children if child.weight.grad is None} == unused
            torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5).step()
            for name, parameter in layer.named_parameters():
                changed = not torch.equal(parameter, before[name])
                assert changed == (name.removesuffix(".weight") not in unused)
