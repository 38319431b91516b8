"""The fingerprint of a patched model: a cache is refused by all that would have read otherwise."""

import copy
import pickle

import pytest
import torch

from lm2_kernels import add_memory, get_memory
from lm2_kernels.patching.prints import fingerprint
from tools.hosts import SLOTS, bare_llama, begin, go_on, hosted, llama, new_cache

try:
    import peft
except ImportError:
    peft = None
try:
    import accelerate
except ImportError:
    accelerate = None

pytestmark = hosted
with_peft = pytest.mark.skipif(peft is None, reason="peft is not installed")
with_accelerate = pytest.mark.skipif(accelerate is None, reason="accelerate is not installed")


def _print(model):
    return get_memory(model).fingerprint()


def _adapted(seed=0, name="default", **options):
    """With LoRA and a memory of its own, both random."""
    model = llama()
    options = {"target_modules": ["q_proj"], "modules_to_save": ["memory"], **options}
    torch.manual_seed(seed)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
    model = peft.get_peft_model(model, config, adapter_name=name).eval()
    _spoil(model, f".modules_to_save.{name}.")
    return model


@torch.no_grad()
def _spoil(model, part):
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)


@pytest.mark.parametrize(
    "part", ("embed_tokens", "layers.1.mlp", "layers.0.input_layernorm", "layers.0.memory")
)
def test_other_weights_are_refused(part, tmp_path):
    """Of the host, too: its keys and values are in the file."""
    model, other = llama(), llama()
    _, cache, rest, _ = begin(model)
    assert _print(other) == _print(model)
    _spoil(other, part)
    get_memory(model).save_cache(tmp_path / "chat", cache)
    empty = new_cache()
    with pytest.raises(ValueError, match="other weights"):
        get_memory(other).load_cache(tmp_path / "chat", empty)
    assert empty.get_seq_length() == 0
    with pytest.raises(ValueError, match="another model"):
        go_on(other, pickle.loads(pickle.dumps(cache)), rest)
    assert _print(llama(dtype=torch.float64)) != _print(model)
    other = bare_llama()
    add_memory(other, memory_slots=SLOTS, num_heads=2)
    other.load_state_dict(model.state_dict())
    assert _print(other) != _print(model)


def test_another_rule_is_refused(tmp_path):
    """Of memories with equal weights; where there is no other rule, the print is what it was."""
    models = {kind: llama(kind) for kind in ("paper", "paper-all-read", "paper-chunk-read")}
    assert len({_print(model) for model in models.values()}) == 3
    memory = get_memory(models["paper"])
    assert memory.fingerprint() == fingerprint(memory._decoder, "4 heads")
    for kind, model in models.items():
        _, cache, rest, _ = begin(model)
        get_memory(model).save_cache(tmp_path / "chat", cache)
        for other in (other for name, other in models.items() if name != kind):
            with pytest.raises(ValueError, match="or another rule"):
                get_memory(other).load_cache(tmp_path / "chat", new_cache())
            with pytest.raises(ValueError, match="another model"):
                go_on(other, pickle.loads(pickle.dumps(cache)), rest)


def test_what_is_no_weight_does_not_count():
    """Where it is computed, buffers that change on the way, and whether there are gradients."""
    model, other = llama(), llama().train()
    other(begin(model)[2], labels=begin(model)[2]).loss.backward()
    other.requires_grad_(False)
    other.model.register_buffer("seen", torch.ones(3), persistent=False)
    assert _print(other) == _print(model)
    other.model.register_buffer("scales", torch.ones(3))
    assert _print(other) != _print(model)


@with_accelerate
@pytest.mark.parametrize("way", ("cpu", "disk"))
def test_offloaded_weights_count(way, tmp_path):
    model, other = llama(), llama()
    _spoil(other, "layers.1.mlp")
    want = _print(model), _print(other)
    for each in (model, other):
        if way == "cpu":
            accelerate.cpu_offload(each, "cpu")
        else:
            accelerate.disk_offload(each, str(tmp_path / str(id(each))), "cpu")
    assert (_print(model), _print(other)) == want


class _Wrapped(torch.Tensor):
    """As libraries of quantisation have it: the numbers are in other tensors."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].inner)
        raise NotImplementedError(f"{func}")


def test_weights_made_of_others():
    model, other = llama(), llama()
    for each in (model, other):
        projection = each.model.layers[0].mlp.up_proj
        projection.weight = torch.nn.Parameter(_Wrapped(projection.weight.detach().clone()))
    assert _print(model) == _print(other)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.inner.add_(0.1)
    assert _print(model) != _print(other)


@with_peft
def test_a_chat_is_its_adapters(tmp_path):
    """Saved under one, refused under another, wherever they differ."""
    model, path = _adapted(), tmp_path / "chat"
    memory = get_memory(model)
    _, cache, rest, _ = begin(model)
    memory.save_cache(path, cache)
    model.add_adapter("b", copy.deepcopy(model.peft_config["default"]))
    _spoil(model, ".modules_to_save.b.")

    def refused():
        with pytest.raises(ValueError, match="other weights, or with another adapter"):
            memory.load_cache(path, new_cache())
        return True

    model.set_adapter("b")
    assert refused()
    model.set_adapter("default")
    empty = new_cache()
    memory.load_cache(path, empty)
    assert torch.equal(go_on(model, empty, rest), go_on(model, cache, rest))
    with model.disable_adapter():
        assert refused()
        assert memory.fingerprint() == _print(llama())
    projection = model.base_model.model.model.layers[0].self_attn.q_proj
    projection.set_scale("default", 2.0)
    assert refused()
    projection.set_scale("default", 1.0)
    memory.load_cache(path, new_cache())
    _spoil(projection, "lora_A.default")
    assert refused()


@with_peft
def test_names_of_adapters_do_not_count():
    assert _print(_adapted(name="default")) == _print(_adapted(name="mine"))
    assert _print(_adapted(seed=0)) != _print(_adapted(seed=1))


@with_peft
def test_a_memory_that_leaves_peft_is_the_same(tmp_path):
    """What PEFT merged in place is what it leaves."""
    model = _adapted()
    before = _print(model)
    model.merge_adapter()
    assert _print(model) != before
    _, cache, rest, _ = begin(model)
    get_memory(model).save_cache(tmp_path / "chat", cache)
    merged = copy.deepcopy(model).merge_and_unload()
    assert _print(merged) == _print(model)
    empty = new_cache()
    get_memory(merged).load_cache(tmp_path / "chat", empty)
    assert torch.equal(go_on(merged, empty, rest), go_on(model, cache, rest))
