"""The generated questions: right answers, the same everywhere, facts and questions apart."""

import itertools

import pytest
import torch

from lm2_kernels.evaluation.stories import PAD, Example, QATask, Question

SMALL = QATask(segment_length=24, fact_segments=2, sentences=5, people=3, places=5, objects=2)


def _examples(task, count, seed=0, **options):
    return list(itertools.islice(task.examples(seed, **options), count))


def _answer(text, thing):
    """Where a person is, or who has a thing and where: the text alone, read backwards."""
    words = text.split()
    for end in range(len(words), 0, -3):
        subject, verb, last = words[end - 3 : end]
        if verb == "entered" and subject == thing:
            return (last,)
        if verb == "with" and subject == thing:
            return (last, *_answer(text, last))
    raise AssertionError(f"nothing about {thing} in {text}")


@pytest.mark.parametrize("hops", (None, 1, 2))
def test_answers_are_right(hops):
    for example in _examples(SMALL, 200, questions=2, hops=hops):
        text = " ".join(word for sentence in example.sentences for word in sentence)
        for question in example.questions:
            assert _answer(text, question.subject) == question.answer
            assert question.hops == len(question.answer)
            assert hops in (None, question.hops)


def test_both_hops_and_no_question_twice():
    examples = _examples(SMALL, 300, questions=5)
    assert all(len(set(example.questions)) == 5 for example in examples)
    ones = sum(example.questions[0].hops == 1 for example in examples)
    assert 100 < ones < 200


def test_same_seed_same_examples():
    # these words on every platform and Python
    first = _examples(QATask(), 1, seed=0)[0]
    assert " ".join(itertools.chain.from_iterable(first.sentences)) == (
        "mary entered cellar ball with john apple with sandra apple with sandra "
        "sandra entered garden john entered office"
    )
    assert _examples(SMALL, 20, seed=3) == _examples(SMALL, 20, seed=3)
    assert _examples(SMALL, 20, seed=3) != _examples(SMALL, 20, seed=4)


def test_validation_shares_no_story():
    # so few stories that streams of one set meet
    task = QATask(segment_length=9, sentences=3, people=2, places=4, objects=1)
    stories = [
        {example.sentences for example in _examples(task, 300, seed, validation=validation)}
        for seed in (0, 1)
        for validation in (False, True)
    ]
    assert not (stories[0] | stories[2]) & (stories[1] | stories[3])
    assert stories[0] & stories[2]
    assert stories[1] & stories[3]


def test_facts_and_questions_lie_in_different_segments():
    examples = _examples(SMALL, 50, questions=2)
    batch = SMALL.collate(examples)
    assert batch["input_ids"].shape == batch["labels"].shape == (50, SMALL.length) == (50, 72)
    *facts, asked = batch["input_ids"].split(SMALL.segment_length, dim=1)
    decode = SMALL.vocabulary.decode
    for row, example in enumerate(examples):
        told = " ".join(decode(segment[row].tolist()) for segment in facts)
        assert [word for word in told.split() if word != PAD] == list(
            itertools.chain.from_iterable(example.sentences)
        )
        words = decode(asked[row].tolist()).split()
        wanted = ["where"]
        for question in example.questions:
            wanted += [question.subject, *question.answer[:-1]]
        assert words[-len(wanted) - 1 :] == [*wanted, PAD]
        assert set(words[: -len(wanted) - 1]) == {PAD}


def test_labels_are_the_answers():
    mary = Question("mary", ("cellar",))
    example = Example(
        (("mary", "entered", "cellar"), ("ball", "with", "mary")),
        (mary, Question("ball", ("mary", "cellar")), mary),
    )
    batch = QATask(segment_length=8, sentences=2, people=1, objects=1).collate([example])
    decode = QATask().vocabulary.decode
    asked = decode(batch["input_ids"][0, 8:].tolist()).split()
    assert asked == f"{PAD} {PAD} where mary ball mary mary {PAD}".split()
    labels = batch["labels"][0]
    assert [(place, decode([labels[place]])) for place in (labels != -100).nonzero()[:, 0]] == [
        (8 + 4, "cellar"),
        (8 + 5, "mary"),
        (8 + 6, "cellar"),
        (8 + 7, "cellar"),
    ]


@pytest.mark.parametrize("hops", (None, 1, 2))
def test_questions_hold_no_place(hops):
    batch = SMALL.collate(_examples(SMALL, 100, questions=2, hops=hops))
    decode = SMALL.vocabulary.decode
    asked = decode(batch["input_ids"][:, -SMALL.segment_length :].flatten().tolist()).split()
    places = set(decode(batch["labels"][:, -1].tolist()).split())
    assert len(places) == SMALL.places
    assert not places & set(asked)


def test_batches_go_on():
    batches = list(itertools.islice(SMALL.batches(4, 0), 3))
    together = SMALL.collate(_examples(SMALL, 12))
    assert torch.equal(torch.cat([b["input_ids"] for b in batches]), together["input_ids"])
    assert torch.equal(torch.cat([b["labels"] for b in batches]), together["labels"])


def test_vocabulary_round_trip():
    vocabulary = QATask().vocabulary
    numbers = list(range(vocabulary.vocab_size))
    assert vocabulary.encode(vocabulary.decode(numbers)) == numbers
    assert vocabulary.encode(PAD) == [0]


def test_answers_are_balanced():
    # else a model without memory could do well
    examples = _examples(QATask(), 2000)
    answers = [example.questions[0].answer[-1] for example in examples]
    assert max(answers.count(answer) for answer in set(answers)) < 2000 * 0.2
    last = [
        next(s[2] for s in reversed(example.sentences) if s[1] == "entered") for example in examples
    ]
    assert sum(a == b for a, b in zip(answers, last, strict=True)) < 2000 * 0.4


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"segment_length": 3}, "segment_length must be at least 4"),
        ({"segment_length": 13, "sentences": 5}, "sentences must be between 1 and 4"),
        ({"people": 9}, "people must be between 1 and 8"),
        ({"people": 3, "places": 3}, "more places than people"),
        ({"sentences": 4}, "need 5 sentences, there are 4"),
        ({"noise": 1.5}, "noise must be from 0 to 1"),
    ],
)
def test_options_that_do_not_fit(options, text):
    with pytest.raises(ValueError, match=text):
        QATask(**options)


def test_more_questions_than_there_are():
    with pytest.raises(ValueError, match="questions must be between 1 and 2, got 3"):
        next(QATask().examples(0, questions=3, hops=2))
