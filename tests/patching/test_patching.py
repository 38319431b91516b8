"""Memory in models that others wrote: added to transformers' models, swapped for the released."""

import copy
import dataclasses
import inspect
import itertools
import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lm2_kernels as lm2
from lm2_kernels import testing
from lm2_kernels.patching import hosts
from lm2_kernels.patching.add import add_memory, get_memory, load_memory, remove_memory
from lm2_kernels.patching.follow import _Pass
from lm2_kernels.patching.hosts import HOSTS, Host, find_blocks
from lm2_kernels.patching.swap import swap_memory
from tools import golden
from tools.hosts import RULES, memory_options
from tools.rounding import assert_round_off

try:
    import transformers
except ImportError:
    transformers = None
else:
    transformers.logging.set_verbosity_error()

hosted = pytest.mark.skipif(transformers is None, reason="transformers is not installed")
every_formulation = pytest.mark.parametrize("formulation", ("paper", "release"))
# a formulation, or one and a rule
RULED = ("paper-chunk", "release-chunk", "paper-all")
every_rule = pytest.mark.parametrize("formulation", ("paper", "release", *RULED))

VOCABULARY, SLOTS, HEADS = 50, 8, 4
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
    # with weights of order 1 / sqrt(width), a wrong slot or position shows
    "initializer_range": 0.2,
    "init_std": 0.2,
    "ffn_dim": 48,
    # compared with itself while training
    **dict.fromkeys(("dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
LINEAR = {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")}
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 6},
    "Ministral3": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Phi3": {},
    "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 64, "attn_implementation": "eager"},
    "Gemma3": {
        "head_dim": 8,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Granite": {},
    "Olmo2": {},
    "SmolLM3": {},
    "Starcoder2": {},
    "Cohere": {},
    "Glm4": {"head_dim": 8},
    "Mixtral": EXPERTS,
    "Qwen3Moe": {**EXPERTS, "head_dim": 8, "moe_intermediate_size": 16},
    # most of its blocks have no self-attention
    "Qwen3Next": {
        **EXPERTS,
        **LINEAR,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
    },
    "GPT2": {},
    "GPTNeoX": {},
    "GPTNeoX-serial": {"use_parallel_residual": False},
    "Falcon": {},
    "Falcon-grouped": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "Falcon-alibi": {"alibi": True, "parallel_attn": False, "multi_query": False},
    "Phi": {},
    "OPT": {},
    "OPT-norm-after": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
}
# a family of patching.HOSTS each, beside Llama's
OTHERS = ("GPT2", "GPTNeoX", "Falcon", "Phi", "OPT")
# transformers' expert kernels know no float64, and its eager attention computes in float32
FLOAT32 = ("Gemma2", "Mixtral", "Qwen3Moe", "Qwen3Next")


def _kinds(families, ruled=RULED):
    """Families in both formulations, and two of them by other rules too."""
    kinds = [*itertools.product(families, ("paper", "release"))]
    kinds += itertools.product(("Llama", "GPT2"), ruled)
    return pytest.mark.parametrize(("family", "formulation"), kinds)


def _host(family="Llama", dtype=torch.float64, seed=0, **changes):
    name = family.split("-")[0]
    config = "Gemma3Text" if name == "Gemma3" else name
    kind = getattr(transformers, f"{config}Config", None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if name in ("GPT2", "OPT") and release < (4, 56):
        pytest.skip(f"{name} of transformers {transformers.__version__} keeps its cache in tuples")
    torch.manual_seed(seed)
    config = kind(**{**SIZES, **FAMILIES[family], **changes})
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    return getattr(transformers, f"{name}{head}")(config).to(dtype).eval()


def _dtype(family):
    return torch.float32 if family in FLOAT32 else torch.float64


def _perturb(report):
    """Memory layers that matter, unlike those of step 0."""
    with torch.no_grad():
        for parameter in itertools.chain(*(layer.parameters() for layer in report.memory.layers)):
            parameter.add_(0.2 * torch.randn_like(parameter))
    return report


def _with_memory(family="Llama", dtype=torch.float64, formulation="paper", **options):
    model, options = _host(family, dtype), {**memory_options(formulation), **options}
    return model, _perturb(add_memory(model, **options))


def _ids(batch=2, length=21, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def _base(model):
    # of Gemma3 some versions call the whole model its base
    return model.model if hasattr(model, "model") else model.base_model


def _hidden(model, ids, **inputs):
    """What the decoder returns: 4.45 makes float32 logits of anything."""
    return _base(model)(input_ids=ids, **inputs).last_hidden_state


def _cache_name(model):
    names = inspect.signature(_base(model).forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def _new_cache(model, batch=2):
    kind, family = transformers.DynamicCache, model.config.model_type
    if "config" in inspect.signature(kind.__init__).parameters:
        if family == "qwen3_next" and not hasattr(kind, "has_previous_state"):
            pytest.skip(f"transformers {transformers.__version__} has a cache of its own for it")
        return kind(config=model.config)
    if family == "gemma2":
        # before 4.56 it took no other
        kind, dtype = transformers.HybridCache, next(model.parameters()).dtype
        return kind(model.config, batch, max_cache_len=64, device="cpu", dtype=dtype)
    return kind()


def _positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def _moved(model):
    """For a host that knows float32 alone: a copy with its weights up to two ulps off."""
    if next(model.parameters()).dtype == torch.float64:
        return None
    moved, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    for parameter in moved.parameters():
        steps = torch.randint(-2, 3, parameter.shape, generator=generator)
        parameter.mul_(1.0 + torch.finfo(torch.float32).eps * steps)
    return moved


def _close(got, model, moved, run):
    """What ``run`` gives of a model: to round-off, or in float32 to what moved weights move."""
    want = run(model)
    if moved is None:
        assert_round_off(got, want)
        return
    assert got.shape == want.shape
    bound = testing.NARROW * (run(moved) - want).abs().max()
    # the same experts
    assert bound < 2**-10 * want.abs().max()
    assert (got - want).abs().max() <= bound


def _everyday(families, others):
    """Families for every day, and others for the exhaustive run."""
    return [*families, *(pytest.param(family, marks=pytest.mark.slow) for family in others)]


some_kinds = pytest.mark.parametrize(
    ("family", "formulation"),
    (
        *(("Llama", kind) for kind in ("release", *RULED)),
        ("GPT2", "release-chunk"),
        *((family, "paper") for family in ("Llama", *OTHERS)),
    ),
)

MASK = torch.ones(4, 21, dtype=torch.int64)
MASK[0, :7] = 0  # left
MASK[1, 17:] = 0  # right
MASK[2, 3:12] = 0  # a hole
MASK[2, 15] = 0


def _alone(ids, row):
    return ids[row : row + 1, MASK[row].bool()]


# the memory in the host


@hosted
@_kinds(FAMILIES, [f"{a}-{rule}" for a in ("paper", "release") for rule in RULES if rule])
def test_step_0_is_bit_equal_and_removal_restores(family, formulation):
    model, ids = _host(family, torch.float32), _ids(4)
    names, flags = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    before = model(ids, attention_mask=MASK).logits
    text = model.config.to_json_string()
    report = add_memory(model, **memory_options(formulation))
    after = model(ids, attention_mask=MASK).logits
    assert torch.equal(before[MASK.bool()], after[MASK.bool()])
    assert torch.equal(model(ids).logits, _host(family, torch.float32)(ids).logits)

    _perturb(report)
    assert not torch.equal(before, model(ids, attention_mask=MASK).logits)
    removed = remove_memory(model)
    assert removed.modules == report.modules
    after = model(ids, attention_mask=MASK).logits
    assert torch.equal(before[MASK.bool()], after[MASK.bool()])
    assert list(model.state_dict()) == names
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.config.to_json_string() == text
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    with pytest.raises(ValueError, match="has no memory"):
        remove_memory(model)


@hosted
@_kinds(FAMILIES)
def test_cached_pieces_are_one_pass(family, formulation):
    """Token by token and in pieces, across two borders of segments."""
    dtype = _dtype(family)
    model, _ = _with_memory(family, dtype, formulation)
    ids = _ids()
    with torch.no_grad():
        moved = _moved(model)
        for sizes in ((1,) * 21, (5, 1, 9, 6), (8, 8, 5)):
            cache, pieces = _new_cache(model), []
            for piece in ids.split(sizes, dim=1):
                options = {_cache_name(model): cache, "use_cache": True}
                pieces.append(_hidden(model, piece, **options))
            _close(torch.cat(pieces, dim=1), model, moved, lambda host: _hidden(host, ids))


@hosted
@_kinds(FAMILIES)
def test_padded_rows_are_the_rows_alone(family, formulation):
    """Left, right and in the middle; and with the cache, where rows stand at different places."""
    if family == "Qwen3Next":
        pytest.skip("its linear attention takes padding on the left alone")
    dtype = _dtype(family)
    model, _ = _with_memory(family, dtype, formulation)
    ids, more, positions = _ids(4), _ids(4, 12, seed=2), _positions(MASK)
    # a window counts columns, padding included
    rows = (0, 1, 3) if "sliding_window" in FAMILIES[family] else range(4)
    with torch.no_grad():
        moved, cache = _moved(model), _new_cache(model, 4)
        options = {_cache_name(model): cache, "use_cache": True}
        got = _hidden(model, ids, attention_mask=MASK, position_ids=positions, **options)
        for row in rows:
            alone, real = _alone(ids, row), MASK[row].bool()
            _close(got[row, real], model, moved, lambda host, alone=alone: _hidden(host, alone)[0])
        if "sliding_window" in FAMILIES[family]:
            return
        mask, steps = MASK, []
        for token in more.split(1, dim=1):
            mask = F.pad(mask, (0, 1), value=1)
            inputs = {"attention_mask": mask, "position_ids": _positions(mask)[:, -1:]}
            steps.append(_hidden(model, token, **inputs, **options))
        for row in range(4):
            alone = torch.cat([_alone(ids, row), more[row : row + 1]], dim=1)
            got = torch.cat(steps, dim=1)[row]
            _close(got, model, moved, lambda host, alone=alone: _hidden(host, alone)[0, -12:])


@hosted
@_kinds(("Llama", *OTHERS))
def test_a_block_adds_what_the_layer_computes(family, formulation):
    """Against the layer's own call, a segment at a time."""
    model, report = _with_memory(family, formulation=formulation)
    host, _, _, blocks = find_blocks(model)
    attention, seen = host.attention_of(blocks[0]), {}
    projection = getattr(attention, host.output)
    projection.register_forward_hook(lambda m, i, output: seen.update(x=output))
    # after the memory's
    attention.register_forward_hook(lambda m, i, output: seen.update(read=output[0]))
    blocks[0].register_forward_pre_hook(lambda m, args: seen.update(residual=args[0]))
    if family == "Llama":
        blocks[0].post_attention_layernorm.register_forward_pre_hook(
            lambda m, args: seen.update(summed=args[0])
        )
    with torch.no_grad():
        _hidden(model, _ids())
        slots, kind = (report.memory.options[name] for name in ("memory_slots", "memory_init"))
        bank, outputs = lm2.initial_memory(2, slots, 32, kind, dtype=torch.float64), []
        for segment in seen["x"].split(SLOTS, dim=1):
            output, bank = report.memory.layers[0](segment, bank)
            outputs.append(output)
    want = torch.cat(outputs, dim=1)
    assert_round_off(seen["read"], want)
    if family == "Llama":
        assert_round_off(seen["summed"], seen["residual"] + want)


@hosted
def test_only_some_blocks():
    model, report = _with_memory(layers=(1,))
    assert report.modules == ["model.layers.1.memory"]
    assert not hasattr(model.model.layers[0], "memory")
    own = sum(p.numel() for p in model.model.layers[1].memory.parameters())
    assert report.parameters == report.trainable == own
    assert report.total == sum(p.numel() for p in model.parameters())
    text = str(report)
    assert "model.layers.1.memory" in text and f"{own:,}" in text
    assert get_memory(model) is report.memory is get_memory(model.model)


@hosted
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_16_bit_and_autocast(dtype):
    model, report = _with_memory(dtype=dtype)
    assert {p.dtype for p in report.memory.layers[0].parameters()} == {dtype}
    assert model(_ids(), labels=_ids()).loss.isfinite()
    model, _ = _with_memory(dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        model(_ids(), attention_mask=MASK[:2], labels=_ids()).loss.backward()
    model.generate(_ids(), max_new_tokens=3)


# generation


def _generate(model, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": 14, "do_sample": False, **options}
    torch.manual_seed(0)
    return model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]


def _generations():
    """Every day one family in every way, and each in two."""
    families = ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Gemma3", *OTHERS)
    beams, sample = {"num_beams": 3}, {"do_sample": True, "top_k": 5}
    ways = ({}, beams, sample, {"do_sample": True, "num_beams": 2})
    everyday = {"paper": beams, "release": sample, "paper-all": sample}
    everyday |= {"paper-chunk": beams, "release-chunk": {}}
    kinds = itertools.product(families, ("paper", "release"), ways)
    for kind in (*kinds, *itertools.product(("Llama", "GPT2"), RULED, ways)):
        family, formulation, options = kind
        is_everyday = options == everyday[formulation]
        is_everyday |= family == "Llama" and formulation not in RULED
        marks = () if is_everyday else pytest.mark.slow
        yield pytest.param(*kind, id=f"{family}-{formulation}-{options}", marks=marks)


@hosted
@pytest.mark.parametrize(("family", "formulation", "options"), list(_generations()))
def test_generate_with_cache_is_without(family, formulation, options):
    """Prompts padded on the left; without a cache each step reads everything anew."""
    model, _ = _with_memory(family, _dtype(family), formulation)
    ids, mask = _ids(3), MASK[[3, 0, 0]].clone()
    mask[2, :12] = 0
    got = _generate(model, ids, mask, **options)
    assert torch.equal(got, _generate(model, ids, mask, use_cache=False, **options))
    if options == {}:
        for row in range(3):
            alone = ids[row : row + 1, mask[row].bool()]
            assert torch.equal(got[row], _generate(model, alone)[0])


@hosted
@every_formulation
@pytest.mark.parametrize("family", _everyday(("Llama", "Gemma3", "Qwen3", "GPT2"), OTHERS[1:]))
def test_generate_with_a_static_cache(family, formulation):
    model, _ = _with_memory(family, formulation=formulation)
    ids, mask = _ids(2), MASK[[3, 0]]
    want = _generate(model, ids, mask)
    got = _generate(model, ids, mask, cache_implementation="static")
    assert torch.equal(got, want)


@hosted
def test_each_cache_has_its_memory():
    """Two generations step by step in turns, a copied prompt, and a cache used after a reset."""
    model, _ = _with_memory()
    name, ids = _cache_name(model), [_ids(seed=3), _ids(seed=4)]
    with torch.no_grad():
        want = [_hidden(model, x) for x in ids]
        caches, got = [_new_cache(model) for _ in ids], [[], []]
        for column in range(21):
            for index in range(2):
                token = ids[index][:, column : column + 1]
                got[index].append(_hidden(model, token, **{name: caches[index]}))
        for index in range(2):
            assert_round_off(torch.cat(got[index], dim=1), want[index])

        prompt = _new_cache(model)
        _hidden(model, ids[0][:, :10], **{name: prompt})
        for _ in range(2):
            rest = _hidden(model, ids[0][:, 10:], **{name: copy.deepcopy(prompt)})
            assert_round_off(rest, want[0][:, 10:])
        # rows of a batch, repeated and chosen
        prompt.batch_repeat_interleave(3)
        prompt.batch_select_indices(torch.tensor([4, 0]))
        prompt.reorder_cache(torch.tensor([1, 1]))
        row = ids[0][[0, 0]]
        assert_round_off(_hidden(model, row[:, 10:], **{name: prompt}), want[0][[0, 0], 10:])


@hosted
def test_a_cache_made_by_the_host_goes_on():
    model, _ = _with_memory()
    name, ids = _cache_name(model), _ids()
    with torch.no_grad():
        want, first = _hidden(model, ids), model.model(ids[:, :10], use_cache=True)
        cache = next(v for v in first.values() if not isinstance(v, torch.Tensor))
        if isinstance(cache, tuple):
            with pytest.raises(TypeError, match="DynamicCache"):
                _hidden(model, ids[:, 10:], **{name: cache})
            return
        assert_round_off(_hidden(model, ids[:, 10:], **{name: cache}), want[:, 10:])
        by_tuple = model.model(ids[:, :10], use_cache=True, return_dict=False)
        assert_round_off(_hidden(model, ids[:, 10:], **{name: by_tuple[1]}), want[:, 10:])


@hosted
def test_caches_that_the_memory_cannot_follow():
    model, ids = _host(), _ids()
    name, cache = _cache_name(model), _new_cache(model)
    _hidden(model, ids, **{name: cache})
    add_memory(model, memory_slots=SLOTS, num_heads=HEADS)
    with pytest.raises(ValueError, match="has not read"):
        _hidden(model, ids, **{name: cache})
    other, cache = _with_memory(), _new_cache(model)
    _hidden(model, ids, **{name: cache})
    with pytest.raises(ValueError, match="another model"):
        _hidden(other[0], ids, **{name: cache})
    with pytest.raises(ValueError, match="has 1 rows, the memory 2"):
        _hidden(model, ids[:1], **{name: cache})
    with pytest.raises(NotImplementedError, match="cropped"):
        cache.crop(-3)
    with pytest.raises(ValueError, match="18 tokens"):
        _hidden(model, ids, **{name: cache})
    # nothing of it is left
    assert torch.equal(_hidden(model, ids), _hidden(_host(), ids))


@hosted
def test_assisted_decoding_is_refused():
    model, _ = _with_memory()
    with pytest.raises(NotImplementedError, match="assisted decoding"):
        _generate(model, _ids(1).repeat(1, 2), prompt_lookup_num_tokens=3, eos_token_id=0)


# masks


@hosted
def test_4d_masks():
    """Causal with padding is read; packed sequences and windows are refused."""
    model, _ = _with_memory()
    ids, positions = _ids(4), _positions(MASK)
    causal = torch.ones(21, 21, dtype=torch.bool).tril()
    visible = causal & MASK[:, None, None].bool()
    smallest = torch.finfo(torch.float64).min
    added = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, smallest)
    with torch.no_grad():
        want = _hidden(model, ids, attention_mask=MASK, position_ids=positions)
        got = _hidden(model, ids, attention_mask=added, position_ids=positions)
    assert_round_off(got[MASK.bool()], want[MASK.bool()])
    packed = added.clone()
    packed[:, :, 10:, :10] = smallest
    window = added.masked_fill(~causal.triu(-5), smallest)
    for mask in (packed, window):
        with pytest.raises(ValueError, match="causal with padding"):
            _hidden(model, ids, attention_mask=mask)


@hosted
def test_masks_and_positions_are_checked():
    model, _ = _with_memory()
    ids = _ids(2, 10)
    with pytest.raises(ValueError, match=r"must be \(2, 10\)"):
        _hidden(model, ids, attention_mask=torch.ones(2, 7))
    with pytest.raises(TypeError, match="2-D or 4-D"):
        model.model._forward_pre_hooks.copy().popitem()[1](
            model.model, (), {"input_ids": ids, "attention_mask": torch.ones(2, 1, 10)}
        )
    restarts = torch.tensor([[*range(6), *range(4)]])
    with pytest.raises(ValueError, match="packed"):
        _hidden(model, ids, position_ids=restarts)
    with pytest.raises(ValueError, match="packed"):
        _hidden(model, ids, position_ids=restarts, attention_mask=F.pad(MASK[:2, :8], (2, 0)))


# a carried memory


@hosted
@every_rule
def test_carried_memory(formulation):
    model, report = _with_memory(formulation=formulation)
    memory, parts = report.memory, _ids(2, 2 * SLOTS).split(SLOTS, dim=1)
    with torch.no_grad():
        fresh = [_hidden(model, part) for part in parts]
        assert memory.state is None
        memory.carry = True
        assert_round_off(_hidden(model, parts[0]), fresh[0])
        state, second = memory.state, _hidden(model, parts[1])
        assert not torch.allclose(second, fresh[1])
        assert len(state.banks) == 2
        assert state.banks[0].shape == (2, memory.options["memory_slots"], 32)
        assert "carry=True" in repr(memory)

        memory.state = state
        memory.reset([0])
        mixed = _hidden(model, parts[1])
        assert_round_off(mixed[0], fresh[1][0])
        assert_round_off(mixed[1], second[1])
        # generation starts from it
        memory.state = state
        got = _generate(model, parts[1])
        memory.state = state
        assert torch.equal(got[:, 0], model.lm_head(second[:, -1]).argmax(-1))
        with pytest.raises(ValueError, match="has 1 rows, the memory 2"):
            _hidden(model, parts[0][:1])
        memory.reset()
        assert_round_off(_hidden(model, parts[1]), fresh[1])
    with pytest.raises(ValueError, match="2 memory banks, the state 1"):
        memory.state = lm2.MemoryState(state.banks[:1])


@hosted
def test_carried_memory_passes_gradients_until_detached():
    model, report = _with_memory()
    memory, parts = report.memory, _ids(2, 2 * SLOTS).split(SLOTS, dim=1)
    memory.carry = True
    embeddings = [model.model.embed_tokens(part).requires_grad_() for part in parts]
    for is_cut in (False, True):
        memory.reset()
        for part in embeddings:
            hidden = model.model(inputs_embeds=part).last_hidden_state
            if is_cut:
                memory.detach()
        first = torch.autograd.grad(hidden.sum(), embeddings[0], allow_unused=True)[0]
        assert (first is None) == is_cut
        assert is_cut or first.abs().sum() > 0


# training


@hosted
@some_kinds
def test_training_the_memory_alone(family, formulation):
    model = _host(family, torch.float32).train()
    report = add_memory(model, **memory_options(formulation))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    groups = report.parameter_groups(1e-2, weight_decay=0.1)
    assert {group["weight_decay"] for group in groups} <= {0.1, 0.0}
    assert sum(p.numel() for group in groups for p in group["params"]) == report.parameters
    optimizer, ids = torch.optim.AdamW(groups), _ids(4, 4 * SLOTS)
    losses = []
    for _ in range(40):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for name, parameter in model.named_parameters():
        if ".memory." not in name:
            assert parameter.grad is None and torch.equal(parameter, before[name]), name


@hosted
def test_without_freezing_the_backbone_has_groups_of_its_own():
    model = _host()
    report = add_memory(model, memory_slots=SLOTS, num_heads=HEADS, freeze=False)
    assert report.trainable == report.total
    groups = report.parameter_groups(1.0, backbone_lr=0.5, weight_decay=0.1)
    assert {(g["lr"], g["weight_decay"]) for g in groups} == {(1.0, 0.1), (0.5, 0.1), (0.5, 0.0)}
    listed = [p for group in groups for p in group["params"]]
    assert {id(p) for p in listed} == {id(p) for p in model.parameters()}
    assert len(listed) == len(set(map(id, listed)))
    model.model.embed_tokens.weight.requires_grad_(False)
    remove_memory(model)


def _gradients(model, ids, passes=1, **options):
    model.zero_grad()
    get_memory(model).reset()
    loss = 0.0
    for part in ids.chunk(passes, dim=1):
        loss = loss + _hidden(model, part, **options).square().sum()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _checkpointings():
    """Of families unlike Llama, every day the recommended way, in one formulation."""
    families = ("Llama", "Mistral", "Qwen2", "Gemma3", *OTHERS)
    kinds = itertools.product(families, ("paper", "release"), (False, True))
    for kind in (*kinds, *itertools.product(("Llama", "GPT2"), RULED, (False,))):
        is_everyday = kind[0] not in OTHERS or kind[1:] == ("paper", False)
        yield pytest.param(*kind, marks=() if is_everyday else pytest.mark.slow)


@hosted
@pytest.mark.parametrize(("family", "formulation", "reentrant"), list(_checkpointings()))
def test_gradient_checkpointing(family, formulation, reentrant):
    model, report = _with_memory(family, formulation=formulation)
    model.train()
    ids = _ids(2, 3 * SLOTS)
    mask = F.pad(MASK[[0, 3]], (3, 0))
    inputs = {"attention_mask": mask, "position_ids": _positions(mask), "use_cache": False}
    # reentrant checkpoints want an input that requires gradients
    model.enable_input_require_grads()
    want = _gradients(model, ids, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = _gradients(model, ids, **inputs)
    assert got.keys() == want.keys() and len(got) > 0
    for name in want:
        assert_round_off(got[name], want[name])

    # two passes before one backward, the second reading what the first wrote
    report.memory.carry = True
    model.gradient_checkpointing_disable()
    want = _gradients(model, ids, passes=3)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            _gradients(model, ids, passes=3)
        return
    got = _gradients(model, ids, passes=3)
    for name in want:
        assert_round_off(got[name], want[name])
    # the same positions in every pass
    shared = {"position_ids": torch.arange(SLOTS)[None], "use_cache": False}
    got = _gradients(model, ids, passes=3, **shared)
    for name in want:
        assert_round_off(got[name], want[name])


@hosted
def test_a_recomputed_block_of_an_unknown_pass_is_refused():
    model, report = _with_memory()
    positions = torch.arange(3)[None]
    hidden = torch.randn(2, 3, 32, dtype=torch.float64)
    rotary = model.model.rotary_emb(hidden, positions)
    with pytest.raises(RuntimeError, match="runs by itself"):
        model.model.layers[0](hidden, position_ids=positions, position_embeddings=rotary)
    # position embeddings that two passes share
    first, second = (torch.tensor([1.0]) for _ in range(2))
    second.set_(first)
    memory = report.memory
    passes = [_Pass({}, None, False, True) for _ in range(2)]
    memory._record(first, passes[0])
    memory._record(first, passes[0])
    assert not passes[0].is_ambiguous
    memory._record(second, passes[1])
    assert passes[0].is_ambiguous and passes[1].is_ambiguous


# saving, copying


@hosted
@some_kinds
def test_save_and_reload(family, formulation, tmp_path):
    model, report = _with_memory(family, formulation=formulation, layers=(1,), dropout=0.1)
    want = _hidden(model, _ids())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["lm2_memory"]["layers"] == [1]
    name = "dtype" if _cache_name(model) == "cache" else "torch_dtype"
    again = type(model).from_pretrained(tmp_path, **{name: torch.float64}).eval()
    loaded = load_memory(again, tmp_path)
    assert loaded.modules == report.modules and "loaded" in str(loaded)
    # the files' weights lie at other addresses, which products in steps of vectors may round by
    assert_round_off(_hidden(again, _ids()), want)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    # by state dict
    other = _host(family, seed=5)
    add_memory(other, **memory_options(formulation), layers=(1,))
    other.load_state_dict(model.state_dict())
    assert torch.equal(_hidden(other, _ids()), want)

    remove_memory(other)
    other.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="lm2_memory"):
        load_memory(other, tmp_path / "bare")
    (tmp_path / "bare" / "config.json").write_bytes((tmp_path / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"block 1 in .* does not fit"):
        load_memory(other, tmp_path / "bare")
    with pytest.raises(ValueError, match="has no memory"):
        remove_memory(other)


@hosted
def test_copies_have_a_memory_of_their_own():
    model, report = _with_memory()
    report.memory.carry = True
    want = _hidden(model, _ids())
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        memory = get_memory(clone)
        assert memory is not report.memory
        assert memory.layers[0] is clone.model.layers[0].memory
        memory.reset()
        assert torch.equal(_hidden(clone, _ids()), want)
        assert torch.equal(_hidden(clone.double(), _ids()), _hidden(model, _ids()))
        report.memory.reset()
        _hidden(model, _ids())
        remove_memory(clone)
        assert not torch.equal(_hidden(clone, _ids()), want)
    report.memory.reset()
    assert torch.equal(_hidden(model, _ids()), want)


# a family that the package does not know


class RunningMean(nn.Module):
    """In the place of a self-attention: the mean of all tokens so far."""

    def __init__(self, dim):
        super().__init__()
        self.token, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.out.num_columns = dim
        del self.out.out_features

    def forward(self, x, kept, places=None):
        tokens = self.token(x)
        sums = tokens.cumsum(1)
        if kept is not None:
            sums = sums + kept.sums.get(self, 0.0)
            kept.sums[self] = sums[:, -1:]
        return places, self.out(sums / (places + 1)[None, :, None])


class MeanCache:
    def __init__(self):
        self.sums, self.length = {}, 0

    def get_seq_length(self):
        return self.length


class MeanBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mean, self.feed = RunningMean(dim), nn.Linear(dim, dim)

    def forward(self, x, kept, places):
        x = x + self.mean(x, kept, places=places)[1]
        return x + self.feed(x).tanh()


class MeanDecoder(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.stack = nn.ModuleList([MeanBlock(dim) for _ in range(2)])
        self.is_checkpointed = False

    def forward(self, input_ids, attention_mask=None, kept=None):
        x, start = self.embedding(input_ids), 0 if kept is None else kept.length
        places = torch.arange(start, start + x.shape[1])
        for block in self.stack:
            if self.is_checkpointed:
                x = checkpoint(block, x, kept, places, use_reentrant=False)
            else:
                x = block(x, kept, places)
        if kept is not None:
            kept.length += input_ids.shape[1]
        return (x,)


MEAN = Host(
    "running mean",
    attention="mean",
    projections=("token",),
    output="out",
    mlp=("feed",),
    widths=("num_columns",),
    returned=1,
    caches=("kept",),
    pass_keys=("places",),
)


@every_formulation
def test_a_new_family_is_one_entry(formulation, monkeypatch):
    model, ids = MeanDecoder().double(), _ids()
    options = {"memory_slots": SLOTS, "num_heads": HEADS, "formulation": formulation}
    with pytest.raises(ValueError, match="no list of decoder blocks"):
        add_memory(model, **options)
    monkeypatch.setattr(hosts, "HOSTS", (*HOSTS, MEAN))
    before = model(ids)[0]
    report = add_memory(model, **options)
    assert report.modules == ["stack.0.memory", "stack.1.memory"]
    assert torch.equal(model(ids)[0], before)

    _perturb(report)
    want = model(ids)[0]
    assert not torch.allclose(want, before)
    kept = MeanCache()
    pieces = [model(piece, kept=kept)[0] for piece in ids.split((5, 1, 9, 6), dim=1)]
    assert_round_off(torch.cat(pieces, dim=1), want)
    mask = MASK[[1, 3]]
    assert_round_off(model(ids, attention_mask=mask)[0][mask.bool()], want[mask.bool()])

    leaves = [p for p in model.parameters() if p.requires_grad]
    want = torch.autograd.grad(want.square().sum(), leaves)
    model.is_checkpointed = True
    got = torch.autograd.grad(model(ids)[0].square().sum(), leaves)
    for gradient, wanted in zip(got, want, strict=True):
        assert_round_off(gradient, wanted)
    remove_memory(model)
    assert torch.equal(model(ids)[0], before)


def test_a_host_of_the_callers_own():
    model = MeanDecoder()
    assert add_memory(model, memory_slots=SLOTS, num_heads=HEADS, host=MEAN).parameters > 0
    remove_memory(model)
    text = r"by family,\n  other: mean \(with query, and out\) and feed\nFor other names, pass host"
    with pytest.raises(ValueError, match=text):
        add_memory(model, host=dataclasses.replace(MEAN, family="other", projections=("query",)))


# errors


@hosted
@pytest.mark.parametrize(
    ("options", "error", "text"),
    (
        ({"memory_slots": 0}, ValueError, "memory_slots"),
        ({"num_heads": 5}, ValueError, "num_heads"),
        ({"formulation": "other"}, ValueError, "formulation"),
        ({"memory_init": "zeros"}, ValueError, "for ever"),
        ({"memory_init": "ones"}, ValueError, "memory_init"),
        ({"formulation": "release", "memory_init": "identity"}, ValueError, "zero_init"),
        ({"layers": (0, 2)}, ValueError, "has 2 blocks"),
        ({"layers": (1, 0)}, ValueError, "ascend"),
        ({"layers": ()}, ValueError, "ascend"),
        ({"layers": (-1,)}, ValueError, "layers"),
        ({"freeze": 1}, TypeError, "freeze"),
        ({"dropout": 1.5}, ValueError, "dropout"),
        ({"segment_length": 0}, ValueError, "segment_length"),
        ({"segment_length": SLOTS + 1}, ValueError, "write='chunk' binds several"),
        ({"segment_length": SLOTS + 1, "write": "chunk"}, ValueError, "must be a multiple of"),
        ({"write": "chunk", "memory_causal": True}, ValueError, "takes causal=False or None"),
        ({"write": "slots"}, ValueError, "write must be one of"),
        ({"memory_causal": 1}, TypeError, "causal"),
        ({"candidate": "memory"}, ValueError, "candidate must be one of"),
        ({"backend": "other"}, ValueError, "other"),
    ),
    ids=str,
)
def test_bad_options_leave_the_model_alone(options, error, text):
    model = _host()
    names = list(model.state_dict())
    with pytest.raises(error, match=text):
        add_memory(model, **{"memory_slots": SLOTS, "num_heads": HEADS, **options})
    assert list(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())
    assert not model.model._forward_hooks
    assert not hasattr(model.config, "lm2_memory")


@hosted
def test_models_that_do_not_fit():
    model, _ = _with_memory()
    with pytest.raises(ValueError, match="already"):
        add_memory(model, memory_slots=SLOTS, num_heads=HEADS)
    with pytest.raises(ValueError, match="several lists"):
        add_memory(nn.ModuleList([_host(), _host()]))
    blocks = nn.Module()
    blocks.layers = _host().model.layers
    with pytest.raises(ValueError, match="must take attention_mask"):
        add_memory(blocks)
    model = _host()
    model.model.layers[1].memory = 3
    with pytest.raises(ValueError, match="'memory' already"):
        add_memory(model, num_heads=HEADS)


def _bart():
    sizes = {"d_model": 32, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    return transformers.BartForCausalLM(
        transformers.BartConfig(vocab_size=VOCABULARY, decoder_layers=2, **sizes)
    )


@hosted
def test_cross_attention_is_refused():
    for model in (_host("GPT2", add_cross_attention=True), _bart()):
        names = list(model.state_dict())
        with pytest.raises(ValueError, match="cross-attention"):
            add_memory(model, memory_slots=SLOTS, num_heads=HEADS)
        assert list(model.state_dict()) == names


@hosted
def test_an_attention_that_adds_the_residual_is_no_host():
    """BLOOM's has the parts of Falcon's."""
    model = transformers.BloomForCausalLM(transformers.BloomConfig(**SIZES, n_head=4, n_layer=2))
    with pytest.raises(ValueError, match=r"transformer\.h is given the residual stream"):
        add_memory(model, memory_slots=SLOTS, num_heads=HEADS)


@hosted
def test_an_encoder_beside_the_decoder_is_left_alone():
    model = nn.Module()
    model.sound, model.text = nn.Module(), _host()
    model.sound.layers = _host("OPT").model.decoder.layers
    report = add_memory(model, memory_slots=SLOTS, num_heads=HEADS)
    assert report.modules == [f"text.model.layers.{index}.memory" for index in range(2)]


def test_nothing_matches():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="self_attn") as raised:
        add_memory(model)
    for host in HOSTS:
        assert f"\n  {host}" in str(raised.value)
    with pytest.raises(ValueError, match="no added memory"):
        get_memory(model)
    with pytest.raises(ValueError, match="query_proj"):
        swap_memory(model)
    with pytest.raises(ValueError, match="has no memory"):
        remove_memory(model)


@hosted
def test_a_pass_that_fails_leaves_nothing_behind():
    model, _ = _with_memory()
    want = _hidden(model, _ids())
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _hidden(model, _ids())
    handle.remove()
    assert torch.equal(_hidden(model, _ids()), want)
    model.model._is_replica = True
    with pytest.raises(RuntimeError, match="DataParallel"):
        _hidden(model, _ids())


# the released implementation's modules, after the mathematics of ReleaseMemory's docstring


class Pooled(nn.Module):
    def __init__(self, dim, is_scaled):
        super().__init__()
        if is_scaled:
            self.w = nn.Parameter(torch.randn(dim))
        self.linear = nn.Linear(dim, 2 * dim)


class Released(nn.Module):
    """A stand-in with the interface of the released module."""

    def __init__(self, dim, heads, blocks=1, layers=2, top_k=None, dropout=0.0):
        super().__init__()
        self.n_heads, self.num_blocks = heads, blocks
        self.use_topk, self.topk = top_k is not None, top_k or 3
        self.attn_drop = nn.Dropout(dropout)
        for name in ("query_proj", "key_proj", "value_proj"):
            setattr(self, name, nn.Linear(dim, dim))
        self.attention_mlp = nn.ModuleList([nn.Linear(dim, dim)] * layers)
        self.attended_memory_layernorm = nn.LayerNorm(dim)
        self.attended_memory_layernorm2 = nn.LayerNorm(dim)
        self.input_gate_projector = Pooled(dim, True)
        self.memory_gate_projector = Pooled(dim, False)
        self.forget_bias = nn.Parameter(torch.tensor(1.0))
        self.input_bias = nn.Parameter(torch.tensor(0.0))

    def forward(self, inputs, memory, attention_mask):
        attended = memory
        for _ in range(self.num_blocks):
            q, k, v = (
                layer(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
                for layer, x in (
                    (self.query_proj, inputs),
                    (self.key_proj, attended),
                    (self.value_proj, attended),
                )
            )
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            if attention_mask is not None:
                hidden = hidden | attention_mask.bool()
            weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
            if self.use_topk:
                values, places = weights.topk(self.topk)
                weights = torch.zeros_like(weights).scatter(-1, places, values)
            read = (self.attn_drop(weights) @ v).transpose(1, 2).flatten(2)
            first = self.attended_memory_layernorm(attended + read)
            mixed = first
            for layer in self.attention_mlp:
                mixed = layer(mixed).relu()
            attended = self.attended_memory_layernorm2(first + mixed)
        gate = self.input_gate_projector
        pooled = (gate.w * inputs).relu().mean(1, keepdim=True)
        gates = gate.linear(pooled) + self.memory_gate_projector.linear(memory.tanh())
        write, forget = gates.chunk(2, dim=-1)
        memory = (write + self.input_bias).sigmoid() * attended.tanh() + (
            forget + self.forget_bias
        ).sigmoid() * memory
        return inputs + memory, memory


class Host(nn.Module):
    """Two blocks with a released module each, one of them under two names."""

    def __init__(self, dim=12, heads=3, **options):
        super().__init__()
        self.blocks = nn.ModuleList([Released(dim, heads, **options) for _ in range(2)])
        self.last = self.blocks[1]

    def forward(self, x, memory, mask=None):
        x, memory = self.blocks[0](x, memory, mask)
        return self.last(x, memory, attention_mask=mask)


def _released_inputs(batch=2, dim=12):
    return torch.randn(batch, dim, dim), lm2.initial_memory(batch, dim, dim)


RELEASED = [p for p in golden.FILES if golden.load(p).formulation == "release"]


@pytest.mark.parametrize("path", RELEASED, ids=lambda path: path.stem)
def test_swapped_meets_the_golden_tensors(path):
    case = golden.load(path)
    model = nn.Sequential(
        Released(case.inputs["x"].shape[-1], case.num_heads, case.num_blocks, top_k=case.top_k)
    ).double()
    model[0].load_state_dict(case.weights)
    swap_memory(model)
    leaves = dict(model[0].named_parameters())
    leaves |= {name: tensor.requires_grad_() for name, tensor in case.inputs.items()}
    hidden = None if case.slot_mask is None else ~case.slot_mask[:, None, None]
    outputs = model[0](case.inputs["x"], case.inputs["memory"], hidden)
    assert_round_off(outputs[0], case.outputs[0], "y")
    assert_round_off(outputs[1], case.outputs[1], "memory")
    gradients = torch.autograd.grad(outputs, list(leaves.values()), case.cotangents)
    for name, gradient in zip(leaves, gradients, strict=True):
        assert_round_off(gradient, case.gradients[name], f"d{name}")


@pytest.mark.parametrize(
    "options", ({}, {"blocks": 2, "layers": 3}, {"top_k": 2}, {"layers": 1}), ids=str
)
def test_swap_computes_the_same_and_can_be_undone(options):
    model = Host(**options).double()
    released = model.last
    x, memory = (tensor.double() for tensor in _released_inputs())
    want, keys = model(x, memory), list(model.state_dict())
    parameters = list(model.parameters())
    report = swap_memory(model)
    assert report.modules == ["blocks.0", "blocks.1"] and "swapped" in str(report)
    assert isinstance(model.last, lm2.ReleaseMemory) and model.last is model.blocks[1]
    for got, wanted in zip(model(x, memory), want, strict=True):
        assert_round_off(got, wanted)
    assert list(model.state_dict()) == keys
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters}
    with pytest.raises(ValueError, match="or no more"):
        swap_memory(model)
    copied = copy.deepcopy(model)
    for got, wanted in zip(copied(x, memory), want, strict=True):
        assert_round_off(got, wanted)
    assert remove_memory(model).modules == ["blocks.0", "blocks.1"]
    assert model.last is released is model.blocks[1]
    for got, wanted in zip(model(x, memory), want, strict=True):
        assert torch.equal(got, wanted)


def test_swapped_masks():
    """As the released host makes them: additive, causal with padding."""
    model = Host().double()
    x, memory = (tensor.double() for tensor in _released_inputs())
    hidden = torch.ones(12, 12, dtype=torch.bool).triu(1).repeat(2, 1, 1, 1)
    hidden[1, :, :, 5:8] = True
    mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    want = [model(x, memory, m) for m in (mask, hidden, hidden[1:], hidden[0, 0])]
    swap_memory(model)
    got = [model(x, memory, m) for m in (mask, hidden, hidden[1:], hidden[0, 0])]
    for a, b in zip(itertools.chain(*got), itertools.chain(*want), strict=True):
        assert_round_off(a, b)
    hidden[0, 0, 7, 2] = True
    with pytest.raises(ValueError, match="from all tokens or from none"):
        model(x, memory, hidden)


def test_an_optimizer_goes_on_after_the_swap():
    """The steps are those of the model that was not swapped."""
    x, memory = (tensor.double() for tensor in _released_inputs())
    models = [Host().double()]
    models.append(copy.deepcopy(models[0]))
    swapped, kept = models
    # a large epsilon: others make steps of what is rounding alone, as the gradient of keys' biases
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.01, eps=1.0) for model in models]
    for step in range(4):
        if step == 2:
            swap_memory(swapped)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(x, memory)[0].square().sum().backward()
            optimizer.step()
    for got, want in zip(swapped.parameters(), kept.parameters(), strict=True):
        assert_round_off(got, want)
    remove_memory(swapped)
    for got, want in zip(swapped(x, memory), kept(x, memory), strict=True):
        assert_round_off(got, want)


def test_swap_keeps_dropout_modes_and_flags():
    model = Host(dropout=0.9).eval()
    model.blocks[0].query_proj.weight.requires_grad_(False)
    model.double()
    x, memory = (tensor.double() for tensor in _released_inputs())
    want = model(x, memory)
    swap_memory(model, backend="eager")
    assert not model.blocks[0].training and model.blocks[0].dropout == 0.9
    assert model.blocks[0].backend == "eager"
    assert not model.blocks[0].query_proj.weight.requires_grad
    for got, wanted in zip(model(x, memory), want, strict=True):
        assert_round_off(got, wanted)
    model.train()
    remove_memory(model)
    assert model.last.training


def _several_layers(module):
    module.attention_mlp = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)])


def _spoiled(**attributes):
    return lambda module: [setattr(module, name, value) for name, value in attributes.items()]


@pytest.mark.parametrize(
    ("spoil", "text"),
    (
        (_several_layers, "several Linear"),
        (_spoiled(use_topk=True, attn_drop=nn.Dropout(0.1)), "before top-k"),
        (_spoiled(attended_memory_layernorm2=nn.LayerNorm(12, eps=1e-3)), "epsilon"),
        (_spoiled(query_proj=nn.Linear(12, 12, bias=False)), "other parameters"),
        (_spoiled(key_proj=nn.Linear(6, 12)), "other parameters"),
        (lambda module: delattr(module, "n_heads"), "'n_heads'"),
        (lambda module: module.register_forward_hook(lambda *_: None), "has hooks"),
    ),
)
def test_swap_refuses_what_it_cannot_reproduce(spoil, text):
    model = Host()
    spoil(model.last)
    before = list(model.modules())
    with pytest.raises(ValueError, match=f"blocks.1.*{text}"):
        swap_memory(model)
    assert list(model.modules()) == before
    with pytest.raises(ValueError, match="itself"):
        swap_memory(Released(12, 3))


class _Packed(nn.Module):
    """As quantisation leaves a Linear: without parameters."""

    def __init__(self, linear):
        super().__init__()
        self.packed = (linear.weight.detach(), linear.bias)

    def forward(self, x):
        return F.linear(x, *self.packed)


@hosted
@every_formulation
def test_linears_without_parameters(formulation):
    model, ids = _host(), _ids()
    options = {"memory_slots": SLOTS, "num_heads": HEADS, "formulation": formulation}
    add_memory(model, **options, memory_init="identity", zero_init=False)
    want = model(ids).logits
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, _Packed(child))
    assert_round_off(model(ids).logits, want)
