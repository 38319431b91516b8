"""The version, and which sources a compiled library is of; imports no torch, so a build can."""

import hashlib
from pathlib import Path

__version__ = "0.1.0"


def sources_digest(folder: Path, pattern: str = "*") -> str:
    """A hash of a folder's files, of all or of those that a pattern matches."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob(pattern) if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
