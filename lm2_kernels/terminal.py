"""What the commands show while they work, and what they write."""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

from lm2_kernels.disk import replace_file

_WIDTH = 79
_BAR = 24


def say(text: str, end: str = "\n") -> None:
    """Print on standard error, if somebody is there: hours of work do not end for want of it."""
    with contextlib.suppress(OSError, ValueError):
        print(text, end=end, file=sys.stderr, flush=True)


class Progress:
    """One line on standard error that changes on a terminal; elsewhere a line now and then."""

    def __init__(self):
        self._is_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._last: object = None

    def update(self, text: str, part: object) -> None:
        """Show ``text``; off a terminal only if ``part`` is another than the last one's."""
        if self._is_terminal:
            say(f"\r\033[K{text[:_WIDTH]}", end="")
        elif part != self._last:
            say(text)
        self._last = part

    def close(self) -> None:
        """Leave an empty line behind."""
        if self._is_terminal:
            say("\r\033[K", end="")


class Bar:
    """A progress bar."""

    def __init__(self, title: str, first: int = 0):
        self._title = title
        self._first = first
        self._start = time.monotonic()
        self._line = Progress()

    def show(self, done: int, total: int, text: str) -> None:
        """Show how much is done, and a text."""
        seconds = time.monotonic() - self._start
        left = seconds / (done - self._first) * (total - done)
        filled = _BAR * done // total
        bar = "#" * filled + "." * (_BAR - filled)
        self._line.update(
            f"{self._title} [{bar}] {done}/{total} {text}, {left:.0f} s left",
            10 * done // total,
        )

    def close(self) -> None:
        """Leave an empty line behind."""
        self._line.close()


class StepBar(Bar):
    """A progress bar over training steps: call it as ``train``'s ``progress``."""

    def __call__(self, done: int, total: int, loss: float) -> None:
        self.show(done, total, f"loss {loss:.3f}")


def columns(rows: list[list[str]]) -> list[str]:
    """The rows as lines of left-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def check_json(path: Path | None, keys: Collection[str]) -> None:
    """Raise unless :func:`write_json` may write there: before the work, not after it.

    ``keys`` are those by which a command knows what it wrote before.

    Raises:
        OSError: nothing can be written there.
        ValueError: the file is there and holds something else than what the command writes.
    """
    if path is None or (path.exists() and not path.is_file() and not path.is_dir()):
        return
    if path.is_dir() or not path.parent.is_dir():
        what = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise OSError(f"cannot write {path}: {what}")
    if path.exists():
        try:
            there = json.loads(path.read_bytes() or "null")
        except (ValueError, RecursionError):
            raise ValueError(f"{path} holds no JSON: it is not overwritten") from None
        if there is not None and not (isinstance(there, dict) and set(keys) <= there.keys()):
            raise ValueError(f"{path} holds JSON of something else: it is not overwritten")
    check_writable(path)


def check_writable(path: Path) -> None:
    """Raise OSError unless a file can be made beside ``path``, or where it leads."""
    try:
        with tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))):
            pass
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from None


def write_json(path: Path | None, content: dict, keys: Collection[str]) -> None:
    """Write ``content``, which has ``keys``, where a ``--json`` option says; None is nowhere.

    Raises:
        OSError, ValueError: it cannot be written, or :func:`check_json` says no.
    """
    if path is None:
        return
    check_json(path, keys)
    text = json.dumps(content, indent=1) + "\n"
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))
