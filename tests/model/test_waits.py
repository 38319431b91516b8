"""How often the host waits for its device: on a GPU each time costs what it has queued."""

import contextlib

import pytest
import torch

from tools.models import KINDS, random_ids, small_model
from tools.waits import DEVICE, counted

every_kind = pytest.mark.parametrize(("formulation", "flow"), KINDS)


def test_waits_are_seen():
    """By the tool: each of these asks the device."""
    x, there = torch.ones(3, device=DEVICE), torch.ones(3)
    for wait in (
        lambda: x.sum().item(),
        lambda: bool(x.any()),
        x.tolist,
        x.cpu,
        x.nonzero,
        lambda: x[x > 0],
        lambda: there.to(DEVICE),
        lambda: torch.equal(x, x),
        lambda: torch.tensor([1, 2], device=DEVICE),
        lambda: there[x.long()],
    ):
        # some have no shape on meta
        with counted(1) as waits, contextlib.suppress(RuntimeError, NotImplementedError):
            wait()
        assert waits
    with counted() as waits:
        there.to(DEVICE, non_blocking=True)
        (x * 2).sum()
    assert waits == []


def _model(formulation, flow):
    options = {"formulation": formulation, "flow": flow}
    return small_model(torch.float32, num_hidden_layers=2, **options).to(DEVICE)


@every_kind
def test_a_training_step_waits_for_nothing(formulation, flow):
    model, ids = _model(formulation, flow), random_ids(2, 15).to(DEVICE)
    optimizer, mask = torch.optim.AdamW(model.parameters()), torch.ones(2, 15, dtype=torch.bool)
    mask[0, 9:] = False
    for options in ({}, {"attention_mask": mask}):
        with counted() as waits:
            model(ids, ids, **options, bptt_segments=2).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        assert waits == []
    on_device = mask.to(DEVICE)
    with counted(answer=15) as waits:
        model(ids, ids, attention_mask=on_device).loss.backward()
    assert len(waits) == 1


@every_kind
def test_a_decode_step_waits_once_if_it_must(formulation, flow):
    """For end tokens, or to show a token; else for nothing, sampling or not."""
    model, ids = _model(formulation, flow), random_ids(2, 5).to(DEVICE)

    def waits_of(count, **options):
        with counted(answer=3) as waits:
            model.generate(ids, max_new_tokens=count, **options)
        return len(waits)

    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for options in ({}, {"do_sample": True, "top_k": 5, "top_p": 0.9}, {"attention_mask": mask}):
        assert waits_of(5, **options) == 0
    for options in ({"eos_token_id": [5, 7]}, {"on_token": print}, {"eos_token_id": 5}):
        assert waits_of(5, **options) == 5
    # rows at different places
    with counted() as waits:
        state = model(ids, attention_mask=mask, use_cache=True).memory
        for _ in range(4):
            state = model(ids[:, :1], memory=state, use_cache=True).memory
    assert waits == []
