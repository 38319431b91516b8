"""PEFT's adapters beside an added memory: trained, saved, loaded and merged, or told what to do."""

import copy
import itertools
import warnings

import pytest
import torch

import lm2_kernels as lm2
from tools.models import random_ids
from tools.rounding import assert_round_off

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
transformers.logging.set_verbosity_error()

# PEFT calls what transformers deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

ADAPTERS = {
    "lora": lambda **options: peft.LoraConfig(target_modules=["q_proj", "v_proj"], **options),
    "lora-all": lambda **options: peft.LoraConfig(target_modules="all-linear", **options),
    "dora": lambda **options: peft.LoraConfig(
        target_modules="all-linear", use_dora=True, **options
    ),
    "ia3": lambda **options: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        **options,
    ),
    "oft": lambda **options: peft.OFTConfig(target_modules=["q_proj"], **options),
    "norms": lambda **options: peft.LNTuningConfig(target_modules=["input_layernorm"], **options),
}
# the others' merge_and_unload takes no module to save but a Linear
MERGEABLE = ("lora", "lora-all", "dora")


def _adapters(name="lora", save_memory=True):
    options = {"modules_to_save": ["memory"]} if save_memory else {}
    return ADAPTERS[name](task_type="CAUSAL_LM", **options)


def _host():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, pad_token_id=0,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


CHUNK = {"write": "chunk", "memory_slots": 2, "segment_length": 6, "candidate": "token"}


def _with_memory(formulation="paper", seed=0, **changes):
    model = _host()
    torch.manual_seed(seed)
    formulation, _, rule = formulation.partition("-")
    options = {"memory_slots": 6, "num_heads": 3, **(CHUNK if rule == "chunk" else {})}
    lm2.add_memory(model, formulation=formulation, **options, **changes)
    return model


def _train(model, steps=2, **options):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.03)
    model.train()
    for step in range(steps):
        ids = random_ids(2, 14, step)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, **options).loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def _logits(model):
    return model(input_ids=random_ids(2, 14, 9)).logits


@pytest.mark.parametrize(
    ("name", "formulation"),
    [*itertools.product(ADAPTERS, ("paper", "release")), ("lora-all", "paper-chunk")],
)
def test_memory_and_adapters_train_and_are_saved(name, formulation, tmp_path):
    model = peft.get_peft_model(_with_memory(formulation), _adapters(name))
    before = _logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _train(model)
    after = _logits(model)
    assert not torch.equal(after, before)
    changed = [name for name, p in model.named_parameters() if p.grad is not None]
    assert any(".memory.modules_to_save." in name for name in changed)
    assert any(".memory." not in name for name in changed)
    with model.disable_adapter():
        assert torch.equal(_logits(model), _logits(_host()))
    model.save_pretrained(tmp_path)
    # what the memory starts from does not matter: its weights are the adapter's
    other = peft.PeftModel.from_pretrained(_with_memory(formulation, seed=5), tmp_path).eval()
    assert torch.equal(_logits(other), after)
    options = {"max_new_tokens": 8, "do_sample": False}
    sequences = [each.generate(input_ids=random_ids(2, 9), **options) for each in (model, other)]
    assert torch.equal(*sequences)
    assert torch.equal(_logits(copy.deepcopy(model)), after)


@pytest.mark.parametrize(
    ("name", "formulation"),
    [*itertools.product(MERGEABLE, ("paper", "release")), ("lora-all", "release-chunk")],
)
def test_merged_adapters_leave_the_memory(name, formulation, tmp_path):
    model = _train(peft.get_peft_model(_with_memory(formulation), _adapters(name)))
    after = _logits(model)
    merged = model.merge_and_unload()
    assert isinstance(lm2.get_memory(merged).layers[0], lm2.PaperMemory | lm2.ReleaseMemory)
    assert_round_off(_logits(merged), after)
    merged.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    lm2.load_memory(again, tmp_path)
    assert_round_off(_logits(again), after)
    lm2.remove_memory(merged)
    # and may begin anew
    lm2.add_memory(merged, memory_slots=6, num_heads=3)


def test_the_memory_of_an_adapter_is_not_loaded_alone(tmp_path):
    peft.get_peft_model(_with_memory(), _adapters()).save_pretrained(tmp_path)
    host = _host()
    with pytest.raises(ValueError, match=r"add_memory .*, then PeftModel\.from_pretrained"):
        lm2.load_memory(host, tmp_path)
    assert torch.equal(_logits(host), _logits(_host()))


def test_an_adapter_goes_on_training(tmp_path):
    model = _train(peft.get_peft_model(_with_memory(), _adapters()))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(_with_memory(seed=5), tmp_path, is_trainable=True)
    assert torch.equal(_logits(_train(again)), _logits(_train(model)))


def test_each_adapter_has_its_own_memory(tmp_path):
    model = peft.get_peft_model(_with_memory(), _adapters(), adapter_name="one")
    wanted = {"one": _logits(_train(model))}
    model.add_adapter("two", _adapters("lora-all"))
    model.set_adapter("two")
    assert torch.equal(_logits(model), _logits(_host()))
    wanted["two"] = _logits(_train(model))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(
        _with_memory(seed=5), tmp_path / "one", adapter_name="one"
    )
    again.load_adapter(tmp_path / "two", adapter_name="two")
    for name, logits in wanted.items():
        for each in (model, again.eval()):
            each.set_adapter(name)
            assert torch.equal(_logits(each), logits)


def test_adapters_of_the_memory_itself(tmp_path):
    """LoRA on the memory's projections: their own weights are the base's, saved with it."""
    base = _with_memory()
    with torch.no_grad():
        for layer in lm2.get_memory(base).layers:
            layer.value_proj.weight.normal_()
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["query_proj", "value_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    before = _logits(model)
    with pytest.warns(UserWarning, match="merge_and_unload"):
        _train(model)
    after = _logits(model)
    assert not torch.equal(after, before)
    model.save_pretrained(tmp_path / "adapter")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    lm2.load_memory(again.eval(), tmp_path / "base")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert torch.equal(_logits(again), after)
    assert_round_off(_logits(again.merge_and_unload()), after)


@pytest.mark.parametrize("name", ("lora", "ia3", "lora-all"))
def test_a_memory_that_adapters_forget_is_warned_of(name):
    model = peft.get_peft_model(_with_memory(), _adapters(name, save_memory=False))
    with pytest.warns(UserWarning, match=r"modules_to_save=\['memory'\]") as told:
        _train(model)
    assert len([each for each in told if "add_memory" in str(each.message)]) == 1


def test_a_second_adapter_that_forgets_the_memory_is_warned_of():
    model = peft.get_peft_model(_with_memory(), _adapters())
    model.add_adapter("b", _adapters(save_memory=False))
    model.set_adapter("b")
    with pytest.warns(UserWarning, match=r"modules_to_save=\['memory'\]"):
        _train(model)


@pytest.mark.parametrize("of", (lambda model: model, lambda model: model.get_base_model()))
@pytest.mark.parametrize("name", ("lora", "ia3"))
def test_adapters_before_the_memory_are_refused(name, of):
    model = of(peft.get_peft_model(_host(), _adapters(name, save_memory=False)))
    state = set(model.state_dict())
    with pytest.raises(ValueError, match=r"first, then the adapters, with modules_to_save"):
        lm2.add_memory(model, memory_slots=6, num_heads=3)
    assert set(model.state_dict()) == state


def test_merged_adapters_before_the_memory():
    model = _train(peft.get_peft_model(_host(), _adapters(save_memory=False))).merge_and_unload()
    before = _logits(model)
    lm2.add_memory(model, memory_slots=6, num_heads=3)
    assert torch.equal(_logits(model), before)


@pytest.mark.parametrize("kind", ("PromptTuningConfig", "PromptEncoderConfig"))
def test_virtual_tokens_are_read_too(kind, tmp_path):
    """They are rows of the input: the memory counts them, padded or not."""
    model = _with_memory(memory_init="identity", zero_init=False).float()
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(model, config)
    with pytest.warns(UserWarning, match="no parameter of the memory requires gradients"):
        _train(model)
    ids, mask = random_ids(2, 8), torch.ones(2, 8, dtype=torch.int64)
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask).logits
        mask[0, :3] = 0
        padded = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(padded[1], whole[1])
    generated = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert generated.shape == (2, 12)


def test_a_prefix_of_keys_is_refused():
    model = _with_memory().float()
    model = peft.get_peft_model(
        model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    with pytest.raises(ValueError, match="tokens that this memory has not read"):
        model(input_ids=random_ids(2, 8))


def test_a_base_that_is_made_ready_for_few_bits():
    model = peft.prepare_model_for_kbit_training(_with_memory().float())
    with pytest.warns(UserWarning, match="no parameter of the memory requires gradients"):
        _ = model.train()(input_ids=random_ids(2, 8))
    model = peft.get_peft_model(model, _adapters())
    before = _logits(model.eval())
    assert not torch.equal(_logits(_train(model)), before)


def test_the_report_has_the_parameters_of_both():
    model = _host()
    report = lm2.add_memory(model, memory_slots=6, num_heads=3)
    wrapped = peft.get_peft_model(model, _adapters())
    groups = report.parameter_groups(1e-3, backbone_lr=1e-4)
    counted = {id(parameter) for group in groups for parameter in group["params"]}
    assert counted == {id(p) for p in wrapped.parameters() if p.requires_grad}
    assert {group["lr"] for group in groups} == {1e-3, 1e-4}
