"""Entries: what is measured, each in a process of its own, and what is kept of it.

An entry is forked from a process that has imported all it needs and never touches the GPU, so it
costs little; a fault, a hang or a death costs that entry alone. Its row is a JSON file. A row that
says "again" is of an entry that failed to end, which a later run tries again, last.
"""

import contextlib
import ctypes
import functools
import json
import math
import os
import re
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Context(NamedTuple):
    """Where entries run."""

    is_rehearsal: bool  # on the CPU at tiny shapes
    folder: Path  # with a folder for each phase
    target: str  # of Triton's launch tables

    @property
    def device(self) -> str:
        return "cpu" if self.is_rehearsal else "cuda"


class Entry(NamedTuple):
    """One measurement: ``work`` gets the time at which it is stopped, and returns its row.

    In a row, "ok" False is a failure like an exception, "line" is what is shown of it.
    """

    key: str
    work: Callable[[float], dict]
    limit: float = math.inf  # seconds; the phase's is kept too


def file_of(folder: Path, key: str, suffix: str = ".json") -> Path:
    return folder / (re.sub(r"[^A-Za-z0-9_.=,-]+", "_", key) + suffix)


def load(folder: Path, key: str) -> dict | None:
    file = file_of(folder, key)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def save(file: Path, content: dict) -> None:
    """At once or not at all: the process may be stopped at any time."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1), encoding="utf-8")
    part.replace(file)


def shown(row: dict) -> str:
    return f"{'ok  ' if row['ok'] else 'FAIL'} {row['key']}: {row['line']} ({row['spent']:.1f} s)"


def die_with_parent() -> None:
    """In a new process: whatever ends the one that started it ends it too. Not its own children."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Child:
    """A forked process in a group of its own, which dies with its parent."""

    def __init__(self, work: Callable[[], int | None], log: Path | None = None):
        self.code: int | None = None  # once it ended; less than 0 if by a signal
        self.pid = os.fork()
        if self.pid:
            with contextlib.suppress(OSError):
                os.setpgid(self.pid, self.pid)  # here too: whichever of the two comes first
            return
        code = 1
        try:
            os.setpgid(0, 0)
            die_with_parent()
            if log is not None:
                file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                os.dup2(file, 1)
                os.dup2(file, 2)
            code = work() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            # whatever happened: what the parent does next is not for this process
            os._exit(code)

    def wait(self, seconds: float = 0.0) -> bool:
        """Whether it ended, at the latest after so many seconds."""
        end = time.time() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.time() >= end:
                return False
            else:
                time.sleep(0.02)
        return True

    def stop(self, grace: float = 5.0) -> None:
        """End it and what it started; not waiting long, as a driver may hold what hangs."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)
            self.wait(grace)


def run(entries: list[Entry], folder: Path, until: float, at_once: int = 1) -> int:
    """Run what has no row yet, then what is to be tried again, so many at a time.

    Returns how many are left for want of time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = {entry.key: load(folder, entry.key) for entry in entries}
    waiting = [entry for entry in entries if rows[entry.key] is None]
    waiting += [entry for entry in entries if (rows[entry.key] or {}).get("again")]
    running: dict[Child, tuple[Entry, float, int]] = {}
    left = 0
    try:
        while running or (waiting and time.time() < until):
            while waiting and len(running) < at_once and time.time() < until:
                entry, start = waiting.pop(0), time.time()
                work = functools.partial(_work, entry, folder, min(until, start + entry.limit))
                log = file_of(folder, entry.key, ".txt")
                said = log.stat().st_size if log.exists() else 0
                running[Child(work, log)] = (entry, start, said)
            for child, (entry, start, said) in list(running.items()):
                spent, is_late = time.time() - start, time.time() >= until
                if not child.wait() and spent < entry.limit and not is_late:
                    continue
                code = child.code
                child.stop()
                del running[child]
                if code is None and is_late:
                    left += 1  # out of the phase's time, not of its own: no row
                    continue
                if code != 0:
                    # what this try said, behind what earlier ones did
                    log = file_of(folder, entry.key, ".txt").read_bytes()[said:]
                    line = _reason(code, spent, log.decode(errors="replace"))
                    row = {"key": entry.key, "ok": False, "again": True, "line": line}
                    save(file_of(folder, entry.key), row | {"spent": spent})
                print(shown(load(folder, entry.key)))
            time.sleep(0.02)
    finally:
        for child in running:
            child.stop(grace=0.0)
    return len(waiting) + left


def _work(entry: Entry, folder: Path, end: float) -> None:
    # the phase's handler would wait for a kernel that hangs
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    start = time.time()
    row = {"key": entry.key, "ok": True} | entry.work(end)
    save(file_of(folder, entry.key), row | {"spent": time.time() - start})


def _reason(code: int | None, spent: float, log: str) -> str:
    """Why an entry has written no row."""
    if code is None:
        return f"stopped after {spent:.0f} s"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return (log.strip().splitlines() or [f"exit code {code}"])[-1][:300]
