"""A run's folder: who may write there, and what it holds.

``run.json`` has a run's options, its configuration and the digests of its data; ``progress`` what
it goes on from; ``telemetry.jsonl`` and ``tensorboard`` what the memory did. The model is there
when it is whole.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from lm2_kernels.disk import replace_files
from lm2_kernels.model.config import LM2Config
from lm2_kernels.state import files
from lm2_kernels.terminal import say
from lm2_kernels.training.data import TOKENIZER, Tokenizer, tokenizer_text
from lm2_kernels.training.distributed import is_step, last_progress

PROGRESS = "progress"
TELEMETRY = "telemetry.jsonl"
EVENTS = "tensorboard"
_RUN = "run.json"
_FORMAT = "lm2_kernels run"
# what a kill leaves of :func:`replace_files`; once without the second number
_NAMES = "|".join(map(re.escape, (_RUN, files.CONFIG, files.WEIGHTS, TOKENIZER)))
_PART = re.compile(rf"({_NAMES})\.\d+(-\d+)?\.part")


def check_new(folder: Path, overwrite: bool) -> None:
    """Raise ValueError unless a new run may write into a folder; nothing is touched.

    It may if there is nothing of value. With ``overwrite`` it may replace what ``train`` wrote
    before, beside whatever else there is.

    Raises:
        ValueError: it may not; OSError: the folder cannot be read.
    """
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise ValueError(f"--out {folder} is no folder")
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
    if TELEMETRY in others and {*others} <= {TELEMETRY, EVENTS}:
        raise ValueError(
            f"--out {folder} holds the telemetry of a run that left nothing else: take another "
            f"folder, or begin anew by --overwrite"
        )
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
    replace_files({folder / _RUN: lambda part: part.write_text(text, encoding="utf-8")})


def save_model(
    folder: Path, config: LM2Config, tokenizer: Tokenizer, weights: Mapping[str, Tensor]
) -> None:
    """Write the model; if that cannot be in its folder, for whatever reason, elsewhere.

    Raises:
        OSError: the model is elsewhere, and the text says where; else what was in the way.
    """
    content = {**config.to_dict(), "backend": None}
    texts = {TOKENIZER: tokenizer_text(tokenizer)}
    try:
        files.save(folder, content, weights, texts)
    except Exception as error:
        other = tempfile.mkdtemp(prefix="lm2_kernels-")
        try:
            files.save(other, content, weights, texts)
        except Exception:
            shutil.rmtree(other, ignore_errors=True)
            raise error from None
        raise OSError(f"{error}; the trained model is in {other} instead") from error


def remove_progress(folder: Path, keep: Path | None = None) -> None:
    """Remove the progress of an earlier run, and nothing else."""
    place = folder / PROGRESS
    for path in place.glob("step-*"):
        if is_step(path) and path != keep:
            shutil.rmtree(path)
    with contextlib.suppress(OSError):
        place.rmdir()


def keep_telemetry(folder: Path, step: int) -> None:
    """Cut a run's telemetry behind a step, from which the run goes on: what came later, or in part.

    Raises:
        OSError: it cannot be.
    """
    path, size = folder / TELEMETRY, 0
    if not path.exists():
        return
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            # what was cut off may be the end of the line alone
            is_kept = line.endswith(b"\n") and json.loads(line)["step"] <= step
        except (KeyError, TypeError, ValueError):
            is_kept = False
        if not is_kept:
            break
        size += len(line)
    os.truncate(path, size)


def _remove_telemetry(folder: Path) -> None:
    """Remove the telemetry of an earlier run, and nothing else."""
    if not os.path.lexists(folder / TELEMETRY):
        return
    (folder / TELEMETRY).unlink()
    place = folder / EVENTS
    if place.is_symlink():
        return
    for path in place.glob("events.out.tfevents.*"):
        path.unlink()
    with contextlib.suppress(OSError):
        place.rmdir()


@contextlib.contextmanager
def claimed(folder: Path, *, is_locked: bool, resume: bool, overwrite: bool) -> Iterator[bool]:
    """Make the folder and hold it alone; a run that leaves nothing of value leaves no trace.

    Without ``resume`` progress and telemetry of an earlier run go. Yields whether there is
    progress.

    Args:
        folder: of the run.
        is_locked: by this process (:func:`locked`), as it must be if it was there.
        resume: go on with the run there.
        overwrite: as of :func:`check_new`.

    Raises:
        OSError, ValueError: as :func:`locked` and :func:`check_new`.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.nullcontext() if is_locked else locked(folder):
        try:
            _clean(folder)
            if not resume:
                check_new(folder, overwrite)
                remove_progress(folder)
                _remove_telemetry(folder)
            yield last_progress(folder / PROGRESS) is not None
        finally:
            own = {path.name for path in folder.iterdir()}
            is_worthless = last_progress(folder / PROGRESS) is None and _foreign(folder) is None
            if own <= {_RUN, PROGRESS} and is_worthless:
                remove_progress(folder)
                (folder / _RUN).unlink(missing_ok=True)
            for path in made:
                # whatever is in it keeps it
                with contextlib.suppress(OSError):
                    path.rmdir()


def _clean(folder: Path) -> None:
    """Remove what killed runs left beside what is whole."""
    for path in folder.iterdir():
        if _is_part(path):
            path.unlink()
    last = last_progress(folder / PROGRESS)
    if last is not None:
        remove_progress(folder, keep=last[1])


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder alone, by a lock that ends with the process, however that ends.

    The lock is on the folder itself: no file is made.

    Raises:
        OSError: another process holds it, or it is not there.
    """
    number = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"{folder} is in use by another run") from None
        except OSError as error:
            say(f"{folder} cannot be locked ({error.strerror}): start no second run there")
        # it may have been removed between being opened and being locked
        if not os.path.samestat(os.fstat(number), folder.stat()):
            raise OSError(f"{folder} is in use by another run")
        yield
    finally:
        os.close(number)


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
    if os.path.lexists(folder / TELEMETRY) and not _is_telemetry(folder):
        return TELEMETRY
    place = folder / PROGRESS
    if not os.path.lexists(place):
        return None
    # every run has written its run.json before its progress, and that into a folder of its own
    is_own = (folder / _RUN).exists() and place.is_dir() and not place.is_symlink()
    return None if is_own else PROGRESS


def _is_telemetry(folder: Path) -> bool:
    """Whether a run wrote the telemetry that is there."""
    path = folder / TELEMETRY
    if path.is_symlink() or not path.is_file() or not (folder / _RUN).exists():
        return False
    with path.open("rb") as file:
        begin = file.read(8)
    return begin in (b"", b'{"step":')


def _is_worthless(path: Path) -> bool:
    """Whether it is what a run leaves that was cut short before it had anything."""
    if path.name == PROGRESS:
        return all(map(is_step, path.iterdir()))
    # safetensors has parts of its own
    is_part = _is_part(path) or re.fullmatch(r"\.tmp\w{6}", path.name) is not None
    return is_part or path.name == _RUN


def _is_part(path: Path) -> bool:
    return _PART.fullmatch(path.name) is not None and path.is_file() and not path.is_symlink()
