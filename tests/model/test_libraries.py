"""Checkpoints and offloading of accelerate, safetensors and huggingface_hub: as of any module."""

import copy
import importlib.util
import itertools

import pytest
import torch

import lm2_kernels as lm2
from tools.models import random_ids, small_model
from tools.rounding import assert_round_off

try:
    import accelerate
except ImportError:
    accelerate = None
try:
    import transformers
except ImportError:
    transformers = None
else:
    transformers.logging.set_verbosity_error()

with_accelerate = pytest.mark.skipif(accelerate is None, reason="accelerate is not installed")

SUBJECTS = {
    "paper": lambda: lm2.PaperMemory(24, 3, dtype=torch.float64),
    "release": lambda: lm2.ReleaseMemory(24, 3, dtype=torch.float64),
    "lm2-paper": lambda: small_model(torch.float64),
    "lm2-release": lambda: small_model(torch.float64, formulation="release"),
    "lm2-tied": lambda: small_model(torch.float64, tie_word_embeddings=True),
    "lm2-learned": lambda: small_model(torch.float64, memory_init="learned"),
    "llama-paper": lambda: _llama("paper"),
    "llama-release": lambda: _llama("release"),
}
every_subject = pytest.mark.parametrize("subject", SUBJECTS)


def _llama(formulation):
    if transformers is None:
        pytest.skip("transformers is not installed")
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).double()
    options = {"zero_init": False, "memory_init": "identity", "formulation": formulation}
    lm2.add_memory(model, memory_slots=6, num_heads=3, **options)
    return model.eval()


def _make(subject, seed=0):
    torch.manual_seed(seed)
    model = SUBJECTS[subject]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def _run(model):
    if isinstance(model, lm2.PaperMemory | lm2.ReleaseMemory):
        generator = torch.Generator().manual_seed(1)
        x, memory = torch.randn(2, 2, 6, 24, generator=generator, dtype=torch.float64).unbind(0)
        return model(x, memory)[0]
    return model(random_ids(2, 14)).logits


def _assert_same(got, wanted):
    assert torch.equal(_run(got), _run(wanted))
    state = wanted.state_dict()
    assert got.state_dict().keys() == state.keys()
    for name, tensor in got.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@every_subject
def test_safetensors_saves_and_loads(subject, tmp_path):
    from safetensors.torch import load_model, save_model

    model, other = _make(subject), _make(subject, seed=1)
    save_model(model, str(tmp_path / "x.safetensors"))
    load_model(other, str(tmp_path / "x.safetensors"))
    _assert_same(other, model)


@pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub") is None, reason="huggingface_hub is not installed"
)
@pytest.mark.parametrize("kind", (lm2.PaperMemory, lm2.ReleaseMemory))
def test_hub_mixin(kind, tmp_path):
    from huggingface_hub import PyTorchModelHubMixin

    class Shared(kind, PyTorchModelHubMixin):
        pass

    layer = Shared(24, num_heads=3).double()
    layer.save_pretrained(tmp_path)
    again = Shared.from_pretrained(tmp_path, dim=24, num_heads=3).double()
    _assert_same(again, layer)


@with_accelerate
@pytest.mark.parametrize(
    ("subject", "safe"), [*((name, True) for name in SUBJECTS), ("release", False)]
)
def test_accelerate_saves_every_weight(subject, safe, tmp_path):
    model, other = _make(subject), _make(subject, seed=1)
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path, safe_serialization=safe)
    accelerate.load_checkpoint_in_model(other, tmp_path)
    _assert_same(other, model)


@with_accelerate
@every_subject
def test_accelerate_state_goes_on(subject, tmp_path):
    """Saved in mid-training, with the optimiser, and loaded into another process's model."""

    def steps(model, optimizer, first, last):
        for step in range(first, last):
            torch.manual_seed(step)
            optimizer.zero_grad()
            if isinstance(model, lm2.PaperMemory | lm2.ReleaseMemory):
                x, memory = torch.randn(2, 2, 6, 24, dtype=torch.float64).unbind(0)
                output, memory = model(x, memory)
                accelerator.backward(output.square().mean() + memory.square().mean())
            else:
                ids = random_ids(2, 14, step)
                accelerator.backward(model(ids, labels=ids).loss)
            optimizer.step()

    accelerator = accelerate.Accelerator(cpu=True)
    model = _make(subject)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    steps(model, optimizer, 0, 2)
    accelerator.save_state(tmp_path)
    steps(model, optimizer, 2, 4)
    accelerator = accelerate.Accelerator(cpu=True)
    other = _make(subject, seed=1)
    other, optimizer = accelerator.prepare(other, torch.optim.AdamW(other.parameters()))
    accelerator.load_state(tmp_path)
    steps(other, optimizer, 2, 4)
    _assert_same(other, model)


def _places(model):
    """Blocks on the disk and on the CPU in turn, everything else on the CPU."""
    names = [name for name, _ in model.named_children()]
    if hasattr(model, "model"):
        names.remove("model")
        names += [f"model.{name}" for name, _ in model.model.named_children() if name != "layers"]
        names += [f"model.layers.{index}" for index in range(len(model.model.layers))]
    own = [name for name, _ in model.named_parameters(recurse=False)]
    turns = itertools.cycle(("disk", "cpu"))
    return {name: next(turns) if "layers." in name else "cpu" for name in [*names, *own]}


@with_accelerate
@every_subject
@pytest.mark.parametrize("way", ("cpu", "disk", "dispatch_model", "load and dispatch"))
def test_offloaded_weights_are_computed_with(subject, way, tmp_path):
    model = _make(subject)
    wanted, cpu = _run(model), torch.device("cpu")
    offloaded = copy.deepcopy(model)
    if way == "cpu":
        accelerate.cpu_offload(offloaded, cpu)
    elif way == "disk":
        accelerate.disk_offload(offloaded, str(tmp_path), cpu)
    elif way == "dispatch_model":
        options = {"main_device": "cpu", "offload_dir": str(tmp_path)}
        offloaded = accelerate.dispatch_model(offloaded, _places(model), **options)
    else:
        accelerate.Accelerator(cpu=True).save_model(model, tmp_path / "saved")
        with accelerate.init_empty_weights():
            offloaded = SUBJECTS[subject]()
        offloaded = accelerate.load_checkpoint_and_dispatch(
            offloaded, tmp_path / "saved", device_map=_places(model), offload_folder=tmp_path
        )
    for _ in range(2):
        # kernels of ours give way to the modules' own calls
        assert_round_off(_run(offloaded), wanted)
    # generate does not call the model itself, for which the initial memory would be fetched
    if hasattr(model, "generate") and subject != "lm2-learned":
        options = {"max_new_tokens": 9, "do_sample": False}
        sequences = [each.generate(random_ids(2, 8), **options) for each in (offloaded, model)]
        assert torch.equal(*(getattr(each, "sequences", each) for each in sequences))
