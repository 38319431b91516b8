"""Questions about generated stories, after bAbI: what a model is told in earlier segments, and has
to remember in the last one.

A story is sentences such as "mary entered garden" and "ball with john", among others that say
nothing of use. "where mary" takes one hop and is answered "garden". "where ball" takes two and is
answered "john garden": who has it now, and the place that this person entered last. Later sentences
override earlier ones. Several questions are asked in one: "where mary ball john apple sandra" has
the first words of two answers, and the last word of none.

An example has whole segments: some of facts, padded at the end, then one of questions, padded at
the front. So the questions, which may read no slots later than their own positions, may read all
that was written where facts were. A model whose self-attention ends at the segment never sees a
fact together with a question; only memory carries one to the other.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lm2_kernels.checks import check_int
from lm2_kernels.evaluation.samples import is_for_validation
from lm2_kernels.training.data import Words

__all__ = ["PAD", "Example", "QATask", "Question"]

PAD = "<pad>"
_PEOPLE = ("mary", "john", "sandra", "daniel", "emma", "victor", "lucy", "oscar")
_PLACES = ("kitchen", "garden", "hallway", "office", "bedroom", "cellar", "library", "attic")
_OBJECTS = ("ball", "apple", "lamp", "book", "key", "cup", "hat", "rope")
_NOISE = tuple(
    (thing, "is", how)
    for thing, how in itertools.product(("sky", "tea", "wind"), ("cold", "calm", "dark"))
)
_WORDS = (PAD, "where", "is", "entered", "with")
# words of a sentence, and of a question of two hops with its answer
_SENTENCE, _QUESTION = 3, 4


@dataclasses.dataclass(frozen=True)
class Question:
    """Who or what is asked after, and the answer: the place, or the holder and the place."""

    subject: str
    answer: tuple[str, ...]

    @property
    def hops(self) -> int:
        """How many facts the answer takes."""
        return len(self.answer)


@dataclasses.dataclass(frozen=True)
class Example:
    """A story and questions about it."""

    sentences: tuple[tuple[str, ...], ...]
    questions: tuple[Question, ...]


@dataclasses.dataclass(frozen=True)
class QATask:
    """Generator of examples and of batches.

    The same seed gives the same examples on every platform. Training and validation share no
    story, in no order of its sentences and whatever their seeds: a checksum of the sentences says
    which of the two a story is for.

    Args:
        segment_length: tokens of a segment, the model's ``segment_length``.
        fact_segments: segments of facts before that of the questions.
        sentences: sentences of a segment of facts.
        people: how many people there are, at most 8.
        places: how many places, at most 8 and more than people.
        objects: how many objects, at most 8; with none all questions have one hop.
        noise: the share of sentences that say nothing of use, among those beyond the first about
            each person and object.

    Raises:
        TypeError, ValueError: an option does not fit.
    """

    segment_length: int = 24
    fact_segments: int = 1
    sentences: int = 6
    people: int = 3
    places: int = 6
    objects: int = 2
    noise: float = 0.2

    def __post_init__(self):
        check_int("QATask", "segment_length", self.segment_length, _QUESTION)
        check_int("QATask", "fact_segments", self.fact_segments, 1)
        check_int("QATask", "sentences", self.sentences, 1, self.segment_length // _SENTENCE)
        for name, known in (("people", _PEOPLE), ("places", _PLACES), ("objects", _OBJECTS)):
            check_int("QATask", name, getattr(self, name), int(name != "objects"), len(known))
        if self.places <= self.people:
            raise ValueError("QATask: there must be more places than people")
        needed, given = self.people + self.objects, self.fact_segments * self.sentences
        if given < needed:
            raise ValueError(
                f"QATask: {self.people} people and {self.objects} objects need {needed} sentences, "
                f"there are {given}"
            )
        if not 0.0 <= self.noise <= 1.0:
            raise ValueError(f"QATask: noise must be from 0 to 1, got {self.noise}")

    @property
    def vocabulary(self) -> Words:
        """All words there are, whatever the sizes of the task."""
        words = (*_WORDS, *_PEOPLE, *_PLACES, *_OBJECTS, *itertools.chain.from_iterable(_NOISE))
        return Words(tuple(dict.fromkeys(words)))

    @property
    def length(self) -> int:
        """Tokens of an example."""
        return (self.fact_segments + 1) * self.segment_length

    def examples(
        self, seed: int, *, questions: int = 1, hops: int | None = None, validation: bool = False
    ) -> Iterator[Example]:
        """Examples without end.

        Args:
            seed: of everything random.
            questions: how many different ones are asked after a story.
            hops: of all questions; both are equally likely unless given.
            validation: whether of the stories for validation, or of those for training.
        """
        kinds = {1: self.people, 2: self.objects}
        most = sum(kinds.values()) if hops is None else kinds[hops]
        check_int("QATask", "questions", questions, 1, most)
        # of the module random only the method random() is the same for ever
        generator = random.Random(f"lm2_kernels {seed}")
        while True:
            example = self._example(generator, questions, hops)
            if _is_validation(example) == validation:
                yield example

    def batches(self, batch: int, seed: int, **options) -> Iterator[dict[str, Tensor]]:
        """Batches without end, of the :meth:`examples` of these options, collated."""
        examples = self.examples(seed, **options)
        while True:
            yield self.collate(list(itertools.islice(examples, batch)))

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Examples as tensors: what the model takes, by the names of its arguments.

        Returns:
            "input_ids" and "labels", (B, L) each; labels are -100 but for the answers' words.
        """
        encode = self.vocabulary.encode
        input_ids = torch.tensor([encode(self.text(example)) for example in examples])
        labels = torch.full_like(input_ids, -100)
        for row, example in zip(labels, examples, strict=True):
            # back from the end: behind the subject comes the answer, whose last word stands where
            # the next subject or the last padding is
            end = self.length - 1
            for question in reversed(example.questions):
                row[end - question.hops + 1 : end + 1] = torch.tensor(
                    encode(" ".join(question.answer))
                )
                end -= question.hops
        return {"input_ids": input_ids, "labels": labels}

    def text(self, example: Example) -> str:
        """An example with its padding; the last word stands for what follows."""
        words = []
        for first in range(0, len(example.sentences), self.sentences):
            words += itertools.chain.from_iterable(
                example.sentences[first : first + self.sentences]
            )
            words += [PAD] * (-len(words) % self.segment_length)
        asked = ["where"]
        for question in example.questions:
            asked += (question.subject, *question.answer[:-1])
        asked.append(PAD)
        return " ".join(words + [PAD] * (self.segment_length - len(asked)) + asked)

    def _example(self, generator: random.Random, questions: int, hops: int | None) -> Example:
        def choose(things: Sequence):
            return things[int(generator.random() * len(things))]

        people, objects = _PEOPLE[: self.people], _OBJECTS[: self.objects]
        # every person goes somewhere and every object is taken, so that all can be asked after
        subjects = [*people, *objects]
        while len(subjects) < self.fact_segments * self.sentences:
            is_noise = generator.random() < self.noise
            subjects.append(None if is_noise else choose(people + objects))
        place, holder, sentences = {}, {}, []
        while subjects:
            subject = subjects.pop(int(generator.random() * len(subjects)))
            if subject is None:
                sentences.append(choose(_NOISE))
            elif subject in people:
                # nobody enters where somebody is: the place named last is seldom the answer
                free = [name for name in _PLACES[: self.places] if name not in place.values()]
                place[subject] = choose(free)
                sentences.append((subject, "entered", place[subject]))
            else:
                holder[subject] = choose(people)
                sentences.append((subject, "with", holder[subject]))
        left = {1: list(people), 2: list(objects)}
        asked = []
        for _ in range(questions):
            kind = hops or choose([hops for hops, things in left.items() if things])
            thing = left[kind].pop(int(generator.random() * len(left[kind])))
            who = (thing,) if kind == 1 else (thing, holder[thing])
            asked.append(Question(thing, (*who[1:], place[who[-1]])))
        return Example(tuple(sentences), tuple(asked))


def _is_validation(example: Example) -> bool:
    # sorted: a story that was trained on is not asked after in another order either
    return is_for_validation(" ".join(itertools.chain.from_iterable(sorted(example.sentences))))
