"""Files that are whole, or as they were before."""

import errno
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path


def replace_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """:func:`replace_files` of one file, but of a link it is the target that is replaced."""
    _replace({Path(path): write}, follow=True)


def replace_files(writes: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write files beside their places, and move them there in order when all of them are whole.

    Whoever reads sees of each file the old one or the new one, also after a kill or with a full
    disk. A link is replaced, and its target stays. What is no file (a pipe, a terminal) is written
    to.

    Args:
        writes: for each file a function that writes it to the path that it is given.

    Raises:
        OSError: one cannot be written, and all are as they were; or one that is whole cannot be
            moved, and those before it are new.
    """
    _replace(writes, follow=False)


def _replace(writes: Mapping[Path, Callable[[Path], object]], follow: bool) -> None:
    parts: dict[Path, Path] = {}
    try:
        for wanted, write in writes.items():
            try:
                if wanted.is_dir():
                    raise IsADirectoryError(errno.EISDIR, "")
                # before links are followed: a pipe's leads nowhere
                if wanted.exists() and not wanted.is_file():
                    _copy_into(wanted, write)
                    continue
                path = Path(os.path.realpath(wanted)) if follow else wanted
                # two threads of a process may write to one path
                part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
                parts[part] = path
                write(part)
                # a disk may say only now that it is full
                with part.open("rb") as file:
                    os.fsync(file.fileno())
            except BrokenPipeError:
                raise
            except Exception as error:
                raise _about(wanted, error) from None
        for part, path in parts.items():
            try:
                os.replace(part, path)
            except OSError as error:
                raise _about(path, error) from None
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def _copy_into(path: Path, write: Callable[[Path], object]) -> None:
    # not by ``write`` itself: there are libraries that put a file in the place of a device
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / path.name
        write(part)
        with part.open("rb") as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)


def _about(path: Path, error: Exception) -> Exception:
    """The error with the path that was asked for; what is no error of the system as it is."""
    number = getattr(error, "errno", None)
    if number is None:
        # that of a library which tells of the system's error in its text alone
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else None
    if number is None:
        return error
    return OSError(number, f"cannot write {path}: {os.strerror(number)}")
