"""A small model for the tests of everything that is made of models."""

import torch

import lm2_kernels as lm2
from lm2_kernels import LM2Config, LM2ForCausalLM, reference
from lm2_kernels.testing.rule import Comparison, compare
from tools.native import cpu_default

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
# names for a flow and what is written and seen in it; in all of them a segment has 6 tokens
FLOWS = {
    "depth": {"flow": "depth"},
    "time": {"flow": "time", "candidate": "read"},
    # three tokens a slot
    "chunk": {"write": "chunk", "memory_slots": 2, "segment_length": 6},
    # more slots than tokens, and every token sees them all
    "all": {"memory_causal": False, "memory_slots": 8, "segment_length": 6},
}
for name in ("chunk", "all"):
    FLOWS[name] |= {"flow": "time"}
# (formulation, name of a flow), all of which stream
KINDS = [(a, b) for a in ("paper", "release") for b in ("depth", "time")]
KINDS += [("release", "chunk"), ("paper", "all"), ("paper", "chunk")]


def small_model(dtype=torch.float64, seed=0, *, flow="depth", **options) -> LM2ForCausalLM:
    torch.manual_seed(seed)
    return LM2ForCausalLM(LM2Config(**{**SMALL, **FLOWS[flow], **options})).to(dtype)


def random_ids(batch, length, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SMALL["vocab_size"], (batch, length), generator=generator)


def compare_logits(read, sizes, seed, dtype, **options) -> list[Comparison]:
    """Logits of a 16- or 32-bit model, read in pieces and in one pass, by the rule.

    Args:
        read: (model, ids, *sizes of pieces) -> logits.
        sizes: of the pieces.
        seed: of weights and tokens.
        dtype: of the model.
        options: of its configuration.
    """
    # weights of order 1 / sqrt(width), so that a wrong slot or position shows
    options = {"initializer_range": 0.2, **options}
    model = small_model(dtype, seed, **options)
    exact, plain = small_model(**options), small_model(dtype, backend="eager", **options)
    for other in (exact, plain):
        other.load_state_dict(model.state_dict())
    ids = random_ids(4, sum(sizes), seed + 1)
    with torch.autocast("cpu", enabled=False):
        oracle = use_oracle(exact)(ids).logits
    eager = read(plain, ids, ids.shape[1])
    with lm2.recording() as ran:
        pieces, whole = read(model, ids, *sizes), read(model, ids, ids.shape[1])
    assert {name for _, name in ran} == {cpu_default()}
    return [
        compare("logits in pieces", pieces, oracle, eager),
        compare("logits in one pass", whole, oracle, eager),
    ]


class OracleLayer(torch.nn.Module):
    """A memory layer of a model, computed by the oracle. For whole segments."""

    def __init__(self, layer: lm2.PaperMemory | lm2.ReleaseMemory):
        super().__init__()
        self.layer = layer

    def forward(self, x, rows, *, cache):
        assert not cache.is_open
        # shared parameters too, each under all its names
        parameters = dict(self.layer.named_parameters(remove_duplicate=False))
        names = ("num_heads", "causal", "tokens_per_slot")
        options = {name: getattr(self.layer, name) for name in names}
        if isinstance(self.layer, lm2.PaperMemory):
            output, new_rows = reference.paper_memory(x, rows, parameters, **options)
        else:
            prefix = self.layer.pooled_gate == "prefix"
            output, new_rows, _ = reference.release_memory(
                x, rows, parameters, prefix=prefix, **options
            )
        # of a whole bank, those that the tokens are bound to
        new_rows = new_rows[:, : cache.rows_of(rows).shape[1]]
        return output.to(x.dtype), new_rows.to(rows.dtype)


def use_oracle(model: LM2ForCausalLM) -> LM2ForCausalLM:
    """The model with its memory layers computed by the oracle."""
    for block in model.model.layers:
        if block.memory is not None:
            block.memory = OracleLayer(block.memory)
    return model
