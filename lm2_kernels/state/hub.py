"""Where a model's files are: a folder, or a repository of the Hugging Face Hub."""

import re
from pathlib import Path


class Place:
    """A folder by its path, or a repository "user/name", whose files come when they are asked for.

    A name is a repository's if it is a string of that form and there is no such folder. The Hub is
    asked by ``huggingface_hub`` (its cache, its login, ``HF_HUB_OFFLINE``), which need not be
    installed for anything else.

    Args:
        op: who asks, for the texts of errors.
        name: the folder or the repository.
        revision: of the repository: a branch, tag or commit. As the rest, not for a folder.
        token: for repositories that are not public; that of the login unless given.
        cache_dir: where the files are kept.

    Raises:
        FileNotFoundError: there is no such folder, and it is no name of a repository.
        ValueError: an option of the Hub is given for a folder.
    """

    def __init__(
        self,
        op: str,
        name: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ):
        self._op = op
        self._name = name
        self._options = {"revision": revision, "token": token, "cache_dir": cache_dir}
        is_name = isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)
        self._is_remote = bool(is_name) and not Path(name).exists()
        given = [option for option, value in self._options.items() if value is not None]
        if given and not self._is_remote:
            raise ValueError(f"{op}: {name} is no repository of the Hub, which {given[0]} is for")

    def path(self, file: str) -> Path:
        """Where a file is, or would be if there were one.

        Raises:
            OSError: the Hub cannot be reached, or has no such repository.
        """
        if not self._is_remote:
            return Path(self._name) / file
        return self._fetch(file) / file

    def existing(self, file: str) -> Path:
        """Where a file is.

        Raises:
            OSError: it is not there; as :meth:`path`.
        """
        path = self.path(file)
        if not path.is_file():
            raise FileNotFoundError(f"{self._op}: no such file: {path}".removeprefix(": "))
        return path

    def _fetch(self, file: str) -> Path:
        """The folder that holds what there is of a file."""
        try:
            from huggingface_hub import snapshot_download  # noqa: PLC0415 - an extra
        except ImportError:
            raise FileNotFoundError(
                f"{self._op}: there is no folder {self._name!r} here; to take it from the Hugging "
                f"Face Hub: pip install huggingface_hub"
            ) from None
        try:
            folder = snapshot_download(self._name, allow_patterns=[file], **self._options)
        except Exception as error:  # those of its own, of its HTTP library, and of the system
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise OSError(
                f"{self._op}: there is no folder {self._name!r} here, and the Hugging Face Hub "
                f"does not give it: {lines[0] if lines else type(error).__name__}"
            ) from error
        # all files of one commit, which a snapshot's folder has as its name
        self._options["revision"] = Path(folder).name
        return Path(folder)
