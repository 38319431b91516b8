"""How many answers were right, by task and length: counts, intervals, a table, a heat map, JSON."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path

from lm2_kernels import figures
from lm2_kernels.evaluation.accuracy import Accuracy
from lm2_kernels.state.files import read_json
from lm2_kernels.terminal import check_json, columns, write_json

__all__ = ["Cell", "Results", "check_plots", "length_name"]

# by which a file of results is known
KEYS = ("options", "runs", "cells")
# the functions of `scoring`, and what they ask for
SCORES = {
    "leaderboard": "the answer in the first sentence, and no other label of the task",
    "harness": "the answer somewhere in what was said",
}
_PLOT = "answers"


def length_name(length: int) -> str:
    """A length as the command takes it: a k is 1000 tokens."""
    return f"{length // 1000}k" if length % 1000 == 0 else str(length)


@dataclasses.dataclass
class Cell:
    """The answers to one task at one length."""

    task: str
    length: int
    samples: int  # to be asked, each of another prompt
    asked: int = 0
    leaderboard: int = 0  # right by each score
    harness: int = 0
    minutes: float = 0.0
    prompts: str = ""  # a digest of them: the same tasks, texts and seed
    answers: list[dict] = dataclasses.field(default_factory=list)

    @property
    def is_done(self) -> bool:
        """Whether all samples were asked."""
        return self.asked >= self.samples

    def accuracy(self, score: str) -> Accuracy:
        """How many were right by a score, "leaderboard" or "harness"."""
        return Accuracy(getattr(self, score), self.asked)

    def to_dict(self) -> dict:
        """What is in the JSON."""
        content = dataclasses.asdict(self)
        if not self.answers:
            del content["answers"]
        for score in SCORES:
            accuracy = self.accuracy(score)
            # of nothing there is no number in JSON
            share = accuracy.share if accuracy.total else None
            low, high = accuracy.interval()
            content[score] = {"right": accuracy.right, "share": share, "interval": [low, high]}
        return content

    @classmethod
    def from_dict(cls, content: dict) -> "Cell":
        """What :meth:`to_dict` made."""
        values = {field.name: content[field.name] for field in dataclasses.fields(cls)[:-1]}
        values |= {score: content[score]["right"] for score in SCORES}
        cell = cls(**values, answers=list(content.get("answers", ())))
        for field in dataclasses.fields(cls)[:-1]:
            value, kinds = values[field.name], (int, float) if field.type is float else field.type
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise TypeError(f"{field.name} is {value!r}")
        right = max(cell.leaderboard, cell.harness)
        if not 0 <= min(cell.leaderboard, cell.harness) <= right <= cell.asked <= cell.samples:
            raise ValueError(
                f"of {cell.task} {right} are right of {cell.asked} asked of {cell.samples}"
            )
        return cell


@dataclasses.dataclass
class Results:
    """What :func:`~lm2_kernels.evaluation.ask` returns."""

    options: dict  # what the answers depend on
    runs: list[dict] = dataclasses.field(default_factory=list)  # by which they came: see `ask`
    cells: list[Cell] = dataclasses.field(default_factory=list)

    def cell(self, task: str, length: int) -> Cell:
        """The answers to a task at a length.

        Raises:
            KeyError: it was not asked.
        """
        cell = self.found(task, length)
        if cell is None:
            raise KeyError(f"no answers to {task} at {length_name(length)}")
        return cell

    def found(self, task: str, length: int) -> Cell | None:
        """The answers to a task at a length, if it was asked."""
        same = (cell for cell in self.cells if (cell.task, cell.length) == (task, length))
        return next(same, None)

    def check(self, options: dict) -> None:
        """Raise ValueError unless answers under these options may join."""
        for name in {**self.options, **options}:
            was, now = self.options.get(name), options.get(name)
            if was == now:
                continue
            if name == "model":
                raise ValueError("the results are of a model with other weights or options")
            raise ValueError(f"the results are of {name} {was}, not {now}")

    def write(self, path: str | Path) -> None:
        """Write JSON that :meth:`read` takes, over such a file alone.

        Raises:
            OSError, ValueError: it cannot be written, or the file holds something else.
        """
        write_json(Path(path), self.to_dict(), KEYS)

    def to_dict(self) -> dict:
        """What is in the JSON: shares and intervals (95 %) too."""
        cells = [cell.to_dict() for cell in self.cells]
        return {"options": self.options, "runs": self.runs, "cells": cells}

    @classmethod
    def read(cls, path: str | Path) -> "Results":
        """What :meth:`write` wrote.

        Raises:
            OSError, ValueError: there is no such file, or it holds something else.
        """
        path = Path(path)
        check_json(path, KEYS)
        content = read_json(path)
        try:
            cells = [Cell.from_dict(cell) for cell in content["cells"]]
            return cls(dict(content["options"]), list(content["runs"]), cells)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None

    def table(self) -> str:
        """The shares in % with their intervals of 95 %, a table a score."""
        lines = []
        for score, meaning in SCORES.items():
            lines += ["", f"{score}: {meaning} (right in %, and the interval of 95 %)"]
            rows = [["", *map(length_name, self._lengths())]]
            for task in self._tasks():
                shown = [self._shown(task, length, score) for length in self._lengths()]
                rows.append([task, *shown])
            lines += [f"  {line}" for line in columns(rows)]
        cut = [cell for cell in self.cells if not cell.is_done]
        lines += [
            f"{cell.task} at {length_name(cell.length)}: {cell.asked} of {cell.samples} asked"
            for cell in cut
        ]
        return "\n".join(lines[1:])

    def plot(self, folder: str | Path, title: str = "Right answers") -> list[Path]:
        """Draw ``answers.png`` and ``answers.svg``, heat maps of both scores, into a folder.

        The folder is made if need be. Returns the files.

        Raises:
            ValueError: matplotlib is not there, or this is no folder.
        """
        folder = Path(folder)
        check_plots(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tasks, lengths = self._tasks(), self._lengths()
        size = (max(3.0 + 0.9 * len(lengths), 5.0), 1.6 + 2 * 0.45 * len(tasks))
        foot = ["right in %, and below it the interval of 95 %; k: 1000 tokens"]
        with figures.style():
            figure = figures.new_figure(size, title, foot)
            panels = figure.subplots(2, 1, sharex=True)
            for axes, score in zip(panels, SCORES, strict=True):
                cells = [[self.found(task, length) for length in lengths] for task in tasks]
                shares = [[self._share(cell, score) for cell in row] for row in cells]
                texts = [[_text(cell, score) for cell in row] for row in cells]
                image = figures.draw_heat(axes, shares, texts=texts)
                axes.set_title(score)
                axes.set_xticks(range(len(lengths)), list(map(length_name, lengths)))
                axes.set_yticks(range(len(tasks)), tasks)
            panels[-1].set_xlabel("length")
            figure.colorbar(image, ax=panels, label="share right")
            return figures.save(figure, folder / _PLOT)

    def _tasks(self) -> list[str]:
        return list(dict.fromkeys(cell.task for cell in self.cells))

    def _lengths(self) -> list[int]:
        return sorted({cell.length for cell in self.cells})

    def _share(self, cell: Cell | None, score: str) -> float:
        return math.nan if cell is None else cell.accuracy(score).share

    def _shown(self, task: str, length: int, score: str) -> str:
        cell = self.found(task, length)
        if cell is None or cell.asked == 0:
            return "-"
        low, high = _interval(cell, score)
        return f"{100 * cell.accuracy(score).share:.1f} [{low:.1f}, {high:.1f}]"


def _interval(cell: Cell, score: str) -> Sequence[float]:
    return [100 * end for end in cell.accuracy(score).interval()]


def _text(cell: Cell | None, score: str) -> str:
    if cell is None or cell.asked == 0:
        return ""
    low, high = _interval(cell, score)
    return f"{100 * cell.accuracy(score).share:.1f}\n{low:.0f} to {high:.0f}"


def check_plots(folder: str | Path) -> None:
    """Raise ValueError unless :meth:`Results.plot` may draw into a folder."""
    figures.figure_class()
    # what is there of it, or where it would be made
    path = Path(folder).absolute()
    there = next(path for path in (path, *path.parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"--plots {folder}: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--plots {folder}: nothing can be written into {there}")
