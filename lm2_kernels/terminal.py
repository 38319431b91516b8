"""What the commands show while they work, and what they write."""

import json
import sys
import time
from pathlib import Path

_WIDTH = 79
_BAR = 24


class Progress:
    """One line on standard error that changes on a terminal; elsewhere a line now and then."""

    def __init__(self):
        self._is_terminal = sys.stderr.isatty()
        self._last: object = None

    def update(self, text: str, part: object) -> None:
        """Show ``text``; off a terminal only if ``part`` is another than the last one's."""
        if self._is_terminal:
            print(f"\r\033[K{text[:_WIDTH]}", end="", file=sys.stderr, flush=True)
        elif part != self._last:
            print(text, file=sys.stderr, flush=True)
        self._last = part

    def close(self) -> None:
        """Leave an empty line behind."""
        if self._is_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


class StepBar:
    """A progress bar over training steps: call it as ``train``'s ``progress``."""

    def __init__(self, title: str, first: int = 0):
        self._title = title
        self._first = first
        self._start = time.monotonic()
        self._line = Progress()

    def __call__(self, done: int, total: int, loss: float) -> None:
        seconds = time.monotonic() - self._start
        left = seconds / (done - self._first) * (total - done)
        filled = _BAR * done // total
        bar = "#" * filled + "." * (_BAR - filled)
        self._line.update(
            f"{self._title} [{bar}] {done}/{total} loss {loss:.3f}, {left:.0f} s left",
            10 * done // total,
        )

    def close(self) -> None:
        """Leave an empty line behind."""
        self._line.close()


def columns(rows: list[list[str]]) -> list[str]:
    """The rows as lines of left-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def write_json(path: Path | None, content: dict) -> None:
    """Write ``content`` where a ``--json`` option says; None is nowhere.

    Raises:
        OSError: it cannot be written.
    """
    if path is None:
        return
    try:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
