"""Rows of tokens say what their samples say, labels stand at the answers, and segments keep facts
and questions apart."""

import dataclasses

import pytest
import torch

from lm2_kernels.evaluation import layout as module
from lm2_kernels.evaluation.layout import LAYOUTS, LOSSES, PAD, Layout
from lm2_kernels.evaluation.samples import Sample, plain, plain_words
from lm2_kernels.training.data import Bytes
from tools.models import small_model
from tools.rounding import assert_round_off

SAMPLES = (
    Sample("Mary went to the garden.", "Where is Mary?", "garden", ("garden", "the office")),
    Sample("John took the milk. John left.", "What did John take?", "milk"),
    Sample("Ann has two apples. " * 3, "What has Ann?", "two apples"),
)
TEXTS = [" ".join((s.context, s.question, s.answer, *s.labels)) for s in SAMPLES]
WORDS = module.words(*map(plain_words, TEXTS))
TOKENIZERS = {"words": (WORDS, 8), "bytes": (Bytes(), 24)}


def _layout(name, **options):
    tokenizer, segment_length = TOKENIZERS[name]
    return Layout(tokenizer, segment_length, **options)


def _said(layout, ids) -> str:
    """Tokens as text, read back without the layout's help; padding is left out."""
    return layout.tokenizer.decode(list(ids)).replace(PAD, "").replace("\0", " ").strip()


def check_batch(layout, batch, samples) -> None:
    """What a batch of any layout has to be, read back from its tokens."""
    assert batch.keys() == {"input_ids", "labels"}
    for sample, ids, labels in zip(samples, batch["input_ids"], batch["labels"], strict=True):
        wanted = (labels != -100).nonzero()[:, 0]
        assert torch.equal(labels[wanted], ids[wanted]), "a label is its own place's token"
        prompt, answer = plain(sample)
        count = layout.count(answer)
        answered = wanted[-count:]
        assert int(answered[-1] - answered[0]) == count - 1, "an answer is in one piece"
        assert _said(layout, ids[answered]) == answer
        before = ids[: int(answered[0])].tolist()
        assert _said(layout, before).split() == prompt.split()
        assert _said(layout, ids[int(answered[-1]) + 1 :]) == ""
        if layout.loss == "all":
            assert torch.equal(labels, ids.where(ids != layout.pad, -100))
        else:
            assert len(wanted) == count
        if layout.kind == "aligned":
            _check_apart(layout, ids, before, sample)


def _check_apart(layout, ids, before, sample) -> None:
    """Facts fill segments from their first token on, and no question begins in one of these."""
    size = layout.segment_length
    assert len(ids) % size == 0
    question = " ".join(plain_words(sample.question))
    first = next(n for n in range(len(before), 0, -1) if _said(layout, before[n:]) == question)
    facts = [place for place in range(first) if before[place] != layout.pad]
    assert facts == list(range(len(facts)))
    assert facts[-1] // size < first // size


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("segments", (None, 4))
def test_a_batch_says_what_its_samples_say(name, kind, loss, segments):
    layout = _layout(name, kind=kind, loss=loss)
    batch = layout.collate(SAMPLES, segments)
    check_batch(layout, batch, SAMPLES)
    if kind == "aligned":
        # and those of the questions, which are one of 8 words, or two of 24 bytes
        asked = 1 if name == "words" else 2
        most = max(-(-layout.count(sample.context) // layout.segment_length) for sample in SAMPLES)
        assert batch["input_ids"].shape[1] == ((segments or most) + asked) * layout.segment_length


def _answer_in_the_prompt(row):
    return dataclasses.replace(row, prompt=row.prompt + row.answer, answer=row.answer)


def _label_one_early(row):
    return dataclasses.replace(
        row, prompt=row.prompt[:-1], answer=[row.prompt[-1], *row.answer[:-1]]
    )


def _no_gap(row):
    prompt = [token for token in row.prompt if token != 0]
    return dataclasses.replace(row, prompt=[0] * (len(row.prompt) - len(prompt)) + prompt)


@pytest.mark.parametrize("fault", (_answer_in_the_prompt, _label_one_early, _no_gap))
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_check_sees_a_fault(fault, name, monkeypatch):
    """Of an answer that can be read, of labels beside their places, of facts beside questions."""
    layout, real = _layout(name), Layout.row
    monkeypatch.setattr(Layout, "row", lambda *args: fault(real(*args)))
    batch = layout.collate(SAMPLES[:1], 2)
    with pytest.raises((AssertionError, StopIteration)):
        check_batch(layout, batch, SAMPLES[:1])


def test_a_row_by_hand():
    """Eight tokens a segment; a place for "the office", so that no gap tells which answer it is."""
    layout = _layout("words")
    short, long = (dataclasses.replace(SAMPLES[0], answer=a) for a in ("garden", "the office"))
    pads, question = f"{PAD} {PAD}", f"{PAD} {PAD} where is mary ?"
    assert layout.prompt(short) == f"mary went to the garden . {pads} {question}"
    assert layout.prompt(long) == layout.prompt(short)
    labels = layout.collate((short, long))["labels"]
    assert (labels[:, :14] == -100).all()
    encode = layout.tokenizer.encode
    assert labels[:, 14:].tolist() == [[*encode("garden"), -100], encode("the office")]


def test_running_text_is_what_others_ask():
    for name in TOKENIZERS:
        layout = _layout(name, kind="running")
        for sample in SAMPLES:
            assert layout.prompt(sample) == plain(sample)[0]


@pytest.mark.parametrize("flow", ("depth", "time", "chunk", "all"))
@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_padded_row_is_the_row_alone(kind, flow):
    """Its loss, and what is learnt of it."""
    layout = Layout(WORDS, 6, kind)
    model = small_model(vocab_size=WORDS.vocab_size, flow=flow)
    together = model(**layout.collate(SAMPLES)).loss
    alone = [
        layout.count(sample.answer) * model(**layout.collate([sample])).loss for sample in SAMPLES
    ]
    loss = sum(alone) / sum(layout.count(sample.answer) for sample in SAMPLES)
    assert_round_off(together, loss)
    parameters = list(model.parameters())
    got, want = (torch.autograd.grad(value, parameters) for value in (together, loss))
    for one, other in zip(got, want, strict=True):
        assert_round_off(one, other)


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="15 tokens does not fit into 1 segments of 8"):
        _layout("words").row(SAMPLES[2], 1)
    with pytest.raises(ValueError, match="'grin' is not one of the words"):
        _layout("words").row(dataclasses.replace(SAMPLES[0], answer="grin"))
    for options, message in (({"kind": "odd"}, "kind must be"), ({"loss": "odd"}, "loss must be")):
        with pytest.raises(ValueError, match=message):
            _layout("words", **options)
    with pytest.raises(ValueError, match="among them"):
        Layout(type(WORDS)(("a", "b")), 8)
