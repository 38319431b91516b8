"""Token ids from text files and arrays: windows, shares, tokenizers."""

import gzip
import io

import numpy as np
import pytest
import torch

from lm2_kernels.training import data as training_data
from lm2_kernels.training.data import (
    RAW_DTYPES,
    Bytes,
    Corpus,
    Ids,
    Words,
    load_tokenizer,
    save_tokenizer,
)


def test_wrong_data_is_refused(tmp_path):
    path = tmp_path / "x.npy"
    for array, message in (
        (np.zeros((2, 3), np.int64), "one axis"),
        (np.zeros(3), "array of token ids"),
        (np.array([1, -1]), "negative"),
        (np.zeros(0, np.int64), "array of token ids"),
    ):
        np.save(path, array)
        with pytest.raises(ValueError, match=message):
            Corpus.open([path])
    np.save(path, np.arange(9))
    with pytest.raises(ValueError, match="token id 8, but vocab_size is 8"):
        Corpus.open([path], 8)
    path.write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"is no \.npy array"):
        Corpus.open([path])


def _compressed(content: bytes) -> bytes:
    return gzip.compress(content)


def _archive(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _array(values) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(values), allow_pickle=True)
    return file.getvalue()


def _pickled(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


IDS = np.arange(600) % 300
WRONG = [
    ("train.bin", IDS.astype("<u2").tobytes(), "--data-dtype"),
    ("train.bin", b"text after all", "--data-dtype"),
    ("train.dat", IDS.astype("<u2").tobytes(), "--data-dtype"),
    ("train.npz", _archive(ids=IDS), "zip archive"),
    ("train.npy", _archive(ids=IDS), "it holds several"),
    ("train.npy", _archive(ids=IDS)[:40], r"is no \.npy array"),
    ("train.zip", _archive(ids=IDS), "zip archive"),
    ("train.pt", _pickled(torch.arange(9)), "zip archive"),
    ("train.txt.gz", _compressed(b"some text " * 99), "decompress"),
    ("train.txt", _compressed(b"some text " * 99), "decompress"),
    ("train.parquet", b"PAR1\x15\x04\x00\x80PAR1", "Parquet"),
    ("train.h5", b"\x89HDF\r\n\x1a\n\x00", "HDF5"),
    ("train.array", _array(IDS), r"must end in \.npy"),
    ("train.txt", "some text".encode("utf-16"), "iconv"),
    ("train.txt", b"\xfe\xff" + "some text".encode("utf-16-be"), "iconv"),
    ("train.txt", "some text".encode("utf-16-le"), "byte 1 is 0"),
    ("train.txt", "some text".encode("utf-32"), "iconv"),
    ("train.txt", "caf\u00e9 noir".encode("latin-1"), "byte 3 is no UTF-8"),
    ("train.txt", "caf\u00e9".encode()[:-1], "byte 3 is no UTF-8"),
    ("train.txt", b"a text\x00 with", "byte 6 is 0"),
    ("train.jpg", bytes(range(255, -1, -1)), "no text in UTF-8"),
    ("train.txt", b"", "is empty"),
    ("train.npy", b"", "is empty"),
    ("train.npy", _array(IDS)[:200], r"is no \.npy array"),
    ("train.npy", _array([{}, None]), r"is no \.npy array"),
    ("train.npy", _array(IDS.reshape(2, -1)), "one axis"),
    ("train.npy", _array(np.int64(3)), "one axis"),
    ("train.npy", _array(IDS / 2), "array of token ids"),
    ("train.npy", _array(IDS > 3), "array of token ids"),
    ("train.npy", _array(["a", "b"]), "array of token ids"),
    ("train.npy", _array(-IDS), "negative"),
    ("train.npy", _array([1, 2**31]), "token id 2147483648.*--vocab-size"),
    ("train.npy", _array(np.array([1, 2**63], np.uint64)), "token id 9223372036854775808"),
    ("train.npy", _array([1, 2**20]), "--vocab-size"),
]


@pytest.mark.parametrize(
    ("name", "content", "message"), WRONG, ids=lambda v: v[:20] if isinstance(v, str) else ""
)
def test_what_is_no_data_is_one_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        Corpus.open([tmp_path / name])
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_no_file_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError):
        Corpus.open([tmp_path / "absent.txt"])
    with pytest.raises(IsADirectoryError):
        Corpus.open([tmp_path])
    with pytest.raises(ValueError, match="is no regular file"):
        Corpus.open(["/dev/zero"])
    with pytest.raises(ValueError, match="not none"):
        Corpus.open([])


@pytest.mark.parametrize("dtype", RAW_DTYPES)
def test_raw_files(dtype, tmp_path):
    ids = np.arange(100).astype(np.dtype(dtype).newbyteorder("<"))
    path = tmp_path / "train.bin"
    path.write_bytes(ids.tobytes())
    data = Corpus.open([path], dtype=dtype)
    assert (data.vocab_size, type(data.tokenizer)) == (100, Ids)
    (file,) = data.files
    assert np.array_equal(file, ids)
    if ids.itemsize > 1:
        path.write_bytes(ids.tobytes()[:-1])
        with pytest.raises(ValueError, match="no whole number"):
            Corpus.open([path], dtype=dtype)


def test_raw_files_that_are_none(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(9))
    with pytest.raises(ValueError, match="says its dtype"):
        Corpus.open([tmp_path / "a.npy"], dtype="uint16")
    (tmp_path / "a.npy").rename(tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"must end in \.npy"):
        Corpus.open([tmp_path / "a.bin"], dtype="uint16")
    with pytest.raises(ValueError, match="one of uint8"):
        Corpus.open([tmp_path / "a.bin"], dtype="float32")


def test_text_is_checked_in_pieces(tmp_path, monkeypatch):
    """Characters across the borders of pieces are whole."""
    path = tmp_path / "text.txt"
    content = ("a" + "\u00e9\u20ac\U0001f600" * 5).encode()
    for size in range(1, 9):
        monkeypatch.setattr(training_data, "_PIECE", size)
        path.write_bytes(b"\xef\xbb\xbf" + content)
        Corpus.open([path])
        path.write_bytes(content + b"\xff")
        with pytest.raises(ValueError, match=f"byte {len(content)} is no UTF-8"):
            Corpus.open([path])


def test_digests(tmp_path, monkeypatch):
    """Content, length and dtype count; of large files what is between the pieces does not."""
    path = tmp_path / "ids.npy"

    def digest(values):
        np.save(path, values)
        (found,) = Corpus.open([path]).digests()
        return found

    ids = np.arange(5000) % 99
    assert digest(ids) == digest(ids.copy())
    others = [ids[:-1], ids.astype(np.int32), ids[::-1], np.where(np.arange(5000) == 7, 0, ids)]
    assert len({digest(ids), *map(digest, others)}) == 5
    monkeypatch.setattr(training_data, "_WHOLE", 1000)
    monkeypatch.setattr(training_data, "_SAMPLE", 16)
    ends = [np.where(np.arange(5000) == end, 98, ids) for end in (0, 4999)]
    assert len({digest(ids), digest(ids[:-1]), *map(digest, ends)}) == 4


def test_windows(tmp_path):
    """All places of all files come, windows are whole, and ranks share a batch."""
    for number, length in enumerate((10, 4, 25)):
        np.save(tmp_path / f"{number}.npy", np.arange(length) + 100 * number)
    data = Corpus.open([tmp_path / f"{number}.npy" for number in range(3)])
    assert data.vocab_size == 225
    batches = data.batches(8, 4, seed=1)
    seen = set()
    for _, batch in zip(range(100), batches, strict=False):
        ids = batch["input_ids"]
        assert torch.equal(ids, ids[:, :1] + torch.arange(4))
        assert torch.equal(ids, batch["labels"])
        seen |= set(ids[:, 0].tolist())
    assert seen == {*range(7), 100, *range(200, 222)}
    whole = next(data.batches(8, 4, seed=1, first=5))["input_ids"]
    parts = [next(data.batches(8, 4, seed=1, first=5, rank=r, world=2)) for r in (0, 1)]
    assert torch.equal(whole[0::2], parts[0]["input_ids"])
    assert torch.equal(whole[1::2], parts[1]["input_ids"])
    first, last = data.split(0.2, 4)
    assert [len(file) for file in first.files] == [6, 20]
    assert [file[0] for file in last.files] == [6, 220]
    with pytest.raises(ValueError, match="no file is long enough"):
        data.split(0.2, 13)


def test_tokenizers(tmp_path):
    for tokenizer, text in (
        (Bytes(), "naïve"),
        (Words(["a", "b"]), "b a b"),
        (Ids(), "4 17"),
    ):
        save_tokenizer(tmp_path, tokenizer)
        again = load_tokenizer(tmp_path)
        assert type(again) is type(tokenizer)
        assert again.decode(again.encode(text)) == text
    with pytest.raises(ValueError, match="'c' is not one of the words"):
        Words(["a", "b"]).encode("a c")
    with pytest.raises(ValueError, match="takes token ids"):
        Ids().encode("hello")
    with pytest.raises(ValueError, match="twice"):
        Words(["a", "a"])
    path = tmp_path / "lm2_tokenizer.json"
    for text in ("{", "[]", '{"kind": "other"}', '{"kind": "words"}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="names no tokenizer"):
            load_tokenizer(tmp_path)
    path.unlink()
    (tmp_path / "tokenizer.json").write_text('{"kind": "bytes"}')
    assert isinstance(load_tokenizer(tmp_path), Bytes)
    (tmp_path / "tokenizer.json").unlink()
    assert isinstance(load_tokenizer(tmp_path), Ids)


def test_a_tokenizer_of_transformers_is_none_of_ours(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {}}')
    assert isinstance(load_tokenizer(tmp_path), Ids)
    (tmp_path / "lm2_tokenizer.json").write_text('{"version": "1.0", "model": {}}')
    with pytest.raises(ValueError, match="is damaged"):
        load_tokenizer(tmp_path)


def test_text_in_latin_1_is_told_how(tmp_path):
    (tmp_path / "text").write_bytes("déjà vu ".encode("latin-1"))
    with pytest.raises(ValueError, match="iconv -f LATIN1"):
        Corpus.open([tmp_path / "text"])
