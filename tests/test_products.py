"""Matrix products of float32 CPU tensors: right by either library, chosen by measurement."""

import pytest
import torch
from torch import nn

import lm2_kernels as lm2
from lm2_kernels import products, testing
from lm2_kernels.projections import project


@pytest.fixture(params=("torch", "onednn"))
def library(request, monkeypatch):
    monkeypatch.setenv(products.ENVIRONMENT_VARIABLE, request.param)
    monkeypatch.setattr(products, "_MIN_MULTIPLICATIONS", 0)
    return request.param


def _onednn_calls(monkeypatch):
    calls = []
    original = products._onednn

    def counted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(products, "_onednn", counted)
    return calls


@pytest.mark.parametrize("transposed_a", (False, True))
@pytest.mark.parametrize("transposed_b", (False, True))
@pytest.mark.parametrize("has_bias", (False, True))
def test_product(library, transposed_a, transposed_b, has_bias, monkeypatch):
    calls = _onednn_calls(monkeypatch)
    a = torch.randn(33, 65).t() if transposed_a else torch.randn(65, 33)
    b = torch.randn(17, 33).t() if transposed_b else torch.randn(33, 17)
    bias = torch.randn(17) if has_bias else None
    with torch.no_grad():
        got = products.product(a, b, bias)
    want = a.double() @ b.double() + (0.0 if bias is None else bias.double())
    eager = a @ b + (0.0 if bias is None else bias)
    assert len(calls) == (library == "onednn")
    assert testing.compare("product", got, want, eager).passed


def test_layers_and_gradients(monkeypatch):
    monkeypatch.setattr(products, "_MIN_MULTIPLICATIONS", 0)
    calls = _onednn_calls(monkeypatch)

    def gradients(layer, x, memory):
        x = x.clone().requires_grad_()
        output, new_memory = layer(x, memory, slot_offset=2)
        loss = output.square().sum() + new_memory.square().sum()
        return torch.autograd.grad(loss, [x, *layer.parameters()])

    for layer in (lm2.PaperMemory(24, 3, bias=True), lm2.ReleaseMemory(24, 3)):
        x, memory = torch.randn(2, 5, 24), torch.randn(2, 9, 24)
        found = {}
        for library in ("torch", "onednn"):
            monkeypatch.setenv(products.ENVIRONMENT_VARIABLE, library)
            calls.clear()
            found[library] = gradients(layer, x, memory)
            assert bool(calls) == (library == "onednn")
        oracle = gradients(layer.double(), x.double(), memory.double())
        for got, want, eager in zip(found["onednn"], oracle, found["torch"], strict=True):
            # as a whole: a scalar's error is a matter of luck
            scale = eager.double().norm() * torch.finfo(torch.float32).eps
            assert (got - want).norm() <= 2 * (eager - want).norm() + 16 * scale


def test_three_dimensions_and_double_backward(library):
    linear = nn.Linear(6, 4)
    x = torch.randn(2, 3, 6, requires_grad=True)
    (y,) = project(x, linear)
    torch.testing.assert_close(y, linear(x))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (want,) = torch.autograd.grad(linear(x).square().sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), linear.weight)
    (dwant,) = torch.autograd.grad(want.sum(), linear.weight)
    torch.testing.assert_close(ddx, dwant)


def test_other_dtypes_and_small_products_are_torchs_own(monkeypatch):
    monkeypatch.setenv(products.ENVIRONMENT_VARIABLE, "onednn")
    calls = _onednn_calls(monkeypatch)
    with torch.no_grad():
        products.product(torch.randn(4, 4), torch.randn(4, 4))
        large = torch.randn(512, 512, dtype=torch.float64)
        products.product(large, large)
    assert not calls


@pytest.mark.parametrize("error", (AttributeError, RuntimeError))
def test_without_the_operator(error, monkeypatch):
    def absent(*args):
        raise error("no such operator")

    monkeypatch.delenv(products.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(products, "_ratios", {})
    monkeypatch.setattr(products, "_onednn", absent)
    a = torch.randn(512, 512)
    with torch.no_grad():
        torch.testing.assert_close(products.product(a, a), a @ a)


def test_a_wrong_operator_is_not_taken(monkeypatch):
    monkeypatch.setattr(products, "_onednn", lambda a, b, bias: torch.zeros(a.shape[0], b.shape[1]))
    assert products._measure(True, False) == 0.0


def test_measured_once_for_each_layout(monkeypatch):
    monkeypatch.delenv(products.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(products, "_ratios", {})
    measured = []
    monkeypatch.setattr(products, "_measure", lambda *layout: measured.append(layout) or 2.0)
    a = torch.randn(512, 512)
    with torch.no_grad():
        for _ in range(2):
            products.product(a, a)
            products.product(a, a.t())
    assert measured == [(True, True), (True, False)]


def test_unknown_choice(monkeypatch):
    monkeypatch.setenv(products.ENVIRONMENT_VARIABLE, "blas")
    a = torch.randn(512, 512)
    with torch.no_grad(), pytest.raises(ValueError, match=products.ENVIRONMENT_VARIABLE):
        products.product(a, a)
