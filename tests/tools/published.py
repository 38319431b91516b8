"""bAbI's published files, where they are: they are not part of the project.

``LM2_KERNELS_BABI`` names their folder, or the archive of it; else ``shared/babi-en-10k.tar.xz``
beside the checkout is looked for.
"""

import functools
import os
import tarfile
import tempfile
from pathlib import Path

_ARCHIVE = Path(__file__).parents[3] / "shared" / "babi-en-10k.tar.xz"


def babi_reason() -> str | None:
    """Why there are none."""
    if "LM2_KERNELS_BABI" in os.environ or _ARCHIVE.exists():
        return None
    return "bAbI's published files are not here; LM2_KERNELS_BABI=FOLDER says where they are"


@functools.cache
def babi_folder() -> Path:
    """The folder of the files."""
    place = Path(os.environ.get("LM2_KERNELS_BABI", _ARCHIVE))
    if place.is_dir():
        return place
    folder = tempfile.TemporaryDirectory()
    babi_folder.kept = folder  # as long as the process
    with tarfile.open(place) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".txt"):
                Path(folder.name, Path(member.name).name).write_bytes(
                    archive.extractfile(member).read()
                )
    return Path(folder.name)
