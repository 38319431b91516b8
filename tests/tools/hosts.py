"""A small model of transformers with a memory, for tests of what users do with one."""

import pytest
import torch

from lm2_kernels import add_memory, get_memory

try:
    import transformers
except ImportError:
    transformers = None
else:
    transformers.logging.set_verbosity_error()

hosted = pytest.mark.skipif(transformers is None, reason="transformers is not installed")

VOCABULARY, SLOTS = 50, 8


def bare_llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def llama(formulation="paper", dtype=torch.float32):
    """With memory layers that matter. Each call gives the same weights."""
    model = bare_llama(dtype)
    add_memory(model, memory_slots=SLOTS, num_heads=4, formulation=formulation)
    with torch.no_grad():
        for layer in get_memory(model).layers:
            for parameter in layer.parameters():
                parameter.normal_(std=0.3)
    return model


def tokens(batch=2, length=20, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def new_cache():
    return transformers.DynamicCache()


def padded(batch=2, length=20):
    """A mask, padded on the left in row 0."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, : length // 3] = 0
    return mask
