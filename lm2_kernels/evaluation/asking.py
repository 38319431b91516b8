"""Tasks are asked of a model, at lengths: :func:`ask`."""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import time
from collections.abc import Callable, Iterator, Sequence

from lm2_kernels import machine
from lm2_kernels.checks import check_int
from lm2_kernels.evaluation import prompts, scoring
from lm2_kernels.evaluation.reading import Reader
from lm2_kernels.evaluation.results import SCORES, Cell, Results, length_name
from lm2_kernels.evaluation.samples import Sample, Task, plain
from lm2_kernels.terminal import Bar

__all__ = ["PROMPTS", "ask"]

# how a sample is put: with an instruction and examples, or context and question alone, one after
# the other or in segments of their own
PROMPTS = ("babilong", "plain", "aligned")


def ask(
    reader: Reader,
    tasks: Sequence[Task],
    lengths: Sequence[int],
    *,
    samples: int = 500,
    batch: int = 8,
    tokens: int = 20,
    prompt: str | None = None,
    keep_answers: bool = False,
    results: Results | None = None,
    notes: dict | None = None,
    command: Sequence[str] = (),
    progress: Callable[[str, int], Bar] | None = None,
    after: Callable[[Results, bool], bool | None] | None = None,
) -> Results:
    """Ask a model every task at every length, and count right answers.

    The samples 0, 1, 2, ... of a task are asked. All is looked at before anything is read: the
    first sample of each cell must fit the model.

    Args:
        reader: the model.
        tasks: each by another name.
        lengths: tokens of the contexts; 0 is the facts alone.
        samples: of each task at each length; fewer where a task has fewer (its ``available``).
        batch: samples that are read together; answers do not depend on it, to rounding.
        tokens: of an answer, at most. In the plain form as many as the right answer has, if those
            are fewer: a model of that form was trained on nothing that would end it.
        prompt: "babilong", with an instruction and examples, "plain", or "aligned" by the segments
            of an :class:`LM2ForCausalLM` (:class:`~lm2_kernels.evaluation.layout.Layout`); unless
            given as the model was trained, if the reader knows, or else "plain" for a model of
            words and "babilong" for others.
        keep_answers: whether the results have each answer.
        results: to go on with: what they have is not asked again.
        notes: what else the answers depend on, as the seed of the tasks; results with others are
            not gone on with.
        command: by which this was called, for the results.
        progress: makes the progress bar of a cell from its title and the number of samples that
            were done before (:class:`lm2_kernels.terminal.Bar`); None shows nothing.
        after: called after every batch with the results so far, and whether a cell is done;
            returning True ends the work.

    Returns:
        The results; those given, if they were.

    Raises:
        TypeError, ValueError: an option does not fit, or a sample not the model; or the results
            given are of other options.
    """
    for name, value in (("samples", samples), ("batch", batch), ("tokens", tokens)):
        check_int("ask", name, value, 1)
    for length in lengths:
        check_int("ask", "lengths", length, 0)
    prompt = prompt or reader.prompt or ("plain" if reader.knows_words_alone else "babilong")
    if prompt not in PROMPTS:
        raise ValueError(f"ask: prompt must be one of {', '.join(PROMPTS)}, got {prompt!r}")
    if prompt == "babilong" and reader.knows_words_alone:
        raise ValueError("the model knows words of a list alone: it takes plain prompts")
    options = {
        "model": reader.fingerprint(),
        "device": reader.device.type,
        "window": reader.window,
        "samples": samples,
        "tokens": tokens,
        "prompt": prompt,
        **(notes or {}),
    }
    results = Results(options) if results is None else results
    results.check(options)
    questions = _Questions(reader, prompt, tokens)
    cells = []
    for task in tasks:
        for length in lengths:
            cell = _begun(results, questions, task, length, samples)
            cells += [] if cell.is_done else [(task, cell)]
    if not cells:
        return results
    run = {"command": list(command), "versions": _versions(), "devices": machine.devices()}
    results.runs.append(run | {"minutes": 0.0})
    for task, cell in cells:
        if _finish(questions, task, cell, results, batch, keep_answers, progress, after):
            break
    return results


@dataclasses.dataclass(frozen=True)
class _Question:
    number: int
    sample: Sample
    prompt: str
    tokens: int  # of the answer, at most


class _Questions:
    """Samples as a model is asked them."""

    def __init__(self, reader: Reader, kind: str, tokens: int):
        self.reader = reader
        self._kind = kind
        self._tokens = tokens
        self._layout = reader.layout() if kind == "aligned" else None

    def of(self, task: Task, length: int, first: int = 0) -> Iterator[_Question]:
        """Those of a task from a number on."""
        for number in itertools.count(first):
            yield self._question(task, number, task.sample(number, length, self.reader.count))

    def available(self, task: Task, length: int, samples: int) -> int:
        """How many different samples there are, at most so many."""
        if not hasattr(task, "available"):
            return samples
        found = task.available(length, self.reader.count)
        return samples if found is None else min(samples, found)

    def _question(self, task: Task, number: int, sample: Sample) -> _Question:
        if self._kind == "babilong":
            return _Question(number, sample, prompts.prompt(task.name, sample), self._tokens)
        text, answer = plain(sample)
        if self._layout is not None:
            text = self._layout.prompt(sample)
        # behind a blank, as it follows
        tokens = min(self._tokens, self.reader.count(f" {answer}"))
        return _Question(number, dataclasses.replace(sample, answer=answer), text, tokens)


def _begun(results: Results, questions: _Questions, task: Task, length: int, samples: int) -> Cell:
    """The cell of a task and a length, old or new, whose first sample fits the model."""
    first = next(questions.of(task, length))
    try:
        questions.reader.check(first.prompt, first.tokens)
        if questions.reader.knows_words_alone:
            # what it does not know it could not say either
            questions.reader.encode(first.sample.answer)
    except ValueError as error:
        raise ValueError(f"{task.name} at {length_name(length)}: {error}") from None
    digest = hashlib.blake2b(first.prompt.encode(), digest_size=16).hexdigest()
    try:
        cell = results.cell(task.name, length)
    except KeyError:
        available = questions.available(task, length, samples)
        cell = Cell(task.name, length, available, first=digest)
        results.cells.append(cell)
    if cell.first != digest:
        raise ValueError(
            f"the results are of other samples of {task.name} at {length_name(length)}"
        )
    return cell


def _finish(
    questions: _Questions,
    task: Task,
    cell: Cell,
    results: Results,
    batch: int,
    keep_answers: bool,
    progress: Callable[[str, int], Bar] | None,
    after: Callable[[Results, bool], bool | None] | None,
) -> bool:
    """Ask what is left of a cell; whether ``after`` ended the work."""
    left = questions.of(task, cell.length, cell.asked)
    bar = progress and progress(f"{cell.task} {length_name(cell.length)}", cell.asked)
    try:
        while not cell.is_done:
            start = time.monotonic()
            some = list(itertools.islice(left, min(batch, cell.samples - cell.asked)))
            said = questions.reader.answer([q.prompt for q in some], [q.tokens for q in some])
            for question, answer in zip(some, said, strict=True):
                _count(cell, question, answer, keep_answers)
            minutes = (time.monotonic() - start) / 60.0
            cell.minutes += minutes
            results.runs[-1]["minutes"] += minutes
            if bar is not None:
                share = cell.accuracy("leaderboard").share
                bar.show(cell.asked, cell.samples, f"right {100 * share:.1f} %")
            if after is not None and after(results, cell.is_done):
                return True
    finally:
        if bar is not None:
            bar.close()
    return False


def _count(cell: Cell, question: _Question, answer: str, keep_answers: bool) -> None:
    found = {name: getattr(scoring, name)(question.sample, answer) for name in SCORES}
    cell.asked += 1
    for name, is_right in found.items():
        setattr(cell, name, getattr(cell, name) + is_right)
    if keep_answers:
        wanted = {"number": question.number, "answer": answer, "wanted": question.sample.answer}
        cell.answers.append(wanted | found)


def _versions() -> dict[str, str]:
    """Of what answers can depend on."""
    try:
        hosts = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        hosts = "absent"
    return machine.versions() | {"transformers": hosts}
