"""Saved models: what comes back, and what a damaged or foreign folder says."""

import concurrent.futures
import errno
import json
import os
import re
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lm2_kernels import LM2ForCausalLM, disk
from lm2_kernels.state import files
from tools.models import KINDS, random_ids, small_model


@pytest.mark.parametrize(("formulation", "flow"), KINDS)
@pytest.mark.parametrize("tied", (False, True))
def test_a_saved_model_comes_back(formulation, flow, tied, tmp_path):
    options = {"formulation": formulation, "flow": flow, "tie_word_embeddings": tied}
    model = small_model(memory_init="learned", backend="eager", **options)
    model.save(tmp_path / "new" / "model")
    model.save(tmp_path / "new" / "model")
    again = LM2ForCausalLM.load(tmp_path / "new" / "model", backend="eager")
    assert again.config == model.config
    assert LM2ForCausalLM.load(tmp_path / "new" / "model").config.backend is None
    ids = random_ids(2, 9)
    assert torch.equal(again(ids).logits, model(ids).logits)
    half = LM2ForCausalLM.load(tmp_path / "new" / "model", dtype=torch.bfloat16)
    assert half(ids).logits.dtype == torch.bfloat16
    # what was loaded trains
    again(ids, ids).loss.backward()
    assert all(parameter.grad is not None for parameter in again.parameters())
    assert sorted(p.name for p in (tmp_path / "new" / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_all_wrong_keys_are_listed(tmp_path):
    small_model().save(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    weights["extra.one"] = weights.pop("model.norm.weight")
    weights["extra.two"] = weights.pop("lm_head.weight")
    weights["model.embed_tokens.weight"] = torch.zeros(3, 4)
    save_file(weights, path)
    with pytest.raises(ValueError, match="does not fit the configuration") as raised:
        LM2ForCausalLM.load(tmp_path)
    for text in (
        "missing: lm_head.weight, model.norm.weight",
        "unexpected: extra.one, extra.two",
        "of another shape: model.embed_tokens.weight (3, 4) for (61, 24)",
    ):
        assert text in str(raised.value)
    small_model().save(tmp_path)
    weights = load_file(path)
    save_file({**weights, "model.norm.weight": torch.ones(24, dtype=torch.int64)}, path)
    with pytest.raises(ValueError, match=r"not floating-point: model\.norm\.weight"):
        LM2ForCausalLM.load(tmp_path)


def test_a_tied_head_may_be_saved_too(tmp_path):
    model = small_model(tie_word_embeddings=True)
    weights = model.state_dict()
    model.save(tmp_path, {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    ids = random_ids(1, 4)
    assert torch.equal(LM2ForCausalLM.load(tmp_path)(ids).logits, model(ids).logits)


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        LM2ForCausalLM.load(tmp_path / "absent")
    small_model().save(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-9], whole[:5], b""):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
            LM2ForCausalLM.load(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        LM2ForCausalLM.load(tmp_path)
    values = json.loads(config.read_text())
    for text, message in (
        (config.read_text()[:-9], "is not JSON"),
        ("[]", "is not the configuration"),
        (json.dumps({"hidden_size": 3}), "is not the configuration"),
        (json.dumps({**values, "new_option": 1}), r"unknown options \['new_option'\]"),
        (json.dumps({k: v for k, v in values.items() if k != "vocab_size"}), "missing options"),
        (json.dumps({**values, "hidden_size": 25}), "must divide hidden_size"),
    ):
        config.write_text(text)
        weights.write_bytes(whole)
        with pytest.raises(ValueError, match=message):
            LM2ForCausalLM.load(tmp_path)


def test_pickled_weights_hold_tensors_alone(tmp_path):
    path = tmp_path / "weights.pt"
    tensors = {"a": torch.arange(3.0)}
    torch.save(tensors, path)
    assert torch.equal(files.load_tensors(path)["a"], tensors["a"])
    for content in ({"a": object()}, [1], {"a": 1}):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"weights\.pt"):
            files.load_tensors(path)
    path.write_bytes(b"what")
    with pytest.raises(ValueError, match="damaged or holds more than tensors"):
        files.load_tensors(path)


def _foreign_config(folder):
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')


def _foreign_weights(folder):
    (folder / "model.safetensors").write_bytes(b"weights")


def _own_beside_an_index(folder):
    small_model().save(folder)
    _foreign_index(folder)


def _foreign_index(folder):
    (folder / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    "make", (_foreign_config, _foreign_weights, _foreign_index, _own_beside_an_index)
)
def test_a_model_of_another_kind_is_not_replaced(make, tmp_path):
    make(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="a model of another kind"):
        small_model().save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_link_is_replaced_and_not_its_target(tmp_path):
    small_model().save(tmp_path / "one")
    before = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    (tmp_path / "two").mkdir()
    for name in before:
        (tmp_path / "two" / name).symlink_to(tmp_path / "one" / name)
    small_model(seed=1).save(tmp_path / "two")
    assert {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()} == before
    assert not any(path.is_symlink() for path in (tmp_path / "two").iterdir())


def test_two_threads_write_one_file(tmp_path):
    meeting = threading.Barrier(2)

    def write(part):
        part.write_text("whole")
        meeting.wait(60)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: disk.replace_file(tmp_path / "file", write), range(2)))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]


def test_a_state_goes_into_a_pipe(tmp_path):
    state = small_model().initial_state(1)
    state.save(tmp_path / "state")
    reader, writer = os.pipe()
    state.save(f"/dev/fd/{writer}")
    os.close(writer)
    with open(reader, "rb") as file:
        assert file.read() == (tmp_path / "state").read_bytes()


@pytest.mark.parametrize("name", ("model.safetensors", "config.json"))
def test_a_save_that_fails_leaves_the_earlier_model(name, tmp_path, monkeypatch):
    """Whichever of its files it is that has no place."""
    ids = random_ids(1, 4)
    model = small_model()
    model.save(tmp_path)
    real = disk.os.fsync

    def full(descriptor):
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "fsync", full)
        message = rf"cannot write .*{name}: No space left on device"
        with pytest.raises(OSError, match=message) as raised:
            small_model(seed=1, rope_theta=9.0).save(tmp_path)
    assert raised.value.errno == errno.ENOSPC
    assert torch.equal(LM2ForCausalLM.load(tmp_path)(ids).logits, model(ids).logits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("path", "error"),
    (("/dev/full", "No space left"), ("absent/state", "No such file"), (".", "Is a directory")),
)
def test_a_state_that_cannot_be_saved_is_one_line(path, error, tmp_path, monkeypatch):
    """And a device stays a device."""
    monkeypatch.chdir(tmp_path)
    state = small_model().initial_state(1)
    with pytest.raises(OSError, match=f"cannot write {re.escape(path)}: {error}"):
        state.save(path)
    assert not list(tmp_path.iterdir())
    state.save("/dev/null")
    assert Path("/dev/full").is_char_device() and Path("/dev/null").is_char_device()


def test_a_model_in_shards_is_loaded(tmp_path):
    """By its index, as tools leave it that split large files; other files do not matter."""
    model, ids = small_model(), random_ids(1, 4)
    model.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "model_ema.safetensors")
    parts = {f"model-{n}.safetensors": list(weights)[n::2] for n in (0, 1)}
    for file, names in parts.items():
        save_file({name: weights[name] for name in names}, tmp_path / file)
    table = {name: file for file, names in parts.items() for name in names}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": table}))
    assert torch.equal(LM2ForCausalLM.load(tmp_path)(ids).logits, model(ids).logits)
    missing = table.pop("model.norm.weight")
    index.write_text(json.dumps({"weight_map": table}))
    with pytest.raises(ValueError, match=r"missing: model\.norm\.weight"):
        LM2ForCausalLM.load(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        LM2ForCausalLM.load(tmp_path)
