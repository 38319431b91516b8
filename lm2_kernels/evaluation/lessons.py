"""Tasks to train on: samples made while a run goes on, of sizes that a curriculum says.

See :class:`~lm2_kernels.training.sources.Data`, of which this is the other kind beside files.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lm2_kernels.checks import check_int
from lm2_kernels.evaluation.accuracy import Accuracy
from lm2_kernels.evaluation.layout import LAYOUTS, LOSSES, Layout, words
from lm2_kernels.evaluation.samples import Sample, Task, count_words
from lm2_kernels.evaluation.tasks import task
from lm2_kernels.model.config import LM2Config
from lm2_kernels.training import distributed
from lm2_kernels.training.curriculum import SCHEDULES, Curriculum, curriculum
from lm2_kernels.training.data import Bytes, Words, tokenizer_text
from lm2_kernels.training.loop import Batch, autocast_in, evaluating, moved

__all__ = ["TOKENIZERS", "Lessons", "TaskBatches"]

TOKENIZERS = ("words", "bytes")
# samples of a task and a size that a trained model is asked, or some more: whole batches
_ASKED = 100
# of a task, samples that its digest is of; and words that these have beyond twice their facts
_KNOWN_BY, _WORDS = 8, 200
# tokens of rows that are judged together, all of which have logits
_TOGETHER = 2**17
# numbers of samples: more than any run sees
_NUMBERS = 2**48


@dataclasses.dataclass(frozen=True)
class Lessons:
    """Tasks, and the tokenizer of a model that learns them.

    Args:
        tasks: for training.
        questions: the same for validation; they ask nothing after the same facts as the others do.
        tokenizer: words, with those of all tasks, or bytes.
        files: texts that the tasks were made of.
    """

    tasks: Sequence[Task]
    questions: Sequence[Task]
    tokenizer: Words | Bytes
    files: Sequence[str] = ()

    @classmethod
    def open(cls, options: dict) -> "Lessons":
        """The tasks of a run's options, by their names.

        Raises:
            OSError: a file cannot be read.
            ValueError: there is no such task, or none for training, or one is named twice.
        """
        names, background = options["tasks"], options["background"]
        if len(set(names)) < len(names):
            raise ValueError(f"a task is named twice: {' '.join(names)}")
        texts = {"babi": options["babi"], "background": background}
        # validation is what evaluate asks unless it is told otherwise
        tasks, questions = (
            [task(name, seed=seed, validation=validation, **texts) for name in names]
            for seed, validation in ((options["seed"], False), (0, True))
        )
        kind = options["tokenizer"] or ("words" if background is None else "bytes")
        if kind not in TOKENIZERS:
            raise ValueError(f"--tokenizer must be one of {', '.join(TOKENIZERS)}, got {kind}")
        known = Bytes() if kind == "bytes" else words(*(t.words() for t in (*tasks, *questions)))
        return cls(tasks, questions, known, [] if background is None else [background])

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return self.tokenizer.vocab_size

    def completed(self, options: dict, config: LM2Config) -> dict:
        """See :class:`~lm2_kernels.training.sources.Data`."""
        sizes = [name for name in ("lengths", "segments") if options[name] is not None]
        if len(sizes) == 2:
            raise ValueError("give --lengths or --segments, not both")
        (name,) = sizes or ["segments"]
        given = options[name] or [1]
        for size in given:
            check_int("train", name, size, 0 if name == "lengths" else 1)
        own = {"curriculum": SCHEDULES[0], "loss": LOSSES[0], "layout": LAYOUTS[0]}
        own["tokenizer"] = self.tokenizer.kind
        unsaid = {name: value for name, value in own.items() if options[name] is None}
        return options | unsaid | {name: given}

    def entries(self) -> list[dict]:
        """See :class:`~lm2_kernels.training.sources.Data`."""
        found = [{"path": some.name, "digest": _digest(some)} for some in self.tasks]
        for path in self.files:
            content = hashlib.blake2b(Path(path).read_bytes(), digest_size=16)
            found.append({"path": path, "digest": content.hexdigest()})
        known = hashlib.blake2b(tokenizer_text(self.tokenizer).encode(), digest_size=16)
        return [*found, {"path": "the tokenizer", "digest": known.hexdigest()}]

    def batches(self, options: dict, config: LM2Config) -> "TaskBatches":
        """See :class:`~lm2_kernels.training.sources.Data`."""
        layout = Layout(self.tokenizer, config.segment_length, options["layout"], options["loss"])
        is_segments = options["segments"] is not None
        sizes = sorted(set(options["segments" if is_segments else "lengths"]))
        schedule = curriculum(options["curriculum"], sizes)
        found = TaskBatches(
            self.tasks, self.questions, layout, schedule, sizes, is_segments, options
        )
        found.check()
        return found


@dataclasses.dataclass(frozen=True)
class TaskBatches:
    """Batches of samples; see :class:`~lm2_kernels.training.sources.Batches`.

    All rows of a batch have one size. Which task a row is of, and which of its samples, is a
    function of the seed, the step and the row.
    """

    tasks: Sequence[Task]
    questions: Sequence[Task]
    layout: Layout
    schedule: Curriculum
    sizes: Sequence[int]
    is_segments: bool
    options: dict
    notes: Sequence[str] = ()

    @property
    def summary(self) -> str:
        """See :class:`~lm2_kernels.training.sources.Batches`."""
        names = " ".join(some.name for some in self.tasks)
        sizes = ", ".join(map(str, self.sizes))
        return f"tasks {names} at {sizes} {'segments' if self.is_segments else 'tokens'}"

    def check(self) -> None:
        """Raise ValueError unless every task has samples of every size."""
        for some in (*self.tasks, *self.questions):
            for size in self.sizes:
                self._collated([self._sample(some, 0, size)], size)

    def train(self, *, first: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """See :class:`~lm2_kernels.training.sources.Batches`."""
        made, own = self._shares(rank, world)
        for step in range(first, self.options["steps"]):
            batch = self._collated(*self.samples(step, made))
            yield {name: tensor[own] for name, tensor in batch.items()}

    def samples(self, step: int, rows: Iterable[int]) -> tuple[list[Sample], int]:
        """Of some rows of a step, and their size."""
        seed = self.options["seed"]
        size = self.schedule.size(seed, step, self.options["steps"])
        found = []
        for row in rows:
            # numpy's generators may change, their seeds do not
            drawn = np.random.SeedSequence((seed, step, 0, row)).generate_state(2, np.uint64)
            which, number = (int(value) for value in drawn)
            some = self.tasks[which % len(self.tasks)]
            found.append(self._sample(some, number % _NUMBERS, size))
        return found, size

    def validate(
        self,
        model: nn.Module,
        *,
        rank: int,
        world: int,
        device: torch.device,
        autocast: torch.dtype | None,
    ) -> list[str]:
        """See :class:`~lm2_kernels.training.sources.Batches`."""
        lines = []
        for some in self.questions:
            for size in self.sizes:
                sums = _judged(model, self._asked(some, size, rank, world), autocast)
                # in all processes; the number of these drops out of a ratio
                loss, tokens, right, rows = (distributed.mean(value, device) for value in sums)
                accuracy = Accuracy(round(world * right), round(world * rows))
                lines.append(
                    f"validation of {some.name}, {self._named(size)}: loss {loss / tokens:.4f}, "
                    f"right {accuracy}"
                )
        return lines

    def _asked(self, some: Task, size: int, rank: int, world: int) -> Iterator[Batch]:
        # of answers, whatever was trained on
        layout = dataclasses.replace(self.layout, loss="answers")
        made, own = self._shares(rank, world)
        # by the size that is asked for: all processes, whose rows may differ, make as many parts
        rows = max(_TOGETHER // max(self._tokens(size), 1), 1)
        for first in range(0, _ASKED, self.options["batch"]):
            samples = [self._sample(some, first + row, size) for row in made]
            batch = self._collated(samples, size, layout)
            parts = (tensor[own].split(rows) for tensor in batch.values())
            yield from (dict(zip(batch, part, strict=True)) for part in zip(*parts, strict=True))

    def _shares(self, rank: int, world: int) -> tuple[range, slice]:
        """Which rows of a batch a process makes, and which of these are its own."""
        batch = self.options["batch"]
        if world > 1 and self.options["parallel"] == "fsdp":
            # where all processes read each segment together: rows as long as the longest of all
            return range(batch), slice(rank, None, world)
        return range(rank, batch, world), slice(None)

    def _named(self, size: int) -> str:
        if self.is_segments:
            return f"{size} segment{'s' if size > 1 else ''}"
        return f"{size} tokens" if size else "facts alone"

    def _sample(self, some: Task, number: int, size: int) -> Sample:
        return some.sample(number, self._tokens(size), self.layout.count)

    def _tokens(self, size: int) -> int:
        return size * self.layout.segment_length if self.is_segments else size

    def _collated(self, samples: list[Sample], size: int, layout: Layout | None = None) -> Batch:
        layout = layout or self.layout
        segments = size if self.is_segments else -(-size // layout.segment_length)
        # of facts alone, each has as many as it takes
        return layout.collate(samples, segments or None)


@torch.no_grad()
def _judged(
    model: nn.Module, batches: Iterable[Batch], autocast: torch.dtype | None
) -> tuple[float, float, float, float]:
    """Sums over batches: losses of tokens and how many these are, answers right in full, answers.

    An answer is right if each of its tokens is the likeliest behind those before it; then, and only
    then, it is what the model says greedily.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    with evaluating(model):
        for batch in batches:
            inputs = moved(batch, device)
            targets = inputs["labels"][:, 1:]
            with autocast_in(device, autocast):
                output = model(**inputs, return_logits=True)
            counted = targets != -100
            is_right = (output.logits[:, :-1].argmax(-1) == targets) | ~counted
            tokens, has_answer = counted.sum(), counted.any(1)
            sums += torch.stack(
                [
                    output.loss.double() * tokens,
                    tokens,
                    (is_right.all(1) & has_answer).sum(),
                    has_answer.sum(),
                ]
            )
    return tuple(sums.tolist())


def _digest(some: Task) -> str:
    """Of a task's samples: facts, of all that come from files or the first few, and what they are
    in background.
    """
    found = hashlib.blake2b(digest_size=16)
    for number in range(some.available() or _KNOWN_BY):
        sample = some.sample(number)
        found.update(repr(sample).encode())
        if number < _KNOWN_BY:
            length = 2 * count_words(sample.context) + _WORDS
            found.update(repr(some.sample(number, length)).encode())
    return found.hexdigest()
