"""Baselines of a memory: each by what another model computes, and what it must not see."""

import dataclasses
import types

import pytest
import torch
from torch import nn

import lm2_kernels as lm2
from lm2_kernels.evaluation import answer_accuracy
from lm2_kernels.evaluation.baselines import (
    RecurrentMemoryTransformer,
    ShuffledMemory,
    full_attention,
    num_parameters,
    widened,
    without_memory,
)
from tools.models import small_model
from tools.rounding import assert_round_off

S, M = 6, 2  # tokens of a segment, memory tokens


def _ids(*shape, seed=0):
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(seed))


def _rmt(**options):
    config = without_memory(small_model(flow="chunk").config)
    torch.manual_seed(1)
    return RecurrentMemoryTransformer(dataclasses.replace(config, **options), M).double()


def test_without_memory_sees_its_segment_alone():
    config = without_memory(small_model(flow="chunk").config)
    model, ids = lm2.LM2ForCausalLM(config).double(), _ids(2, 2 * S)
    assert not model.memory_layers()
    assert_round_off(model(ids).logits[:, S:], model(ids[:, S:]).logits)


def test_full_attention_sees_all():
    config = full_attention(small_model(flow="chunk").config, 3 * S)
    model, ids = lm2.LM2ForCausalLM(config).double(), _ids(1, 3 * S)
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % 61
    changed = (model(ids).logits != model(other).logits).any(-1)
    assert changed[0, -1]


@pytest.mark.parametrize("change", (-2000, 0, 5000))
def test_widened_to_as_many_parameters(change):
    config = without_memory(small_model().config)
    count = num_parameters(lm2.LM2ForCausalLM(config)) + change
    got = num_parameters(lm2.LM2ForCausalLM(widened(config, count)))
    # half a step of the width
    assert abs(got - count) <= 3 * config.hidden_size * config.num_hidden_layers / 2
    assert widened(config, 1).intermediate_size == 1


@pytest.mark.parametrize("formulation", ("paper", "release"))
def test_shuffled_rows_go_on_with_their_neighbour(formulation):
    model = small_model(flow="chunk", formulation=formulation)
    parts = _ids(3, 3, S)
    ids = parts.flatten(1)
    got = ShuffledMemory(model)(ids)
    for row in range(3):
        # row 1's third segment finds what row 0 wrote in its second, after row 2 in the first
        read = torch.cat([parts[row - 2, 0], parts[row - 1, 1], parts[row, 2]])[None]
        assert_round_off(got.logits[row : row + 1, 2 * S :], model(read).logits[:, 2 * S :])
    labels = ids.clone()
    labels[:, : 2 * S] = -100
    assert_round_off(
        ShuffledMemory(model)(ids, labels).loss,
        nn.functional.cross_entropy(
            got.logits[:, 2 * S - 1 : -1].flatten(0, 1), labels[:, 2 * S :].flatten()
        ),
    )


def test_shuffled_bptt_cuts():
    model, ids = ShuffledMemory(small_model(flow="chunk")), _ids(2, 2 * S)
    labels = ids.clone()
    labels[:, : S + 1] = -100
    used = {}
    for bptt in (None, 1):
        model.zero_grad()
        model(ids, labels, bptt_segments=bptt).loss.backward()
        gradient = model.model.memory_layers()[0].input_gate_proj.weight.grad
        used[bptt] = gradient is not None and bool(gradient.any())
    assert used == {None: True, 1: False}


def test_shuffled_refuses_what_has_no_other():
    config = without_memory(small_model().config)
    with pytest.raises(ValueError, match="no memory layer"):
        ShuffledMemory(lm2.LM2ForCausalLM(config))
    shuffled = ShuffledMemory(small_model())
    # 6 tokens are a segment
    shuffled(_ids(1, 6))
    shuffled(_ids(3, 18))
    for rows, length in ((1, 7), (2, 18), (2, 13)):
        with pytest.raises(ValueError, match="more than as many rows"):
            shuffled(_ids(rows, length))


def _with_tokens(model, memory):
    """The decoder with a segment's memory as m more tokens of its vocabulary."""
    weights = model.decoder.state_dict()
    embedding = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat([embedding, memory])
    head = weights["lm_head.weight"]
    weights["lm_head.weight"] = torch.cat([head, torch.zeros_like(memory)])
    config = dataclasses.replace(
        model.config, vocab_size=61 + M, segment_length=model.config.segment_length + 2 * M
    )
    larger = lm2.LM2ForCausalLM(config).double()
    larger.load_state_dict(weights)
    return larger


def test_rmt_is_the_decoder_with_tokens_of_memory():
    model, ids = _rmt(), _ids(1, 3 * S)
    got, memory, own = model(ids).logits, model.initial_memory, torch.arange(61, 61 + M)[None]
    for number, piece in enumerate(ids.split(S, dim=1)):
        larger = _with_tokens(model, memory.detach())
        read = torch.cat([own, piece, own], dim=1)
        hidden, _ = larger.read(read, keep=False)
        want = model.decoder.logits(hidden[:, M:-M])
        assert_round_off(got[:, number * S : (number + 1) * S], want, f"segment {number}")
        memory = hidden[0, -M:]


def test_rmt_carries_gradients_as_far_as_it_is_told():
    model, ids = _rmt(), _ids(2, 3 * S)
    labels = ids.clone()
    labels[:, : 2 * S + 1] = -100
    reached = {}
    for bptt in (None, 1, 2):
        model.zero_grad()
        model(ids, labels, bptt_segments=bptt).loss.backward()
        reached[bptt] = bool(model.initial_memory.grad.any())
    # its memory starts the first segment; with 2 the cut is before the third
    assert reached == {None: True, 1: False, 2: False}


def test_rmt_refuses():
    with pytest.raises(ValueError, match="memory_layers"):
        RecurrentMemoryTransformer(small_model().config, 2)
    with pytest.raises(ValueError, match="memory_tokens"):
        RecurrentMemoryTransformer(without_memory(small_model().config), 0)
    with pytest.raises(ValueError, match="vocab_size"):
        _rmt()(torch.full((1, 3), 61))


class _Next(nn.Module):
    """Says the number that follows what it reads."""

    def __init__(self, wrong_after=None):
        super().__init__()
        self.weight, self.wrong_after = nn.Parameter(torch.zeros(1)), wrong_after

    def forward(self, ids):
        assert not self.training
        said = torch.where(ids == self.wrong_after, 0, ids + 1) if self.wrong_after else ids + 1
        return types.SimpleNamespace(logits=nn.functional.one_hot(said, 20).float())


def test_answers_count_in_full():
    # two words, one, and one in the middle; the last words' places hold something else
    ids = torch.tensor([[1, 2, 3, 9], [7, 7, 4, 9], [3, 9, 0, 0]])
    labels = torch.tensor([[-100, -100, 3, 4], [-100, -100, -100, 5], [-100, 4, -100, -100]])
    batch = {"input_ids": ids, "labels": labels}
    model = _Next().train()
    got = answer_accuracy(model, [batch, batch])
    assert (got.right, got.total) == (6, 6)
    assert model.training
    # one word of two is not enough
    for word in (2, 3):
        wrong = answer_accuracy(_Next(wrong_after=word), [batch])
        assert (wrong.right, wrong.total) == ((2, 3) if word == 2 else (1, 3))
    labels[0, 3] = 5
    assert answer_accuracy(_Next(), [batch]).right == 2
