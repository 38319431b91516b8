"""bAbI's 20 tasks, from the files that were published (version 1.2, https://arxiv.org/abs/1502.05698).

A file has a line ``ID statement``, or ``ID question<TAB>answer<TAB>IDs of supporting statements``.
IDs count from 1 within a story.
"""

import dataclasses
import re
from pathlib import Path

from lm2_kernels.evaluation.samples import Story, distinct_words

__all__ = ["BABI_TASKS", "LABELS", "LISTED", "BabiFiles", "read_babi"]

_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_YES_NO = ("yes", "no")
# all answers of each task; the single ones of qa8, whose answers are lists of them
LABELS: dict[str, tuple[str, ...]] = {
    "qa1": _PLACES,
    "qa2": _PLACES,
    "qa3": _PLACES,
    "qa4": _PLACES,
    "qa5": ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"),
    "qa6": _YES_NO,
    "qa7": ("none", "one", "two", "three"),
    "qa8": ("nothing", "apple", "football", "milk"),
    "qa9": _YES_NO,
    "qa10": ("yes", "no", "maybe"),
    "qa11": _PLACES,
    "qa12": _PLACES,
    "qa13": _PLACES,
    "qa14": ("bedroom", "cinema", "kitchen", "office", "park", "school"),
    "qa15": ("cat", "mouse", "sheep", "wolf"),
    "qa16": ("gray", "green", "white", "yellow"),
    "qa17": _YES_NO,
    "qa18": _YES_NO,
    # the way of two steps, which never goes back
    "qa19": tuple(f"{a},{b}" for a in "nesw" for b in "nesw" if {a, b} not in ({*"ns"}, {*"ew"})),
    "qa20": ("bedroom", "garden", "kitchen", "bored", "hungry", "thirsty", "tired"),
}
BABI_TASKS = tuple(LABELS)
# how many labels an answer has at most, where that is a list
LISTED = {"qa8": 3}
# 10 thousand questions, or the file of one thousand where there is no other
_ENDINGS = {"train": ("train", "train_10k", "train_1k"), "test": ("test",)}


def read_babi(path: str | Path) -> list[Story]:
    """The questions of a file, each with all statements of its story before it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged; the message has the line.
    """
    found: list[Story] = []
    facts: list[str] = []
    previous = 0
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 (byte {error.start})") from None
    for number, line in enumerate(lines, 1):

        def wrong(text: str, number: int = number) -> ValueError:
            return ValueError(f"{path}, line {number}: {text}")

        if not line.strip():
            continue
        match = re.fullmatch(r"([0-9]+) +(\S.*)", line)
        if match is None:
            raise wrong(f"it must be 'ID text', got {line[:60]!r}")
        place, parts = int(match[1]), match[2].split("\t")
        if place == 1:
            facts = []
        elif place != previous + 1:
            raise wrong(f"ID {place} comes after {previous}; lines are missing")
        previous = place
        if len(parts) == 1:
            facts.append(parts[0].strip())
            continue
        question, answer = parts[0].strip(), parts[1].strip()
        if not question.endswith("?") or not answer:
            raise wrong("a question must be 'question?<TAB>answer<TAB>supporting IDs'")
        if not facts:
            raise wrong("a question before any statement")
        found.append(Story(tuple(facts), question, answer))
    if not found:
        raise ValueError(f"{path} has no question: is it a file of bAbI?")
    return found


class OfBabi:
    """What every source of a task of bAbI knows by the task's name."""

    name: str

    @property
    def labels(self) -> tuple[str, ...]:
        """All answers of the task, the single ones where they are lists."""
        return LABELS[self.name]

    @property
    def listed(self) -> int:
        """How many labels an answer has at most."""
        return LISTED.get(self.name, 1)


@dataclasses.dataclass(frozen=True)
class BabiFiles(OfBabi):
    """The questions of one task in a folder of published files, in their order.

    Args:
        folder: has ``qa1_*_test.txt`` and the like; also ``en-10k`` and ``en`` in it are looked
            into.
        name: of the task, ``qa1`` to ``qa20``.
        validation: the test file; or else the training file (of 10 thousand questions, or
            ``_train_1k`` where that is missing), without what the test file beside it asks too: the
            same question after the same facts, in any order.

    Raises:
        FileNotFoundError: the folder has no such file.
        ValueError: there is no such task, or a file is damaged, or has nothing that the test file
            does not ask.
    """

    folder: str | Path
    name: str
    validation: bool = True
    stories: tuple[Story, ...] = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        if self.name not in LABELS:
            raise ValueError(f"bAbI has the tasks qa1 to qa20, not {self.name!r}")
        path = self._path("test" if self.validation else "train")
        stories = tuple(read_babi(path))
        if not self.validation:
            stories = self._untested(stories)
            if not stories:
                raise ValueError(f"{path} has no question that the test file does not ask")
        object.__setattr__(self, "stories", stories)

    def _untested(self, stories: tuple[Story, ...]) -> tuple[Story, ...]:
        try:
            tested = {story.told for story in read_babi(self._path("test"))}
        except FileNotFoundError:
            return stories
        return tuple(story for story in stories if story.told not in tested)

    def _path(self, kind: str) -> Path:
        endings = _ENDINGS[kind]
        for folder in (Path(self.folder), Path(self.folder, "en-10k"), Path(self.folder, "en")):
            for ending in endings:
                for path in sorted(folder.glob(f"{self.name}_*_{ending}.txt")):
                    return path
        raise FileNotFoundError(
            f"{self.folder} has no file {self.name}_*_{endings[0]}.txt; bAbI's are in the folder "
            f"en-10k of tasks_1-20_v1-2"
        )

    @property
    def size(self) -> int:
        """How many questions there are."""
        return len(self.stories)

    def story(self, number: int) -> Story:
        """Question ``number`` of the file, with all statements before it."""
        return self.stories[number]

    def words(self) -> tuple[str, ...]:
        """Every word of the file's plain form."""
        return distinct_words(
            *(text for s in self.stories for text in (*s.facts, s.question, s.answer))
        )
