"""Caches of a patched model: pickled, copied, saved, and gone on from elsewhere."""

import copy
import gc
import importlib
import io
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lm2_kernels import get_memory
from tools.hosts import bare_llama, begin, go_on, hosted, llama, new_cache, tokens, transformers
from tools.models import KINDS

pytestmark = hosted
RULED = ("paper-chunk", "release-all")
every_kind = pytest.mark.parametrize("formulation", ("paper", "release", *RULED))
# in a segment, at the end of one, and where rows stand at different places
PLACES = [(13, False), (16, False), (13, True)]
every_place = pytest.mark.parametrize(("length", "is_padded"), PLACES)

# a process that begins chats and goes on with them, or one that only goes on
CHATS = """
import sys
import torch
from lm2_kernels import get_memory
from lm2_kernels import MemoryState
from tools.hosts import go_on, begin, llama, new_cache
from tools.models import KINDS, random_ids, small_model
torch.set_num_threads(1)
what, folder, cases = sys.argv[1], sys.argv[2], eval(sys.argv[3])
for formulation in ("paper", "release", "paper-chunk", "release-all"):
    model = llama(formulation)
    for length, is_padded in cases:
        name = f"{folder}/{formulation}-{length}-{is_padded}"
        _, cache, rest, mask = begin(model, length, is_padded)
        if what == "begin":
            get_memory(model).save_cache(name, cache)
        else:
            cache = new_cache()
            get_memory(model).load_cache(name, cache)
        torch.save(go_on(model, cache, rest, mask), f"{name}.{what}")

# and of LM2ForCausalLM by its state, rows at different places
for formulation, flow in KINDS:
    name, ids = f"{folder}/model-{formulation}-{flow}", random_ids(2, 21)
    model = small_model(torch.float32, formulation=formulation, flow=flow).eval()
    mask = torch.ones(2, 10)
    mask[0, :3] = 0
    with torch.no_grad():
        if what == "begin":
            state = model(ids[:, :10], attention_mask=mask, use_cache=True).memory
            state.save(name)
        else:
            state = MemoryState.load(name)
        steps = []
        for token in ids[:, 10:].split(1, dim=1):
            output = model(token, memory=state, use_cache=True)
            state = output.memory
            steps.append(output.logits)
    torch.save(torch.cat(steps, dim=1), f"{name}.{what}")
"""


def _by_torch(thing, weights_only=False):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


COPIES = {
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "deepcopy": copy.deepcopy,
    "torch.save": _by_torch,
    "twice": lambda thing: copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(thing)))),
}


@every_kind
@every_place
@pytest.mark.parametrize("how", COPIES)
def test_copies_go_on(how, length, is_padded, formulation):
    """Of a cache and of a whole output: bit for bit, and the original is left alone."""
    model = llama(formulation)
    output, cache, rest, mask = begin(model, length, is_padded)
    copied = COPIES[how](cache)
    in_output = COPIES[how](output).past_key_values
    assert type(copied).__name__ == "DynamicCache"
    # another model with the same weights, as another process has it
    other = model if how == "deepcopy" else llama(formulation)
    want = go_on(model, cache, rest, mask)
    assert torch.equal(go_on(other, copied, rest, mask), want)
    if in_output is not None and hasattr(in_output, "get_seq_length"):
        assert torch.equal(go_on(other, in_output, rest, mask), want)


@pytest.mark.parametrize("is_learning", (False, True))
def test_outputs_pickle(is_learning):
    with torch.set_grad_enabled(is_learning):
        output = llama()(tokens(), use_cache=True)
    again = pickle.loads(pickle.dumps(output))
    assert torch.equal(again.logits, output.logits)


def test_a_pickled_cache_knows_its_model():
    model = llama()
    _, cache, rest, _ = begin(model)
    other = llama()
    with torch.no_grad():
        get_memory(other).layers[1].query_proj.weight.mul_(1.01)
    again = pickle.loads(pickle.dumps(cache))
    with pytest.raises(ValueError, match="another model"):
        other(rest, past_key_values=again)
    # pickled again before it was used
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(cache))))
    go_on(model, again, rest)
    # and batch operations take the memory along
    again = pickle.loads(pickle.dumps(cache))
    for each in (again, cache):
        each.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(go_on(model, again, rest), go_on(model, cache, rest))


def test_a_file_of_tensors_alone():
    """torch.load with weights_only, once transformers' own classes are allowed."""
    model = llama()
    _, cache, rest, _ = begin(model)
    file, allowed = io.BytesIO(), []
    torch.save(cache, file)
    while True:
        file.seek(0)
        try:
            with torch.serialization.safe_globals(allowed):
                again = torch.load(file, weights_only=True)
            break
        except pickle.UnpicklingError as error:
            name = re.search(r"GLOBAL (\S+) was not an allowed", str(error))[1]
            module, _, leaf = name.rpartition(".")
            assert module.startswith("transformers."), error
            allowed.append(getattr(importlib.import_module(module), leaf))
    assert torch.equal(go_on(model, again, rest), go_on(model, cache, rest))


def test_a_chat_goes_on_in_another_process(tmp_path):
    """One file, in mid-segment, bit-equal logits."""
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tests, tests.parent)))}
    for what in ("begin", "go on"):
        command = [sys.executable, "-c", CHATS, what, str(tmp_path), repr(PLACES)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    files = sorted(tmp_path.glob("*.begin"))
    assert len(files) == 4 * len(PLACES) + len(KINDS)
    for file in files:
        want = torch.load(file)
        assert torch.equal(torch.load(file.with_suffix(".go on")), want), file.name


def test_a_cache_of_windows_is_saved(tmp_path):
    """Its keys are fewer than its tokens."""
    from lm2_kernels import add_memory

    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.MistralConfig(**sizes, **heads, sliding_window=6, pad_token_id=0)
    model = transformers.MistralForCausalLM(config).eval()
    memory = add_memory(model, memory_slots=8, num_heads=4, zero_init=False).memory
    try:
        caches = [transformers.DynamicCache(config=config) for _ in range(2)]
    except TypeError:
        pytest.skip("this transformers cuts no cache to a window")
    ids = tokens()
    with torch.no_grad():
        model(ids[:, :13], past_key_values=caches[0])
        memory.save_cache(tmp_path / "chat", caches[0])
        with pytest.raises(NotImplementedError, match=r"config=model\.config"):
            memory.load_cache(tmp_path / "chat", refused := new_cache())
        assert refused.get_seq_length() == 0
        memory.load_cache(tmp_path / "chat", caches[1])
        assert torch.equal(*(go_on(model, cache, ids[:, 13:]) for cache in caches))


def test_what_cannot_be_saved_or_loaded(tmp_path):
    model, path = llama(), tmp_path / "chat.safetensors"
    memory = get_memory(model)
    _, cache, _, _ = begin(model)
    memory.save_cache(path, cache)
    assert [file.name for file in tmp_path.iterdir()] == ["chat.safetensors"]
    with pytest.raises(ValueError, match="empty"):
        memory.save_cache(path, new_cache())
    with pytest.raises(ValueError, match="must be empty"):
        memory.load_cache(path, cache)
    with pytest.raises(OSError, match="nowhere"):
        memory.load_cache(tmp_path / "nowhere", new_cache())

    other = llama()
    with torch.no_grad():
        get_memory(other).layers[0].key_proj.weight.add_(0.01)
    with pytest.raises(ValueError, match="other weights"):
        get_memory(other).load_cache(path, new_cache())
    with pytest.raises(ValueError, match="another model"):
        get_memory(other).save_cache(path, cache)

    bare, kept = bare_llama(), new_cache()
    bare(tokens(), past_key_values=kept)
    with pytest.raises(ValueError, match="has not read"):
        memory.save_cache(path, kept)

    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        memory.load_cache(path, new_cache())
    path.write_bytes(whole)
    tensors = load_file(path)
    for spoilt in ({"x": torch.zeros(2)}, {k: v for k, v in tensors.items() if "memory" in k}):
        save_file(spoilt, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="holds no cache"):
            memory.load_cache(path, new_cache())


def _static(config):
    options = {"config": config, "max_cache_len": 32}
    try:
        return transformers.StaticCache(**options)
    except TypeError:
        return transformers.StaticCache(**options, max_batch_size=2)


def _quantized(config):
    """As HQQ's: what is quantised is no tensor, but a pair."""
    kinds = transformers.cache_utils

    class Pairs:
        def _quantize(self, tensor, axis):
            return tensor.half(), {"axis": axis}

        def _dequantize(self, pair):
            return pair[0].float()

    if hasattr(kinds, "QuantizedLayer"):
        layer = type("HQQQuantizedLayer", (Pairs, kinds.QuantizedLayer), {})
        cache = transformers.DynamicCache()
        cache.layers = [layer(residual_length=4) for _ in range(2)]
        return cache
    if hasattr(kinds, "DynamicLayer"):
        pytest.skip("this transformers quantises beside the layers")
    options = kinds.QuantizedCacheConfig(backend="HQQ", residual_length=4)
    return type("HQQQuantizedCache", (Pairs, kinds.QuantizedCache), {})(options)


def _fp8(config):
    if not hasattr(transformers.cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers has no such cache")
    return transformers.QuantizedCache("fp8", config)


OTHERS = {
    "static": _static,
    "quantized": _quantized,
    "fp8": _fp8,
    "one's own": lambda config: type("Mine", (transformers.DynamicCache,), {})(),
}


@pytest.mark.parametrize("length", (13, 16))
@pytest.mark.parametrize("kind", OTHERS)
def test_other_caches_are_not_saved(kind, length, tmp_path):
    """Nor loaded: what they hold beside keys and values would be lost."""
    model, ids = llama(), tokens()
    memory, path = get_memory(model), tmp_path / "chat"
    cache, empty = (OTHERS[kind](model.config) for _ in range(2))
    with torch.no_grad():
        model(ids[:, :length], past_key_values=cache, cache_position=torch.arange(length))
    with pytest.raises(NotImplementedError, match="takes a DynamicCache, not this"):
        memory.save_cache(path, cache)
    assert not path.exists()
    memory.save_cache(path, begin(model)[1])
    with pytest.raises(NotImplementedError, match="takes a DynamicCache, not this"):
        memory.load_cache(path, empty)
    assert int(empty.get_seq_length()) == 0


def test_a_cache_of_states_is_not_saved(tmp_path):
    """Of a host that has linear attention beside the keys and values."""
    from lm2_kernels import add_memory

    if not hasattr(transformers, "FalconH1Config"):
        pytest.skip("this transformers has no such model")
    config = transformers.FalconH1Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, mamba_d_ssm=32, mamba_n_heads=4,
        mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8, pad_token_id=0,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = transformers.FalconH1ForCausalLM(config).eval()
    memory = add_memory(model, memory_slots=8, num_heads=4).memory
    with torch.no_grad():
        cache = model(tokens(), use_cache=True).past_key_values
    if cache is None:
        pytest.skip("this transformers makes no cache for it")
    with pytest.raises(NotImplementedError, match=r"not this .*may hold more"):
        memory.save_cache(tmp_path / "chat", cache)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_loaded_leaves_the_cache_empty(tmp_path):
    model, path = llama(), tmp_path / "chat.safetensors"
    memory = get_memory(model)
    _, cache, rest, _ = begin(model)
    memory.save_cache(path, cache)
    with safe_open(path, "pt") as file:
        notes = file.metadata()
    tensors = load_file(path)
    spoilt = [
        {name: tensor for name, tensor in tensors.items() if name != "value.1"},
        {**tensors, "key.1": tensors["key.1"][:1]},
        {name: t[..., :-1] if "bank" in name else t for name, t in tensors.items()},
        {name: t for name, t in tensors.items() if not name.startswith("memory.cache.0.")},
    ]
    empty = new_cache()
    for each in spoilt:
        save_file({name: t.contiguous() for name, t in each.items()}, path, metadata=notes)
        with pytest.raises(ValueError, match=r"holds no cache|of another configuration"):
            memory.load_cache(path, empty)
        assert empty.get_seq_length() == 0
    save_file(tensors, path, metadata=notes)
    memory.load_cache(path, empty)
    assert torch.equal(go_on(model, empty, rest), go_on(model, cache, rest))


def test_windows_of_another_size_are_refused(tmp_path):
    from lm2_kernels import add_memory

    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    config, wider = (
        transformers.MistralConfig(**sizes, **heads, sliding_window=window) for window in (6, 9)
    )
    model = transformers.MistralForCausalLM(config).eval()
    memory = add_memory(model, memory_slots=8, num_heads=4).memory
    try:
        cache, other = (transformers.DynamicCache(config=c) for c in (config, wider))
    except TypeError:
        pytest.skip("this transformers cuts no cache to a window")
    with torch.no_grad():
        model(tokens(), past_key_values=cache)
    memory.save_cache(tmp_path / "chat", cache)
    with pytest.raises(NotImplementedError, match="as the saved one was made"):
        memory.load_cache(tmp_path / "chat", other)
    assert other.get_seq_length() == 0
    # or made for a model of fewer layers
    fewer = transformers.MistralConfig(**{**sizes, "num_hidden_layers": 1}, **heads)
    other = transformers.DynamicCache(config=fewer)
    with pytest.raises(NotImplementedError, match="as the saved one was made"):
        memory.load_cache(tmp_path / "chat", other)
    assert other.get_seq_length() == 0


TOGETHER = {
    "deepcopy": copy.deepcopy,
    "pickle": COPIES["pickle"],
    "torch.save": _by_torch,
}


@pytest.mark.parametrize("is_freed", (False, True))
@pytest.mark.parametrize("is_first", (True, False))
@pytest.mark.parametrize("how", TOGETHER)
def test_a_model_and_its_cache_are_copied_together(how, is_first, is_freed):
    model = llama()
    _, cache, rest, _ = begin(model)
    copied = TOGETHER[how]([model, cache] if is_first else [cache, model])
    other, again = copied if is_first else copied[::-1]
    want = go_on(model, cache, rest)
    if is_freed:
        del model, cache
        gc.collect()
    assert torch.equal(go_on(other, again, rest), want)


def test_a_copy_that_was_trained_refuses_what_it_has_not_read():
    model = llama()
    _, cache, rest, _ = begin(model)
    other, again = copy.deepcopy((model, cache))
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(0.1)
    with pytest.raises(ValueError, match="another model"):
        go_on(other, again, rest)
    # its own is one that it filled
    go_on(other, begin(other)[1], rest)
    go_on(model, again, rest)


@pytest.mark.parametrize("how", ("pickle", "torch.save"))
def test_what_no_model_can_go_on_with_is_not_pickled(how):
    model = llama()
    _, cache, rest, _ = begin(model)
    copied = copy.deepcopy(cache)
    del model
    gc.collect()
    with pytest.raises(pickle.PicklingError, match="the model that filled this cache is gone"):
        COPIES[how](cache)
    # a copy that was made in time knows whose it is
    go_on(llama(), COPIES[how](copied), rest)


def test_caches_of_a_memory_that_was_removed():
    """They are the bare model's from then on, or an equal memory's."""
    from lm2_kernels import remove_memory

    model = llama()
    _, cache, rest, _ = begin(model)
    want = go_on(model, copy.deepcopy(cache), rest)
    memory = get_memory(model)
    remove_memory(model)
    for is_freed in (False, True):
        if is_freed:
            del memory
            gc.collect()
        again = pickle.loads(pickle.dumps(cache))
        assert torch.equal(go_on(llama(), again, rest), want)
    go_on(model, cache, rest)
    assert pickle.loads(pickle.dumps(cache)).get_seq_length() == 20
    with pytest.raises(ValueError, match="cannot follow"):
        llama()(rest, past_key_values=cache)
