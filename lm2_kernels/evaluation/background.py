"""Text that says nothing about a question: what facts are hidden in."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from lm2_kernels.evaluation.samples import Count, Dice, distinct_words

__all__ = ["Background", "FileText", "NeutralText", "sentences"]

# tokens of the shortest sentence that is taken from a file
_SHORTEST = 10

_SLOTS = {
    "season": ("spring", "summer", "autumn", "winter"),
    "weather": ("rain", "wind", "fog", "snow", "mist", "frost", "thunder", "sunlight"),
    "land": ("hills", "valley", "river", "meadow", "coast", "forest", "lake", "shore"),
    "kind": ("soft", "heavy", "distant", "quiet", "pale", "gentle", "dull", "strange"),
}
_SENTENCES = (
    "Over the {land} the {kind} {weather} often lasts until noon in {season}.",
    "That {season} the {weather} above the {land} seemed {kind}, as it always does.",
    "People say that {kind} {weather} near the {land} means a long {season}.",
    "Every {season} the {weather} grows {kind}, and the {land} looks new again.",
    "Such {kind} {weather}, which hides the {land} from view, comes early in {season}.",
    "By midnight the {kind} {weather} had almost gone from the {land} once more.",
)


class Background(Protocol):
    """Where sentences come from."""

    def sentences(self, dice: Dice, count: Count) -> Iterator[str]:
        """Sentences without end, in order from a random place."""

    def words(self) -> tuple[str, ...]:
        """Every word of their plain form, each once."""


class NeutralText:
    """Generated sentences about the weather, of ten words and more.

    No word in them is a person, a place or a thing of any task.
    """

    def sentences(self, dice: Dice, count: Count) -> Iterator[str]:
        """Sentences without end."""
        while True:
            chosen = {name: dice.pick(words) for name, words in _SLOTS.items()}
            yield dice.pick(_SENTENCES).format(**chosen)

    def words(self) -> tuple[str, ...]:
        """Every word of their plain form."""
        slots = (word for words in _SLOTS.values() for word in words)
        return distinct_words(*(re.sub(r"{\w+}", "", text) for text in _SENTENCES), *slots)


class FileText:
    """The sentences of a text file in UTF-8, in order, from a random one on, and round again.

    Those of fewer than ten tokens are left out.

    Args:
        path: of the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no text in UTF-8, or has no sentence.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            text = self.path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text in UTF-8 (byte {error.start})") from None
        self.all = sentences(text)
        if not self.all:
            raise ValueError(f"{path} has no sentence")

    def sentences(self, dice: Dice, count: Count) -> Iterator[str]:
        """Sentences without end.

        Raises:
            ValueError: all are shorter than ten tokens.
        """
        place, short = dice.below(len(self.all)), 0
        while short < len(self.all):
            sentence = self.all[place]
            place = (place + 1) % len(self.all)
            if count(sentence) >= _SHORTEST:
                short = 0
                yield sentence
            else:
                short += 1
        raise ValueError(f"{self.path} has no sentence of {_SHORTEST} tokens")

    def words(self) -> tuple[str, ...]:
        """Every word of the file's plain form."""
        return distinct_words(*self.all)


# after a stop with its quotes, where a new sentence may begin; not after an initial, or the like
_END = re.compile(r"(?<=[.!?])[\"'\u2019\u201d)\]]*\s+(?=[\"'\u2018\u201c(\[]*[A-Z0-9])")
_NO_END = re.compile(r"\b(?:[A-Z]|Mr|Mrs|Ms|Dr|St|Prof|Capt|Col|Gen|Rev|Hon|No|vol|viz|cf)\.$")


def sentences(text: str) -> list[str]:
    """The sentences of plain prose; an empty line ends one, too.

    A sentence ends with ``.``, ``!`` or ``?`` before white space and a capital or a digit, but not
    after an initial or a title such as "Mr.".
    """
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        rest = " ".join(paragraph.split())
        begin = 0
        for match in _END.finditer(rest):
            end = match.start() + len(match[0].rstrip())
            if not _NO_END.search(rest[begin:end]):
                found.append(rest[begin:end])
                begin = match.end()
        if rest[begin:]:
            found.append(rest[begin:])
    return found
