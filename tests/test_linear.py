"""Linear layers by our own Function: what PyTorch's computes, where nobody can tell."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import lm2_kernels as lm2
from lm2_kernels import linear, testing
from tools.products import large_products
from tools.rounding import assert_round_off, assert_rule

DIM = 12


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("relu", (False, True))
@large_products()
def test_function_equals_the_layer(bias, relu):
    layer = nn.Linear(DIM, DIM + 1, bias=bias, dtype=torch.float64)
    x = torch.randn(2, 5, DIM, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    results = []
    for ours in (True, False):
        if ours:
            y = linear.apply_linear(x, layer, relu=relu)
            assert "LinearFunction" in y.grad_fn.name()
        else:
            y = layer(x).relu() if relu else layer(x)
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), inputs)
        results.append([y, *first, *second])
    for got, want in zip(*results, strict=True):
        assert_round_off(got, want)


@pytest.mark.parametrize("needed", range(3))
@large_products()
def test_only_the_gradients_that_are_wanted(needed):
    layer = nn.Linear(DIM, DIM)
    inputs = [torch.randn(3, DIM), layer.weight, layer.bias]
    for index, tensor in enumerate(inputs):
        tensor.requires_grad_(index == needed)
    linear.apply_linear(inputs[0], layer).sum().backward()
    assert [tensor.grad is not None for tensor in inputs] == [index == needed for index in range(3)]


@pytest.mark.parametrize("name", ("query_proj", "input_gate_proj", "value_proj"))
@large_products()
def test_weight_changed_before_backward_is_refused(name):
    layer = lm2.PaperMemory(DIM, 3).requires_grad_(False)
    x, memory = torch.randn(2, 5, DIM, requires_grad=True), torch.randn(2, 7, DIM)
    output, new_memory = layer(x, memory.requires_grad_())
    with torch.no_grad():
        getattr(layer, name).weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (output.sum() + new_memory.sum()).backward()


@large_products()
def test_autocast_products_are_in_its_dtype():
    layer = nn.Linear(DIM, DIM, bias=False)

    def run(seed):
        torch.manual_seed(seed)
        x = torch.randn(2, 5, DIM, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y, plain = linear.apply_linear(x, layer), layer(x)
        assert "LinearFunction" in y.grad_fn.name()
        gradients = torch.autograd.grad(y.float().sum(), [x, layer.weight])
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        assert y.dtype == torch.bfloat16
        return [testing.compare("y", y, x.double() @ layer.weight.double().T, plain)]

    assert_rule(run)


def test_autocast_leaves_float64_to_the_layer(monkeypatch):
    """Autocast does not cast it, and there is no other way to compute its products."""
    monkeypatch.setattr(linear, "apply", None)
    layer = nn.Linear(64, 64, dtype=torch.float64)
    x = torch.randn(64, 64, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear.apply_linear(x, layer), layer(x))


def test_small_products_are_the_layers_own(monkeypatch):
    layer = nn.Linear(8, 8)
    monkeypatch.setattr(linear, "apply", None)
    x = torch.randn(2, 3, 8)
    assert torch.equal(linear.apply_linear(x, layer), layer(x))
    with pytest.raises(TypeError):
        linear.apply_linear(x.expand(200000, 2, 3, 8).flatten(0, 1), layer)


@pytest.mark.parametrize("rows", (2, 4, 600))
def test_transforms_go_to_the_layer(rows):
    """Which has rules for them: of few rows, of small products and of large ones."""
    layer = nn.Linear(512, 512)
    x, tangent = torch.randn(2, rows, 512)

    def way(x):
        return linear.apply_linear(x, layer)

    assert torch.equal(torch.func.vmap(way)(x[None]), torch.func.vmap(layer)(x[None]))
    got, want = (torch.func.jvp(f, (x,), (tangent,)) for f in (way, layer))
    assert all(map(torch.equal, got, want))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        assert torch.equal(*(forward_ad.unpack_dual(f(dual)).tangent for f in (way, layer)))
    x = x.requires_grad_()
    y = way(x)
    if "LinearFunction" in y.grad_fn.name():
        with pytest.raises(NotImplementedError, match="vmap is not supported"):
            torch.autograd.grad(y, x, torch.ones(3, *y.shape), is_grads_batched=True)
