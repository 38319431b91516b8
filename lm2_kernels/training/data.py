"""Training data of your own: text files byte by byte, or arrays of token ids.

Files are mapped, and looked through in pieces: they may be larger than memory.
"""

import codecs
import dataclasses
import hashlib
import json
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lm2_kernels.disk import replace_file
from lm2_kernels.state.hub import Place

__all__ = [
    "RAW_DTYPES",
    "Bytes",
    "Corpus",
    "Ids",
    "Words",
    "load_tokenizer",
    "save_tokenizer",
    "tokenizer_text",
]

# not tokenizer.json, which is what transformers calls a file of another format
TOKENIZER = "lm2_tokenizer.json"
RAW_DTYPES = ("uint8", "uint16", "uint32", "uint64", "int16", "int32", "int64")
# of token ids whose number of embeddings nobody gave: four times the largest that are in use
_LARGEST_VOCABULARY = 2**20
_PIECE = 2**24
# of a digest: the largest file that is read whole, and the pieces of a larger one
_WHOLE, _SAMPLE = 2**28, 2**20
# how files begin that somebody may take for text, and what to do with them
_NUMPY = b"\x93NUMPY"
_MAGIC = {
    _NUMPY: "it is an array of numpy; its name must end in .npy",
    b"PK": "it is a zip archive, as .npz and .pt are; save token ids by numpy.save",
    b"\x1f\x8b": "it is compressed by gzip; decompress it",
    b"BZh": "it is compressed by bzip2; decompress it",
    b"\xfd7zXZ": "it is compressed by xz; decompress it",
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd; decompress it",
    b"PAR1": "it is a Parquet file; write its text or its token ids",
    b"\x89HDF": "it is an HDF5 file; write its text or its token ids",
    b"\xff\xfe": "it is text in UTF-16 or UTF-32; convert it: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "it is text in UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
}


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


def tokenizer_text(tokenizer: Tokenizer) -> str:
    """What ``lm2_tokenizer.json`` holds."""
    content = {"kind": tokenizer.kind}
    if isinstance(tokenizer, Words):
        content["words"] = list(tokenizer.words)
    return json.dumps(content, ensure_ascii=False) + "\n"


def save_tokenizer(folder: str | Path, tokenizer: Tokenizer) -> None:
    """Write ``lm2_tokenizer.json`` beside a model."""
    text = tokenizer_text(tokenizer)
    replace_file(Path(folder) / TOKENIZER, lambda part: part.write_text(text, encoding="utf-8"))


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer beside a model; token ids where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    place = Place("load_tokenizer", folder)
    # version 0.1.0 wrote it under the second name
    paths = (place.path(name) for name in (TOKENIZER, "tokenizer.json"))
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return Ids()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.name != TOKENIZER and "kind" not in content:
            # one of transformers
            return Ids()
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
    def open(
        cls,
        paths: Sequence[str | Path],
        vocab_size: int | None = None,
        dtype: str | None = None,
    ) -> "Corpus":
        """Map files: ``.npy`` arrays of token ids, raw ids of a dtype, or else text in UTF-8.

        All are read once: what is no text, or no token id, is found now.

        Args:
            paths: all of one kind.
            vocab_size: of token ids; one more than the largest id unless given, and then at most
                2**20.
            dtype: of files that hold token ids and nothing else, as nanoGPT's ``.bin`` do: one of
                :data:`RAW_DTYPES`, little-endian.

        Raises:
            OSError: a file cannot be read.
            ValueError: a file is empty, or neither text nor ids, kinds are mixed, or an id is too
                large.
        """
        paths = [Path(path) for path in paths]
        if len({path.suffix == ".npy" for path in paths}) != 1:
            raise ValueError("give text files or .npy arrays of token ids, not both and not none")
        for path in paths:
            # for what is not there, the error of the system
            status = path.stat()
            if path.is_dir():
                path.open("rb").close()
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{path} is no regular file")
            if status.st_size == 0:
                raise ValueError(f"{path} is empty")
        if paths[0].suffix == ".npy":
            if dtype is not None:
                raise ValueError(f"--data-dtype is for raw files, and {paths[0]} says its dtype")
            files = [_map_array(path) for path in paths]
        elif dtype is not None:
            files = [_map_raw(path, dtype) for path in paths]
        else:
            files = [_map_text(path) for path in paths]
            if vocab_size not in (None, Bytes.vocab_size):
                raise ValueError(f"text has 256 tokens, its bytes, not {vocab_size}")
            return cls(tuple(files), Bytes(), Bytes.vocab_size)
        ends = [(int(file.min()), int(file.max())) for file in files]
        for path, (smallest, largest) in zip(paths, ends, strict=True):
            if smallest < 0:
                raise ValueError(f"{path} has negative token ids ({smallest})")
            if vocab_size is not None and largest >= vocab_size:
                raise ValueError(f"{path} has a token id {largest}, but vocab_size is {vocab_size}")
            if vocab_size is None and largest >= _LARGEST_VOCABULARY:
                raise ValueError(
                    f"{path} has a token id {largest}, for which a model would need as many "
                    f"embeddings; if that is meant, give --vocab-size"
                )
        if vocab_size is None:
            vocab_size = max(largest for _, largest in ends) + 1
        return cls(tuple(files), Ids(), vocab_size)

    def digests(self) -> list[str]:
        """One a file, in their order: of its length, dtype and content.

        Of files above 256 MiB it reads 256 pieces of 1 MiB, evenly spread, the first and the last
        among them: a change of some bytes between them is not seen.
        """
        return [_digest(file) for file in self.files]

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


def _pieces(file: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(file), _PIECE):
        yield file[start : start + _PIECE]


def _map_text(path: Path) -> np.ndarray:
    """The bytes of a file, which are text."""
    if path.suffix == ".bin":
        raise ValueError(
            f"{path} may hold token ids; say which with --data-dtype (nanoGPT's are uint16)"
        )
    file = np.memmap(path, np.uint8, "r")
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    for piece in _pieces(file):
        content = piece.tobytes()
        pending = len(decoder.getstate()[0])
        zero = content.find(0)
        try:
            decoder.decode(content, final=done + len(content) == len(file))
            wrong = None if zero < 0 else f"byte {done + zero} is 0"
        except UnicodeDecodeError as error:
            wrong = f"byte {done - pending + error.start} is no UTF-8"
        if wrong is not None:
            start = file[:8].tobytes()
            kind = next((text for magic, text in _MAGIC.items() if start.startswith(magic)), None)
            kind = kind or (
                "token ids without a header need --data-dtype"
                if zero >= 0
                else "convert text in another encoding (iconv -f LATIN1 -t UTF-8); token ids "
                "without a header need --data-dtype"
            )
            raise ValueError(f"{path} is no text in UTF-8 ({wrong}): {kind}")
        done += len(content)
    return file


def _map_raw(path: Path, dtype: str) -> np.ndarray:
    if dtype not in RAW_DTYPES:
        raise ValueError(f"the dtype of raw files is one of {', '.join(RAW_DTYPES)}, got {dtype}")
    kind, size = np.dtype(dtype).newbyteorder("<"), path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
    if start.startswith(_NUMPY):
        raise ValueError(f"{path}: {_MAGIC[_NUMPY]}")
    if size % kind.itemsize:
        raise ValueError(f"{path} has {size} bytes, which is no whole number of {dtype}")
    return np.memmap(path, kind, "r")


def _map_array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # of numpy, of zip files and of pickles
        raise ValueError(f"{path} is no .npy array: {error}") from None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} is no .npy array: it holds several")
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.size == 0:
        raise ValueError(
            f"{path} must be an array of token ids with one axis, got {array.dtype} {array.shape}"
        )
    return array


def _digest(file: np.ndarray) -> str:
    size = file.itemsize * len(file)
    found = hashlib.blake2b(f"{file.dtype.str} {len(file)}".encode(), digest_size=16)
    if size <= _WHOLE:
        for piece in _pieces(file):
            found.update(np.ascontiguousarray(piece))
    else:
        length = _SAMPLE // file.itemsize
        for start in np.linspace(0, len(file) - length, 256).astype(np.int64):
            found.update(np.ascontiguousarray(file[start : start + length]))
    return found.hexdigest()
