"""Small layers of every option, what they are given, and the layers made of ops."""

import contextlib
import math
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import nn

import lm2_kernels as lm2
from lm2_kernels.layers.base import MemoryLayer

B, T, N, D, H = 2, 4, 6, 12, 3

PAPER_OPTIONS = [
    {},
    {"bias": True},
    {"output": "memory"},
    {"causal": False},
    {"scale": -0.4},
    {"top_k": 2},
    {"top_k": 6, "bias": True, "causal": False, "output": "memory"},
    {"candidate": "token", "bias": True},
    {"write": "chunk", "tokens_per_slot": 3, "candidate": "token"},
    {"write": "chunk", "tokens_per_slot": 2, "output": "memory", "top_k": 2},
]
RELEASE_OPTIONS = [
    {},
    {"num_blocks": 2},
    {"attention_mlp_layers": 1},
    {"attention_mlp_layers": 3, "num_blocks": 2},
    {"pooled_gate": "prefix"},
    {"causal": False},
    {"scale": 0.9, "eps": 1e-3},
    {"top_k": 2},
    {"num_blocks": 2, "top_k": 3, "causal": False, "pooled_gate": "prefix"},
    {"candidate": "token", "num_blocks": 2},
    {"write": "chunk", "tokens_per_slot": 2},
    {"write": "chunk", "tokens_per_slot": 3, "candidate": "token", "pooled_gate": "prefix"},
]
LAYERS = [
    *((lm2.PaperMemory, options) for options in PAPER_OPTIONS),
    *((lm2.ReleaseMemory, options) for options in RELEASE_OPTIONS),
]


def options_id(value) -> str:
    if isinstance(value, dict):
        return "-".join(f"{name}={option}" for name, option in value.items()) or "default"
    return value.__name__


every_layer = pytest.mark.parametrize(("kind", "options"), LAYERS, ids=options_id)


def make_layer(kind, dtype=torch.float64, dim=D, **options) -> nn.Module:
    """A layer whose every parameter is drawn, biases included."""
    layer = kind(dim, H, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn * 1.4 / math.sqrt(dim))
    return layer


def draw(*shape, seed=0, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def make_inputs(tokens=T, slots=N, dtype=torch.float64, dim=D, seed=0):
    x = draw(B, tokens, dim, seed=seed, dtype=dtype)
    memory = draw(B, slots, dim, seed=seed + 1, dtype=dtype)
    return x.requires_grad_(), memory.requires_grad_()


@contextlib.contextmanager
def made_of_ops() -> Iterator[None]:
    """Layers are made of ops, though every part of them is plain."""
    with mock.patch.object(MemoryLayer, "_as_one", lambda *_, **__: None):
        yield
