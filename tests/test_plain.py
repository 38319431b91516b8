"""Submodules are called whenever anybody could tell, and parameters are ordinary ones."""

import contextlib
import copy
import functools
import io

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import lm2_kernels as lm2
from lm2_kernels import backends, linear
from lm2_kernels.backends import cpu_products
from lm2_kernels.backends.contract import NORM, op_and_way
from tools.products import large_products
from tools.rounding import assert_round_off

D, T, N = 12, 5, 7
KINDS = {
    "paper": lm2.PaperMemory,
    "release": functools.partial(lm2.ReleaseMemory, attention_mlp_layers=3),
}


def _layer(kind: str, dtype=torch.float64):
    torch.manual_seed(0)
    return KINDS[kind](D, 3, dtype=dtype)


def _names(of: type) -> list[tuple[str, str]]:
    return [
        (kind, name)
        for kind in KINDS
        for name, module in _layer(kind).named_modules()
        if name and isinstance(module, of)
    ]


_LINEAR, _NORM = _names(nn.Linear), _names(nn.LayerNorm)
_PROJECTORS = [("release", "input_gate_projector"), ("release", "memory_gate_projector")]
_CALLED = _LINEAR + _NORM + _PROJECTORS


def _inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x, memory = (
        torch.randn(2, rows, D, dtype=torch.float64, generator=generator) for rows in (T, N)
    )
    return x.to(dtype).requires_grad_(), memory.to(dtype)


def _run(layer):
    x, memory = _inputs(next(layer.parameters()).dtype)
    output, new_memory = layer(x, memory)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    loss = output.square().sum() + new_memory.square().sum()
    return [output, new_memory, *torch.autograd.grad(loss, [x, *parameters])]


def _assert_same(got, want):
    for one, other in zip(got, want, strict=True):
        assert_round_off(one, other)


@pytest.fixture(params=("small", "large"))
def size(request):
    """With every product small, and with every one large enough for our own Function."""
    with large_products() if request.param == "large" else contextlib.nullcontext():
        yield


def _forward_hook(module, seen, _):
    module.register_forward_hook(lambda *_: seen.append(1))


def _forward_pre_hook(module, seen, _):
    module.register_forward_pre_hook(lambda *_: seen.append(1))


def _backward_hook(module, seen, _):
    module.register_full_backward_hook(lambda *_: seen.append(1))


def _backward_pre_hook(module, seen, _):
    module.register_full_backward_pre_hook(lambda *_: seen.append(1))


def _watched(forward, watched, seen):
    def watching(*args):
        if args[0] is watched:
            seen.append(1)
        return forward(*args)

    return watching


def _instance(module, seen, _):
    module.forward = functools.partial(_watched(type(module).forward, module, seen), module)


def _class(module, seen, monkeypatch):
    kind = type(module)
    monkeypatch.setattr(kind, "forward", _watched(kind.forward, module, seen))


def _call(module, seen, monkeypatch):
    monkeypatch.setattr(nn.Module, "__call__", _watched(nn.Module.__call__, module, seen))


def _of_all_modules(register, module, seen, monkeypatch):
    def hook(called, *_):
        if called is module:
            seen.append(1)

    monkeypatch.callback(register(hook).remove)


def _global_hook(*args):
    _of_all_modules(torch.nn.modules.module.register_module_forward_hook, *args)


def _global_pre_hook(*args):
    _of_all_modules(torch.nn.modules.module.register_module_forward_pre_hook, *args)


def _subclass(module, seen, _):
    kind = type(module)
    module.__class__ = type("Own", (kind,), {"forward": _watched(kind.forward, module, seen)})


class _Patch:
    """pytest's monkeypatch, and callbacks that end with the test."""

    def __init__(self, monkeypatch, request):
        self.setattr, self.callback = monkeypatch.setattr, request.addfinalizer


_WAYS = (
    _forward_hook,
    _forward_pre_hook,
    _backward_hook,
    _backward_pre_hook,
    _instance,
    _class,
    _call,
    _global_hook,
    _global_pre_hook,
    _subclass,
)


@pytest.mark.parametrize("way", _WAYS, ids=lambda way: way.__name__[1:])
@pytest.mark.parametrize(("kind", "name"), _CALLED)
def test_whoever_watches_sees_the_call(kind, name, way, size, monkeypatch, request):
    layer, seen = _layer(kind), []
    want = _run(layer)
    way(layer.get_submodule(name), seen, _Patch(monkeypatch, request))
    _assert_same(_run(layer), want)
    assert seen


def test_a_submodule_compiled_by_itself_is_called(size):
    layer, seen = _layer("paper"), []
    want = _run(layer)
    module = layer.value_proj
    module.compile()
    # what compile() has put in the call's place
    assert module._compiled_call_impl is not None
    module._compiled_call_impl = lambda x: seen.append(1) or module._call_impl(x)
    _assert_same(_run(layer), want)
    assert seen


@pytest.mark.parametrize("name", ("linear", "layer_norm"))
def test_a_patched_function_is_called(name, size, monkeypatch):
    """As profilers do that count operations."""
    layer, seen = _layer("release"), []
    want = _run(layer)
    original = getattr(F, name)
    monkeypatch.setattr(F, name, lambda *args: seen.append(1) or original(*args))
    _assert_same(_run(layer), want)
    # key, value, query, three times the MLP, two gates; two norms
    assert len(seen) == (8 if name == "linear" else 2)


class _Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_the_functions(size):
    layer = _layer("release")
    want = _run(layer)
    with _Functions() as mode:
        _assert_same(_run(layer), want)
    assert mode.seen.count(F.linear) == 8
    assert mode.seen.count(F.layer_norm) == 2
    # the mode of a default device watches nothing
    with torch.device("cpu"), backends.recording() as ran:
        layer(*_inputs())
    assert [op_and_way(name) for name, _ in ran].count((NORM, "forward")) == 2


def test_a_patched_call_of_modules_is_seen(size, monkeypatch):
    layer, seen = _layer("release"), []
    original = nn.Module._call_impl

    def call(module, *args):
        seen.append(type(module))
        return original(module, *args)

    monkeypatch.setattr(nn.Module, "_call_impl", call)
    _run(layer)
    assert seen.count(nn.Linear) == 8
    assert seen.count(nn.LayerNorm) == 2


@pytest.mark.parametrize(("kind", "name"), _LINEAR)
def test_a_bias_that_is_a_buffer(kind, name, size):
    layer = _layer(kind)
    module = layer.get_submodule(name)
    bias = torch.randn(module.out_features, dtype=torch.float64)
    module.bias = nn.Parameter(bias)
    want = layer(*_inputs())
    del module.bias
    module.register_buffer("bias", bias)
    _assert_same(layer(*_inputs()), want)


@pytest.mark.parametrize("shape", ((1,), (1, D), (2, T, D)))
def test_a_bias_that_is_broadcast(shape, size):
    layer = _layer("paper")
    bias = torch.randn(shape, dtype=torch.float64)
    x, memory = _inputs()
    layer.query_proj.bias = nn.Parameter(bias)
    want = F.linear(x, layer.query_proj.weight) + bias
    assert_round_off(linear.apply_linear(x, layer.query_proj), want)
    layer(x, memory)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", (8, 1024))
def test_operations_are_counted_at_every_size(kind, rows, monkeypatch):
    monkeypatch.setenv(cpu_products.FLOAT32_VARIABLE, "onednn")
    layer = KINDS[kind](128, 2)
    x = torch.randn(1, rows, 128)
    with FlopCounterMode(layer, display=False) as counter, torch.no_grad():
        layer(x, torch.randn(1, rows, 128))
    products = 6 if kind == "paper" else 3 + 3 + 2
    pooled = 0 if kind == "paper" else 2 * 2 * 128 * 128
    assert counter.get_total_flops() >= products * 2 * rows * 128 * 128 + pooled
    assert counter.get_flop_counts()["Global"]


def _prune(module, name):
    prune.l1_unstructured(module, name, 0.5)


class _Masked(nn.Module):
    def __init__(self, like):
        super().__init__()
        self.register_buffer("mask", torch.ones_like(like).reshape(-1).cumsum(0).remainder(2))

    def forward(self, weight):
        return weight * self.mask.view_as(weight)


def _parametrize(module, name):
    parametrize.register_parametrization(module, name, _Masked(getattr(module, name)))


def _weight_norm(module, name):
    torch.nn.utils.weight_norm(module, name)


def _spectral_norm(module, name):
    parametrizations.spectral_norm(module, name)


_WEIGHTS = [
    (kind, name, way)
    for kind, name in [
        *((kind, f"{name}.weight") for kind, name in _LINEAR + _NORM),
        ("release", "input_gate_projector.w"),
        ("release", "input_gate_projector.linear.bias"),
        ("release", "attended_memory_layernorm.bias"),
    ]
    for way in (_prune, _parametrize, _weight_norm, _spectral_norm)
    if way in (_prune, _parametrize)
    or (way is _weight_norm and name.endswith("weight"))
    or (name.endswith("weight") and "norm" not in name)
]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize(("kind", "name", "way"), _WEIGHTS)
def test_a_weight_that_is_computed(kind, name, way, size):
    """It trains, and is computed anew at every step."""
    layer = _layer(kind).train()
    place, _, leaf = name.rpartition(".")
    module = layer.get_submodule(place)
    way(module, leaf)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x, memory = _inputs()
    for _ in range(3):
        optimizer.zero_grad()
        output, new_memory = layer(x, memory)
        (output.square().sum() + new_memory.square().sum()).backward()
        optimizer.step()
    layer.eval()
    with torch.no_grad():
        output, new_memory = layer(x, memory)
        # what the modules then make of their parameters, in a layer of plain ones
        if way is _prune:
            prune.remove(module, leaf)
        elif way is _weight_norm:
            torch.nn.utils.remove_weight_norm(module, leaf)
        else:
            parametrize.remove_parametrizations(module, leaf)
        plain = _layer(kind)
        plain.load_state_dict(layer.state_dict())
        _assert_same((output, new_memory), plain(x, memory))


@pytest.mark.parametrize(
    "name",
    [
        *(f"{name}.weight" for kind, name in _CALLED[:-2] if kind == "release"),
        "input_gate_projector.w",
    ],
)
def test_a_changed_mask_is_seen(name, size):
    layer = _layer("release")
    place, _, leaf = name.rpartition(".")
    module = layer.get_submodule(place)
    prune.identity(module, leaf)
    x, memory = _inputs()
    before = layer(x, memory)[0]
    getattr(module, f"{leaf}_mask").zero_()
    assert not torch.equal(before, layer(x, memory)[0])


@pytest.mark.parametrize(
    "norm",
    (
        nn.RMSNorm(D, dtype=torch.float64),
        nn.Identity(),
        nn.LayerNorm(D, bias=False, dtype=torch.float64),
        nn.LayerNorm(D, elementwise_affine=False),
        nn.LayerNorm(D, dtype=torch.float64, eps=0.1),
        nn.Sequential(nn.LayerNorm(D, dtype=torch.float64), nn.Dropout(0.0)),
    ),
    ids=lambda norm: type(norm).__name__,
)
def test_norms_of_other_kinds(norm):
    layer = _layer("release")
    layer.attended_memory_layernorm2 = copy.deepcopy(norm)
    seen = []
    layer.attended_memory_layernorm2.register_forward_hook(
        lambda _, inputs, output: seen.append((inputs[0], output))
    )
    x, memory = _inputs()
    output, new_memory = layer(x, memory)
    (output.sum() + new_memory.sum()).backward()
    ((given, made),) = seen
    layer.attended_memory_layernorm2 = copy.deepcopy(norm)
    _assert_same(layer(x, memory), (output, new_memory))
    assert given.shape == (2, T, D)
    _assert_same([made], [norm(given)])
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_watched_norm_of_a_16_bit_layer(dtype):
    layer = _layer("release", torch.float32).to(dtype)
    x, memory = _inputs(dtype)
    want = layer(x, memory)
    layer.attended_memory_layernorm.register_forward_hook(lambda *_: None)
    # sums are rounded to the norm's dtype then
    for got, other in zip(layer(x, memory), want, strict=True):
        assert got.dtype == dtype
        assert (got - other).abs().max() <= 16 * torch.finfo(dtype).eps * other.abs().max()


@pytest.mark.parametrize(("kind", "name"), _LINEAR)
@pytest.mark.parametrize("rows", (T, 1024))
def test_mixed_dtypes_are_refused_at_every_size(kind, name, rows):
    layer = KINDS[kind](D, 3)
    layer.get_submodule(name).bfloat16()
    x = torch.randn(1, rows, D)
    where = "the parameters are" if name == "query_proj" else f"{name.removesuffix('.0')}: weight"
    with pytest.raises(TypeError, match=f"{where}.* torch.bfloat16"):
        layer(x, torch.randn(1, rows, D))
    with torch.autocast("cpu", torch.bfloat16):
        layer(x, torch.randn(1, rows, D))


@pytest.mark.parametrize(("kind", "name"), _LINEAR + _NORM)
def test_a_parameter_on_another_device_is_refused(kind, name):
    layer = _layer(kind)
    layer.get_submodule(name).to("meta")
    with pytest.raises(ValueError, match=r"meta.* but .* is on cpu|is on cpu but .* on meta"):
        layer(*_inputs())


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_owns_its_storage(kind):
    layer = _layer(kind)
    copies = (layer, copy.deepcopy(layer), copy.deepcopy(layer).float(), layer.requires_grad_())
    for one in copies:
        x, memory = _inputs(next(one.parameters()).dtype)
        output, new_memory = one(x, memory)
        (output.square().sum() + new_memory.square().sum()).backward()
        storages = [p.untyped_storage() for p in one.parameters()]
        storages += [p.grad.untyped_storage() for p in one.parameters()]
        assert len({storage.data_ptr() for storage in storages}) == len(storages)
        sizes = [p.numel() * p.element_size() for p in one.parameters()] * 2
        assert [storage.nbytes() for storage in storages] == sizes


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_is_saved_alone(kind):
    """Its file holds its own weights."""
    layer = KINDS[kind](64, 4)
    for part in (layer.query_proj, layer.value_proj):
        file, alone = io.BytesIO(), io.BytesIO()
        torch.save(part.state_dict(), file)
        torch.save(nn.Linear(64, 64, bias=part.bias is not None).state_dict(), alone)
        assert file.tell() == alone.tell()


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_saves_and_loads_the_module(kind, tmp_path):
    layer, path = _layer(kind), tmp_path / "layer.safetensors"
    safetensors.torch.save_model(layer, path)
    torch.manual_seed(5)
    other = KINDS[kind](D, 3, dtype=torch.float64)
    assert safetensors.torch.load_model(other, path) == (set(), [])
    _assert_equal(other.state_dict(), layer.state_dict())


def _assert_equal(got, want):
    assert list(got) == list(want)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_stay_the_views_that_a_user_made_them(kind):
    layer = _layer(kind)
    flat = nn.utils.parameters_to_vector(layer.parameters()).detach().clone()
    nn.utils.vector_to_parameters(flat, layer.parameters())
    layer.double()
    copy.deepcopy(layer)
    flat.zero_()
    assert not any(parameter.any() for parameter in layer.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_shared_data_and_assigned_tensors_stay(kind):
    layer, other = _layer(kind), _layer(kind)
    for own, parameter in zip(other.parameters(), layer.parameters(), strict=True):
        own.data = parameter.data
    other.double()
    places = [parameter.data_ptr() for parameter in layer.parameters()]
    assert [parameter.data_ptr() for parameter in other.parameters()] == places
    state = copy.deepcopy(layer.state_dict())
    other.load_state_dict(state, assign=True)
    other.double()
    assert all(p.data_ptr() == state[name].data_ptr() for name, p in other.named_parameters())
    layer.share_memory().double()
    assert all(parameter.is_shared() for parameter in layer.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_made_in_inference_mode(kind):
    with torch.inference_mode():
        layer = KINDS[kind](D, 3)
    layer.float()
    x, memory = _inputs(torch.float32)
    with torch.no_grad():
        assert layer(x, memory)[0].shape == x.shape


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_leaves_the_weights(kind):
    """Also under the aliases of the release's shared Linear, and when it fails."""
    layer = _layer(kind)
    before = dict(layer.named_parameters())
    other = {name: (p.detach() * 1.5).requires_grad_() for name, p in before.items()}
    x, memory = _inputs()
    output, new_memory = torch.func.functional_call(layer, other, (x, memory))
    (output.square().sum() + new_memory.square().sum()).backward()
    after = dict(layer.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert all(parameter.grad is None for parameter in before.values())
    changed = copy.deepcopy(layer)
    changed.load_state_dict({**changed.state_dict(), **_with_aliases(changed, other)})
    want = _run(changed)
    _assert_same([output, new_memory, x.grad, *(p.grad for p in other.values())], want)
    with pytest.raises(TypeError):
        torch.func.functional_call(layer, other, (x, None))
    assert all(parameter is before[name] for name, parameter in layer.named_parameters())


def _with_aliases(layer, parameters):
    """Under every name of the state dict."""
    names = {parameter: name for name, parameter in layer.named_parameters()}
    kept = layer.state_dict(keep_vars=True)
    return {alias: parameters[names[parameter]] for alias, parameter in kept.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", (False, True))
def test_transforms_of_functional_call(kind, recompute):
    layer = _layer(kind)
    layer.recompute = recompute
    x, memory = _inputs()
    parameters = dict(layer.named_parameters())

    def loss(parameters):
        output, new_memory = torch.func.functional_call(layer, parameters, (x.detach(), memory))
        return output.square().sum() + new_memory.square().sum()

    got = torch.func.grad(loss)(parameters)
    for name, gradient in zip(parameters, _run(layer)[3:], strict=True):
        assert_round_off(got[name], gradient)


def test_functional_call_with_a_state_dict():
    """In which the shared Linear stands under several names."""
    layer = _layer("release")
    before = dict(layer.named_parameters())
    want = layer(*_inputs())
    _assert_same(torch.func.functional_call(layer, layer.state_dict(), _inputs()), want)
    assert all(parameter is before[name] for name, parameter in layer.named_parameters())


def test_the_shared_linear_in_other_dtypes_and_diverged():
    layer, other = _layer("release"), _layer("release")
    with torch.no_grad():
        layer.attention_mlp[0].weight[0, 0] = float("nan")
    copies = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    other.load_state_dict(copies)
    assert other.attention_mlp[0].weight[0, 0].isnan()
    copies["attention_mlp.1.weight"] = copies["attention_mlp.1.weight"].bfloat16()
    other.load_state_dict(copies)
    copies["attention_mlp.1.weight"] = nn.Parameter(copies["attention_mlp.0.weight"] + 1.0)
    with pytest.raises(RuntimeError, match="differs from"):
        other.load_state_dict(copies)


def test_the_shared_linear_is_called_by_its_list():
    layer, seen = _layer("release"), []
    layer.attention_mlp.register_forward_hook(lambda *_: seen.append(1))
    layer(*_inputs())
    assert seen
    layer.attention_mlp[1] = nn.Identity()
    assert list(layer.attention_mlp) == [layer.attention_mlp[0]] * 3
    layer.attention_mlp = nn.Flatten(0, 1)
    with pytest.raises(ValueError, match="attention_mlp: result must have 3 dimensions"):
        layer(*_inputs())


def test_the_shared_linear():
    """One module of one name; in the state dict under all its names, as the released module's."""
    layer = _layer("release")
    names = [name for name, _ in layer.named_parameters(remove_duplicate=False)]
    assert [name for name in names if "mlp" in name] == [
        "attention_mlp.0.weight",
        "attention_mlp.0.bias",
    ]
    state = layer.state_dict(prefix="a.")
    aliases = [name for name in state if "mlp" in name]
    assert aliases == [f"a.attention_mlp.{i}.{n}" for i in range(3) for n in ("weight", "bias")]
    mlp = layer.attention_mlp
    assert len(mlp) == 3
    assert list(mlp) == [mlp[0], mlp[1], mlp[-1]]
    assert layer.get_parameter("attention_mlp.2.weight") is mlp[0].weight
    with pytest.raises(IndexError):
        mlp[3]
    with pytest.raises(AttributeError):
        layer.get_submodule("attention_mlp.3")
    layer.set_submodule("attention_mlp.2", mlp[0])
    assert list(mlp._modules) == ["0"]
    with pytest.raises(RuntimeError, match=r"Missing key.*mlp\.1\.weight"):
        layer.load_state_dict(
            {name: t for name, t in layer.state_dict().items() if "mlp.1" not in name}
        )
    wrong = layer.state_dict()
    wrong["attention_mlp.2.bias"] = wrong["attention_mlp.2.bias"] + 1.0
    with pytest.raises(RuntimeError, match=r"mlp\.2\.bias differs from attention_mlp\.0\.bias"):
        layer.load_state_dict(wrong)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*mlp\.3\.weight"):
        layer.load_state_dict({**layer.state_dict(), "attention_mlp.3.weight": mlp[0].weight})


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_and_quantised_layers(kind):
    """Layers without Parameters."""
    layer = _layer(kind)
    want = layer(*_inputs())
    replica = _replica(layer)
    assert not list(replica.parameters())
    _assert_same(replica(*_inputs()), want)
    quantised = torch.ao.quantization.quantize_dynamic(KINDS[kind](D, 3), {nn.Linear})
    output, _ = quantised(*_inputs(torch.float32))
    assert output.shape == (2, T, D)


def _replica(module):
    """As nn.DataParallel makes one: its tensors are attributes."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = _replica(child)
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter.detach())
    return replica
