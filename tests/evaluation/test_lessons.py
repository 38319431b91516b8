"""Samples to train on: of the stories for training alone, the same for one process and for
several, of the sizes that a curriculum says; and how a trained model is judged."""

import collections
import dataclasses
import itertools
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lm2_kernels import LM2Config
from lm2_kernels.evaluation import babilong, background, lessons, stories
from lm2_kernels.evaluation.layout import Layout, words
from lm2_kernels.evaluation.lessons import Lessons
from lm2_kernels.evaluation.samples import Sample, Story, plain
from lm2_kernels.training.data import Words
from lm2_kernels.training.run import DEFAULTS

CONFIG = LM2Config(9, 16, 32, 1, 2, memory_slots=32, memory_heads=2)
STEPS = 12


def _batches(tasks=("mqar",), config=CONFIG, **options):
    options = {**DEFAULTS, "steps": STEPS, "batch": 4, "tasks": list(tasks), **options}
    data = Lessons.open(options)
    return data.batches(data.completed(options, config), config)


def _drawn(batches):
    return [batches.samples(step, range(batches.options["batch"])) for step in range(STEPS)]


def test_sizes_are_those_of_the_curriculum():
    batches = _batches(segments=[4, 2], seed=5)
    sizes = [size for _, size in _drawn(batches)]
    assert set(sizes[: STEPS // 2]) == {2} and set(sizes[STEPS // 2 :]) == {2, 4}
    for size, batch in zip(sizes, batches.train(), strict=True):
        # of the context, and one of the question
        assert batch["input_ids"].shape == (4, 32 * (size + 1))


def test_lengths_in_tokens():
    batches = _batches(lengths=[0, 60, 100], curriculum="mixed", seed=1)
    seen = collections.defaultdict(set)
    for (samples, size), batch in zip(_drawn(batches), batches.train(), strict=True):
        seen[size].add(batch["input_ids"].shape[1])
        counts = [batches.layout.count(sample.context) for sample in samples]
        # of the facts alone, which are eight pairs; or with background up to the length
        assert set(counts) == {24} if size == 0 else size - 10 < min(counts) <= max(counts) <= size
    assert seen == {0: {32 + 32}, 60: {64 + 32}, 100: {128 + 32}}


@pytest.mark.parametrize("parallel", ("ddp", "fsdp"))
@pytest.mark.parametrize("layout", ("aligned", "running"))
def test_ranks_see_what_one_would(layout, parallel):
    """With fsdp as long as one would: all read every segment together."""
    options = {"layout": layout, "lengths": [0, 40], "curriculum": "mixed", "seed": 3}
    batches = _batches(("qa1", "niah"), parallel=parallel, **options)
    whole, parts = batches.train(), [batches.train(rank=rank, world=2) for rank in range(2)]
    widths = set()
    for step in range(STEPS):
        one = next(whole)
        assert len(one["input_ids"]) == 4
        for rank, part in enumerate(map(next, parts)):
            for name in ("input_ids", "labels"):
                rows = one[name][rank::2]
                width = part[name].shape[1]
                assert torch.equal(part[name], rows[:, :width]), step
                # what is longer in the other rank's rows is padding here
                assert (rows[:, width:] == (0 if name == "input_ids" else -100)).all()
                widths.add(rows.shape[1] - width)
    assert (widths == {0}) == (parallel == "fsdp")


def test_a_run_that_goes_on_sees_what_was_left():
    batches = _batches(("qa1", "stories"), segments=[1, 2], seed=3)
    for late, want in zip(
        batches.train(first=5), itertools.islice(batches.train(), 5, None), strict=True
    ):
        assert late.keys() == want.keys()
        assert all(torch.equal(late[name], want[name]) for name in want)
    # another seed draws others, also of stories that are the same for all seeds
    again = dataclasses.replace(batches, options={**batches.options, "seed": 4})
    assert again.samples(0, range(4))[0] != batches.samples(0, range(4))[0]


def _is_validation(name, sample):
    """What the split says of a sample of facts alone."""
    if name == "stories":
        told = sample.context.split()
        sentences = tuple(tuple(told[first : first + 3]) for first in range(0, len(told), 3))
        return stories._is_validation(stories.Example(sentences, ()))
    facts = tuple(re.split(r"(?<=\.) ", sample.context))
    return Story(facts, sample.question, sample.answer).is_validation


@pytest.mark.parametrize("name", ("qa1", "qa4", "mqar", "vt", "niah", "stories"))
def test_no_story_for_validation_is_trained_on(name):
    """Whatever the seeds; and every step has samples of its own."""
    batches = _batches((name,), lengths=[0], batch=25)
    seen = [sample for samples, _ in _drawn(batches) for sample in samples]
    (other,) = _batches((name,), lengths=[0], seed=7).questions
    asked = [other.sample(number) for number in range(200)]
    assert not any(_is_validation(name, sample) for sample in seen)
    assert all(_is_validation(name, sample) for sample in asked)
    assert len(set(seen)) > len(seen) // 2
    # of qa4 there are so few that some would be the same
    assert not set(seen) & set(asked)


@pytest.mark.parametrize(
    ("place", "name", "value"),
    (
        (background, "_SENTENCES", background._SENTENCES[::-1]),
        (babilong, "_join", lambda facts, _, filling: " ".join((*facts, *filling))),
        (lessons, "words", lambda *lists: Words(words(*lists).words[::-1])),
    ),
)
def test_what_else_is_told_counts(place, name, value, monkeypatch):
    """Beside the facts: what is around them, where they are put, the order of the vocabulary."""
    options = {**DEFAULTS, "tasks": ["qa1"]}
    before = Lessons.open(options).entries()
    assert Lessons.open(options).entries() == before
    monkeypatch.setattr(place, name, value)
    assert Lessons.open(options).entries() != before


def test_every_task_has_its_share():
    samples, _ = _batches(("qa1", "niah"), lengths=[0], batch=40).samples(0, range(40))
    assert 8 < sum("secret" in sample.question for sample in samples) < 32


def test_the_words_are_those_of_the_tasks():
    for name in ("qa3", "niah_multikey"):
        batches = _batches((name,), segments=[8])
        known = batches.layout.tokenizer.words
        for some in (*batches.tasks, *batches.questions):
            for number in range(5):
                texts = plain(some.sample(number, 256))
                assert set(" ".join(texts).split()) <= set(known)


class _Knowing(nn.Module):
    """Says what a table says behind each token, and what the loss is."""

    def __init__(self, follows):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(len(follows), len(follows)))
        for token, next_token in enumerate(follows):
            self.table.data[token, next_token] = 1.0

    def forward(self, input_ids, labels, return_logits=None):
        assert return_logits and not self.training
        loss = (labels[:, 1:] != -100).sum().double() / 8.0
        return SimpleNamespace(loss=loss, logits=self.table[input_ids])


class _Fixed:
    """Three samples, two of them with an answer of two words."""

    name = "fixed"
    samples = (
        Sample("x.", "a?", "b"),
        Sample("x.", "a?", "c c"),
        Sample("x.", "a?", "b c"),
    )

    def sample(self, number, length=0, count=None):
        return self.samples[number % 3]


def test_an_answer_is_right_as_a_whole(monkeypatch):
    """Behind "?" comes b, behind b and c comes c: of three answers, "b" and "b c" are right."""
    tokenizer = words("abcx.?")
    follows = list(range(tokenizer.vocab_size))
    for one, other in ("?b", "bc"):
        follows[tokenizer.encode(one)[0]] = tokenizer.encode(other)[0]
    monkeypatch.setattr(lessons, "_ASKED", 6)
    batches = dataclasses.replace(
        _batches(lengths=[0], batch=3),
        questions=[_Fixed()],
        layout=Layout(tokenizer, 8, loss="all"),
    )
    options = {"device": torch.device("cpu"), "autocast": None}
    model = _Knowing(follows).train()
    (line,) = batches.validate(model, rank=0, world=1, **options)
    # five labels a batch: a loss of 5 / 8 for each, in both batches
    assert line == "validation of fixed, facts alone: loss 0.6250, right 66.7 % (4 of 6)"
    assert model.training


def test_long_rows_are_judged_in_parts(monkeypatch):
    """All logits of a batch would take more memory than the training did."""
    batches = _batches(segments=[2], batch=4)
    rows = list(batches._asked(batches.questions[0], 2, 0, 1))
    assert len(rows) == 25 and rows[0]["input_ids"].shape == (4, 96)
    monkeypatch.setattr(lessons, "_TOGETHER", 3 * 64)
    parts = list(batches._asked(batches.questions[0], 2, 0, 1))
    assert [len(part["input_ids"]) for part in parts[:3]] == [3, 1, 3]
    for name in ("input_ids", "labels"):
        whole, together = (torch.cat([some[name] for some in made]) for made in (rows, parts))
        assert torch.equal(whole, together)


def test_a_row_without_an_answer_is_not_right():
    model = _Knowing(list(range(4))).train()
    ids = torch.tensor([[1, 1], [2, 2]])
    labels = torch.tensor([[-100, 1], [-100, -100]])
    _, _, right, answers = lessons._judged(model, [{"input_ids": ids, "labels": labels}], None)
    assert (right, answers) == (1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"tasks": ["qa1", "qa1"]}, "named twice"),
        ({"tasks": ["qa21"]}, "no task 'qa21'"),
        ({"tasks": ["qa11"]}, "qa11 is not generated"),
        ({"tasks": ["qa1"], "babi": babilong.DATASET}, "samples for tests alone"),
        ({"lengths": [0], "segments": [1]}, "not both"),
        ({"segments": [0]}, "segments must be"),
        ({"lengths": [10]}, "none fits into 10 tokens"),
        ({"tokenizer": "letters"}, "words, bytes, got letters"),
    ),
)
def test_what_cannot_be_learnt(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        _batches(**{"tasks": ("mqar",), **options})
