"""The model under transformers' Trainer: trains, saves, resumes, evaluates."""

import pytest
import torch

from lm2_kernels import LM2ForCausalLM
from tools.models import random_ids, small_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="Trainer needs accelerate, which is not installed")


def _rows():
    rows = random_ids(1, 12).repeat(16, 1)
    return [{"input_ids": row, "labels": row} for row in rows]


def _trainer(model, folder, **options):
    arguments = {"per_device_train_batch_size": 4, "save_steps": 4, "learning_rate": 1e-2}
    arguments |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "max_steps": 8}
    collected = {name: options.pop(name) for name in list(options) if name in ("bf16",)}
    collected |= {n: options.pop(n) for n in list(options) if n == "gradient_checkpointing"}
    own = transformers.TrainingArguments(str(folder), **arguments, **collected)
    return transformers.Trainer(model, own, train_dataset=_rows(), **options)


@pytest.mark.parametrize("bf16", (False, True))
def test_trainer(bf16, tmp_path):
    model = small_model(torch.float32)
    with torch.no_grad():
        before = model(*_batch()).loss
    _trainer(model, tmp_path, bf16=bf16).train()
    with torch.no_grad():
        assert model(*_batch()).loss < 0.9 * before
    want = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # what Trainer saved goes on, and the model saves itself
    again = small_model(torch.float32, seed=1)
    _trainer(again, tmp_path, bf16=bf16).train(resume_from_checkpoint=True)
    again.save(tmp_path / "model")
    for name, tensor in LM2ForCausalLM.load(tmp_path / "model").state_dict().items():
        assert torch.equal(tensor, want[name]), name


def _batch():
    ids = torch.stack([row["input_ids"] for row in _rows()])
    return ids, ids


def test_trainer_evaluates(tmp_path):
    """The loss alone; predictions too where the batch asks for logits."""
    model = small_model(torch.float32)
    trainer = _trainer(model, tmp_path, eval_dataset=_rows())
    loss = trainer.evaluate()["eval_loss"]
    assert loss == pytest.approx(model(*_batch()).loss.item(), rel=1e-5)

    def with_logits(rows):
        return {n: torch.stack([row[n] for row in rows]) for n in rows[0]} | {"return_logits": True}

    def shape(prediction):
        return {"shape": list(prediction.predictions.shape)}

    more = {"data_collator": with_logits, "compute_metrics": shape}
    found = _trainer(model, tmp_path, eval_dataset=_rows(), **more).evaluate()
    assert found["eval_shape"] == [16, 12, 61]


def test_trainer_is_told_that_there_is_no_gradient_checkpointing(tmp_path):
    with pytest.raises(NotImplementedError, match="memory_recompute=True"):
        _trainer(small_model(torch.float32), tmp_path, gradient_checkpointing=True).train()
