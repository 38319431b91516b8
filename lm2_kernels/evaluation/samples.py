"""What a memory is asked: a context to read, a question about it, and the answer.

A :class:`Task` makes samples; where the text goes, and how an answer is judged, is not its affair.
A :class:`Source` tells stories: facts and a question, which a task puts into background text.
"""

import dataclasses
import random
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

__all__ = [
    "LIST_END",
    "Count",
    "Dice",
    "Sample",
    "Source",
    "Story",
    "Task",
    "count_words",
    "distinct_words",
    "draw_story",
    "is_for_validation",
    "longest_answer",
    "plain",
    "plain_words",
    "spoken",
]

_T = TypeVar("_T")

# how many tokens a text has
Count = Callable[[str], int]

_TOKEN = re.compile(r"[\w'-]+|[^\w\s]")
# what ends a list that is said in plain words
LIST_END = "."
# one story in so many is for validation
_VALIDATION_SHARE = 8
# stories that are begun to find one of the right split, and of few facts where that is asked for
_ATTEMPTS = 20000


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question about one context."""

    context: str  # the facts, in background text or alone
    question: str
    answer: str
    labels: tuple[str, ...] = ()  # all answers that the task knows; () where they are not few
    listed: int = 1  # how many of the labels an answer has at most; above 1 answers are lists


@dataclasses.dataclass(frozen=True)
class Story:
    """Facts in their order, and one question about them."""

    facts: tuple[str, ...]  # sentences
    question: str
    answer: str

    def sample(self, labels: tuple[str, ...], listed: int = 1) -> Sample:
        """The facts alone, as a sample."""
        return Sample(" ".join(self.facts), self.question, self.answer, labels, listed)

    @property
    def told(self) -> str:
        """Facts, in any order, and question: by which training and validation are kept apart.

        A story that was trained on is not asked after in another order either.
        """
        return " ".join((*sorted(self.facts), self.question))

    @property
    def is_validation(self) -> bool:
        """Whether it is for validation: a checksum of what is :attr:`told` says so."""
        return is_for_validation(self.told)


def is_for_validation(text: str) -> bool:
    """Whether a checksum says so of a text: of one in eight."""
    return zlib.crc32(text.encode()) % _VALIDATION_SHARE == 0


def plain_words(text: str) -> list[str]:
    """The lower-case words and signs of a text."""
    return _TOKEN.findall(text.lower())


def count_words(text: str) -> int:
    """How many words and signs a text has."""
    return len(plain_words(text))


class Task(Protocol):
    """A source of samples: the same number is the same sample, on every platform."""

    @property
    def name(self) -> str:
        """What it is called: ``qa1`` and so on."""

    def sample(self, number: int, length: int = 0, count: Count = count_words) -> Sample:
        """Sample ``number``.

        Args:
            number: from 0 on.
            length: tokens that the context is to have: background fills it up to at most so many;
                0 is the facts alone.
            count: tokens of a text, by the tokenizer of the model that reads it.

        Raises:
            ValueError: the facts alone are longer than ``length``, unless that is 0.
        """


class Source(Protocol):
    """Where stories come from: the same number is the same story, on every platform."""

    @property
    def name(self) -> str:
        """What the task is called."""

    @property
    def labels(self) -> tuple[str, ...]:
        """All answers, the single ones where they are lists; () where they are not few."""

    @property
    def size(self) -> int | None:
        """How many stories there are; None: as many as are asked for."""

    def story(self, number: int) -> Story:
        """Story ``number``, from 0 on and below ``size``."""

    def words(self) -> tuple[str, ...]:
        """Every word that the plain form of its stories may have, in order, each once."""


class Dice:
    """Choices that are the same for ever: of the module random only ``random()`` is.

    Args:
        seed: of everything drawn.
    """

    def __init__(self, seed: str):
        self._random = random.Random(f"lm2_kernels {seed}").random

    def below(self, count: int) -> int:
        """A number from 0 to ``count - 1``."""
        return int(self._random() * count)

    def pick(self, things: Sequence[_T]) -> _T:
        """One of several."""
        return things[self.below(len(things))]

    def several(self, things: Sequence[_T], count: int) -> list[_T]:
        """So many different ones, in random order."""
        left = list(things)
        return [left.pop(self.below(len(left))) for _ in range(count)]

    def chance(self, share: float) -> bool:
        """True in so many of all cases."""
        return self._random() < share


def draw_story(seed: str, validation: bool, tell: Callable[[Dice], Story | None]) -> Story:
    """The first story of a seed that is for validation, or is not.

    Raises:
        ValueError: ``tell`` gives up too often.
    """
    for attempt in range(_ATTEMPTS):
        story = tell(Dice(f"{seed} {attempt}"))
        if story is not None and story.is_validation == validation:
            return story
    raise ValueError(
        f"{seed.split(maxsplit=1)[0]}: of {_ATTEMPTS} stories none is as short as asked for"
    )


def distinct_words(*texts: str) -> tuple[str, ...]:
    """The plain words of texts, in order, each once."""
    return tuple(sorted({word for text in texts for word in plain_words(text)}))


def plain(sample: Sample) -> tuple[str, str]:
    """Context with question, and answer, as words between blanks: for models of few words.

    "Mary went to the garden." is "mary went to the garden ."; the question follows the context.
    """
    words = (" ".join(plain_words(text)) for text in (sample.context, sample.question))
    return " ".join(words), " ".join(plain_words(sample.answer))


def spoken(sample: Sample) -> str:
    """The answer as a model learns to say it in plain words: a list ends with :data:`LIST_END`.

    Any other answer ends with its last word.
    """
    return sample.answer + LIST_END if sample.listed > 1 else sample.answer


def longest_answer(sample: Sample, count: Count) -> int:
    """Tokens of the longest answer of a sample's task, :func:`spoken`; as far as labels tell."""
    longest = sorted(sample.labels, key=count)[-sample.listed :]
    other = dataclasses.replace(sample, answer=",".join(longest))
    return max(count(spoken(sample)), count(spoken(other)) if longest else 0)
