"""What a memory is asked: a context to read, a question about it, and the answer.

A :class:`Task` makes samples; where the text goes, and how an answer is judged, is not its affair.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Protocol

__all__ = ["Count", "Sample", "Task", "count_words", "plain", "plain_words"]

# how many tokens a text has
Count = Callable[[str], int]

_TOKEN = re.compile(r"[\w'-]+|[^\w\s]")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question about one context."""

    context: str  # the facts, in background text or alone
    question: str
    answer: str
    labels: tuple[str, ...] = ()  # all answers that the task knows; () where they are not few


def plain_words(text: str) -> list[str]:
    """The lower-case words and signs of a text."""
    return _TOKEN.findall(text.lower())


def count_words(text: str) -> int:
    """How many words and signs a text has."""
    return len(plain_words(text))


class Task(Protocol):
    """A source of samples: the same number is the same sample, on every platform."""

    name: str

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


def plain(sample: Sample) -> tuple[str, str]:
    """Context with question, and answer, as words between blanks: for models of few words.

    "Mary went to the garden." is "mary went to the garden ."; the question follows the context.
    """
    words = (" ".join(plain_words(text)) for text in (sample.context, sample.question))
    return " ".join(words), " ".join(plain_words(sample.answer))
