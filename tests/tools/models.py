"""A small model for the tests of everything that is made of models."""

import torch

from lm2_kernels import LM2Config, LM2ForCausalLM

SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "memory_slots": 6,
    "memory_heads": 3,
}
# (formulation, flow), all of which stream
KINDS = [(a, b) for a in ("paper", "release") for b in ("depth", "time")]


def small_model(dtype=torch.float64, seed=0, **options) -> LM2ForCausalLM:
    torch.manual_seed(seed)
    return LM2ForCausalLM(LM2Config(**{**SMALL, **options})).to(dtype)


def random_ids(batch, length, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SMALL["vocab_size"], (batch, length), generator=generator)
