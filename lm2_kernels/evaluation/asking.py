"""Tasks are asked of a model, at lengths: :func:`ask`."""

import dataclasses
import hashlib
import importlib.metadata
import time
from collections.abc import Callable, Sequence

from lm2_kernels import machine
from lm2_kernels.checks import check_int
from lm2_kernels.evaluation import prompts, scoring
from lm2_kernels.evaluation.reading import Reader
from lm2_kernels.evaluation.results import SCORES, Cell, Results, length_name
from lm2_kernels.evaluation.samples import (
    LIST_END,
    Sample,
    Task,
    longest_answer,
    plain,
    plain_words,
)
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

    The samples 0, 1, 2, ... of a task are asked, but for those whose prompts came before: no
    question is counted twice. All prompts are made and looked at before the first one is read: each
    must fit the model. They are made anew when they are asked, and not kept.

    Args:
        reader: the model.
        tasks: each by another name.
        lengths: tokens of the contexts, as the model reads them: of the plain form, where that is
            asked; 0 is the facts alone.
        samples: of each task at each length; fewer where a task has fewer (its ``available``), or
            where some are the same.
        batch: samples that are read together; answers do not depend on it, to rounding.
        tokens: of an answer at most, with prompt "babilong", or as many as the task's longest
            answer has. In the other forms it is as many as the right answer has, which is thereby
            told: a model of these forms was trained on nothing that would end an answer. Lists end
            (``samples.spoken``), and there it is as many as the task's longest list has.
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
        TypeError, ValueError: an option does not fit, or a sample not the model, which the message
            names; or the results given are of other options, or lack answers that are to be kept.
    """
    for name, value in (("samples", samples), ("batch", batch), ("tokens", tokens)):
        check_int("ask", name, value, 1)
    for length in lengths:
        check_int("ask", "lengths", length, 0)
    prompt = prompt or reader.prompt or ("plain" if reader.knows_words_alone else "babilong")
    if prompt not in PROMPTS:
        raise ValueError(f"ask: prompt must be one of {', '.join(PROMPTS)}, got {prompt!r}")
    if prompt == "babilong" and reader.knows_words_alone:
        raise ValueError(
            "the model knows words of a list alone: it takes the prompts plain and aligned"
        )
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
    kinds = [(task, length) for task in tasks for length in dict.fromkeys(lengths)]
    bar = progress and progress("looking at prompts", 0)
    found = []
    for task, length in kinds:
        found.append(_looked_at(results, questions, task, length, samples, keep_answers))
        if bar is not None:
            bar.show(len(found), len(kinds), f"{task.name} {length_name(length)}")
    if bar is not None:
        bar.close()
    # none before all are known to fit
    results.cells += [cell for cell, _ in found if cell not in results.cells]
    if all(cell.is_done for cell, _ in found):
        return results
    run = {"command": list(command), "versions": _versions(), "devices": machine.devices()}
    results.runs.append(run | {"minutes": 0.0})
    for (task, _), (cell, numbers) in zip(kinds, found, strict=True):
        if not cell.is_done and _finish(
            questions, task, cell, numbers, results, batch, keep_answers, progress, after
        ):
            break
    return results


@dataclasses.dataclass(frozen=True)
class _Question:
    number: int
    sample: Sample
    prompt: str
    tokens: int  # of the answer, at most
    end: str | None = None  # what ends the answer, beside the model


class _Questions:
    """Samples as a model is asked them."""

    def __init__(self, reader: Reader, kind: str, tokens: int):
        self.reader = reader
        self._kind = kind
        self._tokens = tokens
        self._layout = reader.layout() if kind == "aligned" else None

    def count(self, text: str) -> int:
        """How many tokens a text has within another, as the model reads it."""
        return self.reader.count(text) if self._kind == "babilong" else self.plain_count(text)

    def plain_count(self, text: str) -> int:
        """How many a text has behind another in its plain form, as a Layout counts."""
        return self.reader.count(" " + " ".join(plain_words(text)))

    def available(self, task: Task, length: int, samples: int) -> int:
        """How many samples there are before the first comes again, at most so many."""
        if not hasattr(task, "available"):
            return samples
        found = task.available(length, self.count)
        return samples if found is None else min(samples, found)

    def question(self, task: Task, length: int, number: int) -> _Question:
        """Of a task."""
        sample = task.sample(number, length, self.count)
        if self._kind == "babilong":
            tokens = max(self._tokens, longest_answer(sample, self.plain_count))
            return _Question(number, sample, prompts.prompt(task.name, sample), tokens)
        text, answer = plain(sample)
        if self._layout is not None:
            # as in training
            segments = -(-length // self._layout.segment_length) or None
            text = self._layout.prompt(sample, segments)
        is_list = sample.listed > 1
        tokens = longest_answer(sample, self.count) if is_list else self.count(answer)
        sample = dataclasses.replace(sample, answer=answer)
        return _Question(number, sample, text, tokens, LIST_END if is_list else None)


def _looked_at(
    results: Results,
    questions: _Questions,
    task: Task,
    length: int,
    samples: int,
    keep_answers: bool,
) -> tuple[Cell, list[int]]:
    """The cell of a task and a length, old or new, and the numbers of its samples."""
    name = f"{task.name} at {length_name(length)}"
    digest, seen, numbers = hashlib.blake2b(digest_size=16), set(), []
    for number in range(questions.available(task, length, samples)):
        try:
            question = questions.question(task, length, number)
            questions.reader.check(question.prompt, question.tokens)
            if questions.reader.knows_words_alone:
                # what it does not know it could not say either
                questions.reader.encode(question.sample.answer)
        except ValueError as error:
            raise ValueError(f"{name}, sample {number}: {error}") from None
        one = hashlib.blake2b(question.prompt.encode(), digest_size=16).digest()
        if one not in seen:
            numbers.append(number)
        seen.add(one)
        digest.update(one)
    cell = results.found(task.name, length)
    if cell is None:
        return Cell(task.name, length, len(numbers), prompts=digest.hexdigest()), numbers
    if (cell.prompts, cell.samples) != (digest.hexdigest(), len(numbers)):
        raise ValueError(f"the results are of other samples of {name}")
    if keep_answers and len(cell.answers) < cell.asked:
        raise ValueError(f"the results lack answers of {name}: when asked, they were not kept")
    return cell, numbers


def _finish(
    questions: _Questions,
    task: Task,
    cell: Cell,
    numbers: Sequence[int],
    results: Results,
    batch: int,
    keep_answers: bool,
    progress: Callable[[str, int], Bar] | None,
    after: Callable[[Results, bool], bool | None] | None,
) -> bool:
    """Ask what is left of a cell; whether ``after`` ended the work."""
    bar = progress and progress(f"{cell.task} {length_name(cell.length)}", cell.asked)
    try:
        while not cell.is_done:
            start = time.monotonic()
            some = [
                questions.question(task, cell.length, number)
                for number in numbers[cell.asked : cell.asked + batch]
            ]
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
    if question.end is not None:
        answer = answer.partition(question.end)[0].strip()
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
