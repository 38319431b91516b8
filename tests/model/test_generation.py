"""Generation: what it gives is what forward over the whole text gives, token by token."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import lm2_kernels as lm2
from tools.emulated_avx512 import every_level
from tools.models import KINDS, SMALL, compare_logits, random_ids, small_model
from tools.rounding import assert_round_off, assert_rule

every_kind = pytest.mark.parametrize(("formulation", "flow"), KINDS)
LEFT = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])


def _model(formulation="paper", flow="depth", **options):
    return small_model(formulation=formulation, flow=flow, initializer_range=0.2, **options)


@torch.no_grad()
def _greedy(model, ids, count):
    """What generation should give, by whole forwards. (B, L + count)"""
    for _ in range(count):
        # every step anew
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@every_kind
def test_greedy_is_the_argmax_of_forward(formulation, flow):
    """Twenty tokens, over several borders of segments, from prompts short and long."""
    model = _model(formulation, flow)
    for length in (1, 5, 6, 14):
        ids = random_ids(2, length)
        got = model.generate(ids, max_new_tokens=20)
        assert torch.equal(got.sequences, _greedy(model, ids, 20))
        want = model(got.sequences, use_cache=True).memory
        assert got.memory.position.tolist() == want.position.tolist()
        for a, b in zip(got.memory.banks, want.banks, strict=True):
            assert_round_off(a, b)


@every_kind
def test_left_padded_prompts_are_alone(formulation, flow):
    model, ids = _model(formulation, flow), random_ids(3, 5)
    got = model.generate(ids, attention_mask=LEFT, max_new_tokens=15).sequences
    assert torch.equal(got[:, :5], ids)
    for row in range(3):
        prompt = ids[row : row + 1, LEFT[row].bool()]
        alone = model.generate(prompt, max_new_tokens=15).sequences
        assert torch.equal(got[row, 5:], alone[0, prompt.shape[1] :])


@every_kind
@every_level
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, "autocast"), ids=str)
def test_step_logits_keep_the_rule(formulation, flow, dtype, environment):
    """Logits of single steps are as near the float64 model as those of one forward."""

    def read(model, ids, *sizes):
        state, steps = None, []
        for piece in ids.split(sizes, dim=1):
            output = model(piece, memory=state, use_cache=True)
            state = output.memory
            steps.append(output.logits)
        return torch.cat(steps, dim=1)

    is_autocast, kind = dtype == "autocast", {"formulation": formulation, "flow": flow}
    dtype = torch.float32 if is_autocast else dtype
    with torch.no_grad(), environment(), torch.autocast("cpu", torch.bfloat16, is_autocast):
        assert_rule(lambda seed: compare_logits(read, (3, *[1] * 13), seed, dtype, **kind))


@every_kind
def test_generation_goes_on(formulation, flow):
    """Two calls with the state between are one conversation."""
    model, first, second = _model(formulation, flow), random_ids(2, 4), random_ids(2, 3, seed=5)
    start = model.generate(first, max_new_tokens=4)
    then = model.generate(second, memory=start.memory, max_new_tokens=9)
    whole = torch.cat([start.sequences, second], dim=1)
    assert torch.equal(torch.cat([start.sequences, then.sequences], 1), _greedy(model, whole, 9))


@every_kind
def test_steps_can_be_taken_again(formulation, flow):
    """From every state on the way: those after it wrote into its buffers, where a row began a new
    segment too, and have left alone what it reads."""
    model, ids = _model(formulation, flow), random_ids(2, 14)
    mask = torch.ones(2, 5)
    mask[1, :2] = 0
    with torch.no_grad():
        states = [model(ids[:, :5], attention_mask=mask, use_cache=True).memory]
        for token in ids[:, 5:].split(1, dim=1):
            states.append(model(token, memory=states[-1], use_cache=True).memory)
        for row in range(2):
            text = ids[row : row + 1, 2 * row :]
            want = model(text).logits
            for step, state in enumerate(states[:-1]):
                got = model(ids[:, 5 + step : 6 + step], memory=state, use_cache=True)
                assert_round_off(got.logits[row, 0], want[0, 5 - 2 * row + step])


def test_threads_share_a_model():
    """Nothing of a call is kept on the model."""
    model, prompts = _model(), [random_ids(2, 4 + seed, seed=seed) for seed in range(4)]

    def run(ids):
        grown = model(ids, ids).loss
        return model.generate(ids, max_new_tokens=9).sequences, grown.detach()

    wants = [run(ids) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, want in zip(pool.map(run, prompts), wants, strict=True):
                assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("in_threads", (False, True))
def test_calls_go_on_from_one_state(in_threads):
    """Also one within another: each has what it writes for itself."""
    model, ids = _model(), random_ids(1, 3)
    tails = [random_ids(1, 2, seed=seed) for seed in (2, 3, 4)]
    last = random_ids(1, 1, seed=5)
    wants = [model(torch.cat([ids, tail, last], dim=1)).logits[:, -1] for tail in tails]
    gate, calls = threading.Barrier(3 if in_threads else 1), []

    def meet(*_):
        # in mid-pass
        gate.wait(60)
        if not in_threads and not calls:
            calls.append(None)
            calls[0] = go_on(tails[1])

    def go_on(tail):
        with torch.no_grad():
            memory = model(tail, memory=state, use_cache=True).memory
            return model(last, memory=memory).logits[:, -1]

    for _ in range(3):
        with torch.no_grad():
            # the second one's buffers have room to be written to
            state = model(ids[:, :1], use_cache=True).memory
            state = model(ids[:, 1:], memory=state, use_cache=True).memory
        calls.clear()
        handle = model.model.layers[0].mlp.register_forward_hook(meet)
        if in_threads:
            with ThreadPoolExecutor(3) as pool:
                gots = list(pool.map(go_on, tails))
        else:
            gots = [go_on(tails[0]), *calls]
        handle.remove()
        for got, want in zip(gots, wants, strict=False):
            assert_round_off(got, want)


def test_rows_end():
    """A row stops at an end token, is padded, and its state holds what it read and no more."""
    model, ids = _model(), random_ids(3, 4)
    free = model.generate(ids, max_new_tokens=10).sequences
    end = free[0, 6].item()
    first = [(row[4:] == end).nonzero() for row in free]
    ends = [int(places[0]) + 1 if len(places) else 10 for places in first]
    assert min(ends) < 10
    got = model.generate(ids, max_new_tokens=10, eos_token_id=[end, end], pad_token_id=60)
    for row in range(3):
        stop = 4 + ends[row]
        assert torch.equal(got.sequences[row, :stop], free[row, :stop])
        assert (got.sequences[row, stop:] == 60).all()
        alone = model(free[row : row + 1, :stop], use_cache=True).memory
        mine = got.memory.select([row])
        assert mine.position.tolist() == alone.position.tolist()
        assert_round_off(mine.banks[0], alone.banks[0])
    alone = model.generate(ids[:1], max_new_tokens=10, eos_token_id=end)
    assert torch.equal(alone.sequences[0], free[0, : 4 + ends[0]])


def test_tokens_are_shown_as_they_come():
    model, ids = _model(), random_ids(2, 3)
    shown = []
    got = model.generate(ids, max_new_tokens=5, on_token=shown.append).sequences
    assert torch.equal(torch.stack(shown, dim=1), got[:, 3:])
    stopped = model.generate(ids, max_new_tokens=5, on_token=lambda tokens: True).sequences
    assert torch.equal(stopped, got[:, :4])


def _frequencies(model, ids, count=4000, **options):
    generator = torch.Generator().manual_seed(3)
    many = ids.expand(count, -1)
    drawn = model.generate(
        many, max_new_tokens=1, do_sample=True, generator=generator, **options
    ).sequences[:, -1]
    return torch.bincount(drawn, minlength=SMALL["vocab_size"]) / count


@pytest.mark.parametrize("temperature", (0.5, 1.0, 2.0))
@pytest.mark.parametrize("cut", ({}, {"top_k": 4}, {"top_p": 0.5}, {"top_k": 9, "top_p": 0.6}))
def test_sampling_follows_the_distribution(temperature, cut):
    model, ids = _model(), random_ids(1, 3)
    want = (model(ids).logits[0, -1] / temperature).softmax(-1)
    kept = torch.ones_like(want, dtype=torch.bool)
    order = want.argsort(descending=True)
    if "top_k" in cut:
        kept[order[cut["top_k"] :]] = False
    if "top_p" in cut:
        share = torch.where(kept, want, 0.0)
        share = share / share.sum()
        total = 0.0
        for token in order:
            if total >= cut["top_p"]:
                kept[token] = False
            total += share[token]
    want = torch.where(kept, want, 0.0)
    want = want / want.sum()
    got = _frequencies(model, ids, temperature=temperature, **cut)
    assert not got[~kept].any()
    # five standard deviations
    assert ((got - want).abs() <= 5 * (want / 4000).sqrt() + 1e-9).all()


def test_sampling_is_repeatable():
    model, ids = _model(), random_ids(2, 3)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        options = {"do_sample": True, "generator": generator, "max_new_tokens": 12}
        return model.generate(ids, **options).sequences

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    greedy = model.generate(ids, max_new_tokens=9).sequences
    for options in ({"top_k": 1}, {"temperature": 1e-40}):
        one = model.generate(ids, do_sample=True, max_new_tokens=9, **options).sequences
        assert torch.equal(one, greedy)


@every_kind
def test_autocast_generates(formulation, flow):
    """What is kept under autocast is in its dtype."""
    model, ids = _model(formulation, flow).to(torch.float32), random_ids(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        got = model.generate(ids, max_new_tokens=8)
    assert got.sequences.shape == (2, 17)
    assert got.memory._cache["layers.0.self_attn.key"].dtype == torch.bfloat16


def test_generation_without_memory_layers():
    model, ids = _model(memory_layers=()), random_ids(2, 4)
    assert torch.equal(model.generate(ids, max_new_tokens=9).sequences, _greedy(model, ids, 9))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"temperature": 0.5}, ValueError, "give do_sample=True"),
        ({"do_sample": True, "temperature": 0.0}, ValueError, "temperature must be above 0"),
        ({"do_sample": True, "top_k": 0}, ValueError, "top_k"),
        ({"do_sample": True, "top_p": 0.0}, ValueError, "top_p must be in"),
        ({"do_sample": True, "top_p": 1.5}, ValueError, "top_p must be in"),
        ({"do_sample": True, "top_p": "x"}, TypeError, "top_p must be a float"),
        ({"do_sample": True, "temperature": None}, TypeError, "temperature must be a float"),
        ({"do_sample": True, "temperature": float("nan")}, ValueError, "temperature must be"),
        ({"eos_token_id": 61}, ValueError, "eos_token_id must be between 0 and 60"),
        ({"pad_token_id": -1}, ValueError, "pad_token_id"),
        ({"eos_token_id": "x"}, TypeError, "eos_token_id"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, ValueError, "pad prompts on the left"),
        ({"input_ids": torch.tensor([[99]])}, ValueError, "below vocab_size"),
    ),
)
def test_wrong_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        _model().generate(**{"input_ids": random_ids(1, 3), **options})


def test_beam_search_over_states():
    """What a user writes: the best of all continuations, by expand() and select()."""
    model, ids, width = _model(), random_ids(1, 4), 5
    with torch.no_grad():
        output = model(ids, use_cache=True)
        state, scores = output.memory, torch.zeros(1, dtype=torch.float64)
        logits, texts = output.logits[:, -1], torch.zeros(1, 0, dtype=torch.int64)
        for _ in range(4):
            total = scores[:, None] + logits.log_softmax(-1)
            scores, best = total.flatten().topk(width)
            parents, tokens = best // 61, best % 61
            state = state.select(parents)
            texts = torch.cat([texts[parents], tokens[:, None]], dim=1)
            output = model(tokens[:, None], memory=state, use_cache=True)
            state, logits = output.memory, output.logits[:, -1]
        whole = torch.cat([ids.expand(width, -1), texts], dim=1)
        log_probabilities = model(whole).logits.log_softmax(-1)[:, 3:-1]
    want = log_probabilities.gather(2, texts[:, :, None]).sum((1, 2))
    assert_round_off(scores, want)
    assert isinstance(state, lm2.MemoryState)
