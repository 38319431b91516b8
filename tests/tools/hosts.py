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

# slots, and tokens of a segment, where a rule does not say otherwise
VOCABULARY, SLOTS = 50, 8

# how a memory is written and seen; a segment has as many tokens in all of them
RULES = {
    "": {},
    "token": {"candidate": "token"},
    # more slots than tokens, and every token sees them all
    "all-read": {"memory_causal": False, "memory_slots": SLOTS + 3},
    "all": {"memory_causal": False, "memory_slots": SLOTS + 3, "candidate": "token"},
    "chunk-read": {"write": "chunk", "memory_slots": SLOTS // 4},
    "chunk": {"write": "chunk", "memory_slots": SLOTS // 4, "candidate": "token"},
}


def memory_options(kind):
    """Those of add_memory for a formulation, or a formulation and a rule as "paper-chunk"."""
    formulation, _, rule = kind.partition("-")
    options = {"formulation": formulation, "memory_slots": SLOTS, "num_heads": 4}
    return {**options, "segment_length": SLOTS, **RULES[rule]}


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


def llama(kind="paper", dtype=torch.float32):
    """With memory layers that matter. Each call gives the same weights."""
    model = bare_llama(dtype)
    add_memory(model, **memory_options(kind))
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


def begin(model, length=13, is_padded=False):
    """A cache in the midst of a text, and the rest of it."""
    ids, cache = tokens(), new_cache()
    mask = padded() if is_padded else None
    with torch.no_grad():
        seen = None if mask is None else mask[:, :length]
        output = model(ids[:, :length], attention_mask=seen, past_key_values=cache)
    return output, cache, ids[:, length:], mask


@torch.no_grad()
def go_on(model, cache, rest, mask=None):
    steps = []
    for column in range(rest.shape[1]):
        end = None if mask is None else mask.shape[1] - rest.shape[1] + column + 1
        seen = None if mask is None else mask[:, :end]
        output = model(rest[:, column : column + 1], attention_mask=seen, past_key_values=cache)
        steps.append(output.logits)
    return torch.cat(steps, dim=1)
