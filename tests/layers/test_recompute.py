"""Layers that keep their inputs alone for backward: the same bits, from fewer bytes."""

import contextlib
import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import lm2_kernels as lm2
from lm2_kernels.model.config import LM2Config
from lm2_kernels.state.memory import MemoryState
from tools.models import KINDS, random_ids, small_model
from tools.native import needs_cpp
from tools.rounding import assert_round_off

B, T, N, D, H = 2, 4, 6, 12, 3

both_layers = pytest.mark.parametrize("kind", [lm2.PaperMemory, lm2.ReleaseMemory])


def make_layer(kind, recompute=True, dtype=torch.float64, dim=D, **options):
    torch.manual_seed(1)
    return kind(dim, H, recompute=recompute, dtype=dtype, **options)


def make_inputs(tokens=T, dtype=torch.float64, memory_dtype=None):
    generator = torch.Generator().manual_seed(2)
    x, memory = (
        torch.randn(B, rows, D, generator=generator, dtype=torch.float64) for rows in (tokens, N)
    )
    return x.to(dtype).requires_grad_(), memory.to(memory_dtype or dtype).requires_grad_()


def step(layer, inputs, used=slice(None), autocast=False, **arguments):
    """Outputs, the gradients of inputs and parameters, and the generator's state after both."""
    leaves = [*inputs, *layer.parameters()]
    leaves += [t for t in arguments.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = layer(*inputs, **arguments)
    drawn = torch.rand(1)
    loss = sum((index + 1.0) * o.double().square().sum() for index, o in enumerate(outputs[used]))
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [*outputs, *gradients, drawn, torch.get_rng_state()]


def assert_equal(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b))


def bytes_saved(run, own):
    """Of the storages that backward holds, but for those of ``own`` tensors."""
    known = {tensor.untyped_storage()._cdata for tensor in own}
    # alive together, so that no two have one address
    alive = []

    def pack(tensor):
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run()
    storages = {s._cdata: s.nbytes() for s in (tensor.untyped_storage() for tensor in alive)}
    return sum(size for key, size in storages.items() if key not in known), outputs


# --- a layer ----------------------------------------------------------------------------------

CALLS = {
    "plain": ({}, {}),
    "dropout": ({"dropout": 0.4}, {}),
    "mask and offset": ({}, {"slot_offset": 1, "slot_mask": True}),
    "not causal, top-k": ({"causal": False, "top_k": 2}, {}),
    "one output": ({"dropout": 0.4}, {"used": slice(0, 1)}),
    "new memory alone": ({}, {"used": slice(1, 2)}),
    "autocast": ({"dropout": 0.4, "dtype": torch.float32}, {"autocast": True}),
    "bfloat16": ({"dtype": torch.bfloat16}, {"memory_dtype": torch.float32}),
}


@both_layers
@pytest.mark.parametrize("backend", ["eager", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("call", CALLS)
def test_results_are_the_same_bits(kind, backend, call):
    options, arguments = CALLS[call]
    arguments = dict(arguments)
    dtype = options.get("dtype", torch.float64)
    inputs = make_inputs(dtype=dtype, memory_dtype=arguments.pop("memory_dtype", None))
    if arguments.get("slot_mask"):
        arguments["slot_mask"] = torch.arange(N).expand(B, N) != 2
    found = [
        step(make_layer(kind, recompute, backend=backend, **options), inputs, **arguments)
        for recompute in (False, True)
    ]
    assert_equal(found[1], found[0])


def test_pooled_sum_and_second_block():
    options = {"pooled_gate": "prefix", "num_blocks": 2, "dropout": 0.4}
    arguments = {"pooled_sum": torch.rand(B, D, dtype=torch.float64).requires_grad_()}
    arguments |= {"return_pooled_sum": True, "slot_offset": 2}
    found = [
        step(make_layer(lm2.ReleaseMemory, recompute, **options), make_inputs(), **arguments)
        for recompute in (False, True)
    ]
    assert_equal(found[1], found[0])
    layer, (x, memory) = make_layer(lm2.ReleaseMemory, pooled_gate="prefix"), make_inputs()
    with pytest.raises(TypeError, match="pooled_sum"):
        layer(x, memory, pooled_sum="none")


@both_layers
@pytest.mark.parametrize("options", [{}, {"dropout": 0.4}], ids=["", "dropout"])
def test_nothing_but_the_inputs_is_kept(kind, options):
    x, memory = make_inputs(tokens=N)
    saved = {}
    for recompute in (False, True):
        layer = make_layer(kind, recompute, **options)
        own = (x, memory, *layer.parameters())
        saved[recompute], _ = bytes_saved(lambda layer=layer: layer(x, memory), own)
    # the seed of the dropout
    assert saved[True] == (8 if options else 0)
    assert saved[False] > 6 * x.nbytes


@both_layers
def test_backward_reruns_forward_by_the_same_backend(kind):
    layer, (x, memory) = make_layer(kind), make_inputs()
    with lm2.use_backend("eager"), lm2.recording() as before:
        output, new_memory = layer(x, memory)
    with lm2.recording() as after:
        (output.sum() + new_memory.sum()).backward()
    assert {name for _, name in before + after} == {"eager"}
    assert set(before) < set(after)


@both_layers
def test_without_gradients_it_is_the_plain_layer(kind):
    layer, (x, memory) = make_layer(kind), make_inputs()
    with torch.no_grad():
        assert_equal(layer(x, memory), make_layer(kind, False)(x, memory))
    layer.requires_grad_(False)
    own = (x, memory, *layer.parameters())
    saved, outputs = bytes_saved(lambda: layer(x.detach(), memory.detach()), own)
    assert saved == 0
    assert not any(output.requires_grad for output in outputs)


@both_layers
@pytest.mark.parametrize("needed", ["x", "memory", "parameters"])
def test_some_need_no_gradient(kind, needed):
    found = []
    for recompute in (False, True):
        layer, (x, memory) = make_layer(kind, recompute), make_inputs()
        layer.requires_grad_(needed == "parameters")
        x.requires_grad_(needed == "x")
        memory.requires_grad_(needed == "memory")
        found.append(step(layer, (x, memory)))
    assert_equal(found[1], found[0])


@both_layers
def test_each_gradient_comes_once_and_the_graph_can_be_kept(kind):
    layer, (x, memory) = make_layer(kind), make_inputs()
    fired = []
    for name, parameter in layer.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    loss = sum(output.sum() for output in layer(x, memory))
    loss.backward(retain_graph=True)
    assert sorted(fired) == sorted(name for name, _ in layer.named_parameters())
    first = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * first)


@both_layers
def test_refusals(kind):
    """Double backward, and what changed between forward and backward."""
    layer, (x, memory) = make_layer(kind, dropout=0.4), make_inputs()
    (gradient,) = torch.autograd.grad(layer(x, memory)[0].square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        gradient.sum().backward()
    output, _ = layer(x, memory)
    with torch.no_grad():
        layer.query_proj.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    output, _ = layer(x, memory)
    want = torch.autograd.grad(output.sum(), x, retain_graph=True)
    layer.eval()
    assert torch.equal(*want, *torch.autograd.grad(output.sum(), x))
    # of a layer that is not plain, the modules run again as they are then
    layer.train()
    layer.key_proj.register_forward_hook(lambda *_: None)
    output, _ = layer(x, memory)
    layer.eval()
    with pytest.raises(RuntimeError, match="number of tensors was saved"):
        output.sum().backward()


@both_layers
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "hooks"])
def test_within_a_checkpoint(kind, use_reentrant):
    def run(layer):
        return lambda *inputs: checkpoint(layer, *inputs, use_reentrant=use_reentrant)

    found = []
    for recompute in (False, True):
        layer, inputs = make_layer(kind, recompute, dropout=0.4), make_inputs()
        torch.manual_seed(5)
        output, new_memory = run(layer)(*inputs)
        (output.square().sum() + new_memory.sum()).backward()
        found.append([t.grad for t in (*inputs, *layer.parameters())])
    assert_equal(found[1], found[0])


@pytest.mark.parametrize(
    ("kind", "dropout"),
    [
        (lm2.PaperMemory, 0.4),
        (lm2.ReleaseMemory, 0.0),
        pytest.param(lm2.PaperMemory, 0.0, marks=pytest.mark.slow),
        pytest.param(lm2.ReleaseMemory, 0.4, marks=pytest.mark.slow),
    ],
)
def test_compiled_whole(kind, dropout):
    """The bits of the compiled layer that keeps everything, from fewer bytes."""
    found, saved = [], []
    for recompute in (False, True):
        torch._dynamo.reset()
        layer, (x, memory) = make_layer(kind, recompute, dropout=dropout), make_inputs()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        found.append(step(compiled, (x, memory)))
        own = (x, memory, *layer.parameters())
        saved.append(bytes_saved(lambda run=compiled, a=x, b=memory: run(a, b), own)[0])
    assert_equal(found[1], found[0])
    # the seed is drawn again from the generator's state
    kept = saved[1] - (torch.get_rng_state().nbytes if dropout else 0)
    # older ones keep what the ops return as well
    is_exact = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
    assert kept <= (0 if is_exact else saved[0] / 2)
    assert saved[0] > 4 * x.nbytes


@both_layers
def test_option(kind):
    assert "recompute" not in repr(kind(D, H))
    assert "recompute=True" in repr(kind(D, H, recompute=True))
    with pytest.raises(TypeError, match="recompute must be a bool"):
        kind(D, H, recompute=1)


# --- in pieces, in a model --------------------------------------------------------------------


@both_layers
def test_an_open_segment_is_extended_once(kind):
    """Pieces keep what they kept; gradients are the same bits."""
    found = []
    for recompute in (False, True):
        options = {} if kind is lm2.PaperMemory else {"pooled_gate": "prefix"}
        layer, (x, memory) = make_layer(kind, recompute, **options), make_inputs()
        state, outputs = MemoryState([memory]), []
        for piece in x.split([3, 1], dim=1):
            (rows,), cache = state.piece(piece.shape[1], N, keep=True)
            output, new_rows = layer(piece, rows, cache=cache)
            state = state.after(cache, [new_rows])
            outputs.append(output)
        assert state._cache["key0"].shape[1] == T
        loss = torch.cat(outputs, dim=1).square().sum() + state.banks[0].sum()
        leaves = (x, memory, *layer.parameters())
        found.append([*outputs, *state.banks, *torch.autograd.grad(loss, leaves)])
    assert_equal(found[1], found[0])


def train(model, ids, **arguments):
    torch.manual_seed(5)
    loss = model(ids, ids, **arguments).loss
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert all(
        g is not None and g.any() for n, g in zip(names, gradients, strict=True) if "mlp" in n
    )
    return [loss, *gradients, torch.get_rng_state()]


MODELS = [(*kind, "prefix") for kind in KINDS] + [("release", "depth", "segment")]


@pytest.mark.parametrize(("formulation", "flow", "pooled_gate"), MODELS)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_a_model_trains_the_same(formulation, flow, pooled_gate, padded):
    """Over three segments, the last one short; with padding some segments stay open."""
    ids, arguments = random_ids(2, 15), {}
    if padded:
        arguments["attention_mask"] = (torch.arange(15) >= torch.tensor([[0], [5]])).long()
    found, saved = [], []
    for recompute in (False, True):
        model = small_model(
            formulation=formulation,
            flow=flow,
            pooled_gate=pooled_gate,
            memory_dropout=0.3,
            memory_recompute=recompute,
        )
        assert all(layer.recompute is recompute for layer in model.memory_layers())
        found.append(train(model, ids, **arguments))
        run = lambda model=model: model(ids, ids, **arguments)  # noqa: E731
        saved.append(bytes_saved(run, model.parameters())[0])
    assert_equal(found[1], found[0])
    # self-attention and MLP keep what they kept
    assert saved[1] < (0.9 if padded else 0.75) * saved[0]


def test_a_model_compiles_whole():
    torch._dynamo.reset()
    ids, model = random_ids(2, 8), small_model(memory_recompute=True, num_hidden_layers=1)
    parameters = list(model.parameters())
    found = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        loss = run(ids, ids).loss
        found.append([loss, *torch.autograd.grad(loss, parameters)])
    for got, want in zip(*found, strict=True):
        assert_round_off(got, want)


def test_config(tmp_path):
    model = small_model(memory_recompute=True)
    assert "recompute=True" in repr(model)
    model.save(tmp_path)
    loaded = lm2.LM2ForCausalLM.load(tmp_path)
    assert loaded.config == model.config
    assert all(layer.recompute for layer in loaded.memory_layers())
    values = dataclasses.asdict(model.config)
    # a file from before there was the option
    del values["memory_recompute"]
    assert LM2Config.from_dict(values).memory_recompute is False
    with pytest.raises(TypeError, match="memory_recompute must be a bool"):
        LM2Config.from_dict({**values, "memory_recompute": 1})


def test_threads_that_recompute_leave_the_parameters():
    """Their saved tensors are copies; while one computes backward, another reads the layer."""
    layer = lm2.PaperMemory(16, 2, recompute=True, dtype=torch.float64)
    own = list(layer.parameters())
    x = torch.randn(2, 8, 16, dtype=torch.float64)
    others = {name: torch.randn_like(p).requires_grad_() for name, p in layer.named_parameters()}
    with torch.no_grad():
        read = layer(x, x)[0]

    def learn(parameters):
        with torch.autograd.graph.save_on_cpu():
            output, _ = torch.func.functional_call(layer, parameters, (x, x))
        return torch.autograd.grad(output.sum(), parameters["query_proj.weight"])[0]

    def backward(_):
        graph = output_of_others.sum()
        return torch.autograd.grad(graph, others["query_proj.weight"], retain_graph=True)[0]

    def infer(_):
        with torch.no_grad():
            return layer(x, x)[0]

    wants = [learn(others), None, read]
    output_of_others, _ = torch.func.functional_call(layer, others, (x, x))
    wants[1] = backward(None)
    with ThreadPoolExecutor(4) as pool:
        futures = [(pool.submit(f, None), w) for f, w in [(backward, wants[1]), (infer, read)] * 20]
        for future, want in futures:
            assert torch.equal(future.result(), want)
    assert all(a is b for a, b in zip(layer.parameters(), own, strict=True))


@pytest.mark.parametrize("kind", ("PaperMemory", "ReleaseMemory"))
@pytest.mark.parametrize("name", ("value_proj", "query_proj"))
def test_the_buffers_that_forward_had(kind, name):
    """Of a pruned weight, the mask that functional_call gave."""
    layer = getattr(lm2, kind)(8, 2, dtype=torch.float64)
    prune.identity(layer.get_submodule(name), "weight")
    mask = torch.arange(64.0, dtype=torch.float64).view(8, 8).remainder(2)
    tensors = {**dict(layer.named_parameters()), f"{name}.weight_mask": mask}
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    gradients = []
    for recompute in (True, False):
        layer.recompute = recompute
        output, _ = torch.func.functional_call(layer, tensors, (x, x))
        weight = tensors[f"{name}.weight_orig"]
        gradients.append(torch.autograd.grad(output.square().sum(), weight)[0])
    assert torch.equal(*gradients)
    assert not gradients[0][mask == 0].any()
    output, _ = layer(x, x)
    layer.recompute = True
    output, _ = layer(x, x)
    layer.get_submodule(name).weight_mask.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("kind", ("PaperMemory", "ReleaseMemory"))
def test_a_submodule_that_drops_out(kind):
    """As an adapter with dropout does, in a layer that is in evaluation otherwise."""
    layer = getattr(lm2, kind)(8, 2, dtype=torch.float64).eval()
    layer.query_proj = nn.Sequential(layer.query_proj, nn.Dropout(0.5))
    x, gradients = torch.randn(2, 4, 8, dtype=torch.float64), []
    for layer.recompute in (True, False):
        torch.manual_seed(3)
        output, _ = layer(x, x)
        # backward is not where forward was
        torch.manual_seed(4)
        gradients.append(torch.autograd.grad(output.square().sum(), layer.key_proj.weight)[0])
    assert torch.equal(*gradients)


def test_a_submodule_that_changes_its_buffers_is_refused():
    layer = lm2.PaperMemory(8, 2, recompute=True)
    parametrizations.spectral_norm(layer.value_proj)
    output, _ = layer(torch.randn(1, 4, 8), torch.randn(1, 4, 8))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("kind", ("PaperMemory", "ReleaseMemory"))
@pytest.mark.parametrize("moved", (False, True))
def test_backward_has_the_parameters_that_forward_had(kind, moved):
    """Those of a functional_call, and those that saved-tensor hooks have moved meanwhile."""
    torch.manual_seed(0)
    layer = getattr(lm2, kind)(8, 2, recompute=True, dtype=torch.float64)
    own = dict(layer.named_parameters())
    x, memory = torch.randn(2, 1, 4, 8, dtype=torch.float64)
    others = {name: torch.randn_like(p).requires_grad_() for name, p in own.items()}
    gradients = []
    for recompute in (True, False):
        layer.recompute = recompute
        with torch.autograd.graph.save_on_cpu() if moved else contextlib.nullcontext():
            outputs = torch.func.functional_call(layer, others, (x, memory))
        loss = sum(output.square().sum() for output in outputs)
        gradients.append(torch.autograd.grad(loss, list(others.values())))
    for got, want in zip(*gradients, strict=True):
        assert torch.equal(got, want)
    assert all(own[name] is parameter for name, parameter in layer.named_parameters())
