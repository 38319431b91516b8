"""transformers' Trainer on a model with an added memory: it trains, saves, and goes on."""

import pytest
import torch

import lm2_kernels as lm2
from tools.models import random_ids

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
transformers.logging.set_verbosity_error()


class _Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = random_ids(1, 14, index)[0]
        return {"input_ids": ids, "labels": ids}


def _with_memory(formulation, seed=0, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    torch.manual_seed(seed)
    lm2.add_memory(model, memory_slots=6, num_heads=3, formulation=formulation, **options)
    return model


def _trainer(model, folder, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=4,
        save_steps=2,
        learning_rate=0.01,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        **options,
    )
    return transformers.Trainer(model, arguments, train_dataset=_Texts())


@torch.no_grad()
def _logits(model):
    return model.eval()(input_ids=random_ids(2, 14, 9)).logits


@pytest.mark.parametrize("formulation", ("paper", "release"))
@pytest.mark.parametrize("freeze", (True, False))
def test_trainer_saves_and_goes_on(formulation, freeze, tmp_path):
    model = _with_memory(formulation, freeze=freeze)
    before = _logits(model)
    _trainer(model, tmp_path).train()
    wanted = _logits(model)
    assert not torch.equal(wanted, before)
    # from the middle, with other weights at first
    again = _with_memory(formulation, seed=5, freeze=freeze)
    _trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(_logits(again), wanted)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    lm2.load_memory(loaded, tmp_path / "checkpoint-4")
    assert torch.equal(_logits(loaded), wanted)


def test_trainer_checkpoints_activations(tmp_path):
    plain, checkpointed = _with_memory("paper"), _with_memory("paper")
    _trainer(plain, tmp_path / "plain").train()
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    _trainer(checkpointed, tmp_path, gradient_checkpointing=True, **options).train()
    assert torch.equal(_logits(checkpointed), _logits(plain))


def test_trainer_of_adapters_saves_the_memory(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["memory"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(_with_memory("paper"), config)
    _trainer(model, tmp_path).train()
    wanted = _logits(model)
    again = peft.get_peft_model(_with_memory("paper", seed=5), config)
    _trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(_logits(again), wanted)
    # as trained: what is frozen keeps keys from piece to piece, which rounds otherwise
    loaded = peft.PeftModel.from_pretrained(
        _with_memory("paper"), tmp_path / "checkpoint-4", is_trainable=True
    )
    assert torch.equal(_logits(loaded), wanted)
