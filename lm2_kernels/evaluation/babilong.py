"""Facts in long background text, after BABILong (https://arxiv.org/abs/2406.10149).

The facts stay in their order, at random places between the sentences of the background, which stay
in theirs; the whole is cut to a length. Any source of stories can be put into any background.
"""

import dataclasses
import importlib
from collections.abc import Sequence

from lm2_kernels.evaluation.babi import LABELS, LISTED
from lm2_kernels.evaluation.babi_worlds import BabiWorld
from lm2_kernels.evaluation.background import Background, NeutralText
from lm2_kernels.evaluation.samples import Count, Dice, Sample, Source, Story, count_words

__all__ = ["DATASET", "BabilongDataset", "InBackground"]

DATASET = "RMT-team/babilong"
# between the numbers of the stories that stand in for one which is too long, and how many are tried
_STRIDE, _TRIES = 2**32, 1000
_SPLITS = {
    **{f"{thousands}k": thousands for thousands in (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)},
    "1M": 1000,
    "10M": 10000,
}


@dataclasses.dataclass(frozen=True)
class InBackground:
    """A task: a source's stories in background text.

    Stories whose facts alone are longer than what is asked for are left out: sample ``number`` is
    then the ``number``-th that is left, or of a generator another story. A source that ends goes
    round.

    Args:
        source: of facts and questions.
        background: of the sentences between.
        seed: of where the facts are put, and where the background begins.
        tokens_per_fact: what BABILong reckons for a fact, 8: a story of more than
            ``length // tokens_per_fact`` facts is left out, however short they are. 0 has no such
            rule. (BABILong's lengths are those of whole prompts, of which 300 tokens are not the
            context's.)
    """

    source: Source
    background: Background = dataclasses.field(default_factory=NeutralText)
    seed: int = 0
    tokens_per_fact: int = 0
    # of a source that ends, the numbers of those that fit
    _fitting: dict = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The source's."""
        return self.source.name

    def available(self, length: int = 0, count: Count = count_words) -> int | None:
        """How many different samples of a length there are; None: as many as are asked for."""
        return None if self.source.size is None else len(self._numbers(length, count))

    def words(self) -> tuple[str, ...]:
        """Every word of its samples' plain form."""
        return tuple(sorted({*self.source.words(), *self.background.words()}))

    def sample(self, number: int, length: int = 0, count: Count = count_words) -> Sample:
        """Sample ``number``, see :class:`~lm2_kernels.evaluation.samples.Task`.

        The last sentence of the background is cut off so that the context has ``length`` tokens, or
        as few less as whole words allow.
        """
        story = self._story(number, length, count)
        # answers of most sources are no lists
        alone = story.sample(self.source.labels, getattr(self.source, "listed", 1))
        if not length:
            return alone
        dice = Dice(f"{self.name} background {self.seed} {number}")
        filling = self._filling(story.facts, length, dice, count)
        places = sorted(dice.below(len(filling) + 1) for _ in story.facts)
        context = _join(story.facts, places, filling)
        # tokens of joined sentences may be more than those of each
        while filling and count(context) > length:
            filling = _shorter(filling)
            context = _join(story.facts, places, filling)
        return dataclasses.replace(alone, context=context)

    def _filling(self, facts: Sequence[str], length: int, dice: Dice, count: Count) -> list[str]:
        last = facts[-1]
        before = count(last)

        def behind(text: str) -> int:
            # some tokenizers begin every text with a token, which sentences within one have not
            return count(f"{last} {text}") - before

        found, room = [], length - count(" ".join(facts))
        for sentence in self.background.sentences(dice, count):
            needed = behind(sentence)
            if needed > room:
                found += _cut(sentence, room, behind)
                return found
            found.append(sentence)
            room -= needed
        return found

    def _fits(self, story: Story, length: int, count: Count) -> bool:
        if not length:
            return True
        if len(story.facts) * self.tokens_per_fact > length:
            return False
        return count(" ".join(story.facts)) <= length

    def _story(self, number: int, length: int, count: Count) -> Story:
        if self.source.size is not None:
            numbers = self._numbers(length, count)
            if not numbers:
                raise ValueError(f"{self.name}: no story fits into {length} tokens")
            return self.source.story(numbers[number % len(numbers)])
        source = self.source
        if length and self.tokens_per_fact and isinstance(source, BabiWorld):
            # no need to tell to the end what will be left out
            source = dataclasses.replace(source, most=length // self.tokens_per_fact)
        for attempt in range(_TRIES):
            story = source.story(number + attempt * _STRIDE)
            if self._fits(story, length, count):
                return story
        raise ValueError(
            f"{self.name}: of {_TRIES} stories none fits into {length} tokens; the last has "
            f"{count(' '.join(story.facts))}"
        )

    def _numbers(self, length: int, count: Count) -> Sequence[int]:
        numbers = range(self.source.size or 0)
        if not length:
            return numbers
        if (length, count) not in self._fitting:
            self._fitting[length, count] = [
                number for number in numbers if self._fits(self.source.story(number), length, count)
            ]
        return self._fitting[length, count]


def _cut(sentence: str, room: int, count: Count) -> list[str]:
    """As many of a sentence's first words as there is room for."""
    words = sentence.split()
    low, high = 0, len(words) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if count(" ".join(words[:middle])) <= room:
            low = middle
        else:
            high = middle - 1
    return [" ".join(words[:low])] if low else []


def _shorter(filling: list[str]) -> list[str]:
    """Without the last word."""
    *before, last = filling
    left = last.rpartition(" ")[0]
    return [*before, left] if left else before


def _join(facts: Sequence[str], places: Sequence[int], filling: Sequence[str]) -> str:
    """Facts before the sentences of these numbers, in order; those beyond the last at the end."""
    parts, told = [], 0
    for number, sentence in enumerate(filling):
        while told < len(facts) and places[told] <= number:
            parts.append(facts[told])
            told += 1
        parts.append(sentence)
    return " ".join((*parts, *facts[told:]))


@dataclasses.dataclass(frozen=True)
class BabilongDataset:
    """A task of BABILong as published, by ``datasets`` where that is installed.

    Args:
        name: of the task, ``qa1`` to ``qa20``; not all lengths have all of them.
        repository: on the Hugging Face Hub.

    Raises:
        ValueError: there is no such task.
    """

    name: str
    repository: str = DATASET
    _rows: dict = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        if self.name not in LABELS:
            raise ValueError(f"{self.repository} has tasks qa1 to qa20, not {self.name!r}")

    def available(self, length: int = 0, count: Count = count_words) -> int:
        """How many samples of a length there are."""
        return len(self._split(length))

    def sample(self, number: int, length: int = 0, count: Count = count_words) -> Sample:
        """Sample ``number`` of a published length, in the words of its authors; it goes round.

        Args:
            number: from 0 on.
            length: 0, 1000, 2000, 4000 and so on, or so many times 1024: the split's name, in the
                tokens that its authors counted. What they are for ``count`` is not asked.
            count: is not used.

        Raises:
            ImportError: datasets is not installed.
            ValueError: there is no such split, or it has not got the task.
        """
        rows = self._split(length)
        row = rows[number % len(rows)]
        labels, listed = LABELS[self.name], LISTED.get(self.name, 1)
        return Sample(row["input"], row["question"], row["target"], labels, listed)

    def _split(self, length: int):
        names = [name for name, k in _SPLITS.items() if length in (1000 * k, 1024 * k)]
        if not names:
            raise ValueError(
                f"{self.repository} has the lengths {', '.join(_SPLITS)}, not {length} tokens"
            )
        if names[0] not in self._rows:
            try:
                datasets = importlib.import_module("datasets")
            except ImportError:
                raise ImportError(
                    f"{self.repository} is read by datasets, which is not installed: "
                    f"pip install datasets, or give a folder of bAbI's files"
                ) from None
            split = datasets.load_dataset(self.repository, names[0])
            if self.name not in split:
                raise ValueError(f"{self.repository} has no {self.name} of {names[0]}")
            self._rows[names[0]] = split[self.name]
        return self._rows[names[0]]
