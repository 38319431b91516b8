"""Training data of your own: text files byte by byte, or arrays of token ids.

Files are mapped, not read: they may be larger than memory.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["Bytes", "Corpus", "Ids", "Words", "load_tokenizer", "save_tokenizer"]

# not tokenizer.json, which is what transformers calls a file of another format
TOKENIZER = "lm2_tokenizer.json"


class Bytes:
    """Every byte of UTF-8 text is a token."""

    kind = "bytes"
    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        """The text's bytes."""
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """The bytes' text; what is no UTF-8 shows as U+FFFD."""
        return bytes(tokens).decode(errors="replace")


class Words:
    """Words between blanks, from a fixed list."""

    kind = "words"

    def __init__(self, words: Sequence[str]):
        self.words = tuple(words)
        self._numbers = {word: number for number, word in enumerate(self.words)}
        if len(self._numbers) != len(self.words):
            raise ValueError("Words: a word occurs twice")

    @property
    def vocab_size(self) -> int:
        """How many words there are."""
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """The numbers of the text's words.

        Raises:
            ValueError: a word is not in the list.
        """
        for word in text.split():
            if word not in self._numbers:
                raise ValueError(f"{word!r} is not one of the words that the model knows")
        return [self._numbers[word] for word in text.split()]

    def decode(self, tokens: Sequence[int]) -> str:
        """The words, with a blank between."""
        return " ".join(self.words[token] for token in tokens)


class Ids:
    """Numbers that some other program made and understands."""

    kind = "ids"

    def encode(self, text: str) -> list[int]:
        """Numbers written with blanks or commas between.

        Raises:
            ValueError: something else is written.
        """
        try:
            return [int(part) for part in text.replace(",", " ").split()]
        except ValueError:
            raise ValueError(f"the model takes token ids such as '17 4 9', got {text!r}") from None

    def decode(self, tokens: Sequence[int]) -> str:
        """The numbers, with a blank between."""
        return " ".join(map(str, tokens))


Tokenizer = Bytes | Words | Ids


def save_tokenizer(folder: str | Path, tokenizer: Tokenizer) -> None:
    """Write ``lm2_tokenizer.json`` beside a model."""
    content = {"kind": tokenizer.kind}
    if isinstance(tokenizer, Words):
        content["words"] = list(tokenizer.words)
    text = json.dumps(content, ensure_ascii=False) + "\n"
    (Path(folder) / TOKENIZER).write_text(text, encoding="utf-8")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer beside a model; token ids where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    # version 0.1.0 wrote it under the second name
    paths = [Path(folder) / name for name in (TOKENIZER, "tokenizer.json")]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return Ids()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["kind"] == "words":
            return Words(content["words"])
        return {"bytes": Bytes, "ids": Ids}[content["kind"]]()
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: it names no tokenizer") from None


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token files, and windows of them."""

    files: tuple[np.ndarray, ...]  # of integers, one axis, mapped
    tokenizer: Tokenizer
    vocab_size: int

    @classmethod
    def open(cls, paths: Sequence[str | Path], vocab_size: int | None = None) -> "Corpus":
        """Map files: ``.npy`` arrays of token ids, or else text.

        Args:
            paths: all of one kind.
            vocab_size: of token ids; unless given, one more than the largest id, which reads the
                files once.

        Raises:
            OSError: a file cannot be read.
            ValueError: a file is empty or no array of ids, kinds are mixed, or an id is too large.
        """
        paths = [Path(path) for path in paths]
        if len({path.suffix == ".npy" for path in paths}) != 1:
            raise ValueError("give text files or .npy arrays of token ids, not both and not none")
        if paths[0].suffix != ".npy":
            if vocab_size not in (None, Bytes.vocab_size):
                raise ValueError(f"text has 256 tokens, its bytes, not {vocab_size}")
            files = [_map_bytes(path) for path in paths]
            return cls(tuple(files), Bytes(), Bytes.vocab_size)
        files = [_map_array(path) for path in paths]
        largest = max(int(file.max()) for file in files)
        if vocab_size is not None and largest >= vocab_size:
            raise ValueError(f"there is a token id {largest}, but vocab_size is {vocab_size}")
        return cls(tuple(files), Ids(), largest + 1 if vocab_size is None else vocab_size)

    def split(self, share: float, length: int) -> tuple["Corpus", "Corpus"]:
        """The files without their last part, and those parts, of at least ``length`` tokens each.

        Files too short for that are left out.

        Raises:
            ValueError: the share is not from 0 to 1, or nothing would be left to train on.
        """
        if not 0.0 <= share < 1.0:
            raise ValueError(f"the validation share must be from 0 to 1, got {share}")
        cuts = [len(file) - max(int(len(file) * share), length) for file in self.files]
        kept = [(file, cut) for file, cut in zip(self.files, cuts, strict=True) if cut >= length]
        if not kept:
            raise ValueError(
                f"no file is long enough for windows of {length} tokens to train on and to "
                f"validate with"
            )
        first, last = [file[:cut] for file, cut in kept], [file[cut:] for file, cut in kept]
        return (
            dataclasses.replace(self, files=tuple(first)),
            dataclasses.replace(self, files=tuple(last)),
        )

    def batches(
        self,
        batch: int,
        length: int,
        seed: int,
        *,
        first: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[dict[str, Tensor]]:
        """Random windows without end, ``input_ids`` and ``labels`` (B / world, L).

        Batch ``first + n`` is a function of ``seed`` and its number alone, so a run can be gone on
        with, and the ranks together see what one process alone would see.
        """
        counts = np.array([len(file) - length + 1 for file in self.files])
        if counts.min() < 1:
            raise ValueError(f"a file has fewer than {length} tokens")
        ends = counts.cumsum()
        number = first
        while True:
            chosen = np.random.default_rng((seed, number)).integers(ends[-1], size=batch)
            rows = []
            for start in chosen[rank::world]:
                file = int(np.searchsorted(ends, start, side="right"))
                offset = int(start - (ends[file - 1] if file else 0))
                rows.append(self.files[file][offset : offset + length].astype(np.int64))
            ids = torch.from_numpy(np.stack(rows))
            yield {"input_ids": ids, "labels": ids}
            number += 1


def _map_bytes(path: Path) -> np.ndarray:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    return np.memmap(path, np.uint8, "r")


def _map_array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no .npy array: {error}") from None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} is no .npy array: it holds several")
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.size == 0:
        raise ValueError(
            f"{path} must be an array of token ids with one axis, got {array.dtype} {array.shape}"
        )
    if array.dtype.kind == "i" and array.min() < 0:
        raise ValueError(f"{path} has negative token ids")
    return array
