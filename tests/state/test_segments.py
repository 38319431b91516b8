"""Reading in pieces: layers and models give what one pass gives, wherever each row stands."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import lm2_kernels as lm2
from lm2_kernels import MemoryState
from lm2_kernels.state import segments
from lm2_kernels.state.cache import SegmentCache
from tools.emulated_avx512 import every_level
from tools.models import KINDS, SMALL, compare_logits, random_ids, small_model
from tools.rounding import assert_round_off, assert_rule

every_kind = pytest.mark.parametrize(("formulation", "flow"), KINDS)
SLOTS = SMALL["memory_slots"]


def _model(formulation="paper", flow="depth", **options):
    # weights of order 1 / sqrt(width), so that a wrong slot or position shows
    return small_model(formulation=formulation, flow=flow, initializer_range=0.2, **options)


def _same_state(got, want):
    assert got.position.tolist() == want.position.tolist()
    for a, b in zip(got.banks, want.banks, strict=True):
        assert_round_off(a, b)


def _masked(row_tokens, columns, seed=0):
    """A random mask (B, columns) with so many real tokens in each row."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(row_tokens), columns, dtype=torch.int64)
    for row, count in enumerate(row_tokens):
        mask[row, torch.randperm(columns, generator=generator)[:count]] = 1
    return mask


@every_kind
@pytest.mark.parametrize("grad", (False, True))
@pytest.mark.parametrize("sizes", ((1,) * 15, (4, 1, 3, 7), (2, 13), (6, 6, 3)))
def test_pieces_are_one_pass(formulation, flow, grad, sizes):
    """Logits and memory, across two borders of segments, with and without gradients."""
    model, ids = _model(formulation, flow), random_ids(2, 15)
    with torch.set_grad_enabled(grad):
        whole = model(ids, use_cache=True)
        state, logits = None, []
        for piece in ids.split(sizes, dim=1):
            output = model(piece, memory=state, use_cache=True)
            state = output.memory
            logits.append(output.logits)
    assert_round_off(torch.cat(logits, dim=1), whole.logits)
    assert_round_off(whole.logits, model(ids).logits)
    _same_state(state, whole.memory)
    _same_state(state.end_segment(), model(ids).memory)


@every_kind
def test_gradients_of_pieces_are_those_of_one_pass(formulation, flow):
    model, ids = _model(formulation, flow), random_ids(2, 10)
    results = []
    for sizes in ((10,), (3, 5, 2)):
        state, total = None, 0.0
        for piece in ids.split(sizes, dim=1):
            output = model(piece, memory=state, use_cache=True)
            state = output.memory
            total = total + output.logits.square().sum()
        total = total + sum(bank.square().sum() for bank in state.banks)
        results.append(torch.autograd.grad(total, list(model.parameters())))
    for got, want in zip(*results, strict=True):
        assert_round_off(got, want)


@every_kind
def test_padding_is_as_if_it_were_not_there(formulation, flow):
    """Left, right and scattered padding, rows that end in different segments."""
    model, columns = _model(formulation, flow), 17
    ids, counts = random_ids(5, columns), [17, 3, 12, 8, 6]
    left = torch.arange(columns) >= columns - torch.tensor(counts)[:, None]
    right = torch.arange(columns) < torch.tensor(counts)[:, None]
    for mask in (left, right, _masked(counts, columns), left.long()):
        output = model(ids, attention_mask=mask, use_cache=True)
        closed = model(ids, attention_mask=mask)
        for row in range(5):
            real = mask[row].bool()
            alone = model(ids[row : row + 1, real], use_cache=True)
            assert_round_off(output.logits[row, real], alone.logits[0])
            _same_state(output.memory.select([row]), alone.memory)
            _same_state(closed.memory.select([row]), alone.memory.end_segment())
        assert not output.logits[~mask.bool()].any()
        assert_round_off(closed.logits, output.logits)


@every_kind
def test_rows_at_different_places_go_on(formulation, flow):
    """Steps of one token and of several, from rows that stand apart, some of them without any."""
    model, columns = _model(formulation, flow), 40
    ids = random_ids(4, columns)
    masks = [_masked([5, 9, 1, 7], 11), torch.ones(4, 1), _masked([1, 0, 1, 1], 1)]
    masks += [_masked([4, 7, 0, 15], 15), torch.ones(4, 1), torch.ones(4, 3)]
    assert sum(mask.shape[1] for mask in masks) <= columns
    state, start, seen = None, 0, torch.zeros(4, columns, dtype=torch.bool)
    for mask in masks:
        piece = ids[:, start : start + mask.shape[1]]
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                output = model(piece, memory=state, attention_mask=mask, use_cache=True)
        seen[:, start : start + mask.shape[1]] = mask.bool()
        for row in range(4):
            alone = model(ids[row : row + 1, seen[row]], use_cache=True)
            here = mask[row].bool()
            count = int(here.sum())
            assert_round_off(
                output.logits[row, here], alone.logits[0, alone.logits.shape[1] - count :]
            )
            _same_state(output.memory.select([row]), alone.memory)
        state, start = output.memory, start + mask.shape[1]


@every_kind
def test_an_earlier_state_stays_what_it_was(formulation, flow):
    """Two continuations of one state, and none writes into what the other reads."""
    model, ids = _model(formulation, flow), random_ids(2, 30)
    with torch.no_grad():
        state = model(ids[:, :3], use_cache=True).memory
        state = model(ids[:, 3:4], memory=state, use_cache=True).memory
        banks = [bank.clone() for bank in state.banks]
        want = model(ids[:, 4:6], memory=state, use_cache=True).logits
        other = model(ids[:, 10:19], memory=state, use_cache=True).memory
        model(ids[:, 20:21], memory=other, use_cache=True)
        rows = state.reset([0], model.initial_state(1))
        model(ids[:, 21:23], memory=rows, use_cache=True)
        again = model(ids[:, 4:6], memory=state, use_cache=True).logits
    assert torch.equal(again, want)
    for got, bank in zip(state.banks, banks, strict=True):
        assert torch.equal(got, bank)


@every_kind
@pytest.mark.parametrize("apart", (False, True))
def test_a_full_segment_stays_what_it_was(formulation, flow, apart):
    """Two continuations of a state, the first of which fills a row's segment."""
    model, ids = _model(formulation, flow), random_ids(2, 30)
    mask = torch.ones(2, SLOTS - 1)
    if apart:
        mask[1, :2] = 0
    with torch.no_grad():
        state = model(ids[:, : SLOTS - 2], attention_mask=mask[:, :-1], use_cache=True).memory
        state = model(ids[:, SLOTS - 2 : SLOTS - 1], memory=state, use_cache=True).memory
        first = model(ids[:, 6:7], memory=state, use_cache=True).memory
        assert first.position.tolist() == ([0, SLOTS - 2] if apart else [0, 0])
        before = [bank.clone() for bank in first.banks]
        want = model(ids[:, 7:8], memory=first, use_cache=True).logits
        model(ids[:, 20:21], memory=state, use_cache=True)
        got = model(ids[:, 7:8], memory=first, use_cache=True).logits
    assert torch.equal(got, want)
    for bank, was in zip(first.banks, before, strict=True):
        assert torch.equal(bank, was)


@every_kind
@pytest.mark.parametrize("grad", (False, True))
def test_reset_forgets_nan(formulation, flow, grad):
    model, ids = _model(formulation, flow), random_ids(2, 6)
    with torch.no_grad():
        state = model(ids[:, :3], use_cache=True).memory
        for tensor in (*state._incoming, *state._cache.values()):
            tensor[0] = torch.nan
    with torch.set_grad_enabled(grad):
        fresh = state.reset([0], model.initial_state(1))
        got = model(ids[:, 3:4], memory=fresh, use_cache=True)
        want = model(ids[:1, 3:4], use_cache=True)
    assert_round_off(got.logits[:1], want.logits)
    assert got.logits.isfinite().all()
    _same_state(got.memory.select([0]), want.memory)


def test_steps_write_in_place():
    """A step of one token copies no buffer."""
    model, ids = _model(memory_slots=64), random_ids(2, 9)
    with torch.no_grad():
        state = model(ids[:, :4], use_cache=True).memory
        places = {name: tensor.data_ptr() for name, tensor in state._cache.items()}
        for step in range(4, 9):
            state = model(ids[:, step : step + 1], memory=state, use_cache=True).memory
            assert {n: t.data_ptr() for n, t in state._cache.items()} == places


@every_kind
def test_state_rows_within_a_segment(formulation, flow):
    """Selected, expanded, joined, reset and detached rows go on like the rows they came from."""
    model, ids = _model(formulation, flow), random_ids(3, 8)
    state = model(ids[:, :5], attention_mask=_masked([5, 2, 4], 5), use_cache=True).memory
    more = ids[:, 5:]

    def logits(state, rows):
        return model(more[rows], memory=state, use_cache=True).logits

    want = logits(state, [0, 1, 2])
    assert_round_off(logits(state.select([2, 0]), [2, 0]), want[[2, 0]])
    assert_round_off(logits(state.expand(2), [0, 0, 1, 1, 2, 2]), want[[0, 0, 1, 1, 2, 2]])
    parts = [state.select([1]), model.initial_state(1), state.select([0, 2])]
    fresh = model(more[:1]).logits
    joined = logits(MemoryState.cat(parts), [1, 0, 0, 2])
    assert_round_off(joined, torch.cat([want[1:2], fresh, want[[0, 2]]]))
    reset = state.reset([0], model.initial_state(1))
    assert reset.position.tolist() == [0, 2, 4]
    assert_round_off(logits(reset, [0, 1, 2]), torch.cat([fresh, want[1:]]))
    detached = state.detach()
    assert not any(t.requires_grad for t in (*detached.banks, *detached._cache.values()))
    assert_round_off(logits(detached, [0, 1, 2]), want)
    assert MemoryState.cat([model.initial_state(2)]).position.tolist() == [0, 0]


@every_kind
def test_state_file_within_a_segment(formulation, flow, tmp_path):
    model, ids = _model(formulation, flow), random_ids(2, 8)
    path = tmp_path / "state.safetensors"
    state = model(ids[:, :5], attention_mask=_masked([5, 2], 5), use_cache=True).memory
    state.save(path)
    again = MemoryState.load(path)
    _same_state(again, state)
    want = model(ids[:, 5:], memory=state, use_cache=True)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            got = model(ids[:, 5:], memory=again, use_cache=True)
        assert_round_off(got.logits, want.logits)
        _same_state(got.memory, want.memory)
    state.save(path)
    whole = load_file(path)
    assert whole["position"].tolist() == [5, 2]
    key = next(name for name in whole if name.endswith("self_attn.key"))
    for change in (
        {"position": torch.tensor([6, 2])},
        {"position": torch.tensor([-1, 2])},
        {"position": torch.tensor([5])},
        {"position": torch.tensor([5, 2, 1])},
        {"position": torch.tensor([5.0, 2.0])},
        {"position": torch.tensor(5)},
        {"bank.0": torch.zeros(2, SLOTS, 24, dtype=torch.int64)},
        {"bank.0": torch.zeros(2, SLOTS)},
        {"bank.7": torch.zeros(2, SLOTS, 24)},
        {key: whole[key][:, :3].clone()},
        {key: whole[key][:1].clone()},
        {"cache.bank0": None},
        {"position": None},
    ):
        tensors = {k: v for k, v in {**whole, **change}.items() if v is not None}
        save_file(tensors, path, metadata={"format": "lm2_kernels.MemoryState"})
        with pytest.raises(ValueError, match="holds no memory state"):
            MemoryState.load(path)


@every_kind
@every_level
def test_float32_memory_beside_a_16_bit_model(formulation, flow, environment):
    """Pieces keep the rule as one pass does, and the state's dtype is the memory's, within a
    segment too."""

    def read(model, ids, *sizes):
        state, logits = model.initial_state(4).to(torch.float32), []
        for piece in ids.split(sizes, dim=1):
            output = model(piece, memory=state, use_cache=True)
            state = output.memory
            assert state.banks[0].dtype == torch.float32
            logits.append(output.logits)
        moved = state.to(torch.bfloat16)
        assert moved.banks[0].dtype == torch.bfloat16
        assert model(ids[:, :2], memory=moved).logits.isfinite().all()
        return torch.cat(logits, dim=1)

    with torch.no_grad(), environment():
        assert_rule(
            lambda seed: compare_logits(
                read, (3, 1, 9, 3), seed, torch.bfloat16, formulation=formulation, flow=flow
            )
        )


@pytest.mark.parametrize("grad", (False, True))
def test_copied_and_pickled_states_are_their_own(grad):
    model, ids = _model(), random_ids(2, 9)
    with torch.no_grad():
        state = model(ids[:, :4], use_cache=True).memory
        copies = [copy.deepcopy(state), pickle.loads(pickle.dumps(state))]
        want = model(ids[:, 4:5], memory=state, use_cache=True).logits
        model(ids[:, 5:6], memory=state, use_cache=True)
        for other in copies:
            assert torch.equal(model(ids[:, 4:5], memory=other).logits, want)


def test_modes_mix():
    """A state may be made without gradients, in inference mode and with them, in any order."""
    model, ids = _model(), random_ids(2, 9)
    want = model(ids).logits
    contexts = (torch.no_grad, torch.inference_mode, torch.no_grad, torch.inference_mode)
    state, logits = None, []
    for context, piece in zip(contexts, ids.split((2, 1, 3, 3), dim=1), strict=True):
        with context():
            output = model(piece, memory=state, use_cache=True)
        state = output.memory
        logits.append(output.logits)
    assert_round_off(torch.cat(logits, dim=1), want.detach())


def test_empty_batch():
    model, ids = _model(), random_ids(2, 9)[:0]
    output = model(ids, ids, use_cache=True, return_logits=True)
    assert output.logits.shape == (0, 9, 61)
    assert output.memory.batch == 0
    assert model.generate(ids, max_new_tokens=3).sequences.shape == (0, 12)


def test_a_failed_step_leaves_the_state():
    model, ids = _model(), random_ids(2, 9)
    with torch.no_grad():
        state = model(ids[:, :4], use_cache=True).memory
        want = copy.deepcopy(state)
        handle = model.model.layers[2].mlp.register_forward_hook(_raise)
        with pytest.raises(RuntimeError, match="on purpose"):
            model(ids[:, 4:5], memory=state, use_cache=True)
        handle.remove()
        got = model(ids[:, 5:6], memory=state, use_cache=True).logits
        assert_round_off(got, model(ids[:, 5:6], memory=want, use_cache=True).logits)


def _raise(*_):
    raise RuntimeError("on purpose")


@pytest.mark.parametrize(
    ("formulation", "flow"),
    [
        # between them they have both formulations and both flows
        pytest.param(*kind, marks=() if kind in KINDS[::3] else pytest.mark.slow)
        for kind in KINDS
    ],
)
def test_model_compiles_whole(formulation, flow):
    # what earlier tests compiled counts towards the limit of recompilations
    torch._dynamo.reset()
    model, ids = _model(formulation, flow, num_hidden_layers=1), random_ids(2, 9)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got, want = compiled(ids, ids, return_logits=True), model(ids, ids, return_logits=True)
    assert_round_off(got.logits, want.logits)
    assert_round_off(got.loss, want.loss)
    with torch.no_grad():
        assert_round_off(compiled(ids).logits, want.logits)


def test_model_without_memory_streams():
    model, ids = _model(memory_layers=()), random_ids(2, 9)
    want, state, logits = model(ids), None, []
    assert want.memory is None
    for piece in ids.split((1, 4, 1, 3), dim=1):
        output = model(piece, memory=state, use_cache=True)
        state = output.memory
        logits.append(output.logits)
    assert_round_off(torch.cat(logits, dim=1), want.logits)
    assert "batch 2, position [3, 3]" in repr(state)
    assert model.initial_state(2).reset([0], model.initial_state(1)).position.tolist() == [0, 0]


@pytest.mark.parametrize("num_blocks", (1, 2))
@pytest.mark.parametrize("layer", ("paper", "release"))
def test_layer_streams(layer, num_blocks):
    """One call for a segment, one for each of its pieces. Two blocks too: their keys are kept."""
    if layer == "paper":
        if num_blocks > 1:
            return
        layer = lm2.PaperMemory(24, 3, output="memory", top_k=3).double()
    else:
        options = {"num_blocks": num_blocks, "pooled_gate": "prefix", "top_k": 3}
        layer = lm2.ReleaseMemory(24, 3, **options).double()
    x, memory = torch.randn(2, 9, 24).double(), torch.randn(2, 9, 24).double()
    want, new_memory = layer(x, memory)
    state, outputs = MemoryState([memory]), []
    for piece in x.split((2, 1, 5, 1), dim=1):
        (rows,), cache = state.piece(piece.shape[1], 9, keep=True)
        output, new_rows = layer(piece, rows, cache=cache)
        state = state.after(cache, [new_rows])
        outputs.append(output)
    assert_round_off(torch.cat(outputs, dim=1), want)
    assert_round_off(state.banks[0], new_memory)
    assert state.position.tolist() == [0, 0]


def test_what_cannot_stream():
    x = torch.randn(1, 2, 24)
    released = lm2.ReleaseMemory(24, 3)
    state = MemoryState([torch.randn(1, 4, 24)])
    (rows,), cache = state.piece(2, 4, keep=True)
    _, new_rows = released(x, rows, cache=cache)
    state = state.after(cache, [new_rows])
    (rows,), cache = state.piece(2, 4, keep=True)
    with pytest.raises(ValueError, match="pooled_gate='segment' cannot stream"):
        released(x, rows, cache=cache)
    with pytest.raises(ValueError, match="the layer has causal=False, the cache True"):
        lm2.PaperMemory(24, 3, causal=False)(x, rows, cache=cache)
    with pytest.raises(ValueError, match="cache is for 2 tokens"):
        lm2.PaperMemory(24, 3)(x[:, :1], rows[:, :1], cache=cache)
    with pytest.raises(ValueError, match=r"the rows\) must be"):
        lm2.PaperMemory(24, 3)(x, rows[:, :1], cache=cache)
    with pytest.raises(ValueError, match="takes no slot_offset"):
        lm2.PaperMemory(24, 3)(x, rows, cache=cache, slot_offset=2)
    with pytest.raises(ValueError, match="the pooled sum is in the cache"):
        released(x, rows, cache=cache, return_pooled_sum=True)
    with pytest.raises(ValueError, match="at most 4 tokens"):
        state.piece(3, 4, keep=True)
    model = small_model(formulation="release", pooled_gate="segment")
    for call in (lambda ids: model(ids, use_cache=True), model.generate):
        with pytest.raises(ValueError, match="Use pooled_gate='prefix'"):
            call(random_ids(1, 4))
    with pytest.raises(ValueError, match="one token at a time"):
        SegmentCache({}, [1, 2], 2, 4)


def test_released_gate_pools_over_real_tokens():
    """The mean over a segment does not count the padding."""
    model, ids = _model("release", "time", pooled_gate="segment"), random_ids(3, 14)
    mask = _masked([14, 3, 8], 14)
    output = model(ids, attention_mask=mask)
    for row in range(3):
        alone = model(ids[row : row + 1, mask[row].bool()])
        assert_round_off(output.logits[row, mask[row].bool()], alone.logits[0])
        _same_state(output.memory.select([row]), alone.memory)


@pytest.mark.parametrize("flow", ("depth", "time"))
def test_loss_does_not_see_padding(flow):
    model, ids = _model(flow=flow), random_ids(3, 14)
    mask = _masked([14, 3, 8], 14)
    got = model(ids, ids, attention_mask=mask).loss
    rows = [ids[row : row + 1, mask[row].bool()] for row in range(3)]
    losses = [model(row, row).loss * (row.shape[1] - 1) for row in rows]
    assert_round_off(got, sum(losses) / (14 + 3 + 8 - 3))


def test_truncated_backpropagation_with_padding():
    """The cut is where it is without padding."""
    model, ids = _model(), random_ids(2, 24)
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[1, :9] = 0
    results = []
    for rows in (slice(0, 2), slice(0, 1)):
        logits = model(ids[rows], attention_mask=mask[rows], bptt_segments=2).logits
        results.append(torch.autograd.grad(logits[0, -1].square().sum(), list(model.parameters())))
    for got, want in zip(*results, strict=True):
        assert_round_off(got, want)


def test_wrong_state_within_a_segment_is_refused():
    ids = random_ids(2, 3)
    state = _model()(ids, use_cache=True).memory
    for options in ({"num_hidden_layers": 2}, {"num_key_value_heads": 4}, {"memory_heads": 2}):
        model = _model(**options)
        with pytest.raises(ValueError, match="keeps other tensors"):
            model(ids, memory=state)
    with pytest.raises(ValueError, match=r"was kept with dtype torch\.float64"):
        _model().to(torch.float32)(ids, memory=state, use_cache=True)
    for mask in (torch.ones(2, 2), [[1, 1, 1]] * 2):
        with pytest.raises(ValueError, match="attention_mask must be"):
            _model()(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="at least one token must be real"):
        _model()(ids, attention_mask=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="several configurations"):
        MemoryState.cat([state, _model(flow="time").initial_state(1)])
    other = _model("release")(ids, use_cache=True).memory
    for states in ([state, other], [state, state.to(torch.float32)]):
        with pytest.raises(ValueError, match="several configurations"):
            MemoryState.cat(states)
    plain = _model(memory_layers=(), memory_slots=4)
    for length in (4, 5):
        longer = _model(memory_layers=())(random_ids(2, length), use_cache=True).memory
        with pytest.raises(ValueError, match=f"stands at {length}"):
            plain(ids, memory=longer)
    with pytest.raises(ValueError, match="no state"):
        MemoryState.cat([])


def test_compress_and_spread():
    mask = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    order, lengths = segments.compress(mask)
    assert lengths == [2, 4, 0]
    x = torch.arange(12.0).view(3, 4, 1)
    gathered = segments.gather(x, order)
    assert gathered[0, :2, 0].tolist() == [1.0, 3.0]
    assert torch.equal(segments.gather(x[..., 0], order), gathered[..., 0])
    assert torch.equal(segments.spread(gathered, order, lengths), x * mask[..., None])


def test_a_scope_shares_all_but_the_prefix():
    cache = SegmentCache({}, None, 2, 4)
    scoped = cache.scope("a").scope("b")
    assert scoped._prefix == "a.b."
    own, theirs = vars(cache).copy(), vars(scoped).copy()
    assert own.pop("_prefix") == "" and theirs.pop("_prefix") == "a.b."
    assert own.keys() == theirs.keys()
    assert all(theirs[name] is value for name, value in own.items())
