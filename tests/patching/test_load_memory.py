"""``load_memory``: which files count, what they must hold, the Hub, hosts that are elsewhere."""

import json
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

import lm2_kernels as lm2
from lm2_kernels.patching import add_memory, get_memory, load_memory
from tools.hosts import bare_llama

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

INDEX = "model.safetensors.index.json"


def _draw(model):
    with torch.no_grad():
        for layer in get_memory(model).layers:
            for parameter in layer.parameters():
                parameter.normal_(std=0.3)
    return model


@pytest.fixture
def saved(tmp_path):
    """A folder as ``save_pretrained`` writes it, and the model's logits."""
    model = bare_llama()
    add_memory(model, memory_slots=4, num_heads=2)
    _draw(model).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", _logits(model)


def _logits(model):
    with torch.no_grad():
        return model(torch.arange(10)[None]).logits


def _loads(folder, want, **options):
    model = bare_llama()
    load_memory(model, folder, **options)
    torch.testing.assert_close(_logits(model), want)


def _split(folder, num_shards=2):
    """The weights in shards with an index; the names take turns."""
    tensors = load_file(folder / "model.safetensors")
    shards = [f"model-{n + 1:05}-of-{num_shards:05}.safetensors" for n in range(num_shards)]
    table = {name: shards[number % num_shards] for number, name in enumerate(sorted(tensors))}
    for shard in shards:
        own = {name: tensor for name, tensor in tensors.items() if table[name] == shard}
        save_file(own, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    _write_index(folder, table)
    return table


def _write_index(folder, table):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": table}))


OTHERS = ("model_ema.safetensors", "adapter_model.safetensors", "zzz.safetensors", "a.safetensors")


@pytest.mark.parametrize("sharded", (False, True))
def test_other_files_do_not_matter(saved, sharded):
    folder, want = saved
    zeros = {n: torch.zeros_like(t) for n, t in load_file(folder / "model.safetensors").items()}
    if sharded:
        _split(folder)
        # what was saved there before it was sharded
        save_file(zeros, folder / "model.safetensors")
    for name in OTHERS:
        save_file(zeros, folder / name)
    (folder / "zzzz.safetensors").write_bytes(b"damaged")
    _loads(folder, want)
    _loads(str(folder), want)


def test_options_of_later_versions_are_what_there_was_before(tmp_path):
    model, folder = bare_llama(), tmp_path / "saved"
    add_memory(model, memory_slots=4, num_heads=2, candidate="read")
    _draw(model).save_pretrained(folder)
    want = _logits(model)
    config = json.loads((folder / "config.json").read_text())
    for name in ("segment_length", "write", "memory_causal", "candidate"):
        del config["lm2_memory"][name]
    (folder / "config.json").write_text(json.dumps(config))
    _loads(folder, want)


def test_an_index_without_its_files_is_of_an_earlier_save(saved):
    """transformers takes the shards away, and leaves the index."""
    folder, want = saved
    table = dict.fromkeys(
        load_file(folder / "model.safetensors"), "model-00001-of-00002.safetensors"
    )
    _write_index(folder, table)
    _loads(folder, want)


def test_wrong_files_are_named(saved):
    folder, _ = saved
    table = _split(folder)
    name = next(name for name in table if ".memory." in name)
    index, model = (folder / INDEX).read_text(), bare_llama()

    def refused(error, message):
        with pytest.raises(error, match=message):
            load_memory(model, folder)
        assert not any(".memory." in name for name in model.state_dict())

    for outside in ("../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", ""):
        _write_index(folder, {**table, name: outside})
        refused(ValueError, "outside of its folder")
    _write_index(folder, {**table, name: "absent.safetensors"})
    refused(FileNotFoundError, r"no such file: .*absent\.safetensors")
    # named for a file that has others
    _write_index(folder, {**table, name: next(f for f in table.values() if f != table[name])})
    refused(ValueError, f"has no {name}".replace(".", r"\."))
    _write_index(folder, {key: file for key, file in table.items() if key != name})
    refused(ValueError, r"block \d in .* does not fit")
    for text in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        (folder / INDEX).write_text(text)
        refused(ValueError, r"index\.json")
    (folder / INDEX).write_text(index)
    shard = folder / table[name]
    shard.write_bytes(shard.read_bytes()[:-9])
    refused(ValueError, "is damaged")
    (folder / INDEX).unlink()
    refused(FileNotFoundError, r"model\.safetensors")
    config = json.loads((folder / "config.json").read_text())
    for options in (3, [], {"slots": 3}):
        (folder / "config.json").write_text(json.dumps({**config, "lm2_memory": options}))
        refused(ValueError, "no options of add_memory")
    (folder / "config.json").write_text("{")
    refused(ValueError, "is not JSON")
    (folder / "config.json").unlink()
    refused(FileNotFoundError, r"config\.json")


def test_two_weights_of_one_name_are_refused(saved):
    folder, _ = saved
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if ".memory." in name)
    save_file({**tensors, f"other.{name}": tensors[name].clone()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="second weight"):
        load_memory(bare_llama(), folder)


class _Hub(types.ModuleType):
    """huggingface_hub, with one repository."""

    def __init__(self, source, cache):
        super().__init__("huggingface_hub")
        self.source, self.cache, self.calls = source, cache, []

    def snapshot_download(self, repo_id, *, allow_patterns, revision, token, cache_dir):
        self.calls.append((repo_id, *allow_patterns, revision, token, cache_dir))
        if repo_id != "user/model":
            raise RuntimeError("404 Client Error\nRepository Not Found")
        folder = self.cache / "0123abcd"
        folder.mkdir(exist_ok=True)
        for name in allow_patterns:
            if (self.source / name).exists():
                (folder / name).write_bytes((self.source / name).read_bytes())
        return str(folder)


@pytest.mark.parametrize("sharded", (False, True))
def test_a_repository_of_the_hub(saved, sharded, tmp_path, monkeypatch):
    """Only what is needed is asked for, all of one commit."""
    folder, want = saved
    shards = sorted(set(_split(folder).values())) if sharded else ["model.safetensors"]
    (folder / "pytorch_model.bin").write_bytes(b"large")
    cache = tmp_path / "cache"
    cache.mkdir()
    hub = _Hub(folder, cache)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.chdir(tmp_path)
    _loads("user/model", want, revision="main", token="secret", cache_dir=cache)
    assert [call[1] for call in hub.calls] == ["config.json", INDEX, *shards]
    assert [call[2] for call in hub.calls] == ["main", *["0123abcd"] * (len(hub.calls) - 1)]
    assert {call[3:] for call in hub.calls} == {("secret", cache)}
    with pytest.raises(OSError, match=r"does not give it: 404 Client Error$"):
        load_memory(bare_llama(), "user/other")
    # a folder of that name comes first
    (tmp_path / "user").mkdir()
    folder.rename(tmp_path / "user" / "model")
    hub.calls.clear()
    _loads("user/model", want)
    assert not hub.calls


@pytest.mark.parametrize(
    "load", (lambda name: load_memory(bare_llama(), name), lm2.LM2ForCausalLM.load)
)
def test_without_the_hub(load, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"'user/model'.*pip install huggingface_hub"):
        load("user/model")
    for name in ("model", "./user/model", "a/b/c", tmp_path / "user" / "model"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            load(name)


def test_the_cache_of_the_hub_offline(saved, tmp_path, monkeypatch):
    """Of huggingface_hub itself, where it is installed."""
    pytest.importorskip("huggingface_hub")
    folder, want = saved
    cache = tmp_path / "cache" / "models--user--model"
    (cache / "refs").mkdir(parents=True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    (cache / "refs" / "main").write_text(commit)
    (cache / "snapshots").mkdir()
    folder.rename(cache / "snapshots" / commit)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    _loads("user/model", want, cache_dir=tmp_path / "cache")
    with pytest.raises(OSError, match="'user/other'"):
        load_memory(bare_llama(), "user/other", cache_dir=tmp_path / "cache")


def test_options_of_the_hub_are_not_for_a_folder(saved):
    folder, _ = saved
    with pytest.raises(ValueError, match="is no repository of the Hub, which revision is for"):
        load_memory(bare_llama(), folder, revision="main")


def test_a_host_on_the_meta_device_keeps_the_weights(saved):
    """Whose own weights come later: those of the memory are there, and not lost."""
    folder, _ = saved
    with torch.device("meta"):
        model = bare_llama()
    load_memory(model, folder)
    wanted = load_file(folder / "model.safetensors")
    for name, parameter in model.named_parameters():
        if ".memory." in name:
            assert torch.equal(parameter, wanted[name]) and parameter.requires_grad, name


def test_an_offloaded_host_has_its_memory_where_it_computes(saved):
    """accelerate's hooks say where, while the weights are on the meta device."""
    folder, want = saved
    model = bare_llama()
    weights = {name: p.detach().clone() for name, p in model.state_dict().items()}
    for block in model.model.layers:
        block.self_attn.q_proj._hf_hook = types.SimpleNamespace(execution_device="cpu")
        block.to("meta")
    load_memory(model, folder)
    assert all(p.device.type == "cpu" for p in get_memory(model).layers[0].parameters())
    model.load_state_dict({**model.state_dict(), **weights}, assign=True)
    torch.testing.assert_close(_logits(model), want)
