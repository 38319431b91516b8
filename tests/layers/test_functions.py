"""A layer as one Function is the layer made of ops: the same bits, and gradients to round-off."""

import contextlib
import copy
import itertools
import pickle
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

import lm2_kernels as lm2
from lm2_kernels import backends, testing
from lm2_kernels.backends import cpp, cpu_products, eager
from lm2_kernels.backends.contract import NORM, NORM_AND_TANH, NORM_OF_RELU
from lm2_kernels.layers import base, function, in_cpp, paper_function, release_function
from tools.layers import (
    LAYERS,
    B,
    D,
    N,
    T,
    draw,
    every_layer,
    made_of_ops,
    make_inputs,
    make_layer,
    options_id,
)
from tools.models import random_ids, small_model
from tools.native import needs_cpp
from tools.products import large_products
from tools.rounding import assert_round_off, assert_rule

NODE = {lm2.PaperMemory: "PaperMemoryFunction", lm2.ReleaseMemory: "ReleaseMemoryFunction"}
both_layers = pytest.mark.parametrize("kind", NODE)
MASK = torch.rand(B, N, generator=torch.Generator().manual_seed(3)) < 0.6

# the last of a causal segment's slots is seen by its last token in all but one
ARGUMENTS = {
    "whole": {},
    "part": {"slot_offset": 1},
    "offset": {"slot_offset": 2},
    "mask": {"slot_offset": 2, "slot_mask": MASK},
}


def is_whole(options) -> bool:
    """Whether a layer with these options can be one Function."""
    return options.get("num_blocks", 1) == 1


def is_one(output: torch.Tensor) -> bool:
    """Whether a result is a layer's Function's."""
    return type(output.grad_fn).__name__.removesuffix("Backward") in NODE.values()


def run(layer, inputs, used=None, autocast=False, **arguments):
    """Results, and the gradients of all leaves for drawn cotangents of the results used."""
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = layer(*inputs, **arguments)
    leaves = [*inputs, *arguments.values(), *layer.parameters()]
    leaves = [t for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad]
    used = [o for i, o in enumerate(outputs) if (used is None or i in used) and o.requires_grad]
    cotangents = [draw(*o.shape, seed=7 + i, dtype=o.dtype) for i, o in enumerate(used)]
    gradients = torch.autograd.grad(used, leaves, cotangents, allow_unused=True)
    return outputs, gradients, is_one(next(o for o in outputs if o.requires_grad))


def assert_agree(layer, inputs, **arguments) -> None:
    """As one and as ops: the same bits, the same gradients to round-off, of the same tensors. So
    too where the one is called part by part, which on a CPU may be one call.
    """
    with made_of_ops():
        wanted, wanted_gradients, one = run(layer, inputs, **arguments)
    assert not one
    for context in (contextlib.nullcontext(), by_parts()):
        with context:
            outputs, gradients, one = run(layer, inputs, **arguments)
        assert one
        for got, want in zip(outputs, wanted, strict=True):
            assert torch.equal(got, want)
            assert got.dtype == want.dtype
            assert got.stride() == want.stride()
        for got, want in zip(gradients, wanted_gradients, strict=True):
            assert (got is None) == (want is None)
            if got is not None:
                assert_round_off(got, want)


def by_parts():
    return mock.patch.object(in_cpp, "enabled", False)


@contextlib.contextmanager
def calls_of_the_extension():
    """Which of its functions are called by the layers, without the op's or the way's name."""
    called, original = [], cpp.call

    def call(function, *args):
        called.append(function)
        return original(function, *args)

    with mock.patch.object(cpp, "call", call):
        yield called


@every_layer
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_it_is_the_layer_made_of_ops(kind, options, arguments):
    # more rows than columns once, from where on two gates' weights go into one product
    tokens = N if arguments == "whole" else T
    layer, inputs = make_layer(kind, **options), make_inputs(tokens)
    if not is_whole(options):
        assert not is_one(layer(*inputs)[0])
        return
    assert_agree(layer, inputs, **ARGUMENTS[arguments])


@pytest.mark.parametrize(
    ("kind", "options", "used"),
    [
        (kind, options, used)
        for kind, options in LAYERS
        for used in ((0,), (1,), (2,), (0, 2))
        if is_whole(options) and (kind is lm2.ReleaseMemory or max(used) < 2)
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else options_id(value),
)
def test_results_that_are_not_used(kind, options, used):
    arguments = {"return_pooled_sum": True} if kind is lm2.ReleaseMemory else {}
    assert_agree(make_layer(kind, **options), make_inputs(), used=used, slot_offset=1, **arguments)


@pytest.mark.parametrize("offset", [0, 2])
def test_a_pooled_sum_that_goes_on(offset):
    layer = make_layer(lm2.ReleaseMemory, pooled_gate="prefix")
    arguments = {"pooled_sum": draw(B, D, seed=4).requires_grad_(), "return_pooled_sum": True}
    assert_agree(layer, make_inputs(), slot_offset=offset, **arguments)


@every_layer
@pytest.mark.parametrize("used", [None, (0,), (1,)], ids=["", "output", "rows"])
def test_a_whole_segment_of_a_state(kind, options, used):
    """As models feed them: the rows come back, or of a bank that all see those written."""
    layer, (x, memory) = make_layer(kind, **options), make_inputs()
    if not is_whole(options):
        return
    state = lm2.MemoryState([memory])
    options = {"tokens_per_slot": layer.tokens_per_slot, "causal": layer.causal}
    (seen,), cache = state.piece(T, T, keep=False, **options)
    assert_agree(layer, (x, seen.detach().requires_grad_()), used=used, cache=cache)


def test_a_model_of_whole_segments_is_made_of_functions():
    model = small_model(flow="chunk")
    with mock.patch.object(lm2.PaperMemory, "_run") as run:
        model(random_ids(2, 12))
    run.assert_not_called()


SOME = [
    (lm2.PaperMemory, {"candidate": "token", "bias": True}),
    (lm2.PaperMemory, {"output": "memory"}),
    (lm2.PaperMemory, {"write": "chunk", "tokens_per_slot": 2}),
    (lm2.ReleaseMemory, {"candidate": "token"}),
    (lm2.ReleaseMemory, {"write": "chunk", "tokens_per_slot": 3, "pooled_gate": "prefix"}),
]
some_layers = pytest.mark.parametrize(("kind", "options"), SOME, ids=str)


@some_layers
@pytest.mark.parametrize("used", [None, (0,), (1,)], ids=["", "output", "memory"])
def test_one_leaf_alone_or_all_but_one(kind, options, used):
    """Gradients are computed where they are asked for, and no others are."""
    layer, (x, memory) = make_layer(kind, **options), make_inputs()
    leaves = [x, memory, *layer.parameters()]
    for leaf, is_asked in itertools.product(leaves, (True, False)):
        for other in leaves:
            other.requires_grad_((other is leaf) == is_asked)
        with made_of_ops():
            depends = any(
                o.requires_grad for i, o in enumerate(layer(x, memory)) if not used or i in used
            )
        if depends:
            assert_agree(layer, (x, memory), used=used)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@some_layers
def test_no_more_is_kept(kind, options, autocast):
    """Bytes of storages that are neither inputs nor parameters, whatever is frozen."""
    layer, (x, memory) = (
        make_layer(kind, torch.float32, **options),
        make_inputs(dtype=torch.float32),
    )
    modules = [m for m in layer.modules() if isinstance(m, nn.Linear | nn.LayerNorm)]
    every = set(layer.parameters())
    # which parameters are trained: all, none, all but a module's, one alone
    trained = [every, set(), *(every - set(m.parameters()) for m in modules)]
    trained += [{parameter} for parameter in every]
    for needed, own in itertools.product(((x, memory), (x,), (memory,), ()), trained):
        for tensor in (x, memory, *every):
            tensor.requires_grad_(tensor in own or any(tensor is other for other in needed))
        found = []
        for context in (contextlib.nullcontext(), made_of_ops()):
            with context, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found.append(bytes_kept(lambda: layer(x, memory), every))
        assert found[0] <= found[1], (len(needed), len(own))


@both_layers
def test_autocast_keeps_no_copy_of_weights_a_call(kind):
    """Its own cache has one for all calls."""
    layer, x, found = kind(64, 2), torch.randn(1, 2, 64), []

    def calls():
        return [result for _ in range(4) for result in layer(x, x)]

    for context in (contextlib.nullcontext(), made_of_ops()):
        with context, torch.autocast("cpu", torch.bfloat16):
            found.append(bytes_kept(calls, layer.parameters()))
    assert found[0] <= found[1]


def bytes_kept(run, own) -> int:
    """Of what backward keeps, but for ``own`` tensors and for what ``run`` returns."""
    alive = []

    def pack(tensor):
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        own = [*own, *run()]
    known = {tensor.untyped_storage()._cdata for tensor in own}
    storages = {s._cdata: s.nbytes() for s in (tensor.untyped_storage() for tensor in alive)}
    return sum(size for key, size in storages.items() if key not in known)


@both_layers
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("backend", ["eager", pytest.param("cpp", marks=needs_cpp)])
def test_dropout_and_backends(kind, dropout, backend):
    layer = make_layer(kind, dropout=dropout, backend=backend)
    with backends.recording() as recorded:
        assert_agree(layer, make_inputs())
    assert {name for _, name in recorded} == {backend}


@both_layers
def test_a_masked_slot_has_no_gradient_of_its_read(kind):
    """Whatever the projections are."""
    layer, (x, memory) = make_layer(kind), make_inputs()
    with torch.no_grad():
        layer.key_proj.weight.fill_(torch.inf)
    layer(x, memory, slot_mask=MASK, slot_offset=N - T)[0].sum().backward()
    # but of those that are rewritten
    assert not memory.grad[:, : N - T][~MASK[:, : N - T]].any()


@both_layers
def test_the_other_way_of_products(kind):
    with large_products():
        assert_agree(make_layer(kind, candidate="token"), make_inputs())


@both_layers
def test_a_batch_of_nothing_and_strides(kind):
    layer, (x, memory) = make_layer(kind), make_inputs()
    assert_agree(layer, (x[:0], memory[:0]))
    x, memory = draw(D, T, B).requires_grad_(), draw(N, D, B).requires_grad_()
    strided = x.permute(2, 1, 0), memory.permute(2, 0, 1)
    for got, want in zip(layer(*strided), layer(*(t.contiguous() for t in strided)), strict=True):
        assert_round_off(got, want)
    assert_agree(layer, strided)


ONE_CALL = {lm2.PaperMemory: "paper_layer", lm2.ReleaseMemory: "release_layer"}


@needs_cpp
@both_layers
@pytest.mark.parametrize(
    ("options", "given", "one_call"),
    (
        ({}, "offset", True),
        ({"candidate": "token"}, "mask", True),
        ({"recompute": True}, "offset", True),
        ({"dropout": 0.4, "top_k": 3}, "offset", True),
        ({"causal": False}, "part", True),
        # a part of the bank is seen; rows that tokens share
        ({}, "part", False),
        ({"write": "chunk", "tokens_per_slot": 2}, "whole", False),
    ),
    ids=str,
)
def test_when_it_is_one_call(kind, options, given, one_call):
    layer, (x, memory) = make_layer(kind, **options), make_inputs()
    forward, backward = (f"{ONE_CALL[kind]}_{way}" for way in ("forward", "backward"))

    def called(*inputs, context=None):
        with context or contextlib.nullcontext(), calls_of_the_extension() as functions:
            run(layer, inputs, **ARGUMENTS[given])
        return [forward in functions, backward in functions]

    assert called(x, memory) == [one_call, one_call]
    assert_agree(layer, (x, memory), **ARGUMENTS[given])
    # every part is there to see for whoever records, and in other backends
    assert called(x, memory, context=backends.recording()) == [False, False]
    assert called(x, memory, context=lm2.use_backend("eager")) == [False, False]
    assert called(x.mT.contiguous().mT, memory) == [False, False]
    for tensor, is_wanted in ((x, True), (layer.value_proj.weight, True), (memory, False)):
        tensor.requires_grad_(False)
        assert called(x, memory) == [one_call, one_call and not is_wanted]
        assert_agree(layer, (x, memory), **ARGUMENTS[given])
        tensor.requires_grad_(True)


@needs_cpp
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (lm2.PaperMemory, {"candidate": "token", "bias": True}),
        (lm2.PaperMemory, {"output": "memory"}),
        (lm2.ReleaseMemory, {"candidate": "token", "attention_mlp_layers": 3}),
        (lm2.ReleaseMemory, {"pooled_gate": "prefix"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", (T, 2 * N))
@pytest.mark.parametrize("way", ("torch", "onednn"))
def test_one_call_in_float32(kind, options, tokens, way, monkeypatch):
    """By either way of products: the bits of the parts, gradients by the rule."""
    monkeypatch.setenv(cpu_products.FLOAT32_VARIABLE, way)
    monkeypatch.setitem(cpu_products._MIN_MULTIPLICATIONS, torch.float32, 0)

    def compare(seed: int) -> list[testing.Comparison]:
        layer, inputs, truth = lowered(kind, options, torch.float32, {}, seed, tokens, tokens)
        with calls_of_the_extension() as functions:
            found = run(layer, inputs)
        assert f"{ONE_CALL[kind]}_backward" in functions
        with by_parts():
            wanted = run(layer, inputs)
        for got, want in zip(found[0], wanted[0], strict=True):
            assert torch.equal(got, want)
        with made_of_ops():
            true = truth()
        return compared_gradients(layer, found, true, wanted)

    assert_rule(compare)


@needs_cpp
@both_layers
@pytest.mark.parametrize("tokens", (1, 40, 128, 200, 260))
def test_one_call_has_the_bits_of_its_parts_at_any_size(kind, tokens, monkeypatch):
    """On both sides of the sizes from which on products may go another way, which is taken."""
    monkeypatch.setenv(cpu_products.FLOAT32_VARIABLE, "onednn")
    layer, x = kind(256, 4), torch.randn(2, tokens, 256)
    with torch.no_grad(), calls_of_the_extension() as functions:
        found = layer(x, x)
        assert functions
        with by_parts():
            wanted = layer(x, x)
        with made_of_ops():
            of_ops = layer(x, x)
    assert all(map(torch.equal, found, wanted)) and all(map(torch.equal, found, of_ops))


@needs_cpp
@both_layers
@pytest.mark.parametrize("change", ("bias[::2]", "expanded bias", "weight.mT"))
def test_parameters_with_gaps(kind, change, monkeypatch):
    monkeypatch.setenv(cpu_products.FLOAT32_VARIABLE, "onednn")
    monkeypatch.setitem(cpu_products._MIN_MULTIPLICATIONS, torch.float32, 0)
    layer, (x, memory) = make_layer(kind, torch.float32), make_inputs(N, dtype=torch.float32)
    linear = layer.query_proj
    if change == "weight.mT":
        linear.weight = nn.Parameter(linear.weight.detach().mT.contiguous().mT)
    else:
        bias = torch.randn(2 * D)[::2] if change == "bias[::2]" else torch.randn(1).expand(D)
        linear.bias = nn.Parameter(bias)
    found = run(layer, (x, memory))[0]
    with by_parts():
        wanted = run(layer, (x, memory))[0]
    assert all(map(torch.equal, found, wanted))


@both_layers
@pytest.mark.parametrize("inside", (True, False))
def test_fake_tensors(kind, inside):
    with FakeTensorMode() as mode:
        layer, (x, memory) = kind(256, 2), torch.randn(2, 2, 64, 256).requires_grad_()
        tensors = [x.detach(), memory.detach()]
    with mode if inside else contextlib.nullcontext():
        outputs = layer(*tensors)
        gradients = torch.autograd.grad([o.sum() for o in outputs], list(layer.parameters()))
    assert [o.shape for o in outputs[:2]] == [x.shape, memory.shape]
    assert [g.shape for g in gradients] == [p.shape for p in layer.parameters()]


@both_layers
@pytest.mark.parametrize("recompute", (False, True))
def test_a_mode_around_backward_alone_sees_products(kind, recompute):
    layer, (x, memory), counted = make_layer(kind, recompute=recompute), make_inputs(N), []
    for context in (contextlib.nullcontext(), by_parts()):
        with context:
            outputs = layer(x, memory)
            with FlopCounterMode(display=False) as counter:
                torch.autograd.grad([o.sum() for o in outputs], [*layer.parameters(), x])
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


def _in_another_dtype(x):
    return x.to(torch.float64 if x.dtype == torch.float32 else torch.float32)


def _cut_short(x):
    """The same, of whose storage a part is gone."""
    x = x.detach().clone()
    x.untyped_storage().resize_(64)
    return x


# places of the arguments of a layer in one call, what breaks them, and what is said then
def _forward_refusals(kind):
    parameters = 6 if kind is lm2.ReleaseMemory else 5
    return (
        (0, lambda x: x.mT.contiguous().mT, "has gaps"),
        (0, lambda x: x[:0], "is empty"),
        (0, lambda x: x.flatten(0, 1), "B, T, D"),
        (0, lambda x: x.bfloat16(), "float32 or float64"),
        (2, lambda bank: bank[..., :-1].contiguous(), "failed"),
        (2, _in_another_dtype, "failed"),
        (parameters, lambda p: p[:-1], "parameters"),
        (parameters, lambda p: (None, *p[1:]), "missing"),
        (parameters, lambda p: (_cut_short(p[0]), *p[1:]), "has no data|failed"),
        (parameters + 2, lambda heads: heads + 2, "heads"),
        (parameters + 2, lambda heads: 0, "heads"),
    )


def _backward_refusals(kind):
    is_paper = kind is lm2.PaperMemory
    x, query, weights = (2, 10, 17) if is_paper else (3, 13, 20)
    return (
        (0, lambda doutput: doutput.mT.contiguous().mT, "has gaps"),
        (x, lambda x: x.bfloat16(), "float32 or float64|has a dtype"),
        (x, lambda x: x[:, :-1].contiguous(), ""),
        (query, lambda query: query[:0], ""),
        (query, _in_another_dtype, ""),
        (weights, lambda w: w[:-1], "7 Linears"),
        (weights, lambda w: (w[0][:, :-1], *w[1:]), "has gaps|a weight must be"),
        (weights, lambda w: (*w[:1], w[1][:0], *w[2:]), "is empty"),
        (weights + 1, lambda has_bias: has_bias[:-1], "7 Linears"),
    )


@needs_cpp
@both_layers
@pytest.mark.parametrize("ways", (0, 0xFF), ids=("torch", "onednn"))
def test_what_the_operators_of_layers_refuse(kind, ways):
    """They can be reached without Python's checks."""
    calls, original = [], cpp.call

    def call(*args):
        calls.append(args)
        return original(*args)

    dtype = torch.float32 if ways else torch.float64
    layer, (x, memory) = make_layer(kind, dtype), make_inputs(N, dtype=dtype)
    with mock.patch.object(cpp, "call", call):
        outputs = layer(x, memory)
        torch.autograd.grad([o.square().sum() for o in outputs], [*layer.parameters(), x, memory])
    assert [function for function, *_ in calls] == [
        f"{ONE_CALL[kind]}_{way}" for way in ("forward", "backward")
    ]
    of_ways = (_forward_refusals(kind), _backward_refusals(kind))
    for (name, *arguments), refusals in zip(calls, of_ways, strict=True):
        # behind the parameters, or what backward is told of biases
        behind = 7 if kind is lm2.ReleaseMemory else 6
        if name.endswith("backward"):
            behind = 19 if kind is lm2.PaperMemory else 25
        assert arguments[behind] == 0 if ways == 0 else isinstance(arguments[behind], int)
        with torch.no_grad():
            for place, change, message in refusals:
                changed = [*arguments]
                changed[behind] = ways
                changed[place] = change(changed[place])
                with pytest.raises(RuntimeError, match=message or None):
                    original(name, *changed)


LOW = {
    "bfloat16": (torch.bfloat16, {}, {}),
    "float16": (torch.float16, {}, {}),
    "float32 memory": (torch.bfloat16, {"memory": torch.float32}, {}),
    "autocast": (torch.float32, {}, {"autocast": True}),
    "autocast of 16 bits": (torch.float32, {"x": torch.bfloat16}, {"autocast": True}),
}


def lowered(kind, options, dtype, dtypes, seed, tokens=T, slots=N):
    """A layer and its inputs in a dtype, or those of ``dtypes``; and what gives the truth of them:
    a function of what the layer is called with, in float64.
    """
    exact, (x, memory) = make_layer(kind, **options), make_inputs(tokens, slots, seed=seed)
    layer = copy.deepcopy(exact).to(dtype)
    inputs = [
        t.detach().to(dtypes.get(name, dtype)).requires_grad_()
        for name, t in (("x", x), ("memory", memory))
    ]

    def truth(**arguments):
        rounded = [t.detach().double().requires_grad_() for t in inputs]
        exact.load_state_dict({n: t.double() for n, t in layer.state_dict().items()})
        return run(exact, rounded, **arguments)

    return layer, inputs, truth


def compared_gradients(layer, *runs) -> list[testing.Comparison]:
    """Of what was found, the truth and what is allowed, as :func:`run` gives them."""
    names = ["x", "memory", *(name for name, _ in layer.named_parameters())]
    gradients = [dict(zip(names, one[1], strict=True)) for one in runs]
    # vectors as one: a single number, or one that is 0 but for rounding, is right by luck
    for one in gradients:
        vectors = [one.pop(name) for name in names if one[name].dim() == 1]
        one["vectors"] = torch.cat(vectors) if vectors else torch.zeros(0)
    return [testing.compare(f"d{name}", *(one[name] for one in gradients)) for name in gradients[0]]


@both_layers
@pytest.mark.parametrize("way", LOW)
@pytest.mark.parametrize(
    "options", [{"candidate": "token"}, {"write": "chunk", "tokens_per_slot": 2}], ids=str
)
def test_low_precision(kind, options, way):
    """Forward bits are those of ops; gradients by the rule, ops being what they are held to."""
    dtype, dtypes, arguments = LOW[way]

    def compare(seed: int) -> list[testing.Comparison]:
        layer, inputs, truth = lowered(kind, options, dtype, dtypes, seed)
        found = run(layer, inputs, **arguments)
        with made_of_ops():
            wanted, true = run(layer, inputs, **arguments), truth()
        assert (found[2], wanted[2]) == (True, False)
        for got, want in zip(found[0], wanted[0], strict=True):
            assert torch.equal(got, want)
        return compared_gradients(layer, found, true, wanted)

    assert_rule(compare)


@pytest.mark.parametrize(
    ("options", "dtype", "dtypes", "given", "is_along"),
    (
        ({"candidate": "token"}, torch.float32, {}, ARGUMENTS["mask"], True),
        ({"pooled_gate": "prefix"}, torch.float16, {}, ARGUMENTS["offset"], True),
        ({"recompute": True}, torch.float16, {}, ARGUMENTS["mask"], True),
        ({"attention_mlp_layers": 1}, torch.float32, {}, {}, True),
        # rows that tokens share, and rows in another dtype than their tanh
        ({"write": "chunk", "tokens_per_slot": 2}, torch.float32, {}, {}, False),
        ({}, torch.float16, {"memory": torch.float32}, ARGUMENTS["mask"], False),
    ),
    ids=("float32", "float16", "recomputed", "one MLP layer", "chunk", "float32 memory"),
)
def test_norms_may_take_tanh_and_relu_along(options, dtype, dtypes, given, is_along):
    """As Triton's do, with what gradients they have; gradients and results by the rule."""
    launches = pytest.importorskip("tools.launches")

    def compare(seed: int) -> list[testing.Comparison]:
        layer, inputs, truth = lowered(lm2.ReleaseMemory, options, dtype, dtypes, seed)
        with launches.interpreted("sm_90"), lm2.use_backend("triton"), lm2.recording() as ran:
            found = run(layer, inputs, **given)
        functions = [name for name, _ in ran]
        expected = {NORM: 1 - is_along, NORM_AND_TANH: is_along, NORM_OF_RELU: 1}
        for norm, times in expected.items():
            assert functions.count(f"{norm}_forward") == (2 if layer.recompute else 1) * times
            assert functions.count(f"{norm}_backward") == times
        assert found[2]
        with lm2.use_backend("eager"), made_of_ops():
            wanted, true = run(layer, inputs, **given), truth(**given)
        compared = compared_gradients(layer, found, true, wanted)
        for index, name in enumerate(("output", "new memory")):
            results = (one[0][index] for one in (found, true, wanted))
            compared.append(testing.compare(name, *results))
        return compared

    assert_rule(compare)


@both_layers
def test_recomputed_it_keeps_its_inputs_and_gives_the_same_bits(kind):
    found = []
    for recompute in (False, True):
        layer = make_layer(kind, recompute=recompute, dropout=0.4, candidate="token")
        found.append(run(layer, make_inputs(), slot_offset=1))
    assert found[1][2]
    for got, want in zip(found[1][1], found[0][1], strict=True):
        assert torch.equal(got, want)


# --- when it is not one ---------------------------------------------------------------------------


class _Own(torch.Tensor):
    pass


@both_layers
def test_whoever_looks_into_it_finds_ops(kind):
    layer, (x, memory) = make_layer(kind), make_inputs()
    assert is_one(layer(x, memory)[0])
    with FlopCounterMode(display=False):
        assert not is_one(layer(x, memory)[0])
    assert not is_one(layer(x.as_subclass(_Own), memory)[0])
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        layer(forward_ad.make_dual(x, x), memory)
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.func.vmap(layer)(x[:, None], memory[:, None])
    gradient = torch.func.grad(lambda x: layer(x, memory)[0].sum())(x.detach())
    (wanted,) = torch.autograd.grad(layer(x, memory)[0].sum(), x)
    assert_round_off(gradient, wanted)
    handle = layer.value_proj.register_forward_hook(lambda *_: None)
    assert not is_one(layer(x, memory)[0])
    handle.remove()
    assert is_one(layer(x, memory)[0])
    state = lm2.MemoryState([memory])
    (rows,), cache = state.piece(T, N, keep=True)
    assert not is_one(layer(x, rows, cache=cache)[0])


@both_layers
def test_a_trace_is_of_ops(kind):
    layer, (x, memory) = make_layer(kind), make_inputs()
    traced = torch.jit.trace(layer, (x, memory), check_trace=False)
    assert_round_off(traced(x, memory)[0], layer(x, memory)[0])


@both_layers
def test_somebody_elses_methods_are_called(kind):
    layer, inputs, seen = make_layer(kind), make_inputs(), []
    extended = type("Extended", (kind,), {"forward": kind.forward, "_own": 1})
    changed = type("Changed", (kind,), {"_candidate": lambda self, read, x: seen.append(1) or read})
    layer.__class__ = extended
    assert is_one(layer(*inputs)[0])
    layer.__class__ = changed
    assert not is_one(layer(*inputs)[0])
    assert seen


@both_layers
def test_flops_are_counted_within_backward(kind):
    layer, inputs = make_layer(kind), make_inputs()
    counts = []
    for context in (contextlib.nullcontext(), made_of_ops()):
        with context:
            output = layer(*inputs)[0]
        with FlopCounterMode(display=False) as counter:
            output.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@both_layers
def test_frozen_layers_of_inference_mode(kind):
    with torch.inference_mode():
        layer, (x, memory) = kind(D, 3), (torch.randn(1, T, D), torch.randn(1, N, D))
    want = made_of(layer, x, memory)
    with torch.inference_mode():
        assert torch.equal(layer(x, memory)[0], want)
    layer = kind(D, 3).requires_grad_(False)
    assert layer(x, memory)[0].grad_fn is None


def made_of(layer, *inputs):
    with made_of_ops(), torch.inference_mode():
        return layer(*inputs)[0]


@both_layers
def test_refusals_of_derivatives(kind):
    layer, (x, memory) = make_layer(kind), make_inputs()
    output, _ = layer(x, memory)
    (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{kind.__name__}: double backward"):
        gradient.sum().backward()
    output, _ = layer(x, memory)
    cotangents = torch.ones(3, *output.shape, dtype=output.dtype)
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.autograd.grad(output, x, cotangents, is_grads_batched=True)


# --- what is remembered ---------------------------------------------------------------------------


@both_layers
def test_what_was_checked_is_not_checked_again(kind):
    layer, inputs = make_layer(kind), make_inputs()
    base._known.clear()
    with mock.patch.object(kind, "_check", wraps=kind._check, autospec=True) as check:
        for _ in range(3):
            layer(*inputs)
        assert check.call_count == 1
        # another layer of the same kind
        copy.deepcopy(layer)(*inputs)
        assert check.call_count == 1
        layer(*make_inputs(T - 1))
        assert check.call_count == 2


CHANGES = {
    "causal": (1, TypeError),
    "scale": (True, TypeError),
    "top_k": (2.0, TypeError),
    "dropout": (1.0, ValueError),
    "write": ("chunks", ValueError),
    "tokens_per_slot": ([1], TypeError),
    "candidate": ("token", ValueError),
}


@both_layers
@pytest.mark.parametrize("name", CHANGES)
def test_changed_options_are_checked(kind, name):
    layer, inputs = make_layer(kind, scale=1.0, top_k=2), make_inputs()
    layer(*inputs)
    value, error = CHANGES[name]
    setattr(layer, name, value)
    with pytest.raises(error, match=kind.__name__):
        layer(*inputs)


@both_layers
def test_a_weight_of_another_shape_is_checked(kind):
    layer, (x, memory) = make_layer(kind), make_inputs()
    layer(x, memory)
    for module in layer.modules():
        if not isinstance(module, nn.Linear):
            continue
        kept = module.weight
        for shape in ((D - 1, D), (D, D + 1)):
            module.weight = nn.Parameter(torch.zeros(shape, dtype=x.dtype))
            with pytest.raises((ValueError, RuntimeError)):
                layer(x, memory)
        module.weight = nn.Parameter(kept.detach().float())
        with pytest.raises(TypeError, match="float32"):
            layer(x, memory)
        module.weight = kept
    layer(x, memory)


# calls of this package's Python functions at most: in forward, and with backward
CALLS = {
    (lm2.PaperMemory, True): (52, 171),
    (lm2.PaperMemory, False): (73, 191),
    (lm2.ReleaseMemory, True): (84, 247),
    (lm2.ReleaseMemory, False): (122, 284),
}


class _WithNorms(types.SimpleNamespace):
    """The eager backend, whose norms take tanh and ReLU along."""

    def __init__(self):
        super().__init__(**vars(eager))

    def residual_layer_norm_and_tanh_forward(self, x, residual, *args):
        return (*eager.residual_layer_norm_forward(x, residual, *args), residual.tanh())

    def residual_layer_norm_of_relu_forward(self, x, *args):
        return eager.residual_layer_norm_forward(x.relu(), *args)


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize(
    ("kind", "options", "last", "most"),
    [
        (lm2.PaperMemory, {}, 4, 4),
        (lm2.PaperMemory, {"candidate": "token", "output": "memory"}, 4, 4),
        (lm2.ReleaseMemory, {}, 2, 3),
        (lm2.ReleaseMemory, {"candidate": "token", "attention_mlp_layers": 3}, 2, 3),
        # which has gates of tokens too, and what is pooled
        (lm2.ReleaseMemory, {"pooled_gate": "prefix"}, 3, 5),
        # whose norms take tanh and ReLU along
        (lm2.ReleaseMemory, {"backend": "with_norms"}, 2, 3),
    ],
)
def test_what_nobody_keeps_makes_room(kind, options, last, most, recompute, monkeypatch):
    """When the rows are updated there is what the update reads, and nothing else: the candidate
    and the gates. Before that there is at most what the attention reads, or as much.
    """
    registered = contextlib.nullcontext()
    if "backend" in options:
        registered = backends.register(options["backend"], _WithNorms(), before="eager")
    with registered:
        layer = make_layer(kind, recompute=recompute, **options)
        # the parts are what is watched
        monkeypatch.setattr(in_cpp, "enabled", False)
        _assert_room(layer, make_inputs(N), last, most, recompute, monkeypatch)


def _assert_room(layer, inputs, last, most, recompute, monkeypatch):
    made, alive = [], []

    def watched(work):
        def run(*args, **options):
            alive.append(sum(not storage.expired() for storage in made))
            results = work(*args, **options)
            for result in results if isinstance(results, tuple) else (results,):
                if result.numel() >= inputs[0].numel():
                    made.append(StorageWeakRef(result.untyped_storage()))
            return results

        return run

    for module in (function, paper_function, release_function):
        for name in ("call", "linear", "tanh"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, watched(getattr(module, name)))
    results = layer(*inputs)
    # the update is the last that is called
    kept = alive[-1]
    made.clear()
    alive.clear()
    with torch.no_grad():
        got = layer(*inputs)
    assert alive[-1] == last
    assert max(alive) == most
    assert kept == last if recompute else kept > last
    assert all(map(torch.equal, got, results))


@pytest.mark.parametrize(
    "in_one", (pytest.param(True, marks=needs_cpp), False), ids=("one call", "parts")
)
@both_layers
def test_how_much_python_a_call_takes(kind, in_one, monkeypatch):
    layer, inputs = make_layer(kind), make_inputs(N)
    leaves, package = [*inputs, *layer.parameters()], str(Path(lm2.__file__).parent)

    def count(work) -> int:
        calls = 0

        def profile(frame, event, _):
            nonlocal calls
            calls += event == "call" and frame.f_code.co_filename.startswith(package)

        sys.setprofile(profile)
        try:
            work()
        finally:
            sys.setprofile(None)
        return calls

    def both():
        torch.autograd.grad([output.sum() for output in layer(*inputs)], leaves)

    both()
    monkeypatch.setattr(in_cpp, "enabled", in_one)
    most_forward, most_both = CALLS[kind, in_one]
    assert 0 < count(lambda: layer(*inputs)) <= most_forward
    assert count(both) <= most_both


@both_layers
def test_it_is_forgotten_before_it_is_much(kind, monkeypatch):
    monkeypatch.setattr(base, "_MOST_KNOWN", 4)
    layer = make_layer(kind)
    for tokens in range(1, N + 1):
        layer(*make_inputs(tokens))
        assert len(base._known) <= 4


@both_layers
def test_a_backend_that_comes_and_goes(kind):
    layer, inputs = make_layer(kind), make_inputs()
    layer(*inputs)
    eager = backends.get("eager")
    with lm2.use_backend("eager"), backends.recording() as recorded:
        layer(*inputs)
    assert {name for _, name in recorded} == {"eager"}
    with backends.register("mine", eager), backends.recording() as recorded:
        layer(*inputs)
    assert {name for _, name in recorded} == {"mine"}
    with backends.recording() as recorded:
        layer(*inputs)
    assert "mine" not in {name for _, name in recorded}


@both_layers
def test_another_backend_of_the_same_name(kind):
    """What runs on CPUs, and then what does not."""
    layer, inputs = make_layer(kind), make_inputs()
    eager = backends.get("eager")
    with backends.register("mine", eager):
        layer(*inputs)
    elsewhere = types.SimpleNamespace(**vars(eager))
    elsewhere.DEVICES = {"cuda": "GPUs"}
    with backends.register("mine", elsewhere), backends.recording() as recorded:
        layer(*inputs)
    assert "mine" not in {name for _, name in recorded}


def test_a_norm_without_bias_is_no_tensor_to_a_backend():
    layer, inputs = make_layer(lm2.ReleaseMemory), make_inputs()
    layer.attended_memory_layernorm = nn.LayerNorm(D, bias=False, dtype=torch.float64)
    choosy = types.SimpleNamespace(**vars(backends.get("eager")))
    choosy.unsupported_reason = lambda op, *tensors: str([t.dtype for t in tensors]) and None
    with backends.register("choosy", choosy):
        assert not is_one(layer(*inputs)[0])


@both_layers
def test_layouts_are_checked_each_time(kind):
    layer, (x, memory) = make_layer(kind), make_inputs()
    mask = torch.ones(B, N, dtype=torch.bool)
    layer(x, memory, slot_mask=mask)
    for layout in ("to_sparse", "to_mkldnn"):
        for inputs in ((x, memory), (memory[:, :T], x)):
            sparse = getattr(inputs[0].detach().float(), layout)()
            with pytest.raises(TypeError, match="dense strided"):
                kind(D, 3)(sparse, inputs[1].float())
    with pytest.raises(TypeError, match="dense strided"):
        layer(x, memory, slot_mask=mask.to_sparse())


@both_layers
def test_nothing_is_pickled_or_copied_with_a_layer(kind):
    layer, inputs = make_layer(kind), make_inputs()
    before = pickle.dumps(layer)
    layer(*inputs)
    assert pickle.dumps(layer) == before


@both_layers
def test_parameters_that_hooks_read(kind):
    layer, (x, memory) = make_layer(kind), make_inputs()
    seen = []
    for name, parameter in layer.named_parameters():
        parameter.register_hook(lambda gradient, name=name: seen.append(name))
    output, new_memory = layer(x, memory)
    (output.sum() + new_memory.sum()).backward()
    assert sorted(seen) == sorted(name for name, _ in layer.named_parameters())
