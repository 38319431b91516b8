"""The training loop: it learns, keeps to its schedule, clips, and counts right answers."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lm2_kernels import LM2Config, LM2ForCausalLM
from lm2_kernels.evaluation.accuracy import Accuracy, evaluate
from lm2_kernels.evaluation.stories import QATask
from lm2_kernels.training import loop
from lm2_kernels.training.loop import learning_rate, mean_loss, optimizer_groups, train
from tools.waits import DEVICE, counted


class _Line(nn.Module):
    """loss = factor * weight: the gradient is the factor, whatever the weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1))
        self.calls = []

    def forward(self, factor, bptt_segments=None):
        self.calls.append((self.training, bptt_segments))
        return SimpleNamespace(loss=(factor * self.weight).sum())


class _Fixed(nn.Module):
    """Logits that are given."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids):
        assert not self.training
        return SimpleNamespace(logits=self.logits[: len(input_ids)])


def _factors(*factors):
    return [{"factor": torch.tensor([[factor]])} for factor in factors]


def _tiny():
    torch.manual_seed(0)
    task = QATask(segment_length=8, sentences=2, people=1, places=2, objects=1)
    config = LM2Config(task.vocabulary.vocab_size, 16, 32, 1, 2, memory_slots=8, memory_heads=2)
    return task, LM2ForCausalLM(config)


def test_learning_rate_values():
    rates = [learning_rate(step, 10, 4, floor=0.2) for step in range(10)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[7] == pytest.approx(0.2 + 0.8 * 0.5)  # half way down
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[9] > 0.2
    assert learning_rate(10, 10, 4, floor=0.2) == pytest.approx(0.2)
    assert learning_rate(0, 1, 0) == 1.0
    assert learning_rate(1, 2, 5) == 0.4  # shorter than its warmup


def test_training_lowers_the_loss():
    task, model = _tiny()
    losses = train(model, task.batches(16, 0), steps=60, lr=1e-2, warmup=5)
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_training_is_deterministic():
    losses = []
    for _ in range(2):
        task, model = _tiny()
        losses.append(train(model, task.batches(4, 0), steps=4, lr=1e-2, bptt_segments=1))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("autocast", (None, torch.bfloat16))
def test_training_autocast(autocast):
    task, model = _tiny()
    losses = train(model, task.batches(4, 0), steps=2, lr=1e-3, autocast=autocast)
    assert all(math.isfinite(loss) for loss in losses)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_training_passes_options_and_reports():
    model, seen = _Line().eval(), []
    options = {"steps": 3, "lr": 0.5, "weight_decay": 0.0, "bptt_segments": 2}
    losses = train(
        model, _factors(1.0, 1.0, 1.0), progress=lambda *args: seen.append(args), **options
    )
    assert model.calls == [(True, 2)] * 3
    assert not model.training
    assert seen == [(step + 1, 3, loss) for step, loss in enumerate(losses)]


def test_training_follows_the_schedule():
    # AdamW moves by the learning rate where gradients are equal
    model, weights = _Line(), [0.0]
    train(
        model,
        _factors(*[1.0] * 6),
        steps=6,
        lr=0.5,
        warmup=2,
        weight_decay=0.0,
        progress=lambda *_: weights.append(model.weight.item()),
    )
    moved = [before - after for before, after in itertools.pairwise(weights)]
    wanted = [0.5 * learning_rate(step, 6, 2) for step in range(6)]
    assert moved == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("clip", "norm"), [(0.25, 0.25), (None, 3.0), (5.0, 3.0)])
def test_training_clips_gradients(clip, norm):
    model = _Line()
    train(model, _factors(3.0), steps=1, lr=0.1, clip=clip)
    assert model.weight.grad.item() == pytest.approx(norm, rel=1e-4)


def test_weights_decay_and_vectors_do_not():
    _, model = _tiny()
    model.model.norm.weight.requires_grad_(False)
    decays, stays = optimizer_groups(model, 0.3)
    assert (decays["weight_decay"], stays["weight_decay"]) == (0.3, 0.0)
    assert all(parameter.dim() >= 2 for parameter in decays["params"])
    assert all(parameter.dim() < 2 for parameter in stays["params"])
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    assert len(decays["params"]) + len(stays["params"]) == trained


def test_training_stops_at_a_loss_that_is_not_finite():
    model, weights = _Line(), []
    with pytest.raises(FloatingPointError, match="step 2 is nan"):
        train(
            model,
            _factors(1.0, math.nan, 1.0),
            steps=3,
            lr=0.5,
            progress=lambda *_: weights.append(model.weight.item()),
        )
    assert [model.weight.item()] == weights


def test_training_stops_where_it_is_told():
    model = _Line()
    assert len(train(model, _factors(1.0, 1.0, 1.0), steps=3, lr=0.5, progress=_second)) == 2
    assert len(model.calls) == 2


def _second(done, *_):
    return done == 2


def test_what_is_random_in_a_step_is_its_own():
    """By the seed, the step's number in the whole run, and the process."""

    def drawn(seed=0, first=0, rank=0, count=3):
        return [torch.rand(4).tolist() for _ in loop.seeded([{}] * count, seed, first, rank)]

    whole = drawn()
    assert len({tuple(numbers) for numbers in whole}) == 3
    assert drawn(first=1, count=2) == whole[1:]
    for others in (drawn(seed=1), drawn(rank=1)):
        assert not any(numbers in whole for numbers in others)


def test_no_step_reads_a_number_from_the_device(monkeypatch):
    """A GPU would wait for it: losses and counts are fetched as copies, or once at the end."""
    model, factors = _Line().to(DEVICE), _factors(*[1.0] * 4)
    with monkeypatch.context() as patch, counted() as waits:
        # which asks for the loss while the device is busy: the next test
        patch.setattr(loop._Fetched, "value", lambda _: 1.0)
        train(model, factors, steps=4, lr=1e-2)
        assert waits == []
    ids = torch.zeros(2, 4, dtype=torch.int64)
    batches = [{"input_ids": ids, "labels": ids}] * 4
    with counted() as waits:
        mean_loss(model, factors)
    assert len(waits) == 1
    with counted() as waits:
        evaluate(_Fixed(torch.zeros(2, 4, 3, device=DEVICE)), batches)
    assert len(waits) == 2


def test_a_loss_is_read_after_its_backward_pass_was_begun(monkeypatch):
    """The device has the backward pass to do meanwhile; the parameters are not touched yet."""
    model, order = _Line(), []
    value, step = loop._Fetched.value, torch.optim.AdamW.step

    def note(name, real):
        def call(*args, **options):
            order.append(name)
            return real(*args, **options)

        return call

    model.weight.register_hook(lambda _: order.append("backward"))
    monkeypatch.setattr(loop._Fetched, "value", note("read", value))
    monkeypatch.setattr(torch.optim.AdamW, "step", note("step", step))
    train(model, _factors(1.0, 1.0), steps=2, lr=0.1)
    assert order == ["backward", "read", "step"] * 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 4}, "4 steps need as many batches, got 3"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"warmup": -1}, "warmup must be at least 0"),
    ],
)
def test_training_options_that_do_not_fit(options, text):
    with pytest.raises(ValueError, match=text):
        train(_Line(), _factors(1.0, 1.0, 1.0), **{"steps": 3, "lr": 0.1, **options})


def test_evaluate_counts():
    # the likeliest tokens: 1 2 0 after the row's first three positions, the last predicts nothing
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 2, 0, 1]]), 3).float()
    model = _Fixed(logits.repeat(2, 1, 1)).train()
    ids = torch.zeros(2, 4, dtype=torch.int64)
    labels = torch.tensor([[0, 1, -100, 2], [-100, 2, 2, 0]])  # labels[:, 0] is never predicted
    accuracy = evaluate(model, [{"input_ids": ids, "labels": labels}] * 2)
    assert accuracy == Accuracy(right=6, total=10)
    assert str(accuracy) == "60.0 % (6 of 10)"
    assert model.training
    assert math.isnan(evaluate(model, []).share)
