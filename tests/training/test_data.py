"""Token ids from text files and arrays: windows, shares, tokenizers."""

import numpy as np
import pytest
import torch

from lm2_kernels.training.data import (
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
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="is empty"):
        Corpus.open([tmp_path / "empty.txt"])


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
