"""Facts in background text: their order and places, lengths by any tokenizer, what is left out."""

import dataclasses
import re
import sys
import types
from collections import Counter

import pytest

from lm2_kernels.evaluation.babi import BABI_TASKS, LABELS, BabiFiles
from lm2_kernels.evaluation.babi_worlds import GENERATED, BabiWorld
from lm2_kernels.evaluation.babilong import BabilongDataset, InBackground
from lm2_kernels.evaluation.background import FileText, NeutralText, sentences
from lm2_kernels.evaluation.retrieval import Needles
from lm2_kernels.evaluation.samples import Dice, count_words, plain_words
from tools.published import babi_folder, babi_reason


def _bytes(text):
    return len(text.encode())


def _joining(text):
    """A tokenizer to which sentences together are longer than each alone."""
    return count_words(text) + 3 * text.count(". ")


PROSE = """One ship of the old fleet lay at anchor that year, they say.
It had 12 guns.
Two ships of the old fleet came home in the winter, though late.

Three ships of the old fleet were built of oak in the south "there." Four
ships of the old fleet carried nothing but salt and bread for Mr. Smith.
"""
LONG = [
    "One ship of the old fleet lay at anchor that year, they say.",
    "Two ships of the old fleet came home in the winter, though late.",
    'Three ships of the old fleet were built of oak in the south "there."',
    "Four ships of the old fleet carried nothing but salt and bread for Mr. Smith.",
]


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text(PROSE, encoding="utf-8")
    return path


def _split(context, facts):
    """Where the facts begin in a context, and what is left without them."""
    places, rest, begin = [], "", 0
    for fact in facts:
        place = context.index(fact, begin)
        places.append(place)
        rest += context[begin:place]
        begin = place + len(fact)
    return places, re.sub(r"\s+", " ", rest + context[begin:]).strip()


def _beginning(text):
    """A tokenizer that begins every text with a token of its own."""
    return count_words(text) + 1


@pytest.mark.parametrize("count", (count_words, _bytes, _joining, _beginning))
@pytest.mark.parametrize("task", ("qa2", "qa10"))
def test_facts_in_order_and_length(count, task):
    source = BabiWorld(task)
    for number in range(10):
        alone = InBackground(source).sample(number)
        story = source.story(number)
        assert alone.context == " ".join(story.facts)
        assert (alone.question, alone.answer, alone.labels) == (
            story.question,
            story.answer,
            LABELS[task],
        )
        length = count(alone.context) + 211
        sample = InBackground(source).sample(number, length, count)
        assert (sample.question, sample.answer) == (alone.question, alone.answer)
        _, rest = _split(sample.context, story.facts)
        # a word and its sign at most are missing
        word = 20 if count in (_bytes, _joining) else 3
        assert length - word < count(sample.context) <= length
        assert set(plain_words(rest)) <= set(NeutralText().words())


def test_the_background_stays_in_order(prose):
    task = InBackground(Needles(4), FileText(prose), seed=3)
    first = set()
    for number in range(30):
        facts = Needles(4).story(number).facts
        _, rest = _split(task.sample(number, 150).context, facts)
        begin = next(n for n, sentence in enumerate(LONG) if rest.startswith(sentence))
        first.add(begin)
        # round and round, and the last one is cut off
        assert " ".join((LONG[begin:] + LONG[:begin]) * 4).startswith(rest)
    assert first == {0, 1, 2, 3}


def test_places_are_even():
    """One fact among ten sentences: eleven places, the ends among them."""
    source = Needles()
    places = Counter()
    for number in range(440):
        context, (fact,) = (
            InBackground(source).sample(number, 150).context,
            source.story(number).facts,
        )
        before = len(sentences(context.partition(fact)[0]))
        places["last" if context.endswith(fact) else before] += 1
    assert set(places) >= {"last", *range(10)}
    assert min(places[place] for place in ("last", *range(9))) > 20
    assert max(places.values()) < 70


def test_places_are_sorted():
    """Of four facts the first comes after a fifth of the background, the last before a fifth."""
    source, shares = Needles(4), []
    for number in range(100):
        context = InBackground(source).sample(number, 400).context
        places, _ = _split(context, source.story(number).facts)
        shares.append((places[0] / len(context), places[-1] / len(context)))
    first, last = (sum(share) / len(shares) for share in zip(*shares, strict=True))
    assert 0.1 < first < 0.3
    assert 0.7 < last < 0.9


def test_no_room_for_background():
    source = BabiWorld("qa4")
    facts = InBackground(source).sample(0).context
    assert InBackground(source).sample(0, count_words(facts)).context == facts


def test_what_is_too_long_is_left_out():
    task = InBackground(BabiWorld("qa3"))
    assert count_words(task.sample(0).context) > 64
    assert count_words(task.sample(0, 64).context) == 64
    assert task.sample(0, 64) == task.sample(0, 64) != task.sample(1, 64)
    assert task.available() is None
    with pytest.raises(ValueError, match="qa1: of 1000 stories none fits into 5 tokens"):
        InBackground(BabiWorld("qa1")).sample(0, 5)
    with pytest.raises(ValueError, match="qa1: of 20000 stories none is as short as asked for"):
        InBackground(BabiWorld("qa1"), tokens_per_fact=8).sample(0, 15)


@pytest.mark.parametrize("validation", (False, True))
def test_stories_of_few_facts(validation):
    """The same as without telling only these, where those fit."""
    world = BabiWorld("qa2", 1, validation)
    short = InBackground(world, tokens_per_fact=8)
    fitting = 0
    for number in range(30):
        sample, story = short.sample(number, 80), world.story(number)
        assert len(dataclasses.replace(world, most=10).story(number).facts) <= 10
        if len(story.facts) <= 10:
            places, _ = _split(sample.context, story.facts)
            assert len(places) == len(story.facts)
            fitting += 1
    assert 3 < fitting < 27


def test_what_is_too_long_in_files(tmp_path):
    lines = []
    for statements in (2, 8, 3):
        lines += [f"{number + 1} Mary went off." for number in range(statements)]
        lines.append(f"{statements + 1} Where is Mary?\tgarden\t1")
    (tmp_path / "qa1_x_test.txt").write_text("\n".join(lines), encoding="utf-8")
    files = BabiFiles(tmp_path, "qa1")
    facts = {2: 8, 8: 32, 3: 12}
    by_tokens, by_facts = InBackground(files), InBackground(files, tokens_per_fact=8)
    assert (by_tokens.available(), by_tokens.available(32), by_tokens.available(31)) == (3, 3, 2)
    # 8 statements, at 8 tokens each
    assert (by_facts.available(64), by_facts.available(63), by_facts.available(23)) == (3, 2, 1)
    for number, statements in enumerate((2, 3, 2)):
        context = by_facts.sample(number, 60).context
        assert context.count("Mary went off.") == statements
        assert count_words(context) > facts[statements]
    with pytest.raises(ValueError, match="qa1: no story fits into 15 tokens"):
        by_facts.sample(0, 15)


def test_every_word_is_known():
    task = InBackground(BabiWorld("qa7"))
    seen = {word for n in range(40) for word in plain_words(task.sample(n, 300).context)}
    assert seen <= set(task.words())
    assert len(set(NeutralText().words()) - seen) == 0


# words that sentences are made with, and that say nothing
_COMMON = {
    "a", "above", "always", "and", "as", "by", "comes", "does", "from", "had", "has", "in",
    "is", "it", "long", "looks", "means", "more", "near", "no", "of", "on", "once", "over",
    "people", "say", "seemed", "such", "that", "the", "until", "view", "which", "with", ".",
    ",",
}  # fmt: skip
_BABI = {
    "mary", "john", "sandra", "daniel", "bill", "fred", "jeff", "julie", "bathroom", "bedroom",
    "garden", "hallway", "kitchen", "office", "school", "park", "cinema", "apple", "football",
    "milk", "north", "south", "east", "west",
}  # fmt: skip


def test_the_background_is_neutral():
    words = set(NeutralText().words())
    assert not words & _BABI
    assert not words & {label for labels in LABELS.values() for label in labels}
    for task in GENERATED:
        assert words & set(BabiWorld(task).words()) <= _COMMON
    dice = Dice("test")
    told = NeutralText().sentences(dice, count_words)
    assert min(count_words(next(told)) for _ in range(500)) > 10


@pytest.mark.skipif(babi_reason() is not None, reason=str(babi_reason()))
@pytest.mark.parametrize("task", BABI_TASKS)
def test_the_background_is_neutral_to_published_files(task):
    words = set(NeutralText().words()) & set(BabiFiles(babi_folder(), task).words())
    assert words <= _COMMON


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("Mr. Brown saw J. R. Hill. He ran.", ["Mr. Brown saw J. R. Hill.", "He ran."]),
        ("It cost 3.50 at 5 p.m. or so. 20 came.", ["It cost 3.50 at 5 p.m. or so.", "20 came."]),
        ('"Go!" she said. "Why?" "Because."', ['"Go!" she said.', '"Why?"', '"Because."']),
        ("\u201cGo.\u201d \u2018No.\u2019", ["\u201cGo.\u201d", "\u2018No.\u2019"]),
        (
            "A line\nthat goes on.\n\nA title\n\n  Text.",
            ["A line that goes on.", "A title", "Text."],
        ),
        (" \n\n \n", []),
    ],
)
def test_sentences(text, found):
    assert sentences(text) == found


def test_files_that_do_not_fit(tmp_path, prose):
    assert FileText(prose).all == [LONG[0], "It had 12 guns.", *LONG[1:]]
    path = tmp_path / "other.txt"
    path.write_text("Too short. Or so.", encoding="utf-8")
    with pytest.raises(ValueError, match="has no sentence of 10 tokens"):
        InBackground(Needles(), FileText(path)).sample(0, 60)
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no sentence"):
        FileText(path)
    path.write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=re.escape("no text in UTF-8 (byte 2)")):
        FileText(path)
    with pytest.raises(FileNotFoundError):
        FileText(tmp_path / "none.txt")


def test_datasets(monkeypatch):
    asked = []

    def load_dataset(repository, name):
        asked.append((repository, name))
        row = {"input": f"{name} text", "question": "Where is Mary? ", "target": "garden"}
        return {"qa1": [row, row | {"target": "office"}]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    task = BabilongDataset("qa1")
    assert task.name == "qa1"
    assert [task.sample(number, 4000).answer for number in range(3)] == [
        "garden",
        "office",
        "garden",
    ]
    assert task.sample(0, 4096).context == "4k text"
    assert task.sample(0).context == "0k text"
    assert task.sample(0, 10**6).context == "1M text"
    assert task.sample(0).labels == LABELS["qa1"]
    assert task.available(4000) == 2
    assert asked == [("RMT-team/babilong", name) for name in ("4k", "0k", "1M")]
    with pytest.raises(ValueError, match=r"has the lengths 0k, 1k, .* not 3000 tokens"):
        task.sample(0, 3000)
    with pytest.raises(ValueError, match="has no qa2 of 0k"):
        BabilongDataset("qa2").sample(0)
    with pytest.raises(ValueError, match="not 'niah'"):
        BabilongDataset("niah")


def test_datasets_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        BabilongDataset("qa1").sample(0)
