"""Packed projections: one product over weights that lie side by side, and nothing lost by it."""

import copy

import pytest
import torch
from torch import nn

import lm2_kernels as lm2
from lm2_kernels import linear, testing
from lm2_kernels.backends import cpu_products
from tools.rounding import assert_round_off, assert_rule

DIM = 12


def _layer(**options):
    torch.manual_seed(0)
    return lm2.PaperMemory(DIM, 3, dtype=torch.float64, **options)


def _tensors(*, dtype=torch.float64):
    return torch.randn(2, 5, DIM, dtype=dtype, requires_grad=True), torch.randn(
        2, 7, DIM, dtype=dtype
    )


def _run(layer, x, memory):
    output, new_memory = layer(x, memory)
    loss = output.sum() + new_memory.square().sum()
    inputs = [x, *layer.parameters()]
    return [output, new_memory, *torch.autograd.grad(loss, inputs)]


def _is_packed(layer):
    return all(
        linear._stack(tuple(getattr(layer, name).weight for name in names), 0) is not None
        for names in layer.PACKED
    )


@pytest.mark.parametrize("bias", (False, True))
def test_packed_equals_separate(bias):
    layer = _layer(bias=bias)
    x, memory = _tensors()
    packed = _run(layer, x, memory)
    assert _is_packed(layer)
    for parameter in layer.parameters():
        # a storage of its own each
        parameter.data = parameter.data.clone()
    assert not _is_packed(layer)
    for got, want in zip(packed, _run(layer, x, memory), strict=True):
        assert_round_off(got, want)


@pytest.mark.parametrize("bias", (False, True))
def test_relu_of_a_projection(bias, monkeypatch):
    monkeypatch.setattr(linear, "_is_worth_it", lambda *_: True)
    layer = nn.Linear(DIM, DIM, bias=bias, dtype=torch.float64)
    x, _ = _tensors()
    inputs = [x, *layer.parameters()]
    results = []
    for relu in (True, False):
        (y,) = linear.project(x, layer, relu=relu)
        assert "PackedLinear" in y.grad_fn.name()
        y = y if relu else y.relu()
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), inputs)
        results.append([y, *first, *second])
    for got, want in zip(*results, strict=True):
        assert_round_off(got, want)


def test_stays_packed():
    layer = _layer()
    for changed in (copy.deepcopy(layer), copy.deepcopy(layer).float(), layer.requires_grad_()):
        assert _is_packed(changed)
    optimizer = torch.optim.Adam(layer.parameters())
    x, memory = _tensors()
    layer(x, memory)[0].sum().backward()
    optimizer.step()
    assert _is_packed(layer)
    layer.load_state_dict(copy.deepcopy(layer).state_dict())
    assert _is_packed(layer)


def test_conversion_to_the_same_moves_nothing():
    layer = _layer()
    places = [parameter.data_ptr() for parameter in layer.parameters()]
    with torch.inference_mode():
        layer.to(torch.float64)
    assert [parameter.data_ptr() for parameter in layer.parameters()] == places
    assert not any(parameter.is_inference() for parameter in layer.parameters())


def test_shared_memory_stays_shared():
    layer = _layer().share_memory()
    assert all(parameter.is_shared() for parameter in layer.parameters())


def test_replaced_projection_keeps_its_bias():
    layer = _layer()
    layer.input_gate_proj = nn.Linear(DIM, DIM, dtype=torch.float64)
    nn.init.constant_(layer.input_gate_proj.bias, 50.0)
    x, memory = _tensors()
    opened = layer(x, memory)[1]
    nn.init.constant_(layer.input_gate_proj.bias, -50.0)
    assert not torch.allclose(opened, layer(x, memory)[1])


class _Wrapped(nn.Module):
    """An adapter around a Linear, without a ``weight`` of its own."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.scale = nn.Parameter(torch.full((), 2.0, dtype=torch.float64))

    def forward(self, x):
        return self.scale * self.base(x)


@pytest.mark.parametrize("name", ("query_proj", "value_proj"))
def test_wrapped_projection_is_called(name):
    layer = _layer()
    x, memory = _tensors()
    before = layer(x, memory)[0]
    setattr(layer, name, _Wrapped(getattr(layer, name)))
    assert not torch.allclose(before, layer(x, memory)[0])
    copy.deepcopy(layer).to(torch.float32)


def _register_forward(linear, seen):
    linear.register_forward_hook(lambda *_: seen.append(1))


def _register_pre_forward(linear, seen):
    linear.register_forward_pre_hook(lambda *_: seen.append(1))


def _register_backward(linear, seen):
    linear.register_full_backward_hook(lambda *_: seen.append(1))


def _register_pre_backward(linear, seen):
    linear.register_full_backward_pre_hook(lambda *_: seen.append(1))


def _patch_forward(linear, seen):
    original = linear.forward

    def forward(x):
        seen.append(1)
        return original(x)

    linear.forward = forward


@pytest.mark.parametrize(
    "intercept",
    (
        _register_forward,
        _register_pre_forward,
        _register_backward,
        _register_pre_backward,
        _patch_forward,
    ),
)
def test_intercepted_projection_is_called(intercept):
    layer, seen = _layer(), []
    intercept(layer.value_proj, seen)
    x, memory = _tensors()
    layer(x, memory)[0].sum().backward()
    assert seen


@pytest.mark.parametrize("name", ("query_proj", "input_gate_proj", "value_proj"))
def test_weight_changed_before_backward_is_refused(name):
    layer = _layer()
    layer.requires_grad_(False)
    x, memory = _tensors()
    memory.requires_grad_()
    output, new_memory = layer(x, memory)
    with torch.no_grad():
        getattr(layer, name).weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (output.sum() + new_memory.sum()).backward()


def test_functional_call_and_func_grad():
    layer = _layer()
    x, memory = _tensors()
    parameters = dict(layer.named_parameters())

    def loss(parameters):
        output, new_memory = torch.func.functional_call(layer, parameters, (x.detach(), memory))
        return output.sum() + new_memory.square().sum()

    got = torch.func.grad(loss)(parameters)
    want = _run(layer, x, memory)[3:]
    for name, gradient in zip(parameters, want, strict=True):
        assert_round_off(got[name], gradient)


def test_autocast_products_are_in_its_dtype():
    layer = lm2.PaperMemory(DIM, 3)

    def run(seed):
        torch.manual_seed(seed)
        x, _ = _tensors(dtype=torch.float32)
        linears = {"key": layer.key_proj, "value": layer.value_proj}
        with torch.autocast("cpu", torch.bfloat16):
            parts = linear.project(x, *linears.values())
            plain = [linear(x) for linear in linears.values()]
        gradients = torch.autograd.grad(
            sum(part.float().sum() for part in parts), [x, layer.key_proj.weight]
        )
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        assert all(part.dtype == torch.bfloat16 for part in parts)
        exact = [x.double() @ linear.weight.double().T for linear in linears.values()]
        return [
            testing.compare(name, *tensors)
            for name, *tensors in zip(linears, parts, exact, plain, strict=True)
        ]

    assert_rule(run)


def test_autocast_leaves_float64_to_the_layer(monkeypatch):
    """Autocast does not cast it, and there is no other way to compute its products."""
    monkeypatch.setattr(cpu_products, "is_widened", lambda dtype: True)
    monkeypatch.setattr(linear, "apply", None)
    layer = nn.Linear(64, 64, dtype=torch.float64)
    x = torch.randn(64, 64, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear.project(x, layer)[0], layer(x))


def test_small_products_are_the_layers_own(monkeypatch):
    monkeypatch.undo()
    layers = nn.Linear(8, 8), nn.Linear(8, 8)
    linear.pack(*layers)
    x = torch.randn(2, 3, 8)
    monkeypatch.setattr(linear, "apply", None)
    for got, layer in zip(linear.project(x, *layers), layers, strict=True):
        assert torch.equal(got, layer(x))
    with pytest.raises(TypeError):
        linear.project(x.expand(20000, 2, 3, 8).flatten(0, 1), *layers)
