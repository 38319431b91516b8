"""Entries: what is measured, each in a process of its own, and what is kept of it.

An entry is forked from a process that has imported all it needs and never touches the GPU, so it
costs little; a fault, a hang or a death costs that entry alone. Its row is a JSON file. A row that
says "again" is of an entry that failed to end, which a later run tries again, last.
"""

import contextlib
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

_TAIL = 2000


class Context(NamedTuple):
    """Where entries run."""

    is_rehearsal: bool  # on the CPU at tiny shapes
    folder: Path
    machine: dict
    tests: str  # the file of the hardware suite
    limit: float | None  # seconds for an entry, in place of its own

    @property
    def device(self) -> str:
        return "cpu" if self.is_rehearsal else "cuda"


class Entry(NamedTuple):
    """One measurement: ``work`` gets the time at which it is stopped, and returns its row.

    In a row, "ok" False is a failure like an exception, "line" is what is shown of it.
    """

    key: str
    work: Callable[[float], dict]
    limit: float | None = 60.0  # None: the phase's


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


def run(
    entries: list[Entry], folder: Path, until: float, at_once: int = 1, limit: float | None = None
) -> int:
    """Run what has no row yet, then what is to be tried again, so many at a time.

    Returns how many are left for want of time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = {entry.key: load(folder, entry.key) for entry in entries}
    waiting = [entry for entry in entries if rows[entry.key] is None]
    waiting += [entry for entry in entries if (rows[entry.key] or {}).get("again")]
    running: dict[int, tuple[Entry, float, float]] = {}
    cut = 0
    try:
        while running or (waiting and time.time() < until):
            while waiting and len(running) < at_once and time.time() < until:
                entry, start = waiting.pop(0), time.time()
                end = min(until, start + (limit or entry.limit) if entry.limit else until)
                running[_start(entry, folder, end)] = (entry, start, end)
            for pid, (entry, start, end) in list(running.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if not ended and time.time() < end:
                    continue
                _stop(pid, wait=not ended)
                del running[pid]
                if not ended and time.time() >= until:
                    cut += 1  # out of the phase's time, not of its own: no row
                else:
                    _finish(entry, folder, start, status if ended else None)
            time.sleep(0.02)
    finally:
        for pid in running:
            _stop(pid, wait=False)
    return len(waiting) + cut


def _stop(pid: int, wait: bool) -> None:
    """With all that it started; not waiting long, as a driver may hold a process that hangs."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    end = time.time() + 5.0
    while wait and time.time() < end and not os.waitpid(pid, os.WNOHANG)[0]:
        time.sleep(0.02)


def _start(entry: Entry, folder: Path, end: float) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # here too: whichever of the two comes first
        return pid
    code = 1
    try:
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        log = os.open(file_of(folder, entry.key, ".txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        start = time.time()
        row = {"key": entry.key, "ok": True} | entry.work(end)
        save(file_of(folder, entry.key), row | {"spent": time.time() - start})
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _finish(entry: Entry, folder: Path, start: float, status: int | None) -> None:
    row = load(folder, entry.key) or {"key": entry.key}
    if status != 0:
        log = file_of(folder, entry.key, ".txt").read_text(encoding="utf-8", errors="replace")
        if status is None:
            line = f"stopped after {time.time() - start:.0f} s"
        elif os.WIFSIGNALED(status):
            line = f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
        else:
            line = (log.strip().splitlines() or [f"exit code {os.WEXITSTATUS(status)}"])[-1]
        # with what an earlier try found, if there was one
        row |= {"ok": False, "again": True, "line": line[:300], "log": log[-_TAIL:]}
        row |= {"spent": time.time() - start}
        save(file_of(folder, entry.key), row)
    mark = "ok  " if row["ok"] else "FAIL"
    print(f"{mark} {entry.key}: {row.get('line', '')} ({row['spent']:.1f} s)", flush=True)
