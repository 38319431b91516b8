"""A run's folder: who may write there, and what a run remembers of itself.

``run.json`` has a run's options, its configuration and the digests of its data; ``progress`` what
it goes on from. The model is there when it is whole.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

from lm2_kernels.disk import replace_file
from lm2_kernels.state import files
from lm2_kernels.terminal import say
from lm2_kernels.training.data import TOKENIZER
from lm2_kernels.training.distributed import last_progress

PROGRESS = "progress"
_RUN = "run.json"
_LOCK = "run.lock"
_FORMAT = "lm2_kernels run"
# how files begin that a kill left
_PARTS = tuple(f"{name}." for name in (_RUN, files.CONFIG, files.WEIGHTS, TOKENIZER))


def check_new(folder: Path, overwrite: bool, *, is_held: bool = False) -> None:
    """Raise ValueError unless a new run may write into a folder; nothing is touched.

    It may if there is nothing of value. With ``overwrite`` it may replace what ``train`` wrote
    before, beside whatever else there is. ``is_held``: by this process (:func:`claimed`).

    Raises:
        ValueError: it may not; OSError: the folder cannot be read, or a run is writing there.
    """
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise ValueError(f"--out {folder} is no folder")
    if not is_held and (folder / _LOCK).exists():
        with locked(folder):
            pass
    foreign = _foreign(folder)
    if foreign is not None:
        raise ValueError(
            f"--out {folder} holds {foreign}, which is not of train: take another folder"
        )
    if overwrite:
        return
    done = last_progress(folder / PROGRESS)
    if (folder / files.CONFIG).exists():
        raise ValueError(
            f"--out {folder} holds a model already: take another folder, or replace the model by "
            f"--overwrite"
        )
    if done is not None:
        raise ValueError(
            f"--out {folder} holds a run that was cut short after step {done[0]}: go on with "
            f"--resume, or begin anew by --overwrite"
        )
    others = sorted(path.name for path in folder.iterdir() if not _is_worthless(path))
    if others:
        raise ValueError(
            f"--out {folder} is not empty (it holds {others[0]}): take another folder, or "
            f"--overwrite, which leaves alone what is not of train"
        )


def read_run(folder: Path) -> dict:
    """What :func:`write_run` wrote.

    Raises:
        OSError, ValueError: the folder holds no run.
    """
    path = folder / _RUN
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no run to go on with (there is no {path})")
    content = files.read_json(path)
    if content.get("format") != _FORMAT or not isinstance(content.get("options"), dict):
        raise ValueError(f"{path} is damaged, or not of train")
    return content


def write_run(folder: Path, content: Mapping[str, object]) -> None:
    """Write ``run.json``."""
    text = json.dumps({"format": _FORMAT, **content}, indent=1) + "\n"
    replace_file(folder / _RUN, lambda part: part.write_text(text, encoding="utf-8"))


def remove_progress(folder: Path) -> None:
    """Remove the progress of an earlier run, and nothing else."""
    place = folder / PROGRESS
    for path in place.glob("step-*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    with contextlib.suppress(OSError):
        place.rmdir()


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make the folder and hold it alone; a run that leaves nothing of value leaves no trace."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder):
            try:
                yield
            finally:
                own = {path.name for path in folder.iterdir()}
                if own <= {_RUN, _LOCK, PROGRESS} and last_progress(folder / PROGRESS) is None:
                    remove_progress(folder)
                    (folder / _RUN).unlink(missing_ok=True)
    finally:
        if is_new:
            # whatever is in it keeps it
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder alone, by a lock that ends with the process, however that ends.

    Raises:
        OSError: another process holds it.
    """
    path = folder / _LOCK
    file = _open_lock(path)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
    finally:
        # while it is held: whoever waits for it would find a file of no folder, and looks again
        path.unlink(missing_ok=True)
        file.close()


def _open_lock(path: Path) -> TextIO:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            raise OSError(f"{path.parent} is in use by another run ({holder})") from None
        except OSError as error:
            say(f"{path.parent} cannot be locked ({error.strerror}): start no second run there")
        # it may have been removed between being opened and being locked
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def _foreign(folder: Path) -> str | None:
    """What is in the way of a run and not of one."""
    if not files.is_own(folder):
        names = (files.CONFIG, files.WEIGHTS, files.INDEX)
        return next(name for name in names if os.path.lexists(folder / name))
    if os.path.lexists(folder / _RUN):
        try:
            read_run(folder)
        except ValueError:
            return _RUN
    place = folder / PROGRESS
    return PROGRESS if os.path.lexists(place) and not place.is_dir() else None


def _is_worthless(path: Path) -> bool:
    """Whether it is what a run leaves that was cut short before it had anything."""
    # safetensors has parts of its own
    is_part = path.name.endswith(".part") and path.name.startswith(_PARTS)
    is_part |= re.fullmatch(r"\.tmp\w{6}", path.name) is not None
    return is_part or path.name in (_RUN, _LOCK, PROGRESS, TOKENIZER)
