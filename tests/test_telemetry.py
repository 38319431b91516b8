"""Watching changes nothing; known states give known numbers; pieces give what one pass gives."""

import contextlib
import copy
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import lm2_kernels as lm2
from lm2_kernels import get_memory, reference, telemetry
from lm2_kernels.telemetry import FIGURES, effective_rank, mean_cosine, watch
from tools import hosts
from tools.models import KINDS, random_ids, small_model
from tools.native import cpu_default
from tools.rounding import assert_round_off

B, T, N, D, H = 2, 5, 7, 12, 3
OF_SLOTS = ("read", "rank", "cosine", "rms")
_OTHERS = [("float32", cpu_default()), ("autocast", "eager")]
_OTHERS += [("bfloat16", "eager"), ("bfloat16", cpu_default())]
every_kind = pytest.mark.parametrize(("formulation", "flow"), KINDS)


def _equal(got, want):
    """To round-off, and None where the other is."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        if value is None or got[name] is None:
            assert got[name] is value, name
        else:
            first, second = (torch.tensor(v, dtype=torch.float64) for v in (got[name], value))
            assert_round_off(first, second, name)


def _is(value, wanted):
    assert value is not None
    assert_round_off(*(torch.tensor(v, dtype=torch.float64) for v in (value, float(wanted))))


def _bits(model, run):
    """What a call gives: outputs, gradients, and the numbers drawn next."""
    torch.manual_seed(3)
    model.zero_grad()
    tensors = list(run(model))
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    return [*tensors, torch.get_rng_state()]


def _same_bits(model, run):
    """Returns the record of a watched call that gave the bits of calls before and after it."""
    before = _bits(model, run)
    with watch(model) as record:
        watched = _bits(model, run)
    after = _bits(model, run)
    assert len(before) == len(watched) == len(after)
    for tensors in zip(before, watched, after, strict=True):
        assert torch.equal(tensors[0], tensors[1]) and torch.equal(tensors[1], tensors[2])
    layers = [m for m in model.modules() if isinstance(m, lm2.PaperMemory | lm2.ReleaseMemory)]
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    return record


def _training_step(model):
    """A loss and its gradients, over two and a half segments."""
    ids = random_ids(3, 15)
    output = model(ids, labels=ids, return_logits=True)
    output.loss.backward()
    return output.loss, output.logits, *output.memory.banks


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("float32", "eager"),
        ("autocast", cpu_default()),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in _OTHERS),
    ],
)
@every_kind
def test_training_is_the_same_bits(formulation, flow, kind, backend):
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    options = {"memory_dropout": 0.3, "num_hidden_layers": 2, "initializer_range": 0.2}
    model = small_model(dtype, formulation=formulation, flow=flow, backend=backend, **options)
    is_cast = kind == "autocast"

    def run(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
            return _training_step(model)

    with lm2.recording() as ran:
        before = run(model)
    with lm2.recording() as ran_watched, watch(model):
        run(model)
    # no kernel is another's, and none is called once more
    assert ran == ran_watched and {name for _, name in ran} == {backend}
    assert before[0].isfinite()
    record = _same_bits(model, run)
    assert [len(segments) for segments in record.segments().values()] == [3, 3]


@pytest.mark.parametrize("formulation", ("paper", "release"))
def test_recomputing_layers_are_seen_once(formulation):
    plain = small_model(formulation=formulation)
    model = small_model(formulation=formulation, memory_recompute=True)
    record, other = _same_bits(model, _training_step), _same_bits(plain, _training_step)
    assert record.summary() == other.summary()
    assert record.summary()["tokens"] == 45


@pytest.mark.parametrize("kind", ("paper", "release"))
def test_numbers_are_of_float32_under_autocast(kind):
    layer, (x, memory) = _layer(kind, dtype=torch.float32), _inputs()
    x, memory = x.float(), memory.float()
    plain, _ = _watched(layer, x, memory)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = _watched(layer, x, memory)
    for figure in ("input_gate", "forget_gate", "output_gate", "entropy", "read"):
        assert cast[figure] == plain[figure]
    # which the layer wrote in 16 bits
    assert cast["rms"] != plain["rms"]
    # and so are those of a layer in 16 bits
    layer, x, memory = layer.bfloat16(), x.bfloat16(), memory.bfloat16()
    narrow, _ = _watched(layer, x, memory)
    wide, _ = _watched(layer.float(), x.float(), memory.float())
    for figure in ("input_gate", "forget_gate", "output_gate", "entropy", "read"):
        assert narrow[figure] == wide[figure]


def test_no_graph_is_held():
    """By a segment that is open."""
    model = small_model()
    with watch(model) as record:
        model(random_ids(2, 9), use_cache=True)
    ended, _ = record._layers["model.layers.0.memory"].segments
    # nor what pictures of a segment are made of, once there is a later one
    assert not ended._maps and not ended._pieces
    # which tensors of a graph refuse
    assert copy.deepcopy(record).summary() == record.summary()


def test_a_batch_without_rows():
    layer, (x, memory) = _layer("paper"), _inputs()
    summary, _ = _watched(layer, x[:0], memory[:0])
    assert summary["tokens"] == 0


def _stream(model, sizes, ids):
    state, logits = None, []
    for piece in ids.split(sizes, dim=1):
        output = model(piece, memory=state, use_cache=True)
        state = output.memory
        logits.append(output.logits)
    return [torch.cat(logits, dim=1), *state.banks]


@pytest.mark.parametrize("has_gradients", (False, True))
@every_kind
def test_pieces_give_what_one_pass_gives(formulation, flow, has_gradients):
    model = small_model(formulation=formulation, flow=flow, initializer_range=0.2).eval()
    ids, sizes = random_ids(3, 17), (1, 3, 2, 5, 1, 5)
    with torch.set_grad_enabled(has_gradients):
        with watch(model) as whole:
            model(ids)
        record = _same_bits(model, lambda model: _stream(model, sizes, ids))
    for name, segments in whole.segments().items():
        for got, want in zip(record.segments()[name], segments, strict=True):
            _equal(got, want)
    _equal(record.summary(), whole.summary())
    # nobody says None of everything
    assert set(FIGURES) >= {f for f, v in whole.summary().items() if v is None and "/" not in f}
    assert whole.summary()["rank"] > 1.0 and whole.summary()["tokens"] == 51


@pytest.mark.parametrize("left", (True, False))
@every_kind
def test_padding_is_not_counted(formulation, flow, left):
    """A batch gives what its rows give by themselves."""
    model = small_model(formulation=formulation, flow=flow, initializer_range=0.2).eval()
    ids, lengths = random_ids(2, 16), (16, 9)
    mask = torch.arange(16) < torch.tensor(lengths)[:, None]
    padded = ids.clone()
    if left:
        mask, padded[1] = mask.flip(1), ids[1].roll(7)
    rows = []
    for row, length in enumerate(lengths):
        with watch(model) as record:
            model(ids[row : row + 1, :length])
        rows.append(record)
    with watch(model) as record:
        model(padded, attention_mask=mask)
    first, second, got = (list(r.segments().values())[-1][1] for r in (*rows, record))
    # of the second segment there are six tokens of one row and three of the other
    weights = dict.fromkeys(("input_gate", "forget_gate_high", "entropy", "written"), (6, 3))
    # first tokens see one slot, if they see no more than their own
    weights["entropy_share"] = (5, 2) if flow in ("depth", "time") else (6, 3)
    if flow in ("chunk", "all"):
        # elsewhere a row by itself has fewer slots in its bank
        weights |= dict.fromkeys(OF_SLOTS, (1, 1))
    for figure, (one, other) in weights.items():
        mean = (one * first[figure] + other * second[figure]) / (one + other)
        _is(got[figure], mean)
    assert record.summary()["tokens"] == 25


def test_rows_that_are_reordered_have_no_bank():
    """What their tokens do is counted all the same."""
    model, ids = small_model(initializer_range=0.2).eval(), random_ids(2, 5)

    def read(change):
        with torch.no_grad(), watch(model) as record:
            state = change(model(ids[:, :3], use_cache=True).memory)
            model(ids[: state.batch, 3:], memory=state, use_cache=True)
        (segment,) = record.segments()["model.layers.1.memory"]
        return segment

    plain = read(lambda state: state)
    assert None not in [plain[figure] for figure in OF_SLOTS]
    assert read(lambda state: state.detach()) == plain
    for rows in ([1, 0], [0]):
        other = read(lambda state, rows=rows: state.select(rows))
        assert [other[figure] for figure in OF_SLOTS] == [None] * 4
        assert other["entropy"] not in (None, plain["entropy"])


@every_kind
def test_rows_at_different_places(formulation, flow):
    """Generation from prompts of unequal lengths."""
    model = small_model(formulation=formulation, flow=flow, initializer_range=0.2).eval()
    ids, mask = random_ids(3, 10), torch.ones(3, 10, dtype=torch.int64)
    mask[0, :4] = 0
    options = {"max_new_tokens": 9, "attention_mask": mask, "eos_token_id": 7}
    record = _same_bits(model, lambda model: [model.generate(ids, **options).sequences])
    summary = record.summary()
    assert summary["tokens"] > 26 and 0.0 < summary["input_gate"] < 1.0
    json.dumps(summary, allow_nan=False)


def _layer(kind, **options):
    options = {"dtype": torch.float64, **options}
    make = lm2.PaperMemory if kind == "paper" else lm2.ReleaseMemory
    return make(D, H, **options)


def _inputs(tokens=T, slots=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(B, n, D, dtype=torch.float64, generator=generator) for n in (tokens, slots))


def _watched(layer, *args, **kwargs):
    with watch(layer) as record:
        output = layer(*args, **kwargs)
    return record.summary(), output


def _expected(layer, x, memory, new, slot_offset=0, slot_mask=None, pooled_sum=None):
    """The figures by the oracle's ops, and loops."""
    c, (tokens, slots) = layer.tokens_per_slot, (x.shape[1], memory.shape[1])
    parameters = dict(layer.named_parameters(remove_duplicate=False))

    def project(name, x):
        return F.linear(x, parameters[f"{name}.weight"], parameters.get(f"{name}.bias"))

    bank = memory if slot_mask is None else memory.masked_fill(~slot_mask[:, :, None], 0.0)
    options = {"causal": layer.causal, "slot_offset": slot_offset, "slot_mask": slot_mask}
    options |= {"scale": layer.scale, "top_k": layer.top_k}
    query, key = (
        project(name, t).unflatten(-1, (H, -1))
        for name, t in (("query_proj", x), ("key_proj", bank))
    )
    one_hot = torch.eye(slots, dtype=x.dtype)[None, :, None].expand(B, slots, H, slots)
    weights = reference.memory_attention(query, key, one_hot, **options)  # (B, T, H, N)
    value = project("value_proj", bank).unflatten(-1, (H, -1))
    read = torch.einsum("bthn,bnhk->bthk", weights, value).flatten(2)
    seen = [
        [
            [
                (not layer.causal or n <= slot_offset + t)
                and (slot_mask is None or bool(slot_mask[b, n]))
                for n in range(slots)
            ]
            for t in range(tokens)
        ]
        for b in range(B)
    ]
    end = slot_offset + math.ceil(tokens / c)
    rows = memory[:, slot_offset:end]
    if isinstance(layer, lm2.PaperMemory):
        gates = [
            project("input_gate_proj", x),
            project("forget_gate_proj", read),
            project("output_gate_proj", read),
        ]
    else:
        pooled, _ = reference.pooled_gate(
            x,
            parameters["input_gate_projector.w"],
            prefix=layer.pooled_gate == "prefix",
            pooled_sum=pooled_sum,
            num_pooled=0 if pooled_sum is None else slot_offset * c,
        )
        shared = project("input_gate_projector.linear", pooled)
        own = project("memory_gate_projector.linear", torch.tanh(rows))
        own = torch.stack([own[:, t // c] for t in range(tokens)], dim=1)
        both = (shared + own).chunk(2, dim=-1)
        gates = [both[0] + layer.input_bias, both[1] + layer.forget_bias]
    wanted = dict.fromkeys(FIGURES)
    for name, gate in zip(("input_gate", "forget_gate", "output_gate"), gates, strict=False):
        values = torch.sigmoid(gate).flatten().tolist()
        wanted[name] = math.fsum(values) / len(values)
        wanted[f"{name}_low"] = sum(v < 0.1 for v in values) / len(values)
        wanted[f"{name}_high"] = sum(v > 0.9 for v in values) / len(values)
    entropies, shares, read_shares = [], [], []
    for b in range(B):
        relative = [[] for _ in range(slots)]
        for t in range(tokens):
            visible = sum(seen[b][t])
            own = []
            for h in range(H if visible else 0):
                p = weights[b, t, h] / weights[b, t, h].sum()
                own.append(-math.fsum(v * math.log(v) for v in p.tolist() if v > 0.0))
            if own:
                entropies.append(sum(own) / H)
            if visible > 1:
                shares.append(sum(own) / H / math.log(visible))
            for n in range(slots):
                if seen[b][t][n]:
                    relative[n].append(weights[b, t, :, n].mean().item() * visible)
        means = [sum(values) / len(values) for values in relative if values]
        read_shares.append(sum(mean > 0.5 for mean in means) / len(means))
    wanted["entropy"] = math.fsum(entropies) / len(entropies)
    wanted["entropy_share"] = math.fsum(shares) / len(shares)
    wanted["read"] = sum(read_shares) / B
    change = (new[:, slot_offset:end] - rows).norm(dim=-1) / rows.norm(dim=-1)
    wanted["written"] = (change > 0.1).double().mean().item()
    ranks, cosines, squares = [], [], []
    for b in range(B):
        kept = new[b] if slot_mask is None else new[b][slot_mask[b]]
        values = torch.linalg.eigvalsh(kept @ kept.T).clamp(min=0.0)
        p = values / values.sum()
        ranks.append(math.exp(-math.fsum(v * math.log(v) for v in p.tolist() if v > 0.0)))
        pairs = itertools.combinations(kept, 2)
        cosines.append([F.cosine_similarity(a, b, dim=0).item() for a, b in pairs])
        squares.append(kept.square().mean().sqrt().item())
    wanted["rank"] = sum(ranks) / B
    wanted["cosine"] = sum(math.fsum(c) / len(c) for c in cosines) / B
    wanted["rms"] = sum(squares) / B
    return wanted


MASK = torch.tensor([[True] * 4 + [False] * 2 + [True], [False, True] * 3 + [False]])


@pytest.mark.parametrize(
    ("kind", "options", "arguments"),
    [
        ("paper", {}, {}),
        ("paper", {"bias": True, "scale": 2.0}, {"slot_offset": 2}),
        # whose first token sees none in one row
        ("paper", {}, {"slot_mask": MASK}),
        ("paper", {"causal": False, "candidate": "token", "output": "memory"}, {"slot_mask": MASK}),
        ("paper", {"top_k": 2}, {"slot_mask": MASK, "slot_offset": 1}),
        ("paper", {"write": "chunk", "tokens_per_slot": 2, "candidate": "token"}, {}),
        ("release", {}, {"slot_offset": 1}),
        ("release", {"pooled_gate": "prefix", "causal": False}, {"slot_mask": MASK}),
        ("release", {"pooled_gate": "prefix"}, {"slot_offset": 2, "pooled_sum": True}),
        ("release", {"write": "chunk", "tokens_per_slot": 3, "pooled_gate": "prefix"}, {}),
    ],
)
def test_figures_are_the_oracles(kind, options, arguments):
    layer, (x, memory) = _layer(kind, **options), _inputs()
    if "pooled_sum" in arguments:
        arguments = {**arguments, "pooled_sum": memory[:, 0].abs()}
    with torch.no_grad():
        # gates near 0 and near 1 too
        for name, parameter in layer.named_parameters():
            if "gate" in name:
                parameter.mul_(3.0)
    summary, (_, new) = _watched(layer, x, memory, **arguments)
    got = {figure: summary[figure] for figure in FIGURES}
    _equal(got, _expected(layer, x, memory, new, **arguments))
    assert 0.0 < got["input_gate_high"] < 1.0 and got["read"] > 0.0
    assert summary["tokens"] == B * T and summary["segments"] == 1


def _zero(*modules):
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.zero_()


@pytest.mark.parametrize("bias", (0.0, 3.0, -3.0))
def test_known_gates(bias):
    """0.5 of weights that are 0; open or closed throughout by their bias."""
    gate = 1.0 / (1.0 + math.exp(-bias))
    for kind in ("paper", "release"):
        layer = _layer(kind, **({"bias": True} if kind == "paper" else {}))
        if kind == "paper":
            own = (layer.input_gate_proj, layer.forget_gate_proj, layer.output_gate_proj)
            biases = [module.bias for module in own]
        else:
            own = (layer.input_gate_projector.linear, layer.memory_gate_projector.linear)
            biases = [layer.input_bias, layer.forget_bias]
        _zero(*own)
        with torch.no_grad():
            for tensor in biases:
                tensor.fill_(bias)
        summary, _ = _watched(layer, *_inputs())
        for name in ("input_gate", "forget_gate", "output_gate"):
            if kind == "release" and name == "output_gate":
                assert summary[name] is summary[f"{name}_low"] is None
                continue
            _is(summary[name], gate)
            assert summary[f"{name}_low"] == float(bias < 0.0)
            assert summary[f"{name}_high"] == float(bias > 0.0)


def test_uniform_reads():
    layer = _layer("paper", causal=False)
    _zero(layer.query_proj)
    summary, _ = _watched(layer, *_inputs())
    _is(summary["entropy"], math.log(N))
    _is(summary["entropy_share"], 1.0)
    assert summary["read"] == 1.0
    causal = _layer("release", pooled_gate="prefix")
    _zero(causal.query_proj)
    summary, _ = _watched(causal, *_inputs())
    _is(summary["entropy"], sum(math.log(t + 1) for t in range(T)) / T)
    _is(summary["entropy_share"], 1.0)
    assert summary["read"] == 1.0


def test_one_slot_is_read():
    """All tokens, in all heads, the slot that points where they do."""
    layer = _layer("paper", causal=False, scale=100.0)
    with torch.no_grad():
        for projection in (layer.query_proj, layer.key_proj):
            projection.weight.copy_(torch.eye(D))
    memory = -torch.ones(B, N, D, dtype=torch.float64)
    memory[:, 2] = 1.0
    summary, _ = _watched(layer, torch.ones(B, T, D, dtype=torch.float64), memory)
    _is(summary["entropy"], 0.0)
    _is(summary["read"], 1 / N)


def _keeping(forget, **options):
    """A layer that multiplies its rows by sigma(forget), and writes nothing else."""
    layer = _layer("release", **options)
    _zero(layer.input_gate_projector.linear, layer.memory_gate_projector.linear)
    with torch.no_grad():
        layer.input_bias.fill_(-1000.0)
        layer.forget_bias.fill_(forget)
    return layer


def _padded_piece(layer, x, bank, lengths):
    """A layer that is handed a segment of rows of unequal lengths."""
    rule = {"causal": layer.causal, "tokens_per_slot": layer.tokens_per_slot, "keep": False}
    (bank,), cache = lm2.MemoryState([bank]).piece(x.shape[1], T, lengths=lengths, **rule)
    summary, _ = _watched(layer, x, bank, cache=cache)
    return summary


def test_padding_by_itself():
    """Rows and tokens whose numbers would be others."""
    x, _ = _inputs()
    x[1, 2:] = math.nan
    # halved, where a row is not 0
    rows = torch.ones(B, N, D, dtype=torch.float64)
    rows[1, 2:] = 0.0
    layer = _keeping(0.0, pooled_gate="prefix")
    assert _padded_piece(layer, x, rows, [T, 2])["written"] == 1.0
    # of three slots with two tokens each one, in the second row, or two, the last by one token
    few = _keeping(0.0, pooled_gate="prefix", write="chunk", tokens_per_slot=2)
    for length, square in ((2, 6.25), (1, 6.25), (3, 5.5)):
        y = x.nan_to_num()
        y[1, length:] = math.nan
        summary = _padded_piece(few, y, torch.ones_like(rows), [T, length])
        _is(summary["rms"], (math.sqrt(4.75 / N) + math.sqrt(square / N)) / 2)
    # zeros read all slots, real tokens the third
    reads = _layer("paper", causal=False, scale=100.0)
    with torch.no_grad():
        for projection in (reads.query_proj, reads.key_proj):
            projection.weight.copy_(torch.eye(D))
    bank = -torch.ones(B, N, D, dtype=torch.float64)
    bank[:, 2] = 1.0
    ones = torch.where(x.isnan(), 0.0, 1.0).double()
    _is(_padded_piece(reads, ones, bank, [T, 2])["read"], 1 / N)


@pytest.mark.parametrize("pooled_gate", ("segment", "prefix"))
def test_pooled_gates_of_unequal_lengths(pooled_gate):
    layer, (x, memory) = _layer("release", pooled_gate=pooled_gate), _inputs()
    got = _padded_piece(layer, x, memory, [T, 2])
    rows = [(x[:1], memory[:1]), (x[1:, :2], memory[1:])]
    first, second = (_watched(layer, *row)[0] for row in rows)
    for gate in ("input_gate", "forget_gate"):
        _is(got[gate], (T * first[gate] + 2 * second[gate]) / (T + 2))


def test_known_banks():
    x, _ = _inputs(N, N)
    keeps = _keeping(1000.0)
    eye = 2.0 * torch.eye(N, D, dtype=torch.float64).expand(B, N, D)
    summary, (_, new) = _watched(keeps, x, eye)
    assert torch.equal(new, eye) and summary["written"] == 0.0
    _is(summary["rank"], N)
    _is(summary["cosine"], 0.0)
    _is(summary["rms"], math.sqrt(4.0 / D))
    rows = torch.full((B, N, D), 3.0, dtype=torch.float64)
    summary, _ = _watched(keeps, x, rows)
    for figure, wanted in (("rank", 1), ("cosine", 1), ("rms", 3), ("written", 0)):
        _is(summary[figure], wanted)
    summary, _ = _watched(keeps, x, torch.zeros_like(rows))
    assert [summary[figure] for figure in ("rank", "cosine", "rms", "written")] == [0, None, 0, 0]
    # one of them beside another
    summary, _ = _watched(keeps, x, torch.cat([torch.zeros_like(rows[:1]), eye[1:]]))
    _is(summary["cosine"], 0.0)
    _is(summary["rank"], N / 2)
    # a row is multiplied by 1 / 2
    summary, _ = _watched(_keeping(0.0), x[:, :3], rows)
    assert summary["written"] == 1.0
    _is(summary["rms"], math.sqrt((3 * 1.5**2 + 4 * 3.0**2) / N))
    # and stays what it is where it is 0: of the rows 1 to 3 the second
    some = rows.clone()
    some[:, (0, 2, 6)] = 0.0
    summary, _ = _watched(_keeping(0.0), x[:, :3], some, slot_offset=1)
    _is(summary["written"], 2 / 3)
    # by 0.95, and by 0.85
    for kept, written in ((0.95, 0.0), (0.85, 1.0)):
        summary, _ = _watched(_keeping(math.log(kept / (1.0 - kept))), x, rows)
        assert summary["written"] == written


def test_rank_and_cosine():
    half = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    # squares of singular values 2 and 1
    _is(effective_rank(half).item(), 3.0 / 2.0 ** (2.0 / 3.0))
    _is(mean_cosine(half).item(), 1 / 3)
    _is(mean_cosine(torch.cat([half, torch.zeros(2, 2).double()])).item(), 1 / 3)
    _is(mean_cosine(half / 100.0).item(), 1 / 3)
    assert mean_cosine(half[:1]).isnan()
    # squares that overflow, or vanish, are of no account
    for scale in (1e-200, 1e200):
        _is(effective_rank(scale * half).item(), 3.0 / 2.0 ** (2.0 / 3.0))


def test_what_is_not_finite_ends_nothing():
    layer, (x, memory) = _layer("paper"), _inputs()
    memory[0, 0, 0] = math.inf
    with watch(layer) as record:
        layer(x, memory)
    summary = record.summary()
    assert summary["forget_gate"] is None and summary["input_gate"] is not None
    assert summary["rank"] > 1.0
    json.dumps(summary, allow_nan=False)
    assert "-" in record.table()


def _hosted(model, is_training=False, **options):
    def run(model):
        mask = hosts.padded() if options.get("padded") else None
        output = model(hosts.tokens(), attention_mask=mask)
        if is_training:
            output.logits.float().square().mean().backward()
        return [output.logits.detach()]

    return _same_bits(model, run)


@hosts.hosted
@pytest.mark.parametrize("kind", ("paper", "release-chunk", "paper-all"))
def test_patched_models(kind):
    model = hosts.llama(kind)
    record = _hosted(model.train(), is_training=True)
    names = [f"model.layers.{index}.memory" for index in range(2)]
    assert list(record.segments()) == names
    assert [len(segments) for segments in record.segments().values()] == [3, 3]
    assert record.summary()["tokens"] == 40
    record = _hosted(model.eval(), padded=True)
    assert record.summary()["tokens"] == 34
    ids = hosts.tokens()
    for beams in (1, 2):
        options = {"max_new_tokens": 6, "num_beams": beams, "attention_mask": hosts.padded()}
        record = _same_bits(model, lambda model, o=options: [model.generate(ids, **o)])
        assert record.summary()["tokens"] >= 40
    assert get_memory(model).layers[0] not in telemetry._watched


@hosts.hosted
def test_a_checkpointed_block_is_seen_once():
    model = hosts.llama("paper").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    record = _hosted(model, is_training=True)
    assert record.summary()["tokens"] == 40


@pytest.mark.parametrize("change", ("hook", "norm"))
@pytest.mark.parametrize("kind", ("paper", "release"))
def test_a_projection_that_is_not_plain(kind, change):
    """Its hooks and its own state are what they would be."""
    layer, (x, memory) = _layer(kind), _inputs()
    with torch.no_grad():
        layer.query_proj.weight.mul_(5.0)
    if change == "hook":
        layer.key_proj.register_forward_hook(lambda module, args, output: 0.0 * output)
    else:
        parametrizations.spectral_norm(layer.key_proj)
    buffers = {name: tensor.clone() for name, tensor in layer.named_buffers()}

    def run(layer):
        layer.load_state_dict(buffers, strict=False)
        output, new = layer(x, memory)
        (output.sum() + new.sum()).backward()
        return output.detach(), new.detach(), *(tensor.clone() for tensor in layer.buffers())

    summary = _same_bits(layer.train(), run).summary()
    assert layer.key_proj.training
    uniform = sum(math.log(t + 1) for t in range(T)) / T
    if change == "hook":
        _is(summary["entropy"], uniform)
    else:
        assert summary["entropy"] < uniform


def test_a_masked_slot_may_hold_anything():
    layer, (x, memory) = _layer("paper", causal=False), _inputs()
    wanted, _ = _watched(layer, x, memory.masked_fill(~MASK[:, :, None], 0.0), slot_mask=MASK)
    broken = memory.masked_fill(~MASK[:, :, None], math.nan)
    got, _ = _watched(layer, x, broken, slot_mask=MASK)
    for figure in ("forget_gate", "output_gate", "entropy", "read"):
        assert got[figure] == wanted[figure] is not None


def test_weights_are_seen_before_they_go():
    """As those of a sharded layer do, by a hook that was there first."""
    layer, (x, memory) = _layer("paper"), _inputs()
    wanted, _ = _watched(layer, x, memory)
    layer.register_forward_hook(lambda module, args, output: _zero(module))
    got, _ = _watched(layer, x, memory)
    assert got == wanted


def test_refusals():
    with pytest.raises(ValueError, match="the Linear has no memory layer"), watch(nn.Linear(2, 2)):
        pass
    model = small_model()
    with watch(model):
        for inner in (model, model.model.layers[1].memory):
            with pytest.raises(ValueError, match="watched already"), watch(inner):
                pass
        # the first block goes on
        assert all(len(layer._forward_hooks) == 1 for layer in model.memory_layers())
    with contextlib.suppress(KeyError), watch(model):
        raise KeyError
    for layer in model.memory_layers():
        assert not layer._forward_hooks and not layer._forward_pre_hooks
    with watch(model) as record:
        pass
    assert record.summary()["tokens"] == 0 and record.summary()["rank"] is None
    with pytest.raises(ValueError, match="nothing was recorded"):
        record.plot("nowhere")
    model.model.layers[0].compile(backend="eager")
    with pytest.raises(ValueError, match="the Block is compiled"), watch(model):
        pass


def test_compiled():
    """A graph breaks at what is watched, and fullgraph raises; what is compiled is refused."""
    layer, (x, memory) = _layer("paper"), _inputs()
    compiled = torch.compile(layer, backend="eager")
    with pytest.raises(ValueError, match="is compiled"), watch(compiled):
        pass
    want, _ = _watched(layer, x, memory)

    def call(x):
        return layer(x, memory)[0] * 2.0

    expected = call(x)
    with watch(layer) as record:
        got = torch.compile(call, backend="eager")(x)
    assert torch.equal(got, expected)
    assert record.summary() == want
    torch.compiler.reset()
    with watch(layer), pytest.raises(Exception, match="that is being watched"):
        torch.compile(call, backend="eager", fullgraph=True)(x)
    torch.compiler.reset()


def test_under_functorch_nothing_is_seen():
    layer, (x, memory) = _layer("paper"), _inputs()
    with watch(layer) as record:
        torch.func.grad(lambda x: layer(x, memory)[0].sum())(x)
    assert record.summary()["tokens"] == 0


class _Writer:
    def __init__(self):
        self.scalars, self.images = {}, {}

    def add_scalar(self, tag, value, step):
        self.scalars[tag, step] = value

    def add_image(self, tag, values, step, dataformats):
        assert dataformats == "HW"
        self.images[tag, step] = values


def test_what_is_shown(tmp_path):
    model = small_model(initializer_range=0.2).eval()
    with watch(model) as record:
        model(random_ids(2, 16))
    lines = record.table().splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        *([f"model.layers.{index}.memory", "all"] for index in range(3)),
        ["all", "all"],
    ]
    assert len(record.table(by_segment=True).splitlines()) == 1 + 3 * 4 + 1
    summary, writer = record.summary(), _Writer()
    assert f"{summary['rank']:.3f}" in lines[-1]
    assert summary["rank"] == sum(summary[f"model.layers.{i}.memory/rank"] for i in range(3)) / 3
    record.to_tensorboard(writer, 7)
    assert writer.scalars["memory/rank", 7] == summary["rank"]
    assert set(writer.scalars) == {(f"memory/{n}", 7) for n, v in summary.items() if v is not None}
    # the last segment: four tokens, which see up to four slots
    for image in writer.images.values():
        assert image.shape == (4, 4) and image.max() == 1.0
        assert torch.equal(image.triu(1), torch.zeros(4, 4, dtype=image.dtype))
    assert len(writer.images) == 3
    with watch(model) as record, torch.no_grad():
        model(random_ids(2, 9), use_cache=True)
    record.to_tensorboard(writer, 8)
    # no wider than the slots that there are so far
    assert writer.images["memory/model.layers.0.memory/reads", 8].shape == (3, 3)
    model = small_model(flow="all", initializer_range=0.2).eval()
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[0, :2] = 0
    with watch(model) as record:
        model(random_ids(2, 5), attention_mask=mask)
    record.to_tensorboard(writer, 9)
    # of the real tokens, and as light as what weighs most
    image = writer.images["memory/model.layers.0.memory/reads", 9]
    assert image.shape == (3, 8) and image.max() == 1.0


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    model = small_model(flow="chunk", num_hidden_layers=1, initializer_range=0.2).eval()
    with watch(model) as record:
        model(random_ids(2, 15))
    first, second = record.plot(tmp_path / "heat.png"), record.plot(tmp_path / "again")
    assert [file.name for file in first] == ["heat.png", "heat.svg"]
    text = first[1].read_text()
    for label in ("model.layers.0.memory: reads", "forget", "segment", "slot", "token"):
        assert f"<!-- {label} -->" in text
    # the same numbers, the same file
    assert second[1].read_text() == text
